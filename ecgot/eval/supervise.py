"""Supervised baselines: what training on the labels would give, measured as zero-shot scores are.

config.json             data, encoder and seed, as of every run
supervised.json         the settings of the training
metrics.jsonl           one line an epoch
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

from ecgot.data.dataset import EcgDataset
from ecgot.data.ptbxl import GROUPS, Labels, check_patient_split
from ecgot.errors import EcgotError
from ecgot.eval.auroc import AurocResult, macro_auroc
from ecgot.files import default_cache_dir, write_text
from ecgot.models.encoders import encoder
from ecgot.runs.config import Config, DataConfig, EncoderConfig, differences
from ecgot.runs.progress import Progress
from ecgot.runs.records import load_folds
from ecgot.runs.run import Run
from ecgot.train.supervised import (
    ALL,
    STAGE,
    Classifier,
    SupervisedConfig,
    benchmark_config,
    class_probabilities,
    fine_tuning_config,
    labelled,
    scoring_crops,
    train_classifier,
)
from ecgot.version import __version__


@dataclass(frozen=True)
class SupervisedEvaluation:
    """What a trained classifier reached on held-out folds.

    Attributes:
        start: the run that the encoder comes from, None from scratch.
        seconds: of the training in all.
        ranking: by label group.
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
    ranking: dict[str, AurocResult]
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON; ``start`` is called "from", NaN becomes None."""
        values = dataclasses.asdict(self)
        settings, ranking, start = (values.pop(name) for name in ("settings", "ranking", "start"))
        for found in ranking.values():
            found |= {
                name: None if math.isnan(found[name]) else found[name] for name in ("macro", "low", "high")
            }
        told = {"kind": STAGE, "encoder": values.pop("encoder"), "from": start} | values
        return told | {"ranking": ranking, "version": __version__, "settings": settings}


@dataclass(frozen=True)
class SupervisedRequest:
    """What ``supervise`` was asked for; None is left to the folder or to the defaults."""

    encoder_name: str | None
    start: Run | None
    group: str | None
    epochs: int | None
    seed: int | None

    def __post_init__(self) -> None:
        if self.start is not None and self.encoder_name is not None:
            raise EcgotError(
                f"encoder: got {self.encoder_name!r} and a run to start from, accepted is one of them"
            )
        if self.group is not None and self.group not in (*GROUPS, ALL):
            raise EcgotError(f"group: got {self.group!r}, accepted are {', '.join((*GROUPS, ALL))}")
        if self.epochs is not None and self.epochs < 1:
            raise EcgotError(f"epochs: got {self.epochs}, accepted is an integer >= 1")
        if self.seed is not None and self.seed < 0:
            raise EcgotError(f"seed: got {self.seed}, accepted is an integer >= 0")


def supervise(
    root: Path,
    out: Path,
    *,
    encoder_name: str | None = None,
    start: Run | None = None,
    group: str | None = None,
    epochs: int | None = None,
    seed: int | None = None,
    folds: Sequence[int] = (9,),
    resamples: int = 1000,
    resume: bool = False,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> SupervisedEvaluation:
    """Train a classifier into the folder ``out``, and write ``evaluation.json`` there.

    Args:
        root: a data set in PTB-XL's layout.
        encoder_name: trained from scratch by the benchmark's protocol; "resnet1d_wang" where neither this
            nor ``start`` is given.
        start: a run whose aligned encoder is fine-tuned instead.
        group: of labels, or "all"; "superclass" from scratch and "all" from a run where omitted.
        epochs: 50 from scratch and 8 from a run where omitted.
        seed: 0 where omitted.
        folds: to evaluate, held out. metrics.jsonl follows them too, but nothing is chosen by them.
        resamples: of the bootstrap over patients.
        resume: go on with a training that was interrupted, or evaluate one that is done, in its own settings
            where they are omitted; after its first epoch ``start`` is not read again.

    Raises:
        EcgotError: an argument, the data or the folder cannot be used. Nothing of ``out`` is overwritten.
    """
    cache_dir, progress = cache_dir or default_cache_dir(), progress or Progress()
    request = SupervisedRequest(encoder_name, start, group, epochs, seed)
    had = (out / "config.json").exists()
    if had:
        _check_folder(out, resume=resume)
    config, settings = _resumed(root, out, request) if had else _configured(root, request)
    trained_on = set(folds) & set(config.data.train_folds)
    if trained_on:
        raise EcgotError(f"folds: fold {min(trained_on)} is trained on, accepted are held-out folds")
    encoder(config.encoder.name, leads=len(config.data.leads))  # refused before anything is read
    train = load_folds(config, config.data.train_folds, cache_dir, progress)
    held_out = load_folds(config, folds, cache_dir, progress)
    check_patient_split(train.table, held_out.table)
    train = labelled(train, settings.groups)
    run = _open(out, config, settings)
    classifier = train_classifier(
        run,
        settings,
        train,
        validate=lambda kept: _validate(kept, settings, held_out, progress),
        progress=progress,
    )
    evaluation = _evaluate(run, settings, classifier, held_out, tuple(folds), resamples, progress)
    write_text(out / "evaluation.json", json.dumps(evaluation.to_dict(), indent=2) + "\n")
    return evaluation


def _resumed(root: Path, out: Path, request: SupervisedRequest) -> tuple[Config, SupervisedConfig]:
    """What ``out`` is trained with.

    Raises:
        EcgotError: what is asked for now differs from it.
    """
    saved, trained = Run.open(out).config(), _saved_settings(out)
    config, settings = saved, trained
    data = replace(config.data, root=str(root.resolve()))
    config = replace(config, data=data, seed=config.seed if request.seed is None else request.seed)
    if request.encoder_name is not None:
        config = replace(config, encoder=EncoderConfig(request.encoder_name))
        settings = replace(settings, start="")
    if request.start is not None:
        settings = replace(settings, start=str(request.start.folder.resolve()))
    settings = replace(
        settings, group=request.group or settings.group, epochs=request.epochs or settings.epochs
    )
    changed = differences(saved, config) + [
        f"{name}: {value} against {getattr(settings, name)}"
        for name, value in dataclasses.asdict(trained).items()
        if getattr(settings, name) != value
    ]
    if changed:
        raise EcgotError(f"out: {out} was trained with another configuration ({changed[0]})")
    return saved, trained


def _saved_settings(out: Path) -> SupervisedConfig:
    path = out / "supervised.json"
    try:
        return SupervisedConfig(**json.loads(path.read_text(encoding="utf-8")))
    except (UnicodeDecodeError, json.JSONDecodeError, TypeError) as error:
        raise EcgotError(f"out: {path} does not hold the settings of a run ({error})") from error


def _configured(root: Path, request: SupervisedRequest) -> tuple[Config, SupervisedConfig]:
    seed, place, start = request.seed or 0, str(root.resolve()), request.start
    if start is None:
        config = Config(
            seed=seed,
            data=DataConfig(root=place),
            encoder=EncoderConfig(request.encoder_name or "resnet1d_wang"),
        )
        return config, benchmark_config(request.group, request.epochs)
    config = start.config()
    if not start.done("align"):
        raise EcgotError(f"from: stage align of {start.folder} is not trained, accepted is a run where it is")
    if config.text.train:
        raise EcgotError(
            f"from: {start.folder} trained its text encoder, accepted is a run with a frozen one"
        )
    return (
        replace(config, seed=seed, data=replace(config.data, root=place, reports_csv="")),
        fine_tuning_config(start, request.group, request.epochs),
    )


def _check_folder(out: Path, *, resume: bool) -> None:
    """That ``out``, which holds a run, is a supervised one that may be resumed."""
    if Run(out).begun("align") or Run(out).begun("report"):
        raise EcgotError(f"out: {out} holds a run of ecgot train; name another folder")
    if not resume:
        raise EcgotError(f"out: {out} already holds a run; name another folder, or add --resume")
    if not (out / "supervised.json").exists():
        raise EcgotError(f"out: {out} holds no supervised.json: nothing was trained; name another folder")


def _open(out: Path, config: Config, settings: SupervisedConfig) -> Run:
    """The run's folder, made or opened again."""
    run, path = Run.create(out, config, resume=True), out / "supervised.json"
    if not path.exists():
        write_text(path, json.dumps(dataclasses.asdict(settings), indent=2) + "\n")
    return run


def _validate(
    classifier: Classifier, settings: SupervisedConfig, dataset: EcgDataset, progress: Progress
) -> dict[str, float]:
    """Macro AUROC by group; of the middle crop alone, as all crops would cost a quarter of the epoch."""
    crop, starts = scoring_crops(settings, dataset)
    middle = [starts[len(starts) // 2]] if dataset.lengths.min() == dataset.signals_uv.shape[2] else [0]
    rankings = _aurocs(classifier, settings, dataset, middle, crop, 1, progress)
    return {
        f"validation_auroc_{group}": ranking.macro
        for group, ranking in rankings.items()
        if not math.isnan(ranking.macro)
    }


def _aurocs(
    classifier: Classifier,
    settings: SupervisedConfig,
    dataset: EcgDataset,
    starts: Sequence[int],
    crop: int,
    resamples: int,
    progress: Progress,
) -> dict[str, AurocResult]:
    scores = class_probabilities(classifier, dataset, starts, crop, progress=progress)
    labels: list[Labels] = [dataset.labels(group) for group in settings.groups]
    parts = np.split(scores, np.cumsum([len(each.classes) for each in labels])[:-1], axis=1)
    patients = dataset.table.patient_id
    return {
        group: macro_auroc(part, each, patients, resamples=resamples)
        for group, part, each in zip(settings.groups, parts, labels, strict=True)
    }


def _evaluate(
    run: Run,
    settings: SupervisedConfig,
    classifier: Classifier,
    dataset: EcgDataset,
    folds: tuple[int, ...],
    resamples: int,
    progress: Progress,
) -> SupervisedEvaluation:
    config = run.config()
    crop, starts = scoring_crops(settings, dataset)
    return SupervisedEvaluation(
        encoder=config.encoder.name,
        start=settings.start or None,
        group=settings.group,
        seed=config.seed,
        epochs=settings.epochs,
        seconds=sum(line["seconds"] for line in run.metrics() if line["stage"] == STAGE),
        folds=folds,
        records=len(dataset),
        ranking=_aurocs(classifier, settings, dataset, starts, crop, resamples, progress),
        settings={
            "data": config.data.root,
            "resamples": resamples,
            "supervised": dataclasses.asdict(settings),
            "config": dataclasses.asdict(config),
        },
    )
