"""Macro AUROC of a label group with a bootstrap interval over patients.

Protocol (Strodthoff et al. 2021, "Deep Learning for ECG Analysis: Benchmarks and Insights from PTB-XL"): of
each group, the records with at least one label in it; the mean over its classes. A class takes part when it
has both positives and negatives.
"""

from dataclasses import dataclass

import numpy as np

from ecgot.data.ptbxl import Labels


@dataclass(frozen=True)
class AurocResult:
    """Macro AUROC with its 95 % interval (NaN where no class can be scored), and each class's own.

    Attributes:
        records: how many records took part.
        positives, auroc: by class; classes without positives or without negatives are left out.
    """

    macro: float
    low: float
    high: float
    records: int
    positives: dict[str, int]
    auroc: dict[str, float]


def macro_auroc(
    scores: np.ndarray, labels: Labels, patients: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> AurocResult:
    """Score a label group.

    Args:
        scores: [n, C], larger where a class is more likely; compared within a class only.
        labels: the group's classes and matrix [n, C].
        patients: [n], ids; the bootstrap draws patients, as records of one patient resemble each other.
        resamples: of the bootstrap (percentile interval). In a resample without a rare class, the class has
            the AUROC that it has in all records.
    """
    counted = labels.matrix.any(1)
    scores, truth, patients = scores[counted], labels.matrix[counted], patients[counted]
    scored = [c for c in range(len(labels.classes)) if truth[:, c].any() and not truth[:, c].all()]
    if not scored:
        return AurocResult(float("nan"), float("nan"), float("nan"), int(counted.sum()), {}, {})
    weights = np.concatenate([np.ones((1, len(truth))), patient_weights(patients, resamples, seed)])
    areas = np.stack([weighted_auroc(scores[:, c], truth[:, c], weights) for c in scored])
    # A resample may miss a rare class, which then counts with what it has in all records: left out, it would
    # move the mean of the resample by how hard a class it is.
    drawn = np.where(np.isnan(areas[:, 1:]), areas[:, :1], areas[:, 1:]).mean(axis=0)
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
    return AurocResult(
        macro=float(areas[:, 0].mean()),
        low=float(low),
        high=float(high),
        records=int(counted.sum()),
        positives={labels.classes[c]: int(truth[:, c].sum()) for c in scored},
        auroc={labels.classes[c]: float(area[0]) for c, area in zip(scored, areas, strict=True)},
    )


def patient_weights(patients: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """How often each record is in each bootstrap resample of patients: [resamples, n]."""
    _, patient = np.unique(patients, return_inverse=True)
    count = int(patient.max()) + 1
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
    return drawn[:, patient].astype(np.float64)


def weighted_auroc(scores: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC [R] of scores [n] against truth [n] under R sets of record weights [R, n]; ties count half.

    NaN where a set of weights leaves no positive or no negative.
    """
    order = np.argsort(scores, kind="stable")
    values, positive, weights = scores[order], truth[order], weights[:, order]
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])  # of each run of equal scores
    up = np.add.reduceat(weights * positive, starts, axis=1)
    down = np.add.reduceat(weights * ~positive, starts, axis=1)
    below = np.cumsum(down, axis=1) - down / 2
    pairs = up.sum(1) * down.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(pairs > 0, (up * below).sum(1) / pairs, np.nan)
