"""Training batches: records with reports, shuffled and augmented."""

import functools
import math

import torch
from torch import Tensor

from ecgot.data.baseline import ORDER
from ecgot.data.dataset import EcgDataset
from ecgot.data.leads import INDEPENDENT_LEADS, STANDARD_LEADS, completion
from ecgot.errors import EcgotError
from ecgot.runs.config import DataConfig

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
OFFSET_MV, WANDER_MV, WANDER_HZ, WANDERING = 0.05, 1.0, (0.05, 0.7), 0.5
FEWER_LEADS, NO_CHEST_LEADS, LIMBS = 0.3, 0.5, (0b11, 0b11, 0b10, 0b01)


def augmented(
    waveform: Tensor, lengths: Tensor | None, data: DataConfig | None = None
) -> tuple[Tensor, Tensor | None]:
    """Augment a batch as if the same hearts had been recorded again; draws from torch's generator.

    The whole batch is cropped to the same random 90 %. Each record is scaled by up to 10 % and gets white
    noise with a standard deviation of up to 0.03 mV. Each lead is silenced with a probability of 8 %. Half of
    the records get a baseline wander, of which the part is added that a high-pass filter leaves, and each
    lead an offset. Of 3 records in 10 only some leads are kept, from which the others are estimated.

    Args:
        waveform: [B, L, T] in mV.
        lengths: [B] in samples, or None if all T are valid.
        data: how the records were read; the defaults if omitted.
    """
    data = data or DataConfig()
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
    waveform = waveform + _wander(batch, leads, kept, data).to(device)
    if data.leads == STANDARD_LEADS:
        waveform = _with_fewer_leads(waveform)
    return waveform * heard.to(device), lengths


def _wander(batch: int, leads: int, samples: int, data: DataConfig) -> Tensor:
    """[batch, leads, samples]: offsets, and in half of the records a sine that all leads share in part."""
    low, high = WANDER_HZ
    frequency = low * (high / low) ** torch.rand(batch, 1, 1)
    left = 1 / (1 + (data.highpass_hz / frequency) ** (2 * ORDER))
    most = WANDER_MV * torch.rand(batch, 1, 1) * (torch.rand(batch, 1, 1) < WANDERING)
    amplitude = most * left * torch.rand(batch, leads, 1)
    phase = torch.rand(batch, leads, 1)
    time_s = torch.arange(samples) / data.fs_hz
    sine = torch.sin(2 * math.pi * (frequency * time_s + phase))
    return amplitude * sine + OFFSET_MV * torch.randn(batch, leads, 1)


def _with_fewer_leads(waveform: Tensor) -> Tensor:
    """Three records in ten with leads that were estimated from fewer, as a record with fewer is read."""
    batch = len(waveform)
    chest = torch.randint(2**6, (batch,)) * (torch.rand(batch) >= NO_CHEST_LEADS)
    which = torch.tensor(LIMBS)[torch.randint(len(LIMBS), (batch,))] + 4 * chest
    fewer = torch.rand(batch) < FEWER_LEADS
    if not fewer.any():
        return waveform
    matrices = _completions()[which[fewer]].to(waveform)
    waveform = waveform.clone()
    waveform[fewer.to(waveform.device)] = matrices @ waveform[fewer.to(waveform.device)]
    return waveform


@functools.cache
def _completions() -> Tensor:
    """[256, 12, 12]: the standard leads from those independent leads whose bits are set."""
    found = torch.zeros(2 ** len(INDEPENDENT_LEADS), 12, 12)
    for bits in range(1, len(found)):
        present = tuple(lead for place, lead in enumerate(INDEPENDENT_LEADS) if bits >> place & 1)
        columns = [STANDARD_LEADS.index(lead) for lead in present]
        found[bits][:, columns] = torch.from_numpy(completion(present).matrix).float()
    return found


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
