"""Stage 2: train a language model to write reports from the frozen encoder's tokens."""

import functools
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ecgot.choices import SCRATCH
from ecgot.data.dataset import EcgDataset
from ecgot.models.alignment import AlignmentModel
from ecgot.models.language_models import empty_reporter, save_language_model_shape
from ecgot.models.reporter import Reporter
from ecgot.runs.checkpoints import new_reporter
from ecgot.runs.config import ReportConfig
from ecgot.runs.device import choose_device
from ecgot.runs.progress import Progress
from ecgot.runs.records import encode
from ecgot.runs.run import Run
from ecgot.train.batches import epoch_order
from ecgot.train.loop import Schedule, parameter_groups, train_epochs

RECORDER_MIN_COUNT = 20  # training reports that a recorder needs to get an embedding
RECORDER_DROPOUT = 0.2  # share of training reports with a hidden recorder, which trains the unknown one


def train_reporter(
    run: Run, model: AlignmentModel, train: EcgDataset, validation: EcgDataset, *, progress: Progress
) -> Reporter:
    """Train stage 2 into ``run`` and return the reporter in eval mode; ``model`` is not changed.

    All records must have report text, see :func:`ecgot.train.batches.with_reports`.
    """
    config = run.config()
    settings, device = config.report, choose_device(config.device)
    torch.manual_seed(config.seed)
    if not run.begun("report"):  # resumed weights belong to the recorders already saved
        run.save_recorders(_recorders(run, train.table.recorders))
    if settings.by_recorder and any(train.table.recorders):
        names = ", ".join(run.recorders) or "none"
        before = ", or known before" if config.start else ""
        progress.note(f"report: recorders with at least {RECORDER_MIN_COUNT} reports{before}: {names}")
    reporter = _first_reporter(run, model.ecg_width, train.reports).to(device)
    if not settings.lora_rank:
        save_language_model_shape(reporter, run.folder / "language_model")
    lengths = torch.tensor([len(report) for report in train.reports])
    tokens, mask = encode(model, train, progress=progress, cuda_graph=config.cuda_graph)
    validation_tokens, validation_mask = encode(
        model, validation, progress=progress, cuda_graph=config.cuda_graph
    )

    def epoch(number: int, step: Callable[[Tensor], None]) -> dict[str, float]:
        reporter.train()
        total = 0.0
        batches = epoch_order(len(train), settings.batch_size, config.seed, number, lengths)
        for done, rows in enumerate(batches):
            reports = [train.reports[row] for row in rows.tolist()]
            hidden = torch.rand(len(rows)) < RECORDER_DROPOUT
            names = [
                "" if hide else train.table.recorders[row]
                for row, hide in zip(rows.tolist(), hidden, strict=True)
            ]
            loss = reporter(tokens[rows].to(device).float(), mask[rows].to(device), reports, recorders=names)
            step(loss)
            total += loss.item() / len(batches)
            progress.bar(f"report, epoch {number + 1}/{settings.epochs}", done + 1, len(batches))
        return {
            "loss": total,
            "validation_loss": _mean_loss(reporter, validation_tokens, validation_mask, validation),
        }

    train_epochs(
        run,
        "report",
        reporter,
        parameter_groups(reporter, functools.partial(_learning_rate, settings)),
        Schedule(
            epochs=settings.epochs,
            steps=len(epoch_order(len(train), settings.batch_size, 0, 0)),
            weight_decay=settings.weight_decay,
        ),
        epoch=epoch,
        progress=progress,
    )
    return reporter.eval()


def _first_reporter(run: Run, ecg_width: int, reports: tuple[str, ...]) -> Reporter:
    """The reporter at the start of training, or one to load its state into."""
    config = run.config()
    if run.begun("report"):
        return _reporter_of(run, config.report, ecg_width, run.recorders)
    start = Run.named(config.start) if config.start else None
    if start is None or not start.done("report"):
        return new_reporter(config.report, ecg_width, reports, run.recorders)
    reporter = _reporter_of(start, config.report, ecg_width, start.recorders)
    start.load("report", reporter)
    _rename_recorders(reporter, run.recorders)
    return reporter


def _reporter_of(run: Run, settings: ReportConfig, ecg_width: int, recorders: tuple[str, ...]) -> Reporter:
    """A reporter of the shape that a run's stage 2 has, with that run's tokenizer."""
    if settings.lora_rank:
        return new_reporter(settings, ecg_width, (), recorders)
    folder = run.folder / "language_model"
    return empty_reporter(folder, ecg_width, max_tokens=settings.max_tokens, recorders=recorders)


@torch.no_grad()
def _rename_recorders(reporter: Reporter, recorders: tuple[str, ...]) -> None:
    """Let a reporter know ``recorders``: old ones keep their embedding, new ones begin as the unknown one."""
    known, rows = ("", *reporter.recorders), ("", *recorders)
    old, reporter.recorders, reporter.recorder_embedding = reporter.recorder_embedding, recorders, None
    if not recorders:
        return
    width = reporter.language_model.get_input_embeddings().embedding_dim
    made = nn.Embedding(len(rows), width)
    nn.init.normal_(made.weight, std=0.02)
    if old is not None:
        for row, name in enumerate(rows):
            made.weight[row] = old.weight[known.index(name) if name in known else 0]
    reporter.recorder_embedding = made


def _recorders(run: Run, recorders: Sequence[str]) -> tuple[str, ...]:
    """The recorders that stage 2 conditions on: those of the run that it starts from, and frequent ones."""
    config = run.config()
    if not config.report.by_recorder:
        return ()
    inherited = Run.named(config.start).recorders if config.start else ()
    return (*inherited, *(name for name in _known_recorders(recorders) if name not in inherited))


def _known_recorders(recorders: Sequence[str]) -> tuple[str, ...]:
    """The names that enough records have, sorted."""
    counts = Counter(name for name in recorders if name)
    return tuple(sorted(name for name, count in counts.items() if count >= RECORDER_MIN_COUNT))


def _learning_rate(settings: ReportConfig, name: str) -> float:
    """Learning rate of a parameter; a pretrained language model or its adapters have their own."""
    if settings.language_model == SCRATCH or not name.startswith("language_model."):
        return settings.learning_rate
    return settings.lora_learning_rate if settings.lora_rank else settings.pretrained_learning_rate


@torch.no_grad()
def _mean_loss(reporter: Reporter, tokens: Tensor, mask: Tensor, dataset: EcgDataset) -> float:
    """Mean loss over all records, with their recorders given."""
    reporter.eval()
    device = next(reporter.parameters()).device
    total = 0.0
    for rows in torch.arange(len(dataset)).split(64):
        batch = [dataset.reports[row] for row in rows.tolist()]
        names = [dataset.table.recorders[row] for row in rows.tolist()]
        loss = reporter(tokens[rows].to(device).float(), mask[rows].to(device), batch, recorders=names)
        total += len(rows) * loss.item()
    return total / len(dataset)
