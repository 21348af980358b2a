"""What the convolution kernels share: activations and their slopes, norms, lengths, and compile cases."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecgot.kernels.compilation import Conventions
from ecgot.kernels.conv.operands import ACTIVATIONS
from ecgot.kernels.dispatch import INTERPRETED

ACTIVATION_CODES = {activation: code for code, activation in enumerate(ACTIVATIONS)}


@triton.jit
def activate(value, ACTIVATION: tl.constexpr):
    """act(value); ACTIVATION is one of ACTIVATION_CODES."""
    if ACTIVATION == 1:
        # NaN stays NaN, as in torch.
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == 2:
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    elif ACTIVATION == 3:
        value = value / (1.0 + tl.exp(-value))
    return value


@triton.jit
def times_slope(gradient, value, ACTIVATION: tl.constexpr):
    """gradient times the activation's derivative at value; 0 where ReLU is off, even for a NaN gradient."""
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
    """Valid samples of a record, at most ``most``."""
    valid = most
    if MASKED:
        valid = tl.minimum(tl.load(ptr + batch), most)
    return valid


@triton.jit
def line(mean_ptr, slope_ptr, shift_ptr, c, c_valid, HALF: tl.constexpr):
    """(mean, slope, shift) [channels] for ``along``, to be loaded once where channels stay the same."""
    mean = tl.load(mean_ptr + c, c_valid, 0.0)
    slope = tl.load(slope_ptr + c, c_valid, 0.0)
    shift = tl.load(shift_ptr + c, c_valid, 0.0)
    if HALF:
        shift -= mean * slope
    return mean, slope, shift


@triton.jit
def along(x, valid, mean, slope, shift, HALF: tl.constexpr):
    """(x - mean) * slope + shift in fp32, x [rows, channels]; 0 where not valid, where x is 0 already.

    One multiply-add where x is in half precision: its own rounding, 2^-12 of x at best, is far coarser than
    that of mean * slope in fp32. The mask is on the shift: after the sum, it would come between an activation
    and the conversion to half precision, which NVIDIA's GPUs do in one instruction.
    """
    if HALF:
        return x.to(tl.float32) * slope[None, :] + tl.where(valid, shift[None, :], 0.0)
    return tl.where(valid, (x - mean[None, :]) * slope[None, :] + shift[None, :], 0.0)


@triton.jit
def affine(x, mean_ptr, scale_ptr, shift_ptr, c, c_valid):
    """(x - mean) * scale + shift in fp32, x [rows, channels]."""
    mean = tl.load(mean_ptr + c, c_valid, 0.0)
    scale = tl.load(scale_ptr + c, c_valid, 0.0)
    shift = tl.load(shift_ptr + c, c_valid, 0.0)
    return (x.to(tl.float32) - mean[None, :]) * scale[None, :] + shift[None, :]


def unreadable(values: Tensor) -> bool:
    """Whether Triton's interpreter would compute with the raw bits of these values, as it does for bf16."""
    return INTERPRETED and values.dtype == torch.bfloat16


Configuration = dict[str, Any]


def product_precision(dtype: torch.dtype, precision: str, hip: bool) -> str:
    """``input_precision`` of a matrix product.

    Three TF32 products give fp32's accuracy on NVIDIA's tensor cores (Ootomo and Yokota 2022, "Recovering
    single precision accuracy from Tensor Cores"); AMD's multiply fp32 directly.
    """
    if dtype != torch.float32 or hip or precision == "ieee":
        return "ieee"
    return "tf32" if precision == "tf32" else "tf32x3"


CONVENTIONS = Conventions(
    in_dtype=frozenset(
        f"{name}_ptr"
        for name in (
            *("x", "y", "z", "g", "r", "grad", "beside", "grad_x", "grad_y", "grad_r"),
            *("weight", "bias", "residual", "middle", "wide", "narrow"),
        )
    ),
    types={
        "x_lengths_ptr": "*i32",
        "y_lengths_ptr": "*i32",
        "batches_ptr": "*i64",
        "eps": "fp32",
        "momentum": "fp32",
    },
    words={"KIND": str},
)
