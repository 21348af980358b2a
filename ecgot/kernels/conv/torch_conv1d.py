"""The functions of ``triton_conv1d`` and ``triton_join`` in torch: for CPUs, fp64, and where the vendor wins.

The trick: [B, T, C] is a channels-last image of height 1. That is the fastest layout of oneDNN and cuDNN, and
activations are in it already, so nothing is copied.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ecgot.kernels.conv.geometry import Geometry, fill_past
from ecgot.kernels.conv.operands import PLAIN, Epilogue, LazyActivation, OutputGradient
from ecgot.kernels.lengths import length_mask


def rounds_products(x: Tensor) -> bool:
    """Whether the library may round products of x to TF32."""
    return x.is_cuda and x.dtype == torch.float32


@contextlib.contextmanager
def library_precision(x: Tensor, precision: str) -> Iterator[None]:
    """Within this context cuDNN makes fp32 products of x in TF32 only for precision "tf32".

    Its default is TF32. The setting is of the whole process; it is put back, and only eager code enters here.
    """
    if not rounds_products(x):
        yield
        return
    new = hasattr(torch.backends.cudnn, "conv")  # torch refuses a mixture of its old and its new setting
    owner: Any = torch.backends.cudnn.conv if new else torch.backends.cudnn  # type: ignore[attr-defined]
    name, on, off = ("fp32_precision", "tf32", "ieee") if new else ("allow_tf32", True, False)
    before = getattr(owner, name)
    setattr(owner, name, on if precision == "tf32" else off)
    try:
        yield
    finally:
        setattr(owner, name, before)


def convolve(
    x: LazyActivation,
    weight: Tensor,
    geometry: Geometry,
    epilogue: Epilogue = PLAIN,
    *,
    statistics: bool = False,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y [B, T_out, C_out]; with statistics its mean and biased variance [C_out] over all valid samples.

    lengths [B]: of the output, given where x has lengths.
    """
    y = convolution(read(x), weight, geometry)
    y = finished(y, epilogue)
    return (y, *moments(y, lengths)) if statistics else (y, None, None)


def fused(x: LazyActivation, weight: Tensor, geometry: Geometry, epilogue: Epilogue) -> Tensor:
    """y [B, T_out, C_out] with torch's autograd; the scale goes into the weight and so costs no pass."""
    scale, bias, shift = epilogue.scale, epilogue.bias, epilogue.shift
    # In half precision the product with the weight would be rounded, and so would an fp32 shift.
    if weight.dtype.itemsize == 2 and (scale is not None or shift is not None):
        return finished(convolution(read(x), weight, geometry), epilogue)
    if scale is not None:
        weight = weight * scale[:, None, None]
        bias = None if bias is None else bias * scale
    offset = shift if bias is None else bias if shift is None else bias + shift
    y = convolution(read(x), weight, geometry, offset)
    if epilogue.residual is not None:
        y = y.add_(epilogue.residual)
    return activated(y, epilogue.activation)


def gradients(
    grad: OutputGradient,
    weight: Tensor,
    geometry: Geometry,
    x: LazyActivation,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in x.values [B, T, C_in], its shift and scale [C_in] (if normalised), and the weight."""
    if not (needs_x or needs_weight):
        return None, None, None, None
    h = read(x)
    grad_h, grad_weight = _convolution_gradients(_whole(grad), h, weight, geometry, needs_x, needs_weight)
    if grad_h is None:
        return None, None, None, grad_weight
    grad_h = fill_past(grad_h, x.lengths)
    if x.mean is None:
        return grad_h, None, None, grad_weight
    return *normalized_gradients(grad_h, h, x), grad_weight


def join(y: LazyActivation, residual: LazyActivation | None, activation: str | None) -> Tensor:
    """z [B, T, C] = act(normalised y + residual)."""
    z = normalized(y)
    if residual is not None:
        z = z.add_(read(residual))
    return activated(z, activation)


def join_gradient(
    g: Tensor, z: Tensor | None, y: LazyActivation, residual: LazyActivation | None, activation: str | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of a join from that in z, see :func:`ecgot.kernels.conv.operators.join_gradients`."""
    if activation == "relu":
        g = torch.ops.aten.threshold_backward(g, z, 0)
    elif activation is not None:
        value = normalized(y)
        g = g * slope(value if residual is None else value + read(residual), activation)
    grad_y, shift, scale = _affine_gradients(g, y)
    if residual is None or residual.mean is None:
        return grad_y, None if residual is None else g, torch.stack([shift, scale, shift, scale])
    relu = residual.activation == "relu"
    mine = g.clone() if activation is None and relu else g
    grad_r, r_shift, r_scale = normalized_gradients(mine, read(residual) if relu else None, residual)
    return grad_y, grad_r, torch.stack([shift, scale, r_shift, r_scale])


# --- pieces -------------------------------------------------------------------------------------------------


def read(x: LazyActivation) -> Tensor:
    """x materialized [B, T, C], 0 past each length."""
    return fill_past(x.values if x.mean is None else activated(normalized(x), x.activation), x.lengths)


def normalized(x: LazyActivation) -> Tensor:
    """(values - mean) * scale + shift, a new tensor."""
    assert x.mean is not None
    assert x.scale is not None
    assert x.shift is not None
    if x.values.dtype == x.mean.dtype:
        return torch.addcmul(x.shift - x.mean * x.scale, x.values, x.scale)  # one pass, as torch's batch norm
    image, one = as_image(x.values), torch.ones_like(x.mean)
    return as_signal(torch.native_batch_norm(image, x.scale, x.shift, x.mean, one, False, 0.0, 0.0)[0])


def moments(y: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of y [B, T, C] over the samples inside each length; zeros without any."""
    kind = torch.promote_types(y.dtype, torch.float32)
    if lengths is None and y.shape[0] and y.device.type == "cpu":
        # Many times faster than var_mean, which reads memory across the channels. Half precision is widened
        # first, or its statistics would be rounded.
        mean, var = torch.batch_norm_update_stats(as_image(y.to(kind)), None, None, 0.0)
        return mean, var
    wide = y.to(kind)
    if lengths is None:
        samples = max(1, y.shape[0] * y.shape[1])
        mean = wide.sum((0, 1)) / samples
        return mean, (wide - mean).square().sum((0, 1)) / samples
    valid = length_mask(lengths, y.shape[1])[:, :, None]
    count = valid.sum().clamp_min(1)
    mean = torch.where(valid, wide, 0.0).sum((0, 1)) / count
    return mean, torch.where(valid, wide - mean, 0.0).square().sum((0, 1)) / count


def as_image(x: Tensor) -> Tensor:
    """[B, T, C] as a channels-last image [B, C, 1, T]: a view."""
    return x.permute(0, 2, 1).unsqueeze(2)


def as_signal(image: Tensor) -> Tensor:
    """An image [B, C, 1, T] as [B, T, C]: a view."""
    return image.squeeze(2).permute(0, 2, 1)


def convolution(x: Tensor, weight: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
    """The convolution alone, [B, T, C_in] to [B, T_out, C_out]."""
    padding = geometry.padding
    if _pads_outside(weight, geometry):
        x, padding = F.pad(x, (0, 0, *geometry.paddings)), 0
    layout = _layout(x, weight, geometry)
    kernel = weight.unsqueeze(2).contiguous(memory_format=layout)
    stride, dilation = (1, geometry.stride), (1, geometry.dilation)
    # oneDNN's dilated convolution with bias has crashed where a whole window lies in the padding.
    within = None if geometry.dilation > 1 else bias
    image = F.conv2d(
        _in_layout(as_image(x), layout), kernel, within, stride, (0, padding), dilation, geometry.groups
    )
    y = as_signal(image).contiguous()
    return y if bias is None or within is not None else y + bias


def finished(y: Tensor, epilogue: Epilogue) -> Tensor:
    """act(scale * (y + bias) + shift + residual), in y's dtype; a scale and shift in fp32 widen the sums."""
    dtype = y.dtype
    if epilogue.bias is not None:
        y = y + epilogue.bias
    if epilogue.scale is not None:
        y = y * epilogue.scale
    if epilogue.shift is not None:
        y = y + epilogue.shift
    if epilogue.residual is not None:
        y = y + epilogue.residual
    return (y if epilogue.activation is None else _ACTIVATIONS[epilogue.activation](y)).to(dtype)


def activated(y: Tensor, activation: str | None) -> Tensor:
    """act(y), in place where torch can: nothing else holds y."""
    if activation is None:
        return y
    if activation == "silu" and not torch.is_grad_enabled():
        return F.silu(y, inplace=True)
    return torch.relu_(y) if activation == "relu" else _ACTIVATIONS[activation](y)


_ACTIVATIONS = {"relu": torch.relu, "gelu": F.gelu, "silu": F.silu}


def slope(z: Tensor, activation: str) -> Tensor:
    """The derivative of GELU or SiLU at z."""
    if activation == "silu":
        gate = torch.sigmoid(z)
        return gate * (1 + z * (1 - gate))
    density = torch.exp(-z.square() / 2) * 0.3989422804014327  # 1 / sqrt(2 pi)
    return (1 + torch.erf(z * 0.7071067811865476)) / 2 + z * density


def _whole(grad: OutputGradient) -> Tensor:
    """The gradient in y [B, T_out, C_out], including what comes through its statistics."""
    g = grad.g
    if grad.y is not None:
        assert grad.mean is not None
        assert grad.c0 is not None
        assert grad.c1 is not None
        through = torch.addcmul(grad.c0 - grad.c1 * grad.mean, grad.y.to(grad.c1.dtype), grad.c1)
        g = through.add_(g).to(g.dtype)
    return fill_past(g, grad.lengths)


def normalized_gradients(grad: Tensor, h: Tensor | None, x: LazyActivation) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in x's values [B, T, C], shift and scale [C] from that in h, which is x materialized.

    Overwrites grad. h is read only where the activation is ReLU.
    """
    if x.activation == "relu":
        grad = torch.ops.aten.threshold_backward.grad_input(grad, h, 0, grad_input=grad)
    elif x.activation is not None:
        grad = grad * slope(normalized(x), x.activation)
    return _affine_gradients(grad, x)


def _affine_gradients(g: Tensor, x: LazyActivation) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in values, shift and scale from that in (values - mean) * scale + shift."""
    assert x.mean is not None
    assert x.scale is not None
    if g.numel() == 0:
        return torch.zeros_like(g), torch.zeros_like(x.mean), torch.zeros_like(x.mean)
    images = as_image(g), as_image(x.values)
    if x.rstd is not None:
        grad_x, gamma, shift = torch.ops.aten.native_batch_norm_backward(
            *images, x.scale / x.rstd, None, None, x.mean, x.rstd, True, 0.0, [True, True, True]
        )
        return as_signal(grad_x), shift, gamma / x.rstd
    # A batch norm in evaluation mode is this affine map, and its backward reads memory once.
    grad_x, scale, shift = torch.ops.aten.native_batch_norm_backward(
        *images, x.scale, x.mean, torch.ones_like(x.mean), None, None, False, 0.0, [True, True, True]
    )
    return as_signal(grad_x), shift, scale


def _layout(x: Tensor, weight: Tensor, geometry: Geometry) -> torch.memory_format:
    """Channels-last, except on a CPU for wide weights over few samples, where oneDNN is slower at it."""
    samples = x.shape[0] * x.shape[1] // geometry.stride
    few = x.device.type == "cpu" and 4 * samples <= min(weight.shape[:2])
    return torch.contiguous_format if few else torch.channels_last


def _in_layout(image: Tensor, layout: torch.memory_format) -> Tensor:
    return image.contiguous() if layout == torch.contiguous_format else image


def _pads_outside(weight: Tensor, geometry: Geometry) -> bool:
    """Whether to pad x explicitly: where the two sides differ, and beyond "same" padding, where oneDNN has
    crashed and has returned garbage and wrong weight gradients."""
    start, end = geometry.paddings
    return start != end or (start > 0 and (geometry.dilation > 1 or start > weight.shape[2] // 2))


def _convolution_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, needs_x: bool, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    if grad.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(weight)
    length, padding, cut = x.shape[1], geometry.padding, 0
    if _pads_outside(weight, geometry):
        x, padding, cut = F.pad(x, (0, 0, *geometry.paddings)), 0, padding
    layout = _layout(x, weight, geometry)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        _in_layout(as_image(grad), layout),
        _in_layout(as_image(x), layout),
        weight.unsqueeze(2).contiguous(memory_format=layout),
        None,
        [1, geometry.stride],
        [0, padding],
        [1, geometry.dilation],
        False,
        [0, 0],
        geometry.groups,
        [needs_x, needs_weight, False],
    )
    return (
        as_signal(grad_x)[:, cut : cut + length] if needs_x else None,
        grad_weight.squeeze(2) if needs_weight else None,
    )
