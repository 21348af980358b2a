"""Fused 1-D convolutions in Triton, channels-last, as implicit matrix products: forward and both gradients.

    y[b, t, o] = act(scale[o] * (sum_{k, c} h[b, t * stride - padding + k * dilation, c] w[o, c, k] + bias[o])
                     + shift[o] + residual[b, t, o]),    h = x  or  act((x - mean) * x_scale + x_shift)

The trick: an implicit matrix product, as in cuDNN (Chetlur et al. 2014, "cuDNN: Efficient Primitives for Deep
Learning"). Rows are samples, columns are channels, and the sum over taps k and channels c reads x in place:
with channels innermost a tap is the same tile a few rows further on, so nothing is unfolded.

A batch norm costs no pass over memory. The convolution before it reduces its statistics in the epilogue: n,
mean and M2 of each tile, merged in a fixed order by the rule of Chan, Golub and LeVeque (1983, "Algorithms
for Computing the Sample Variance"). The convolution after it normalises what it reads, and masks the padding
after the affine map. The gradients mirror this: they read y's gradient as g + c0 + c1 (y - mean), where c0
and c1 are all that the statistics' own gradients add; and before the gradient in x is stored, it is
multiplied by the activation's slope and its sums for scale and shift are reduced. No activation is saved, all
are recomputed.

The gradient in x of a strided convolution is one product for each phase of the stride, with that phase's
taps. The gradient in the weight is split over samples into a fixed number of parts, summed in order. No
atomics: the same input gives the same bits.

Bytes moved: forward x once for every tile of output channels (taps hit the cache), w once for every tile of
samples, residual and y once; the gradient in x g (and y) once for every tile of input channels, x once; the
gradient in w g (and y) once for every tile of (k, c), x once for every tile of o and tap.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecgot.kernels.compilation import DTYPES, CompileCase, compile_case
from ecgot.kernels.conv.checks import PRECISIONS
from ecgot.kernels.conv.geometry import Geometry
from ecgot.kernels.conv.operands import PLAIN, Epilogue, LazyActivation, OutputGradient, in_dtype
from ecgot.kernels.conv.triton_statistics import TileStatistics, merge_sums, sum_parts
from ecgot.kernels.conv.triton_tiles import (
    ACTIVATION_CODES,
    CONVENTIONS,
    Configuration,
    activate,
    affine,
    along,
    line,
    product_precision,
    record_length,
    times_slope,
    unreadable,
)
from ecgot.kernels.dispatch import HIP, launch

# Programs of a weight's gradient: enough for the largest GPUs, and the same on all, as results depend on it.
WEIGHT_PROGRAMS = 512


@triton.jit
def _operand(x, valid, mean, scale, shift, ACTIVATION: tl.constexpr):
    """A loaded tile of x [rows, channels] as one of h; 0 where not valid, also after the affine map."""
    h = along(x, valid, mean, scale, shift, x.dtype.primitive_bitwidth == 16)
    return activate(h, ACTIVATION).to(x.dtype)  # every activation of 0 is 0


@triton.jit
def _gradient(g, y_pointers, valid, mean, c1, c0):
    """A loaded tile of g [rows, channels] as one of y's whole gradient, in the dtype that products take."""
    y = tl.load(y_pointers, valid, 0.0)
    return (g.to(tl.float32) + along(y, valid, mean, c1, c0, y.dtype.primitive_bitwidth == 16)).to(g.dtype)


# --- forward ------------------------------------------------------------------------------------------------


@triton.jit
def _conv1d_fwd_kernel(
    x_ptr,
    x_mean_ptr,
    x_scale_ptr,
    x_shift_ptr,
    x_lengths_ptr,
    weight_ptr,  # [C_OUT, C_IN / groups, K], strided
    bias_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    y_lengths_ptr,
    y_ptr,
    count_ptr,  # [tiles of samples]
    mean_ptr,  # [tiles of samples, C_OUT]
    m2_ptr,
    T,
    T_OUT,
    C_IN,  # of a group, as is C_OUT
    C_OUT,
    GROUPS,
    K,
    stride_xb,
    stride_xt,
    stride_xc,
    stride_wo,
    stride_wc,
    stride_wk,
    STRIDE,
    PADDING,
    DILATION,
    NORM: tl.constexpr,
    X_ACTIVATION: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STATISTICS: tl.constexpr,
    KIND: tl.constexpr,  # see _kind
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_t = tl.cdiv(T_OUT, BLOCK_T)
    batch = (tl.program_id(0) // tiles_t).to(tl.int64)  # offsets may pass 2^31
    t = (tl.program_id(0) % tiles_t) * BLOCK_T + tl.arange(0, BLOCK_T)
    channels = GROUPS * C_OUT
    if KIND == "depthwise":  # all groups' outputs lie side by side
        group = 0
        o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        o_valid = o < channels
    else:
        tiles_o = tl.cdiv(C_OUT, BLOCK_O)
        group = tl.program_id(1) // tiles_o
        local = (tl.program_id(1) % tiles_o) * BLOCK_O + tl.arange(0, BLOCK_O)
        o = group * C_OUT + local
        o_valid = local < C_OUT
    length = record_length(x_lengths_ptr, batch, T, MASKED)
    t_valid = t < T_OUT
    x_ptr += batch * stride_xb
    first = t * STRIDE - PADDING
    HALF: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    accumulator = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    if KIND == "depthwise":
        c = o // C_OUT
        if NORM:
            mean, x_scale, x_shift = line(x_mean_ptr, x_scale_ptr, x_shift_ptr, c, o_valid, HALF)
        for k in range(K):
            source = first + k * DILATION
            inside = (t_valid & (source >= 0) & (source < length))[:, None] & o_valid[None, :]
            x = tl.load(x_ptr + source[:, None] * stride_xt + (c * stride_xc)[None, :], inside, 0.0)
            if NORM:
                x = _operand(x, inside, mean, x_scale, x_shift, X_ACTIVATION)
            w = tl.load(weight_ptr + k * stride_wk + o * stride_wo, o_valid, 0.0)
            accumulator += x.to(tl.float32) * w.to(tl.float32)[None, :]
    elif KIND == "narrow":
        for start in range(0, K * C_IN, BLOCK_C):
            r = start + tl.arange(0, BLOCK_C)
            k = r // C_IN
            c = group * C_IN + r % C_IN
            r_valid = r < K * C_IN
            source = first[:, None] + (k * DILATION)[None, :]
            inside = t_valid[:, None] & r_valid[None, :] & (source >= 0) & (source < length)
            x = tl.load(x_ptr + source * stride_xt + (c * stride_xc)[None, :], inside, 0.0)
            if NORM:
                mean, x_scale, x_shift = line(x_mean_ptr, x_scale_ptr, x_shift_ptr, c, r_valid, HALF)
                x = _operand(x, inside, mean, x_scale, x_shift, X_ACTIVATION)
            w_tile = weight_ptr + (k * stride_wk + (r % C_IN) * stride_wc)[:, None] + (o * stride_wo)[None, :]
            w = tl.load(w_tile, r_valid[:, None] & o_valid[None, :], 0.0).to(x.dtype)
            accumulator += tl.dot(x, w, input_precision=PRECISION)
    elif KIND == "single":  # one tile of channels: what depends on them stays, only the tap moves on
        # This loop's instructions are counted (ecgot.kernels.resources): a pass is one tl.dot of BLOCK_C
        # channels at one tap, so compare two tiles by instructions for each of their matrix products.
        local_c = tl.arange(0, BLOCK_C)
        c = group * C_IN + local_c
        c_valid = local_c < C_IN
        if NORM:
            mean, x_scale, x_shift = line(x_mean_ptr, x_scale_ptr, x_shift_ptr, c, c_valid, HALF)
        x_tile = first[:, None] * stride_xt + (c * stride_xc)[None, :]
        w_tile = (local_c * stride_wc)[:, None] + (o * stride_wo)[None, :]
        w_valid = c_valid[:, None] & o_valid[None, :]
        for k in range(K):
            source = first + k * DILATION
            # Rows past the end of y are not stored, and channels past the last meet weights of 0.
            inside = ((source >= 0) & (source < length))[:, None]
            x = tl.load(x_ptr + x_tile, inside & c_valid[None, :], 0.0)
            if NORM:
                x = _operand(x, inside, mean, x_scale, x_shift, X_ACTIVATION)
            w = tl.load(weight_ptr + w_tile, w_valid, 0.0).to(x.dtype)
            accumulator += tl.dot(x, w, input_precision=PRECISION)
            x_ptr += DILATION * stride_xt
            weight_ptr += stride_wk
    else:
        k = 0
        base = 0
        for _ in range(K * tl.cdiv(C_IN, BLOCK_C)):  # one loop, so that loads run ahead across taps
            local_c = base + tl.arange(0, BLOCK_C)
            c = group * C_IN + local_c
            c_valid = local_c < C_IN
            source = first + k * DILATION
            inside = (t_valid & (source >= 0) & (source < length))[:, None] & c_valid[None, :]
            x = tl.load(x_ptr + source[:, None] * stride_xt + (c * stride_xc)[None, :], inside, 0.0)
            if NORM:
                mean, x_scale, x_shift = line(x_mean_ptr, x_scale_ptr, x_shift_ptr, c, c_valid, HALF)
                x = _operand(x, inside, mean, x_scale, x_shift, X_ACTIVATION)
            w_tile = weight_ptr + (k * stride_wk + local_c * stride_wc)[:, None] + (o * stride_wo)[None, :]
            w = tl.load(w_tile, c_valid[:, None] & o_valid[None, :], 0.0).to(x.dtype)
            accumulator += tl.dot(x, w, input_precision=PRECISION)
            k += 1  # taps first: the next one's rows are in the cache
            base = tl.where(k == K, base + BLOCK_C, base)
            k = tl.where(k == K, 0, k)
    if HAS_BIAS:
        accumulator += tl.load(bias_ptr + o, o_valid, 0.0).to(tl.float32)[None, :]
    if HAS_SCALE:
        accumulator *= tl.load(scale_ptr + o, o_valid, 0.0).to(tl.float32)[None, :]
    if HAS_SHIFT:
        accumulator += tl.load(shift_ptr + o, o_valid, 0.0).to(tl.float32)[None, :]
    offset = (batch * T_OUT + t)[:, None] * channels + o[None, :]
    valid = t_valid[:, None] & o_valid[None, :]
    if HAS_RESIDUAL:
        accumulator += tl.load(residual_ptr + offset, valid, 0.0).to(tl.float32)
    result = activate(accumulator, ACTIVATION).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + offset, result, valid)
    if STATISTICS:  # of what is stored, so that the gradients see what these describe
        counted = t < record_length(y_lengths_ptr, batch, T_OUT, MASKED)
        y = tl.where(counted[:, None], result.to(tl.float32), 0.0)
        count = tl.sum(counted.to(tl.float32), axis=0)
        mean = tl.sum(y, axis=0) / tl.maximum(count, 1.0)
        deviation = tl.where(counted[:, None], y - mean[None, :], 0.0)
        partial = tl.program_id(0).to(tl.int64) * channels + o
        tl.store(mean_ptr + partial, mean, o_valid)
        tl.store(m2_ptr + partial, tl.sum(deviation * deviation, axis=0), o_valid)
        tl.store(count_ptr + tl.program_id(0), count, tl.program_id(1) == 0)


# --- gradient in x ------------------------------------------------------------------------------------------


@triton.jit
def _conv1d_dgrad_kernel(
    g_ptr,
    y_ptr,
    y_mean_ptr,
    c0_ptr,
    c1_ptr,
    y_lengths_ptr,
    weight_ptr,  # [C_OUT, C_IN / groups, K], strided
    x_ptr,
    x_mean_ptr,
    x_scale_ptr,
    x_shift_ptr,
    x_lengths_ptr,
    beside_ptr,
    grad_x_ptr,
    sum_ptr,  # [tiles of samples, C_IN]
    product_ptr,
    T,
    T_OUT,
    C_IN,  # of a group, as is C_OUT
    C_OUT,
    GROUPS,
    K,
    stride_xb,
    stride_xt,
    stride_xc,
    stride_wo,
    stride_wc,
    stride_wk,
    STRIDE,
    PADDING,
    DILATION,
    TAP_STEP,  # between the taps of a phase: STRIDE / gcd(STRIDE, DILATION)
    HAS_BESIDE: tl.constexpr,
    STATISTICS: tl.constexpr,
    NORM: tl.constexpr,
    X_ACTIVATION: tl.constexpr,
    MASKED: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tiles_t = tl.cdiv(tl.cdiv(T, STRIDE), BLOCK_T)
    batch = (tl.program_id(0) // (tiles_t * STRIDE)).to(tl.int64)
    phase = tl.program_id(0) // tiles_t % STRIDE
    t = phase + STRIDE * ((tl.program_id(0) % tiles_t) * BLOCK_T + tl.arange(0, BLOCK_T))
    channels_in = GROUPS * C_IN
    channels_out = GROUPS * C_OUT
    if KIND == "depthwise":
        group = 0
        local_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        c = local_c
        c_valid = c < channels_in
    else:
        tiles_c = tl.cdiv(C_IN, BLOCK_C)
        group = tl.program_id(1) // tiles_c
        local_c = (tl.program_id(1) % tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
        c = group * C_IN + local_c
        c_valid = local_c < C_IN
    t_valid = t < T
    length_out = record_length(y_lengths_ptr, batch, T_OUT, MASKED)
    # The first tap that meets this phase; there is none where stride and dilation share a factor that the
    # phase lacks.
    first = K
    for candidate in range(TAP_STEP):
        meets = (phase + PADDING - candidate * DILATION) % STRIDE == 0
        first = tl.where(meets & (first == K), candidate, first)
    taps = tl.maximum(tl.cdiv(K - first, TAP_STEP), 0)
    accumulator = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    HALF: tl.constexpr = g_ptr.dtype.element_ty.primitive_bitwidth == 16
    g_ptr += batch * T_OUT * channels_out
    y_ptr += batch * T_OUT * channels_out
    tiles_o = C_OUT if KIND == "depthwise" else tl.cdiv(C_OUT, BLOCK_O)
    if KIND == "single":
        local = tl.arange(0, BLOCK_O)
        o = group * C_OUT + local
        o_valid = local < C_OUT
        if STATISTICS:
            mean, c1, c0 = line(y_mean_ptr, c1_ptr, c0_ptr, o, o_valid, HALF)
        g_tile = (t // STRIDE * channels_out)[:, None] + o[None, :]
        w_tile = (o * stride_wo)[:, None] + (local_c * stride_wc)[None, :]
    k = first
    tile = 0
    for _ in range(taps * tiles_o):
        # No remainder: t is phase + STRIDE * i, and the taps are those that meet the phase.
        ahead = (phase + PADDING - k * DILATION) // STRIDE
        source = t // STRIDE + ahead
        inside = (source >= 0) & (source < length_out)  # rows past the end of x are not stored
        if KIND == "depthwise":
            o = c * C_OUT + tile
            offset = (source * channels_out)[:, None] + o[None, :]
            valid = inside[:, None] & c_valid[None, :]
            g = tl.load(g_ptr + offset, valid, 0.0)
            if STATISTICS:
                tile_mean, tile_c1, tile_c0 = line(y_mean_ptr, c1_ptr, c0_ptr, o, c_valid, HALF)
                g = _gradient(g, y_ptr + offset, valid, tile_mean, tile_c1, tile_c0)
            w = tl.load(weight_ptr + k * stride_wk + o * stride_wo, c_valid, 0.0)
            accumulator += g.to(tl.float32) * w.to(tl.float32)[None, :]
        elif KIND == "single":  # one tile of channels: what depends on them stays
            valid = inside[:, None] & o_valid[None, :]
            g = tl.load(g_ptr + ahead * channels_out + g_tile, valid, 0.0)
            if STATISTICS:
                g = _gradient(g, y_ptr + ahead * channels_out + g_tile, valid, mean, c1, c0)
            w = tl.load(weight_ptr + k * stride_wk + w_tile, o_valid[:, None] & c_valid[None, :], 0.0)
            accumulator += tl.dot(g, w.to(g.dtype), input_precision=PRECISION)
        else:
            local = tile * BLOCK_O + tl.arange(0, BLOCK_O)
            o = group * C_OUT + local
            o_valid = local < C_OUT
            offset = (source * channels_out)[:, None] + o[None, :]
            valid = inside[:, None] & o_valid[None, :]
            g = tl.load(g_ptr + offset, valid, 0.0)
            if STATISTICS:
                tile_mean, tile_c1, tile_c0 = line(y_mean_ptr, c1_ptr, c0_ptr, o, o_valid, HALF)
                g = _gradient(g, y_ptr + offset, valid, tile_mean, tile_c1, tile_c0)
            w_tile = weight_ptr + (k * stride_wk + o * stride_wo)[:, None] + (local_c * stride_wc)[None, :]
            w = tl.load(w_tile, o_valid[:, None] & c_valid[None, :], 0.0).to(g.dtype)
            accumulator += tl.dot(g, w, input_precision=PRECISION)
        tile += 1
        k = tl.where(tile == tiles_o, k + TAP_STEP, k)
        tile = tl.where(tile == tiles_o, 0, tile)
    valid = (t < record_length(x_lengths_ptr, batch, T, MASKED))[:, None] & c_valid[None, :]
    if NORM:
        x_ptr += batch * stride_xb
        x = tl.load(x_ptr + t[:, None] * stride_xt + (c * stride_xc)[None, :], valid, 0.0)
        value = affine(x, x_mean_ptr, x_scale_ptr, x_shift_ptr, c, c_valid)
        accumulator = tl.where(valid, times_slope(accumulator, value, X_ACTIVATION), 0.0)
        partial = tl.program_id(0).to(tl.int64) * channels_in + c
        tl.store(sum_ptr + partial, tl.sum(accumulator, axis=0), c_valid)
        deviation = x.to(tl.float32) - tl.load(x_mean_ptr + c, c_valid, 0.0)[None, :]
        products = tl.sum(accumulator * tl.where(valid, deviation, 0.0), axis=0)
        tl.store(product_ptr + partial, products, c_valid)
        accumulator *= tl.load(x_scale_ptr + c, c_valid, 0.0)[None, :]
    elif MASKED:
        accumulator = tl.where(valid, accumulator, 0.0)
    offset = (batch * T + t)[:, None] * channels_in + c[None, :]
    if HAS_BESIDE:
        accumulator += tl.load(beside_ptr + offset, t_valid[:, None] & c_valid[None, :], 0.0).to(tl.float32)
    tl.store(
        grad_x_ptr + offset,
        accumulator.to(grad_x_ptr.dtype.element_ty),
        t_valid[:, None] & c_valid[None, :],
    )


# --- gradient in the weight ---------------------------------------------------------------------------------


@triton.jit
def _conv1d_wgrad_kernel(
    g_ptr,
    y_ptr,
    y_mean_ptr,
    c0_ptr,
    c1_ptr,
    y_lengths_ptr,
    x_ptr,
    x_mean_ptr,
    x_scale_ptr,
    x_shift_ptr,
    x_lengths_ptr,
    partial_ptr,  # [parts, K * C_IN / groups, C_OUT]
    ROWS,  # B * T_OUT
    ROWS_OF_PART,
    T,
    T_OUT,
    C_IN,  # of a group, as is C_OUT
    C_OUT,
    GROUPS,
    K,
    stride_xb,
    stride_xt,
    stride_xc,
    STRIDE,
    PADDING,
    DILATION,
    STATISTICS: tl.constexpr,
    NORM: tl.constexpr,
    X_ACTIVATION: tl.constexpr,
    MASKED: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows, a row being a sample of a record
    BLOCK_R: tl.constexpr,  # pairs (k, c)
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
):
    channels = GROUPS * C_OUT
    if KIND == "depthwise":
        o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
        o_valid = o < channels
        r = tl.program_id(1)
        k = r
        c = o // C_OUT
        total = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    else:
        tiles_o = tl.cdiv(C_OUT, BLOCK_O)
        group = tl.program_id(0) // tiles_o
        local = (tl.program_id(0) % tiles_o) * BLOCK_O + tl.arange(0, BLOCK_O)
        o = group * C_OUT + local
        o_valid = local < C_OUT
        r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        k = r // C_IN
        c = group * C_IN + r % C_IN
        r_valid = r < K * C_IN
        total = tl.zeros((BLOCK_R, BLOCK_O), dtype=tl.float32)
    part = tl.program_id(2)
    first = part * ROWS_OF_PART
    last = tl.minimum(first + ROWS_OF_PART, ROWS)
    HALF: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    # The channels stay the same, and so does all that depends on them.
    if NORM:
        x_valid = o_valid if KIND == "depthwise" else r_valid
        mean, x_scale, x_shift = line(x_mean_ptr, x_scale_ptr, x_shift_ptr, c, x_valid, HALF)
    if STATISTICS:
        y_mean, c1, c0 = line(y_mean_ptr, c1_ptr, c0_ptr, o, o_valid, HALF)
    lane = tl.arange(0, BLOCK_M)
    g_tile = (lane * channels)[:, None] + o[None, :]
    g_ptr += first.to(tl.int64) * channels
    y_ptr += first.to(tl.int64) * channels
    for start in range(first, last, BLOCK_M):
        m = start + lane
        batch = m // T_OUT
        t = m - batch * T_OUT
        m_valid = m < last
        length = T
        kept = m_valid
        if MASKED:
            length = tl.load(x_lengths_ptr + batch, m_valid, 0)[:, None]
            kept = m_valid & (t < tl.load(y_lengths_ptr + batch, m_valid, 0))
        g_valid = kept[:, None] & o_valid[None, :]
        g = tl.load(g_ptr + g_tile, g_valid, 0.0)
        if STATISTICS:
            g = _gradient(g, y_ptr + g_tile, g_valid, y_mean, c1, c0)
        record = x_ptr + batch.to(tl.int64) * stride_xb
        if KIND == "depthwise":
            source = (t * STRIDE - PADDING + k * DILATION)[:, None]
            inside = kept[:, None] & o_valid[None, :] & (source >= 0) & (source < length) & (source < T)
        else:
            source = (t * STRIDE - PADDING)[:, None] + (k * DILATION)[None, :]
            inside = kept[:, None] & r_valid[None, :] & (source >= 0) & (source < length) & (source < T)
        x = tl.load(record[:, None] + (source * stride_xt + (c * stride_xc)[None, :]), inside, 0.0)
        if NORM:
            x = _operand(x, inside, mean, x_scale, x_shift, X_ACTIVATION)
        if KIND == "depthwise":
            total += x.to(tl.float32) * g.to(tl.float32)
        else:
            total += tl.dot(tl.trans(x), g, input_precision=PRECISION)
        g_ptr += BLOCK_M * channels
        y_ptr += BLOCK_M * channels
    part = part.to(tl.int64)
    if KIND == "depthwise":
        tl.store(partial_ptr + (part * K + r) * channels + o, tl.sum(total, axis=0), o_valid)
    else:
        rows = partial_ptr + (part * K * C_IN + r)[:, None] * channels
        tl.store(rows + o[None, :], total, r_valid[:, None] & o_valid[None, :])


# --- launches -----------------------------------------------------------------------------------------------


def convolve(
    x: LazyActivation,
    weight: Tensor,
    geometry: Geometry,
    epilogue: Epilogue = PLAIN,
    *,
    statistics: bool = False,
    lengths: Tensor | None = None,
    precision: str = "fp32",
) -> tuple[Tensor, TileStatistics | None]:
    """y [B, T_out, C_out]; with statistics those of each tile, over all valid samples.

    Args:
        x, geometry, epilogue: the convolution.
        weight: [C_out, C_in / groups, K], in any floating-point dtype: products are made in that of x.
        statistics: whether to reduce the tiles' statistics.
        lengths: [B], of the output, given where x has lengths.
        precision: of fp32 products.
    """
    if unreadable(x.values):
        # Rounded to what the kernels would multiply.
        rounded = weight.to(x.values.dtype).float()
        wide = (in_dtype(x, torch.float32), rounded, geometry, _floats(epilogue))
        y, tiles_of_y = convolve(*wide, statistics=statistics, lengths=lengths)
        return y.to(x.values.dtype), tiles_of_y
    batch, t, _ = x.values.shape
    c_out, c_in, k = weight.shape
    t_out = int(geometry.output_length(t, k))
    y = x.values.new_empty(batch, t_out, c_out)
    kind = _kind(c_in, c_out // geometry.groups)
    configuration = _forward_configuration(
        t_out, c_in, c_out // geometry.groups, x.values.dtype, kind, precision
    )
    tiles = batch * triton.cdiv(t_out, configuration["BLOCK_T"])
    count, mean, m2 = (
        torch.empty(shape if statistics else 0, dtype=torch.float32, device=y.device)
        for shape in ((tiles,), (tiles, c_out), (tiles, c_out))
    )
    weight = readable(weight, x.values.dtype)
    optional = {name: getattr(epilogue, name) for name in ("bias", "scale", "shift", "residual")}
    optional |= {
        name: None if optional[name] is None else optional[name].float() for name in ("scale", "shift")
    }
    if y.numel():
        launch(
            _conv1d_fwd_kernel,
            (tiles, _column_programs(c_out, geometry.groups, configuration["BLOCK_O"], kind)),
            weight_ptr=weight,
            y_lengths_ptr=x.values if lengths is None else lengths,
            y_ptr=y,
            count_ptr=count,
            mean_ptr=mean,
            m2_ptr=m2,
            # x stands in for a pointer that the kernel will not read.
            **{f"{name}_ptr": x.values if v is None else v.contiguous() for name, v in optional.items()},
            **{f"HAS_{name.upper()}": v is not None for name, v in optional.items()},
            ACTIVATION=ACTIVATION_CODES[epilogue.activation],
            STATISTICS=statistics,
            **_operand_arguments(x),
            **_sizes(x.values, weight, geometry, t_out),
            **_weight_strides(weight),
            **configuration,
        )
    return y, TileStatistics(count, mean, m2) if statistics else None


def readable(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight [C_out, C_in / groups, K] whose channels lie side by side, in memory that loads can join.

    That is the weight itself where it has such channels, whatever its dtype; a copy in ``dtype`` otherwise.
    """
    c_out, c_in, k = weight.shape
    if weight.stride(0) == 1 or c_out == 1 or (weight.stride(1) == 1 and c_in > 1):
        return weight
    laid = torch.empty(k, c_in, c_out, dtype=dtype, device=weight.device).permute(2, 1, 0)
    return laid.copy_(weight)


def input_gradient(
    grad: OutputGradient,
    weight: Tensor,
    geometry: Geometry,
    x: LazyActivation,
    beside: Tensor | None = None,
    *,
    precision: str = "fp32",
) -> tuple[Tensor, Tensor | None]:
    """The gradient in x.values [B, T, C_in]; of a norm in x also its sums [2 or 5, C_in], see ``merge_sums``.

    beside: [B, T, C_in], a gradient to add, where x is materialized.
    """
    if unreadable(x.values):
        rounded = weight.to(x.values.dtype).float()
        wide = (in_dtype(grad, torch.float32), rounded, geometry, in_dtype(x, torch.float32))
        grad_x, merged = input_gradient(*wide, None if beside is None else beside.float())
        return grad_x.to(x.values.dtype), merged
    batch, t, channels = x.values.shape
    c_out, c_in, _ = weight.shape
    kind = _kind(c_in, c_out // geometry.groups)
    configuration = _input_configuration(
        triton.cdiv(t, geometry.stride), c_in, c_out // geometry.groups, x.values.dtype, kind, precision
    )
    norm = x.mean is not None
    grad_x = torch.empty(batch, t, channels, dtype=x.values.dtype, device=x.values.device)
    tiles = batch * geometry.stride * triton.cdiv(triton.cdiv(t, geometry.stride), configuration["BLOCK_T"])
    sums = torch.empty((2, tiles, channels) if norm else 0, dtype=torch.float32, device=grad_x.device)
    weight = readable(weight, x.values.dtype)
    if grad_x.numel():
        launch(
            _conv1d_dgrad_kernel,
            (tiles, _column_programs(channels, geometry.groups, configuration["BLOCK_C"], kind)),
            weight_ptr=weight,
            beside_ptr=grad_x if beside is None else beside.contiguous(),
            grad_x_ptr=grad_x,
            HAS_BESIDE=beside is not None,
            sum_ptr=sums[0] if norm else sums,
            product_ptr=sums[1] if norm else sums,
            TAP_STEP=geometry.stride // math.gcd(geometry.stride, geometry.dilation),
            **_gradient_arguments(grad),
            **_operand_arguments(x),
            **_sizes(x.values, weight, geometry, grad.g.shape[1]),
            **_weight_strides(weight),
            **configuration,
        )
    return grad_x, merge_sums(sums, x) if norm else None


def weight_gradient(
    grad: OutputGradient, x: LazyActivation, geometry: Geometry, like: Tensor, *, precision: str = "fp32"
) -> Tensor:
    """The gradient in a weight [C_out, C_in / groups, K], in dtype and layout ``like`` that weight."""
    if unreadable(x.values):
        return weight_gradient(in_dtype(grad, torch.float32), in_dtype(x, torch.float32), geometry, like)
    batch, t_out, _ = grad.g.shape
    c_out, c_in, k = like.shape
    kind = _kind(c_in, c_out // geometry.groups)
    configuration = _weight_configuration(c_in * k, c_out // geometry.groups, x.values.dtype, kind, precision)
    columns = _column_programs(c_out, geometry.groups, configuration["BLOCK_O"], kind)
    taps = k if kind == "depthwise" else triton.cdiv(k * c_in, configuration["BLOCK_R"])
    rows = batch * t_out
    chunks = triton.cdiv(rows, 4 * configuration["BLOCK_M"])
    parts = max(1, min(chunks, triton.cdiv(WEIGHT_PROGRAMS, columns * taps)))
    rows_of_part = triton.cdiv(triton.cdiv(rows, parts), configuration["BLOCK_M"]) * configuration["BLOCK_M"]
    partial = torch.empty(parts, k, c_in, c_out, dtype=torch.float32, device=x.values.device)
    if rows:
        launch(
            _conv1d_wgrad_kernel,
            (columns, taps, parts),
            partial_ptr=partial,
            ROWS=rows,
            ROWS_OF_PART=rows_of_part,
            **_gradient_arguments(grad),
            **_operand_arguments(x),
            **_sizes(x.values, like, geometry, t_out),
            **configuration,
        )
    else:
        partial.zero_()
    return sum_parts(partial, like)


def _floats(epilogue: Epilogue) -> Epilogue:
    given = {name: getattr(epilogue, name) for name in ("bias", "scale", "shift", "residual")}
    wide = {name: None if v is None else v.float() for name, v in given.items()}
    return Epilogue(**wide, activation=epilogue.activation)


def _operand_arguments(x: LazyActivation) -> dict[str, Any]:
    norm = x.mean is not None
    return {
        "x_ptr": x.values,
        "x_mean_ptr": x.mean if norm else x.values,
        "x_scale_ptr": x.scale if norm else x.values,
        "x_shift_ptr": x.shift if norm else x.values,
        "x_lengths_ptr": x.values if x.lengths is None else x.lengths,
        "NORM": norm,
        "X_ACTIVATION": ACTIVATION_CODES[x.activation],
        "MASKED": x.lengths is not None,
    }


def _gradient_arguments(grad: OutputGradient) -> dict[str, Any]:
    g = grad.g.contiguous()
    statistics = grad.y is not None
    return {
        "g_ptr": g,
        "y_ptr": grad.y if statistics else g,
        "y_mean_ptr": grad.mean if statistics else g,
        "c0_ptr": grad.c0 if statistics else g,
        "c1_ptr": grad.c1 if statistics else g,
        "y_lengths_ptr": g if grad.lengths is None else grad.lengths,
        "STATISTICS": statistics,
    }


def _sizes(x: Tensor, weight: Tensor, geometry: Geometry, t_out: int) -> dict[str, int]:
    c_out, c_in, k = weight.shape
    return {
        "T": x.shape[1],
        "T_OUT": t_out,
        "C_IN": c_in,
        "C_OUT": c_out // geometry.groups,
        "GROUPS": geometry.groups,
        "K": k,
        "stride_xb": x.stride(0),
        "stride_xt": x.stride(1),
        "stride_xc": x.stride(2),
        "STRIDE": geometry.stride,
        "PADDING": geometry.padding,
        "DILATION": geometry.dilation,
    }


def _weight_strides(weight: Tensor) -> dict[str, int]:
    return dict(zip(("stride_wo", "stride_wc", "stride_wk"), weight.stride(), strict=True))


def _column_programs(channels: int, groups: int, block: int, kind: str) -> int:
    return (
        triton.cdiv(channels, block)
        if kind == "depthwise"
        else groups * triton.cdiv(channels // groups, block)
    )


def _kind(c_in: int, c_out: int) -> str:
    """How the kernels go through taps and channels, in a group of c_in to c_out channels.

    "dense": a tile of channels at a tap; "narrow": few channels, a tile spans taps; "depthwise": no matrix
    products, the channels of all groups side by side. Where one tile holds all channels, a configuration may
    replace "dense" by "single", whose loop moves on by taps alone.
    """
    if c_in == 1 and c_out <= 4:
        return "depthwise"
    return "narrow" if c_in % 16 and c_in < 32 else "dense"


def _block(size: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(size)))  # a product wants at least 16 of everything


def _forward_configuration(
    t_out: int, c_in: int, c_out: int, dtype: torch.dtype, kind: str, precision: str, hip: bool = HIP
) -> Configuration:
    depthwise, half = kind == "depthwise", dtype.itemsize == 2
    block_t = _block(t_out, 128 if half and not depthwise else 64)
    single = kind == "dense" and c_in <= 64 and half
    return {
        "KIND": "single" if single else kind,
        "BLOCK_T": block_t,
        "BLOCK_O": 64 if depthwise else _block(c_out, 64),
        "BLOCK_C": 16 if depthwise else 32 if kind == "narrow" else _block(c_in, 64 if single else 32),
        "PRECISION": product_precision(dtype, precision, hip),
        "num_warps": 8 if block_t == 128 else 4,
        "num_stages": 2,
    }


def _input_configuration(
    t: int, c_in: int, c_out: int, dtype: torch.dtype, kind: str, precision: str, hip: bool = HIP
) -> Configuration:
    depthwise, half = kind == "depthwise", dtype.itemsize == 2
    single = not depthwise and c_out <= 64 and half
    # Where all of g's channels are held, 64 rows: several such programs of 4 warps fit where one of 8 does.
    block_t = _block(t, 128 if half and not depthwise and not single else 64)
    return {
        "KIND": "depthwise" if depthwise else "single" if single else "dense",
        "BLOCK_T": block_t,
        "BLOCK_C": 64 if depthwise else _block(c_in, 64),
        "BLOCK_O": 16 if depthwise else _block(c_out, 64 if single else 32),
        "PRECISION": product_precision(dtype, precision, hip),
        "num_warps": 8 if block_t == 128 else 4,
        "num_stages": 2,
    }


def _weight_configuration(
    taps_and_channels: int, c_out: int, dtype: torch.dtype, kind: str, precision: str, hip: bool = HIP
) -> Configuration:
    depthwise = kind == "depthwise"
    block_r = 16 if depthwise else _block(taps_and_channels, 64)
    block_o = 64 if depthwise else _block(c_out, 64)
    return {
        "KIND": "depthwise" if depthwise else "dense",
        "BLOCK_M": 32,
        "BLOCK_R": block_r,
        "BLOCK_O": block_o,
        "PRECISION": product_precision(dtype, precision, hip),
        "num_warps": 8 if block_r * block_o >= 32 * 32 else 4,
        "num_stages": 2,
    }


# --- what compiles ------------------------------------------------------------------------------------------


def compile_cases(hip: bool) -> Iterator[CompileCase]:
    """Every launch above; some come twice.

    hip: compile for AMD's GPUs, whatever torch itself is built for.
    """
    flags = (False, True)
    norms = [(False, None), *((True, activation) for activation in ACTIVATION_CODES)]
    for name, dtype in DTYPES.items():
        for (norm, x_activation), masked in itertools.product(norms, flags):
            signal = {"NORM": norm, "X_ACTIVATION": ACTIVATION_CODES[x_activation], "MASKED": masked}
            for configuration in _configurations(_forward_configuration, dtype, hip):
                for epilogue in _epilogues(norm):
                    yield compile_case(
                        _conv1d_fwd_kernel, name, signal | epilogue, configuration, CONVENTIONS
                    )
            for kernel, made in (
                (_conv1d_dgrad_kernel, _input_configuration),
                (_conv1d_wgrad_kernel, _weight_configuration),
            ):
                for configuration, statistics in itertools.product(_configurations(made, dtype, hip), flags):
                    flags_of_it = signal | {"STATISTICS": statistics}
                    if kernel is _conv1d_dgrad_kernel:
                        flags_of_it["HAS_BESIDE"] = statistics and not norm
                    yield compile_case(kernel, name, flags_of_it, configuration, CONVENTIONS)


def _configurations(made: Callable[..., Configuration], dtype: torch.dtype, hip: bool) -> list[Configuration]:
    """Every configuration that ``made`` can return for a dtype, each once."""
    sizes = [1, 12, *(2**power for power in range(4, 8))]  # larger ones give no others
    found = {}
    for precision in PRECISIONS if dtype == torch.float32 and not hip else ("fp32",):
        for first, c_in, c_out in itertools.product(sizes, repeat=3):
            channels = (first, c_out) if made is _weight_configuration else (first, c_in, c_out)
            configuration = made(*channels, dtype, _kind(c_in, c_out), precision, hip)
            found[str(configuration)] = configuration
    return list(found.values())


def _epilogues(norm: bool) -> Iterator[dict[str, Any]]:
    """Flags of a forward launch's epilogue.

    Statistics come with no other flag, and so do layers that normalise what they read.
    """
    names = ("HAS_BIAS", "HAS_SCALE", "HAS_SHIFT", "HAS_RESIDUAL")
    for statistics in (False, True):
        yield dict.fromkeys(names, False) | {"ACTIVATION": 0, "STATISTICS": statistics}
    if not norm:
        for *given, activation in itertools.product(*[(False, True)] * 4, ACTIVATION_CODES.values()):
            yield dict(zip(names, given, strict=True)) | {"ACTIVATION": activation, "STATISTICS": False}
