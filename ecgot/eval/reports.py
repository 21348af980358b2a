"""Evaluation of generated reports, beside baselines and shuffled ECGs."""

import functools
from dataclasses import dataclass

import numpy as np

from ecgot.eval.inputs import EvalSet, EvaluationRequest, TrainSet, rows_with_text
from ecgot.eval.report_baselines import BaselineInputs, Baselines, baseline_reports
from ecgot.eval.report_metrics import (
    RECORDER_UNKNOWN,
    Example,
    measure_reports,
    sentence_confidence,
    write_reports,
)
from ecgot.models.alignment import AlignmentModel
from ecgot.runs.checkpoints import load_reporter
from ecgot.text.glossary import plain_english

RECORDERS = (
    "each report follows the wording of the recorder that the data set names, if the model knows it; in "
    f"{RECORDER_UNKNOWN} every report is written as for an unknown recorder"
)
SHUFFLED = "within each recorder that the data set names, and among the records that name none"


@dataclass(frozen=True)
class ReportEvaluation:
    """What was found about generated reports.

    Attributes:
        systems: metrics by system, see :func:`ecgot.eval.report_metrics.measure_reports`.
        references: how many records have a reference.
        sentences: see :func:`ecgot.eval.report_metrics.sentence_confidence`.
        examples: one for each record with a reference.
        dialect: how recorders and shuffling were handled, where it matters.
    """

    systems: dict[str, dict[str, dict[str, float]]]
    references: int
    sentences: dict[str, float]
    examples: tuple[Example, ...]
    dialect: dict[str, str]


def evaluate_reports(
    request: EvaluationRequest, model: AlignmentModel, train: TrainSet | None, held_out: EvalSet
) -> ReportEvaluation:
    """Write a report for each held-out record with a reference, and measure the reports.

    Args:
        train: records whose reports make the baselines; None: no baselines.
    """
    run = request.run
    rows = rows_with_text(held_out.data.reports)
    if not len(rows) or not run.done("report"):
        reason = "no record has a reference" if not len(rows) else "stage report has not been trained"
        request.progress.note(f"no report metrics: {reason}")
        return ReportEvaluation({}, len(rows), {}, (), {})
    reporter = load_reporter(run, model.ecg_width)
    table = held_out.data.table.select(rows.numpy())
    write = functools.partial(
        write_reports,
        reporter,
        held_out.tokens[rows],
        held_out.mask[rows],
        num_beams=request.num_beams,
        progress=request.progress,
    )
    written = write(table.recorders)
    knows_some = bool(set(reporter.recorders) & set(table.recorders))
    in_plain_english = request.config.data.plain_english
    systems = measure_reports(
        written,
        table.reports,
        table.patient_id,
        table.recorders,
        recorder_unknown=write([""] * len(rows)) if knows_some else None,
        baselines=_baselines(train, held_out, rows.numpy(), in_plain_english),
        in_plain_english=in_plain_english,
        resamples=request.resamples,
    )
    compared = [plain_english(text) if in_plain_english else text for text in table.reports]
    dialect = {"recorders": RECORDERS} if knows_some else {}
    if "shuffled" in systems and any(held_out.data.table.recorders):
        dialect["shuffled"] = SHUFFLED
    return ReportEvaluation(
        systems=systems,
        references=len(rows),
        sentences=sentence_confidence(written, compared),
        examples=tuple(
            Example(ecg_id, reference, report.text, tuple(score for _, score in report.sentences))
            for ecg_id, reference, report in zip(table.ecg_id.tolist(), compared, written, strict=True)
        ),
        dialect=dialect,
    )


def _baselines(
    train: TrainSet | None, held_out: EvalSet, rows: np.ndarray, in_plain_english: bool
) -> Baselines | None:
    """Baselines for the given rows of the held-out records."""
    if train is None:
        return None
    known, wanted = train.data.table, held_out.data.table.select(rows)
    return baseline_reports(
        BaselineInputs(train.pooled, known.codes, known.recorders),
        (train.data.in_plain_english() if in_plain_english else train.data).reports,
        BaselineInputs(held_out.pooled[rows], wanted.codes, wanted.recorders),
    )
