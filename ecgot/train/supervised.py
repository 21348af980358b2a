"""Classifiers trained on the labels: the baselines for zero-shot scores.

Training from scratch follows the PTB-XL benchmark (Strodthoff et al. 2021, helme/ecg_ptbxl_benchmarking).
Fine-tuning an aligned encoder takes whole records and all label groups at once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from ecgot.choices import (
    ALL,
    FINE_TUNED_EPOCHS,
    FINE_TUNED_GROUP,
    GROUPS,
    SUPERVISED_EPOCHS,
    SUPERVISED_GROUP,
)
from ecgot.data.dataset import EcgDataset
from ecgot.errors import EcgotError
from ecgot.models.encoders import Encoder, encoder, fuse_norms, masked_mean, to_channels_last
from ecgot.runs.checkpoints import load_alignment
from ecgot.runs.device import choose_device
from ecgot.runs.progress import Progress
from ecgot.runs.records import BATCH, waveforms
from ecgot.runs.run import Run
from ecgot.train.batches import augmented, epoch_order
from ecgot.train.loop import Schedule, parameter_groups, train_epochs, warm_up_and_decay

STAGE = "supervised"
BENCHMARK_ENCODERS = ("resnet1d_wang", "xresnet1d101", "inception1d")


@dataclass(frozen=True)
class SupervisedConfig:
    """How a classifier is trained; the defaults are the PTB-XL benchmark's.

    Attributes:
        start: folder of the run whose aligned encoder is fine-tuned; "" trains from scratch.
        group: the label group, or "all".
        crop_seconds: length of the crops in training and scoring; 0 takes whole records.
        stride_seconds: distance between crops in scoring.
        learning_rate, encoder_learning_rate: peak rates of the head and of the encoder.
        average: decay of an exponential moving average of the weights; 0 keeps the last weights.
    """

    start: str = ""
    group: str = SUPERVISED_GROUP
    epochs: int = SUPERVISED_EPOCHS
    batch_size: int = 128
    learning_rate: float = 1e-2
    encoder_learning_rate: float = 1e-2
    weight_decay: float = 1e-2
    average: float = 0.0
    crop_seconds: float = 2.5
    stride_seconds: float = 1.25

    @property
    def groups(self) -> tuple[str, ...]:
        """The label groups that the classifier learns."""
        return GROUPS if self.group == ALL else (self.group,)


def benchmark_config(group: str | None = None, epochs: int | None = None) -> SupervisedConfig:
    """Settings for training from scratch; None means the default."""
    return SupervisedConfig(
        group=group or SUPERVISED_GROUP, epochs=SUPERVISED_EPOCHS if epochs is None else epochs
    )


def fine_tuning_config(start: Run, group: str | None = None, epochs: int | None = None) -> SupervisedConfig:
    """Settings for fine-tuning the aligned encoder of ``start``; None means the default."""
    return SupervisedConfig(
        start=str(start.folder.resolve()),
        group=group or FINE_TUNED_GROUP,
        epochs=FINE_TUNED_EPOCHS if epochs is None else epochs,
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
    """The labels of several groups, side by side.

    Attributes:
        matrix: [n, C] bool.
        counted: [n, C] bool; True if the record has a label in the column's group.
    """

    matrix: np.ndarray
    counted: np.ndarray

    @classmethod
    def of(cls, dataset: EcgDataset, groups: Sequence[str]) -> "Targets":
        """The labels of ``groups``, in this order."""
        matrices = [dataset.labels(group).matrix for group in groups]
        labelled = [np.broadcast_to(matrix.any(1, keepdims=True), matrix.shape) for matrix in matrices]
        return cls(np.concatenate(matrices, axis=1), np.concatenate(labelled, axis=1))


def labelled(dataset: EcgDataset, groups: Sequence[str]) -> EcgDataset:
    """The records with a label in one of the groups; training skips the others.

    Raises:
        EcgotError: fewer than two have.
    """
    rows = np.flatnonzero(Targets.of(dataset, groups).matrix.any(1))
    if len(rows) < 2:
        raise EcgotError(f"data: expected 2 or more records labelled in {', '.join(groups)}, got {len(rows)}")
    return dataset.select(rows)


def class_loss(logits: Tensor, truth: Tensor, counted: Tensor) -> Tensor:
    """Mean binary cross-entropy over the counted entries; logits, truth (0 or 1), counted: [b, C]."""
    losses = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return losses.where(counted, 0.0).sum() / counted.sum().clamp_min(1)


class Classifier(nn.Module):
    """An encoder and a head; waveforms are standardised by the mean and deviation of the training data.

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
        """Logits [B, C] of waveform [B, L, T] in mV; lengths [B] if some records are shorter."""
        return self.classify(self.encoder, waveform, lengths)

    def classify(self, encoder: nn.Module, waveform: Tensor, lengths: Tensor | None) -> Tensor:
        """The same with another form of the encoder, such as a fused one."""
        encoded = encoder((waveform - self.mean) / self.deviation, lengths)
        if not self.benchmark:
            return self.head(masked_mean(encoded.tokens, encoded.mask))
        highest = encoded.tokens.masked_fill(~encoded.mask[:, :, None], -math.inf).max(1).values
        return self.head(torch.cat([encoded.pooled, highest], 1))


def initialise(classifier: Classifier, encoder_name: str) -> None:
    """Initialise as the benchmark does: Kaiming normal over fan-in for its encoders and its head."""
    named = encoder_name in BENCHMARK_ENCODERS  # others keep their own initialisation
    for module in classifier.modules() if named else classifier.head.modules():
        if isinstance(module, nn.Conv1d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm1d):  # even those that start at 0 elsewhere
            nn.init.ones_(module.weight)


def standard_scale(dataset: EcgDataset) -> tuple[float, float]:
    """Mean and standard deviation in mV over all samples of all records and leads."""
    count, total, squares = 0, 0.0, 0.0
    for rows in np.array_split(np.arange(len(dataset)), max(1, len(dataset) // BATCH)):
        signal = dataset.waveforms_mv(rows)  # 0 past a record's end, which adds nothing to the sums
        count += int(dataset.lengths[rows].sum()) * signal.shape[1]
        total += float(signal.sum(dtype=np.float64))
        squares += float(np.square(signal, dtype=np.float64).sum())
    mean = total / count
    return mean, max(squares / count - mean**2, 1e-12) ** 0.5


def random_crops(waveform: Tensor, lengths: Tensor | None, samples: int) -> tuple[Tensor, Tensor | None]:
    """A random crop [B, L, samples] of each record of [B, L, T], within its length, by torch's generator."""
    batch, _, width = waveform.shape
    last = torch.full((batch,), width - samples)
    if lengths is not None:
        last = (lengths.cpu() - samples).clamp_min(0)
    start = (torch.rand(batch) * (last + 1)).long().clamp(max=last)
    pieces = [record[:, at : at + samples] for record, at in zip(waveform, start.tolist(), strict=True)]
    return torch.stack(pieces), None if lengths is None else lengths.clamp(max=samples)


def crop_starts(samples: int, crop: int, stride: int) -> list[int]:
    """Start of each crop of a record of ``samples``: every ``stride``, while a whole crop fits."""
    return list(range(0, samples - crop + 1, stride)) or [0]


@torch.no_grad()
def class_probabilities(
    classifier: Classifier, dataset: EcgDataset, starts: Sequence[int], crop: int, *, progress: Progress
) -> np.ndarray:
    """Probabilities [n, C] of every record: for each class the maximum over crops.

    Args:
        starts: where crops of ``crop`` samples start. Crops that reach past a record's end are ignored,
            except the first, which is cut to the record.
        crop: samples in a crop.
    """
    classifier.eval()
    device = next(classifier.parameters()).device
    encode = fuse_norms(classifier.encoder)
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


def train_classifier(
    run: Run,
    settings: SupervisedConfig,
    train: EcgDataset,
    *,
    validate: Callable[[Classifier], dict[str, float]],
    progress: Progress,
) -> Classifier:
    """Train a classifier and return it on its device, in eval mode; if the run is done, load it instead.

    Args:
        validate: returns metrics of the weights after an epoch; nothing is selected by them.
    """
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
        to_channels_last(classifier.encoder)
    crop, _ = scoring_crops(settings, train)
    truth, counted = torch.from_numpy(targets.matrix).float(), torch.from_numpy(targets.counted)

    def epoch(number: int, step: Callable[[Tensor], None]) -> dict[str, float]:
        classifier.train()
        batches, total = _batches(len(train), settings, config.seed, number), 0.0
        for done, rows in enumerate(batches):
            signal = waveforms(train, rows, device)
            taken = random_crops(*signal, crop) if settings.crop_seconds else augmented(*signal, config.data)
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
        Schedule(
            epochs=settings.epochs,
            steps=len(_batches(len(train), settings, 0, 0)),
            weight_decay=settings.weight_decay,
            average=settings.average,
            rates=one_cycle if scratch else warm_up_and_decay,
            clip=math.inf if scratch else 1.0,
        ),
        epoch=epoch,
        validate=lambda kept: validate(cast(Classifier, kept)),
        progress=progress,
    )
    return classifier.eval()


def _build(run: Run, settings: SupervisedConfig, classes: int) -> Classifier:
    """The classifier at the start of training. When resuming, the saved weights are loaded later."""
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


def scoring_crops(settings: SupervisedConfig, dataset: EcgDataset) -> tuple[int, list[int]]:
    """Samples in a crop and the starts of crops in scoring; one crop if whole records are used."""
    samples = dataset.signals_uv.shape[2]
    if not settings.crop_seconds:
        return samples, [0]
    crop = min(samples, max(1, round(settings.crop_seconds * dataset.fs_hz)))
    return crop, crop_starts(samples, crop, max(1, round(settings.stride_seconds * dataset.fs_hz)))


def _batches(count: int, settings: SupervisedConfig, seed: int, number: int) -> list[Tensor]:
    """Batches of an epoch; like the benchmark, drops an incomplete last batch unless it is the only one."""
    batches = epoch_order(count, settings.batch_size, seed, number)
    return [rows for rows in batches if len(rows) == settings.batch_size] or batches


def one_cycle(optimizer: Optimizer, total: int) -> OneCycleLR:
    """The benchmark's one-cycle schedule: up for 30 % of the steps, then down; beta1 moves the other way."""
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
    """Encoder and head. The benchmark decays every parameter, fine-tuning only matrices and kernels."""
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
