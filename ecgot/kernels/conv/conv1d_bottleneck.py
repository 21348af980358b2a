"""A residual bottleneck at inference, with the next one's first convolution, as one kernel.

Bottlenecks: He et al. 2016, "Deep Residual Learning for Image Recognition".
"""

from typing import Any

import torch
from torch import Tensor

from ecgot.kernels.conv.checks import check_lengths, check_shapes, checked_settings, fits_dtype
from ecgot.kernels.conv.conv1d import conv1d
from ecgot.kernels.conv.geometry import Geometry
from ecgot.kernels.conv.operands import FusedLayer, Settings
from ecgot.kernels.dispatch import use_triton

Layers = tuple[FusedLayer, FusedLayer, FusedLayer | None]  # middle, wide, narrow


def conv1d_bottleneck(
    x: Tensor,
    middle: FusedLayer,
    wide: FusedLayer,
    residual: Tensor,
    narrow: FusedLayer | None = None,
    *,
    stride: int = 1,
    padding: int | tuple[int, int] = 0,
    dilation: int = 1,
    lengths: Tensor | None = None,
    precision: str = "fp32",
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """y = relu(wide(relu(middle(x))) + residual) and z = relu(narrow(y)), channels-last.

    Args:
        x: [B, T, C].
        middle: weight [M, C, K]; with stride, padding and dilation as in :func:`ecgot.kernels.conv1d`.
        wide: weight [W, M, 1].
        residual: [B, T_out, W].
        narrow: weight [N, W, 1], the next block's first convolution; None leaves z out.
        lengths, precision, backend: as in :func:`ecgot.kernels.conv1d`.

    Returns:
        y [B, T_out, W] and z [B, T_out, N] (None without ``narrow``), in the dtype of x.

    Raises:
        ValueError, TypeError: one line that names the argument, what is expected and what came.

    In Triton the inner activations stay on the chip where M and N are at most 64. Elsewhere, under
    torch.compile, and where a gradient is needed, the layers run one by one.

    >>> one, zero = torch.ones(1, 1, 1), torch.zeros(1)
    >>> middle, wide, narrow = (FusedLayer(factor * one, None, zero) for factor in (2, -3, 10))
    >>> x = torch.tensor([[[1.0], [-1.0]]])
    >>> y, z = conv1d_bottleneck(x, middle, wide, torch.full((1, 2, 1), 7.0), narrow)
    >>> y.flatten(), z.flatten()
    (tensor([1., 7.]), tensor([10., 70.]))
    """
    settings = checked_settings(stride, padding, dilation, 1, precision, backend)
    layers = (middle, wide, narrow)
    _check(x, layers, residual, settings.geometry)
    if not _runs_as_one(x, layers, residual, backend):
        return _one_by_one(x, layers, residual, settings, lengths)
    from ecgot.kernels.conv import triton_bottleneck

    lengths = check_lengths(lengths, x)
    return triton_bottleneck.bottleneck(
        x, middle, wide, narrow, residual, settings.geometry, lengths, precision
    )


def _check(x: Tensor, layers: Layers, residual: Tensor, geometry: Geometry) -> None:
    middle, wide, narrow = layers
    t_out = check_shapes(x, middle.weight, geometry)
    inputs = {"wide": (wide, middle.weight.shape[0]), "narrow": (narrow, wide.weight.shape[0])}
    for name, (layer, c_in) in inputs.items():
        if layer is not None and tuple(layer.weight.shape[1:]) != (c_in, 1):
            got = tuple(layer.weight.shape)
            raise ValueError(f"{name}.weight: expected [C_out, {c_in}, 1], got shape {got}")
    for name, layer in (("middle", middle), ("wide", wide), ("narrow", narrow)):
        if layer is not None:
            _check_layer(name, layer, x)
            if (layer.scale is None) != (middle.scale is None):
                given = "none" if layer.scale is None else "one"
                raise ValueError(f"{name}.scale: expected one for every layer or for none, got {given}")
    shape = (x.shape[0], t_out, wide.weight.shape[0])
    if tuple(residual.shape) != shape:
        raise ValueError(f"residual: expected shape {shape}, got {tuple(residual.shape)}")
    if residual.dtype != x.dtype:
        raise TypeError(f"residual: expected the dtype of x, {x.dtype}, got {residual.dtype}")


def _check_layer(name: str, layer: FusedLayer, x: Tensor) -> None:
    """That a layer's vectors fit its weight, and all three x's dtype."""
    for part, tensor in (("weight", layer.weight), ("scale", layer.scale), ("shift", layer.shift)):
        if tensor is None:
            continue
        if part != "weight" and tensor.shape != layer.weight.shape[:1]:
            got, expected = tuple(tensor.shape), (layer.weight.shape[0],)
            raise ValueError(f"{name}.{part}: expected shape {expected}, got {got}")
        if not fits_dtype(part, tensor, x):
            raise TypeError(f"{name}.{part}: expected the dtype of x, {x.dtype}, got {tensor.dtype}")


def _runs_as_one(x: Tensor, layers: Layers, residual: Tensor, backend: str) -> bool:
    given = [x, residual, *(t for layer in layers if layer is not None for t in layer if t is not None)]
    if backend == "torch" or x.dtype == torch.float64 or not use_triton(*given):
        return False
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
        return False
    from ecgot.kernels.conv import triton_bottleneck

    middle, _, narrow = layers
    return triton_bottleneck.fits(middle, narrow)


def _one_by_one(
    x: Tensor, layers: Layers, residual: Tensor, settings: Settings, lengths: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    middle, wide, narrow = layers
    geometry = settings.geometry
    how: dict[str, Any] = {"activation": "relu", "precision": settings.precision, "backend": settings.backend}

    def pointwise(x: Tensor, layer: FusedLayer, residual: Tensor | None = None) -> Tensor:
        return conv1d(x, layer.weight, scale=layer.scale, shift=layer.shift, residual=residual, **how)

    y = conv1d(
        x,
        middle.weight,
        stride=geometry.stride,
        padding=geometry.paddings,
        dilation=geometry.dilation,
        scale=middle.scale,
        shift=middle.shift,
        lengths=lengths,
        **how,
    )
    y = pointwise(y, wide, residual)
    return y, None if narrow is None else pointwise(y, narrow)
