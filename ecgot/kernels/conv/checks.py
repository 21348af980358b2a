"""Checks of the convolutions' arguments: one line that names the argument, what is accepted and what came."""

from typing import Any

import torch
from torch import Tensor

from ecgot.kernels.conv.geometry import Geometry
from ecgot.kernels.conv.operands import LazyActivation

ACTIVATIONS = (None, "relu", "gelu", "silu")
PRECISIONS = ("fp32", "tf32", "ieee")


def cast_by_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where it is on; fp64 stays, as in torch."""
    device = next((t.device.type for t in tensors if isinstance(t, Tensor)), "cpu")
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def check_choice(name: str, given: object, accepted: tuple[object, ...]) -> None:
    if given not in accepted:
        *most, last = map(repr, accepted)
        raise ValueError(f"{name}: got {given!r}, accepted are {', '.join(most)} and {last}")


def check_lengths(lengths: Tensor | None, x: Tensor) -> Tensor | None:
    """As [B] int32 on x's device."""
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor) or lengths.dim() != 1 or len(lengths) != len(x):
        got = tuple(lengths.shape) if isinstance(lengths, Tensor) else type(lengths).__name__
        raise ValueError(f"lengths: got {got}, accepted is a tensor of shape ({len(x)},)")
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths: got dtype {lengths.dtype}, accepted are integers")
    return lengths.clamp(0, x.shape[1]).to(x.device, torch.int32)


def check_shapes(x: Tensor, weight: Tensor, geometry: Geometry) -> int:
    """T_out, where x [B, T, C_in] and weight [C_out, C_in / groups, K] go together."""
    for name, given in (("x", x), ("weight", weight)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name}: got {type(given).__name__}, accepted is a torch.Tensor")
    if x.dim() != 3 or 0 in x.shape[1:]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, accepted is [B, T, C_in] with T and C_in >= 1")
    if not x.is_floating_point():
        raise TypeError(f"x: got dtype {x.dtype}, accepted is floating point")
    groups = geometry.groups
    if x.shape[2] % groups:
        raise ValueError(f"groups: got {groups}, accepted is a divisor of C_in = {x.shape[2]}")
    if weight.dim() != 3 or weight.shape[1] != x.shape[2] // groups or 0 in weight.shape:
        accepted = f"[C_out, {x.shape[2] // groups}, K], C_out and K >= 1"
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, accepted is {accepted}")
    if weight.shape[0] % groups:
        raise ValueError(f"groups: got {groups}, accepted is a divisor of C_out = {weight.shape[0]}")
    k = weight.shape[2]
    t_out = int(geometry.length(x.shape[1], k))
    if t_out < 1:
        shortest = geometry.dilation * (k - 1) + 1 - sum(geometry.paddings)
        raise ValueError(f"x: got T = {x.shape[1]}, accepted is at least {shortest} for this kernel")
    return t_out


def check_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
) -> None:
    t_out = check_shapes(x, weight, geometry)
    check_choice("activation", activation, ACTIVATIONS)
    c_out = weight.shape[0]
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
        if not fits_dtype(name, tensor, x):
            raise TypeError(f"{name}: got dtype {tensor.dtype}, accepted is that of x, {x.dtype}")


def fits_dtype(name: str, tensor: Tensor, x: Tensor) -> bool:
    """Whether x's dtype, or fp32 for the scale and shift of half precision."""
    wide = name in ("scale", "shift") and x.dtype.itemsize == 2 and tensor.dtype == torch.float32
    return tensor.dtype == x.dtype or wide


def check_activation(
    name: str, given: object, shape: tuple[int, ...] | None = None, like: Tensor | None = None
) -> None:
    if not isinstance(given, LazyActivation):
        raise TypeError(f"{name}: got {type(given).__name__}, accepted is a LazyActivation")
    if shape is not None and tuple(given.values.shape) != shape:
        raise ValueError(f"{name}: got shape {tuple(given.values.shape)}, accepted is {shape}")
    if like is not None and given.values.device != like.device:
        raise ValueError(f"{name}: got device {given.values.device}, accepted is that of x, {like.device}")


def check_norm(weight: Tensor, **vectors: Tensor | None) -> None:
    for name, given in vectors.items():
        if given is None and not name.startswith("running_"):
            raise TypeError(f"{name}: got None, accepted is a torch.Tensor")
        if given is not None and given.shape != weight.shape[:1]:
            raise ValueError(f"{name}: got shape {tuple(given.shape)}, accepted is ({weight.shape[0]},)")
