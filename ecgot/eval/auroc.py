"""Macro AUROC of a label group with a bootstrap interval over patients.

The protocol of Strodthoff et al. 2021, "Deep Learning for ECG Analysis: Benchmarks and Insights from
PTB-XL": only records with at least one label in the group count, and the result is the mean over its classes.
Classes without positives or without negatives are left out.
"""

from collections.abc import Iterator, Sequence
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
        positives, negatives, auroc, intervals: by class, for classes with both positives and negatives.
    """

    macro: float
    low: float
    high: float
    records: int
    positives: dict[str, int]
    negatives: dict[str, int]
    auroc: dict[str, float]
    intervals: dict[str, tuple[float, float]]


def macro_auroc(
    scores: np.ndarray,
    labels: Labels,
    patients: np.ndarray,
    *,
    known: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> AurocResult:
    """Macro AUROC of a label group, with a percentile bootstrap interval.

    Args:
        scores: [n, C], larger where a class is more likely; only compared within a class.
        labels: the group's classes and matrix [n, C].
        patients: [n], ids. The bootstrap draws patients, since records of one patient resemble each other.
        known: [n, C] bool, the labels that count, negatives as much as positives. None: those of all records
            with a label in the group, which is the protocol.
        resamples: of the bootstrap; 0: no interval.
        seed: of the bootstrap.
    """
    if known is None:
        known = np.broadcast_to(labels.matrix.any(1, keepdims=True), labels.matrix.shape)
    counted = known.any(1)
    scores, truth, known, patients = (
        scores[counted],
        labels.matrix[counted],
        known[counted],
        patients[counted],
    )
    positives, negatives = (truth & known).sum(0), (~truth & known).sum(0)
    scored = np.flatnonzero((positives > 0) & (negatives > 0)).tolist()
    if not scored:
        return AurocResult(float("nan"), float("nan"), float("nan"), int(counted.sum()), {}, {}, {}, {})
    weights = np.concatenate([np.ones((1, len(truth))), patient_weights(patients, resamples, seed)])
    areas = np.stack(
        [
            weighted_auroc(scores[rows, c], truth[rows, c], weights[:, rows])
            for c, rows in _rows(known, scored)
        ]
    )
    # A resample may miss a rare class, which then keeps its AUROC over all records. Leaving it out would
    # shift the mean by how hard that class is.
    drawn = np.where(np.isnan(areas[:, 1:]), areas[:, :1], areas[:, 1:])
    names = [labels.classes[c] for c in scored]
    low, high = _interval(drawn.mean(axis=0))
    return AurocResult(
        macro=float(areas[:, 0].mean()),
        low=low,
        high=high,
        records=int(counted.sum()),
        positives=dict(zip(names, positives[scored].tolist(), strict=True)),
        negatives=dict(zip(names, negatives[scored].tolist(), strict=True)),
        auroc=dict(zip(names, areas[:, 0].tolist(), strict=True)),
        intervals={name: _interval(each) for name, each in zip(names, drawn, strict=True)}
        if resamples
        else {},
    )


def _rows(known: np.ndarray, columns: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Each column, and the rows [m] where it is known."""
    for column in columns:
        yield column, np.flatnonzero(known[:, column])


def _interval(drawn: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of resamples [R]; NaN of none."""
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
    return float(low), float(high)


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
