"""Checks of the convolutions' arguments. Errors are one line: the argument, what is expected, what came."""

from typing import Any

import torch
from torch import Tensor

from ecgot.kernels.conv.backends import BACKENDS
from ecgot.kernels.conv.geometry import Geometry, checked_geometry
from ecgot.kernels.conv.operands import ACTIVATIONS, BatchNorm, Epilogue, LazyActivation, Settings

PRECISIONS = ("fp32", "tf32", "ieee")
# Asked here and not at a call, which torch 2.11 then would not compile whole.
AUTOCAST = {each for each in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(each)}


def cast_by_autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors in autocast's dtype where it is on; fp64 stays, as in torch."""
    device = next((t.device.type for t in tensors if isinstance(t, Tensor)), "cpu")
    if device not in AUTOCAST or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def checked_settings(
    stride: int,
    padding: int | tuple[int, int],
    dilation: int,
    groups: int,
    precision: str,
    backend: str,
) -> Settings:
    """Settings from a public function's arguments."""
    geometry = checked_geometry(stride, padding, dilation, groups)
    check_choice("precision", precision, PRECISIONS)
    check_choice("backend", backend, BACKENDS)
    return Settings(geometry, precision, backend)


def check_choice(name: str, given: object, expected: tuple[object, ...]) -> None:
    """That an argument is one of several values."""
    if given not in expected:
        *most, last = map(repr, expected)
        raise ValueError(f"{name}: expected {', '.join(most)} or {last}, got {given!r}")


def check_lengths(lengths: Tensor | None, x: Tensor) -> Tensor | None:
    """Lengths of x [B, T, C] as [B] int32 on x's device, at most T."""
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor) or lengths.dim() != 1 or len(lengths) != len(x):
        got = f"shape {tuple(lengths.shape)}" if isinstance(lengths, Tensor) else type(lengths).__name__
        raise ValueError(f"lengths: expected a tensor of shape ({len(x)},), got {got}")
    if lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise TypeError(f"lengths: expected integers, got dtype {lengths.dtype}")
    return lengths.clamp(0, x.shape[1]).to(x.device, torch.int32)


def check_shapes(x: Tensor, weight: Tensor, geometry: Geometry) -> int:
    """That x [B, T, C_in] and weight [C_out, C_in / groups, K] go together; returns T_out."""
    for name, given in (("x", x), ("weight", weight)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(given).__name__}")
    if x.dim() != 3 or 0 in x.shape[1:]:
        raise ValueError(f"x: expected [B, T, C_in] with T and C_in >= 1, got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected floating point, got dtype {x.dtype}")
    groups = geometry.groups
    if x.shape[2] % groups:
        raise ValueError(f"groups: expected a divisor of C_in = {x.shape[2]}, got {groups}")
    if weight.dim() != 3 or weight.shape[1] != x.shape[2] // groups or 0 in weight.shape:
        expected = f"[C_out, {x.shape[2] // groups}, K] with C_out and K >= 1"
        raise ValueError(f"weight: expected {expected}, got shape {tuple(weight.shape)}")
    if weight.shape[0] % groups:
        raise ValueError(f"groups: expected a divisor of C_out = {weight.shape[0]}, got {groups}")
    k = weight.shape[2]
    t_out = geometry.output_length(x.shape[1], k)
    if t_out < 1:
        shortest = geometry.dilation * (k - 1) + 1 - sum(geometry.paddings)
        raise ValueError(f"x: expected T >= {shortest} for this kernel, got T = {x.shape[1]}")
    return t_out


def check_conv1d(x: Tensor, weight: Tensor, geometry: Geometry, epilogue: Epilogue) -> None:
    """That the tensors of a convolution go together, and that there is such an activation."""
    t_out = check_shapes(x, weight, geometry)
    check_choice("activation", epilogue.activation, ACTIVATIONS)
    c_out = weight.shape[0]
    shapes = {"bias": (c_out,), "scale": (c_out,), "shift": (c_out,), "residual": (x.shape[0], t_out, c_out)}
    tensors = {"weight": weight} | {name: getattr(epilogue, name) for name in shapes}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name}: expected shape {shapes[name]}, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {tensor.device}")
        if not fits_dtype(name, tensor, x):
            raise TypeError(f"{name}: expected the dtype of x, {x.dtype}, got {tensor.dtype}")


def fits_dtype(name: str, tensor: Tensor, x: Tensor) -> bool:
    """Whether the dtype is x's; a scale or shift beside half precision may also be fp32."""
    wide = name in ("scale", "shift") and x.dtype.itemsize == 2 and tensor.dtype == torch.float32
    return tensor.dtype == x.dtype or wide


def check_activation(
    name: str, given: object, shape: tuple[int, ...] | None = None, like: Tensor | None = None
) -> None:
    """That an argument is a LazyActivation, of ``shape`` and on the device of ``like`` where given."""
    if not isinstance(given, LazyActivation):
        raise TypeError(f"{name}: expected a LazyActivation, got {type(given).__name__}")
    if shape is not None and tuple(given.values.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(given.values.shape)}")
    if like is not None and given.values.device != like.device:
        raise ValueError(f"{name}: expected the device of x, {like.device}, got {given.values.device}")


def check_norm(norm: BatchNorm, weight: Tensor) -> None:
    """That a norm's vectors are [C_out] of weight [C_out, C_in / groups, K]."""
    if not isinstance(norm, BatchNorm):
        raise TypeError(f"norm: expected a BatchNorm, got {type(norm).__name__}")
    for name in ("gamma", "beta", "running_mean", "running_var"):
        given = getattr(norm, name)
        if given is None and not name.startswith("running_"):
            raise TypeError(f"norm.{name}: expected a torch.Tensor, got None")
        if given is not None and given.shape != weight.shape[:1]:
            raise ValueError(f"norm.{name}: expected shape ({weight.shape[0]},), got {tuple(given.shape)}")
