"""Learning a run's calibration from labelled records, and measuring it on others.

How a class is learned, see :mod:`ecgot.inference.calibration` for what is kept of it:

1. The curve: maximum likelihood over all records (one without labels of the group lacks the class), under a
   normal prior around the identity, so that few positives move it little.
2. The threshold: the probability that maximises the F1 score expected under the calibrated probabilities,
   half of the best F1 (Lipton, Elkan and Narayanaswamy 2014, "Thresholding classifiers to maximize F1
   score"), but no less than MIN_THRESHOLD: what holds in fewer of such records is not stated.
3. The conformal set: of the records with the class, at least ``level`` lie at or above ``absent_below``, and
   of those without it below ``present_from``. The threshold belongs to what is undecided, so that nothing is
   stated below it or denied above it; sets only grow by that. A class with fewer positives than a quantile
   needs has no set: its threshold decides.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from ecgot.data.dataset import EcgDataset
from ecgot.errors import EcgotError
from ecgot.eval.auroc import weighted_auroc
from ecgot.files import default_cache_dir
from ecgot.inference.calibration import FILE, Calibration, ClassCalibration, curve_features, sigmoid
from ecgot.inference.zeroshot import (
    EmbeddedPrompts,
    check_score,
    class_scores,
    model_and_prompts,
    scores_fingerprint,
)
from ecgot.models.alignment import AlignmentModel
from ecgot.models.encoders import EncoderOutput, masked_mean
from ecgot.runs.progress import Progress
from ecgot.runs.records import BATCH, encode, load_folds
from ecgot.runs.run import PRETRAINED, Run
from ecgot.version import __version__

LEVEL = 0.9  # of the conformal sets
PRIOR = np.array([1.0, 1.0, 0.0])  # the identity
PRIOR_SPREAD = np.array([0.3, 0.3, 2.0])
MIN_THRESHOLD = 0.3
BINS = 15  # of the calibration error
MIN_POSITIVES = 10  # of a class whose calibration error counts
AVERAGED = (
    *("auroc", "ece", "ece_before", "ece_floor", "sensitivity", "specificity", "precision"),
    *("stated_sensitivity", "stated_specificity", "stated_precision"),
    *("coverage_present", "coverage_absent", "undecided"),
)

Scores = dict[str, dict[str, np.ndarray]]  # group -> class -> [n]


def calibrate(
    run: Run,
    data_root: Path,
    folds: Sequence[int],
    cache_dir: Path | None = None,
    progress: Progress | None = None,
    *,
    out: Path | None = None,
) -> Calibration:
    """Learn a run's calibration from the labels of some folds, and write it to ``calibration.json``.

    The folds should be none that the run was trained on, where it is surer than elsewhere. If they are, the
    calibration says so (``trained_on``).

    Args:
        data_root: a data set in PTB-XL's layout.
        cache_dir: of signals; by default :func:`ecgot.files.default_cache_dir`.
        out: folder of the file; by default the run's own, and none for the model that comes with the package.

    Raises:
        EcgotError: the run has learned no phrases, or it or the data cannot be used.
    """
    scores, data, fingerprint = _run_scores(run, data_root, folds, cache_dir, progress)
    used = set(run.config().data.train_folds)
    calibration = Calibration(
        classes=fit_classes(scores, data),
        fingerprint=fingerprint,
        level=LEVEL,
        folds=tuple(folds),
        records=len(data),
        trained_on=tuple(fold for fold in folds if fold in used),
        data=data_root.resolve().name,
        version=__version__,
    )
    if out is None and run.folder != PRETRAINED:
        out = run.folder
    if out is not None:
        calibration.save(out / FILE)
    return calibration


def calibration_report(
    run: Run,
    calibration: Calibration,
    data_root: Path,
    folds: Sequence[int],
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What a calibration reaches on held-out folds, as plain values for JSON.

    Returns:
        "folds", "records", the settings ("level", "bins", ...), "summary" (see :func:`summary`) over
        superclasses ("superclass") and over all classes ("all") of at least MIN_POSITIVES positives, and by
        group "classes" (see :func:`measure_class`).

    Raises:
        EcgotError: the calibration is another model's, shares folds or patients with these, or the run or the
            data cannot be used.
    """
    config = run.config()
    trained = sorted(set(folds) & {*config.data.train_folds, *calibration.folds})
    if trained:
        raise EcgotError(f"folds: expected held-out folds, got fold {trained[0]}, which was learned from")
    scores, data, fingerprint = _run_scores(run, data_root, folds, cache_dir, progress)
    if calibration.fingerprint not in ("", fingerprint):
        raise EcgotError(f"calibration: expected one of {run.folder}, got one of another model")
    measured = measure_classes(calibration, scores, data)
    rows = [row for table in measured.values() for row in table.values()]
    return {
        "folds": list(folds),
        "records": len(data),
        "calibrated_on": list(calibration.folds),
        "calibrated_in_sample": list(calibration.trained_on),
        "level": calibration.level,
        "calibration_error": f"mean |frequency - mean probability| over {BINS} bins of equal mass",
        "summary": {"superclass": summary(list(measured["superclass"].values())), "all": summary(rows)},
        "classes": measured,
    }


def fit_classes(scores: Scores, data: EcgDataset) -> dict[str, dict[str, ClassCalibration]]:
    """The calibration of every class of ``scores`` that the data has labels for."""
    fitted: dict[str, dict[str, ClassCalibration]] = {}
    for group, table in scores.items():
        labels = data.labels(group)
        column = {code: number for number, code in enumerate(labels.classes)}
        fitted[group] = {
            code: fit_class(score, labels.matrix[:, column[code]])
            for code, score in table.items()
            if code in column
        }
    return fitted


def fit_class(score: np.ndarray, truth: np.ndarray, *, level: float = LEVEL) -> ClassCalibration:
    """The calibration of one class.

    Args:
        score: [n], log-odds.
        truth: [n], bool.
        level: of the conformal sets.
    """
    features, target = curve_features(score), truth.astype(np.float64)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        log_odds, away = features @ parameters, (parameters - PRIOR) / PRIOR_SPREAD
        value = np.logaddexp(0, log_odds).sum() - target @ log_odds + away @ away / 2
        return float(value), features.T @ (sigmoid(log_odds) - target) + away / PRIOR_SPREAD

    bounds = [(0, None), (0, None), (None, None)]
    best = minimize(loss, PRIOR, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-12}).x
    probability = sigmoid(features @ best)
    weight = probability * (1 - probability)
    precision = (features * weight[:, None]).T @ features + np.diag(PRIOR_SPREAD**-2)
    covariance = np.linalg.inv(precision)
    threshold = max(f1_threshold(probability), MIN_THRESHOLD)
    absent_below, present_from = decided_outside(probability, truth, threshold, level)
    return ClassCalibration(
        slope_low=float(best[0]),
        slope_high=float(best[1]),
        bias=float(best[2]),
        covariance=tuple(map(tuple, ((covariance + covariance.T) / 2).tolist())),
        threshold=threshold,
        absent_below=absent_below,
        present_from=present_from,
        positives=int(truth.sum()),
    )


def f1_threshold(probability: np.ndarray) -> float:
    """The threshold that maximises the expected F1 score of n records with these probabilities [n].

    Of the k records that reach a threshold, F1 is 2 (sum of their probabilities) / (k + sum of all).
    """
    best_first = np.sort(probability)[::-1]
    scores = 2 * np.cumsum(best_first) / (np.arange(1, len(best_first) + 1) + best_first.sum())
    return float(scores.max() / 2)


def decided_outside(
    probability: np.ndarray, truth: np.ndarray, threshold: float, level: float
) -> tuple[float, float]:
    """``absent_below`` and ``present_from`` of a class, see this module.

    Of m exchangeable values and a new one, the new one is below the k-th smallest with at most k / (m + 1).
    """
    present, absent = np.sort(probability[truth]), np.sort(probability[~truth])
    low = int(np.floor((1 - level) * (len(present) + 1)))
    high = int(np.ceil(level * (len(absent) + 1)))
    if low < 1 or high > len(absent):
        return threshold, threshold
    # What equals the quantile belongs to the set: one float further, it is below ``present_from``.
    above = float(np.nextafter(absent[high - 1], np.inf))
    return min(float(present[low - 1]), threshold), max(above, threshold)


def measure_classes(
    calibration: Calibration, scores: Scores, data: EcgDataset
) -> dict[str, dict[str, dict[str, Any]]]:
    """:func:`measure_class` by group of every class of ``scores`` that some records have and others lack."""
    measured: dict[str, dict[str, dict[str, Any]]] = {}
    for group, table in scores.items():
        labels = data.labels(group)
        measured[group] = {}
        for column, code in enumerate(labels.classes):
            truth = labels.matrix[:, column]
            if code in table and truth.any() and not truth.all():
                one = calibration.of(group, code)
                measured[group][code] = measure_class(one, table[code], truth)
    return measured


def measure_class(calibration: ClassCalibration, score: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """What the calibration of a class reaches on n records with scores and truth [n].

    Returns:
        "positives" (here), "calibrated_on" (positives it was learned from), "auroc", "ece" and, of the
        uncalibrated score, "ece_before"; "ece_floor", what perfect probabilities would show by chance;
        "threshold" and, there, "sensitivity", "specificity" and "precision" (None where nothing reaches it);
        "stated_sensitivity" and "stated_specificity": of what is decided. "coverage_present",
        "coverage_absent": how often the conformal set holds the truth; "undecided": how often it holds both;
        "has_set": whether the class has such sets.
    """
    probability = calibration.probability(score)
    said, stated = probability >= calibration.threshold, calibration.stated(probability)
    decided = stated >= 0
    return {
        "positives": int(truth.sum()),
        "calibrated_on": calibration.positives,
        "auroc": float(weighted_auroc(score, truth, np.ones((1, len(truth))))[0]),
        "ece": calibration_error(probability, truth),
        "ece_before": calibration_error(sigmoid(score), truth),
        "ece_floor": error_floor(probability),
        "threshold": calibration.threshold,
        "sensitivity": _share(said, truth),
        "specificity": _share(~said, ~truth),
        "precision": _share(truth, said),
        "stated_sensitivity": _share(stated == 1, truth & decided),
        "stated_specificity": _share(stated == 0, ~truth & decided),
        "stated_precision": _share(truth, stated == 1),
        "coverage_present": _share(stated != 0, truth),
        "coverage_absent": _share(stated != 1, ~truth),
        "undecided": float((~decided).mean()),
        "has_set": calibration.present_from > calibration.absent_below,
    }


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of :func:`measure_class` over classes of at least MIN_POSITIVES positives, "classes" of them."""
    counted = [row for row in rows if row["positives"] >= MIN_POSITIVES]
    means: dict[str, Any] = {"classes": len(counted)}
    for name in AVERAGED:
        values = [row[name] for row in counted if row[name] is not None]
        means[name] = float(np.mean(values)) if values else None
    return means


def calibration_error(probability: np.ndarray, truth: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error: mean |frequency - mean probability| over bins of equal mass, by their mass.

    Records are sorted by probability [n] and cut into ``bins`` parts of n / bins records. (Of bins of equal
    width a rare class would fill only one.)
    """
    order = np.argsort(probability, kind="stable")
    gaps = [
        len(part) * abs(probability[part].mean() - truth[part].mean())
        for part in np.array_split(order, min(bins, len(order)))
    ]
    return float(sum(gaps) / len(order))


def error_floor(probability: np.ndarray, draws: int = 20, seed: int = 0) -> float:
    """The mean calibration error that truths drawn by the very probabilities [n] show: what chance adds."""
    rng = np.random.default_rng(seed)
    drawn = rng.random((draws, len(probability))) < probability
    return float(np.mean([calibration_error(probability, each) for each in drawn]))


def _share(what: np.ndarray, among: np.ndarray) -> float | None:
    """How often ``what`` holds where ``among`` does; None if that is nowhere."""
    return float(what[among].mean()) if among.any() else None


def _run_scores(
    run: Run, data_root: Path, folds: Sequence[int], cache_dir: Path | None, progress: Progress | None
) -> tuple[Scores, EcgDataset, str]:
    """Phrase scores of the records of some folds, the records, and the fingerprint of the scores."""
    config, progress = run.config(), progress or Progress()
    if check_score(None, config.align) != "phrase":
        raise EcgotError("run: expected one that learned phrases, got one with align.phrase_weight=0")
    model, prompts = model_and_prompts(run)
    data = load_folds(config, folds, cache_dir or default_cache_dir(), progress, root=data_root)
    encoded = encode(model, data, progress=progress, cuda_graph=config.cuda_graph)
    scores = phrase_scores(model, prompts, *encoded)
    return scores, data, scores_fingerprint(model, prompts)


@torch.no_grad()
def phrase_scores(model: AlignmentModel, prompts: EmbeddedPrompts, tokens: Tensor, mask: Tensor) -> Scores:
    """ "phrase" scores by group and class of n records with tokens [n, N, D] and mask [n, N]."""
    device = next(model.parameters()).device
    parts = []
    for rows in torch.arange(len(tokens)).split(BATCH):
        part, there = tokens[rows].float().to(device), mask[rows].to(device)
        encoded = EncoderOutput(part, there, masked_mean(part, there))
        parts.append(class_scores(model.project_tokens(encoded), prompts))
    return {
        group: {
            code: torch.cat([part[group][:, column] for part in parts]).double().cpu().numpy()
            for column, code in enumerate(classes)
        }
        for group, classes in prompts.rows.items()
    }
