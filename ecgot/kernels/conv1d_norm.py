"""A convolution and its batch norm as one: statistics in its epilogue, the affine map in whoever reads it.

In training :func:`conv1d_norm` returns a :class:`Signal` that is not computed yet: the convolution's output
with the mean, scale and shift that normalise it. The next convolution normalises what it reads, :func:`join`
adds a residual, and the backward normalises again instead of having kept the result: one tensor is saved for
each convolution and join, where separate modules save two. In evaluation everything is one kernel.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ecgot.kernels import _torch_conv1d
from ecgot.kernels._convolution import Geometry, OutputGradient, Recipe, Signal, validity
from ecgot.kernels._convolution import geometry as checked_geometry
from ecgot.kernels.conv1d import (
    ACTIVATIONS,
    PRECISIONS,
    cast_by_autocast,
    check_choice,
    check_lengths,
    check_shapes,
    conv1d,
    forward,
    gradients,
    out_lengths,
)
from ecgot.kernels.conv1d_table import BACKENDS
from ecgot.kernels.dispatch import use_triton


def conv1d_norm(
    x: Signal,
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
    residual: Signal | None = None,
    recompute: bool = False,
    process_group: Any = None,
    precision: str = "fp32",
    backend: str = "auto",
) -> Signal:
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
        Signal [B, T_out, C_out]; not yet normalised in training, unless there is a residual.

    Raises:
        ValueError, TypeError: one line that names the argument, what came and what is accepted.
    """
    _check_signal("x", x)
    values, weight = cast_by_autocast(x.values, weight)
    if values is not x.values:
        x = dataclasses.replace(x, values=values)
    geometry = checked_geometry(stride, padding, dilation, groups)
    t_out = check_shapes(values, weight, geometry)
    check_choice("activation", activation, ACTIVATIONS)
    check_choice("precision", precision, PRECISIONS)
    check_choice("backend", backend, BACKENDS)
    _check_norm(weight, gamma=gamma, beta=beta, running_mean=running_mean, running_var=running_var)
    if x.lengths is not None:
        x = dataclasses.replace(x, lengths=check_lengths(x.lengths, values))
    if residual is not None:
        _check_signal("residual", residual, (values.shape[0], t_out, weight.shape[0]), values)
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
        return Signal(y, lengths=lengths)
    if training and lengths is None and values.shape[0] * t_out == 1 and process_group is None:
        raise ValueError("x: got 1 output sample per channel, accepted in training are 2 or more")
    # In torch the gradient through the statistics is best left to whoever normalises, as batch norm's
    # backward has it; the kernels add it where they read the gradient anyway.
    apart = not use_triton(values) and lengths is None and process_group is None
    recipe = None
    if recompute and residual is not None and not torch.compiler.is_compiling():
        recipe = Recipe(needed_twice=not apart)
    y, mean, var = _Convolution.apply(
        *(x.values, x.mean, x.scale, x.shift, x.rstd, weight, x.activation, x.lengths, lengths),
        *(geometry, precision, backend, recipe, apart),
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
    signal = Signal(y, *vectors, activated, lengths, rstd if apart else None)
    return signal if residual is None else join(signal, residual, activation, recipe)


def join(
    x: Signal, residual: Signal | None, activation: str | None = None, recipe: Recipe | None = None
) -> Signal:
    """activation(x + residual), computed: both [B, T, C], x a signal that is not normalised yet.

    Raises:
        ValueError, TypeError: x has been computed or has an activation of its own, or the two do not fit.
    """
    _check_signal("x", x)
    if x.mean is None or x.activation is not None:
        raise ValueError("x: accepted is a signal that is not normalised yet, without an activation")
    if residual is not None:
        _check_signal("residual", residual, tuple(x.values.shape), x.values)
        residual = _within_records(residual)
    check_choice("activation", activation, ACTIVATIONS)
    r = Signal(x.values) if residual is None else residual
    z = _Join.apply(
        *(x.values, x.mean, x.scale, x.shift, x.rstd),
        *(None if residual is None else r.values, r.mean, r.scale, r.shift, r.rstd),
        *(r.activation, activation, recipe),
    )
    return Signal(z, lengths=x.lengths)


def computed(x: Signal) -> Signal:
    """x with its normalisation and activation done."""
    return x if x.mean is None else join(dataclasses.replace(x, activation=None), None, x.activation)


def max_pool1d(x: Signal, kernel_size: int, stride: int, padding: int) -> Signal:
    """As ``torch.nn.functional.max_pool1d``, of each record alone; the backward needs nothing but x."""
    lengths = None
    if x.lengths is not None:
        lengths = ((x.lengths + 2 * padding - kernel_size) // stride + 1).clamp_min(0)
    window = kernel_size, stride, padding
    z = _MaxPool.apply(x.values, x.mean, x.scale, x.shift, x.rstd, x.activation, x.lengths, lengths, window)
    return Signal(z, lengths=lengths)


def mean_pool1d(x: Signal) -> Signal:
    """Means of two samples each, as ``AvgPool1d(2, ceil_mode=True)``: an odd last sample stays itself."""
    x = computed(x)
    values = x.values
    if x.lengths is not None:
        x = dataclasses.replace(x, lengths=check_lengths(x.lengths, values))
        valid = validity(x.lengths, values.shape[1])
        assert valid is not None
        values = torch.where(valid, values, 0.0)
    if values.shape[1] % 2:
        values = F.pad(values, (0, 0, 0, 1))
    pooled = values[:, ::2] + values[:, 1::2]
    half = torch.full((pooled.shape[1],), 0.5, dtype=pooled.dtype, device=pooled.device)
    if x.lengths is None:
        if x.values.shape[1] % 2:
            half[-1] = 1.0
        return Signal(pooled * half[:, None])
    pair = torch.arange(pooled.shape[1], device=pooled.device)
    whole = pair < (x.lengths // 2)[:, None]
    return Signal(torch.where(whole[:, :, None], pooled * 0.5, pooled), lengths=(x.lengths + 1) // 2)


def _check_signal(
    name: str, given: object, shape: tuple[int, ...] | None = None, like: Tensor | None = None
) -> None:
    if not isinstance(given, Signal):
        raise TypeError(f"{name}: got {type(given).__name__}, accepted is a Signal")
    if shape is not None and tuple(given.values.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(given.values.shape)}, accepted is {shape}")
    if like is not None and given.values.device != like.device:
        raise ValueError(f"{name}: got device {given.values.device}, accepted is that of x, {like.device}")


def _within_records(residual: Signal) -> Signal:
    """0 beyond the records' ends: what lies there may be NaN, which a gradient of 0 would not undo."""
    if residual.lengths is None:
        return residual
    residual = computed(residual)
    lengths = check_lengths(residual.lengths, residual.values)
    valid = validity(lengths, residual.values.shape[1])
    assert valid is not None
    return Signal(torch.where(valid, residual.values, 0.0))


def _check_norm(weight: Tensor, **vectors: Tensor | None) -> None:
    for name, given in vectors.items():
        if given is None and not name.startswith("running_"):
            raise TypeError(f"{name}: got None, accepted is a torch.Tensor")
        if given is not None and given.shape != weight.shape[:1]:
            raise ValueError(f"{name}: got shape {tuple(given.shape)}, accepted is ({weight.shape[0]},)")


def _evaluated(
    x: Signal,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    geometry: Geometry,
    residual: Signal | None,
    activation: str | None,
    precision: str,
    backend: str,
) -> Tensor:
    dtype = weight.dtype
    kind = torch.promote_types(dtype, torch.float32)
    scale = gamma.to(kind) * torch.rsqrt(var.to(kind) + eps)
    x = computed(x)
    return conv1d(
        x.values,
        weight,
        stride=geometry.stride,
        padding=geometry.paddings,
        dilation=geometry.dilation,
        groups=geometry.groups,
        scale=scale,
        shift=beta.to(kind) - mean.to(kind) * scale,
        residual=None if residual is None else computed(residual).values.to(dtype),
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
        recipe: Recipe | None,
        apart: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        def make(
            values: Tensor, mean: Any, scale: Any, shift: Any, _: Any, weight: Tensor, ends: Any
        ) -> Tensor:
            x = Signal(values, mean, scale, shift, activation, ends)
            return forward(x, weight, geometry, precision=precision, backend=backend)[0]

        x = Signal(values, mean, scale, shift, activation, x_lengths)
        y, y_mean, y_var = forward(
            x, weight, geometry, statistics=True, lengths=lengths, precision=precision, backend=backend
        )
        inputs = (values, mean, scale, shift, rstd, weight, x_lengths)
        if recipe is not None:
            recipe.make, recipe.inputs = make, inputs
        ctx.save_for_backward(*inputs, lengths, y_mean, None if apart or recipe is not None else y)
        ctx.settings = activation, geometry, precision, backend, recipe, apart
        return y, y_mean, y_var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, lengths, y_mean, y = ctx.saved_tensors
        values, mean, scale, shift, rstd, weight, x_lengths = inputs
        activation, geometry, precision, backend, recipe, apart = ctx.settings
        needs_x, needs_mean, needs_scale, needs_shift, _, needs_weight = ctx.needs_input_grad[:6]
        grad = grad.contiguous()
        if apart:
            whole = OutputGradient(grad)
        else:
            y = y if recipe is None else recipe.take(inputs)
            count = y.shape[0] * y.shape[1] if lengths is None else lengths.sum()
            whole = OutputGradient(grad, y, y_mean, grad_mean / count, 2 * grad_var / count, lengths)
        grad_x, grad_shift, grad_scale, grad_weight = gradients(
            whole,
            weight,
            geometry,
            Signal(values, mean, scale, shift, activation, x_lengths, rstd),
            needs_x or (scale is not None and (needs_scale or needs_shift)),
            needs_weight,
            precision=precision,
            backend=backend,
        )
        grad_x_mean = -scale * grad_shift if grad_shift is not None and needs_mean else None
        return grad_x, grad_x_mean, grad_scale, grad_shift, None, grad_weight, *[None] * 8


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
        recipe: Recipe | None,
    ) -> Tensor:
        run = _join_operator if torch.compiler.is_compiling() else _joined
        z = run(y, mean, scale, shift, r, r_mean, r_scale, r_shift, r_activation, activation)
        r_needed = r_mean is not None or activation in ("gelu", "silu")
        ctx.save_for_backward(
            *(y if recipe is None else None, mean, scale, shift, rstd),
            *(r if r_needed else None, r_mean, r_scale, r_shift, r_rstd),
            z if activation == "relu" else None,
            *(() if recipe is None else recipe.inputs),
        )
        ctx.settings = r is not None, r_activation, activation, recipe
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, mean, scale, shift, rstd, r, r_mean, r_scale, r_shift, r_rstd, z, *inputs = ctx.saved_tensors
        has_residual, r_activation, activation, recipe = ctx.settings
        if recipe is not None:
            y = recipe.leave(inputs)
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


class _MaxPool(torch.autograd.Function):
    """Keeps neither the activation nor torch's int64 indices: both are computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        mean: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        rstd: Tensor | None,
        activation: str | None,
        x_lengths: Tensor | None,
        lengths: Tensor | None,
        window: tuple[int, int, int],
    ) -> Tensor:
        ctx.save_for_backward(values, mean, scale, shift, rstd, x_lengths, lengths)
        ctx.settings = activation, window
        h = _torch_conv1d.read(Signal(values, mean, scale, shift, activation))
        return _pooled(h, x_lengths, lengths, window)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, mean, scale, shift, rstd, x_lengths, lengths = ctx.saved_tensors
        activation, window = ctx.settings
        x = Signal(values, mean, scale, shift, activation, x_lengths, rstd)
        h = _torch_conv1d.read(dataclasses.replace(x, lengths=None))
        grad_h = _pooled_gradient(grad, h, x_lengths, lengths, window)
        if mean is None or scale is None:
            return grad_h, *[None] * 9
        grad_x, grad_shift, grad_scale = _torch_conv1d.normalized_gradients(grad_h, h, x)
        grad_mean = -scale * grad_shift if rstd is None else None
        return grad_x, grad_mean, grad_scale, grad_shift, *[None] * 6


def _pooled(
    h: Tensor, x_lengths: Tensor | None, lengths: Tensor | None, window: tuple[int, int, int]
) -> Tensor:
    z, _ = F.max_pool2d_with_indices(_pooled_image(h, x_lengths), *_pooling(window))
    valid = validity(lengths, z.shape[3])
    z = _torch_conv1d.as_signal(z)
    # A window may lie in the padding and beyond the end alone; it has no maximum.
    return z if valid is None else torch.where(valid & (z > -torch.inf), z, 0.0)


def _pooled_gradient(
    grad: Tensor, h: Tensor, x_lengths: Tensor | None, lengths: Tensor | None, window: tuple[int, int, int]
) -> Tensor:
    """The gradient in h [B, T, C] from that in the pooled signal."""
    valid = validity(lengths, grad.shape[1])
    grad = grad if valid is None else torch.where(valid, grad, 0.0)
    image, sizes = _pooled_image(h, x_lengths), _pooling(window)
    _, indices = F.max_pool2d_with_indices(image, *sizes)
    grad_image = torch.ops.aten.max_pool2d_with_indices_backward(
        _torch_conv1d.as_image(grad), image, *sizes, [1, 1], False, indices
    )
    grad_h = _torch_conv1d.as_signal(grad_image)
    valid = validity(x_lengths, h.shape[1])
    return grad_h if valid is None else torch.where(valid, grad_h, 0.0)


def _pooled_image(h: Tensor, x_lengths: Tensor | None) -> Tensor:
    """What is pooled: an image of h that has no maximum beyond the records' ends."""
    valid = validity(x_lengths, h.shape[1])
    return _torch_conv1d.as_image(h if valid is None else torch.where(valid, h, -torch.inf))


def _pooling(window: tuple[int, int, int]) -> tuple[list[int], list[int], list[int]]:
    kernel_size, stride, padding = window
    return [1, kernel_size], [1, stride], [0, padding]


# --- registered operators -----------------------------------------------------------------------------------


def _joined(
    y: Tensor,
    mean: Tensor,
    scale: Tensor,
    shift: Tensor,
    r: Tensor | None,
    r_mean: Tensor | None,
    r_scale: Tensor | None,
    r_shift: Tensor | None,
    r_activation: str | None,
    activation: str | None,
) -> Tensor:
    residual = None if r is None else Signal(r, r_mean, r_scale, r_shift, r_activation)
    x = Signal(y, mean, scale, shift)
    if use_triton(y) and y.dtype != torch.float64:
        from ecgot.kernels import _triton_conv1d

        return _triton_conv1d.join(x, residual, activation)
    return _torch_conv1d.join(x, residual, activation).contiguous()


_join_operator = torch.library.custom_op("ecgot::join", _joined, mutates_args=())


@_join_operator.register_fake
def _(y: Tensor, *others: Any) -> Tensor:
    return y.new_empty(y.shape)


def _join_gradients(
    grad: Tensor,
    z: Tensor | None,
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
    has_residual: bool,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in y and r [B, T, C] (empty without one), and [4, C] in y's shift, scale and r's."""
    # Where the residual's values are not needed, y stands in for them.
    residual = None
    if has_residual:
        residual = Signal(y if r is None else r, r_mean, r_scale, r_shift, r_activation, rstd=r_rstd)
    x = Signal(y, mean, scale, shift, rstd=rstd)
    if use_triton(y) and y.dtype != torch.float64:
        from ecgot.kernels import _triton_conv1d

        grad_y, grad_r, sums = _triton_conv1d.join_gradient(grad, z, x, residual, activation)
    else:
        grad_y, grad_r, sums = _torch_conv1d.join_gradient(grad, z, x, residual, activation)
    grad_r = y.new_empty(0) if grad_r is None else grad_r.contiguous()
    return grad_y.contiguous(), grad_r.clone() if grad_r is grad else grad_r, sums


_join_gradient_operator = torch.library.custom_op("ecgot::join_gradient", _join_gradients, mutates_args=())


@_join_gradient_operator.register_fake
def _(grad: Tensor, z: Any, y: Tensor, mean: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    has_residual = others[-2]
    return y.new_empty(y.shape), y.new_empty(y.shape if has_residual else (0,)), mean.new_empty(4, len(mean))
