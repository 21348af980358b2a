"""A convolution and its batch norm as one: statistics in its epilogue, the affine map in whatever reads it.

In training :func:`conv1d_norm` returns a :class:`LazyActivation`, not yet materialized: the convolution's
output with the mean, scale and shift that normalise it. The next convolution normalises what it reads, a
join adds a residual, and the backward pass normalises again instead of having saved the result. That is one
saved tensor for each convolution and join, where separate modules save two. In evaluation all of it is one
kernel.

Batch norm: Ioffe and Szegedy 2015. Recomputing its output in the backward pass instead of saving it: Bulo et
al. 2018, "In-Place Activated BatchNorm" (the variant that saves the convolution's output).
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ecgot.kernels.conv.checks import (
    cast_by_autocast,
    check_activation,
    check_choice,
    check_lengths,
    check_norm,
    check_shapes,
    checked_settings,
)
from ecgot.kernels.conv.conv1d import conv1d
from ecgot.kernels.conv.join import fill_residual, join, materialize
from ecgot.kernels.conv.operands import (
    ACTIVATIONS,
    BatchNorm,
    LazyActivation,
    OutputGradient,
    Recompute,
    Settings,
)
from ecgot.kernels.conv.operators import for_kernels, forward, gradients, normalised
from ecgot.kernels.dispatch import use_triton


def conv1d_norm(
    x: LazyActivation,
    weight: Tensor,
    norm: BatchNorm,
    *,
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int = 1,
    groups: int = 1,
    activation: str | None = None,
    residual: LazyActivation | None = None,
    recompute: bool = False,
    precision: str = "fp32",
    backend: str = "auto",
) -> LazyActivation:
    """activation(batch_norm(conv(x)) + residual).

    Args:
        x: [B, T, C_in].
        weight: [C_out, C_in / groups, K].
        norm: parameters, running statistics (updated in place in training) and mode, see :class:`BatchNorm`.
        stride, padding, dilation, groups, activation, precision, backend: as in :func:`ecgot.kernels.conv1d`.
        residual: [B, T_out, C_out].
        recompute: save nothing of the convolution's output for the backward pass, which convolves again.
            Pays off for a cheap convolution with a large output, such as a bottleneck's last. Only with a
            residual, and ignored under torch.compile, which decides for itself what to save.

    Returns:
        [B, T_out, C_out]; in training not yet materialized, unless there is a residual.

    Raises:
        ValueError, TypeError: one line that names the argument, what is expected and what came.

    >>> x = LazyActivation(torch.tensor([[[1.0], [1.0], [3.0], [3.0]]]))  # one record, four samples
    >>> weight, one, zero = torch.ones(1, 1, 1), torch.ones(1), torch.zeros(1)
    >>> y = conv1d_norm(x, weight, BatchNorm(one, zero, eps=0.0), activation="relu")
    >>> y.values.flatten(), y.mean  # the convolution's output, and what will normalise it
    (tensor([1., 1., 3., 3.]), tensor([2.]))
    >>> materialize(y).values.flatten()
    tensor([0., 0., 1., 1.])
    """
    settings = checked_settings(stride, padding, dilation, groups, precision, backend)
    return _run(x, weight, norm, _Request(settings, activation, residual, recompute))[0]


def conv1d_norm_beside(
    x: LazyActivation,
    weight: Tensor,
    norm: BatchNorm,
    *,
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int = 1,
    groups: int = 1,
    activation: str | None = None,
    precision: str = "fp32",
    backend: str = "auto",
) -> tuple[LazyActivation, LazyActivation]:
    """As :func:`conv1d_norm`, and x once more, for a shortcut beside the convolution.

    In the kernels the gradient that comes back through that x is added where the convolution's own is
    written, which saves autograd a pass over memory.

    >>> x, one = LazyActivation(torch.tensor([[[1.0], [3.0]]])), torch.ones(1)
    >>> y, again = conv1d_norm_beside(x, torch.ones(1, 1, 1), BatchNorm(one, 0 * one, eps=0.0))
    >>> join(y, again).values.flatten()
    tensor([0., 4.])
    """
    settings = checked_settings(stride, padding, dilation, groups, precision, backend)
    return _run(x, weight, norm, _Request(settings, activation, keeps_input=True))


class _Request(NamedTuple):
    """What is asked of a convolution and its norm; keeps_input: x once more."""

    settings: Settings
    activation: str | None
    residual: LazyActivation | None = None
    recompute: bool = False
    keeps_input: bool = False


def _run(
    x: LazyActivation, weight: Tensor, norm: BatchNorm, request: _Request
) -> tuple[LazyActivation, LazyActivation]:
    settings, activation, residual, recompute, keeps_input = request
    check_activation("x", x)
    (values,) = cast_by_autocast(x.values)
    fused = _on_kernels(values, norm)
    if not fused:  # the kernels cast weights where they read them
        (weight,) = cast_by_autocast(weight)
    t_out = check_shapes(values, weight, settings.geometry)
    check_choice("activation", activation, ACTIVATIONS)
    check_norm(norm, weight)
    given, x = x, dataclasses.replace(x, values=values, lengths=check_lengths(x.lengths, values))
    if residual is not None:
        check_activation("residual", residual, (values.shape[0], t_out, weight.shape[0]), values)
        residual = fill_residual(residual)
    if not norm.uses_batch_statistics:
        return _evaluated(x, weight, norm, settings, residual, activation), given
    alone = x.lengths is None and norm.process_group is None
    if norm.training and alone and values.shape[0] * t_out == 1:
        raise ValueError("x: expected 2 or more output samples per channel in training, got 1")
    # In torch the gradient through the statistics is best left to whatever normalises, as batch norm's
    # backward does. The kernels add it where they read the gradient anyway.
    detached = alone and not use_triton(values)
    cache = None
    if recompute and residual is not None and not torch.compiler.is_compiling():
        cache = Recompute(needed_twice=not detached)
    call = _Call(settings, x.activation, detached, cache, keeps_input and x.mean is None)
    if fused:
        y, given = _fused(x, weight, norm, call, given)
    else:
        y = _normalised(x, weight, norm, call)
    if residual is None:
        return dataclasses.replace(y, activation=activation), given
    return join(y, residual, activation, cache), given


def _on_kernels(values: Tensor, norm: BatchNorm) -> bool:
    """Whether the kernels make the norm's vectors, running statistics and gradients too.

    Not under torch.compile, which fuses that algebra itself and must see what is updated in place, and not
    for statistics over processes.
    """
    if not isinstance(norm, BatchNorm) or not norm.uses_batch_statistics or norm.process_group is not None:
        return False
    return use_triton(values) and values.dtype != torch.float64 and not torch.compiler.is_compiling()


class _Call(NamedTuple):
    """What the autograd function gets beside tensors.

    detached: the statistics' gradient is left to whatever normalises. recompute: None where y is saved.
    keeps_input: x comes out once more.
    """

    settings: Settings
    x_activation: str | None
    detached: bool
    recompute: Recompute | None
    keeps_input: bool


def _evaluated(
    x: LazyActivation,
    weight: Tensor,
    norm: BatchNorm,
    settings: Settings,
    residual: LazyActivation | None,
    activation: str | None,
) -> LazyActivation:
    """With running statistics: a scale and a shift in the convolution's epilogue."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    kind = torch.promote_types(weight.dtype, torch.float32)
    scale = norm.gamma.to(kind) * torch.rsqrt(norm.running_var.to(kind) + norm.eps)
    x, geometry = materialize(x), settings.geometry
    y = conv1d(
        x.values,
        weight,
        stride=geometry.stride,
        padding=geometry.paddings,
        dilation=geometry.dilation,
        groups=geometry.groups,
        scale=scale,
        shift=norm.beta.to(kind) - norm.running_mean.to(kind) * scale,
        residual=None if residual is None else materialize(residual).values.to(weight.dtype),
        activation=activation,
        lengths=x.lengths,
        precision=settings.precision,
        backend=settings.backend,
    )
    return LazyActivation(y, lengths=_output_lengths(x, weight, settings))


def _fused(
    x: LazyActivation, weight: Tensor, norm: BatchNorm, call: _Call, given: LazyActivation
) -> tuple[LazyActivation, LazyActivation]:
    """As :func:`_normalised`, all in kernels: the norm's vectors, running statistics and gradients.

    And ``given``, which x was before autocast: with the values that the function returns where it keeps them.
    """
    lengths = _output_lengths(x, weight, call.settings)
    tensors = (weight, norm.gamma, norm.beta, lengths, *x.tensors())
    y, vectors, *kept = _ConvolutionNorm.apply(call, norm, *tensors)
    if kept:
        given = dataclasses.replace(given, values=kept[0])
    mean, scale, shift, *_ = vectors.detach()
    return LazyActivation(y, mean, scale, shift, None, lengths, None, vectors), given


def _normalised(x: LazyActivation, weight: Tensor, norm: BatchNorm, call: _Call) -> LazyActivation:
    """With the batch's statistics: the convolution's output and what normalises it, without activation."""
    lengths = _output_lengths(x, weight, call.settings)
    y, mean, var = _Convolution.apply(call, weight, lengths, *x.tensors())
    count: Any = y.shape[0] * y.shape[1] if lengths is None else lengths.sum().to(mean.dtype)
    if norm.process_group is not None:
        count = torch.as_tensor(count, dtype=mean.dtype, device=mean.device)
        count, mean, var = _over_processes(count, mean, var, norm.process_group)
    if norm.training:
        _update_running(norm, count, mean, var)
    if call.detached:
        mean, var = mean.detach(), var.detach()
    rstd = torch.rsqrt(var + norm.eps)
    scale, shift = norm.gamma.to(var.dtype) * rstd, norm.beta.to(var.dtype)
    return LazyActivation(y, mean, scale, shift, None, lengths, rstd if call.detached else None)


def _output_lengths(x: LazyActivation, weight: Tensor, settings: Settings) -> Tensor | None:
    return None if x.lengths is None else settings.geometry.output_length(x.lengths, weight.shape[2])


@torch.no_grad()
def _update_running(norm: BatchNorm, count: Any, mean: Tensor, var: Tensor) -> None:
    """Count the batch and move the running statistics towards its, count being its samples."""
    if norm.batches is not None:
        norm.batches.add_(1)
    if norm.running_mean is None or norm.running_var is None:
        return
    rest = max(count - 1, 1) if isinstance(count, int) else (count - 1).clamp_min(1)
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
    norm.running_var.lerp_((var * (count / rest)).to(norm.running_var.dtype), norm.momentum)


def _over_processes(count: Tensor, mean: Tensor, var: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Merged n, mean and variance; differentiable, as every process's loss depends on every statistic."""
    from torch.distributed.nn.functional import all_reduce

    sums = all_reduce(torch.cat([count[None], count * mean]), group=group)
    total, merged = sums[0], sums[1:] / sums[0]
    squares = all_reduce(count * (var + (mean - merged).square()), group=group)
    return total.detach(), merged, squares / total


class _Convolution(torch.autograd.Function):
    """y, and the mean and variance that describe it. Its gradient through them is c0 + c1 (y - mean)."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, weight: Tensor, lengths: Tensor | None, *x_tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        settings, x_activation, detached, recompute, _ = call

        def make(weight: Tensor, *x_tensors: Tensor | None) -> Tensor:
            return forward(LazyActivation.from_tensors(x_tensors, x_activation), weight, settings)[0]

        x = LazyActivation.from_tensors(x_tensors, x_activation)
        y, mean, var = forward(x, weight, settings, statistics=True, lengths=lengths)
        if recompute is not None:
            recompute.make, recompute.inputs = make, (weight, *x_tensors)
        saved = None if detached or recompute is not None else y
        ctx.save_for_backward(saved, mean, lengths, weight, *x_tensors)
        ctx.call = call
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
        y, mean, lengths, weight, *x_tensors = ctx.saved_tensors
        settings, x_activation, detached, recompute, _ = ctx.call
        x = LazyActivation.from_tensors(x_tensors, x_activation)
        needs_weight, needs_x = ctx.needs_input_grad[1], any(ctx.needs_input_grad[3:])
        whole = OutputGradient(grad.contiguous())
        if not detached:
            y = y if recompute is None else recompute.take((weight, *x_tensors))
            count = y.shape[0] * y.shape[1] if lengths is None else lengths.sum()
            whole = OutputGradient(whole.g, y, mean, grad_mean / count, 2 * grad_var / count, lengths)
        of_x, grad_weight = gradients(whole, weight, settings, x, (needs_x, needs_weight))
        return None, grad_weight, None, *of_x


class _ConvolutionNorm(torch.autograd.Function):
    """y, its norm's vectors, and perhaps x.values once more.

    The gradient in the vectors brings c0, c1 and the gradients in gamma and beta.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        norm: BatchNorm,
        weight: Tensor,
        _gamma: Tensor,
        _beta: Tensor,
        lengths: Tensor | None,
        *x_tensors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        settings, x_activation, _, recompute, keeps_input = call
        x = LazyActivation.from_tensors(x_tensors, x_activation)
        laid = for_kernels(x, weight, settings)  # once for all passes

        def make(laid: Tensor, *x_tensors: Tensor | None) -> Tensor:
            return forward(LazyActivation.from_tensors(x_tensors, x_activation), laid, settings)[0]

        y, vectors = normalised(x, laid, norm, settings, lengths)
        if recompute is not None:
            recompute.make, recompute.inputs = make, (laid, *x_tensors)
        saved = y if recompute is None else None
        ctx.save_for_backward(saved, vectors, lengths, weight, laid, *x_tensors)
        ctx.call, ctx.dtypes = call, (norm.gamma.dtype, norm.beta.dtype)
        ctx.set_materialize_grads(False)
        return (y, vectors, x.values) if keeps_input else (y, vectors)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, of_vectors: Tensor | None, of_kept: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        y, vectors, lengths, weight, laid, *x_tensors = ctx.saved_tensors
        settings, x_activation, _, recompute, _ = ctx.call
        x = LazyActivation.from_tensors(x_tensors, x_activation)
        needs_weight, needs_x = ctx.needs_input_grad[2], any(ctx.needs_input_grad[6:])
        if of_vectors is None and grad is None:
            return *[None] * 6, *x.gradients(of_kept, None, None)
        y = y if recompute is None else recompute.take((laid, *x_tensors))
        whole = OutputGradient(torch.zeros_like(y) if grad is None else grad.contiguous(), lengths=lengths)
        grad_gamma = grad_beta = None
        if of_vectors is not None:
            c0, c1, grad_gamma, grad_beta, _ = of_vectors.unbind()
            grad_gamma, grad_beta = (
                g.to(dtype) for g, dtype in zip((grad_gamma, grad_beta), ctx.dtypes, strict=True)
            )
            whole = OutputGradient(whole.g, y, vectors[0], c0, c1, lengths)
        of_x, grad_weight = gradients(whole, laid, settings, x, (needs_x, needs_weight), weight, of_kept)
        return None, None, grad_weight, grad_gamma, grad_beta, None, *of_x
