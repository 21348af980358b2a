"""Evaluation of a run on held-out folds: zero-shot detection, a linear probe, retrieval and reports."""

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

from ecgot.choices import BEAMS, EVALUATION_FOLDS, GROUPS, RESAMPLES
from ecgot.data.dataset import EcgDataset
from ecgot.data.ptbxl import available_folds, check_patient_split
from ecgot.errors import EcgotError
from ecgot.eval.auroc import AurocResult, macro_auroc
from ecgot.eval.inputs import EvalSet, EvaluationRequest, TrainSet, rows_with_text
from ecgot.eval.probe import linear_probe
from ecgot.eval.report_metrics import Example, save_examples
from ecgot.eval.reports import evaluate_reports
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
from ecgot.runs.checkpoints import load_alignment, transport
from ecgot.runs.config import Config
from ecgot.runs.progress import Progress
from ecgot.runs.records import BATCH, encode, load_folds
from ecgot.runs.run import PRETRAINED, Run
from ecgot.version import __version__

# How references are prepared, by data.plain_english.
REFERENCES = {
    False: "cleaned by ecgot.text.cleaning.clean_report and lower-cased",
    True: "cleaned by ecgot.text.cleaning.clean_report and put into plain English by "
    "ecgot.text.glossary.plain_english; for generated_as_written only cleaned",
}


@dataclass(frozen=True)
class Evaluation:
    """The results of :func:`evaluate`.

    Attributes:
        zero_shot, probe: AUROC by label group. The probe is empty if the data set lacks the training folds.
        retrieval: recall, see :func:`ecgot.eval.retrieval.retrieval`; empty without a text encoder.
        reports: metrics by system, see :func:`ecgot.eval.report_metrics.measure_reports`; baselines need the
            training folds. Empty if no record has a reference or stage 2 has not been trained.
        references: how many records have a reference.
        sentences: how well sentence probabilities predict that a sentence is right, see
            :func:`ecgot.eval.report_metrics.sentence_confidence`.
        examples: one for each record with a reference.
        dialect: the exact definition of each report metric.
        settings: what was evaluated and how: the data, where references come from ("report column" or a
            CSV), prompts, beams, resamples, and the run's whole configuration.
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
    folds: Sequence[int] = EVALUATION_FOLDS,
    reports_csv: Path | None = None,
    score: str | None = None,
    prompts: Path = BUILT_IN,
    num_beams: int = BEAMS,
    resamples: int = RESAMPLES,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluate a run on held-out folds of a data set.

    Args:
        root: a data set in PTB-XL's layout.
        out: folder for ``evaluation.json`` and ``generated_reports.csv``. By default the run's own; the
            model that comes with the package writes none.
        folds: the folds to evaluate; they must share no patient with the training folds.
        reports_csv: reference reports. By default those the run was trained with if ``root`` is its own data
            set, else the report column.
        score: see :func:`~ecgot.inference.zeroshot.check_score` and
            :func:`~ecgot.inference.zeroshot.class_scores`.
        prompts: a TOML file to use instead of the built-in prompts.
        num_beams: beams of the report search; 1 is greedy.
        resamples: bootstrap resamples of patients, for the intervals.
        cache_dir: of signals and text embeddings; by default :func:`ecgot.files.default_cache_dir`.

    Raises:
        EcgotError: the run, the data or a setting cannot be used.
    """
    config = run.config()
    request = EvaluationRequest(
        run=run,
        config=config,
        root=root,
        folds=tuple(folds),
        references=_references(config, root, reports_csv),
        score=check_score(score, config.align),
        prompts=prompts,
        num_beams=num_beams,
        resamples=resamples,
        cache_dir=cache_dir or default_cache_dir(),
        progress=progress or Progress(),
    )
    evaluation = _evaluate(request)
    if out is None and run.folder != PRETRAINED:
        out = run.folder
    if out is not None:
        _save(evaluation, out)
    return evaluation


def _evaluate(request: EvaluationRequest) -> Evaluation:
    config = request.config
    trained_on = set(request.folds) & set(config.data.train_folds)
    if trained_on:
        raise EcgotError(f"folds: expected held-out folds, got fold {min(trained_on)}, which was trained on")
    # Embedded prompts come with an exported run, which then needs no text encoder.
    ready = request.prompts == BUILT_IN and request.run.prompts.exists()
    text = None if ready else TextEncoder(config.text.name, max_tokens=config.text.max_tokens)
    model = load_alignment(request.run, text)
    train, held_out = _encoded_sets(request, model)
    data = held_out.data
    scores = _zero_shot_scores(request, model, held_out, _embedded_prompts(request, model, text, data))
    reports = evaluate_reports(request, model, train, held_out)
    return Evaluation(
        folds=request.folds,
        records=len(data),
        score=request.score,
        zero_shot={group: _auroc(scores[group], data, group, request.resamples) for group in GROUPS},
        probe={} if train is None else _probe(request, train, held_out),
        retrieval=_retrieval(request, model, text, held_out),
        reports=reports.systems,
        references=reports.references,
        sentences=reports.sentences,
        examples=reports.examples,
        dialect=DIALECT | {"references": REFERENCES[config.data.plain_english]} | reports.dialect,
        notice=NOTICE,
        settings={
            "ecgot": __version__,
            "data": str(request.root.resolve()),
            "references": request.references or "report column",
            "prompts": "built-in" if request.prompts == BUILT_IN else str(request.prompts.resolve()),
            "num_beams": request.num_beams,
            "resamples": request.resamples,
            "training_seconds": _training_seconds(request.run),
            "config": dataclasses.asdict(config),
        },
    )


def _save(evaluation: Evaluation, out: Path) -> None:
    """Write ``evaluation.json`` and ``generated_reports.csv`` to ``out``."""
    saved = {key: value for key, value in evaluation.to_dict().items() if key != "examples"}
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "evaluation.json", json.dumps(saved, indent=2) + "\n")
    save_examples(out / "generated_reports.csv", evaluation.examples)


def _training_seconds(run: Run) -> dict[str, float]:
    """Seconds of training by stage, from the run's metrics.jsonl."""
    seconds: dict[str, float] = {}
    for line in run.metrics():
        seconds[line["stage"]] = seconds.get(line["stage"], 0.0) + line["seconds"]
    return seconds


def _references(config: Config, root: Path, reports_csv: Path | None) -> str:
    """Path of the CSV of references; "" takes the report column."""
    if reports_csv is not None:
        return str(reports_csv.resolve())
    same = config.data.root and Path(config.data.root).resolve() == root.resolve()
    return config.data.reports_csv if same else ""


def _encoded_sets(request: EvaluationRequest, model: AlignmentModel) -> tuple[TrainSet | None, EvalSet]:
    """The training folds, None if ``root`` holds none of them, and the folds to evaluate."""
    config, progress = request.config, request.progress
    load = functools.partial(
        load_folds,
        config,
        cache_dir=request.cache_dir,
        progress=progress,
        root=request.root,
        reports_csv=request.references,
    )
    encoded = functools.partial(encode, model, progress=progress, cuda_graph=config.cuda_graph)
    data = load(request.folds)
    progress.note(f"references: {request.references or 'report column'}")
    train = None
    train_folds = [fold for fold in available_folds(request.root) if fold in config.data.train_folds]
    if train_folds:
        train = load(train_folds)
        check_patient_split(train.table, data.table)
    else:
        progress.note(f"no linear probe and no report baselines: {request.root} has no training fold")
    tokens, mask = encoded(data, task="encoding evaluation folds")
    held_out = EvalSet(data, tokens, mask, _pooled(tokens, mask))
    if train is None:
        return None, held_out
    return TrainSet(train, _pooled(*encoded(train, task="encoding training folds"))), held_out


def _embedded_prompts(
    request: EvaluationRequest, model: AlignmentModel, text: TextEncoder | None, data: EcgDataset
) -> EmbeddedPrompts:
    """The prompts of the classes that ``data`` has."""
    classes = {group: data.labels(group).classes for group in GROUPS}
    if text is None:
        return load_prompts(request.run.prompts, next(model.parameters()).device).select(classes)
    prompts = read_prompts(request.prompts)
    wanted = {group: select_prompts(prompts, group, names) for group, names in classes.items()}
    return embed_prompts(model, text, wanted)


@torch.no_grad()
def _zero_shot_scores(
    request: EvaluationRequest, model: AlignmentModel, held_out: EvalSet, prompts: EmbeddedPrompts
) -> dict[str, np.ndarray]:
    """Scores [n, C] by group."""
    settings = transport(request.config.align)
    parts: dict[str, list[Tensor]] = {group: [] for group in GROUPS}
    for rows in torch.arange(len(held_out.tokens)).split(BATCH):
        ecg = model.project_tokens(_encoder_output(model, held_out, rows))
        for group, values in class_scores(ecg, prompts, score=request.score, transport=settings).items():
            parts[group].append(values.cpu())
        request.progress.bar("zero-shot scores", int(rows[-1]) + 1, len(held_out.tokens))
    return {group: torch.cat(values).numpy() for group, values in parts.items()}


def _encoder_output(model: AlignmentModel, held_out: EvalSet, rows: Tensor) -> EncoderOutput:
    """The stored tokens of ``rows`` [b], as the encoder put them out, on the model's device."""
    device = next(model.parameters()).device
    tokens, mask = held_out.tokens[rows].float().to(device), held_out.mask[rows].to(device)
    return EncoderOutput(tokens, mask, masked_mean(tokens, mask))


def _pooled(tokens: Tensor, mask: Tensor) -> np.ndarray:
    return masked_mean(tokens.float(), mask).numpy()


def _auroc(scores: np.ndarray, data: EcgDataset, group: str, resamples: int) -> AurocResult:
    return macro_auroc(scores, data.labels(group), data.table.patient_id, resamples=resamples)


def _probe(request: EvaluationRequest, train: TrainSet, held_out: EvalSet) -> dict[str, AurocResult]:
    """AUROC of the linear probe by group."""
    results = {}
    for number, group in enumerate(GROUPS):
        # The protocol of ecgot.eval.auroc: only records with a label in the group count.
        labelled = train.data.labels(group).matrix.any(1)
        truth = train.data.labels(group).matrix[labelled]
        scores = (
            linear_probe(train.pooled[labelled], truth, held_out.pooled)
            if len(truth)
            else np.zeros((len(held_out.pooled), truth.shape[1]))
        )
        results[group] = _auroc(scores, held_out.data, group, request.resamples)
        request.progress.bar("linear probe", number + 1, len(GROUPS))
    return results


@torch.no_grad()
def _retrieval(
    request: EvaluationRequest, model: AlignmentModel, text: TextEncoder | None, held_out: EvalSet
) -> dict[str, float]:
    """Recall between the held-out ECGs and their distinct reports."""
    plain = request.config.data.plain_english
    all_reports = (held_out.data.in_plain_english() if plain else held_out.data).reports
    rows = rows_with_text(all_reports)
    if text is None or len(rows) < 2:
        reason = "fewer than two reports" if text else "the run brings no text encoder"
        request.progress.note(f"no retrieval: {reason}")
        return {}
    reports = [all_reports[row] for row in rows.tolist()]
    distinct = sorted(set(reports))
    number = {report: index for index, report in enumerate(distinct)}
    embedded = _text_tokens(request, text, distinct)
    device = next(model.parameters()).device
    moved = TextTokens(embedded.tokens.to(device), embedded.mask.to(device), embedded.pooled.to(device))
    return retrieval(
        model.project_tokens(_encoder_output(model, held_out, rows)),
        model.embed_text(moved),
        torch.tensor([number[report] for report in reports], device=device),
        score=request.score,
        transport=transport(request.config.align),
    )


def _text_tokens(request: EvaluationRequest, text: TextEncoder, reports: Sequence[str]) -> TextTokens:
    """Tokens of K reports; from the cache unless the run trained its text encoder."""
    if not request.config.text.train:
        store = embed_texts(text, reports, cache_dir=request.cache_dir)
        return store.batch(torch.arange(len(reports)))
    parts = [text(reports[start : start + BATCH]) for start in range(0, len(reports), BATCH)]
    longest = max(part.tokens.shape[1] for part in parts)
    return TextTokens(
        torch.cat([F.pad(part.tokens, (0, 0, 0, longest - part.tokens.shape[1])) for part in parts]),
        torch.cat([F.pad(part.mask, (0, longest - part.mask.shape[1])) for part in parts]),
        torch.cat([part.pooled for part in parts]),
    )


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value
