"""Fused channels-last 1-D convolution."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ecgot.kernels.conv import torch_conv1d
from ecgot.kernels.conv.backends import BACKENDS, choose
from ecgot.kernels.conv.checks import PRECISIONS, cast_by_autocast, check_choice, check_conv1d, check_lengths
from ecgot.kernels.conv.geometry import Geometry
from ecgot.kernels.conv.geometry import geometry as checked_geometry
from ecgot.kernels.conv.operands import Epilogue, LazyActivation, OutputGradient
from ecgot.kernels.conv.operators import forward, gradients, out_lengths


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int = 1,
    groups: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    lengths: Tensor | None = None,
    precision: str = "fp32",
    backend: str = "auto",
) -> Tensor:
    """y = activation(scale * (conv(x) + bias) + shift + residual), channels-last.

    With scale and shift folded from a batch norm, this is a residual network's whole layer at inference.

    Args:
        x: [B, T, C_in], floating point, any strides: a loader's [B, C_in, T] comes as ``x.transpose(1, 2)``,
            uncopied.
        weight: [C_out, C_in / groups, K], as in ``torch.nn.Conv1d``; same dtype as x.
        bias, scale, shift: [C_out]; scale and shift may be fp32 where x is of half precision, and should be
            where channels have means far from 0: they are used as they come.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv1d``; zeros are padded on both
            sides, or as many as a pair says on the left and right.
        residual: [B, T_out, C_out].
        activation: None, "relu", "gelu" (the exact one) or "silu".
        lengths: [B], integers: samples of each record; what lies beyond is read as 0, whatever it is.
        precision: of fp32 products on a GPU: "fp32" (three TF32 products), "tf32" (one) or "ieee"
            (multiply-adds).
        backend: "triton", "torch" (the vendor's library on a GPU), or "auto", see
            :func:`ecgot.kernels.conv1d_backends`. fp64 and CPU tensors always go to torch, but for Triton's
            interpreter.

    Returns:
        [B, T_out, C_out] in the dtype of x, T_out = (T + both paddings - dilation (K - 1) - 1) // stride + 1;
        beyond a record's end what is made of zeros. Differentiable in every floating tensor.

    Raises:
        ValueError, TypeError: one line that names the argument, what came and what is accepted.

    Under autocast all but scale and shift are cast, as torch's convolutions and norms have it.
    In Triton one kernel does all of it, accumulating in fp32 (fp64 takes the torch path), and one kernel each
    makes the gradients in x and weight, without atomics: the same input gives the same bits. On a CPU the
    torch path serves, unless TRITON_INTERPRET=1 is set.
    """
    x, weight, bias, residual = cast_by_autocast(x, weight, bias, residual)
    geometry = checked_geometry(stride, padding, dilation, groups)
    check_conv1d(x, weight, bias, geometry, scale, shift, residual, activation)
    lengths = check_lengths(lengths, x)
    check_choice("precision", precision, PRECISIONS)
    check_choice("backend", backend, BACKENDS)
    if choose("forward", x, weight, geometry, backend) == "triton":
        settings = (geometry, activation, precision, backend)
        return _Convolution.apply(x, weight, bias, scale, shift, residual, lengths, *settings)
    # torch's own autograd serves the torch path, and may be differentiated twice.
    y = LazyActivation(x, lengths=lengths)
    return torch_conv1d.fused(y, weight, geometry, Epilogue(bias, scale, shift, residual, activation))


class _Convolution(torch.autograd.Function):
    """Of the Triton path. Nothing but the inputs is kept, and the output where its activation is ReLU."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        lengths: Tensor | None,
        geometry: Geometry,
        activation: str | None,
        precision: str,
        backend: str,
    ) -> Tensor:
        signal, epilogue = (
            LazyActivation(x, lengths=lengths),
            Epilogue(bias, scale, shift, residual, activation),
        )
        y, _, _ = forward(signal, weight, geometry, epilogue, precision=precision, backend=backend)
        # ReLU's derivative is read off its output; GELU and SiLU need the pre-activation, which is
        # recomputed, as is the convolution for the gradient in scale.
        smooth = activation in ("gelu", "silu")
        ctx.save_for_backward(
            x,
            weight,
            bias,
            scale,
            shift,
            residual if smooth else None,
            y if activation == "relu" else None,
            lengths,
        )
        ctx.settings = geometry, activation, precision, backend
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, scale, shift, residual, output, lengths = ctx.saved_tensors
        geometry, activation, precision, backend = ctx.settings
        needs_x, needs_weight, needs_bias, needs_scale, needs_shift, needs_residual = ctx.needs_input_grad[:6]
        signal = LazyActivation(x, lengths=lengths)
        smooth = activation in ("gelu", "silu")
        if activation == "relu":
            grad = torch.ops.aten.threshold_backward(grad, output, 0)  # as torch treats NaN and infinity
        elif smooth:
            before = Epilogue(bias, scale, shift, residual)
            z, _, _ = forward(signal, weight, geometry, before, precision=precision, backend=backend)
            grad = grad * torch_conv1d.slope(z, activation)
        grad_residual = grad if needs_residual else None
        grad_shift = grad.sum((0, 1)).to(shift.dtype) if needs_shift else None
        grad_scale = None
        if needs_scale:
            convolved, _, _ = forward(
                signal, weight, geometry, Epilogue(bias), precision=precision, backend=backend
            )
            grad_scale = (grad * convolved).sum((0, 1)).to(scale.dtype)
        if scale is not None:
            grad = (grad * scale).to(grad.dtype)
        grad_bias = grad.sum((0, 1)) if needs_bias else None
        grad_x, _, _, grad_weight = gradients(
            OutputGradient(grad, lengths=None if lengths is None else out_lengths(lengths, weight, geometry)),
            weight,
            geometry,
            signal,
            needs_x,
            needs_weight,
            precision=precision,
            backend=backend,
        )
        return grad_x, grad_weight, grad_bias, grad_scale, grad_shift, grad_residual, *[None] * 5
