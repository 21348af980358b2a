"""A residual bottleneck at inference, with the next one's first convolution, as one kernel."""

import torch
from torch import Tensor

from ecgot.kernels.conv.backends import BACKENDS
from ecgot.kernels.conv.checks import PRECISIONS, check_choice, check_lengths, check_shapes, fits_dtype
from ecgot.kernels.conv.conv1d import conv1d
from ecgot.kernels.conv.geometry import Geometry
from ecgot.kernels.conv.geometry import geometry as checked_geometry
from ecgot.kernels.conv.operands import FusedLayer
from ecgot.kernels.dispatch import use_triton


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
        narrow: weight [N, W, 1], of the block after this one; None leaves z out.
        lengths, precision, backend: as in :func:`ecgot.kernels.conv1d`.

    Returns:
        y [B, T_out, W] and z [B, T_out, N] (None without ``narrow``), in the dtype of x.

    Raises:
        ValueError, TypeError: one line that names the argument, what came and what is accepted.

    In Triton the inner activations stay on the chip where M and N are at most 64. Elsewhere, under
    torch.compile, and where a gradient is asked for, the layers run one by one.
    """
    geometry = checked_geometry(stride, padding, dilation, 1)
    check_choice("precision", precision, PRECISIONS)
    check_choice("backend", backend, BACKENDS)
    check_conv1d(x, middle, wide, residual, narrow, geometry)
    if not _in_one(x, (middle, wide, narrow), residual, backend):
        return _one_by_one(x, middle, wide, residual, narrow, geometry, lengths, precision, backend)
    from ecgot.kernels.conv import triton_bottleneck

    lengths = check_lengths(lengths, x)
    return triton_bottleneck.bottleneck(x, middle, wide, narrow, residual, geometry, lengths, precision)


def check_conv1d(
    x: Tensor,
    middle: FusedLayer,
    wide: FusedLayer,
    residual: Tensor,
    narrow: FusedLayer | None,
    geometry: Geometry,
) -> None:
    t_out = check_shapes(x, middle.weight, geometry)
    expected = {"wide": (wide, middle.weight.shape[0]), "narrow": (narrow, wide.weight.shape[0])}
    for name, (layer, c_in) in expected.items():
        if layer is not None and tuple(layer.weight.shape[1:]) != (c_in, 1):
            got = tuple(layer.weight.shape)
            raise ValueError(f"{name}.weight: got shape {got}, accepted is [C_out, {c_in}, 1]")
    for name, layer in (("middle", middle), ("wide", wide), ("narrow", narrow)):
        if layer is None:
            continue
        for part, tensor in (("weight", layer.weight), ("scale", layer.scale), ("shift", layer.shift)):
            if tensor is None:
                continue
            if part != "weight" and tensor.shape != layer.weight.shape[:1]:
                got, accepted = tuple(tensor.shape), (layer.weight.shape[0],)
                raise ValueError(f"{name}.{part}: got shape {got}, accepted is {accepted}")
            if not fits_dtype(part, tensor, x):
                raise TypeError(f"{name}.{part}: got dtype {tensor.dtype}, accepted is that of x, {x.dtype}")
        if (layer.scale is None) != (middle.scale is None):
            given = "none" if layer.scale is None else "one"
            raise ValueError(f"{name}.scale: got {given}, accepted is one for every layer or for none")
    shape = (x.shape[0], t_out, wide.weight.shape[0])
    if tuple(residual.shape) != shape:
        raise ValueError(f"residual: got shape {tuple(residual.shape)}, accepted is {shape}")
    if residual.dtype != x.dtype:
        raise TypeError(f"residual: got dtype {residual.dtype}, accepted is that of x, {x.dtype}")


def _in_one(x: Tensor, layers: tuple[FusedLayer | None, ...], residual: Tensor, backend: str) -> bool:
    given = [x, residual, *(t for layer in layers if layer is not None for t in layer if t is not None)]
    if backend == "torch" or x.dtype == torch.float64 or not use_triton(*given):
        return False
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any(t.requires_grad for t in given)):
        return False
    from ecgot.kernels.conv import triton_bottleneck

    middle, _, narrow = layers
    assert middle is not None
    return triton_bottleneck.fits(middle, narrow)


def _one_by_one(
    x: Tensor,
    middle: FusedLayer,
    wide: FusedLayer,
    residual: Tensor,
    narrow: FusedLayer | None,
    geometry: Geometry,
    lengths: Tensor | None,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor | None]:
    def layer(x: Tensor, folded: FusedLayer, residual: Tensor | None = None) -> Tensor:
        return conv1d(
            x,
            folded.weight,
            scale=folded.scale,
            shift=folded.shift,
            residual=residual,
            activation="relu",
            precision=precision,
            backend=backend,
        )

    y = conv1d(
        x,
        middle.weight,
        scale=middle.scale,
        shift=middle.shift,
        activation="relu",
        stride=geometry.stride,
        padding=geometry.paddings,
        dilation=geometry.dilation,
        lengths=lengths,
        precision=precision,
        backend=backend,
    )
    y = layer(y, wide, residual)
    return y, None if narrow is None else layer(y, narrow)
