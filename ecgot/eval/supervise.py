"""Supervised baselines: classifiers trained on the labels and measured like zero-shot scores.

A run's folder:

config.json             data, encoder and seed, as of every run
supervised.json         the settings of the training
metrics.jsonl           one line per epoch
supervised.safetensors  the classifier
evaluation.json         its macro AUROC on held-out folds
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ecgot.choices import ALL, EVALUATION_FOLDS, GROUPS, OWN_LABELS, RESAMPLES, SUPERVISED_ENCODER
from ecgot.data.dataset import EcgDataset
from ecgot.data.ptbxl import Labels, check_patient_split
from ecgot.data.yes_no import YesNoLabels, read_yes_no
from ecgot.errors import EcgotError
from ecgot.eval.auroc import AurocResult, macro_auroc
from ecgot.files import default_cache_dir, write_text
from ecgot.models.classifier import Classifier
from ecgot.models.encoders import encoder
from ecgot.runs.config import Config, DataConfig, EncoderConfig, differences
from ecgot.runs.progress import Progress
from ecgot.runs.records import load_folds
from ecgot.runs.run import Run
from ecgot.runs.supervised import STAGE, SupervisedConfig
from ecgot.train.supervised import (
    Targets,
    benchmark_config,
    class_probabilities,
    fine_tuning_config,
    for_few,
    labelled,
    train_classifier,
)
from ecgot.version import __version__


@dataclass(frozen=True)
class SupervisedEvaluation:
    """What a trained classifier reached on held-out folds.

    Attributes:
        start: the run that the encoder comes from; None if trained from scratch.
        seconds: of the whole training.
        results: AUROC by label group.
        settings: data, resamples, and the whole configuration.
    """

    encoder: str
    start: str | None
    group: str
    seed: int
    epochs: int
    seconds: float
    folds: tuple[int, ...]
    records: int
    results: dict[str, AurocResult]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as plain values for JSON, with ``start`` as "from" and ``results`` as "ranking".

        NaN becomes None.
        """
        values = dataclasses.asdict(self)
        settings, results, start = (values.pop(name) for name in ("settings", "results", "start"))
        for found in results.values():
            found |= {
                name: None if math.isnan(found[name]) else found[name] for name in ("macro", "low", "high")
            }
        first = {"kind": STAGE, "encoder": values.pop("encoder"), "from": start}
        return first | values | {"ranking": results, "version": __version__, "settings": settings}


@dataclass(frozen=True)
class SupervisedRequest:
    """The arguments of :func:`supervise`; None is left to the folder or to the defaults."""

    root: Path
    out: Path
    encoder_name: str | None
    start: Run | None
    group: str | None
    labels_csv: Path | None
    epochs: int | None
    seed: int | None
    folds: tuple[int, ...]
    resamples: int

    def __post_init__(self) -> None:
        if self.start is not None and self.encoder_name is not None:
            raise EcgotError(
                f"encoder: expected an encoder or a run to start from, got {self.encoder_name!r} and a run"
            )
        if self.group is not None and self.labels_csv is not None:
            raise EcgotError(f"group: expected a group or a CSV of labels, got {self.group!r} and a CSV")
        if self.group is not None and self.group not in (*GROUPS, ALL):
            raise EcgotError(f"group: expected one of {', '.join((*GROUPS, ALL))}, got {self.group!r}")
        if self.epochs is not None and self.epochs < 1:
            raise EcgotError(f"epochs: expected an integer >= 1, got {self.epochs}")
        if self.seed is not None and self.seed < 0:
            raise EcgotError(f"seed: expected an integer >= 0, got {self.seed}")


def supervise(
    root: Path,
    out: Path,
    *,
    encoder_name: str | None = None,
    start: Run | None = None,
    group: str | None = None,
    labels_csv: Path | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    folds: Sequence[int] = EVALUATION_FOLDS,
    resamples: int = RESAMPLES,
    resume: bool = False,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> SupervisedEvaluation:
    """Train a classifier into the folder ``out``, evaluate it, and write ``evaluation.json`` there.

    Args:
        root: a data set in PTB-XL's layout.
        encoder_name: an encoder to train from scratch by the benchmark's protocol; "resnet1d_wang" if neither
            this nor ``start`` is given.
        start: a run whose aligned encoder is fine-tuned instead.
        group: a label group, or "all". Default: "superclass" from scratch, "all" from a run.
        labels_csv: a CSV of yes/no labels to learn in place of a group, see :mod:`ecgot.data.yes_no`.
        epochs: default 50 from scratch, 8 from a run, or more where records are so few that 8 epochs are
            less than 400 steps.
        seed: default 0.
        folds: held-out folds to evaluate. metrics.jsonl tracks them during training, but nothing is selected
            by them.
        resamples: bootstrap resamples of patients, for the intervals.
        resume: continue an interrupted training, or evaluate a finished one. Arguments that are omitted keep
            its own settings; after its first epoch ``start`` is no longer read.
        cache_dir: of signals; by default :func:`ecgot.files.default_cache_dir`.

    Raises:
        EcgotError: an argument, the data or the folder cannot be used. Nothing in ``out`` is overwritten.
    """
    progress = progress or Progress()
    request = SupervisedRequest(
        root, out, encoder_name, start, group, labels_csv, epochs, seed, tuple(folds), resamples
    )
    config, settings = _settings(request, resume=resume)
    train, held_out = _datasets(request, config, settings, cache_dir or default_cache_dir(), progress)
    run, settings = _open(request, config, settings, train)
    classifier = train_classifier(
        run,
        settings,
        train.records,
        train.targets,
        validate=lambda kept: _validate(kept, held_out, progress),
        progress=progress,
    )
    evaluation = _evaluate(request, run, settings, classifier, held_out, progress)
    write_text(out / "evaluation.json", json.dumps(evaluation.to_dict(), indent=2) + "\n")
    return evaluation


def _settings(request: SupervisedRequest, *, resume: bool) -> tuple[Config, SupervisedConfig]:
    """Settings of a new training, or of the one that ``out`` holds."""
    if not (request.out / "config.json").exists():
        return _new_settings(request)
    _check_folder(request.out, resume=resume)
    return _resumed_settings(request)


@dataclass(frozen=True)
class _Labelled:
    """Records and their labels."""

    records: EcgDataset
    targets: Targets


def _datasets(
    request: SupervisedRequest,
    config: Config,
    settings: SupervisedConfig,
    cache_dir: Path,
    progress: Progress,
) -> tuple[_Labelled, _Labelled]:
    """The labelled training records and the held-out ones."""
    trained_on = set(request.folds) & set(config.data.train_folds)
    if trained_on:
        raise EcgotError(f"folds: expected held-out folds, got fold {min(trained_on)}, which is trained on")
    encoder(config.encoder.name, leads=len(config.data.leads))  # an unknown name fails before data is read
    own = read_yes_no(settings.labels_csv) if settings.labels_csv else None
    train = load_folds(config, config.data.train_folds, cache_dir, progress)
    held_out = load_folds(config, request.folds, cache_dir, progress)
    check_patient_split(train.table, held_out.table)
    sets = [
        (each, Targets.of(each, settings.groups) if own is None else Targets.of_own(each, own))
        for each in (train, held_out)
    ]
    _note_left_out(sets, own, settings, progress)
    return _Labelled(*labelled(*sets[0])), _Labelled(*sets[1])


def _note_left_out(
    sets: Sequence[tuple[EcgDataset, Targets]],
    own: YesNoLabels | None,
    settings: SupervisedConfig,
    progress: Progress,
) -> None:
    """Say how many records and rows take no part."""
    parts = ("training", "held-out")
    without = [int((~targets.counted.any(1)).sum()) for _, targets in sets]
    shares = [
        f"{left} of {len(records)} {part} records"
        for left, (records, _), part in zip(without, sets, parts, strict=True)
    ]
    if own is not None:
        named = sum(own.named(records.table) for records, _ in sets)
        progress.note(
            f"labels: {named} of {len(own.names)} rows of {own.path.name} name records of these folds; "
            f"{' and '.join(shares)} have no 1 or 0 and are left out"
        )
    elif any(without):
        progress.note(
            f"data: {' and '.join(shares)} have no label in {' or '.join(settings.groups)} and are left out, "
            "as in the benchmark's protocol; with --labels every 0 counts"
        )


def _resumed_settings(request: SupervisedRequest) -> tuple[Config, SupervisedConfig]:
    """The settings that ``out`` is trained with.

    Raises:
        EcgotError: the request differs from them.
    """
    run = Run.open(request.out)
    saved, trained = run.config(), SupervisedConfig.of(run)
    config, settings = saved, trained
    data = replace(config.data, root=str(request.root.resolve()))
    config = replace(config, data=data, seed=config.seed if request.seed is None else request.seed)
    if request.encoder_name is not None:
        config = replace(config, encoder=EncoderConfig(request.encoder_name))
        settings = replace(settings, start="")
    if request.start is not None:
        settings = replace(settings, start=request.start.name)
    if request.group is not None:
        settings = replace(settings, group=request.group, labels_csv="")
    if request.labels_csv is not None:
        settings = replace(settings, group="", labels_csv=str(request.labels_csv.resolve()))
    settings = replace(settings, epochs=request.epochs or settings.epochs)
    changed = differences(saved, config) + [
        f"{name}: {value} against {getattr(settings, name)}"
        for name, value in dataclasses.asdict(trained).items()
        if getattr(settings, name) != value
    ]
    if changed:
        raise EcgotError(
            f"out: expected the configuration of {request.out}, got another configuration ({changed[0]})"
        )
    return saved, trained


def _new_settings(request: SupervisedRequest) -> tuple[Config, SupervisedConfig]:
    seed, root, start = request.seed or 0, str(request.root.resolve()), request.start
    if start is None:
        config = Config(
            seed=seed,
            data=DataConfig(root=root),
            encoder=EncoderConfig(request.encoder_name or SUPERVISED_ENCODER),
        )
        settings = benchmark_config(request.group, request.epochs)
    else:
        config = _started_from(start)
        config = replace(config, seed=seed, data=replace(config.data, root=root, reports_csv=""))
        settings = fine_tuning_config(start, request.group, request.epochs)
    if request.labels_csv is not None:
        settings = replace(settings, group="", labels_csv=str(request.labels_csv.resolve()))
    return config, settings


def _started_from(start: Run) -> Config:
    """The configuration of a run whose encoder can be fine-tuned."""
    config = start.config()
    if not start.done("align"):
        raise EcgotError(
            f"from: expected a run with a trained stage align, got {start.folder}, where it is not trained"
        )
    if config.text.train:
        raise EcgotError(
            f"from: expected a run with a frozen text encoder, got {start.folder}, which trained its own"
        )
    return config


def _check_folder(out: Path, *, resume: bool) -> None:
    """Refuse ``out``, which holds a run, unless it is a supervised one and may be resumed."""
    if Run(out).begun("align") or Run(out).begun("report"):
        raise EcgotError(f"out: {out} holds a run of ecgot train; name another folder")
    if not resume:
        raise EcgotError(f"out: {out} already holds a run; name another folder, or add --resume")
    if not (out / "supervised.json").exists():
        raise EcgotError(f"out: {out} holds no supervised.json: nothing was trained; name another folder")


def _open(
    request: SupervisedRequest, config: Config, settings: SupervisedConfig, train: _Labelled
) -> tuple[Run, SupervisedConfig]:
    """The run's folder, made or opened again, and the settings with what the data adds to them.

    Raises:
        EcgotError: the run in the folder was trained on other classes.
    """
    classes = train.targets.classes
    if settings.classes and settings.classes != classes:
        raise EcgotError(f"out: expected the classes that {request.out} was trained on, got others")
    if not settings.classes:  # a new training
        settings = replace(settings, classes=classes)
        if settings.start and request.epochs is None:
            settings = for_few(settings, len(train.records))
    run = Run.create(request.out, config, resume=True)
    if not (request.out / "supervised.json").exists():
        settings.save(request.out)
    return run, settings


def _validate(classifier: Classifier, held_out: _Labelled, progress: Progress) -> dict[str, float]:
    """Macro AUROC by group, from the middle crop only: all crops would cost a quarter of the epoch."""
    records = held_out.records
    crop, starts = classifier.crops(records.signals_uv.shape[2])
    middle = [starts[len(starts) // 2]] if records.lengths.min() == records.signals_uv.shape[2] else [0]
    scores = class_probabilities(classifier, records, middle, crop, progress=progress)
    return {
        f"validation_auroc_{group}": result.macro
        for group, result in _auroc_by_group(scores, held_out, resamples=1).items()
        if not math.isnan(result.macro)
    }


def _auroc_by_group(scores: np.ndarray, held_out: _Labelled, *, resamples: int) -> dict[str, AurocResult]:
    """AUROC by group of scores [n, C] over the classes of all groups."""
    targets, patients = held_out.targets, held_out.records.table.patient_id
    parts, truth, known = map(targets.by_group, (scores, targets.matrix, targets.counted))
    return {
        group: macro_auroc(
            parts[group], Labels(names, truth[group]), patients, known=known[group], resamples=resamples
        )
        for group, names in targets.classes.items()
    }


def _evaluate(
    request: SupervisedRequest,
    run: Run,
    settings: SupervisedConfig,
    classifier: Classifier,
    held_out: _Labelled,
    progress: Progress,
) -> SupervisedEvaluation:
    config, dataset = run.config(), held_out.records
    crop, starts = classifier.crops(dataset.signals_uv.shape[2])
    scores = class_probabilities(classifier, dataset, starts, crop, progress=progress)
    return SupervisedEvaluation(
        encoder=config.encoder.name,
        start=settings.start or None,
        group=settings.group or OWN_LABELS,
        seed=config.seed,
        epochs=settings.epochs,
        seconds=sum(line["seconds"] for line in run.metrics() if line["stage"] == STAGE),
        folds=request.folds,
        records=len(dataset),
        results=_auroc_by_group(scores, held_out, resamples=request.resamples),
        settings={
            "data": config.data.root,
            "resamples": request.resamples,
            "supervised": dataclasses.asdict(settings),
            "config": dataclasses.asdict(config),
        },
    )
