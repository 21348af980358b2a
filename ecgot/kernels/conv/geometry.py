"""A convolution's geometry: stride, padding, dilation, groups, output lengths and masks of valid samples."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """As in ``torch.nn.functional.conv1d``, but that the zeros at the end may be fewer or more."""

    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    end: int | None = None

    @property
    def paddings(self) -> tuple[int, int]:
        return self.padding, self.padding if self.end is None else self.end

    def length(self, t: int | Tensor, k: int) -> int | Tensor:
        """Output samples of t input samples under k taps; of a record as if it were alone."""
        return (t + sum(self.paddings) - self.dilation * (k - 1) - 1) // self.stride + 1


def geometry(stride: int, padding: int | tuple[int, int], dilation: int, groups: int) -> Geometry:
    """From a public function's arguments.

    Raises:
        ValueError: one is not an integer, or too small.
    """
    both = padding if isinstance(padding, tuple) and len(padding) == 2 else (padding, padding)
    given = {"stride": (stride, 1), "dilation": (dilation, 1), "groups": (groups, 1)}
    for name, (value, least) in given.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: got {value!r}, accepted is an integer >= {least}")
    if not all(isinstance(value, int) and value >= 0 for value in both):
        raise ValueError(f"padding: got {padding!r}, accepted is an integer >= 0 or a pair of them")
    return Geometry(stride, both[0], dilation, groups, both[1])


def valid_samples(lengths: Tensor | None, t: int) -> Tensor | None:
    """[B, t, 1], True before each record's end; None where all is valid."""
    if lengths is None:
        return None
    return (torch.arange(t, device=lengths.device) < lengths[:, None])[:, :, None]
