"""Generated reports against references: metrics, baselines, a control, and how sure each sentence is."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ecgot.data.glossary import plain_english
from ecgot.eval.ranking import weighted_auroc
from ecgot.eval.text_metrics import report_statistics
from ecgot.files import write_text
from ecgot.models.reporter import Reporter, WrittenReport, sentences
from ecgot.train.run import Progress

BATCH = 128
NOTICE = "Research software, not a medical device: do not use it for diagnosis or treatment."


@dataclass(frozen=True)
class Example:
    """A record's reference and generated report; scores: of the generated one's sentences."""

    ecg_id: int
    reference: str
    generated: str
    scores: tuple[float, ...]


@dataclass(frozen=True)
class Baselines:
    """Reports that a system without a language model would write: texts of the training folds.

    most_frequent: the commonest one; nearest: for each of n records that of the nearest training ECG.
    """

    most_frequent: str
    nearest: tuple[str, ...]


def write_reports(
    reporter: Reporter, tokens: Tensor, mask: Tensor, *, num_beams: int, progress: Progress
) -> list[WrittenReport]:
    """Reports of n encoded ECGs, tokens [n, N, D] and mask [n, N]."""
    device = next(reporter.parameters()).device
    reports: list[WrittenReport] = []
    for rows in torch.arange(len(tokens)).split(BATCH):
        part = tokens[rows].float().to(device)
        reports += reporter.write(part, mask[rows].to(device), num_beams=num_beams)
        progress.bar("reports", len(reports), len(tokens))
    return reports


def measure_reports(
    written: Sequence[WrittenReport],
    references: Sequence[str],
    patients: np.ndarray,
    *,
    baselines: Baselines | None,
    in_plain_english: bool,
    resamples: int,
) -> dict[str, dict[str, dict[str, float]]]:
    """Metrics "value", "low" and "high" (95 % bootstrap over patients) by system and metric.

    The systems: "generated"; "shuffled", each report against another patient's reference; those of
    ``baselines``; and where references are put into plain English, "generated_as_written", the reports
    against references as they came.
    """
    plain = [plain_english(text) for text in references] if in_plain_english else list(references)
    texts = [report.text for report in written]
    systems = {"generated": (texts, plain)}
    other = another_patients(patients)
    if other is not None:
        systems["shuffled"] = ([texts[row] for row in other], plain)
    if baselines is not None:
        systems["nearest_neighbour"] = (list(baselines.nearest), plain)
        systems["most_frequent"] = ([baselines.most_frequent] * len(plain), plain)
    if in_plain_english:
        systems["generated_as_written"] = (texts, list(references))
    measured = {}
    for name, (hypotheses, wanted) in systems.items():
        statistics = report_statistics(hypotheses, wanted)
        values = statistics.metrics()
        bounds = statistics.intervals(patients, resamples=resamples)
        measured[name] = {
            metric: {"value": value, "low": bounds[metric][0], "high": bounds[metric][1]}
            for metric, value in values.items()
        }
    return measured


def sentence_confidence(written: Sequence[WrittenReport], references: Sequence[str]) -> dict[str, float]:
    """What sentence scores are worth: "auroc" for whether the reference says the very sentence, the share of
    sentences that it says ("said"), and of those with a score of at least 0.5 and below ("said_sure",
    "said_unsure")."""
    pairs = [
        (score, text in said_by_reference)
        for report, reference in zip(written, references, strict=True)
        for said_by_reference in [set(sentences(reference))]
        for text, score in report.sentences
    ]
    if not pairs:
        return {}
    scores, said = np.array([pair[0] for pair in pairs]), np.array([pair[1] for pair in pairs], dtype=bool)
    sure = scores >= 0.5
    return {
        "auroc": float(weighted_auroc(scores, said, np.ones((1, len(scores))))[0]),
        "said": float(said.mean()),
        "said_sure": float(said[sure].mean()) if sure.any() else float("nan"),
        "said_unsure": float(said[~sure].mean()) if (~sure).any() else float("nan"),
    }


def baseline_reports(
    train_features: np.ndarray, train_reports: Sequence[str], features: np.ndarray
) -> Baselines | None:
    """Baselines for n records; None where no training record has a report.

    Args:
        train_features, features: pooled encoder tokens [m, D] and [n, D]; neighbours are by cosine.
        train_reports: m, "" where there is none.
    """
    rows = np.array([row for row, text in enumerate(train_reports) if text], dtype=np.int64)
    if not len(rows):
        return None
    known, wanted = _unit(train_features[rows]), _unit(features)
    nearest = [int((known @ each).argmax()) for each in wanted]
    texts = [train_reports[row] for row in rows]
    return Baselines(Counter(texts).most_common(1)[0][0], tuple(texts[row] for row in nearest))


def _unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)


def another_patients(patients: np.ndarray, *, seed: int = 0) -> np.ndarray | None:
    """For each record a record of another patient, each used once; None where no such order exists."""
    rng = np.random.default_rng(seed)
    distinct, patient = np.unique(patients, return_inverse=True)
    # Records of one patient side by side, patients and their records in random order.
    order = np.lexsort((rng.random(len(patients)), rng.permutation(len(distinct))[patient]))
    largest = int(np.unique(patients, return_counts=True)[1].max())
    if 2 * largest > len(patients):
        return None
    # Half-way round the circle a patient's block has ended, as it is at most half as long as the circle.
    other = np.empty(len(patients), dtype=np.int64)
    other[order] = np.roll(order, len(patients) // 2)
    return other


def save_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write a CSV with a line a record; its last column says what the file is not."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("ecg_id", "reference", "generated", "sentence_scores", "notice"))
    for example in examples:
        scores = " ".join(f"{score:.2f}" for score in example.scores)
        writer.writerow((example.ecg_id, example.reference, example.generated, scores, NOTICE))
    write_text(path, text.getvalue())
