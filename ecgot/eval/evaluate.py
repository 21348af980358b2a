"""Evaluation of a run on held-out folds: zero-shot detection, a linear probe, reports and their controls."""

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ecgot.choices import BEAMS
from ecgot.data.dataset import EcgDataset
from ecgot.data.ptbxl import GROUPS, available_folds, check_patient_split
from ecgot.errors import EcgotError
from ecgot.eval.auroc import AurocResult, macro_auroc
from ecgot.eval.probe import linear_probe
from ecgot.eval.report_baselines import BaselineInputs, baseline_reports
from ecgot.eval.report_metrics import (
    RECORDER_UNKNOWN,
    Example,
    measure_reports,
    save_examples,
    sentence_confidence,
    write_reports,
)
from ecgot.eval.retrieval import retrieval
from ecgot.eval.text_metrics import DIALECT
from ecgot.files import default_cache_dir, write_text
from ecgot.inference.display import NOTICE
from ecgot.inference.zeroshot import (
    BUILT_IN,
    EmbeddedPrompts,
    check_score,
    class_scores,
    embed_prompts,
    load_prompts,
    read_prompts,
    select_prompts,
)
from ecgot.models.alignment import AlignmentModel
from ecgot.models.encoders import EncoderOutput, masked_mean
from ecgot.models.text_encoder import TextEncoder, TextTokens
from ecgot.models.token_store import embed_texts
from ecgot.runs.checkpoints import load_alignment, load_reporter, transport
from ecgot.runs.config import Config
from ecgot.runs.progress import Progress
from ecgot.runs.records import encode, load_folds
from ecgot.runs.run import PRETRAINED, Run
from ecgot.text.glossary import plain_english
from ecgot.version import __version__

BATCH = 128
REFERENCES = {
    False: "cleaned by ecgot.text.cleaning.clean_report and lower-cased",
    True: "cleaned by ecgot.text.cleaning.clean_report and put into plain English by "
    "ecgot.text.glossary.plain_english; those of generated_as_written as they come, cleaned",
}
RECORDERS = (
    "reports are generated in the words of the recorder that the data set names, where the model knows it; "
    f"those of {RECORDER_UNKNOWN} in those of an unknown one: of training records that name none"
)
SHUFFLED = "within each recorder that the data set names, and among the records that name none"


@dataclass(frozen=True)
class TrainSet:
    """The training folds: n records and their pooled tokens [n, D]."""

    data: EcgDataset
    pooled: np.ndarray


@dataclass(frozen=True)
class EvalSet:
    """The records to evaluate: n of them, tokens [n, N, D], mask [n, N] and pooled tokens [n, D]."""

    data: EcgDataset
    tokens: Tensor
    mask: Tensor
    pooled: np.ndarray

    def with_reports(self, reports: Sequence[str]) -> Tensor:
        """Rows of the records whose report, of n, is not empty."""
        return torch.tensor([row for row, report in enumerate(reports) if report], dtype=torch.long)


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` found.

    Attributes:
        zero_shot, probe: by label group. The probe is empty where the data set lacks the training folds.
        retrieval: recall, see :func:`ecgot.eval.retrieval.retrieval`; empty without a text encoder.
        reports: metrics by system, see :func:`ecgot.eval.report_metrics.measure_reports`; the baselines take
            the training folds. Empty where no record has a reference or stage 2 has not been trained.
        sentences: what sentence scores are worth, see :func:`ecgot.eval.report_metrics.sentence_confidence`.
        examples: the records that have a reference.
        settings: what was evaluated, on what and how: the data, where the references come from ("report
            column" or a CSV), the prompts, beams, resamples, and the run's whole configuration.
    """

    folds: tuple[int, ...]
    records: int
    score: str
    zero_shot: dict[str, AurocResult]
    probe: dict[str, AurocResult]
    retrieval: dict[str, float]
    reports: dict[str, dict[str, dict[str, float]]]
    references: int
    sentences: dict[str, float]
    examples: tuple[Example, ...]
    dialect: dict[str, str]
    notice: str
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as plain values for JSON; NaN becomes None."""
        return _without_nan(dataclasses.asdict(self))


def evaluate(
    run: Run,
    root: Path,
    *,
    out: Path | None = None,
    folds: Sequence[int] = (9,),
    reports_csv: Path | None = None,
    score: str | None = None,
    prompts: Path = BUILT_IN,
    num_beams: int = BEAMS,
    resamples: int = 1000,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate a run.

    Args:
        root: a data set in PTB-XL's layout.
        out: folder for ``evaluation.json`` and ``generated_reports.csv``; the run's own where omitted, none
            for the model that comes with the package.
        folds: to evaluate; patients of the training folds must not be in them.
        reports_csv: references; where omitted, the run's own if ``root`` is what it was trained on, else the
            report column.
        score: see :func:`~ecgot.inference.zeroshot.check_score` and
            :func:`~ecgot.inference.zeroshot.class_scores`.
        num_beams: of the search for a report; 1 writes greedily.
        resamples: of the bootstrap over patients.

    Raises:
        EcgotError: the run, the data or a setting cannot be used.
    """
    cache_dir, progress, config = cache_dir or default_cache_dir(), progress or Progress(), run.config()
    score = check_score(score, config.align)
    trained_on = set(folds) & set(config.data.train_folds)
    if trained_on:
        raise EcgotError(f"folds: fold {min(trained_on)} was trained on, accepted are held-out folds")
    ready = prompts == BUILT_IN and run.prompts.exists()  # embedded, so that no text encoder is needed
    text = None if ready else TextEncoder(config.text.name, max_tokens=config.text.max_tokens)
    model = load_alignment(run, text)
    csv_path = _references(config, root, reports_csv)
    data = load_folds(config, folds, cache_dir, progress, root=root, reports_csv=csv_path)
    progress.note(f"references: {csv_path or 'report column'}")
    train = _training_folds(config, root, csv_path, cache_dir, progress)
    if train is not None:
        check_patient_split(train.table, data.table)
    encoding = functools.partial(encode, model, progress=progress, cuda_graph=config.cuda_graph)
    tokens, mask = encoding(data, task="encoding evaluation folds")
    held_out = EvalSet(data, tokens, mask, _pooled(tokens, mask))
    known = None
    if train is not None:
        known = TrainSet(train, _pooled(*encoding(train, task="encoding training folds")))
    embedded = _embedded_prompts(run, model, text, data, prompts)
    scores = _zero_shot_scores(model, held_out, embedded, score, config, progress)
    reports = _evaluate_reports(run, model, known, held_out, num_beams, resamples, progress)
    told = {"recorders": RECORDERS} if RECORDER_UNKNOWN in reports["reports"] else {}
    if "shuffled" in reports["reports"] and any(data.table.recorders):
        told["shuffled"] = SHUFFLED
    evaluation = Evaluation(
        folds=tuple(folds),
        records=len(data),
        score=score,
        zero_shot={group: _auroc(scores[group], data, group, resamples) for group in GROUPS},
        probe=_probe(known, held_out, resamples, progress),
        retrieval=_retrieval(model, text, held_out, score, config, cache_dir, progress),
        **reports,
        dialect=DIALECT | {"references": REFERENCES[config.data.plain_english]} | told,
        notice=NOTICE,
        settings={
            "ecgot": __version__,
            "data": str(root.resolve()),
            "references": csv_path or "report column",
            "prompts": "built-in" if prompts == BUILT_IN else str(prompts.resolve()),
            "num_beams": num_beams,
            "resamples": resamples,
            "training_seconds": _training_seconds(run),
            "config": dataclasses.asdict(config),
        },
    )
    if out is None and run.folder != PRETRAINED:
        out = run.folder
    if out is not None:
        saved = {key: value for key, value in evaluation.to_dict().items() if key != "examples"}
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "evaluation.json", json.dumps(saved, indent=2) + "\n")
        save_examples(out / "generated_reports.csv", evaluation.examples)
    return evaluation


def _training_seconds(run: Run) -> dict[str, float]:
    """By stage, as far as the run's metrics.jsonl goes."""
    seconds: dict[str, float] = {}
    for line in run.metrics():
        seconds[line["stage"]] = seconds.get(line["stage"], 0.0) + line["seconds"]
    return seconds


def _references(config: Config, root: Path, reports_csv: Path | None) -> str:
    if reports_csv is not None:
        return str(reports_csv.resolve())
    same = config.data.root and Path(config.data.root).resolve() == root.resolve()
    return config.data.reports_csv if same else ""


def _training_folds(
    config: Config, root: Path, reports_csv: str, cache_dir: Path, progress: Progress
) -> EcgDataset | None:
    """The run's training folds in ``root``, or None where it has none of them."""
    there = [fold for fold in available_folds(root) if fold in config.data.train_folds]
    if not there:
        progress.note(f"no linear probe and no baselines of reports: {root} has no training fold")
        return None
    return load_folds(config, there, cache_dir, progress, root=root, reports_csv=reports_csv)


def _embedded_prompts(
    run: Run, model: AlignmentModel, text: TextEncoder | None, data: EcgDataset, path: Path
) -> EmbeddedPrompts:
    if text is None:
        embedded = load_prompts(run.prompts, next(model.parameters()).device)
        return embedded.select({group: data.labels(group).classes for group in GROUPS})
    prompts = read_prompts(path)
    wanted = {group: select_prompts(prompts, group, data.labels(group).classes) for group in GROUPS}
    return embed_prompts(model, text, wanted)


@torch.no_grad()
def _zero_shot_scores(
    model: AlignmentModel,
    held_out: EvalSet,
    prompts: EmbeddedPrompts,
    score: str,
    config: Config,
    progress: Progress,
) -> dict[str, np.ndarray]:
    device = next(model.parameters()).device
    tokens, mask = held_out.tokens, held_out.mask
    parts: dict[str, list[Tensor]] = {group: [] for group in GROUPS}
    for rows in torch.arange(len(tokens)).split(BATCH):
        part, valid = tokens[rows].float().to(device), mask[rows].to(device)
        ecg = model.project_tokens(EncoderOutput(part, valid, masked_mean(part, valid)))
        batch = class_scores(ecg, prompts, score=score, transport=transport(config.align))
        for group, values in batch.items():
            parts[group].append(values.cpu())
        progress.bar("zero-shot scores", int(rows[-1]) + 1, len(tokens))
    return {group: torch.cat(values).numpy() for group, values in parts.items()}


def _pooled(tokens: Tensor, mask: Tensor) -> np.ndarray:
    return masked_mean(tokens.float(), mask).numpy()


def _auroc(scores: np.ndarray, data: EcgDataset, group: str, resamples: int) -> AurocResult:
    return macro_auroc(scores, data.labels(group), data.table.patient_id, resamples=resamples)


def _probe(
    known: TrainSet | None, held_out: EvalSet, resamples: int, progress: Progress
) -> dict[str, AurocResult]:
    if known is None:
        return {}
    rankings = {}
    for number, group in enumerate(GROUPS):
        # The same protocol as in ranking: records with a label in the group.
        labelled = known.data.labels(group).matrix.any(1)
        truth = known.data.labels(group).matrix[labelled]
        scores = (
            linear_probe(known.pooled[labelled], truth, held_out.pooled)
            if len(truth)
            else np.zeros((len(held_out.pooled), truth.shape[1]))
        )
        rankings[group] = _auroc(scores, held_out.data, group, resamples)
        progress.bar("linear probe", number + 1, len(GROUPS))
    return rankings


def _evaluate_reports(
    run: Run,
    model: AlignmentModel,
    known: TrainSet | None,
    held_out: EvalSet,
    num_beams: int,
    resamples: int,
    progress: Progress,
) -> dict[str, Any]:
    """The evaluation's fields ``reports``, ``references``, ``sentences`` and ``examples``."""
    data = held_out.data
    rows = held_out.with_reports(data.reports)
    if not len(rows) or not run.done("report"):
        reason = "no record has a reference" if not len(rows) else "stage report has not been trained"
        progress.note(f"no report metrics: {reason}")
        return {"reports": {}, "references": len(rows), "sentences": {}, "examples": ()}
    plain = run.config().data.plain_english
    reporter = load_reporter(run, model.ecg_width)
    wanted = data.table.select(rows.numpy())
    writing = functools.partial(
        write_reports,
        reporter,
        held_out.tokens[rows],
        held_out.mask[rows],
        num_beams=num_beams,
        progress=progress,
    )
    written = writing(wanted.recorders)
    told = set(reporter.recorders) & set(wanted.recorders)
    untold = writing([""] * len(rows)) if told else None
    references = list(wanted.reports)
    baselines = None
    if known is not None:
        train = known.data.table
        baselines = baseline_reports(
            BaselineInputs(known.pooled, train.codes, train.recorders),
            (known.data.in_plain_english() if plain else known.data).reports,
            BaselineInputs(held_out.pooled[rows.numpy()], wanted.codes, wanted.recorders),
        )
    reports = measure_reports(
        written,
        references,
        wanted.patient_id,
        wanted.recorders,
        untold=untold,
        baselines=baselines,
        in_plain_english=plain,
        resamples=resamples,
    )
    compared = [plain_english(text) for text in references] if plain else references
    ids = wanted.ecg_id.tolist()
    examples = tuple(
        Example(number, reference, report.text, tuple(score for _, score in report.sentences))
        for number, reference, report in zip(ids, compared, written, strict=True)
    )
    return {
        "reports": reports,
        "references": len(rows),
        "sentences": sentence_confidence(written, compared),
        "examples": examples,
    }


@torch.no_grad()
def _retrieval(
    model: AlignmentModel,
    text: TextEncoder | None,
    held_out: EvalSet,
    score: str,
    config: Config,
    cache_dir: Path,
    progress: Progress,
) -> dict[str, float]:
    data = held_out.data.in_plain_english() if config.data.plain_english else held_out.data
    rows = held_out.with_reports(data.reports)
    if text is None or len(rows) < 2:
        progress.note(
            "no retrieval: " + ("fewer than two reports" if text else "the run brings no text encoder")
        )
        return {}
    reports = [data.reports[row] for row in rows.tolist()]
    distinct = sorted(set(reports))
    number = {report: index for index, report in enumerate(distinct)}
    if config.text.train:
        parts = [text(distinct[start : start + BATCH]) for start in range(0, len(distinct), BATCH)]
        longest = max(part.tokens.shape[1] for part in parts)
        embedded = TextTokens(
            torch.cat([F.pad(part.tokens, (0, 0, 0, longest - part.tokens.shape[1])) for part in parts]),
            torch.cat([F.pad(part.mask, (0, longest - part.mask.shape[1])) for part in parts]),
            torch.cat([part.pooled for part in parts]),
        )
    else:
        store = embed_texts(text, distinct, cache_dir=cache_dir)
        embedded = store.batch(torch.arange(len(distinct)))
    device = next(model.parameters()).device
    moved = TextTokens(embedded.tokens.to(device), embedded.mask.to(device), embedded.pooled.to(device))
    part, valid = held_out.tokens[rows].float().to(device), held_out.mask[rows].to(device)
    return retrieval(
        model.project_tokens(EncoderOutput(part, valid, masked_mean(part, valid))),
        model.embed_text(moved),
        torch.tensor([number[report] for report in reports], device=device),
        score=score,
        transport=transport(config.align),
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value
