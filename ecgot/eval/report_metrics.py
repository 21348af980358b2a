"""Generated reports against references: metrics, a shuffled control, and how sure each sentence is."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ecgot.eval.auroc import weighted_auroc
from ecgot.eval.report_baselines import Baselines
from ecgot.eval.text_metrics import report_statistics
from ecgot.files import write_text
from ecgot.inference.display import NOTICE, SURE
from ecgot.models.reporter import Reporter, WrittenReport
from ecgot.runs.progress import Progress
from ecgot.text.glossary import plain_english
from ecgot.text.statements import sentences

BATCH = 128
RECORDER_UNKNOWN = "generated_recorder_unknown"


@dataclass(frozen=True)
class Example:
    """A record's reference and generated report; scores: of the generated one's sentences."""

    ecg_id: int
    reference: str
    generated: str
    scores: tuple[float, ...]


def write_reports(
    reporter: Reporter,
    tokens: Tensor,
    mask: Tensor,
    recorders: Sequence[str],
    *,
    num_beams: int,
    progress: Progress,
) -> list[WrittenReport]:
    """Reports of n encoded ECGs, tokens [n, N, D] and mask [n, N], by n recorders, "" where unknown."""
    device = next(reporter.parameters()).device
    reports: list[WrittenReport] = []
    for rows in torch.arange(len(tokens)).split(BATCH):
        part, valid = tokens[rows].float().to(device), mask[rows].to(device)
        told = [recorders[row] for row in rows.tolist()]
        reports += reporter.write(part, valid, recorders=told, num_beams=num_beams)
        progress.bar("reports", len(reports), len(tokens))
    return reports


def measure_reports(
    written: Sequence[WrittenReport],
    references: Sequence[str],
    patients: np.ndarray,
    recorders: Sequence[str],
    *,
    untold: Sequence[WrittenReport] | None = None,
    baselines: Baselines | None,
    in_plain_english: bool,
    resamples: int,
) -> dict[str, dict[str, dict[str, float]]]:
    """Metrics "value", "low" and "high" (95 % bootstrap over patients) by system and metric.

    The systems: "generated"; "generated_recorder_unknown", the reports ``untold``; "shuffled", each report
    against the reference of another patient of the same recorder; those of ``baselines``; and where
    references are put into plain English, "generated_as_written", against references as they came.

    Args:
        written, references, patients, recorders: of n records; a recorder is "" where it is unknown.
        untold: n reports of a model that was not told the recorders.
    """
    plain = [plain_english(text) for text in references] if in_plain_english else list(references)
    texts = [report.text for report in written]
    systems = {"generated": (texts, plain)}
    if untold is not None:
        systems[RECORDER_UNKNOWN] = ([report.text for report in untold], plain)
    if baselines is not None:
        systems["nearest_neighbour"] = (list(baselines.nearest), plain)
        systems["most_frequent"] = ([baselines.most_frequent] * len(plain), plain)
        systems["same_codes"] = (list(baselines.same_codes), plain)
        if baselines.same_codes_and_recorder:
            systems["same_codes_and_recorder"] = (list(baselines.same_codes_and_recorder), plain)
    if in_plain_english:
        systems["generated_as_written"] = (texts, list(references))
    measured = {name: _measured(*pair, patients, resamples) for name, pair in systems.items()}
    rows, other = shuffled(patients, recorders)
    if len(rows):
        mixed = [texts[row] for row in other], [plain[row] for row in rows]
        measured["shuffled"] = _measured(*mixed, patients[rows], resamples)
    return measured


def _measured(
    hypotheses: Sequence[str], wanted: Sequence[str], patients: np.ndarray, resamples: int
) -> dict[str, dict[str, float]]:
    statistics = report_statistics(hypotheses, wanted)
    bounds = statistics.intervals(patients, resamples=resamples)
    return {
        metric: {"value": value, "low": bounds[metric][0], "high": bounds[metric][1]}
        for metric, value in statistics.metrics().items()
    }


def sentence_confidence(written: Sequence[WrittenReport], references: Sequence[str]) -> dict[str, float]:
    """What sentence scores are worth: "auroc" for whether the reference says the very sentence, the share of
    sentences that it says ("said"), and of those with a score of at least SURE and below ("said_sure",
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
    sure = scores >= SURE
    return {
        "auroc": float(weighted_auroc(scores, said, np.ones((1, len(scores))))[0]),
        "said": float(said.mean()),
        "said_sure": float(said[sure].mean()) if sure.any() else float("nan"),
        "said_unsure": float(said[~sure].mean()) if (~sure).any() else float("nan"),
    }


def shuffled(patients: np.ndarray, recorders: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Rows, and of each another patient's row of the same recorder, so that what is lost is the ECG's.

    Unknown ones are as one. A recorder where no such order exists is left out.
    """
    if len(recorders) != len(patients):
        raise ValueError(f"recorders: got {len(recorders)} for {len(patients)} patients")
    found = [np.empty((2, 0), dtype=np.int64)]
    names = np.array(recorders, dtype=object)
    for name in sorted(set(recorders)):
        rows = np.flatnonzero(names == name)
        other = another_patients(patients[rows])
        if other is not None:
            found.append(np.stack([rows, rows[other]]))
    rows, other = np.concatenate(found, axis=1)
    return rows, other


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
