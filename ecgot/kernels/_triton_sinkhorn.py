"""On-chip Sinkhorn in Triton: one program solves one whole problem (or one pair of clouds) in one launch.

    f_i <- -tau_x eps log sum_j b_j exp((g_j - C_ij) / eps),    tau = rho / (rho + eps), 1 where balanced
    g_j <- -tau_y eps log sum_i a_i exp((f_i - C_ij) / eps)

until the plan P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps) has the row marginals that f asks for within tol.

The trick: the cost tile C [N, M] is built from x and y with matrix products; a pass in the log domain absorbs
the potentials into K = b exp((f + g - C) / eps), which stays in registers; and from there an iteration is
multiply-adds alone, f and g moving by the logarithms of u = 1 / (K v) and v = b / (K^T a u). Where v leaves a
safe range, the tile is built and absorbed anew. Potentials are kept in units of eps / log2(e), so that exp2,
one instruction, serves. The next u gives the marginal error for free: row i sums to a_i u_i (K v)_i.

Bytes moved per problem: forward (N + M) D reads, N + M + 3 writes; the gradient, for each tile of points of
one side, that tile and the whole other side, twice, and the tile's gradient. No problem looks at another, so
a result never depends on its batch mates.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecgot.kernels._problem import Problem
from ecgot.kernels._torch_sinkhorn import Pull, Result, start_temperature
from ecgot.kernels.dispatch import launch

# Problems whose tile is at most this, and no side of it longer than its MAX_BLOCK, stay in registers.
MAX_TILE = 128 * 128
MAX_BLOCK_N, MAX_BLOCK_M = 256, 128  # 64 x 256 would need more tensor memory than sm_100 has
MAX_IMPLICIT_TILE = 64 * 64
MAX_PULL_N, MAX_PULL_M = 64, 32
PULL_WIDTH = 64  # columns of the gradient that one program makes
COSTS = {"sqeuclidean": 0, "euclidean": 1, "cosine": 2, "dot": 3, "given": 4}
SQEUCLIDEAN = tl.constexpr(0)
EUCLIDEAN = tl.constexpr(1)
COSINE = tl.constexpr(2)
DOT = tl.constexpr(3)
GIVEN = tl.constexpr(4)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SAFE = tl.constexpr(1e10)  # of u and v: what underflowed in K, below 2^-126, still is below 1e-18 of a row
ROUNDING = tl.constexpr(8 * 2.0**-23)
UNSAFE = tl.constexpr(1e-10)
TINY = tl.constexpr(2.0**-126)
MAX_EXPONENT = tl.constexpr(120.0)  # of exp2: a larger one would overflow, and inf * 0 is NaN


# --- shared pieces ------------------------------------------------------------------------------------------


@triton.jit
def _load_weights(ptr, index, count):  # -> weight, whether a point exists
    weight = tl.load(ptr + index, mask=index < count, other=-1.0)
    return tl.maximum(weight, 0.0), weight >= 0


@triton.jit
def _load_chunk(
    points_ptr,
    centre_ptr,
    index,
    valid,
    k,
    D,
    stride_n,
    stride_d,
    CENTRED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    column = k + tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (column < D)[None, :]
    rows = points_ptr + index.to(tl.int64) * stride_n  # offsets may pass 2^31
    tile = rows[:, None] + (column.to(tl.int64) * stride_d)[None, :]
    points = tl.load(tile, mask=mask, other=0.0).to(tl.float32)
    if CENTRED:
        centre = tl.load(centre_ptr + column, mask=column < D, other=0.0)
        points = tl.where(mask, points - centre[None, :], 0.0)
    return points


@triton.jit
def _inverse_norm(square):
    # 0 for a zero vector, NaN where the square overflows: better no answer than a wrong one.
    normal = square >= 1.1754943508222875e-38
    inverse = tl.where(normal, 1.0 / tl.sqrt(tl.where(normal, square, 1.0)), square * 0.0)
    return tl.where(square == float("inf"), float("nan"), inverse)


@triton.jit
def _cost_tile(
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
    COST: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # -> cost [BLOCK_N, BLOCK_M], squared norms of x and y
    x_square = tl.zeros((BLOCK_N,), dtype=tl.float32)
    y_square = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if COST == GIVEN:
        # Contiguous, so that one problem's offsets fit 32 bits: as 64-bit pointers they alone would spill.
        tile = x_ptr + (x_index * stride_xn)[:, None] + (y_index * stride_xd)[None, :]
        cost = tl.load(tile, mask=x_valid[:, None] & y_valid[None, :], other=0.0).to(tl.float32)
    else:
        inner = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for k in range(0, D, BLOCK_D):
            x = _load_chunk(
                x_ptr, x_centre_ptr, x_index, x_valid, k, D, stride_xn, stride_xd, CENTRED, BLOCK_D
            )
            y = _load_chunk(
                y_ptr, y_centre_ptr, y_index, y_valid, k, D, stride_yn, stride_yd, CENTRED, BLOCK_D
            )
            inner += tl.dot(x, tl.trans(y), input_precision=PRECISION)
            x_square += tl.sum(x * x, axis=1)
            y_square += tl.sum(y * y, axis=1)
        if COST == COSINE:
            cost = 1.0 - inner * _inverse_norm(x_square)[:, None] * _inverse_norm(y_square)[None, :]
        elif COST == DOT:
            cost = -inner
        else:
            square = x_square[:, None] + y_square[None, :] - 2.0 * inner
            cost = tl.where(square < 0.0, 0.0, square)  # NaN stays
            if COST == EUCLIDEAN:
                cost = tl.sqrt(cost)
    return cost, x_square, y_square


@triton.jit
def _log2(weight):
    return tl.where(weight > 0, tl.log2(tl.where(weight > 0, weight, 1.0)), float("-inf"))


@triton.jit
def _log_sum_exp2(exponent, AXIS: tl.constexpr):
    """log2 sum exp2(exponent) along AXIS; rows of nothing but -inf give -inf without a NaN."""
    top = tl.max(exponent, axis=AXIS)
    top = tl.where(top == float("-inf"), 0.0, top)
    return top + tl.log2(tl.sum(tl.exp2(exponent - tl.expand_dims(top, AXIS)), axis=AXIS))


@triton.jit
def _damping(rho, eps):  # rho may be infinite
    return 1.0 / (1.0 + eps / rho)


@triton.jit
def _column_scaling(t, b, g, tau, BALANCED: tl.constexpr):
    """v from the column sums t of K (with b in it) under u; K absorbed the potentials g. 1 without weight."""
    v = b / t if BALANCED else tl.exp2(-tau * (tl.log2(t / b) - g) - g)
    return tl.where(b > 0, v, 1.0)


@triton.jit
def _row_error(a, f, f_next, tau):
    """|row marginal - a exp(-f / rho)| of each row; f_next is the update from g."""
    # Far clouds: the target underflows while the step to it overflows, and 0 * inf would be NaN.
    target = tl.maximum(tl.exp2(-f * (1.0 / tau - 1.0)), TINY)
    step = tl.abs(tl.exp2((f - f_next) / tau) - 1.0)
    return tl.where(a > 0, a * (target * step), 0.0)  # points without weight may overflow


@triton.jit
def _outside(scaling, weight):  # -> how many that weigh are out of range
    out = (scaling > SAFE) | (scaling < UNSAFE)
    return tl.sum((out & (weight > 0)).to(tl.int32), axis=0)


# --- solve --------------------------------------------------------------------------------------------------


@triton.jit
def _sinkhorn_fwd_kernel(
    x_ptr,
    y_ptr,
    a_ptr,
    b_ptr,
    x_centre_ptr,
    y_centre_ptr,
    eps_ptr,
    start_ptr,
    f_ptr,
    g_ptr,
    error_ptr,
    iterations_ptr,
    N,
    M,
    D,
    K,
    rho_x,
    rho_y,
    tol,
    scaling,
    max_iter,
    stride_xb,
    stride_xn,
    stride_xd,
    stride_yb,
    stride_yn,
    stride_yd,
    COST: tl.constexpr,
    CENTRED: tl.constexpr,
    PAIRS: tl.constexpr,
    BALANCED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """f_ptr is written, g_ptr holds where to start and is overwritten; both in units of the cost."""
    problem = tl.program_id(0).to(tl.int64)
    x_cloud = problem
    y_cloud = problem
    if PAIRS:
        x_cloud = problem // K
        y_cloud = problem % K
    x_index = tl.arange(0, BLOCK_N)
    y_index = tl.arange(0, BLOCK_M)
    a, x_valid = _load_weights(a_ptr + x_cloud * N, x_index, N)
    b, y_valid = _load_weights(b_ptr + y_cloud * M, y_index, M)
    x_ptr += x_cloud * stride_xb
    y_ptr += y_cloud * stride_yb
    x_centre_ptr += x_cloud * D
    y_centre_ptr += y_cloud * D
    eps = tl.load(eps_ptr + problem)
    per_unit = LOG2_E / eps
    tau_x = _damping(rho_x, eps)
    tau_y = _damping(rho_y, eps)
    g = tl.load(g_ptr + problem * M + y_index, mask=y_index < M, other=0.0) * per_unit
    f = tl.zeros((BLOCK_N,), dtype=tl.float32)
    # A problem without mass on one side has no plan: no iteration, every output 0.
    solvable = (tl.sum(a, axis=0) > 0) & (tl.sum(b, axis=0) > 0)
    temperature = tl.load(start_ptr + problem)
    weightless = tl.sum((y_valid & (b == 0)).to(tl.int32), axis=0) > 0
    iteration = 0
    last = max_iter
    error = tl.where(solvable, float("inf"), 0.0)
    columns = False  # whether an update of g in the log domain is due: annealing, K out of range, or the end
    judge = False  # whether g then belongs to f, so that there is a plan to judge
    finished = False
    going = solvable
    # Each pass has one place in this loop and the tile is built anew for each, so that one tile and what a
    # pass makes of it fit into the registers.
    while going:
        cost, _, _ = _cost_tile(
            x_ptr, y_ptr, x_centre_ptr, y_centre_ptr, x_index, y_index, x_valid, y_valid, D, stride_xn,
            stride_xd, stride_yn, stride_yd, COST, CENTRED, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
        )  # fmt: skip
        cost = cost * per_unit
        judge = columns & (temperature <= 1.0)
        if columns:
            rate = 1.0 / temperature
            lse_y = temperature * _log_sum_exp2((f * rate + _log2(a))[:, None] - cost * rate, 0)
            update = -_damping(rho_y, eps * temperature) * lse_y
            # At the end only points without weight still lack their potential, which moves nothing.
            g = tl.where(finished, tl.where(b > 0, g, update), update)
            hot = (temperature > 1.0).to(tl.int32)
            iteration += hot
            last += hot
            temperature = tl.maximum(temperature * scaling, 1.0)
            columns = False
        if finished:
            going = False
        else:
            rate = 1.0 / temperature
            exponent = (g * rate + _log2(b))[None, :] - cost * rate
            top = tl.max(exponent, axis=1)
            top = tl.where(top == float("-inf"), 0.0, top)
            kernel = tl.exp2(exponent - top[:, None])
            s = tl.sum(kernel, axis=1)
            lse = temperature * (top + tl.log2(s))
            f_next = -_damping(rho_x, eps * temperature) * lse
            if judge:
                error = tl.sum(_row_error(a, f, f_next, tau_x), axis=0)
                going = (error > tol) & (iteration < last)  # so that NaN stops as well
            if going:
                f = f_next
                columns = temperature > 1.0
                if temperature <= 1.0:
                    kernel = kernel * (1.0 / s)[:, None]  # K with b in it: its rows sum to 1
                    u = tl.full((BLOCK_N,), 1.0, dtype=tl.float32)
                    if not BALANCED:
                        u = tl.exp2(f + lse)
                    t = tl.sum(kernel * tl.where(a > 0, a * u, 0.0)[:, None], axis=0)
                    v = _column_scaling(t, b, g, tau_y, BALANCED)
                    iteration += 1
                    outside = _outside(v, b)
                    if not BALANCED:
                        outside += _outside(u, a)
                    absorbed = outside == 0
                    while going & (outside == 0):  # multiply-adds alone
                        s = tl.sum(kernel * v[None, :], axis=1)
                        if BALANCED:
                            u_next = 1.0 / s
                            error = tl.sum(a * tl.abs(u * s - 1.0), axis=0)
                        else:
                            f_next = -tau_x * (tl.log2(s) + lse)
                            u_next = tl.exp2(f_next + lse)
                            error = tl.sum(_row_error(a, f, f_next, tau_x), axis=0)
                        t = tl.sum(kernel * tl.where(a > 0, a * u_next, 0.0)[:, None], axis=0)
                        v_next = _column_scaling(t, b, g, tau_y, BALANCED)
                        outside = _outside(v_next, b)
                        if not BALANCED:
                            outside += _outside(u_next, a)
                        going = (error > tol) & (iteration < last)
                        advance = going & (outside == 0)
                        u = tl.where(advance, u_next, u)
                        if not BALANCED:
                            f = tl.where(advance, f_next, f)
                        v = tl.where(advance, v_next, v)
                        iteration += advance.to(tl.int32)
                    columns = (outside > 0) & (not absorbed)
                    if absorbed:
                        if BALANCED:
                            f = tl.log2(u) - lse
                        g += tl.log2(v)
            finished = not going
            columns = columns | finished
            going = going | (finished & weightless)

    unit = eps * LN_2
    f = tl.where(solvable, tl.where(x_valid, f * unit, 0.0), 0.0)
    g = tl.where(solvable, tl.where(y_valid, g * unit, 0.0), 0.0)
    tl.store(f_ptr + problem * N + x_index, f, mask=x_index < N)
    tl.store(g_ptr + problem * M + y_index, g, mask=y_index < M)
    tl.store(error_ptr + problem, error)
    tl.store(iterations_ptr + problem, iteration)


# --- gradients ----------------------------------------------------------------------------------------------


@triton.jit
def _sinkhorn_pull_kernel(
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
    N,
    M,
    D,
    others,
    pair_own,
    pair_other,
    other_own,
    stride_xb,
    stride_xn,
    stride_xd,
    stride_yb,
    stride_yn,
    stride_yd,
    COST: tl.constexpr,
    CENTRED: tl.constexpr,
    IMPLICIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient in BLOCK_N points of x and BLOCK_OUT of their coordinates of sum Q_ij C_ij, Q held fast.

    Q_ij = exp((f_i + g_j - C_ij) / eps) (scale a_i b_j + left_i b_j + a_i right_j). It is symmetric in its
    two sides, so the same kernel with the roles exchanged gives the gradient in y. Cloud ``own`` of x meets
    ``others`` clouds of y: cloud own * other_own + i, in the problem own * pair_own + i * pair_other.
    """
    own = tl.program_id(0).to(tl.int64)
    x_index = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(2) * BLOCK_OUT
    x_ptr += own * stride_xb
    x_centre_ptr += own * D
    a, x_valid = _load_weights(a_ptr + own * N, x_index, N)
    to_y = tl.zeros((BLOCK_N, BLOCK_OUT), dtype=tl.float32)
    along = tl.zeros((BLOCK_N,), dtype=tl.float32)
    x_square = tl.zeros((BLOCK_N,), dtype=tl.float32)
    a_mass = 0.0
    for start in range(0, N, BLOCK_N):
        index = start + tl.arange(0, BLOCK_N)
        a_mass += tl.sum(tl.maximum(tl.load(a_ptr + own * N + index, mask=index < N, other=0.0), 0.0), axis=0)
    for other in range(others):
        cloud = own * other_own + other
        problem = own * pair_own + other * pair_other
        eps = tl.load(eps_ptr + problem)
        per_unit = LOG2_E / eps
        f = tl.load(f_ptr + problem * N + x_index, mask=x_index < N, other=0.0) * per_unit
        # Without mass on this side there is no plan; without mass on the other b is 0.
        scale = tl.where(a_mass > 0, tl.load(scale_ptr + problem), 0.0)
        wanted = scale != 0  # else nothing asks for this problem, and what is NaN in it stays there
        if IMPLICIT:
            wanted = True
        if wanted:
            rows = a * scale
            if IMPLICIT:
                rows += tl.load(left_ptr + problem * N + x_index, mask=x_index < N, other=0.0)
            for m in range(0, M, BLOCK_M):
                y_index = m + tl.arange(0, BLOCK_M)
                b, y_valid = _load_weights(b_ptr + cloud * M, y_index, M)
                g = tl.load(g_ptr + problem * M + y_index, mask=y_index < M, other=0.0) * per_unit
                y_tile_ptr = y_ptr + cloud * stride_yb
                y_tile_centre_ptr = y_centre_ptr + cloud * D
                cost, x_square, y_square = _cost_tile(
                    x_ptr, y_tile_ptr, x_centre_ptr, y_tile_centre_ptr, x_index, y_index, x_valid, y_valid, D,
                    stride_xn, stride_xd, stride_yn, stride_yd, COST, CENTRED, BLOCK_N, BLOCK_M, BLOCK_D,
                    PRECISION,
                )  # fmt: skip
                q = tl.exp2(tl.minimum(f[:, None] + g[None, :] - cost * per_unit, MAX_EXPONENT))
                if IMPLICIT:
                    right = tl.load(right_ptr + problem * M + y_index, mask=y_index < M, other=0.0)
                    q = q * (rows[:, None] * b[None, :] + a[:, None] * right[None, :])
                else:
                    q = q * (rows[:, None] * b[None, :])
                if COST == EUCLIDEAN:
                    q = tl.where(cost > 0, q / tl.where(cost > 0, cost, 1.0), cost * 0.0)
                if COST == COSINE:
                    along += tl.sum(q * (1.0 - cost), axis=1)
                else:
                    along += tl.sum(q, axis=1)
                y = _load_chunk(
                    y_tile_ptr,
                    y_tile_centre_ptr,
                    y_index,
                    y_valid,
                    first,
                    D,
                    stride_yn,
                    stride_yd,
                    CENTRED,
                    BLOCK_OUT,
                )
                if COST == COSINE:
                    y = y * _inverse_norm(y_square)[:, None]
                to_y += tl.dot(q, y, input_precision=PRECISION)
    if COST == DOT:
        grad = -to_y
    else:
        x = _load_chunk(
            x_ptr, x_centre_ptr, x_index, x_valid, first, D, stride_xn, stride_xd, CENTRED, BLOCK_OUT
        )
        if COST == COSINE:  # d(1 - x^ y^) / dx = (x^ (x^ y^) - y^) / |x|
            per_x = _inverse_norm(x_square)[:, None]
            grad = (along[:, None] * x * per_x - to_y) * per_x
        elif COST == SQEUCLIDEAN:
            grad = 2.0 * (along[:, None] * x - to_y)
        else:
            grad = along[:, None] * x - to_y
    d = first + tl.arange(0, BLOCK_OUT)
    tile = grad_x_ptr + (own * N + x_index)[:, None] * D + d[None, :]
    tl.store(tile, grad.to(grad_x_ptr.dtype.element_ty), mask=(x_index < N)[:, None] & (d < D)[None, :])


@triton.jit
def _to_rows(kernel, v):
    return tl.sum(kernel * v[None, :], axis=1)


@triton.jit
def _to_columns(kernel, u):
    return tl.sum(kernel * u[:, None], axis=0)


@triton.jit
def _inverse(value):  # 0 of 0
    return tl.where(value > 0, 1.0 / tl.where(value > 0, value, 1.0), 0.0)


@triton.jit
def _sinkhorn_implicit_kernel(
    x_ptr,
    y_ptr,
    a_ptr,
    b_ptr,
    x_centre_ptr,
    y_centre_ptr,
    eps_ptr,
    f_ptr,
    g_ptr,
    grad_f_ptr,
    grad_g_ptr,
    left_ptr,
    right_ptr,
    grad_a_ptr,
    grad_b_ptr,
    N,
    M,
    D,
    rho_x,
    rho_y,
    tol,
    max_iter,
    stride_xb,
    stride_xn,
    stride_xd,
    stride_yb,
    stride_yn,
    stride_yd,
    COST: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Conjugate gradients on the tile that is in registers; see ``_torch_sinkhorn.implicit``."""
    problem = tl.program_id(0).to(tl.int64)
    x_index = tl.arange(0, BLOCK_N)
    y_index = tl.arange(0, BLOCK_M)
    a, x_valid = _load_weights(a_ptr + problem * N, x_index, N)
    b, y_valid = _load_weights(b_ptr + problem * M, y_index, M)
    solvable = (tl.sum(a, axis=0) > 0) & (tl.sum(b, axis=0) > 0)
    eps = tl.load(eps_ptr + problem)
    per_unit = LOG2_E / eps
    tau_x = _damping(rho_x, eps)
    tau_y = _damping(rho_y, eps)
    cost, _, _ = _cost_tile(
        x_ptr + problem * stride_xb, y_ptr + problem * stride_yb, x_centre_ptr + problem * D,
        y_centre_ptr + problem * D, x_index, y_index, x_valid, y_valid, D, stride_xn, stride_xd, stride_yn,
        stride_yd, COST, CENTRED, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
    )  # fmt: skip
    row, column = problem * N + x_index, problem * M + y_index
    f = tl.load(f_ptr + row, mask=x_valid, other=0.0) * per_unit
    g = tl.load(g_ptr + column, mask=y_valid, other=0.0) * per_unit
    grad_f = tl.where(solvable, tl.load(grad_f_ptr + row, mask=x_valid, other=0.0), 0.0)
    grad_g = tl.where(solvable, tl.load(grad_g_ptr + column, mask=y_valid, other=0.0), 0.0)
    kernel = tl.exp2(tl.minimum(f[:, None] + g[None, :] - cost * per_unit, MAX_EXPONENT))
    kernel = tl.where(x_valid[:, None] & y_valid[None, :], kernel, 0.0)

    per_r = _inverse(_to_rows(kernel, b))
    c = _to_columns(kernel, a)
    per_c = _inverse(c)
    bare = tl.where(b > 0, 0.0, grad_g)  # a column without weight passes its gradient on, and gets none
    inner = (grad_f - tau_y * a * _to_rows(kernel, bare * per_c)) * per_r
    residual = tl.where(b > 0, grad_g, 0.0) - tau_x * b * _to_columns(kernel, inner)
    # What cancels in the right-hand side leaves rounding, which is no equation to solve.
    rounding = tl.where(b > 0, tl.abs(grad_g), 0.0) + tau_x * b * _to_columns(kernel, tl.abs(inner))
    rounding = rounding * ROUNDING
    diagonal = b * c
    preconditioner = _inverse(diagonal)
    if tau_x * tau_y == 1.0:  # singular: what is left of the gauge must go, or the iteration would chase it
        total = tl.sum(diagonal, axis=0)
        residual -= diagonal * (tl.sum(residual, axis=0) / tl.where(total > 0, total, 1.0))
    q = tl.zeros((BLOCK_M,), dtype=tl.float32)
    direction = preconditioner * residual
    rho = tl.sum(residual * direction, axis=0)
    goal = tl.maximum(tol * tol * rho, tl.sum(rounding * rounding * preconditioner, axis=0))
    iteration = 0
    while (rho > goal) & (iteration < max_iter):
        inner = a * per_r * _to_rows(kernel, b * direction)
        image = diagonal * direction - tau_x * tau_y * b * _to_columns(kernel, inner)
        curvature = tl.sum(direction * image, axis=0)
        step = tl.where(curvature > 0, rho / tl.where(curvature > 0, curvature, 1.0), 0.0)
        q += step * direction
        residual -= step * image
        z = preconditioner * residual
        new = tl.sum(residual * z, axis=0)
        direction = z + new / rho * direction
        rho = tl.where(step > 0, new, 0.0)
        iteration += 1
    mu = diagonal * q + bare
    lam = grad_f - tau_y * a * _to_rows(kernel, mu * per_c)
    left = tau_x * lam * per_r
    right = tau_y * mu * per_c
    tl.store(left_ptr + row, left, mask=x_index < N)
    tl.store(right_ptr + column, right, mask=y_index < M)
    tl.store(grad_a_ptr + row, -eps * _to_rows(kernel, right), mask=x_index < N)
    tl.store(grad_b_ptr + column, -eps * _to_columns(kernel, left), mask=y_index < M)


# --- launches -----------------------------------------------------------------------------------------------


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))  # a matrix product wants at least 16


def fits(n: int, m: int) -> bool:
    """Whether an n x m problem can stay on chip."""
    block_n, block_m = _block(n), _block(m)
    return block_n <= MAX_BLOCK_N and block_m <= MAX_BLOCK_M and block_n * block_m <= MAX_TILE


def fits_implicit(n: int, m: int) -> bool:
    """Whether the linear system of implicit gradients can: conjugate gradients need more vectors."""
    return fits(n, m) and _block(n) * _block(m) <= MAX_IMPLICIT_TILE


def _tile_configuration(n: int, m: int, hip: bool = bool(torch.version.hip)) -> dict[str, Any]:
    """Blocks and warps of a kernel that holds a whole n x m problem."""
    block_n, block_m = _block(n), _block(m)
    return {
        "BLOCK_N": block_n,
        "BLOCK_M": block_m,
        # 16 columns of x and y at a time: with 32 the products' operands push the tile out of the registers.
        "BLOCK_D": 16,
        "num_warps": _warps(block_n, block_m, hip),
        "num_stages": 1,
    }


def _warps(block_n: int, block_m: int, hip: bool) -> int:
    """The fewest whose registers hold the tile: small problems then share a multiprocessor.

    Found by compiling every tile with 1 to 16. AMD's are twice as wide.
    """
    cells = block_n * block_m
    if hip:
        return 1 if cells <= 16 * 16 else 2 if cells <= 32 * 64 else 4 if cells <= 64 * 128 else 8
    if cells == 32 * 64 and max(block_n, block_m) == 64:
        return 4
    return 1 if cells <= 16 * 16 else 2 if cells <= 32 * 32 else 8


def _pull_configuration(n: int, m: int, d: int, hip: bool = bool(torch.version.hip)) -> dict[str, Any]:
    """Its products want a smaller tile than the solver's loop."""
    block_n, block_m = min(_block(n), MAX_PULL_N), min(_block(m), MAX_PULL_M)
    cells = block_n * block_m
    return {
        "BLOCK_N": block_n,
        "BLOCK_M": block_m,
        "BLOCK_D": 16,
        "BLOCK_OUT": min(_block(d), PULL_WIDTH),
        "num_warps": 1
        if cells <= 16 * 16
        else 2
        if cells <= 16 * 32
        else 4
        if cells <= 32 * 32 or hip
        else 8,
        "num_stages": 1,
    }


def _precision(problem: Problem) -> str:
    """Three TF32 products give fp32's accuracy on NVIDIA's tensor cores; AMD's multiply fp32 as it is.

    One TF32 product of fp16 or bf16 points is exact; where a centre is subtracted first, they are no longer.
    """
    if torch.version.hip:
        return "ieee"
    exact = problem.x.dtype in (torch.float16, torch.bfloat16) and problem.cost in ("cosine", "dot")
    return "tf32" if exact or problem.precision == "tf32" else "tf32x3"


def _shared(problem: Problem) -> dict[str, Any]:
    """What all kernels take; x stands in for what is not read."""
    x = problem.x.contiguous() if problem.y is None else problem.x
    y = x if problem.y is None else problem.y
    names = ("stride_xb", "stride_xn", "stride_xd", "stride_yb", "stride_yn", "stride_yd")
    centred = problem.x_centre is not None
    return {
        "x_ptr": x,
        "y_ptr": y,
        "a_ptr": problem.a.contiguous(),
        "b_ptr": problem.b.contiguous(),
        "x_centre_ptr": problem.x_centre if centred else problem.eps,
        "y_centre_ptr": problem.y_centre if centred else problem.eps,
        "eps_ptr": problem.eps.contiguous(),
        "N": problem.size[0],
        "M": problem.size[1],
        "D": 0 if problem.y is None else x.shape[2],
        "COST": COSTS[problem.cost],
        "CENTRED": centred,
        "PRECISION": _precision(problem),
    } | dict(zip(names, (*x.stride(), *y.stride()), strict=True))


def exchanged(shared: dict[str, Any]) -> dict[str, Any]:
    """The arguments with the roles of the two sides exchanged."""
    couples = [("x_ptr", "y_ptr"), ("a_ptr", "b_ptr"), ("x_centre_ptr", "y_centre_ptr"), ("N", "M")]
    couples += [(f"stride_x{axis}", f"stride_y{axis}") for axis in "bnd"]
    swapped = dict(shared)
    for left, right in couples:
        swapped[left], swapped[right] = shared[right], shared[left]
    return swapped


def solve(problem: Problem, init: Tensor | None, max_iter: int, tol: float, scaling: float) -> Result:
    """Launch the solver; returns f, g, marginal error and iterations."""
    n, m = problem.size
    shape = problem.shape
    empty = problem.eps.new_empty
    f, error = empty(*shape, n), empty(shape)
    g = (
        problem.eps.new_zeros(*shape, m)
        if init is None
        else init.clone(memory_format=torch.contiguous_format)
    )
    iterations = empty(shape, dtype=torch.int32)
    start = start_temperature(problem) if scaling else torch.ones_like(problem.eps)
    launch(
        _sinkhorn_fwd_kernel,
        (math.prod(shape),),
        **_shared(problem),
        start_ptr=start.contiguous(),
        f_ptr=f,
        g_ptr=g,
        error_ptr=error,
        iterations_ptr=iterations,
        K=shape[-1],
        rho_x=problem.rho_x,
        rho_y=problem.rho_y,
        tol=tol,
        scaling=scaling,
        max_iter=max_iter,
        PAIRS=problem.pairs,
        BALANCED=problem.balanced,
        **_tile_configuration(n, m),
    )
    return f, g, error, iterations


def pull(problem: Problem, given: Pull) -> tuple[Tensor, Tensor]:
    """Launch the gradients in x [B, N, D] and y [B, M, D] (of pairs [K, M, D])."""
    assert problem.y is not None
    count_x, count_y = len(problem.a), len(problem.b)
    shared = _shared(problem)
    swapped = exchanged(shared)
    f, g, scale = given.f.contiguous(), given.g.contiguous(), given.scale.contiguous()
    implicit = given.left is not None
    left = given.left.contiguous() if given.left is not None else f
    right = given.right.contiguous() if given.right is not None else g
    if problem.pairs:
        x_side = {"others": count_y, "pair_own": count_y, "pair_other": 1, "other_own": 0}
        y_side = {"others": count_x, "pair_own": 1, "pair_other": count_y, "other_own": 0}
    else:
        x_side = y_side = {"others": 1, "pair_own": 1, "pair_other": 0, "other_own": 1}
    return (
        _one_side(
            problem.x,
            shared
            | x_side
            | {
                "f_ptr": f,
                "g_ptr": g,
                "left_ptr": left,
                "right_ptr": right,
                "scale_ptr": scale,
                "IMPLICIT": implicit,
            },
        ),
        _one_side(
            problem.y,
            swapped
            | y_side
            | {
                "f_ptr": g,
                "g_ptr": f,
                "left_ptr": right,
                "right_ptr": left,
                "scale_ptr": scale,
                "IMPLICIT": implicit,
            },
        ),
    )


def _one_side(points: Tensor, arguments: dict[str, Any]) -> Tensor:
    grad = torch.empty(points.shape, dtype=points.dtype, device=points.device)
    count, n, d = points.shape
    if not d:
        return grad
    configuration = _pull_configuration(n, arguments["M"], d)
    grid = (count, triton.cdiv(n, configuration["BLOCK_N"]), triton.cdiv(d, configuration["BLOCK_OUT"]))
    launch(_sinkhorn_pull_kernel, grid, **arguments, grad_x_ptr=grad, **configuration)
    return grad


def implicit(
    problem: Problem, f: Tensor, g: Tensor, grad_f: Tensor, grad_g: Tensor, max_iter: int, tol: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the linear solve of :func:`ecgot.kernels._torch_sinkhorn.implicit`."""
    left, right, grad_a, grad_b = (f.new_zeros(t.shape) for t in (f, g, f, g))
    if f.numel() and g.numel():
        launch(
            _sinkhorn_implicit_kernel,
            (len(f),),
            **_shared(problem),
            f_ptr=f.contiguous(),
            g_ptr=g.contiguous(),
            grad_f_ptr=grad_f.contiguous(),
            grad_g_ptr=grad_g.contiguous(),
            left_ptr=left,
            right_ptr=right,
            grad_a_ptr=grad_a,
            grad_b_ptr=grad_b,
            rho_x=problem.rho_x,
            rho_y=problem.rho_y,
            tol=tol,
            max_iter=max_iter,
            **_tile_configuration(*problem.size),
        )
    return left, right, grad_a, grad_b


# --- what compiles ------------------------------------------------------------------------------------------


def compile_cases(hip: bool) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(name, kernel, signature, constexprs, options) of every launch above; some come twice.

    hip: as where torch is built for AMD's GPUs, in place of what it is built for.
    """
    sides = [2**power for power in range(4, 9)]
    precisions = fp32_precisions(hip)
    for n, m in itertools.product(sides, sides):
        if not fits(n, m):
            continue
        for dtype, cost, used in itertools.product(("fp32", "fp16", "bf16"), COSTS, precisions):
            for centred in {"sqeuclidean": (True,), "euclidean": (True,)}.get(cost, (False,)):
                kind = {"COST": COSTS[cost], "CENTRED": centred, "PRECISION": used}
                for pairs, balanced in itertools.product((False, True), repeat=2):
                    if pairs and cost == "given":
                        continue
                    flags = kind | {"PAIRS": pairs, "BALANCED": balanced}
                    yield compile_case(
                        _sinkhorn_fwd_kernel, dtype, cost, flags, _tile_configuration(n, m, hip)
                    )
                if fits_implicit(n, m):
                    yield compile_case(
                        _sinkhorn_implicit_kernel, dtype, cost, kind, _tile_configuration(n, m, hip)
                    )
    for n, m, d in itertools.product(sides, sides, (16, 32, 64)):
        for dtype, cost, used in itertools.product(("fp32", "fp16", "bf16"), list(COSTS)[:4], precisions):
            kind = {"COST": COSTS[cost], "CENTRED": cost in ("sqeuclidean", "euclidean"), "PRECISION": used}
            for implicit_too in (False, True):
                flags = kind | {"IMPLICIT": implicit_too}
                yield compile_case(
                    _sinkhorn_pull_kernel, dtype, cost, flags, _pull_configuration(n, m, d, hip)
                )


def fp32_precisions(hip: bool) -> tuple[str, ...]:
    """What ``_precision`` may answer for fp32 points."""
    return ("ieee",) if hip else ("tf32x3", "tf32")


def compile_case(
    kernel: Any, dtype: str, cost: str, flags: dict[str, Any], configuration: dict[str, Any]
) -> tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]:
    configuration = dict(configuration)
    options = {name: configuration.pop(name) for name in ("num_warps", "num_stages")}
    constants = flags | configuration
    types = {"iterations_ptr": "*i32"}
    types |= dict.fromkeys(("x_ptr", "y_ptr", "grad_x_ptr"), f"*{dtype}")
    types |= dict.fromkeys(("rho_x", "rho_y", "tol", "scaling"), "fp32")
    types |= dict.fromkeys(constants, "constexpr")
    signature = {
        name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in kernel.arg_names
    }
    given = [name.lower() for name, value in flags.items() if value is True]
    blocks = "x".join(str(value) for name, value in configuration.items() if name in ("BLOCK_N", "BLOCK_M"))
    return " ".join([blocks, dtype, cost, *given]), kernel, signature, constants, options
