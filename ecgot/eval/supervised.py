"""Supervised baselines: encoders trained on the labels, which zero-shot scores are compared with.

From scratch: the protocol of the PTB-XL benchmark (Strodthoff et al. 2021, helme/ecg_ptbxl_benchmarking).
From an aligned encoder: whole records, all groups of labels at once.

config.json             data, encoder and seed, as of every run
supervised.json         the settings of the training
metrics.jsonl           one line an epoch
supervised.safetensors  the classifier
evaluation.json         its macro AUROC on held-out folds
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from ecgot.data.dataset import EcgDataset
from ecgot.data.ptbxl import GROUPS, Labels, check_patient_split
from ecgot.errors import EcgotError
from ecgot.eval.ranking import Ranking, rank
from ecgot.files import default_cache_dir, write_text
from ecgot.models.encoders import Encoder, encoder, folded, lay_out, masked_mean
from ecgot.train.align import load_alignment
from ecgot.train.batches import augmented, epoch_order, waveforms
from ecgot.train.config import Config, DataConfig, EncoderConfig, differences
from ecgot.train.run import Progress, Run, choose_device, parameter_groups, train_epochs, warm_up_and_decay
from ecgot.train.stages import load_folds
from ecgot.version import __version__

STAGE = "supervised"
BATCH = 128  # of scoring
ALL = "all"
BENCHMARK_ENCODERS = ("resnet1d_wang", "xresnet1d101", "inception1d")


@dataclass(frozen=True)
class SupervisedConfig:
    """How a classifier is trained; the defaults are the PTB-XL benchmark's.

    Attributes:
        start: folder of the run whose aligned encoder is fine-tuned; "" is from scratch.
        group: of labels, or "all".
        crop_seconds: of each record in training and in scoring; 0 takes whole records.
        stride_seconds: from crop to crop in scoring.
        encoder_learning_rate: at the top, as ``learning_rate``, which is the head's.
        average: of the weights over steps, exponentially; 0: the last ones.
    """

    start: str = ""
    group: str = "superclass"
    epochs: int = 50
    batch_size: int = 128
    learning_rate: float = 1e-2
    encoder_learning_rate: float = 1e-2
    weight_decay: float = 1e-2
    average: float = 0.0
    crop_seconds: float = 2.5
    stride_seconds: float = 1.25

    @property
    def groups(self) -> tuple[str, ...]:
        return GROUPS if self.group == ALL else (self.group,)


def benchmark_config(group: str | None = None, epochs: int | None = None) -> SupervisedConfig:
    """Of an encoder from scratch; None is the default."""
    return SupervisedConfig(group=group or "superclass", epochs=50 if epochs is None else epochs)


def fine_tuning_config(start: Run, group: str | None = None, epochs: int | None = None) -> SupervisedConfig:
    """Of the aligned encoder of ``start``; None is the default."""
    return SupervisedConfig(
        start=str(start.folder.resolve()),
        group=group or ALL,
        epochs=8 if epochs is None else epochs,
        batch_size=64,
        learning_rate=1e-3,
        encoder_learning_rate=3e-4,
        weight_decay=0.05,
        average=0.998,
        crop_seconds=0.0,
        stride_seconds=0.0,
    )


@dataclass(frozen=True)
class Targets:
    """Labels of several groups side by side.

    Attributes:
        matrix: [n, C] bool.
        counted: [n, C] bool; True where the record has a label in the column's group.
    """

    matrix: np.ndarray
    counted: np.ndarray

    @classmethod
    def of(cls, dataset: EcgDataset, groups: Sequence[str]) -> "Targets":
        matrices = [dataset.labels(group).matrix for group in groups]
        labelled = [np.broadcast_to(matrix.any(1, keepdims=True), matrix.shape) for matrix in matrices]
        return cls(np.concatenate(matrices, axis=1), np.concatenate(labelled, axis=1))


def labelled(dataset: EcgDataset, groups: Sequence[str]) -> EcgDataset:
    """The records with a label in one of the groups; the others take no part in training.

    Raises:
        EcgotError: fewer than two have.
    """
    rows = np.flatnonzero(Targets.of(dataset, groups).matrix.any(1))
    if len(rows) < 2:
        raise EcgotError(
            f"data: got {len(rows)} records labelled in {', '.join(groups)}, accepted are 2 or more"
        )
    return dataset.select(rows)


def class_loss(logits: Tensor, truth: Tensor, counted: Tensor) -> Tensor:
    """Binary cross entropy, the mean over the entries that count; logits, truth (0 or 1), counted: [b, C]."""
    losses = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return losses.where(counted, 0.0).sum() / counted.sum().clamp_min(1)


class Classifier(nn.Module):
    """An encoder and a head; waveforms are standardised by one mean and one deviation of the training data.

    Args:
        encoder: waveform [B, L, T] to tokens of its ``width``.
        classes: C.
        benchmark: the PTB-XL benchmark's head, on the mean and the maximum of the tokens; otherwise one
            linear layer on their mean.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, encoder: Encoder, classes: int, *, benchmark: bool) -> None:
        super().__init__()
        self.encoder, self.benchmark = encoder, benchmark
        self.head: nn.Module = nn.Linear(encoder.width, classes)
        if benchmark:
            self.head = nn.Sequential(
                nn.BatchNorm1d(2 * encoder.width),
                nn.Dropout(0.25),
                nn.Linear(2 * encoder.width, 128),
                nn.ReLU(),
                nn.BatchNorm1d(128),
                nn.Dropout(0.5),
                nn.Linear(128, classes),
            )
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("deviation", torch.ones(()))

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits [B, C] of waveform [B, L, T] in mV, lengths [B] where some are shorter."""
        return self.classify(self.encoder, waveform, lengths)

    def classify(self, encoder: nn.Module, waveform: Tensor, lengths: Tensor | None) -> Tensor:
        """The same by another form of the encoder, such as one for inference."""
        encoded = encoder((waveform - self.mean) / self.deviation, lengths)
        if not self.benchmark:
            return self.head(masked_mean(encoded.tokens, encoded.mask))
        highest = encoded.tokens.masked_fill(~encoded.mask[:, :, None], -math.inf).max(1).values
        return self.head(torch.cat([encoded.pooled, highest], 1))


def initialise(classifier: Classifier, encoder_name: str) -> None:
    """Weights as the benchmark draws them: He's normal over fan-in for its encoders and its head."""
    named = encoder_name in BENCHMARK_ENCODERS  # others keep an initialisation of their own
    for module in classifier.modules() if named else classifier.head.modules():
        if isinstance(module, nn.Conv1d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm1d):  # also those that begin as 0 elsewhere
            nn.init.ones_(module.weight)


def standard_scale(dataset: EcgDataset) -> tuple[float, float]:
    """Mean and standard deviation in mV over all samples of all records and leads."""
    count, total, squares = 0, 0.0, 0.0
    for rows in np.array_split(np.arange(len(dataset)), max(1, len(dataset) // BATCH)):
        signal = dataset.waveforms_mv(rows)  # 0 beyond a record's end, which adds nothing to the sums
        count += int(dataset.lengths[rows].sum()) * signal.shape[1]
        total += float(signal.sum(dtype=np.float64))
        squares += float(np.square(signal, dtype=np.float64).sum())
    mean = total / count
    return mean, max(squares / count - mean**2, 1e-12) ** 0.5


def random_crops(waveform: Tensor, lengths: Tensor | None, samples: int) -> tuple[Tensor, Tensor | None]:
    """A stretch [B, L, samples] of each record of [B, L, T], from torch's generator, within its length."""
    batch, _, width = waveform.shape
    last = torch.full((batch,), width - samples)
    if lengths is not None:
        last = (lengths.cpu() - samples).clamp_min(0)
    start = (torch.rand(batch) * (last + 1)).long().clamp(max=last)
    pieces = [record[:, at : at + samples] for record, at in zip(waveform, start.tolist(), strict=True)]
    return torch.stack(pieces), None if lengths is None else lengths.clamp(max=samples)


def crop_starts(samples: int, crop: int, stride: int) -> list[int]:
    """Where the crops of a record of ``samples`` begin: each ``stride``, as long as a whole crop is left."""
    return list(range(0, samples - crop + 1, stride)) or [0]


@torch.no_grad()
def class_probabilities(
    classifier: Classifier, dataset: EcgDataset, starts: Sequence[int], crop: int, *, progress: Progress
) -> np.ndarray:
    """Probabilities [n, C] of every record: of each class the largest over its crops.

    Args:
        starts: of the crops, of ``crop`` samples each. Those beyond a record's end take no part, except that
            the first is cut to the record.
    """
    classifier.eval()
    device = next(classifier.parameters()).device
    encode = folded(classifier.encoder)
    found = []
    for rows in torch.arange(len(dataset)).split(BATCH):
        signal, lengths = waveforms(dataset, rows, device)
        best = None
        for start in starts:
            left = None if lengths is None else (lengths - start).clamp(0, crop)
            logits = classifier.classify(encode, signal[:, :, start : start + crop], left)
            if left is not None and start != starts[0]:
                logits = logits.masked_fill((left < crop)[:, None], -math.inf)
            best = logits if best is None else torch.maximum(best, logits)
        found.append(torch.sigmoid(cast(Tensor, best)).cpu())
        progress.bar("supervised, scores", int(rows[-1]) + 1, len(dataset))
    return torch.cat(found).numpy()


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
    ranking: dict[str, Ranking]
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
class Asked:
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
    asked = Asked(encoder_name, start, group, epochs, seed)
    had = (out / "config.json").exists()
    if had:
        _check_folder(out, resume=resume)
    config, settings = _resumed(root, out, asked) if had else _configured(root, asked)
    trained_on = set(folds) & set(config.data.train_folds)
    if trained_on:
        raise EcgotError(f"folds: fold {min(trained_on)} is trained on, accepted are held-out folds")
    encoder(config.encoder.name, leads=len(config.data.leads))  # refused before anything is read
    train = load_folds(config, config.data.train_folds, cache_dir, progress)
    held_out = load_folds(config, folds, cache_dir, progress)
    check_patient_split(train.table, held_out.table)
    train = labelled(train, settings.groups)
    run = _open(out, config, settings)
    classifier = _train(run, settings, train, held_out, progress)
    evaluation = _evaluate(run, settings, classifier, held_out, tuple(folds), resamples, progress)
    write_text(out / "evaluation.json", json.dumps(evaluation.to_dict(), indent=2) + "\n")
    return evaluation


def _resumed(root: Path, out: Path, asked: Asked) -> tuple[Config, SupervisedConfig]:
    """What ``out`` is trained with.

    Raises:
        EcgotError: what is asked for now differs from it.
    """
    saved, trained = Run.open(out).config(), _saved_settings(out)
    config, settings = saved, trained
    data = replace(config.data, root=str(root.resolve()))
    config = replace(config, data=data, seed=config.seed if asked.seed is None else asked.seed)
    if asked.encoder_name is not None:
        config = replace(config, encoder=EncoderConfig(asked.encoder_name))
        settings = replace(settings, start="")
    if asked.start is not None:
        settings = replace(settings, start=str(asked.start.folder.resolve()))
    settings = replace(settings, group=asked.group or settings.group, epochs=asked.epochs or settings.epochs)
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


def _configured(root: Path, asked: Asked) -> tuple[Config, SupervisedConfig]:
    seed, place, start = asked.seed or 0, str(root.resolve()), asked.start
    if start is None:
        config = Config(
            seed=seed,
            data=DataConfig(root=place),
            encoder=EncoderConfig(asked.encoder_name or "resnet1d_wang"),
        )
        return config, benchmark_config(asked.group, asked.epochs)
    config = start.config()
    if not start.done("align"):
        raise EcgotError(f"from: stage align of {start.folder} is not trained, accepted is a run where it is")
    if config.text.train:
        raise EcgotError(
            f"from: {start.folder} trained its text encoder, accepted is a run with a frozen one"
        )
    return (
        replace(config, seed=seed, data=replace(config.data, root=place, reports_csv="")),
        fine_tuning_config(start, asked.group, asked.epochs),
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


def _train(
    run: Run,
    settings: SupervisedConfig,
    train: EcgDataset,
    held_out: EcgDataset,
    progress: Progress,
) -> Classifier:
    """The trained classifier, on its device; loaded where the run is done."""
    config = run.config()
    device = choose_device(config.device)
    targets = Targets.of(train, settings.groups)
    classifier = _build(run, settings, targets.matrix.shape[1]).to(device)
    if run.done(STAGE):
        run.load(STAGE, classifier)
        return classifier.eval()
    if not settings.start:
        mean, deviation = standard_scale(train)
        classifier.mean.fill_(mean)
        classifier.deviation.fill_(deviation)
    if device.type == "cpu":
        lay_out(classifier.encoder)
    crop, _ = _crops(settings, train)
    truth, counted = torch.from_numpy(targets.matrix).float(), torch.from_numpy(targets.counted)

    def epoch(number: int, step: Callable[[Tensor], None]) -> dict[str, float]:
        classifier.train()
        batches, total = _batches(len(train), settings, config.seed, number), 0.0
        for done, rows in enumerate(batches):
            signal = waveforms(train, rows, device)
            taken = random_crops(*signal, crop) if settings.crop_seconds else augmented(*signal)
            loss = class_loss(classifier(*taken), truth[rows].to(device), counted[rows].to(device))
            step(loss)
            total += loss.item() / len(batches)
            progress.bar(f"{STAGE}, epoch {number + 1}/{settings.epochs}", done + 1, len(batches))
        return {"loss": total}

    scratch = not settings.start
    train_epochs(
        run,
        STAGE,
        classifier,
        _parameter_groups(classifier, settings),
        epochs=settings.epochs,
        steps=len(_batches(len(train), settings, 0, 0)),
        weight_decay=settings.weight_decay,
        epoch=epoch,
        progress=progress,
        average=settings.average,
        validate=lambda kept: _validate(cast(Classifier, kept), settings, held_out, progress),
        schedule=one_cycle if scratch else warm_up_and_decay,
        clip=math.inf if scratch else 1.0,
    )
    return classifier.eval()


def _build(run: Run, settings: SupervisedConfig, classes: int) -> Classifier:
    """The classifier as training begins; of one that has begun, its shape alone."""
    config = run.config()
    torch.manual_seed(config.seed)
    if settings.start and not run.begun(STAGE):
        aligned = load_alignment(Run.open(Path(settings.start)), None).encoder
        return Classifier(aligned, classes, benchmark=False)
    fresh = encoder(config.encoder.name, leads=len(config.data.leads))
    classifier = Classifier(fresh, classes, benchmark=not settings.start)
    if not settings.start:
        initialise(classifier, config.encoder.name)
    return classifier


def _crops(settings: SupervisedConfig, dataset: EcgDataset) -> tuple[int, list[int]]:
    """Samples of a crop and where crops begin in scoring; a single one where whole records are taken."""
    samples = dataset.signals_uv.shape[2]
    if not settings.crop_seconds:
        return samples, [0]
    crop = min(samples, max(1, round(settings.crop_seconds * dataset.fs_hz)))
    return crop, crop_starts(samples, crop, max(1, round(settings.stride_seconds * dataset.fs_hz)))


def _batches(count: int, settings: SupervisedConfig, seed: int, number: int) -> list[Tensor]:
    """Of an epoch; a last one that is not full is left out, as the benchmark does, unless it is the only."""
    batches = epoch_order(count, settings.batch_size, seed, number)
    return [rows for rows in batches if len(rows) == settings.batch_size] or batches


def one_cycle(optimizer: Optimizer, total: int) -> OneCycleLR:
    """The benchmark's rates: up in three tenths of the steps, then down, the first moment's decay opposed."""
    return OneCycleLR(
        optimizer,
        [group["lr"] for group in optimizer.param_groups],
        total_steps=total,
        pct_start=0.3,
        div_factor=25.0,
        final_div_factor=1e4,
        base_momentum=0.85,
        max_momentum=0.95,
    )


def _parameter_groups(classifier: Classifier, settings: SupervisedConfig) -> list[dict[str, Any]]:
    """Encoder and head. The benchmark decays every parameter; in fine-tuning, matrices and kernels alone."""
    if settings.start:
        head = settings.learning_rate
        return parameter_groups(
            classifier, lambda name: head if name.startswith("head.") else settings.encoder_learning_rate
        )
    parts = (
        (classifier.encoder, settings.encoder_learning_rate),
        (classifier.head, settings.learning_rate),
    )
    return [{"params": list(part.parameters()), "lr": rate, "betas": (0.95, 0.99)} for part, rate in parts]


def _validate(
    classifier: Classifier, settings: SupervisedConfig, dataset: EcgDataset, progress: Progress
) -> dict[str, float]:
    """Macro AUROC by group; of the middle crop alone, as all crops would cost a quarter of the epoch."""
    crop, starts = _crops(settings, dataset)
    middle = [starts[len(starts) // 2]] if dataset.lengths.min() == dataset.signals_uv.shape[2] else [0]
    rankings = _rankings(classifier, settings, dataset, middle, crop, 1, progress)
    return {
        f"validation_auroc_{group}": ranking.macro
        for group, ranking in rankings.items()
        if not math.isnan(ranking.macro)
    }


def _rankings(
    classifier: Classifier,
    settings: SupervisedConfig,
    dataset: EcgDataset,
    starts: Sequence[int],
    crop: int,
    resamples: int,
    progress: Progress,
) -> dict[str, Ranking]:
    scores = class_probabilities(classifier, dataset, starts, crop, progress=progress)
    labels: list[Labels] = [dataset.labels(group) for group in settings.groups]
    parts = np.split(scores, np.cumsum([len(each.classes) for each in labels])[:-1], axis=1)
    patients = dataset.table.patient_id
    return {
        group: rank(part, each, patients, resamples=resamples)
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
    crop, starts = _crops(settings, dataset)
    return SupervisedEvaluation(
        encoder=config.encoder.name,
        start=settings.start or None,
        group=settings.group,
        seed=config.seed,
        epochs=settings.epochs,
        seconds=sum(line["seconds"] for line in run.metrics() if line["stage"] == STAGE),
        folds=folds,
        records=len(dataset),
        ranking=_rankings(classifier, settings, dataset, starts, crop, resamples, progress),
        settings={
            "data": config.data.root,
            "resamples": resamples,
            "supervised": dataclasses.asdict(settings),
            "config": dataclasses.asdict(config),
        },
    )
