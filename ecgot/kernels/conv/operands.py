"""The values that the convolutions pass around: activations, norms, epilogues, gradients and settings.

Autograd functions and registered operators take flat lists of tensors and numbers. The values here are
flattened where they enter one (``tensors``, ``flatten``) and put together again inside, and nowhere else.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ecgot.kernels.conv.geometry import Geometry

ACTIVATIONS = (None, "relu", "gelu", "silu")
Gradients = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class LazyActivation:
    """Activations [B, T, C]: values, or act((values - mean) * scale + shift), not yet materialized.

    A batch norm leaves its result in this form, and the convolution after it normalises what it reads.
    Gradients reach the norm through whatever reads the activation (a convolution, :func:`join`,
    :func:`max_pool1d`).

    Attributes:
        values: [B, T, C], any strides.
        mean, scale, shift: [C], fp32 (fp64 for fp64 values), or None.
        activation: None, "relu", "gelu" or "silu"; only where there is a mean.
        lengths: [B], int32, samples of each record; None for all. Positions past each length read as 0, even
            if NaN.
        rstd: [C], 1 / sqrt(variance + eps), where mean and rstd are the values' own statistics, detached: the
            gradient in the values then includes what goes through the statistics. Used by the torch path,
            which saves passes over memory by it.
        vectors: [5, C], fp32: mean, scale, shift, rstd and 1 / n of the norm that the kernels have made, n
            being the samples behind its statistics. Mean, scale and shift are then views of it without a
            gradient of their own; what is differentiable is this, by the numbers that the convolution before
            takes: c0, c1 (see :class:`OutputGradient`), and the gradients in gamma and beta.
    """

    values: Tensor
    mean: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    activation: str | None = None
    lengths: Tensor | None = None
    rstd: Tensor | None = None
    vectors: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Values, mean, scale, shift, rstd, lengths, vectors: what an autograd function takes and saves."""
        return self.values, self.mean, self.scale, self.shift, self.rstd, self.lengths, self.vectors

    @classmethod
    def from_tensors(cls, tensors: Sequence[Any], activation: str | None) -> "LazyActivation":
        """The inverse of :meth:`tensors`."""
        values, mean, scale, shift, rstd, lengths, vectors = tensors
        return cls(values, mean, scale, shift, activation, lengths, rstd, vectors)

    def gradients(
        self, values: Tensor | None, shift: Tensor | None, scale: Tensor | None, vectors: Tensor | None = None
    ) -> Gradients:
        """Gradients of :meth:`tensors`, given those in values, shift and scale.

        vectors: in place of shift's and scale's, where the kernels have merged them already.
        """
        if vectors is not None:
            return values, None, None, None, None, None, vectors
        if shift is None or scale is None:
            return values, *[None] * 6
        if self.vectors is not None:
            return values, None, None, None, None, None, self._of_vectors(shift, scale)
        assert self.scale is not None
        mean = None if self.rstd is not None else -self.scale * shift
        return values, mean, scale, shift, None, None, None

    def _of_vectors(self, shift: Tensor, scale: Tensor) -> Tensor:
        """What ``_merge_sums_kernel`` of ``triton_statistics`` makes, in torch."""
        assert self.vectors is not None
        _, by, _, rstd, share = self.vectors
        gamma, share = scale * rstd, -by * share
        return torch.stack([share * shift, share * rstd * gamma, gamma, shift, torch.zeros_like(shift)])

    def flatten(self, name: str, prefix: str) -> dict[str, Any]:
        """As arguments of a registered operator: the values by ``name``, the rest with a prefix."""
        rest = {f"{prefix}{field}": getattr(self, field) for field in _BESIDE_VALUES}
        return {name: self.values, **rest}

    @classmethod
    def unflatten(cls, given: Mapping[str, Any], name: str, prefix: str) -> "LazyActivation":
        """The inverse of :meth:`flatten`; what the operator does not take is None."""
        return cls(given[name], **{field: given.get(f"{prefix}{field}") for field in _BESIDE_VALUES})


VECTORS = 5  # rows of LazyActivation.vectors
_BESIDE_VALUES = ("mean", "scale", "shift", "activation", "lengths", "rstd")


@dataclass(frozen=True)
class BatchNorm:
    """A batch norm's parameters, running statistics and mode.

    Attributes:
        gamma, beta: [C_out], weight and bias; fp32 also where the activations are in half precision.
        running_mean, running_var: [C_out] or None; updated in place in training, as
            ``torch.nn.functional.batch_norm`` does (with the unbiased variance), and used otherwise.
        eps, momentum: as in ``torch.nn.functional.batch_norm``.
        training: normalise by the batch's statistics, over the samples inside each length; also done without
            running statistics.
        process_group: statistics over its processes, as in ``torch.nn.SyncBatchNorm``; None for this one's.
        batches: [], int64, counted up by one in training, as ``num_batches_tracked`` of torch's modules; None
            for no count.
    """

    gamma: Tensor
    beta: Tensor
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    eps: float = 1e-5
    momentum: float = 0.1
    training: bool = True
    process_group: Any = None
    batches: Tensor | None = None

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether the batch's statistics normalise, not the running ones."""
        return self.training or self.running_mean is None or self.running_var is None


@dataclass(frozen=True)
class Settings:
    """How a convolution is made: its geometry, the precision of fp32 products, and by whom."""

    geometry: Geometry
    precision: str = "fp32"
    backend: str = "auto"


@dataclass(frozen=True)
class Epilogue:
    """act(scale * (sums + bias) + shift + residual), vectors [C_out], residual [B, T_out, C_out]."""

    bias: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None
    activation: str | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """bias, scale, shift and residual: what an autograd function takes and saves."""
        return self.bias, self.scale, self.shift, self.residual

    def flatten(self) -> dict[str, Any]:
        """As arguments of a registered operator."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def unflatten(cls, given: Mapping[str, Any]) -> "Epilogue":
        """The inverse of :meth:`flatten`; other entries of ``given`` are ignored."""
        return cls(**{field.name: given[field.name] for field in dataclasses.fields(cls)})


PLAIN = Epilogue()


class FusedLayer(NamedTuple):
    """A convolution and its batch norm at inference: scale * conv(x) + shift.

    weight [C_out, C_in, K]; scale [C_out], or None where it is in the weight; shift [C_out].
    """

    weight: Tensor
    scale: Tensor | None
    shift: Tensor

    def to(self, dtype: torch.dtype) -> "FusedLayer":
        """All three in another dtype."""
        return FusedLayer(*(None if part is None else part.to(dtype) for part in self))  # type: ignore[arg-type]


@dataclass(frozen=True)
class OutputGradient:
    """The gradient in y: g [B, T_out, C_out], or g + c0 + c1 * (y - mean) where y's statistics were used.

    mean, c0, c1 [C_out] as in LazyActivation; 0 past each length (lengths [B], of the output).
    """

    g: Tensor
    y: Tensor | None = None
    mean: Tensor | None = None
    c0: Tensor | None = None
    c1: Tensor | None = None
    lengths: Tensor | None = None

    def flatten(self) -> dict[str, Any]:
        """As arguments of a registered operator."""
        return {
            "g": self.g,
            "y": self.y,
            "y_mean": self.mean,
            "c0": self.c0,
            "c1": self.c1,
            "y_lengths": self.lengths,
        }

    @classmethod
    def unflatten(cls, given: Mapping[str, Any]) -> "OutputGradient":
        """The inverse of :meth:`flatten`; other entries of ``given`` are ignored."""
        return cls(*(given[name] for name in ("g", "y", "y_mean", "c0", "c1", "y_lengths")))


class Recompute:
    """How to recompute a convolution's output in the backward pass, where it is not saved.

    The convolution fills it in. In backward the join runs first; it caches the recomputed output for the
    convolution, if that needs it.
    """

    def __init__(self, needed_twice: bool) -> None:
        self.needed_twice = needed_twice
        self.make: Callable[..., Tensor] | None = None
        self.inputs: tuple[Tensor | None, ...] = ()
        self._values: Tensor | None = None

    def compute(self, inputs: Sequence[Tensor | None]) -> Tensor:
        """The output [B, T_out, C_out], from saved inputs; cached if it will be needed once more."""
        assert self.make is not None
        values = self.make(*inputs)
        self._values = values if self.needed_twice else None
        return values

    def take(self, inputs: Sequence[Tensor | None]) -> Tensor:
        """The output, from the cache if it is there, which is then emptied."""
        values, self._values = self._values, None
        if values is not None:
            return values
        assert self.make is not None
        return self.make(*inputs)


Given = TypeVar("Given", LazyActivation, Epilogue, OutputGradient)


def in_dtype(given: Given, dtype: torch.dtype) -> Given:
    """A value with its activations, the tensors of three dimensions, in another dtype."""
    changed = {
        field.name: value.to(dtype)
        for field in dataclasses.fields(given)
        if isinstance(value := getattr(given, field.name), Tensor) and value.dim() == 3
    }
    return dataclasses.replace(given, **changed)  # type: ignore[arg-type]
