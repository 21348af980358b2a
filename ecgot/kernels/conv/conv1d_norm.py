"""A convolution and its batch norm as one: statistics in its epilogue, the affine map in whoever reads it.

In training :func:`conv1d_norm` returns a :class:`LazyActivation`, not yet materialized: the convolution's
output with the mean, scale and shift that normalise it. The next convolution normalises what it reads, a
join adds a residual, and the backward pass normalises again instead of having kept the result: one tensor is
saved for each convolution and join, where separate modules save two. In evaluation everything is one kernel.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ecgot.kernels.conv.backends import BACKENDS
from ecgot.kernels.conv.checks import (
    ACTIVATIONS,
    PRECISIONS,
    cast_by_autocast,
    check_activation,
    check_choice,
    check_lengths,
    check_norm,
    check_shapes,
)
from ecgot.kernels.conv.conv1d import conv1d
from ecgot.kernels.conv.geometry import Geometry
from ecgot.kernels.conv.geometry import geometry as checked_geometry
from ecgot.kernels.conv.join import _within_records, join, materialize
from ecgot.kernels.conv.operands import LazyActivation, OutputGradient, Recompute
from ecgot.kernels.conv.operators import forward, gradients, out_lengths
from ecgot.kernels.dispatch import use_triton


def conv1d_norm(
    x: LazyActivation,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int = 1,
    groups: int = 1,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: LazyActivation | None = None,
    recompute: bool = False,
    process_group: Any = None,
    precision: str = "fp32",
    backend: str = "auto",
) -> LazyActivation:
    """activation(batch_norm(conv(x)) + residual).

    Args:
        x: [B, T, C_in].
        weight: [C_out, C_in / groups, K].
        gamma, beta: [C_out], the norm's weight and bias; fp32 also where x is of half precision.
        running_mean, running_var: [C_out] or None, updated in training as ``torch.nn.functional.batch_norm``
            does (with the unbiased variance); used where training is False.
        stride, padding, dilation, groups, activation, precision, backend: as in :func:`ecgot.kernels.conv1d`.
        training: normalise by the batch's statistics, those of samples before the records' ends; also done
            where there are no running ones.
        momentum, eps: as in ``torch.nn.functional.batch_norm``.
        residual: [B, T_out, C_out].
        recompute: keep nothing of the convolution's output for the backward, which convolves once more.
            It pays for a cheap convolution with a large output, such as a bottleneck's last. With a residual,
            and not under torch.compile, which decides for itself what to keep.
        process_group: statistics over its processes, as ``torch.nn.SyncBatchNorm``'s. None: this one's.

    Returns:
        LazyActivation [B, T_out, C_out]; not yet normalised in training, unless there is a residual.

    Raises:
        ValueError, TypeError: one line that names the argument, what came and what is accepted.
    """
    check_activation("x", x)
    values, weight = cast_by_autocast(x.values, weight)
    if values is not x.values:
        x = dataclasses.replace(x, values=values)
    geometry = checked_geometry(stride, padding, dilation, groups)
    t_out = check_shapes(values, weight, geometry)
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("precision", precision, PRECISIONS)
    check_choice("backend", backend, BACKENDS)
    check_norm(weight, gamma=gamma, beta=beta, running_mean=running_mean, running_var=running_var)
    if x.lengths is not None:
        x = dataclasses.replace(x, lengths=check_lengths(x.lengths, values))
    if residual is not None:
        check_activation("residual", residual, (values.shape[0], t_out, weight.shape[0]), values)
        residual = _within_records(residual)
    lengths = None if x.lengths is None else out_lengths(x.lengths, weight, geometry)
    if not training and running_mean is not None and running_var is not None:
        y = _evaluated(
            x,
            weight,
            gamma,
            beta,
            running_mean,
            running_var,
            eps,
            geometry,
            residual,
            activation,
            precision,
            backend,
        )
        return LazyActivation(y, lengths=lengths)
    if training and lengths is None and values.shape[0] * t_out == 1 and process_group is None:
        raise ValueError("x: got 1 output sample per channel, accepted in training are 2 or more")
    # In torch the gradient through the statistics is best left to whoever normalises, as batch norm's
    # backward has it; the kernels add it where they read the gradient anyway.
    apart = not use_triton(values) and lengths is None and process_group is None
    recomputation = None
    if recompute and residual is not None and not torch.compiler.is_compiling():
        recomputation = Recompute(needed_twice=not apart)
    y, mean, var = _Convolution.apply(
        *(x.values, x.mean, x.scale, x.shift, x.rstd, weight, x.activation, x.lengths, lengths),
        *(geometry, precision, backend, recomputation, apart),
    )
    count: Any = y.shape[0] * y.shape[1] if lengths is None else lengths.sum().to(mean.dtype)
    if process_group is not None:
        count = torch.as_tensor(count, dtype=mean.dtype, device=mean.device)
        count, mean, var = _over_processes(count, mean, var, process_group)
    if training and running_mean is not None and running_var is not None:
        with torch.no_grad():
            rest = max(count - 1, 1) if isinstance(count, int) else (count - 1).clamp_min(1)
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / rest)).to(running_var.dtype), momentum)
    if apart:
        mean, var = mean.detach(), var.detach()
    rstd = torch.rsqrt(var + eps)
    vectors = mean, gamma.to(var.dtype) * rstd, beta.to(var.dtype)
    activated = None if residual is not None else activation
    signal = LazyActivation(y, *vectors, activated, lengths, rstd if apart else None)
    return signal if residual is None else join(signal, residual, activation, recomputation)


def _evaluated(
    x: LazyActivation,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    geometry: Geometry,
    residual: LazyActivation | None,
    activation: str | None,
    precision: str,
    backend: str,
) -> Tensor:
    dtype = weight.dtype
    kind = torch.promote_types(dtype, torch.float32)
    scale = gamma.to(kind) * torch.rsqrt(var.to(kind) + eps)
    x = materialize(x)
    return conv1d(
        x.values,
        weight,
        stride=geometry.stride,
        padding=geometry.paddings,
        dilation=geometry.dilation,
        groups=geometry.groups,
        scale=scale,
        shift=beta.to(kind) - mean.to(kind) * scale,
        residual=None if residual is None else materialize(residual).values.to(dtype),
        activation=activation,
        lengths=x.lengths,
        precision=precision,
        backend=backend,
    )


def _over_processes(count: Tensor, mean: Tensor, var: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Merged n, mean and variance; differentiable, as every process's loss depends on every statistic."""
    from torch.distributed.nn.functional import all_reduce

    sums = all_reduce(torch.cat([count[None], count * mean]), group=group)
    total, merged = sums[0], sums[1:] / sums[0]
    squares = all_reduce(count * (var + (mean - merged).square()), group=group)
    return total.detach(), merged, squares / total


# --- autograd -----------------------------------------------------------------------------------------------


class _Convolution(torch.autograd.Function):
    """y, and the mean and variance that describe it. Its gradient through them is c0 + c1 (y - mean)."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        mean: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        rstd: Tensor | None,
        weight: Tensor,
        activation: str | None,
        x_lengths: Tensor | None,
        lengths: Tensor | None,
        geometry: Geometry,
        precision: str,
        backend: str,
        recomputation: Recompute | None,
        apart: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        def make(
            values: Tensor, mean: Any, scale: Any, shift: Any, _: Any, weight: Tensor, ends: Any
        ) -> Tensor:
            x = LazyActivation(values, mean, scale, shift, activation, ends)
            return forward(x, weight, geometry, precision=precision, backend=backend)[0]

        x = LazyActivation(values, mean, scale, shift, activation, x_lengths)
        y, y_mean, y_var = forward(
            x, weight, geometry, statistics=True, lengths=lengths, precision=precision, backend=backend
        )
        inputs = (values, mean, scale, shift, rstd, weight, x_lengths)
        if recomputation is not None:
            recomputation.make, recomputation.inputs = make, inputs
        ctx.save_for_backward(*inputs, lengths, y_mean, None if apart or recomputation is not None else y)
        ctx.settings = activation, geometry, precision, backend, recomputation, apart
        return y, y_mean, y_var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, lengths, y_mean, y = ctx.saved_tensors
        values, mean, scale, shift, rstd, weight, x_lengths = inputs
        activation, geometry, precision, backend, recomputation, apart = ctx.settings
        needs_x, needs_mean, needs_scale, needs_shift, _, needs_weight = ctx.needs_input_grad[:6]
        grad = grad.contiguous()
        if apart:
            whole = OutputGradient(grad)
        else:
            y = y if recomputation is None else recomputation.take(inputs)
            count = y.shape[0] * y.shape[1] if lengths is None else lengths.sum()
            whole = OutputGradient(grad, y, y_mean, grad_mean / count, 2 * grad_var / count, lengths)
        grad_x, grad_shift, grad_scale, grad_weight = gradients(
            whole,
            weight,
            geometry,
            LazyActivation(values, mean, scale, shift, activation, x_lengths, rstd),
            needs_x or (scale is not None and (needs_scale or needs_shift)),
            needs_weight,
            precision=precision,
            backend=backend,
        )
        grad_x_mean = -scale * grad_shift if grad_shift is not None and needs_mean else None
        return grad_x, grad_x_mean, grad_scale, grad_shift, None, grad_weight, *[None] * 8
