"""A normalised signal and its residual, added and activated: where a residual block's two paths meet."""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ecgot.kernels.conv.checks import ACTIVATIONS, check_activation, check_choice, check_lengths
from ecgot.kernels.conv.geometry import valid_samples
from ecgot.kernels.conv.operands import LazyActivation, Recompute
from ecgot.kernels.conv.operators import _join_gradient_operator, _join_gradients, _join_operator, _joined


def join(
    x: LazyActivation,
    residual: LazyActivation | None,
    activation: str | None = None,
    recomputation: Recompute | None = None,
) -> LazyActivation:
    """activation(x + residual), computed: both [B, T, C], x a signal that is not normalised yet.

    Raises:
        ValueError, TypeError: x has been computed or has an activation of its own, or the two do not fit.
    """
    check_activation("x", x)
    if x.mean is None or x.activation is not None:
        raise ValueError("x: accepted is a signal that is not normalised yet, without an activation")
    if residual is not None:
        check_activation("residual", residual, tuple(x.values.shape), x.values)
        residual = _within_records(residual)
    check_choice("activation", activation, ACTIVATIONS)
    r = LazyActivation(x.values) if residual is None else residual
    z = _Join.apply(
        *(x.values, x.mean, x.scale, x.shift, x.rstd),
        *(None if residual is None else r.values, r.mean, r.scale, r.shift, r.rstd),
        *(r.activation, activation, recomputation),
    )
    return LazyActivation(z, lengths=x.lengths)


def materialize(x: LazyActivation) -> LazyActivation:
    """x with its normalisation and activation done."""
    return x if x.mean is None else join(dataclasses.replace(x, activation=None), None, x.activation)


def _within_records(residual: LazyActivation) -> LazyActivation:
    """0 beyond the records' ends: what lies there may be NaN, which a gradient of 0 would not undo."""
    if residual.lengths is None:
        return residual
    residual = materialize(residual)
    lengths = check_lengths(residual.lengths, residual.values)
    valid = valid_samples(lengths, residual.values.shape[1])
    assert valid is not None
    return LazyActivation(torch.where(valid, residual.values, 0.0))


class _Join(torch.autograd.Function):
    """activation(normalised y + residual); keeps y, or how to make it, and what the slope needs."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        mean: Tensor,
        scale: Tensor,
        shift: Tensor,
        rstd: Tensor | None,
        r: Tensor | None,
        r_mean: Tensor | None,
        r_scale: Tensor | None,
        r_shift: Tensor | None,
        r_rstd: Tensor | None,
        r_activation: str | None,
        activation: str | None,
        recomputation: Recompute | None,
    ) -> Tensor:
        run = _join_operator if torch.compiler.is_compiling() else _joined
        z = run(y, mean, scale, shift, r, r_mean, r_scale, r_shift, r_activation, activation)
        r_needed = r_mean is not None or activation in ("gelu", "silu")
        ctx.save_for_backward(
            *(y if recomputation is None else None, mean, scale, shift, rstd),
            *(r if r_needed else None, r_mean, r_scale, r_shift, r_rstd),
            z if activation == "relu" else None,
            *(() if recomputation is None else recomputation.inputs),
        )
        ctx.settings = r is not None, r_activation, activation, recomputation
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, mean, scale, shift, rstd, r, r_mean, r_scale, r_shift, r_rstd, z, *inputs = ctx.saved_tensors
        has_residual, r_activation, activation, recomputation = ctx.settings
        if recomputation is not None:
            y = recomputation.leave(inputs)
        run = _join_gradient_operator if torch.compiler.is_compiling() else _join_gradients
        grad_y, grad_r, sums = run(
            *(grad.contiguous(), z, y, mean, scale, shift, rstd),
            *(r, r_mean, r_scale, r_shift, r_rstd, r_activation, has_residual, activation),
        )
        grads = grad_y, -scale * sums[0] if rstd is None else None, sums[1], sums[0], None
        if not has_residual:
            return *grads, *[None] * 8
        if r_mean is None:
            return *grads, grad_r, *[None] * 7
        r_grads = grad_r, -r_scale * sums[2] if r_rstd is None else None, sums[3], sums[2], None
        return *grads, *r_grads, *[None] * 3
