"""What a convolution reads, what it does to its sums, and the gradients it is given."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class LazyActivation:
    """Activations [B, T, C]: values, or act((values - mean) * scale + shift) that nobody has computed yet.

    A batch norm leaves its result in this form, and the convolution after it normalises what it reads.

    Attributes:
        values: [B, T, C], any strides.
        mean, scale, shift: [C], fp32 (fp64 for fp64 values), or None.
        activation: None, "relu", "gelu" or "silu"; only where there is a mean.
        lengths: [B], int32: samples of each record. What lies beyond is read as 0, whatever it is. None: all.
        rstd: [C], where mean and rstd are statistics of the values themselves and without gradient: that in
            the values includes what goes through them. Of the torch path, which saves passes by it.
    """

    values: Tensor
    mean: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    activation: str | None = None
    lengths: Tensor | None = None
    rstd: Tensor | None = None


class Recompute:
    """How to compute values anew in the backward, where they are not kept; filled in by what made them.

    The join that used them needs them first and leaves them here for the convolution that made them, if that
    needs them.
    """

    def __init__(self, needed_twice: bool) -> None:
        self.needed_twice = needed_twice
        self.make: Callable[..., Tensor] | None = None
        self.inputs: tuple[Tensor | None, ...] = ()
        self._values: Tensor | None = None

    def leave(self, inputs: Sequence[Tensor | None]) -> Tensor:
        assert self.make is not None
        values = self.make(*inputs)
        self._values = values if self.needed_twice else None
        return values

    def take(self, inputs: Sequence[Tensor | None]) -> Tensor:
        values, self._values = self._values, None
        if values is not None:
            return values
        assert self.make is not None
        return self.make(*inputs)


@dataclass(frozen=True)
class Epilogue:
    """act(scale * (sums + bias) + shift + residual), vectors [C_out], residual [B, T_out, C_out]."""

    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    activation: str | None = None


PLAIN = Epilogue()


class FusedLayer(NamedTuple):
    """A convolution and its batch norm at inference: scale * conv(x) + shift.

    weight [C_out, C_in, K]; scale [C_out], or None where it is in the weight; shift [C_out].
    """

    weight: Tensor
    scale: Tensor | None
    shift: Tensor

    def to(self, dtype: torch.dtype) -> "FusedLayer":
        return FusedLayer(*(None if part is None else part.to(dtype) for part in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class OutputGradient:
    """The gradient in y: g [B, T_out, C_out], or g + c0 + c1 * (y - mean) where y's statistics were used.

    mean, c0, c1 [C_out] as in LazyActivation; 0 from each record's end (lengths [B], of the output) on.
    """

    g: Tensor
    y: Tensor | None = None
    mean: Tensor | None = None
    c0: Tensor | None = None
    c1: Tensor | None = None
    lengths: Tensor | None = None


Given = TypeVar("Given", LazyActivation, Epilogue, OutputGradient)


def in_dtype(given: Given, dtype: torch.dtype) -> Given:
    """With its signals, which are those of three dimensions, in another dtype."""
    changed = {
        field.name: value.to(dtype)
        for field in dataclasses.fields(given)
        if isinstance(value := getattr(given, field.name), Tensor) and value.dim() == 3
    }
    return dataclasses.replace(given, **changed)  # type: ignore[arg-type]
