"""A normalised activation and its residual, added and activated: where a residual block's two paths meet.

Residual blocks: He et al. 2016, "Deep Residual Learning for Image Recognition".
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ecgot.kernels.conv.checks import check_activation, check_choice, check_lengths
from ecgot.kernels.conv.geometry import fill_past
from ecgot.kernels.conv.operands import ACTIVATIONS, LazyActivation, Recompute
from ecgot.kernels.conv.operators import join_forward, join_gradients


def join(
    x: LazyActivation,
    residual: LazyActivation | None,
    activation: str | None = None,
    recompute: Recompute | None = None,
) -> LazyActivation:
    """activation(x + residual), materialized.

    Args:
        x: [B, T, C], not yet materialized and without an activation of its own.
        residual: [B, T, C], materialized or not; None for none.
        activation: None, "relu", "gelu" or "silu".
        recompute: how to recompute x.values in the backward pass; None to save them.

    Raises:
        ValueError, TypeError: x is materialized or has an activation, or the two do not fit.

    >>> one = torch.ones(1)
    >>> x = LazyActivation(torch.tensor([[[1.0], [5.0]]]), mean=3 * one, scale=0.5 * one, shift=0 * one)
    >>> join(x, LazyActivation(torch.ones(1, 2, 1)), "relu").values.flatten()
    tensor([0., 2.])
    """
    check_activation("x", x)
    if x.mean is None or x.activation is not None:
        got = "a materialized one" if x.mean is None else repr(x.activation)
        raise ValueError(f"x: expected a LazyActivation with a mean and no activation, got {got}")
    if residual is not None:
        check_activation("residual", residual, tuple(x.values.shape), x.values)
        residual = fill_residual(residual)
    check_choice("activation", activation, ACTIVATIONS)
    r_activation = None if residual is None else residual.activation
    r_tensors = [None] * 7 if residual is None else residual.tensors()
    call = _Call(residual is not None, r_activation, activation, recompute)
    return LazyActivation(_Join.apply(call, *x.tensors(), *r_tensors), lengths=x.lengths)


def materialize(x: LazyActivation) -> LazyActivation:
    """x with its normalisation and activation done.

    >>> one, zero = torch.ones(1), torch.zeros(1)
    >>> x = LazyActivation(torch.tensor([[[-1.0], [2.0]]]), zero, 2 * one, zero, "relu")  # relu(2 x)
    >>> materialize(x).values.flatten().tolist()
    [0.0, 4.0]
    """
    return x if x.mean is None else join(dataclasses.replace(x, activation=None), None, x.activation)


def fill_residual(residual: LazyActivation) -> LazyActivation:
    """A residual with 0 past each length: what is there may be NaN, and NaN times a gradient of 0 is NaN."""
    if residual.lengths is None:
        return residual
    residual = materialize(residual)
    lengths = check_lengths(residual.lengths, residual.values)
    return LazyActivation(fill_past(residual.values, lengths))


class _Call(NamedTuple):
    """What the autograd function gets beside tensors."""

    has_residual: bool
    r_activation: str | None
    activation: str | None
    recompute: Recompute | None


class _Join(torch.autograd.Function):
    """activation(normalised y + residual); saves y, or how to recompute it, and what the slope needs."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Any) -> Tensor:
        y, *y_rest = tensors[:7]
        r, *r_rest = tensors[7:]
        x = LazyActivation.from_tensors((y, *y_rest), None)
        residual = LazyActivation.from_tensors((r, *r_rest), call.r_activation) if call.has_residual else None
        z = join_forward(x, residual, call.activation)
        r_needed = r_rest[0] is not None or call.activation in ("gelu", "silu")
        saved_y, inputs = (y, ()) if call.recompute is None else (None, call.recompute.inputs)
        saved_z = z if call.activation == "relu" else None
        ctx.save_for_backward(saved_z, saved_y, *y_rest, r if r_needed else None, *r_rest, *inputs)
        ctx.call = call
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        z, y, *rest = ctx.saved_tensors
        y_rest, r, r_rest, inputs = rest[:6], rest[6], rest[7:13], rest[13:]
        if call.recompute is not None:
            y = call.recompute.compute(inputs)
        x = LazyActivation.from_tensors((y, *y_rest), None)
        residual = None
        if call.has_residual:  # y stands in for values that are not needed
            residual = LazyActivation.from_tensors((y if r is None else r, *r_rest), call.r_activation)
        of_x, of_residual = join_gradients(grad.contiguous(), z, x, residual, call.activation)
        return None, *of_x, *of_residual
