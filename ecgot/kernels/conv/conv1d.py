"""Fused channels-last 1-D convolution.

As an implicit matrix product (Chetlur et al. 2014, "cuDNN: Efficient Primitives for Deep Learning") with what
follows it in the epilogue; see ``triton_conv1d`` for the kernels and ``torch_conv1d`` for the vendor's.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ecgot.kernels.conv import torch_conv1d
from ecgot.kernels.conv.backends import choose
from ecgot.kernels.conv.checks import cast_by_autocast, check_conv1d, check_lengths, checked_settings
from ecgot.kernels.conv.operands import Epilogue, LazyActivation, OutputGradient, Settings
from ecgot.kernels.conv.operators import forward, gradients


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

    With a batch norm fused into scale and shift, this is a residual network's whole layer at inference.

    Args:
        x: [B, T, C_in], floating point, any strides: a loader's [B, C_in, T] goes in as ``x.transpose(1, 2)``
            without a copy.
        weight: [C_out, C_in / groups, K], as in ``torch.nn.Conv1d``; same dtype as x.
        bias, scale, shift: [C_out]. Beside x in half precision, scale and shift may be fp32, and should be
            where channels have means far from 0: they are not rounded.
        stride, padding, dilation, groups: as in ``torch.nn.functional.conv1d``; padding is zeros on both
            sides, or a pair of counts for the left and the right.
        residual: [B, T_out, C_out].
        activation: None, "relu", "gelu" (the exact one) or "silu".
        lengths: [B], integers, samples of each record. Positions past each length read as 0, even if NaN.
        precision: of fp32 products on a GPU: "fp32" (three TF32 products), "tf32" (one) or "ieee"
            (multiply-adds). The vendor's library multiplies in fp32 for all but "tf32", whatever torch's
            settings are.
        backend: "triton", "torch" (the vendor's library on a GPU), or "auto", see
            :func:`ecgot.kernels.conv1d_backends`. fp64 and CPU tensors always go to torch, except in Triton's
            interpreter.

    Returns:
        [B, T_out, C_out] in the dtype of x, T_out = (T + both paddings - dilation (K - 1) - 1) // stride + 1.
        Past a record's end it holds what zeros give. Differentiable in every floating-point tensor.

    Raises:
        ValueError, TypeError: one line that names the argument, what is expected and what came.

    Under autocast everything but scale and shift is cast, as torch's convolutions and norms do.
    In Triton one kernel does all of it and accumulates in fp32 (fp64 takes the torch path). The gradients in
    x and weight are one kernel each, without atomics: the same input gives the same bits. On a CPU the torch
    path runs, unless TRITON_INTERPRET=1 is set.

    >>> x = torch.arange(5.0).reshape(1, 5, 1)  # one record, five samples, one channel
    >>> weight = torch.tensor([[[-1.0, 0.0, 1.0]]])
    >>> conv1d(x, weight, padding=1).flatten()
    tensor([ 1.,  2.,  2.,  2., -3.])
    >>> conv1d(x, weight, padding=1, stride=2, activation="relu").flatten()
    tensor([1., 2., 0.])
    """
    x, weight, bias, residual = cast_by_autocast(x, weight, bias, residual)
    settings = checked_settings(stride, padding, dilation, groups, precision, backend)
    epilogue = Epilogue(bias, scale, shift, residual, activation)
    check_conv1d(x, weight, settings.geometry, epilogue)
    lengths = check_lengths(lengths, x)
    on_kernels = choose("forward", x, weight, settings.geometry, backend) == "triton"
    if on_kernels or torch_conv1d.rounds_products(x):  # a backward of torch's own would round as it likes
        call = _Call(settings, activation)
        return _Convolution.apply(call, x, weight, lengths, *epilogue.tensors())
    # Torch's own autograd differentiates the torch path, twice if need be.
    return torch_conv1d.fused(LazyActivation(x, lengths=lengths), weight, settings.geometry, epilogue)


class _Call(NamedTuple):
    settings: Settings
    activation: str | None


class _Convolution(torch.autograd.Function):
    """The kernels, and the library in fp32 on a GPU. Saves its inputs, and its output where it is ReLU's."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, x: Tensor, weight: Tensor, lengths: Tensor | None, *of_epilogue: Tensor | None
    ) -> Tensor:
        bias, scale, shift, residual = of_epilogue
        epilogue = Epilogue(bias, scale, shift, residual, call.activation)
        y, _, _ = forward(LazyActivation(x, lengths=lengths), weight, call.settings, epilogue)
        # ReLU's derivative is read off its output. GELU and SiLU need the pre-activation, which is
        # recomputed, as is the convolution for the gradient in scale.
        smooth = call.activation in ("gelu", "silu")
        output = y if call.activation == "relu" else None
        ctx.save_for_backward(x, weight, lengths, bias, scale, shift, residual if smooth else None, output)
        ctx.call = call
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lengths, bias, scale, shift, residual, output = ctx.saved_tensors
        settings, activation = ctx.call
        _, needs_x, needs_weight, _, needs_bias, needs_scale, needs_shift, needs_residual = (
            ctx.needs_input_grad
        )
        signal = LazyActivation(x, lengths=lengths)
        if activation == "relu":
            grad = torch.ops.aten.threshold_backward(grad, output, 0)  # as torch treats NaN and infinity
        elif activation is not None:
            before, _, _ = forward(signal, weight, settings, Epilogue(bias, scale, shift, residual))
            grad = grad * torch_conv1d.slope(before, activation)
        grad_residual = grad if needs_residual else None
        grad_shift = grad.sum((0, 1)).to(shift.dtype) if needs_shift else None
        grad_scale = None
        if needs_scale:
            convolved, _, _ = forward(signal, weight, settings, Epilogue(bias))
            grad_scale = (grad * convolved).sum((0, 1)).to(scale.dtype)
        if scale is not None:
            grad = (grad * scale).to(grad.dtype)
        grad_bias = grad.sum((0, 1)) if needs_bias else None
        if lengths is not None:
            lengths = settings.geometry.output_length(lengths, weight.shape[2])
        whole = OutputGradient(grad, lengths=lengths)
        (grad_x, *_), grad_weight = gradients(whole, weight, settings, signal, (needs_x, needs_weight))
        return None, grad_x, grad_weight, None, grad_bias, grad_scale, grad_shift, grad_residual
