"""A convolution's geometry and output lengths, and masks of the samples that belong to a record."""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from ecgot.kernels.lengths import length_mask

Length = TypeVar("Length", int, Tensor)


@dataclass(frozen=True)
class Geometry:
    """Stride, zero padding, dilation and groups, as in ``torch.nn.functional.conv1d``.

    Attributes:
        padding: zeros before the first sample.
        end: zeros after the last one; None for as many as before the first.
    """

    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    end: int | None = None

    @property
    def paddings(self) -> tuple[int, int]:
        """Zeros before the first sample and after the last."""
        return self.padding, self.padding if self.end is None else self.end

    def output_length(self, t: Length, k: int) -> Length:
        """Output samples of t input samples under k taps.

        Args:
            t: samples of a batch, or a tensor [B] of each record's, as if the record were alone.
            k: taps.
        """
        length = (t + sum(self.paddings) - self.dilation * (k - 1) - 1) // self.stride + 1
        return length.clamp_min(0) if isinstance(length, Tensor) else length

    def flatten(self) -> dict[str, int]:
        """As arguments of a registered operator."""
        start, end = self.paddings
        return {
            "stride": self.stride,
            "padding": start,
            "dilation": self.dilation,
            "groups": self.groups,
            "end": end,
        }

    @classmethod
    def unflatten(cls, given: dict[str, int]) -> "Geometry":
        """The inverse of :meth:`flatten`; other entries of ``given`` are ignored."""
        return cls(*(given[name] for name in ("stride", "padding", "dilation", "groups", "end")))


def checked_geometry(stride: int, padding: int | tuple[int, int], dilation: int, groups: int) -> Geometry:
    """A geometry from a public function's arguments.

    Raises:
        ValueError: one is not an integer, or too small.
    """
    both = padding if isinstance(padding, tuple) and len(padding) == 2 else (padding, padding)
    given = {"stride": stride, "dilation": dilation, "groups": groups}
    for name, value in given.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: expected an integer >= 1, got {value!r}")
    if not all(isinstance(value, int) and value >= 0 for value in both):
        raise ValueError(f"padding: expected an integer >= 0 or a pair of them, got {padding!r}")
    return Geometry(stride, both[0], dilation, groups, both[1])


def fill_past(x: Tensor, lengths: Tensor | None, value: float = 0.0) -> Tensor:
    """x [B, T, C] with a value in place of the samples past each length; x itself without lengths [B]."""
    if lengths is None:
        return x
    return torch.where(length_mask(lengths, x.shape[1])[:, :, None], x, value)
