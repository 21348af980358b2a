"""A run's records: loading folds, batching waveforms, and encoding every record once."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ecgot.data.dataset import EcgDataset, load_dataset
from ecgot.models.alignment import AlignmentModel
from ecgot.models.encoders import CapturedInference, fuse_norms
from ecgot.runs.config import Config
from ecgot.runs.progress import Progress

BATCH = 128  # records or texts per batch, except in training


def waveforms(dataset: EcgDataset, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Waveforms [b, L, T] in mV of ``rows`` [b], and their lengths [b]; None if all are T."""
    index = rows.numpy()
    signal = torch.from_numpy(dataset.waveforms_mv(index)).to(device)
    lengths = torch.from_numpy(dataset.lengths[index])
    return signal, None if bool((lengths == signal.shape[2]).all()) else lengths.to(device)


@torch.no_grad()
def encode(
    model: AlignmentModel,
    dataset: EcgDataset,
    *,
    progress: Progress,
    task: str = "encoding",
    cuda_graph: bool = False,
) -> tuple[Tensor, Tensor]:
    """Encoder tokens [n, N, D] fp16 and masks [n, N] of every record, on the CPU.

    A frozen encoder then processes each record once instead of once per epoch.
    """
    model.eval()
    device = next(model.parameters()).device
    encoder = (
        CapturedInference(model.encoder)
        if cuda_graph and device.type == "cuda"
        else fuse_norms(model.encoder)
    )
    tokens, masks = [], []
    for rows in torch.arange(len(dataset)).split(BATCH):
        encoded = encoder(*waveforms(dataset, rows, device))
        tokens.append(encoded.tokens.half().cpu())
        masks.append(encoded.mask.cpu())
        progress.bar(task, int(rows[-1]) + 1, len(dataset))
    return torch.cat(tokens), torch.cat(masks)


def load_folds(
    config: Config,
    folds: Iterable[int],
    cache_dir: Path,
    progress: Progress,
    *,
    root: Path | None = None,
    reports_csv: str | None = None,
) -> EcgDataset:
    """Load folds of the configured data set, or of another folder, and note what was skipped."""
    settings, folds = config.data, tuple(folds)
    dataset = load_dataset(
        root or settings.root,
        reports_csv=settings.reports_csv if reports_csv is None else reports_csv,
        folds=folds,
        fs_hz=settings.fs_hz,
        seconds=settings.seconds,
        leads=settings.leads,
        highpass_hz=settings.highpass_hz,
        max_bad_share=settings.max_bad_share,
        cache_dir=cache_dir,
        progress=lambda done, total: progress.bar(f"records, {len(folds)} fold(s)", done, total),
    )
    for skipped in dataset.skipped:
        progress.note(f"skipped: {skipped.reason}")
    if "patient_id" in dataset.table.lacking:
        progress.note("data: no column patient_id, so every record counts as another patient")
    if "strat_fold" in dataset.table.lacking:
        progress.note(
            "data: no column strat_fold, so patients are dealt to folds 1 to 10 by a hash of patient_id"
        )
    if dataset.flat:
        progress.note(f"data: {len(dataset.flat)} records have a flat lead, which they keep")
    silent = sum(not report for report in dataset.reports)
    progress.note(
        f"data: folds {', '.join(map(str, folds))}: {len(dataset)} records, {len(dataset.skipped)} skipped, "
        f"{len(dataset.repaired)} with repaired gaps, {silent} without usable report text"
    )
    return dataset
