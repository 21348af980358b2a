"""Fused channels-last 1-D convolution: the public function, its registered operator and the torch path."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ecgot.kernels.dispatch import use_triton

ACTIVATIONS = (None, "relu", "gelu", "silu")


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """y = activation(scale * (conv(x) + bias) + shift + residual), channels-last.

    With scale and shift folded from a batch norm, this is a residual network's whole layer at inference.

    Args:
        x: [B, T, C_in], floating point, any strides.
        weight: [C_out, C_in, K], as in ``torch.nn.Conv1d``; same dtype as x.
        bias, scale, shift: [C_out].
        stride, padding, dilation: as in ``torch.nn.functional.conv1d``; zeros are padded on both sides.
        residual: [B, T_out, C_out].
        activation: None, "relu", "gelu" (the exact one) or "silu".

    Returns:
        [B, T_out, C_out], T_out = (T + 2 padding - dilation (K - 1) - 1) // stride + 1, in the dtype of x.
        Differentiable in every tensor argument.

    Raises:
        ValueError, TypeError: one line that names the argument, what came and what is accepted.

    Under autocast all tensors are cast, as torch's convolutions are.
    On CUDA one Triton kernel does all of it, accumulating in fp32 (fp64 takes the torch path); the backward
    uses torch's convolutions. On a CPU the torch path serves, unless TRITON_INTERPRET=1 is set.
    """
    x, weight, bias, scale, shift, residual = _autocast(x, weight, bias, scale, shift, residual)
    _check(x, weight, bias, stride, padding, dilation, scale, shift, residual, activation)
    if use_triton(x) and x.dtype != torch.float64:
        return _conv1d_fwd_op(x, weight, bias, stride, padding, dilation, scale, shift, residual, activation)
    y = _convolve(x, weight, bias, stride, padding, dilation)
    return _activated(_affine(y, scale, shift, residual), activation)


def _autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where it is on; fp64 stays, as in torch."""
    device = next((t.device.type for t in tensors if isinstance(t, Tensor)), "cpu")
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> None:
    for name, given in (("x", x), ("weight", weight)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name}: got {type(given).__name__}, accepted is a torch.Tensor")
    if x.dim() != 3 or 0 in x.shape[1:]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, accepted is [B, T, C_in] with T and C_in >= 1")
    if not x.is_floating_point():
        raise TypeError(f"x: got dtype {x.dtype}, accepted is floating point")
    if weight.dim() != 3 or weight.shape[1] != x.shape[2] or 0 in weight.shape:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, accepted is [C_out, {x.shape[2]}, K], C_out and K >= 1"
        )
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: got {value!r}, accepted is an integer >= {least}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, accepted are None, 'relu', 'gelu' and 'silu'")
    c_out, _, k = weight.shape
    t_out = (x.shape[1] + 2 * padding - dilation * (k - 1) - 1) // stride + 1
    if t_out < 1:
        shortest = dilation * (k - 1) + 1 - 2 * padding
        raise ValueError(f"x: got T = {x.shape[1]}, accepted is at least {shortest} for this kernel")
    shapes = {"bias": (c_out,), "scale": (c_out,), "shift": (c_out,), "residual": (x.shape[0], t_out, c_out)}
    tensors = {"weight": weight, "bias": bias, "scale": scale, "shift": shift, "residual": residual}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, accepted is a torch.Tensor")
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, accepted is {shapes[name]}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: got device {tensor.device}, accepted is that of x, {x.device}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, accepted is that of x, {x.dtype}")


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, dilation: int
) -> Tensor:
    """The bare convolution in torch: [B, T, C] is a channels-last image of height 1, so nothing is copied."""
    if _pads_outside(weight, padding, dilation):
        x, padding = F.pad(x, (0, 0, padding, padding)), 0
    image = x.permute(0, 2, 1).unsqueeze(2)
    kernel = weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
    # The bias is added outside: oneDNN's dilated convolution with bias has crashed where a whole window lies
    # in the padding.
    y = F.conv2d(image, kernel, None, (1, stride), (0, padding), (1, dilation)).squeeze(2).permute(0, 2, 1)
    return y if bias is None else y + bias


def _pads_outside(weight: Tensor, padding: int, dilation: int) -> bool:
    """Whether to write the zeros out: beyond "same" padding, oneDNN has given wrong weight gradients, garbage
    and crashes where whole windows lie in the padding."""
    return padding > 0 and (dilation > 1 or padding > weight.shape[2] // 2)


def _affine(y: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None) -> Tensor:
    if scale is not None:
        y = y * scale
    if shift is not None:
        y = y + shift
    return y if residual is None else y + residual


def _activated(y: Tensor, activation: str | None) -> Tensor:
    if activation is None:
        return y
    return {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu}[activation](y)


# --- registered operator ------------------------------------------------------------------------------------


@torch.library.custom_op("ecgot::conv1d_fwd", mutates_args=())
def _conv1d_fwd_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    from ecgot.kernels import _triton_conv1d

    return _triton_conv1d._conv1d_fwd(
        x, weight, bias, stride, padding, dilation, scale, shift, residual, activation
    )


@_conv1d_fwd_op.register_fake
def _(x, weight, bias, stride, padding, dilation, scale, shift, residual, activation):  # type: ignore[no-untyped-def]
    c_out, _, k = weight.shape
    t_out = (x.shape[1] + 2 * padding - dilation * (k - 1) - 1) // stride + 1
    return x.new_empty(x.shape[0], t_out, c_out)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bias, ctx.stride, ctx.padding, ctx.dilation, scale, shift, residual, ctx.activation = inputs
    # ReLU's derivative is read off its output; GELU and SiLU need the pre-activation, which is recomputed
    # rather than kept, and so do nothing else but the residual.
    smooth = ctx.activation in ("gelu", "silu")
    kept_output = output if ctx.activation == "relu" else None
    ctx.save_for_backward(x, weight, bias, scale, shift, residual if smooth else None, kept_output)


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    x, weight, bias, scale, shift, residual, output = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, _, _, _, needs_scale, needs_shift, needs_residual, _ = (
        ctx.needs_input_grad
    )
    geometry = (ctx.stride, ctx.padding, ctx.dilation)
    smooth = ctx.activation in ("gelu", "silu")
    convolved = _convolve(x, weight, bias, *geometry) if smooth or needs_scale else x.new_empty(0)
    if ctx.activation == "relu":
        grad = torch.ops.aten.threshold_backward(grad, output, 0)  # as torch treats NaN and infinity
    elif smooth:
        grad = grad * _slope(_affine(convolved, scale, shift, residual), ctx.activation)
    grad_residual = grad if needs_residual else None
    grad_shift = grad.sum((0, 1)) if needs_shift else None
    grad_scale = (grad * convolved).sum((0, 1)) if needs_scale else None
    if scale is not None:
        grad = grad * scale
    grad_bias = grad.sum((0, 1)) if needs_bias else None
    grad_x, grad_weight = _convolution_backward(grad, x, weight, geometry, needs_x, needs_weight)
    return grad_x, grad_weight, grad_bias, None, None, None, grad_scale, grad_shift, grad_residual, None


_conv1d_fwd_op.register_autograd(_backward, setup_context=_setup_context)


def _slope(z: Tensor, activation: str) -> Tensor:
    """The derivative of GELU or SiLU at z."""
    if activation == "silu":
        gate = torch.sigmoid(z)
        return gate * (1 + z * (1 - gate))
    density = torch.exp(-z.square() / 2) * 0.3989422804014327  # 1 / sqrt(2 pi)
    return (1 + torch.erf(z * 0.7071067811865476)) / 2 + z * density


def _convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    geometry: tuple[int, int, int],
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    if not (needs_x or needs_weight):
        return None, None
    if grad.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(weight)
    stride, padding, dilation = geometry
    length, cut = x.shape[1], 0
    if _pads_outside(weight, padding, dilation):
        x, padding, cut = F.pad(x, (0, 0, padding, padding)), 0, padding
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad.permute(0, 2, 1).unsqueeze(2),
        x.permute(0, 2, 1).unsqueeze(2),
        weight.contiguous().unsqueeze(2),
        None,
        [1, stride],
        [0, padding],
        [1, dilation],
        False,
        [0, 0],
        1,
        [needs_x, needs_weight, False],
    )
    return (
        grad_x.squeeze(2).permute(0, 2, 1)[:, cut : cut + length] if needs_x else None,
        grad_weight.squeeze(2) if needs_weight else None,
    )
