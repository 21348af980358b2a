"""Stage 2: a language model learns to write reports from the frozen encoder's tokens."""

from collections.abc import Callable

import torch
from torch import Tensor

from ecgot.data.dataset import EcgDataset
from ecgot.models.alignment import AlignmentModel
from ecgot.models.reporter import Reporter, build_reporter, empty_reporter, save_language_model_shape
from ecgot.train.align import waveforms
from ecgot.train.run import Progress, Run, choose_device, epoch_order, train_epochs


@torch.no_grad()
def encode(
    model: AlignmentModel, dataset: EcgDataset, *, progress: Progress, task: str = "encoding"
) -> tuple[Tensor, Tensor]:
    """Encoder tokens [n, N, D] fp16 and masks [n, N] of every record, on the CPU.

    The encoder is frozen in stage 2, so it sees each record once, not once an epoch.
    """
    model.eval()
    device = next(model.parameters()).device
    tokens, masks = [], []
    for rows in torch.arange(len(dataset)).split(128):
        encoded = model.encoder(*waveforms(dataset, rows, device))
        tokens.append(encoded.tokens.half().cpu())
        masks.append(encoded.mask.cpu())
        progress.bar(task, int(rows[-1]) + 1, len(dataset))
    return torch.cat(tokens), torch.cat(masks)


def train_reporter(
    run: Run, model: AlignmentModel, train: EcgDataset, validation: EcgDataset, *, progress: Progress
) -> Reporter:
    """Train stage 2 into ``run`` and return the reporter in eval mode; ``model`` stays as it is.

    All records must have report text, see :func:`ecgot.train.align.with_reports`.
    """
    config = run.config()
    settings, device = config.report, choose_device(config.device)
    torch.manual_seed(config.seed)
    reporter = build_reporter(
        settings.language_model,
        int(model.encoder.width),  # type: ignore[arg-type]
        reports=train.reports,
        max_tokens=settings.max_tokens,
        hidden_size=settings.hidden_size,
        layers=settings.layers,
    ).to(device)
    save_language_model_shape(reporter, run.folder / "language_model")
    lengths = torch.tensor([len(report) for report in train.reports])
    tokens, mask = encode(model, train, progress=progress)
    validation_tokens, validation_mask = encode(model, validation, progress=progress)

    def epoch(number: int, step: Callable[[Tensor], None]) -> dict[str, float]:
        reporter.train()
        total = 0.0
        batches = epoch_order(len(train), settings.batch_size, config.seed, number, lengths)
        for done, rows in enumerate(batches):
            reports = [train.reports[row] for row in rows.tolist()]
            loss = reporter(tokens[rows].to(device).float(), mask[rows].to(device), reports)
            step(loss)
            total += loss.item() / len(batches)
            progress.bar(f"report, epoch {number + 1}/{settings.epochs}", done + 1, len(batches))
        return {
            "loss": total,
            "validation_loss": _mean_loss(reporter, validation_tokens, validation_mask, validation.reports),
        }

    decays = [p for p in reporter.parameters() if p.dim() > 1]
    others = [p for p in reporter.parameters() if p.dim() <= 1]
    train_epochs(
        run,
        "report",
        reporter,
        [
            {"params": decays, "lr": settings.learning_rate},
            {"params": others, "lr": settings.learning_rate, "weight_decay": 0.0},
        ],
        epochs=settings.epochs,
        steps=len(epoch_order(len(train), settings.batch_size, 0, 0)),
        weight_decay=settings.weight_decay,
        epoch=epoch,
        progress=progress,
    )
    return reporter.eval()


def load_reporter(run: Run, ecg_width: int) -> Reporter:
    """The stage-2 model of a run, in eval mode."""
    config = run.config()
    reporter = empty_reporter(run.folder / "language_model", ecg_width, max_tokens=config.report.max_tokens)
    run.load("report", reporter)
    return reporter.to(choose_device(config.device)).eval()


@torch.no_grad()
def _mean_loss(reporter: Reporter, tokens: Tensor, mask: Tensor, reports: tuple[str, ...]) -> float:
    reporter.eval()
    device = next(reporter.parameters()).device
    total = 0.0
    for rows in torch.arange(len(reports)).split(64):
        batch = [reports[row] for row in rows.tolist()]
        total += len(rows) * reporter(tokens[rows].to(device).float(), mask[rows].to(device), batch).item()
    return total / len(reports)
