"""Macro AUROC of a label group with a bootstrap interval over patients.

The protocol of Strodthoff et al. 2021, "Deep Learning for ECG Analysis: Benchmarks and Insights from
PTB-XL": only records with at least one label in the group count, and the result is the mean over its classes.
Classes without positives or without negatives are left out.
"""

from dataclasses import dataclass

import numpy as np

from ecgot.choices import RESAMPLES
from ecgot.data.ptbxl import Labels


@dataclass(frozen=True)
class AurocResult:
    """Macro AUROC of a label group.

    Attributes:
        macro, low, high: the mean over classes and its 95 % interval; NaN if no class can be scored.
        records: how many records count.
        positives, auroc: by class, for classes with both positives and negatives.
    """

    macro: float
    low: float
    high: float
    records: int
    positives: dict[str, int]
    auroc: dict[str, float]


def macro_auroc(
    scores: np.ndarray, labels: Labels, patients: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> AurocResult:
    """Macro AUROC of a label group, with a percentile bootstrap interval.

    Args:
        scores: [n, C], larger where a class is more likely; only compared within a class.
        labels: the group's classes and matrix [n, C].
        patients: [n], ids. The bootstrap draws patients, since records of one patient resemble each other.
        resamples: of the bootstrap; 0: no interval.
        seed: of the bootstrap.
    """
    counted = labels.matrix.any(1)
    scores, truth, patients = scores[counted], labels.matrix[counted], patients[counted]
    scored = [c for c in range(len(labels.classes)) if truth[:, c].any() and not truth[:, c].all()]
    if not scored:
        return AurocResult(float("nan"), float("nan"), float("nan"), int(counted.sum()), {}, {})
    weights = np.concatenate([np.ones((1, len(truth))), patient_weights(patients, resamples, seed)])
    areas = np.stack([weighted_auroc(scores[:, c], truth[:, c], weights) for c in scored])
    # A resample may miss a rare class, which then keeps its AUROC over all records. Leaving it out would
    # shift the mean by how hard that class is.
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
    """How often each record is in each bootstrap resample of patients: [resamples, n], for patients [n]."""
    _, patient = np.unique(patients, return_inverse=True)
    count = int(patient.max()) + 1
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
    return drawn[:, patient].astype(np.float64)


def weighted_auroc(scores: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC [R] of scores [n] against truth [n] for R sets of record weights [R, n]; ties count half.

    NaN where the weights leave no positive or no negative.
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
