"""A residual bottleneck at inference in Triton, and the 1x1 convolution that the next one begins with.

    m = relu(conv(x)),  y = relu(m wide + residual),  z = relu(y narrow)

The trick: a tile of samples of m stays in registers, as 1x1 convolutions need no neighbours. y, the widest
tensor of the network, is made in slices of columns; each is stored for the next block's shortcut, and
multiplied by the next narrow weight while it is on the chip. Only the first convolution has taps.

Bytes moved: x once (its overlap hits the cache), residual and y once, z once. Separate kernels also write and
read m, and read y again.

Bottlenecks: He et al. 2016, "Deep Residual Learning for Image Recognition".
"""

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecgot.kernels.compilation import DTYPES, CompileCase, compile_case
from ecgot.kernels.conv.checks import PRECISIONS
from ecgot.kernels.conv.geometry import Geometry
from ecgot.kernels.conv.operands import FusedLayer
from ecgot.kernels.conv.triton_tiles import (
    CONVENTIONS,
    Configuration,
    activate,
    product_precision,
    record_length,
    unreadable,
)
from ecgot.kernels.dispatch import HIP, launch

MAX_CHANNELS = 64  # of m and of z, held by one program


@triton.jit
def _finished(sums, scale_ptr, shift_ptr, c, c_valid, HAS_SCALE: tl.constexpr):
    if HAS_SCALE:
        sums *= tl.load(scale_ptr + c, c_valid, 0.0).to(tl.float32)[None, :]
    return sums + tl.load(shift_ptr + c, c_valid, 0.0).to(tl.float32)[None, :]


@triton.jit
def _bottleneck_kernel(
    x_ptr,
    x_lengths_ptr,
    middle_ptr,  # [K, C, M]
    middle_scale_ptr,
    middle_shift_ptr,
    wide_ptr,  # [M, W]
    wide_scale_ptr,
    wide_shift_ptr,
    narrow_ptr,  # [W, N]
    narrow_scale_ptr,
    narrow_shift_ptr,
    residual_ptr,  # [B, T_OUT, W], as y
    y_ptr,
    z_ptr,  # [B, T_OUT, N]
    T,
    T_OUT,
    C,
    M,
    W,
    N,
    K,
    stride_xb,
    stride_xt,
    stride_xc,
    STRIDE,
    PADDING,
    DILATION,
    MASKED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_NARROW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_t = tl.cdiv(T_OUT, BLOCK_T)
    batch = (tl.program_id(0) // tiles_t).to(tl.int64)
    t = (tl.program_id(0) % tiles_t) * BLOCK_T + tl.arange(0, BLOCK_T)
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    length = record_length(x_lengths_ptr, batch, T, MASKED)
    t_valid = t < T_OUT
    x_ptr += batch * stride_xb
    sums = tl.zeros((BLOCK_T, BLOCK_M), dtype=tl.float32)
    tiles_c = tl.cdiv(C, BLOCK_C)
    for step in range(K * tiles_c):
        k = step // tiles_c
        c = (step % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
        source = t * STRIDE - PADDING + k * DILATION
        inside = (t_valid & (source >= 0) & (source < length))[:, None] & (c < C)[None, :]
        pointers = x_ptr + source.to(tl.int64)[:, None] * stride_xt + c.to(tl.int64)[None, :] * stride_xc
        x = tl.load(pointers, inside, 0.0)
        w = tl.load(
            middle_ptr + (k * C + c)[:, None] * M + m[None, :], (c < C)[:, None] & (m < M)[None, :], 0.0
        )
        sums += tl.dot(x, w, input_precision=PRECISION)
    sums = _finished(sums, middle_scale_ptr, middle_shift_ptr, m, m < M, HAS_SCALE)
    middle = activate(sums, 1).to(y_ptr.dtype.element_ty)  # rounded as if it went through memory
    row = batch * T_OUT + t
    narrow = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for start in range(0, W, BLOCK_W):
        o = start + tl.arange(0, BLOCK_W)
        o_valid = o < W
        w = tl.load(wide_ptr + m[:, None] * W + o[None, :], (m < M)[:, None] & o_valid[None, :], 0.0)
        y = tl.dot(middle, w, input_precision=PRECISION)
        y = _finished(y, wide_scale_ptr, wide_shift_ptr, o, o_valid, HAS_SCALE)
        offset = row[:, None] * W + o[None, :]
        valid = t_valid[:, None] & o_valid[None, :]
        y = activate(y + tl.load(residual_ptr + offset, valid, 0.0).to(tl.float32), 1)
        y = y.to(y_ptr.dtype.element_ty)
        tl.store(y_ptr + offset, y, valid)
        if HAS_NARROW:
            w = tl.load(narrow_ptr + o[:, None] * N + n[None, :], o_valid[:, None] & (n < N)[None, :], 0.0)
            narrow += tl.dot(y, w, input_precision=PRECISION)
    if HAS_NARROW:
        z = activate(_finished(narrow, narrow_scale_ptr, narrow_shift_ptr, n, n < N, HAS_SCALE), 1)
        offset = row[:, None] * N + n[None, :]
        tl.store(z_ptr + offset, z.to(z_ptr.dtype.element_ty), t_valid[:, None] & (n < N)[None, :])


def fits(middle: FusedLayer, narrow: FusedLayer | None) -> bool:
    """Whether a program's registers hold a tile of m and one of z."""
    return max(layer.weight.shape[0] for layer in (middle, narrow) if layer is not None) <= MAX_CHANNELS


def bottleneck(
    x: Tensor,
    middle: FusedLayer,
    wide: FusedLayer,
    narrow: FusedLayer | None,
    residual: Tensor,
    geometry: Geometry,
    lengths: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor | None]:
    """y [B, T_out, W] and z [B, T_out, N], of x [B, T, C] and residual [B, T_out, W]."""
    if unreadable(x):
        after = None if narrow is None else narrow.to(torch.float32)
        layers = middle.to(torch.float32), wide.to(torch.float32), after
        y, z = bottleneck(x.float(), *layers, residual.float(), geometry, lengths, precision)
        return y.to(x.dtype), None if z is None else z.to(x.dtype)
    c_middle, c_in, k = middle.weight.shape
    batch, t_out, c_wide = residual.shape
    last = wide if narrow is None else narrow  # stands in for what the kernel will not read
    c_narrow = c_middle if narrow is None else narrow.weight.shape[0]
    y = torch.empty(batch, t_out, c_wide, dtype=x.dtype, device=x.device)
    z = None if narrow is None else torch.empty(batch, t_out, c_narrow, dtype=x.dtype, device=x.device)
    configuration = _configuration(x.dtype, precision)
    if y.numel():
        launch(
            _bottleneck_kernel,
            (batch * triton.cdiv(t_out, configuration["BLOCK_T"]),),
            x_ptr=x,
            x_lengths_ptr=x if lengths is None else lengths,
            **_layer_arguments("middle", middle),
            **_layer_arguments("wide", wide),
            **_layer_arguments("narrow", last),
            residual_ptr=residual.contiguous(),
            y_ptr=y,
            z_ptr=y if z is None else z,
            T=x.shape[1],
            T_OUT=t_out,
            C=c_in,
            M=c_middle,
            W=c_wide,
            N=c_narrow,
            K=k,
            stride_xb=x.stride(0),
            stride_xt=x.stride(1),
            stride_xc=x.stride(2),
            STRIDE=geometry.stride,
            PADDING=geometry.padding,
            DILATION=geometry.dilation,
            MASKED=lengths is not None,
            HAS_SCALE=middle.scale is not None,
            HAS_NARROW=narrow is not None,
            **configuration,
        )
    return y, z


def _layer_arguments(name: str, layer: FusedLayer) -> dict[str, Tensor]:
    return {
        f"{name}_ptr": layer.weight.permute(2, 1, 0).contiguous(),
        f"{name}_scale_ptr": (layer.shift if layer.scale is None else layer.scale).float(),
        f"{name}_shift_ptr": layer.shift.float(),
    }


def _configuration(dtype: torch.dtype, precision: str, hip: bool = HIP) -> Configuration:
    """One tile for all: the bottlenecks of published ECG encoders are 64 channels wide."""
    depth = 16 if dtype == torch.float32 else 32  # registers hold no more of fp32
    return {
        "BLOCK_T": 64,
        "BLOCK_C": depth,
        "BLOCK_M": MAX_CHANNELS,
        "BLOCK_W": depth,
        "BLOCK_N": MAX_CHANNELS,
        "PRECISION": product_precision(dtype, precision, hip),
        "num_warps": 8,
        "num_stages": 2,
    }


def compile_cases(hip: bool) -> Iterator[CompileCase]:
    """Every launch above."""
    names = ("MASKED", "HAS_SCALE", "HAS_NARROW")
    for name, dtype in DTYPES.items():
        precisions = PRECISIONS if dtype == torch.float32 and not hip else ("fp32",)
        for precision, *given in itertools.product(precisions, *[(False, True)] * 3):
            flags = dict(zip(names, given, strict=True))
            configuration = _configuration(dtype, str(precision), hip)
            yield compile_case(_bottleneck_kernel, name, flags, configuration, CONVENTIONS)
