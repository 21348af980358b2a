"""What the convolution kernels share: activations and their slopes, norms, lengths, and how they compile."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecgot.kernels.dispatch import INTERPRETED

ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "silu": 3}


# --- shared pieces ------------------------------------------------------------------------------------------


@triton.jit
def activate(value, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        # Not tl.maximum, which may answer 0 for NaN where torch answers NaN.
        value = tl.where(value < 0, 0.0, value)
    elif ACTIVATION == 2:
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    elif ACTIVATION == 3:
        value = value / (1.0 + tl.exp(-value))
    return value


@triton.jit
def times_slope(gradient, value, ACTIVATION: tl.constexpr):
    """gradient times the activation's derivative at value; 0 where ReLU is off, whatever the gradient."""
    if ACTIVATION == 1:
        gradient = tl.where(value <= 0, 0.0, gradient)
    elif ACTIVATION == 2:
        density = tl.exp(-0.5 * value * value) * 0.3989422804014327  # 1 / sqrt(2 pi)
        gradient *= 0.5 * (1.0 + tl.erf(value * 0.7071067811865476)) + value * density
    elif ACTIVATION == 3:
        gate = 1.0 / (1.0 + tl.exp(-value))
        gradient *= gate * (1.0 + value * (1.0 - gate))
    return gradient


@triton.jit
def record_length(ptr, batch, most, MASKED: tl.constexpr):
    """Valid samples of a record: at most all."""
    valid = most
    if MASKED:
        valid = tl.minimum(tl.load(ptr + batch), most)
    return valid


@triton.jit
def affine(x, mean_ptr, scale_ptr, shift_ptr, c, c_valid):
    """(x - mean) * scale + shift in fp32, x [rows, channels]."""
    mean = tl.load(mean_ptr + c, c_valid, 0.0)
    scale = tl.load(scale_ptr + c, c_valid, 0.0)
    shift = tl.load(shift_ptr + c, c_valid, 0.0)
    return (x.to(tl.float32) - mean[None, :]) * scale[None, :] + shift[None, :]


def unreadable(values: Tensor) -> bool:
    """Triton's interpreter would multiply the raw bits of bf16."""
    return INTERPRETED and values.dtype == torch.bfloat16


# --- configurations -----------------------------------------------------------------------------------------

Configuration = dict[str, Any]
HIP = bool(torch.version.hip)


def product_precision(dtype: torch.dtype, precision: str, hip: bool) -> str:
    """Three TF32 products give fp32's accuracy on NVIDIA's tensor cores; AMD's multiply fp32 as it is."""
    if dtype != torch.float32 or hip or precision == "ieee":
        return "ieee"
    return "tf32" if precision == "tf32" else "tf32x3"


FP32 = ("mean", "scale", "shift", "c0", "c1", "sum", "product", "sums", "partial", "count", "m2", "var")
FP32_POINTERS = tuple(f"{name}_ptr" for name in FP32)


def compile_case(
    kernel: Any, dtype: str, flags: dict[str, Any], configuration: Configuration
) -> tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]:
    configuration = dict(configuration)
    options = {name: configuration.pop(name) for name in ("num_warps", "num_stages")}
    constants = flags | configuration
    types = dict.fromkeys(constants, "constexpr")
    for name in kernel.arg_names:
        if name.endswith("lengths_ptr"):
            types[name] = "*i32"
        elif name.endswith("_ptr"):
            types[name] = "*fp32" if name.endswith(FP32_POINTERS) else f"*{dtype}"
        else:
            types.setdefault(name, "i32")
    signature = {name: types[name] for name in kernel.arg_names}
    said = [
        name.lower() if value is True else f"{name.lower()}={value}" for name, value in flags.items() if value
    ]
    tile = "x".join(str(value) for name, value in configuration.items() if name.startswith("BLOCK"))
    kind = [configuration["KIND"]] if "KIND" in configuration else []
    return " ".join([tile, dtype, *kind, *said]), kernel, signature, constants, options
