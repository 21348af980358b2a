"""Classifiers trained on the labels: the baselines for zero-shot scores.

Training from scratch follows the PTB-XL benchmark (Strodthoff et al. 2021, helme/ecg_ptbxl_benchmarking).
Fine-tuning an aligned encoder takes whole records and all label groups at once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from ecgot.choices import (
    FINE_TUNED_EPOCHS,
    FINE_TUNED_GROUP,
    OWN_LABELS,
    SUPERVISED_EPOCHS,
    SUPERVISED_GROUP,
)
from ecgot.data.dataset import EcgDataset
from ecgot.data.yes_no import UNKNOWN, YesNoLabels
from ecgot.errors import EcgotError
from ecgot.models.classifier import Classifier
from ecgot.models.encoders import to_channels_last
from ecgot.runs.checkpoints import build_classifier, load_alignment
from ecgot.runs.device import choose_device
from ecgot.runs.progress import Progress
from ecgot.runs.records import BATCH, waveforms
from ecgot.runs.run import Run
from ecgot.runs.supervised import STAGE, SupervisedConfig
from ecgot.train.batches import augmented, epoch_order
from ecgot.train.loop import Schedule, parameter_groups, train_epochs, warm_up_and_decay

FEW_STEPS, FEW_BATCH = 400, 16  # optimizer steps that fine-tuning takes at least, and its smallest batch
BENCHMARK_ENCODERS = ("resnet1d_wang", "xresnet1d101", "inception1d")


def benchmark_config(group: str | None = None, epochs: int | None = None) -> SupervisedConfig:
    """Settings for training from scratch; None means the default."""
    return SupervisedConfig(
        group=group or SUPERVISED_GROUP, epochs=SUPERVISED_EPOCHS if epochs is None else epochs
    )


def fine_tuning_config(start: Run, group: str | None = None, epochs: int | None = None) -> SupervisedConfig:
    """Settings for fine-tuning the aligned encoder of ``start``; None means the default."""
    return SupervisedConfig(
        start=start.name,
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


def for_few(settings: SupervisedConfig, records: int) -> SupervisedConfig:
    """The settings with smaller batches and more epochs, where ``records`` are too few for the head to learn.

    The head begins with random weights: it needs some hundred steps, however few records there are.
    """
    batch_size = min(settings.batch_size, max(FEW_BATCH, records // FEW_BATCH))
    epochs = math.ceil(FEW_STEPS / max(1, records // batch_size))
    if epochs <= settings.epochs:
        return settings
    return replace(settings, batch_size=batch_size, epochs=epochs)


@dataclass(frozen=True)
class Targets:
    """The labels of several groups, side by side.

    Attributes:
        classes: group -> its classes, in the order of the columns.
        matrix: [n, C] bool.
        counted: [n, C] bool: what is learned and measured. Of a label group all columns of a record that has
            a label in it; of one's own labels every yes and no.
    """

    classes: dict[str, tuple[str, ...]]
    matrix: np.ndarray
    counted: np.ndarray

    @classmethod
    def of(cls, dataset: EcgDataset, groups: Sequence[str]) -> "Targets":
        """The labels of ``groups``, in this order."""
        labels = {group: dataset.labels(group) for group in groups}
        matrices = [each.matrix for each in labels.values()]
        counted = [np.broadcast_to(matrix.any(1, keepdims=True), matrix.shape) for matrix in matrices]
        return cls(
            {group: each.classes for group, each in labels.items()},
            np.concatenate(matrices, axis=1),
            np.concatenate(counted, axis=1),
        )

    @classmethod
    def of_own(cls, dataset: EcgDataset, own: YesNoLabels) -> "Targets":
        """One's own labels."""
        answers = own.of(dataset.table)
        return cls({OWN_LABELS: own.classes}, answers == 1, answers != UNKNOWN)

    def select(self, rows: np.ndarray) -> "Targets":
        """The given records."""
        return replace(self, matrix=self.matrix[rows], counted=self.counted[rows])

    def by_group(self, columns: np.ndarray) -> dict[str, np.ndarray]:
        """group -> [n, its classes], of something [n, C]."""
        ends = np.cumsum([len(names) for names in self.classes.values()])[:-1]
        return dict(zip(self.classes, np.split(columns, ends, axis=1), strict=True))


def labelled(dataset: EcgDataset, targets: Targets) -> tuple[EcgDataset, Targets]:
    """The records with a label that counts; training skips the others.

    Raises:
        EcgotError: fewer than two have one, or one's own labels are all yes, or all no.
    """
    rows = np.flatnonzero(targets.counted.any(1))
    if len(rows) < 2:
        named = ", ".join(targets.classes)
        raise EcgotError(f"data: expected 2 or more training records labelled in {named}, got {len(rows)}")
    for column, name in enumerate(targets.classes.get(OWN_LABELS, ())):
        known = targets.matrix[targets.counted[:, column], column]
        if known.all() or not known.any():
            raise EcgotError(
                f"labels: expected a 1 and a 0 of every label in the training folds, got {int(known.sum())} "
                f"times 1 and {int((~known).sum())} times 0 of {name!r}"
            )
    return dataset.select(rows), targets.select(rows)


def class_loss(logits: Tensor, truth: Tensor, counted: Tensor) -> Tensor:
    """Mean binary cross-entropy over the counted entries; logits, truth (0 or 1), counted: [b, C]."""
    losses = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return losses.where(counted, 0.0).sum() / counted.sum().clamp_min(1)


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


@torch.no_grad()
def class_probabilities(
    classifier: Classifier, dataset: EcgDataset, starts: Sequence[int], crop: int, *, progress: Progress
) -> np.ndarray:
    """Probabilities [n, C] of every record: for each class the maximum over crops.

    Args:
        starts, crop: see :meth:`ecgot.models.classifier.Classifier.largest_logits`.
    """
    device = next(classifier.parameters()).device
    fast, found = classifier.fused(), []
    for rows in torch.arange(len(dataset)).split(BATCH):
        logits = fast.largest_logits(*waveforms(dataset, rows, device), starts, crop)
        found.append(torch.sigmoid(logits).cpu())
        progress.bar("supervised, scores", int(rows[-1]) + 1, len(dataset))
    return torch.cat(found).numpy()


def train_classifier(
    run: Run,
    settings: SupervisedConfig,
    train: EcgDataset,
    targets: Targets,
    *,
    validate: Callable[[Classifier], dict[str, float]],
    progress: Progress,
) -> Classifier:
    """Train a classifier and return it on its device, in eval mode; if the run is done, load it instead.

    Args:
        train, targets: the training records and their labels, see :func:`labelled`.
        validate: returns metrics of the weights after an epoch; nothing is selected by them.
    """
    config = run.config()
    device = choose_device(config.device)
    classifier = _build(run, settings).to(device)
    if run.done(STAGE):
        run.load(STAGE, classifier)
        return classifier.eval()
    if not settings.start:
        mean, deviation = standard_scale(train)
        classifier.mean.fill_(mean)
        classifier.deviation.fill_(deviation)
    if device.type == "cpu":
        to_channels_last(classifier.encoder)
    crop, _ = classifier.crops(train.signals_uv.shape[2])
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


def _build(run: Run, settings: SupervisedConfig) -> Classifier:
    """The classifier at the start of training. When resuming, the saved weights are loaded later."""
    config = run.config()
    torch.manual_seed(config.seed)
    if settings.start and not run.begun(STAGE):
        aligned = load_alignment(Run.named(settings.start), None).encoder
        return build_classifier(config, settings, aligned)
    classifier = build_classifier(config, settings)
    if not settings.start:
        initialise(classifier, config.encoder.name)
    return classifier


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
