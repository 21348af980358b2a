"""Fused 1-D convolution, channels-last, as an implicit matrix product.

    y[b, t, o] = activation(scale[o] * (sum_{k, c} x[b, t * stride - padding + k * dilation, c] w[o, c, k]
                                        + bias[o]) + shift[o] + residual[b, t, o])

The trick: rows of the product are output samples, columns are output channels, and the sum over taps k and
channels c reads x as it lies: with channels innermost, a tap is the same tile of x, a few rows further on.
No unfolded copy of x exists, padding is a mask on the load, and the epilogue works on the fp32 accumulator.

Bytes moved: x once for every tile of output channels (taps hit the cache), the weight once for every tile of
samples, residual and y once.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecgot.kernels.dispatch import INTERPRETED, launch

ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "silu": 3}


@triton.jit
def _activate(value, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        # Not tl.maximum, which may answer 0 for NaN where torch answers NaN.
        value = tl.where(value < 0, 0.0, value)
    elif ACTIVATION == 2:
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    elif ACTIVATION == 3:
        value = value / (1.0 + tl.exp(-value))
    return value


@triton.jit
def _conv1d_fwd_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    T,
    T_OUT,
    C_IN,
    C_OUT,
    stride_xb,
    stride_xt,
    stride_xc,
    STRIDE,
    PADDING,
    DILATION,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_t = tl.cdiv(T_OUT, BLOCK_T)
    batch = (tl.program_id(0) // tiles_t).to(tl.int64)  # offsets may pass 2^31
    t = (tl.program_id(0) % tiles_t) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    t_valid = t < T_OUT
    o_valid = o < C_OUT
    accumulator = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    for k in range(K):
        source = t * STRIDE - PADDING + k * DILATION
        inside = t_valid & (source >= 0) & (source < T)
        rows = x_ptr + batch * stride_xb + source.to(tl.int64) * stride_xt
        for c_start in range(0, C_IN, BLOCK_C):
            c = c_start + tl.arange(0, BLOCK_C)
            c_valid = c < C_IN
            x = tl.load(
                rows[:, None] + (c.to(tl.int64) * stride_xc)[None, :], inside[:, None] & c_valid[None, :], 0.0
            )
            # The weight arrives as [K, C_IN, C_OUT], so that this tile is contiguous along o.
            w_tile = weight_ptr + (k * C_IN + c)[:, None] * C_OUT + o[None, :]
            w = tl.load(w_tile, c_valid[:, None] & o_valid[None, :], 0.0)
            accumulator += tl.dot(x, w, input_precision=PRECISION)
    if HAS_BIAS:
        accumulator += tl.load(bias_ptr + o, o_valid, 0.0).to(tl.float32)[None, :]
    if HAS_SCALE:
        accumulator *= tl.load(scale_ptr + o, o_valid, 0.0).to(tl.float32)[None, :]
    if HAS_SHIFT:
        accumulator += tl.load(shift_ptr + o, o_valid, 0.0).to(tl.float32)[None, :]
    offset = (batch * T_OUT + t)[:, None] * C_OUT + o[None, :]
    valid = t_valid[:, None] & o_valid[None, :]
    if HAS_RESIDUAL:
        accumulator += tl.load(residual_ptr + offset, valid, 0.0).to(tl.float32)
    accumulator = _activate(accumulator, ACTIVATION)
    tl.store(y_ptr + offset, accumulator.to(y_ptr.dtype.element_ty), valid)


def _configuration(t_out: int, c_in: int, c_out: int, dtype: torch.dtype) -> dict[str, int | str]:
    """Blocks, warps and precision of a layer; a product wants at least 16 of everything."""
    block_t = min(64, max(16, triton.next_power_of_2(t_out)))
    block_o = min(64, max(16, triton.next_power_of_2(c_out)))
    return {
        "BLOCK_T": block_t,
        "BLOCK_O": block_o,
        "BLOCK_C": min(32, max(16, triton.next_power_of_2(c_in))),
        # Three TF32 products give fp32's accuracy on NVIDIA's tensor cores; AMD's multiply fp32 as it is.
        "PRECISION": "tf32x3" if dtype == torch.float32 and not torch.version.hip else "ieee",
        "num_warps": 4,
        "num_stages": 2,
    }


def _conv1d_fwd(
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
    """Launch the kernel: x [B, T, C_in] of any strides, the rest made contiguous; y [B, T_out, C_out]."""
    if INTERPRETED and x.dtype == torch.bfloat16:  # Triton's interpreter would multiply the raw bits
        bias, scale, shift, residual = (
            None if t is None else t.float() for t in (bias, scale, shift, residual)
        )
        geometry = (stride, padding, dilation)
        y = _conv1d_fwd(x.float(), weight.float(), bias, *geometry, scale, shift, residual, activation)
        return y.bfloat16()
    batch, length, c_in = x.shape
    c_out, _, k = weight.shape
    t_out = (length + 2 * padding - dilation * (k - 1) - 1) // stride + 1
    y = torch.empty(batch, t_out, c_out, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    optional = {"bias": bias, "scale": scale, "shift": shift, "residual": residual}
    # x stands in for a pointer that the kernel will not read.
    pointers = {f"{name}_ptr": x if t is None else t.contiguous() for name, t in optional.items()}
    flags = {f"HAS_{name.upper()}": t is not None for name, t in optional.items()}
    configuration = _configuration(t_out, c_in, c_out, x.dtype)
    grid = (
        batch * triton.cdiv(t_out, configuration["BLOCK_T"]),
        triton.cdiv(c_out, configuration["BLOCK_O"]),
    )
    launch(
        _conv1d_fwd_kernel,
        grid,
        x,
        weight.permute(2, 1, 0).contiguous(),
        y_ptr=y,
        T=length,
        T_OUT=t_out,
        C_IN=c_in,
        C_OUT=c_out,
        stride_xb=x.stride(0),
        stride_xt=x.stride(1),
        stride_xc=x.stride(2),
        STRIDE=stride,
        PADDING=padding,
        DILATION=dilation,
        K=k,
        ACTIVATION=ACTIVATIONS[activation],
        **pointers,
        **flags,
        **configuration,
    )
    return y


def compile_cases(
    hip: bool,
) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(name, kernel, signature, constexprs, options) of every launch above that an encoder can ask for.

    hip: as where torch is built for AMD's GPUs, in place of what it is built for.
    """
    sizes = [2**power for power in range(4, 10)]  # a configuration knows no other
    for dtype, torch_dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        found = [_configuration(t, c, o, torch_dtype) for t, c, o in itertools.product(sizes, repeat=3)]
        for configuration in {str(each): each for each in found}.values():
            if dtype == "fp32":
                configuration["PRECISION"] = "ieee" if hip else "tf32x3"
            for k, activation in itertools.product((1, 5, 15), ACTIVATIONS):  # the encoders' kernel sizes
                for given in itertools.product((False, True), repeat=4):
                    yield _compile_case(dtype, configuration, k, activation, given)


def _compile_case(
    dtype: str, configuration: dict[str, Any], k: int, activation: str | None, given: tuple[bool, ...]
) -> tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]:
    optional = ("bias", "scale", "shift", "residual")
    constants: dict[str, Any] = dict(zip((f"HAS_{name.upper()}" for name in optional), given, strict=True))
    constants |= {"K": k, "ACTIVATION": ACTIVATIONS[activation]} | configuration
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    types = dict.fromkeys(constants, "constexpr")
    signature = {
        name: types.get(name, f"*{dtype}" if name.endswith("_ptr") else "i32")
        for name in _conv1d_fwd_kernel.arg_names
    }
    tile = "x".join(str(constants[name]) for name in ("BLOCK_T", "BLOCK_O", "BLOCK_C"))
    epilogue = [*itertools.compress(optional, given), activation or "linear"]
    return f"{tile} {dtype} K={k} {' '.join(epilogue)}", _conv1d_fwd_kernel, signature, constants, options
