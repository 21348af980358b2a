"""Generated reports against references: metrics, a shuffled control, and how far to trust each sentence."""

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
from ecgot.models.writer import Writer, WrittenReport
from ecgot.runs.progress import Progress
from ecgot.runs.records import BATCH
from ecgot.text.glossary import plain_english
from ecgot.text.statements import sentences

RECORDER_UNKNOWN = "generated_recorder_unknown"  # the system whose reports name no recorder


@dataclass(frozen=True)
class Example:
    """A record's reference and generated report; ``scores`` are those of the generated sentences."""

    ecg_id: int
    reference: str
    generated: str
    scores: tuple[float, ...]


def write_reports(
    reporter: Writer,
    tokens: Tensor,
    mask: Tensor,
    recorders: Sequence[str],
    *,
    num_beams: int,
    progress: Progress,
) -> list[WrittenReport]:
    """Reports of n encoded ECGs: tokens [n, N, D], mask [n, N], and n recorders, "" if unknown."""
    device = next(reporter.parameters()).device
    reports: list[WrittenReport] = []
    for rows in torch.arange(len(tokens)).split(BATCH):
        part, valid = tokens[rows].float().to(device), mask[rows].to(device)
        names = [recorders[row] for row in rows.tolist()]
        reports += reporter.write(part, valid, recorders=names, num_beams=num_beams)
        progress.bar("reports", len(reports), len(tokens))
    return reports


def measure_reports(
    written: Sequence[WrittenReport],
    references: Sequence[str],
    patients: np.ndarray,
    recorders: Sequence[str],
    *,
    recorder_unknown: Sequence[WrittenReport] | None = None,
    baselines: Baselines | None,
    in_plain_english: bool,
    resamples: int,
) -> dict[str, dict[str, dict[str, float]]]:
    """Metrics by system: for each metric its "value" and 95 % interval "low", "high".

    The systems are "generated"; "generated_recorder_unknown"; "shuffled", each report against the reference
    of another patient of the same recorder; the ``baselines``; and, if references are put into plain English,
    "generated_as_written", the generated reports against the references as they came.

    Args:
        written, references, patients, recorders: of n records; a recorder is "" if unknown.
        recorder_unknown: n reports written without knowing the recorder.
        resamples: bootstrap resamples of patients.
    """
    plain = [plain_english(text) for text in references] if in_plain_english else list(references)
    texts = [report.text for report in written]
    systems = {"generated": (texts, plain)}
    if recorder_unknown is not None:
        systems[RECORDER_UNKNOWN] = ([report.text for report in recorder_unknown], plain)
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
    """How well sentence scores predict whether the reference contains exactly that sentence.

    Returns:
        "auroc" of the scores; "said", the share of sentences that the reference contains; "said_sure" and
        "said_unsure", that share among scores of at least :data:`SURE` and below. Empty if there is no
        sentence.
    """
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
    """Row indices, and for each the row of another patient of the same recorder.

    Recorder wording survives this shuffle, so that what is lost is due to the ECG. Unknown recorders count as
    one. A recorder whose records cannot be shuffled between patients is left out.
    """
    if len(recorders) != len(patients):
        raise ValueError(f"recorders: expected {len(patients)}, one for each record, got {len(recorders)}")
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
    """A permutation of n records that gives each a record of another patient; None if there is none.

    Args:
        patients: [n], ids.
    """
    rng = np.random.default_rng(seed)
    distinct, patient = np.unique(patients, return_inverse=True)
    # Records of one patient side by side, patients and their records in random order.
    order = np.lexsort((rng.random(len(patients)), rng.permutation(len(distinct))[patient]))
    largest = int(np.unique(patients, return_counts=True)[1].max())
    if 2 * largest > len(patients):
        return None
    # Seen as a circle, no patient's block is longer than half of it, so a half turn always leaves the block.
    other = np.empty(len(patients), dtype=np.int64)
    other[order] = np.roll(order, len(patients) // 2)
    return other


def save_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write a CSV with one line for each record; its last column is the notice."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("ecg_id", "reference", "generated", "sentence_scores", "notice"))
    for example in examples:
        scores = " ".join(f"{score:.2f}" for score in example.scores)
        writer.writerow((example.ecg_id, example.reference, example.generated, scores, NOTICE))
    write_text(path, text.getvalue())
