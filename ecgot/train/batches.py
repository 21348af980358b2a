"""Training batches: records with reports, shuffled and augmented."""

import torch
from torch import Tensor

from ecgot.data.dataset import EcgDataset
from ecgot.errors import EcgotError

POOLED_BATCHES = 20  # batches whose records are sorted by length together


def with_reports(dataset: EcgDataset) -> EcgDataset:
    """The records with usable report text; training skips the others.

    Raises:
        EcgotError: fewer than two have one.
    """
    rows = [row for row, report in enumerate(dataset.reports) if report]
    if len(rows) < 2:
        raise EcgotError(
            f"data: expected 2 or more records with usable report text, got {len(rows)} of {len(dataset)}; "
            "--reports names a CSV ecg_id,report"
        )
    return dataset.select(rows)


CROPPED, GAIN, NOISE_MV, SILENT_LEADS = 0.9, 0.1, 0.03, 0.08


def augmented(waveform: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Augment a batch as if the same hearts had been recorded again; draws from torch's generator.

    The whole batch is cropped to the same random 90 %. Each record is scaled by up to 10 % and gets white
    noise with a standard deviation of up to 0.03 mV. Each lead is silenced with a probability of 8 %.

    Args:
        waveform: [B, L, T] in mV.
        lengths: [B] in samples, or None if all T are valid.
    """
    batch, leads, samples = waveform.shape
    kept = max(1, round(CROPPED * samples))
    shortest = samples if lengths is None else max(1, int(lengths.min()))  # no record is left empty
    start = int(torch.randint(min(samples - kept + 1, shortest), ()))
    if lengths is not None:
        lengths = (lengths - start).clamp(1, kept)
    device, dtype = waveform.device, waveform.dtype
    gain = 1 + GAIN * (2 * torch.rand(batch, 1, 1, dtype=dtype) - 1)
    heard = torch.rand(batch, leads, 1) >= SILENT_LEADS
    noise = NOISE_MV * torch.rand(batch, 1, 1, dtype=dtype).to(device)
    waveform = waveform[:, :, start : start + kept]
    waveform = waveform * gain.to(device) + noise * torch.randn_like(waveform)
    return waveform * heard.to(device), lengths


def epoch_seed(seed: int, epoch: int) -> int:
    """The seed of everything random in an epoch, so that a resumed run draws the same numbers."""
    return seed * 100_003 + epoch


def epoch_order(
    count: int, batch_size: int, seed: int, epoch: int, lengths: Tensor | None = None
) -> list[Tensor]:
    """Shuffled batches of row numbers. Depends only on seed and epoch, so that a resumed run repeats it.

    Args:
        lengths: [count], length of each row's text: batches then hold texts of similar length, with less
            padding.

    A batch of one record is dropped: neither batch norm nor a contrast can use it.
    """
    generator = torch.Generator().manual_seed(epoch_seed(seed, epoch))
    rows = torch.randperm(count, generator=generator)
    if lengths is not None:
        # Sorted only within pools of a few batches, so that a batch is still a random draw among its lengths.
        pools = rows.split(POOLED_BATCHES * batch_size)
        rows = torch.cat([pool[lengths[pool].argsort(stable=True)] for pool in pools])
    batches = [batch for batch in rows.split(batch_size) if len(batch) > 1]
    if lengths is None:
        return batches
    return [batches[number] for number in torch.randperm(len(batches), generator=generator).tolist()]
