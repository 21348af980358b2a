"""The gradient of the transport cost in the points in Triton: sum Q_ij dC_ij, the weighted plan Q held fixed.

    Q_ij = exp((f_i + g_j - C_ij) / eps) (scale a_i b_j + left_i b_j + a_i right_j)
    sqeuclidean   dx_i = 2 (x_i sum_j Q_ij - sum_j Q_ij y_j)
    euclidean     the same without the 2, Q_ij divided by the distance
    dot           dx_i = -sum_j Q_ij y_j
    cosine        dx_i = x_i sum_j R_ij x_i y_j / |x_i|^2 - sum_j R_ij y_j,    R_ij = Q_ij / (|x_i| |y_j|)

The trick: Q is formed once and becomes the operand of the matrix products with y and, transposed, with x. One
TF32 product would round Q to 11 bits, and where clouds are clustered the sums nearly cancel. So Q is a sum of
two bf16 numbers (three for fp32 points), and products of bf16 numbers are exact; bf16 points are their own
operand, fp16 points two bf16 numbers. The sums of Q are those of the same numbers, so that they cancel too.

- Up to 128 x 128 half-precision points (128 x 64 in fp32, and for implicit gradients): one program forms Q,
  then walks over D. Both gradients in one launch; bytes moved: the points twice and the gradients.
- All pairs of clouds: a kernel writes the Q of some clouds, and the library multiplies them. Bytes moved: for
  each cell three times 4 (6 for fp32 points).
- Larger clouds: a program makes 64 rows of one side's gradient, forming their Q tile by tile.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecgot.kernels.compilation import DTYPES, CompileCase, compile_case
from ecgot.kernels.dispatch import HIP, INTERPRETED, launch
from ecgot.kernels.ot.checks import CENTRED_COSTS, COSTS, PRECISIONS
from ecgot.kernels.ot.problem import PlanWeights, Problem
from ecgot.kernels.ot.triton_onchip import fits
from ecgot.kernels.ot.triton_tiles import (
    CONVENTIONS,
    COSINE,
    COST_CODES,
    DOT,
    EUCLIDEAN,
    LOG2_E,
    MAX_EXPONENT,
    SQEUCLIDEAN,
    all_registers,
    block_size,
    exchanged,
    inverse_norm,
    launch_arguments,
    load_chunk,
    load_weights,
    log2,
)

WIDENED = tl.constexpr(INTERPRETED)  # the interpreter would multiply the raw bits of bf16
HALVES = (torch.float16, torch.bfloat16)
MAX_CELLS = 2**26  # of the plans of pairs that are held at once: 256 MB in two parts, 384 MB in three
OF_POINTS = replace(CONVENTIONS, in_dtype=CONVENTIONS.in_dtype | {"grad_y_ptr"})
OF_PLANS = replace(CONVENTIONS, types={**CONVENTIONS.types, "plan_ptr": "*bf16"})


# --- products of bf16 parts ---------------------------------------------------------------------------------


@triton.jit
def _parts(value, COUNT: tl.constexpr):
    """bf16 numbers that add up to fp32 ``value``, two to 17 bits, three to all; others repeat the last."""
    high = value.to(tl.bfloat16)
    rest = value - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = middle
    if COUNT == 3:
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return high, middle, low


@triton.jit
def _point_parts(points, COUNT: tl.constexpr):
    high = points
    middle = points
    low = points
    if COUNT > 1:
        high, middle, low = _parts(points.to(tl.float32), COUNT)
    return high, middle, low


@triton.jit
def _multiply(a, b, total):
    if WIDENED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total)


@triton.jit
def _multiply_parts(
    a_high, a_middle, a_low, b_high, b_middle, b_low, total, A_COUNT: tl.constexpr, B_COUNT: tl.constexpr
):
    """total + a b, the smallest terms first; those below the last part of a are left out."""
    if A_COUNT == 3:
        total = _multiply(a_low, b_high, total)
        if B_COUNT == 3:
            total = _multiply(a_high, b_low, total)
        if B_COUNT >= 2:
            total = _multiply(a_middle, b_middle, total)
    total = _multiply(a_middle, b_high, total)
    if B_COUNT >= 2:
        total = _multiply(a_high, b_middle, total)
    return _multiply(a_high, b_high, total)


@triton.jit
def _row_sums(high, middle, low, ROWS: tl.constexpr, COLUMNS: tl.constexpr, COUNT: tl.constexpr):
    """Sums [ROWS] of a matrix in parts: a product with ones needs no shuffles between threads."""
    ones = tl.full((COLUMNS, 16), 1.0, dtype=tl.float32).to(tl.bfloat16)
    total = tl.zeros((ROWS, 16), dtype=tl.float32)
    if COUNT == 3:
        total = _multiply(low, ones, total)
    total = _multiply(middle, ones, total)
    total = _multiply(high, ones, total)
    return tl.sum(total, axis=1) / 16


# --- shared pieces ------------------------------------------------------------------------------------------


@triton.jit
def _load(
    points_ptr,
    centre_ptr,
    index,
    valid,
    k,
    D,
    stride_n,
    stride_d,
    CENTRED: tl.constexpr,
    RAW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Coordinates k to k + BLOCK of some points: as they are where RAW, else as ``load_chunk`` does."""
    if RAW:
        column = k + tl.arange(0, BLOCK)
        mask = valid[:, None] & (column < D)[None, :]
        rows = points_ptr + index.to(tl.int64) * stride_n  # offsets may pass 2^31
        points = tl.load(rows[:, None] + (column.to(tl.int64) * stride_d)[None, :], mask=mask, other=0.0)
    else:
        points = load_chunk(points_ptr, centre_ptr, index, valid, k, D, stride_n, stride_d, CENTRED, BLOCK)
    return points


@triton.jit
def _compact(vector):
    """The same vector, worked out once: else each thread would repeat the work for its tile's columns."""
    return tl.sum(vector[:, None], axis=1)


@triton.jit
def _log_inverse_norm(inverse):  # NaN stays
    return tl.where(inverse == 0, float("-inf"), tl.log2(tl.where(inverse == 0, 1.0, inverse)))


@triton.jit
def _inner_products(
    x_ptr,
    y_ptr,
    x_centre_ptr,
    y_centre_ptr,
    x_index,
    y_index,
    x_valid,
    y_valid,
    D,
    stride_xn,
    stride_xd,
    stride_yn,
    stride_yd,
    CENTRED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x y^T [BLOCK_N, BLOCK_M], and the squared norms of x [BLOCK_N] and y [BLOCK_M], of centred points.

    PRECISION "exact" multiplies half-precision points as they are; the others are Triton's, for fp32.
    """
    RAW: tl.constexpr = PRECISION == "exact"
    x_square = tl.zeros((BLOCK_N,), dtype=tl.float32)
    y_square = tl.zeros((BLOCK_M,), dtype=tl.float32)
    inner = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for k in range(0, D, BLOCK_D):
        x = _load(x_ptr, x_centre_ptr, x_index, x_valid, k, D, stride_xn, stride_xd, CENTRED, RAW, BLOCK_D)
        y = _load(y_ptr, y_centre_ptr, y_index, y_valid, k, D, stride_yn, stride_yd, CENTRED, RAW, BLOCK_D)
        x_wide = x.to(tl.float32)
        y_wide = y.to(tl.float32)
        x_square += tl.sum(x_wide * x_wide, axis=1)
        y_square += tl.sum(y_wide * y_wide, axis=1)
        if RAW:
            inner = _multiply(x, tl.trans(y), inner)
        else:
            inner += tl.dot(x, tl.trans(y), input_precision=PRECISION)
    return inner, x_square, y_square


@triton.jit
def _weighted_plan(
    inner,
    x_square,
    y_square,
    f,
    g,
    a,
    b,
    scale,
    left,
    right,
    per_unit,
    COST: tl.constexpr,
    IMPLICIT: tl.constexpr,
):
    """Q [BLOCK_N, BLOCK_M], or R with the cosine; without IMPLICIT still to be multiplied by ``scale``.

    f and g are in units of eps / log2(e). Weights are added to them as logarithms, as are the squared
    norms: then a cell takes an addition, a multiply-add and an exponential. The cost's lower bound 0 is not
    enforced, which changes it by no more than its rounding.
    """
    inverse_x = x_square
    inverse_y = y_square
    if COST == COSINE:
        inverse_x = inverse_norm(x_square)
        inverse_y = inverse_norm(y_square)
    if not IMPLICIT:
        # Potentials of points without weight may be infinite.
        f = tl.where(a > 0, f + log2(a), float("-inf"))
        g = tl.where(b > 0, g + log2(b), float("-inf"))
        if COST == COSINE:
            f += _log_inverse_norm(inverse_x)
            g += _log_inverse_norm(inverse_y)
    if COST == SQEUCLIDEAN:
        f -= x_square * per_unit
        g -= y_square * per_unit
    elif COST == COSINE:
        f -= per_unit
    f = _compact(f)
    g = _compact(g)
    if COST == COSINE:
        inverse_y = _compact(inverse_y)
    divisor = 1.0
    if COST == SQEUCLIDEAN:
        exponent = f[:, None] + g[None, :] + inner * (2 * per_unit)
    elif COST == DOT:
        exponent = f[:, None] + g[None, :] + inner * per_unit
    elif COST == COSINE:
        exponent = f[:, None] + g[None, :] + inner * (per_unit * inverse_x)[:, None] * inverse_y[None, :]
    else:
        square = x_square[:, None] + y_square[None, :] - 2 * inner
        # Coinciding points: the distance has no derivative there, and we take 0. NaN stays NaN.
        divisor = tl.where(square > 0, tl.rsqrt(tl.where(square > 0, square, 1.0)), square * 0.0)
        exponent = f[:, None] + g[None, :] - tl.where(square > 0, square, 0.0) * divisor * per_unit
    if IMPLICIT:
        q = tl.exp2(tl.minimum(exponent, MAX_EXPONENT, propagate_nan=tl.PropagateNan.ALL))
        q *= (a * scale + left)[:, None] * b[None, :] + a[:, None] * _compact(right)[None, :]
        if COST == COSINE:
            q *= inverse_x[:, None] * inverse_y[None, :]
    else:
        q = tl.exp2(exponent)
    if COST == EUCLIDEAN:
        q *= divisor
    return q, inverse_x, inverse_y


@triton.jit
def _side_gradient(
    high,
    middle,
    low,
    along,
    shift,
    unit,
    own_ptr,
    other_ptr,
    own_centre_ptr,
    other_centre_ptr,
    own_index,
    other_index,
    own_valid,
    other_valid,
    grad_ptr,
    count,
    D,
    own_stride_n,
    own_stride_d,
    other_stride_n,
    other_stride_d,
    COST: tl.constexpr,
    CENTRED: tl.constexpr,
    SHIFTED: tl.constexpr,
    PLAN_PARTS: tl.constexpr,
    POINT_PARTS: tl.constexpr,
    RAW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Store unit (along_i x_i - sum_j Q_ij y_j + shift_i (x_centre - y_centre)) for one whole side."""
    for k in range(0, D, BLOCK_OUT):
        other = _load(
            other_ptr, other_centre_ptr, other_index, other_valid, k, D, other_stride_n, other_stride_d,
            CENTRED, RAW, BLOCK_OUT,
        )  # fmt: skip
        other_high, other_middle, other_low = _point_parts(other, POINT_PARTS)
        grad = _multiply_parts(
            high, middle, low, other_high, other_middle, other_low, tl.zeros((BLOCK, BLOCK_OUT),
            dtype=tl.float32), PLAN_PARTS, POINT_PARTS,
        )  # fmt: skip
        if COST == DOT:
            grad = -grad
        else:
            own = _load(
                own_ptr,
                own_centre_ptr,
                own_index,
                own_valid,
                k,
                D,
                own_stride_n,
                own_stride_d,
                CENTRED,
                RAW,
                BLOCK_OUT,
            )
            grad = along[:, None] * own.to(tl.float32) - grad
        _store_gradient(
            grad, shift, unit, own_centre_ptr, other_centre_ptr, own_index, own_valid, grad_ptr, count, k,
            D, SHIFTED, BLOCK_OUT,
        )  # fmt: skip


@triton.jit
def _store_gradient(
    grad,
    shift,
    unit,
    own_centre_ptr,
    other_centre_ptr,
    own_index,
    own_valid,
    grad_ptr,
    count,
    k,
    D,
    SHIFTED: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    column = k + tl.arange(0, BLOCK_OUT)
    inside = column < D
    if SHIFTED:
        step = tl.load(own_centre_ptr + column, mask=inside, other=0.0)
        step -= tl.load(other_centre_ptr + column, mask=inside, other=0.0)
        grad += shift[:, None] * step[None, :]
    grad = tl.where(own_valid[:, None], grad * unit, 0.0)
    tile = grad_ptr + (own_index * D)[:, None] + column[None, :]
    tl.store(tile, grad.to(grad_ptr.dtype.element_ty), mask=(own_index < count)[:, None] & inside[None, :])


@triton.jit
def _plan_and_sums(
    inner,
    x_square,
    y_square,
    f,
    g,
    a,
    b,
    scale,
    left,
    right,
    per_unit,
    factor,
    COST: tl.constexpr,
    IMPLICIT: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The parts of ``factor`` times Q (or R), and what x_i [BLOCK_N] and y_j [BLOCK_M] are multiplied by."""
    q, inverse_x, inverse_y = _weighted_plan(
        inner, x_square, y_square, f, g, a, b, scale, left, right, per_unit, COST, IMPLICIT
    )
    q *= factor
    high, middle, low = _parts(q, PARTS)
    along_x = tl.zeros((BLOCK_N,), dtype=tl.float32)
    along_y = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if COST == COSINE:
        if PARTS == 2:
            q = high.to(tl.float32) + middle.to(tl.float32)
        q *= inner
        along_x = inverse_x * inverse_x * tl.sum(q, axis=1)
        along_y = inverse_y * inverse_y * tl.sum(q, axis=0)
    elif COST != DOT:
        if PARTS == 2:
            along_x = _row_sums(high, middle, low, BLOCK_N, BLOCK_M, PARTS)
            along_y = _row_sums(tl.trans(high), tl.trans(middle), tl.trans(low), BLOCK_M, BLOCK_N, PARTS)
        else:
            along_x = tl.sum(q, axis=1)
            along_y = tl.sum(q, axis=0)
    return high, middle, low, along_x, along_y


# --- a problem in one program -------------------------------------------------------------------------------


@triton.jit
def _whole_gradient_kernel(
    x_ptr,
    y_ptr,
    a_ptr,
    b_ptr,
    x_centre_ptr,
    y_centre_ptr,
    eps_ptr,
    f_ptr,
    g_ptr,
    scale_ptr,
    left_ptr,
    right_ptr,
    grad_x_ptr,
    grad_y_ptr,
    N,
    M,
    D,
    stride_xb,
    stride_xn,
    stride_xd,
    stride_yb,
    stride_yn,
    stride_yd,
    COST: tl.constexpr,
    CENTRED: tl.constexpr,
    IMPLICIT: tl.constexpr,
    STEP: tl.constexpr,
    PLAN_PARTS: tl.constexpr,
    POINT_PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Both gradients of one problem."""
    problem = tl.program_id(0).to(tl.int64)
    x_index = tl.arange(0, BLOCK_N)
    y_index = tl.arange(0, BLOCK_M)
    a, x_valid = load_weights(a_ptr + problem * N, x_index, N)
    b, y_valid = load_weights(b_ptr + problem * M, y_index, M)
    x_ptr += problem * stride_xb
    y_ptr += problem * stride_yb
    x_centre_ptr += problem * D
    y_centre_ptr += problem * D
    per_unit = LOG2_E / tl.load(eps_ptr + problem)
    solvable = (tl.sum(a, axis=0) > 0) & (tl.sum(b, axis=0) > 0)
    scale = tl.where(solvable, tl.load(scale_ptr + problem), 0.0)
    unit = scale
    left = a
    right = b
    kept = 1.0  # what of the weights the step between the centres is multiplied by, before ``unit``
    wanted = scale != 0
    if IMPLICIT:
        unit = 1.0
        kept = scale
        wanted = solvable
    # A problem without a gradient reads no points: they may be NaN.
    depth = tl.where(wanted, D, 0)
    x_valid = x_valid & (x_index < tl.where(wanted, N, 0))
    y_valid = y_valid & (y_index < tl.where(wanted, M, 0))
    inner, x_square, y_square = _inner_products(
        x_ptr, y_ptr, x_centre_ptr, y_centre_ptr, x_index, y_index, x_valid, y_valid, depth, stride_xn,
        stride_xd, stride_yn, stride_yd, CENTRED, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
    )  # fmt: skip
    f = tl.load(f_ptr + problem * N + x_index, mask=x_valid, other=0.0) * per_unit
    g = tl.load(g_ptr + problem * M + y_index, mask=y_valid, other=0.0) * per_unit
    if IMPLICIT:
        left = tl.load(left_ptr + problem * N + x_index, mask=x_valid, other=0.0)
        right = tl.load(right_ptr + problem * M + y_index, mask=y_valid, other=0.0)
    high, middle, low, along_x, along_y = _plan_and_sums(
        inner, x_square, y_square, f, g, a, b, scale, left, right, per_unit, 1.0, COST, IMPLICIT,
        PLAN_PARTS, BLOCK_N, BLOCK_M,
    )  # fmt: skip
    RAW: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    if COST == SQEUCLIDEAN:
        unit *= 2
    shift_x = a * kept if STEP else tl.zeros((BLOCK_N,), dtype=tl.float32)
    shift_y = b * kept if STEP else tl.zeros((BLOCK_M,), dtype=tl.float32)
    if RAW:  # the products below are with points that are not centred
        shift_x -= along_x
        shift_y -= along_y
    SHIFTED: tl.constexpr = STEP or (RAW and CENTRED)
    _side_gradient(
        high, middle, low, along_x, shift_x, unit, x_ptr, y_ptr, x_centre_ptr, y_centre_ptr, x_index,
        y_index, x_valid, y_valid, grad_x_ptr + problem * N * D, N, D, stride_xn, stride_xd, stride_yn,
        stride_yd, COST, CENTRED, SHIFTED, PLAN_PARTS, POINT_PARTS, RAW, BLOCK_N, BLOCK_OUT,
    )  # fmt: skip
    _side_gradient(
        tl.trans(high), tl.trans(middle), tl.trans(low), along_y, shift_y, unit, y_ptr, x_ptr, y_centre_ptr,
        x_centre_ptr, y_index, x_index, y_valid, x_valid, grad_y_ptr + problem * M * D, M, D, stride_yn,
        stride_yd, stride_xn, stride_xd, COST, CENTRED, SHIFTED, PLAN_PARTS, POINT_PARTS, RAW, BLOCK_M,
        BLOCK_OUT,
    )  # fmt: skip


# --- all pairs ----------------------------------------------------------------------------------------------


@triton.jit
def _pair_plan_kernel(
    x_ptr,
    y_ptr,
    a_ptr,
    b_ptr,
    x_centre_ptr,
    y_centre_ptr,
    eps_ptr,
    f_ptr,
    g_ptr,
    scale_ptr,
    plan_ptr,
    along_x_ptr,
    along_y_ptr,
    N,
    M,
    D,
    B,
    K,
    first_x,
    first_y,
    count_y,
    stride_part,
    stride_xb,
    stride_xn,
    stride_xd,
    stride_yb,
    stride_yn,
    stride_yd,
    COST: tl.constexpr,
    CENTRED: tl.constexpr,
    PLAN_PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The parts of one pair's Q in [PLAN_PARTS, clouds x, N, count_y, M], with ``scale`` and the 2.

    BLOCK_R rows at a time, so that registers hold them.
    """
    own = tl.program_id(0) // count_y
    other = tl.program_id(0) % count_y
    x_cloud = (first_x + own).to(tl.int64)
    y_cloud = (first_y + other).to(tl.int64)
    problem = x_cloud * K + y_cloud
    y_index = tl.arange(0, BLOCK_M)
    all_a, _ = load_weights(a_ptr + x_cloud * N, tl.arange(0, BLOCK_N), N)
    b, y_valid = load_weights(b_ptr + y_cloud * M, y_index, M)
    per_unit = LOG2_E / tl.load(eps_ptr + problem)
    solvable = (tl.sum(all_a, axis=0) > 0) & (tl.sum(b, axis=0) > 0)
    scale = tl.where(solvable, tl.load(scale_ptr + problem), 0.0)
    wanted = scale != 0
    # A pair without a gradient reads no points: they may be NaN.
    depth = tl.where(wanted, D, 0)
    y_valid = y_valid & (y_index < tl.where(wanted, M, 0))
    g = tl.load(g_ptr + problem * M + y_index, mask=y_valid, other=0.0) * per_unit
    factor = 2 * scale if COST == SQEUCLIDEAN else scale
    all_along_y = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for first in range(0, BLOCK_N, BLOCK_R):
        x_index = first + tl.arange(0, BLOCK_R)
        a, x_valid = load_weights(a_ptr + x_cloud * N, x_index, N)
        x_valid = x_valid & (x_index < tl.where(wanted, N, 0))
        f = tl.load(f_ptr + problem * N + x_index, mask=x_valid, other=0.0) * per_unit
        inner, x_square, y_square = _inner_products(
            x_ptr + x_cloud * stride_xb, y_ptr + y_cloud * stride_yb, x_centre_ptr + x_cloud * D,
            y_centre_ptr + y_cloud * D, x_index, y_index, x_valid, y_valid, depth, stride_xn, stride_xd,
            stride_yn, stride_yd, CENTRED, BLOCK_R, BLOCK_M, BLOCK_D, PRECISION,
        )  # fmt: skip
        high, middle, low, along_x, along_y = _plan_and_sums(
            inner, x_square, y_square, f, g, a, b, scale, a, b, per_unit, factor, COST, False, PLAN_PARTS,
            BLOCK_R, BLOCK_M,
        )  # fmt: skip
        all_along_y += along_y
        inside = (x_index < N)[:, None] & (y_index < M)[None, :]
        row = own * N + x_index
        tile = plan_ptr + (row.to(tl.int64) * count_y * M)[:, None] + (other * M + y_index)[None, :]
        tl.store(tile, high, mask=inside)
        tl.store(tile + stride_part, middle, mask=inside)
        if PLAN_PARTS == 3:
            tl.store(tile + 2 * stride_part, low, mask=inside)
        if COST != DOT:
            tl.store(along_x_ptr + (x_cloud * N + x_index) * K + y_cloud, along_x, mask=x_index < N)
    if COST != DOT:
        tl.store(along_y_ptr + (y_cloud * M + y_index) * B + x_cloud, all_along_y, mask=y_index < M)


# --- tiles of one side --------------------------------------------------------------------------------------


@triton.jit
def _tile_gradient_kernel(
    x_ptr,
    y_ptr,
    a_ptr,
    b_ptr,
    x_centre_ptr,
    y_centre_ptr,
    eps_ptr,
    f_ptr,
    g_ptr,
    scale_ptr,
    wanted_ptr,
    left_ptr,
    right_ptr,
    grad_x_ptr,
    N,
    M,
    D,
    stride_xb,
    stride_xn,
    stride_xd,
    stride_yb,
    stride_yn,
    stride_yd,
    COST: tl.constexpr,
    CENTRED: tl.constexpr,
    IMPLICIT: tl.constexpr,
    STEP: tl.constexpr,
    PLAN_PARTS: tl.constexpr,
    POINT_PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_OUT coordinates of BLOCK_N points' gradients; that in y is the same with the roles exchanged.

    ``scale`` is 0 where there is no plan, ``wanted`` is 0 where no gradient is asked for.
    """
    problem = tl.program_id(0).to(tl.int64)
    x_index = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(2) * BLOCK_OUT
    a, x_valid = load_weights(a_ptr + problem * N, x_index, N)
    x_ptr += problem * stride_xb
    y_ptr += problem * stride_yb
    x_centre_ptr += problem * D
    y_centre_ptr += problem * D
    per_unit = LOG2_E / tl.load(eps_ptr + problem)
    scale = tl.load(scale_ptr + problem)
    unit = scale
    kept = 1.0
    left = a
    wanted = tl.load(wanted_ptr + problem) != 0
    if IMPLICIT:
        unit = 1.0
        kept = scale
        left = tl.load(left_ptr + problem * N + x_index, mask=x_valid, other=0.0)
    # A problem without a gradient reads no points: they may be NaN.
    end = tl.where(wanted, M, 0)
    x_valid = x_valid & (x_index < tl.where(wanted, N, 0))
    f = tl.load(f_ptr + problem * N + x_index, mask=x_valid, other=0.0) * per_unit
    RAW: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    to_y = tl.zeros((BLOCK_N, BLOCK_OUT), dtype=tl.float32)
    along = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for m in range(0, end, BLOCK_M):
        y_index = m + tl.arange(0, BLOCK_M)
        b, y_valid = load_weights(b_ptr + problem * M, y_index, M)
        g = tl.load(g_ptr + problem * M + y_index, mask=y_valid, other=0.0) * per_unit
        right = b
        if IMPLICIT:
            right = tl.load(right_ptr + problem * M + y_index, mask=y_valid, other=0.0)
        inner, x_square, y_square = _inner_products(
            x_ptr, y_ptr, x_centre_ptr, y_centre_ptr, x_index, y_index, x_valid, y_valid, D, stride_xn,
            stride_xd, stride_yn, stride_yd, CENTRED, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
        )  # fmt: skip
        q, inverse_x, _ = _weighted_plan(
            inner, x_square, y_square, f, g, a, b, scale, left, right, per_unit, COST, IMPLICIT
        )
        high, middle, low = _parts(q, PLAN_PARTS)
        if PLAN_PARTS == 2:
            q = high.to(tl.float32) + middle.to(tl.float32)
        if COST == COSINE:
            along += inverse_x * inverse_x * tl.sum(q * inner, axis=1)
        elif COST != DOT:
            along += tl.sum(q, axis=1)
        y = _load(
            y_ptr, y_centre_ptr, y_index, y_valid, first, D, stride_yn, stride_yd, CENTRED, RAW, BLOCK_OUT
        )
        y_high, y_middle, y_low = _point_parts(y, POINT_PARTS)
        to_y = _multiply_parts(high, middle, low, y_high, y_middle, y_low, to_y, PLAN_PARTS, POINT_PARTS)
    grad = -to_y
    if COST != DOT:
        x = _load(
            x_ptr, x_centre_ptr, x_index, x_valid, first, D, stride_xn, stride_xd, CENTRED, RAW, BLOCK_OUT
        )
        grad += along[:, None] * x.to(tl.float32)
    if COST == SQEUCLIDEAN:
        unit *= 2
    shift = a * kept if STEP else tl.zeros((BLOCK_N,), dtype=tl.float32)
    if RAW:
        shift -= along
    _store_gradient(
        grad, shift, unit, x_centre_ptr, y_centre_ptr, x_index.to(tl.int64), x_valid,
        grad_x_ptr + problem * N * D, N, first, D, STEP or (RAW and CENTRED), BLOCK_OUT,
    )  # fmt: skip


# --- launches -----------------------------------------------------------------------------------------------


def _precisions(dtype: torch.dtype, cost: str, precision: str, hip: bool = HIP) -> dict[str, Any]:
    """How the products that form the cost are made; how many bf16 numbers the plan and the points are."""
    if dtype in HALVES:
        points = 1 if dtype == torch.bfloat16 else 2
        formed = "exact" if cost not in CENTRED_COSTS else "ieee" if hip else "tf32x3"
        return {"PRECISION": formed, "PLAN_PARTS": 2, "POINT_PARTS": points}
    if precision == "tf32" and not hip:
        return {"PRECISION": "tf32", "PLAN_PARTS": 2, "POINT_PARTS": 2}
    return {"PRECISION": "ieee" if hip else "tf32x3", "PLAN_PARTS": 3, "POINT_PARTS": 3}


def _in_one_program(n: int, m: int, dtype: torch.dtype, implicit: bool, hip: bool = HIP) -> bool:
    """Whether one program can hold a plan and make both products with it without spilling."""
    block_n, block_m = block_size(n), block_size(m)
    cells = 128 * 128 if dtype in HALVES and not (implicit or hip) else 128 * 64
    return max(block_n, block_m) <= 128 and block_n * block_m <= cells


def _whole_configuration(n: int, m: int, d: int, dtype: torch.dtype, hip: bool = HIP) -> dict[str, Any]:
    """Blocks and warps of a problem in one program, n >= m: the other way it would take more registers."""
    block_n, block_m = block_size(n), block_size(m)
    narrow = dtype != torch.bfloat16 or block_m < 64 <= block_n // 2
    return {
        "BLOCK_N": block_n,
        "BLOCK_M": block_m,
        "BLOCK_D": 16,
        "BLOCK_OUT": min(block_size(d), 16 if narrow else 32),
        "num_warps": _warps(block_n, block_m),
        "num_stages": 1,
    } | all_registers(hip)


def _pair_configuration(n: int, m: int, hip: bool = HIP) -> dict[str, Any]:
    """Blocks and warps of a pair's plan."""
    block_n, block_m = block_size(n), block_size(m)
    rows = min(block_n, max(16, (32 if block_m >= 128 else 64) * 64 // block_m))
    blocks = {"BLOCK_N": block_n, "BLOCK_M": block_m, "BLOCK_R": rows, "BLOCK_D": 16}
    return blocks | {"num_warps": _warps(rows, block_m), "num_stages": 1} | all_registers(hip)


def _warps(block_n: int, block_m: int) -> int:
    """The fewest whose registers hold the plan and what becomes of it; found by compiling."""
    cells = block_n * block_m
    if max(block_n, block_m) >= 128:
        return 8
    return 1 if cells <= 16 * 16 else 2 if cells <= 16 * 32 else 4


def _tile_configuration(n: int, m: int, d: int, dtype: torch.dtype, hip: bool = HIP) -> dict[str, Any]:
    """Blocks and warps of a tile: all of D in one program up to 128, so that Q is formed once."""
    return {
        "BLOCK_N": min(block_size(n), 64),
        "BLOCK_M": min(block_size(m), 64 if dtype in HALVES else 32),
        "BLOCK_D": 16,
        "BLOCK_OUT": min(block_size(d), 128),
        "num_warps": 8 if d > 64 else 4,
        "num_stages": 1,
    } | all_registers(hip)


def cost_vjp(problem: Problem, given: PlanWeights, *, step: bool) -> tuple[Tensor, Tensor]:
    """The gradient of sum Q_ij C_ij, Q held fixed, in x [B, N, D] and y [B, M, D] ([K, M, D] for pairs).

    Args:
        step: whether the value is that of the true squared distance although each cloud was moved to its own
            mean: adds 2 scale a_i (x_centre - y_centre) to x_i and the opposite, with b_j, to y_j. Only where
            both marginals are kept.
    """
    assert problem.y is not None
    if not problem.x.shape[2]:
        return torch.empty_like(problem.x), torch.empty_like(problem.y)
    step = step and problem.cost == "sqeuclidean" and problem.balanced and problem.x_centre is not None
    if problem.pairs:
        return _pairs(problem, given, step)
    if _in_one_program(*problem.size, problem.x.dtype, given.left is not None):
        return _whole(problem, given, step)
    return _tiled(problem, given, step)


def _arguments(problem: Problem) -> dict[str, Any]:
    """Those of all kernels here."""
    return launch_arguments(problem) | _precisions(problem.x.dtype, problem.cost, problem.precision)


def _weights(given: PlanWeights) -> dict[str, Any]:
    f, g = given.f.contiguous(), given.g.contiguous()
    return {
        "f_ptr": f,
        "g_ptr": g,
        "left_ptr": f if given.left is None else given.left.contiguous(),
        "right_ptr": g if given.right is None else given.right.contiguous(),
        "IMPLICIT": given.left is not None,
    }


def _whole(problem: Problem, given: PlanWeights, step: bool) -> tuple[Tensor, Tensor]:
    x, y = problem.x, problem.y
    assert y is not None
    grad_x, grad_y = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, y))
    arguments = _arguments(problem) | _weights(given) | {"grad_x_ptr": grad_x, "grad_y_ptr": grad_y}
    n, m = problem.size
    if n < m:
        n, m, arguments = m, n, exchanged(arguments)
    launch(
        _whole_gradient_kernel,
        (len(x),),
        **arguments,
        scale_ptr=given.scale.contiguous(),
        STEP=step,
        **_whole_configuration(n, m, x.shape[2], x.dtype),
    )
    return grad_x, grad_y


def _tiled(problem: Problem, given: PlanWeights, step: bool) -> tuple[Tensor, Tensor]:
    assert problem.y is not None
    solvable = problem.solvable()
    scale = torch.where(solvable, given.scale, 0.0)
    arguments = _arguments(problem) | _weights(given)
    arguments |= {
        "scale_ptr": scale,
        "wanted_ptr": solvable.to(scale.dtype) if arguments["IMPLICIT"] else scale,
        "STEP": step,
    }
    return _tiled_side(problem.x, arguments), _tiled_side(problem.y, exchanged(arguments))


def _tiled_side(points: Tensor, arguments: dict[str, Any]) -> Tensor:
    grad = torch.empty(points.shape, dtype=points.dtype, device=points.device)
    count, n, d = points.shape
    configuration = _tile_configuration(n, arguments["M"], d, points.dtype)
    grid = (count, triton.cdiv(n, configuration["BLOCK_N"]), triton.cdiv(d, configuration["BLOCK_OUT"]))
    launch(_tile_gradient_kernel, grid, **arguments, grad_x_ptr=grad, **configuration)
    return grad


# --- pairs: products by the library -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Clouds:
    """One side of all pairs, as the products take it.

    points: [C, n, D] in fp32, centred only if they came so; 0 where they do not exist or are not finite, as
    0 * NaN would reach the partners. NaN of a pair with a gradient comes with its plan.
    parts: bf16 numbers [C n, D] that add up to the points.
    centre: [C, D], finite; None where no product needs it.
    """

    points: Tensor
    parts: tuple[Tensor, ...]
    weights: Tensor
    centre: Tensor | None

    @classmethod
    def of(
        cls, points: Tensor, weights: Tensor, centre: Tensor | None, count: int, shifted: bool
    ) -> "_Clouds":
        wide = points.float()
        if centre is not None and points.dtype not in HALVES:
            wide = wide - centre[:, None, :]
        wide = torch.where((weights >= 0)[:, :, None] & wide.isfinite(), wide, 0.0)
        finite = None
        if shifted and centre is not None:
            finite = torch.where(centre.isfinite(), centre, 0.0)
        return cls(wide, split(wide.flatten(0, 1), count), weights.clamp_min(0), finite)

    def some(self, first: int, last: int) -> "_Clouds":
        """Clouds ``first`` to ``last``."""
        n = self.points.shape[1]
        parts = tuple(part[first * n : last * n] for part in self.parts)
        centre = None if self.centre is None else self.centre[first:last]
        return _Clouds(self.points[first:last], parts, self.weights[first:last], centre)


def split(values: Tensor, count: int) -> tuple[Tensor, ...]:
    """``count`` bf16 tensors that add up to fp32 ``values``: two to 17 bits, three to all."""
    parts = []
    for _ in range(count):
        parts.append(values.bfloat16())
        values = values - parts[-1].float()
    return tuple(parts)


def bf16_product(a: Tensor, b: Tensor) -> Tensor:
    """a [n, k] times b [k, m] in fp32: bf16 products are exact, whatever PyTorch's TF32 flags say."""
    if HIP or a.device.type == "cpu":  # which have no product of bf16 numbers with an fp32 result
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def _pairs(problem: Problem, given: PlanWeights, step: bool) -> tuple[Tensor, Tensor]:
    """Some clouds x and some clouds y at a time, so that at most ``MAX_CELLS`` cells of Q are held."""
    assert problem.y is not None
    x, y = problem.x, problem.y
    half = x.dtype in HALVES
    shifted = step or (half and problem.x_centre is not None)
    count = _precisions(x.dtype, problem.cost, problem.precision)["POINT_PARTS"]
    of_x = _Clouds.of(x, problem.a, problem.x_centre, count, shifted)
    of_y = _Clouds.of(y, problem.b, problem.y_centre, count, shifted)
    to_y, to_x = torch.zeros_like(of_x.points), torch.zeros_like(of_y.points)
    (batch, n, _), (k_all, m_all, _) = to_y.shape, to_x.shape
    empty = torch.zeros if problem.cost == "dot" else torch.empty  # which has no use for the sums
    along_x = empty(batch, n, k_all, dtype=torch.float32, device=x.device)
    along_y = empty(k_all, m_all, batch, dtype=torch.float32, device=x.device)
    at_once_y = min(len(y), max(1, MAX_CELLS // math.prod(problem.size)))
    at_once_x = max(1, MAX_CELLS // (math.prod(problem.size) * at_once_y))
    for i, j in itertools.product(range(0, len(x), at_once_x), range(0, len(y), at_once_y)):
        k, m = min(i + at_once_x, len(x)), min(j + at_once_y, len(y))
        plan = _pair_plan(problem, given, (i, k), (j, m), (along_x, along_y))
        _add_products(to_y[i:k], plan, of_y.some(j, m))
        _add_products(to_x[j:m], plan.mT, of_x.some(i, k))
    scale = torch.where(problem.solvable(), given.scale, 0.0) if step else None
    grad_x = _pulled(to_y, along_x, of_x, of_y, scale, half)
    grad_y = _pulled(to_x, along_y, of_y, of_x, None if scale is None else scale.T, half)
    return grad_x.to(x.dtype), grad_y.to(y.dtype)


def _add_products(total: Tensor, plan: Tensor, other: _Clouds) -> None:
    """Add Q times the other side's points to total [b, N, D], from the parts of Q [parts, b N, k M]."""
    for index, part in enumerate(other.parts):  # leaves out products below the last part of the plan
        for plan_part in plan[: len(plan) - index]:
            total += bf16_product(plan_part, part).view(total.shape)


def _pair_plan(
    problem: Problem,
    given: PlanWeights,
    of_x: tuple[int, int],
    of_y: tuple[int, int],
    along: tuple[Tensor, Tensor],
) -> Tensor:
    """Parts of Q [parts, b N, k M] of b clouds x and k clouds y; its sums go into ``along``, see _pulled."""
    (n, m), device = problem.size, problem.x.device
    arguments = _arguments(problem) | _weights(given)
    count_x, count_y = of_x[1] - of_x[0], of_y[1] - of_y[0]
    parts = arguments["PLAN_PARTS"]
    plan = torch.empty(parts, count_x * n, count_y * m, dtype=torch.bfloat16, device=device)
    for name in ("left_ptr", "right_ptr", "IMPLICIT", "POINT_PARTS"):
        del arguments[name]
    launch(
        _pair_plan_kernel,
        (count_x * count_y,),
        **arguments,
        scale_ptr=given.scale.contiguous(),
        plan_ptr=plan,
        along_x_ptr=along[0],
        along_y_ptr=along[1],
        B=len(problem.a),
        K=len(problem.b),
        first_x=of_x[0],
        first_y=of_y[0],
        count_y=count_y,
        stride_part=plan.stride(0),
        **_pair_configuration(n, m),
    )
    return plan


def _pulled(
    to_other: Tensor, along: Tensor, own: _Clouds, other: _Clouds, scale: Tensor | None, half: bool
) -> Tensor:
    """The gradient [B, N, D] in ``own`` points.

    Args:
        to_other: [B, N, D], Q times the other side's points.
        along: [B, N, K], what each point is multiplied by for each partner.
        scale: [B, K], of the steps between the centres; None without these.
        half: whether the points are not centred, so that the sums have to be.
    """
    shape = own.points.shape
    grad = own.points * along.sum(2, keepdim=True) - to_other
    if own.centre is None or other.centre is None:
        return grad
    shift = torch.zeros_like(along) if scale is None else 2 * own.weights[:, :, None] * scale[:, None, :]
    if half:
        shift = shift - along
    to_centres = torch.zeros_like(grad)
    parts = 2 if half else 3
    for index, left in enumerate(split(shift.flatten(0, 1), parts)):
        for right in split(other.centre, parts)[: parts - index]:
            to_centres += bf16_product(left, right).view(shape)
    return grad + shift.sum(2, keepdim=True) * own.centre[:, None, :] - to_centres


# --- what compiles ------------------------------------------------------------------------------------------


def compile_cases(hip: bool) -> Iterator[CompileCase]:
    """Every launch above, as in :func:`ecgot.kernels.ot.triton_onchip.compile_cases`."""
    sides = [2**power for power in range(4, 9)]
    for dtype, cost, precision in itertools.product(DTYPES, COSTS, PRECISIONS):
        kind = {"COST": COST_CODES[cost], "CENTRED": cost in CENTRED_COSTS}
        kind |= _precisions(DTYPES[dtype], cost, precision, hip)
        for n, m in itertools.product(sides, sides):
            if not fits(n, m):
                continue
            of_plan = {name: value for name, value in kind.items() if name != "POINT_PARTS"}
            yield compile_case(_pair_plan_kernel, dtype, of_plan, _pair_configuration(n, m, hip), OF_PLANS)
            for flags, d in itertools.product(_flags(cost), (16, 32)):
                if n < m or not _in_one_program(n, m, DTYPES[dtype], flags["IMPLICIT"], hip):
                    continue
                configuration = _whole_configuration(n, m, d, DTYPES[dtype], hip)
                yield compile_case(_whole_gradient_kernel, dtype, kind | flags, configuration, OF_POINTS)
        for flags, d in itertools.product(_flags(cost), (16, 32, 64, 128)):
            configuration = _tile_configuration(sides[-1], sides[-1], d, DTYPES[dtype], hip)
            yield compile_case(_tile_gradient_kernel, dtype, kind | flags, configuration, OF_POINTS)


def _flags(cost: str) -> Iterator[dict[str, bool]]:
    for implicit_too, step in itertools.product((False, True), (False, True)):
        if not step or cost == "sqeuclidean":
            yield {"IMPLICIT": implicit_too, "STEP": step}
