"""A classifier of ECGs: an encoder and a head, scored over crops of a record."""

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ecgot.models.encoders import Encoder, fuse_norms, masked_mean


class Classifier(nn.Module):
    """An encoder and a head; waveforms are standardised by the mean and deviation of the training data.

    Args:
        encoder: waveform [B, L, T] to tokens of its ``width``.
        classes: label group -> its classes. The C logits are those of all groups, in this order.
        benchmark: the PTB-XL benchmark's head, on the mean and the maximum of the tokens; otherwise one
            linear layer on their mean.
        crop, stride: length of the crops in scoring and the distance between them, in samples; a crop of 0
            takes whole records.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        encoder: Encoder,
        classes: Mapping[str, Sequence[str]],
        *,
        benchmark: bool,
        crop: int = 0,
        stride: int = 0,
    ) -> None:
        super().__init__()
        self.encoder, self.benchmark = encoder, benchmark
        self.classes = {group: tuple(names) for group, names in classes.items()}
        self.crop, self.stride = crop, stride
        count = sum(map(len, self.classes.values()))
        self.head: nn.Module = nn.Linear(encoder.width, count)
        if benchmark:
            self.head = nn.Sequential(
                nn.BatchNorm1d(2 * encoder.width),
                nn.Dropout(0.25),
                nn.Linear(2 * encoder.width, 128),
                nn.ReLU(),
                nn.BatchNorm1d(128),
                nn.Dropout(0.5),
                nn.Linear(128, count),
            )
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("deviation", torch.ones(()))

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits [B, C] of waveform [B, L, T] in mV; lengths [B] if some records are shorter."""
        encoded = self.encoder((waveform - self.mean) / self.deviation, lengths)
        if not self.benchmark:
            return self.head(masked_mean(encoded.tokens, encoded.mask))
        highest = encoded.tokens.masked_fill(~encoded.mask[:, :, None], -math.inf).max(1).values
        return self.head(torch.cat([encoded.pooled, highest], 1))

    def fused(self) -> "Classifier":
        """A copy for inference, see :func:`ecgot.models.encoders.fuse_norms`."""
        copied = copy.deepcopy(self).eval().requires_grad_(False)
        copied.encoder = fuse_norms(self.encoder)
        return copied

    def crops(self, samples: int) -> tuple[int, list[int]]:
        """Samples in a crop of records of ``samples``, and where crops start; one crop for whole records."""
        if not self.crop:
            return samples, [0]
        crop = min(samples, self.crop)
        return crop, crop_starts(samples, crop, self.stride)

    @torch.no_grad()
    def largest_logits(
        self, waveform: Tensor, lengths: Tensor | None, starts: Sequence[int], crop: int
    ) -> Tensor:
        """Logits [B, C] of waveform [B, L, T] in mV: for each class the largest over crops.

        Args:
            lengths: [B], or None if all T samples are valid.
            starts: where crops of ``crop`` samples start. Crops that reach past a record's end are ignored,
                except the first, which is cut to the record.
        """
        best = None
        for start in starts:
            left = None if lengths is None else (lengths - start).clamp(0, crop)
            logits = self(waveform[:, :, start : start + crop], left)
            if left is not None and start != starts[0]:
                logits = logits.masked_fill((left < crop)[:, None], -math.inf)
            best = logits if best is None else torch.maximum(best, logits)
        if best is None:
            raise ValueError("starts: expected at least one, got none")
        return best

    def class_logits(self, waveform: Tensor, lengths: Tensor | None = None) -> dict[str, Tensor]:
        """Label group -> logits [B, its classes] of waveform [B, L, T] in mV, as evaluation scores records.

        The sigmoid of a logit is the probability that the training labels give. Records are read as the run's
        ``data`` settings say. Use a classifier in evaluation mode, or a :meth:`fused` one, which is faster.
        """
        crop, starts = self.crops(waveform.shape[2])
        logits = self.largest_logits(waveform, lengths, starts, crop)
        parts = logits.split([len(names) for names in self.classes.values()], dim=1)
        return dict(zip(self.classes, parts, strict=True))


def crop_starts(samples: int, crop: int, stride: int) -> list[int]:
    """Start of each crop of a record of ``samples``: every ``stride``, while a whole crop fits."""
    return list(range(0, samples - crop + 1, stride)) or [0]
