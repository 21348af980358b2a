"""The registered operators under the public functions, and the choice of who runs them."""

from typing import Any

import torch
from torch import Tensor

from ecgot.kernels.conv import torch_conv1d
from ecgot.kernels.conv.backends import choose
from ecgot.kernels.conv.geometry import Geometry
from ecgot.kernels.conv.operands import PLAIN, Epilogue, LazyActivation, OutputGradient
from ecgot.kernels.dispatch import use_triton


def out_lengths(lengths: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Samples of each record after a convolution, as if it were alone."""
    length = geometry.length(lengths, weight.shape[2])
    assert isinstance(length, Tensor)
    return length.clamp_min(0)


# --- the two passes, wherever they run ----------------------------------------------------------------------


def forward(
    x: LazyActivation,
    weight: Tensor,
    geometry: Geometry,
    epilogue: Epilogue = PLAIN,
    *,
    statistics: bool = False,
    lengths: Tensor | None = None,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T_out, C_out], its mean and biased variance [C_out] (empty without statistics)."""
    run = _forward_operator if torch.compiler.is_compiling() else _forward
    return run(
        *(x.values, x.mean, x.scale, x.shift, x.activation, x.lengths),
        weight,
        *(geometry.stride, geometry.padding, geometry.dilation, geometry.groups, geometry.paddings[1]),
        *(epilogue.bias, epilogue.scale, epilogue.shift, epilogue.residual, epilogue.activation),
        *(statistics, lengths, precision, backend),
    )


def gradients(
    grad: OutputGradient,
    weight: Tensor,
    geometry: Geometry,
    x: LazyActivation,
    needs_x: bool,
    needs_weight: bool,
    *,
    precision: str,
    backend: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in x.values, its shift and scale (where it is normalised) and the weight."""
    run = _gradient_operator if torch.compiler.is_compiling() else _gradients
    grad_x, shift, scale, grad_weight = run(
        grad.g,
        *(grad.y, grad.mean, grad.c0, grad.c1, grad.lengths),
        weight,
        *(geometry.stride, geometry.padding, geometry.dilation, geometry.groups, geometry.paddings[1]),
        x.values,
        *(x.mean, x.scale, x.shift, x.rstd),
        *(x.activation, x.lengths),
        needs_x,
        needs_weight,
        *(precision, backend),
    )
    norm = needs_x and x.mean is not None
    return (
        grad_x if needs_x else None,
        shift if norm else None,
        scale if norm else None,
        grad_weight if needs_weight else None,
    )


# A registered operator is for torch.compile, which takes it whole; called as one it costs a CPU's small
# layers as much as their work.


def _forward(
    x: Tensor,
    x_mean: Tensor | None,
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    x_activation: str | None,
    x_lengths: Tensor | None,
    weight: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    end: int,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    statistics: bool,
    lengths: Tensor | None,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    signal = LazyActivation(x, x_mean, x_scale, x_shift, x_activation, x_lengths)
    geometry = Geometry(stride, padding, dilation, groups, end)
    epilogue = Epilogue(bias, scale, shift, residual, activation)
    given = (signal, weight, geometry, epilogue)
    if choose("forward", x, weight, geometry, backend) == "triton":
        from ecgot.kernels.conv import triton_conv1d

        y, mean, var = triton_conv1d.convolve(
            *given, statistics=statistics, lengths=lengths, precision=precision
        )
    else:
        y, mean, var = torch_conv1d.convolve(*given, statistics=statistics, lengths=lengths)
    kind = torch.promote_types(x.dtype, torch.float32)
    y = y.contiguous()
    if mean is None or var is None:
        return y, y.new_empty(0, dtype=kind), y.new_empty(0, dtype=kind)
    return y, mean, var


_forward_operator = torch.library.custom_op("ecgot::conv1d_forward", _forward, mutates_args=())


@_forward_operator.register_fake
def _(  # type: ignore[no-untyped-def]
    x,
    x_mean,
    x_scale,
    x_shift,
    x_activation,
    x_lengths,
    weight,
    stride,
    padding,
    dilation,
    groups,
    end,
    bias,
    scale,
    shift,
    residual,
    activation,
    statistics,
    lengths,
    precision,
    backend,
):
    c_out, _, k = weight.shape
    t_out = Geometry(stride, padding, dilation, groups, end).length(x.shape[1], k)
    kind = torch.promote_types(x.dtype, torch.float32)
    moments = [x.new_empty(c_out if statistics else 0, dtype=kind) for _ in range(2)]
    return x.new_empty(x.shape[0], t_out, c_out), *moments


def _gradients(
    g: Tensor,
    y: Tensor | None,
    y_mean: Tensor | None,
    c0: Tensor | None,
    c1: Tensor | None,
    y_lengths: Tensor | None,
    weight: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    end: int,
    x: Tensor,
    x_mean: Tensor | None,
    x_scale: Tensor | None,
    x_shift: Tensor | None,
    x_rstd: Tensor | None,
    x_activation: str | None,
    x_lengths: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad = OutputGradient(g, y, y_mean, c0, c1, y_lengths)
    signal = LazyActivation(x, x_mean, x_scale, x_shift, x_activation, x_lengths, x_rstd)
    geometry = Geometry(stride, padding, dilation, groups, end)
    takes = {
        what: needed and choose(what, x, weight, geometry, backend) == "triton"
        for what, needed in (("input_gradient", needs_x), ("weight_gradient", needs_weight))
    }
    # Of torch, both at once: they share what they read.
    grad_x, shift, scale, grad_weight = torch_conv1d.gradients(
        grad,
        weight,
        geometry,
        signal,
        needs_x and not takes["input_gradient"],
        needs_weight and not takes["weight_gradient"],
    )
    if any(takes.values()):
        from ecgot.kernels.conv import triton_conv1d

        if takes["input_gradient"]:
            grad_x, shift, scale = triton_conv1d.input_gradient(
                grad, weight, geometry, signal, precision=precision
            )
        if takes["weight_gradient"]:
            grad_weight = triton_conv1d.weight_gradient(
                grad, signal, geometry, weight.shape[2], precision=precision
            ).to(weight.dtype)
    kind = torch.promote_types(x.dtype, torch.float32)
    none, no_sums = x.new_empty(0), x.new_empty(0, dtype=kind)
    return (
        none if grad_x is None else grad_x.contiguous(),
        no_sums if shift is None else shift,
        no_sums.clone() if scale is None else scale,
        none.clone() if grad_weight is None else _laid_out_as(weight, grad_weight),
    )


def _laid_out_as(weight: Tensor, gradient: Tensor) -> Tensor:
    return gradient if gradient.stride() == weight.stride() else torch.empty_like(weight).copy_(gradient)


_gradient_operator = torch.library.custom_op("ecgot::conv1d_gradients", _gradients, mutates_args=())


@_gradient_operator.register_fake
def _(  # type: ignore[no-untyped-def]
    g,
    y,
    y_mean,
    c0,
    c1,
    y_lengths,
    weight,
    stride,
    padding,
    dilation,
    groups,
    end,
    x,
    x_mean,
    x_scale,
    x_shift,
    x_rstd,
    x_activation,
    x_lengths,
    needs_x,
    needs_weight,
    precision,
    backend,
):
    kind = torch.promote_types(x.dtype, torch.float32)
    sums = x.shape[2] if needs_x and x_mean is not None else 0
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        x.new_empty(sums, dtype=kind),
        x.new_empty(sums, dtype=kind),
        torch.empty_like(weight) if needs_weight else weight.new_empty(0),
    )


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
    residual = None if r is None else LazyActivation(r, r_mean, r_scale, r_shift, r_activation)
    x = LazyActivation(y, mean, scale, shift)
    if use_triton(y) and y.dtype != torch.float64:
        from ecgot.kernels.conv import triton_join

        return triton_join.join(x, residual, activation)
    return torch_conv1d.join(x, residual, activation).contiguous()


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
        residual = LazyActivation(y if r is None else r, r_mean, r_scale, r_shift, r_activation, rstd=r_rstd)
    x = LazyActivation(y, mean, scale, shift, rstd=rstd)
    if use_triton(y) and y.dtype != torch.float64:
        from ecgot.kernels.conv import triton_join

        grad_y, grad_r, sums = triton_join.join_gradient(grad, z, x, residual, activation)
    else:
        grad_y, grad_r, sums = torch_conv1d.join_gradient(grad, z, x, residual, activation)
    grad_r = y.new_empty(0) if grad_r is None else grad_r.contiguous()
    return grad_y.contiguous(), grad_r.clone() if grad_r is grad else grad_r, sums


_join_gradient_operator = torch.library.custom_op("ecgot::join_gradient", _join_gradients, mutates_args=())


@_join_gradient_operator.register_fake
def _(grad: Tensor, z: Any, y: Tensor, mean: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    has_residual = others[-2]
    return y.new_empty(y.shape), y.new_empty(y.shape if has_residual else (0,)), mean.new_empty(4, len(mean))
