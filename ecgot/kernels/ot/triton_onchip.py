"""On-chip Sinkhorn in Triton: one program solves a whole problem, or pair of clouds.

    f_i <- -tau_x eps log sum_j b_j exp((g_j - C_ij) / eps),    tau = rho / (rho + eps), 1 where balanced
    g_j <- -tau_y eps log sum_i a_i exp((f_i - C_ij) / eps)

until the plan P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps) has the row marginals that f asks for within tol.

The trick: a pass in the log domain absorbs the potentials into K = b exp((f + g - C) / eps), which stays in
registers. From there an iteration is only multiply-adds: f and g move by the logarithms of u = 1 / (K v) and
v = b / (K^T a u). If u or v leaves a safe range, the last update of g is taken again in the log domain, and
the new potentials are absorbed into K.
Potentials are in units of eps / log2(e), so that exp is exp2, a single instruction. The next u gives the
marginal error for free: row i sums to a_i u_i (K v)_i.

The costs are formed once, by matrix products, and wait in a scratch tile from which each log-domain pass
reads them in the layout that iterates fastest: the warps stand side by side along the columns, and every
thread holds about as many rows as columns. Column sums then stay within a warp, and only row sums cross
warps. Plain Triton gives a tensor [ROWS, COLUMNS, warps, lanes, lanes] just this layout, so tiles have five
dimensions: row = i0 * ROW_LANES + i3, column = (i1 * WARPS + i2) * COLUMN_LANES + i4. Vectors of rows are
[., 1, 1, ., 1], vectors of columns [1, ., ., 1, .].

Bytes moved per problem: (N + M) D points, from cache the second time; N M costs, which a program overwrites
with those of its next problem, so that they stay in cache; N + M potentials. No problem reads another's data,
so a result never depends on its batch mates.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecgot.kernels.compilation import DTYPES, CompileCase, compile_case
from ecgot.kernels.dispatch import HIP, launch
from ecgot.kernels.ot import problem as problems
from ecgot.kernels.ot.checks import CENTRED_COSTS
from ecgot.kernels.ot.problem import Problem, Solution, SolverSettings, start_temperature
from ecgot.kernels.ot.triton_tiles import (
    CONVENTIONS,
    COST_CODES,
    EPSILON,
    GIVEN,
    LN_2,
    LOG2_E,
    TINY,
    block_size,
    cost_tile,
    fp32_precisions,
    launch_arguments,
    load_chunk,
    load_slack,
    load_weights,
    log2,
    partnered,
    rho_arguments,
    row_errors,
)

# Tiles of at most this many cells, with no side longer than its MAX_BLOCK, stay in registers.
MAX_TILE = 128 * 128
MAX_BLOCK_N, MAX_BLOCK_M = 256, 128
MAX_SCRATCH = 2**25  # numbers that all programs of a launch may keep there, 128 MB
REGISTERS = 65536  # of a multiprocessor
CELLS_OF_WARP = 64 * 32  # 64 a thread, so that two programs of eight warps share a multiprocessor
SAFE = tl.constexpr(1e10)  # of u and v: what underflowed in K, below 2^-126, is still below 1e-18 of a row
UNSAFE = tl.constexpr(1e-10)
UNDERFLOWN = tl.constexpr(1e-30)  # a smaller sum over K may owe its size to terms that underflowed
MAX_UNCHECKED = tl.constexpr(8)  # iterations between looks at the range of u and v
EXACT = tl.constexpr(problems.EXACT)
NOT_CENTRED = tl.constexpr(0)
CENTRES_GIVEN = tl.constexpr(1)
OWN_CENTRES = tl.constexpr(2)  # each cloud moves to its own mean
COMMON_CENTRE = tl.constexpr(3)  # both move to the middle between their means


# --- tiles in the layout of the iteration -------------------------------------------------------------------


@triton.jit
def _rows_of(
    unit, BLOCK_N: tl.constexpr, WARPS: tl.constexpr, ROW_LANES: tl.constexpr, COLUMN_LANES: tl.constexpr
):
    """Two terms whose sum is the row of each entry of a vector of rows as it is loaded.

    What depends on the thread, [1, 1, WARPS, ROW_LANES, COLUMN_LANES], and what on the entry within it,
    [ROWS, 1, 1, 1, 1]. unit: 1, which the compiler must not know: it would see that rows are neighbours in
    memory, and have each thread load several of them.
    """
    ROWS: tl.constexpr = BLOCK_N // ROW_LANES
    lane = tl.reshape(tl.arange(0, ROW_LANES), (1, 1, 1, ROW_LANES, 1)) * unit
    lane = tl.broadcast_to(lane, (1, 1, WARPS, ROW_LANES, COLUMN_LANES))
    return lane, tl.reshape(tl.arange(0, ROWS), (ROWS, 1, 1, 1, 1)) * ROW_LANES


@triton.jit
def _columns_of(
    unit, BLOCK_M: tl.constexpr, WARPS: tl.constexpr, ROW_LANES: tl.constexpr, COLUMN_LANES: tl.constexpr
):
    """Two terms whose sum is the column of each entry of a vector of columns, as in :func:`_rows_of`.

    [1, 1, WARPS, ROW_LANES, COLUMN_LANES] and [1, COLUMNS, 1, 1, 1].
    """
    COLUMNS: tl.constexpr = BLOCK_M // (WARPS * COLUMN_LANES)
    warp = tl.reshape(tl.arange(0, WARPS), (1, 1, WARPS, 1, 1)) * COLUMN_LANES
    lane = tl.reshape(tl.arange(0, COLUMN_LANES), (1, 1, 1, 1, COLUMN_LANES)) * unit
    lane = tl.broadcast_to(warp + lane, (1, 1, WARPS, ROW_LANES, COLUMN_LANES))
    return lane, tl.reshape(tl.arange(0, COLUMNS), (1, COLUMNS, 1, 1, 1)) * (WARPS * COLUMN_LANES)


@triton.jit
def _as_rows(loaded):
    """A loaded vector of rows in the layout of ``_row_sums``: [ROWS, 1, 1, ROW_LANES, 1]."""
    return tl.max(tl.max(loaded, axis=4, keep_dims=True), axis=2, keep_dims=True)


@triton.jit
def _as_columns(loaded):
    """A loaded vector of columns in the layout of ``_column_sums``: [1, COLUMNS, WARPS, 1, COLUMN_LANES]."""
    return tl.max(loaded, axis=3, keep_dims=True)


@triton.jit
def _store(place, vector):
    """Store a vector of rows or columns where it is loaded from."""
    tl.store(place, tl.broadcast_to(vector, place.shape))


@triton.jit
def _scratch_tile(
    scratch_ptr,
    unit,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WARPS: tl.constexpr,
    ROW_LANES: tl.constexpr,
    COLUMN_LANES: tl.constexpr,
):
    """Pointers to the costs: in panels of COLUMN_LANES columns, row by row, so that lanes are neighbours."""
    ROWS: tl.constexpr = BLOCK_N // ROW_LANES
    COLUMNS: tl.constexpr = BLOCK_M // (WARPS * COLUMN_LANES)
    row = tl.reshape(tl.arange(0, ROWS), (ROWS, 1, 1, 1, 1)) * (ROW_LANES * COLUMN_LANES)
    column = tl.reshape(tl.arange(0, COLUMNS), (1, COLUMNS, 1, 1, 1)) * (WARPS * BLOCK_N * COLUMN_LANES)
    warp = tl.reshape(tl.arange(0, WARPS), (1, 1, WARPS, 1, 1)) * (BLOCK_N * COLUMN_LANES)
    row_lane = tl.reshape(tl.arange(0, ROW_LANES), (1, 1, 1, ROW_LANES, 1)) * COLUMN_LANES
    column_lane = tl.reshape(tl.arange(0, COLUMN_LANES), (1, 1, 1, 1, COLUMN_LANES)) * unit
    # A thread's own place first: its cells are then at constant distances, which take no registers.
    return (scratch_ptr + (warp + row_lane + column_lane)) + (row + column)


@triton.jit
def _scratch_offset(row, column, BLOCK_N: tl.constexpr, COLUMN_LANES: tl.constexpr):
    """Where the costs of rows [R] and columns [C] go in the scratch tile, [R, C]."""
    panel = column // COLUMN_LANES * (BLOCK_N * COLUMN_LANES) + column % COLUMN_LANES
    return (row * COLUMN_LANES)[:, None] + panel[None, :]


@triton.jit
def _row_sums(tile):
    tile = tl.sum(tile, axis=1, keep_dims=True)
    tile = tl.sum(tile, axis=4, keep_dims=True)
    return tl.sum(tile, axis=2, keep_dims=True)


@triton.jit
def _column_sums(tile):
    return tl.sum(tl.sum(tile, axis=0, keep_dims=True), axis=3, keep_dims=True)


@triton.jit
def _total(vector):
    """The sum of a vector of rows or of columns."""
    vector = tl.sum(tl.sum(vector, axis=1), axis=0)  # within a thread
    vector = tl.sum(tl.sum(vector, axis=2), axis=1)  # within a warp
    return tl.sum(vector, axis=0)


@triton.jit
def _largest(tile, AXIS: tl.constexpr):
    """The maximum of each row (AXIS 1) or column (0); 0 in place of -inf."""
    if AXIS == 1:
        top = tl.max(tl.max(tile, axis=1, keep_dims=True), axis=4, keep_dims=True)
        top = tl.max(top, axis=2, keep_dims=True)
    else:
        top = tl.max(tl.max(tile, axis=0, keep_dims=True), axis=3, keep_dims=True)
    return tl.where(top == float("-inf"), 0.0, top)


# --- shared pieces ------------------------------------------------------------------------------------------


@triton.jit
def _reciprocal(positive):
    """1 / positive, to 2 units in the last place, in two instructions where a division takes ten."""
    root = tl.rsqrt(positive)
    return root * root


@triton.jit
def _most(vector):
    """The maximum of a vector of rows or of columns."""
    vector = tl.max(tl.max(vector, axis=1), axis=0)
    vector = tl.max(tl.max(vector, axis=2), axis=1)
    return tl.max(vector, axis=0)


@triton.jit
def _log_sum(exponent):
    """log2 of the sum of exp2 of a vector; -inf if there is nothing."""
    top = _most(exponent)
    top = tl.where(top == float("-inf"), 0.0, top)
    return top + tl.log2(_total(tl.exp2(exponent - top)))


@triton.jit
def _log_targets(weight, potential, slack):
    """log2(weight exp(-potential / rho)), where a potential may be infinite."""
    target = log2(weight) - slack * potential
    return tl.where((weight > 0) & (potential < float("inf")), target, float("-inf"))


@triton.jit
def _shift(rows, columns, slack_x, slack_y):
    """See :class:`ecgot.kernels.ot.iteration.Shift`; from the logarithms of both sides' masses."""
    total = slack_x + slack_y
    certain = tl.abs(rows - columns) > (tl.abs(rows) + tl.abs(columns)) * (4.0 * EPSILON)
    return tl.where(certain, (rows - columns) / tl.where(total > 0, total, float("inf")), 0.0)


@triton.jit
def _in_range(factor, weight):
    """Whether u or v is safe at every point with weight; NaN is not safe."""
    safe = (factor < SAFE) & (factor > UNSAFE)
    return _total(tl.where(safe | (weight == 0), 0.0, 1.0)) == 0.0


@triton.jit
def _exact(sums, weight):
    """Whether every sum at a point with weight is large beside what underflowed."""
    return _total(tl.where((sums > UNDERFLOWN) | (weight == 0), 0.0, 1.0)) == 0.0


@triton.jit
def _largest_of(potential, weight):
    """The largest finite size of a potential at points with weight."""
    size = tl.abs(potential)
    return _most(tl.where((weight > 0) & (size < float("inf")), size, 0.0))


@triton.jit
def _weighted_total(weight, potential):
    """<weight, potential>; at points without weight the potential may be infinite."""
    return _total(tl.where(weight > 0, weight * potential, 0.0))


# --- centring -----------------------------------------------------------------------------------------------


@triton.jit
def _centre(
    x_ptr,
    y_ptr,
    a_ptr,
    b_ptr,
    x_centre_ptr,
    y_centre_ptr,
    x_term_ptr,
    y_term_ptr,
    N,
    M,
    D,
    stride_xn,
    stride_xd,
    stride_yn,
    stride_yd,
    CENTRE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write what to subtract from both clouds, and the terms by which |x - y|^2 exceeds the moved clouds'.

    With step = x_centre - y_centre, |x - y|^2 = |x' - y'|^2 + (2 step x' + |step|^2 / 2) + (|step|^2 / 2 -
    2 step y'). Returns the mean of the terms, which is what the value gains; 0 where the centre is common.
    """
    x_index = tl.arange(0, BLOCK_N)
    y_index = tl.arange(0, BLOCK_M)
    a, x_valid = load_weights(a_ptr, x_index, N)
    b, y_valid = load_weights(b_ptr, y_index, M)
    a_mass, b_mass = tl.sum(a, axis=0), tl.sum(b, axis=0)
    a = (a / tl.where(a_mass > 0, a_mass, 1.0))[:, None]
    b = (b / tl.where(b_mass > 0, b_mass, 1.0))[:, None]
    solvable = (a_mass > 0) & (b_mass > 0)
    x_term = tl.zeros((BLOCK_N,), dtype=tl.float32)
    y_term = tl.zeros((BLOCK_M,), dtype=tl.float32)
    gain = 0.0
    square = 0.0
    for k in range(0, D, BLOCK_C):
        column = k + tl.arange(0, BLOCK_C)
        x = load_chunk(x_ptr, x_ptr, x_index, x_valid, k, D, stride_xn, stride_xd, False, BLOCK_C)
        y = load_chunk(y_ptr, y_ptr, y_index, y_valid, k, D, stride_yn, stride_yd, False, BLOCK_C)
        x_mean, y_mean = tl.sum(x * a, axis=0), tl.sum(y * b, axis=0)
        if CENTRE == OWN_CENTRES:
            step = tl.where(solvable, x_mean - y_mean, 0.0)
            x, y = x - x_mean[None, :], y - y_mean[None, :]
            # The rounded means leave a mean of the moved clouds, which counts where the clouds lie far apart.
            left = tl.sum(x * a, axis=0) - tl.sum(y * b, axis=0)
            gain += tl.sum(step * left, axis=0)
            square += tl.sum(step * step, axis=0)
            x_term += tl.sum(x * step[None, :], axis=1)
            y_term += tl.sum(y * step[None, :], axis=1)
        else:
            x_mean = 0.5 * (x_mean + y_mean)
            y_mean = x_mean
        tl.store(x_centre_ptr + column, x_mean, mask=column < D)
        tl.store(y_centre_ptr + column, y_mean, mask=column < D)
    if CENTRE == OWN_CENTRES:
        half = 0.5 * square
        tl.store(x_term_ptr + x_index, half + 2.0 * x_term, mask=x_index < N)
        tl.store(y_term_ptr + y_index, half - 2.0 * y_term, mask=y_index < M)
    return square + 2.0 * gain


# --- solve --------------------------------------------------------------------------------------------------


@triton.jit
def _solve_problem(
    problem,
    x_ptr,
    y_ptr,
    a_ptr,
    b_ptr,
    x_centre_ptr,
    y_centre_ptr,
    eps_ptr,
    rho_x_ptr,
    rho_y_ptr,
    init_ptr,
    start_ptr,
    scratch_ptr,
    value_ptr,
    f_ptr,
    g_ptr,
    whole_f_ptr,
    whole_g_ptr,
    error_ptr,
    iterations_ptr,
    converged_ptr,
    N,
    M,
    D,
    K,
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
    CENTRE: tl.constexpr,
    PAIRS: tl.constexpr,
    BALANCED: tl.constexpr,
    HAS_INIT: tl.constexpr,
    ANNEALED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART_N: tl.constexpr,
    PART_M: tl.constexpr,
    WARPS: tl.constexpr,
    ROW_LANES: tl.constexpr,
    COLUMN_LANES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """See :func:`_sinkhorn_fwd_kernel`."""
    COLUMNS: tl.constexpr = BLOCK_M // (WARPS * COLUMN_LANES)
    x_cloud = problem
    y_cloud = problem
    if PAIRS:
        x_cloud = problem // K
        y_cloud = problem % K
    x_first = x_ptr + x_cloud * stride_xb
    y_first = y_ptr + y_cloud * stride_yb
    a_first = a_ptr + x_cloud * N
    b_first = b_ptr + y_cloud * M
    eps = tl.load(eps_ptr + problem)
    per_unit = LOG2_E / eps
    if CENTRE >= OWN_CENTRES:
        gain = _centre(
            x_first, y_first, a_first, b_first, x_centre_ptr + x_cloud * D, y_centre_ptr + y_cloud * D,
            whole_f_ptr + problem * N, whole_g_ptr + problem * M, N, M, D, stride_xn, stride_xd, stride_yn,
            stride_yd, CENTRE, BLOCK_N, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        if BALANCED:
            tl.store(value_ptr + problem, gain)
    tl.debug_barrier()  # the centres are there, and the last problem's costs have been read
    for part_n in range(0, BLOCK_N, PART_N):
        for part_m in range(0, BLOCK_M, PART_M):
            row = part_n + tl.arange(0, PART_N)
            column = part_m + tl.arange(0, PART_M)
            _, row_valid = load_weights(a_first, row, N)
            _, column_valid = load_weights(b_first, column, M)
            cost, _, _ = cost_tile(
                x_first, y_first, x_centre_ptr + x_cloud * D, y_centre_ptr + y_cloud * D, row, column,
                row_valid, column_valid, D, stride_xn, stride_xd, stride_yn, stride_yd, COST,
                CENTRE != NOT_CENTRED, PART_N, PART_M, BLOCK_D, PRECISION,
            )  # fmt: skip
            offset = _scratch_offset(row, column, BLOCK_N, COLUMN_LANES)
            tl.store(scratch_ptr + offset, cost * per_unit)
    unit = (eps > 0).to(tl.int32)  # 1, see _rows_of
    x_lane, x_step = _rows_of(unit, BLOCK_N, WARPS, ROW_LANES, COLUMN_LANES)
    y_lane, y_step = _columns_of(unit, BLOCK_M, WARPS, ROW_LANES, COLUMN_LANES)
    x_index = x_lane + x_step
    y_index = y_lane + y_step
    cells = _scratch_tile(scratch_ptr, unit, BLOCK_N, BLOCK_M, WARPS, ROW_LANES, COLUMN_LANES)
    # A thread's own place first, then constant distances, which take no registers.
    x_place = scratch_ptr + x_lane
    y_place = scratch_ptr + y_lane
    a_place = x_place + (x_step + BLOCK_N * BLOCK_M)
    f_place = x_place + (x_step + BLOCK_N * (BLOCK_M + 1))
    b_place = y_place + (y_step + BLOCK_N * (BLOCK_M + 2))
    g_place = y_place + (y_step + (BLOCK_N * (BLOCK_M + 2) + BLOCK_M))
    x_inside = x_index < N
    y_inside = y_index < M
    a = tl.maximum(_as_rows(tl.load(a_first + x_index, mask=x_inside, other=-1.0)), 0.0)
    b = _as_columns(tl.load(b_first + y_index, mask=y_inside, other=-1.0))
    # Whether there are points without weight: kept in memory until the end, as is all that can wait.
    tl.store(iterations_ptr + problem, _total(tl.where(b == 0, 1.0, 0.0)).to(tl.int32))
    b = tl.maximum(b, 0.0)
    # A problem without mass on one side has no plan: no iteration, every output 0.
    solvable = (_total(a) > 0) & (_total(b) > 0)
    g = tl.zeros_like(b)
    if HAS_INIT:
        g = _as_columns(tl.load(init_ptr + problem * M + y_index, mask=y_inside, other=0.0)) * per_unit
    _store(a_place, a)
    _store(b_place, b)
    _store(f_place, tl.zeros_like(a))
    _store(g_place, g)
    slack_x = load_slack(rho_x_ptr, problem, eps, BALANCED)
    slack_y = load_slack(rho_y_ptr, problem, eps, BALANCED)
    tau_x = 1.0 / (1.0 + slack_x)
    tau_y = 1.0 / (1.0 + slack_y)
    away_x = slack_x * tau_x  # 1 - tau, to all its digits
    away_y = slack_y * tau_y
    temperature = 1.0
    if ANNEALED:
        temperature = tl.load(start_ptr + problem)
    left = max_iter  # iterations at the final eps; error_ptr counts those at a higher one in the meantime
    if ANNEALED:
        tl.store(error_ptr + problem, 0.0)
    error = tl.where(solvable, float("inf"), 0.0)
    columns = False  # an update of g in the log domain is due: annealing, K out of range, or the end
    judge = False  # g is an update from f, so there is a plan whose error counts
    finished = False
    going = solvable
    # Each pass appears once in this loop, and reads the costs and the potentials that it needs, so that
    # there is never more than one tile in the registers, and few vectors beside it.
    while going:
        tl.debug_barrier()  # costs and potentials are written
        judge = columns
        if ANNEALED:
            judge = columns & (temperature <= 1.0)
        if columns:
            rate = 1.0 / temperature
            f = _as_rows(tl.load(f_place))
            if COST == GIVEN:
                f = partnered(f)
            exponent = (f * rate + log2(_as_rows(tl.load(a_place)))) - tl.load(cells) * rate
            top = _largest(exponent, 0)
            lse_y = temperature * (top + tl.log2(_column_sums(tl.exp2(exponent - top))))
            update = -lse_y / (1.0 + temperature * slack_y)
            # At the end only points without weight still lack a potential, and theirs moves nothing.
            g = _as_columns(tl.load(g_place))
            b = _as_columns(tl.load(b_place))
            _store(g_place, tl.where(finished, tl.where(b > 0, g, update), update))
            if ANNEALED:
                heated = tl.load(error_ptr + problem) + tl.where(temperature > 1.0, 1.0, 0.0)
                tl.debug_barrier()
                tl.store(error_ptr + problem, heated)
                temperature = tl.maximum(temperature * scaling, 1.0)
            columns = False
            tl.debug_barrier()
        if finished:
            going = False
        else:
            rate = 1.0 / temperature
            g = _as_columns(tl.load(g_place))
            if COST == GIVEN:
                g = partnered(g)
            exponent = (g * rate + log2(_as_columns(tl.load(b_place)))) - tl.load(cells) * rate
            top = _largest(exponent, 1)
            kernel = tl.exp2(exponent - top)
            s = _row_sums(kernel)
            if not BALANCED and COST != GIVEN:
                s = tl.where(s > 0, s, float("nan"))  # a distance overflows: the row has partners
            lse = temperature * (top + tl.log2(s))
            if judge:
                f = _as_rows(tl.load(f_place))
                a = _as_rows(tl.load(a_place))
                if BALANCED:
                    error = _total(tl.where(a > 0, a * tl.abs(tl.exp2(f + lse) - 1.0), 0.0))
                else:
                    share = _log_targets(a, f, slack_x)
                    step = (f - (away_x * lse - lse)) / tau_x  # as below: at rest it is 0
                    mass = _log_sum(share)
                    share -= tl.where(mass == float("-inf"), 0.0, mass)
                    error = _total(row_errors(share, step))
                going = (error > tol) & (left > 0)  # False for NaN
            if going:
                tl.debug_barrier()  # every warp has read f
                if ANNEALED:
                    columns = temperature > 1.0
                if columns:
                    f = -lse / (1.0 + temperature * slack_x)
                    if not BALANCED:
                        g = _as_columns(tl.load(g_place))
                        rows = _log_sum(_log_targets(_as_rows(tl.load(a_place)), f, slack_x))
                        targets = _log_targets(_as_columns(tl.load(b_place)), g, slack_y)
                        f += _shift(rows, _log_sum(targets), slack_x, slack_y)
                    _store(f_place, f)
                else:
                    _store(f_place, lse)  # not needed for a while
                    kernel = kernel * tl.where(s > 0, 1.0 / s, s * 0.0)  # b in it: rows sum to 1; NaN stays
                    s = tl.where(s > 0, 1.0, s)
                    a = _as_rows(tl.load(a_place))
                    b = _as_columns(tl.load(b_place))
                    if COST == GIVEN:  # what may match nothing takes no part
                        g = _as_columns(tl.load(g_place))
                        # Where its marginal is kept there is no plan to look for.
                        lost_rows = _total(tl.where(lse == float("-inf"), a, 0.0))
                        lost_columns = _total(tl.where(g == float("inf"), b, 0.0))
                        going = tl.where(slack_x == 0.0, lost_rows, 0.0) == 0.0
                        going = going & (tl.where(slack_y == 0.0, lost_columns, 0.0) == 0.0)
                        b = tl.where(g == float("inf"), 0.0, b)
                        g = tl.where(g == float("inf"), 0.0, g)
                        a = tl.where(lse == float("-inf"), 0.0, a)
                        s = tl.where(lse == float("-inf"), 1.0, s)
                    u = tl.full((BLOCK_N // ROW_LANES, 1, 1, ROW_LANES, 1), 1.0, dtype=tl.float32)
                    v = tl.full((1, COLUMNS, WARPS, 1, COLUMN_LANES), 1.0, dtype=tl.float32)
                    t = v
                    f = -tau_x * lse
                    # Free marginals: lse stays while K does, so its part of log u enters the rows' masses,
                    # whose sum is kept apart as a logarithm.
                    level = 0.0
                    shift = 0.0
                    if not BALANCED:
                        a = tl.where(a > 0, log2(a) + away_x * lse, float("-inf"))
                        level = _log_sum(a)
                        a -= level
                    few = True  # first one iteration, then MAX_UNCHECKED
                    safe = True
                    while going & safe:
                        stop = tl.maximum(left - tl.where(few, 1, MAX_UNCHECKED), 0)
                        few = False
                        while going & (left > stop):  # multiply-adds alone
                            # The maximum keeps points that meet nothing, which have no weight, finite.
                            if BALANCED:
                                u = _reciprocal(tl.maximum(s, TINY))
                                t = _column_sums(kernel * (a * u))
                                v = b * _reciprocal(tl.maximum(t, TINY))
                            else:
                                sums = tl.log2(s)
                                share = a + away_x * sums
                                mass = _log_sum(share)
                                share -= tl.where(mass == float("-inf"), 0.0, mass)
                                targets = _log_targets(b, g + tl.log2(tl.where(b > 0, v, 1.0)), slack_y)
                                shift = _shift(mass + level, _log_sum(targets), slack_x, slack_y)
                                f = away_x * lse - lse - tau_x * sums + shift
                                u = tl.exp2(-tau_x * sums)
                                t = _column_sums(kernel * tl.where(a > float("-inf"), tl.exp2(a) * u, 0.0))
                                log_t = tl.log2(t / b) + (level + shift)
                                v = tl.exp2(-tau_y * log_t - away_y * g)
                                v = tl.where((b > 0) & (t > 0), v, 0.0)
                            left -= 1
                            s = _row_sums(kernel * v)
                            if BALANCED:
                                error = _total(a * tl.abs(u * s - 1.0))
                            else:
                                if COST == GIVEN:
                                    s = tl.where(lse == float("-inf"), 1.0, s)
                                error = _total(row_errors(share, tl.log2(s) - sums + shift / tau_x))
                            going = error > tol
                        safe = _in_range(v, b)
                        if not BALANCED:
                            # Where tau is small v stays near 1 even if the sum that it comes from underflows.
                            u = tl.where(a > float("-inf"), u, 1.0)
                            safe = safe & _in_range(u, u) & _exact(t, b)
                        going = tl.where(safe, going & (left > 0), True)
                    # Out of range, the last update of g is taken again in the log domain, and judged there.
                    columns = not safe
                    lse = _as_rows(tl.load(f_place))
                    tl.debug_barrier()
                    if BALANCED:
                        f = tl.log2(u) - lse
                    _store(f_place, tl.where(tl.abs(f) < float("inf"), f, -tau_x * lse))
                    g = _as_columns(tl.load(g_place))
                    tl.debug_barrier()
                    _store(g_place, tl.where(safe, g + tl.log2(tl.where(b > 0, v, 1.0)), g))
            finished = not going
            columns = columns | finished
            if finished:
                going = tl.load(iterations_ptr + problem) > 0

    # What comes after the loop is read anew, so that it takes no registers in it.
    tl.debug_barrier()
    eps = tl.load(eps_ptr + problem)
    unit = (eps > 0).to(tl.int32)
    x_lane, x_step = _rows_of(unit, BLOCK_N, WARPS, ROW_LANES, COLUMN_LANES)
    y_lane, y_step = _columns_of(unit, BLOCK_M, WARPS, ROW_LANES, COLUMN_LANES)
    x_index = x_lane + x_step
    y_index = y_lane + y_step
    x_inside = x_index < N
    y_inside = y_index < M
    x_valid = _as_rows(tl.load(a_first + x_index, mask=x_inside, other=-1.0)) >= 0
    y_valid = _as_columns(tl.load(b_first + y_index, mask=y_inside, other=-1.0)) >= 0
    a = _as_rows(tl.load(a_place))
    b = _as_columns(tl.load(b_place))
    f = _as_rows(tl.load(f_place))
    g = _as_columns(tl.load(g_place))
    solvable = (_total(a) > 0) & (_total(b) > 0)
    counted_a, counted_b = a, b
    if not BALANCED:
        counted_a = tl.where(tl.exp2(-slack_x * f) > 0, a, 0.0)
        counted_b = tl.where(tl.exp2(-slack_y * g) > 0, b, 0.0)
    units = (_largest_of(f, counted_a) + _largest_of(g, counted_b)) * LN_2  # see problem.rounding
    error += tl.maximum(units - EXACT, 0.0) * (EPSILON / 8)
    per_unit = eps * LN_2
    f = tl.where(solvable, tl.where(x_valid, f * per_unit, 0.0), 0.0)
    g = tl.where(solvable, tl.where(y_valid, g * per_unit, 0.0), 0.0)
    tl.store(f_ptr + problem * N + x_index, tl.broadcast_to(f, x_index.shape), mask=x_inside)
    tl.store(g_ptr + problem * M + y_index, tl.broadcast_to(g, y_index.shape), mask=y_inside)
    iterations = max_iter - left
    if ANNEALED:
        iterations += tl.load(error_ptr + problem).to(tl.int32)
        tl.debug_barrier()
    tl.store(error_ptr + problem, error)
    tl.store(iterations_ptr + problem, tl.where(solvable, iterations, 0))
    if BALANCED:
        value = _weighted_total(a, f) + _weighted_total(b, g)
        if CENTRE == OWN_CENTRES:
            value += tl.load(value_ptr + problem)
            tl.debug_barrier()
        value = tl.where(solvable, value, 0.0)
        tl.store(value_ptr + problem, value)
        finite = tl.abs(value) < float("inf")
        tl.store(converged_ptr + problem, (error <= tol) & finite)
    if WHOLE:
        if CENTRE == OWN_CENTRES:
            f += _as_rows(tl.load(whole_f_ptr + problem * N + x_index, mask=x_inside, other=0.0))
            g += _as_columns(tl.load(whole_g_ptr + problem * M + y_index, mask=y_inside, other=0.0))
        if BALANCED:
            if COST == GIVEN:
                a = tl.where(f == float("inf"), 0.0, a)
                b = tl.where(g == float("inf"), 0.0, b)
            shift = 0.5 * (_weighted_total(a, f) - _weighted_total(b, g))
            f -= shift
            g += shift
        f = tl.where(solvable, tl.where(x_valid, f, 0.0), 0.0)
        g = tl.where(solvable, tl.where(y_valid, g, 0.0), 0.0)
        tl.debug_barrier()  # every warp has read the terms
        tl.store(whole_f_ptr + problem * N + x_index, tl.broadcast_to(f, x_index.shape), mask=x_inside)
        tl.store(whole_g_ptr + problem * M + y_index, tl.broadcast_to(g, y_index.shape), mask=y_inside)


@triton.jit
def _sinkhorn_fwd_kernel(
    x_ptr,
    y_ptr,
    a_ptr,
    b_ptr,
    x_centre_ptr,
    y_centre_ptr,
    eps_ptr,
    rho_x_ptr,
    rho_y_ptr,
    init_ptr,
    start_ptr,
    scratch_ptr,
    value_ptr,
    f_ptr,
    g_ptr,
    whole_f_ptr,
    whole_g_ptr,
    error_ptr,
    iterations_ptr,
    converged_ptr,
    PROBLEMS,
    N,
    M,
    D,
    K,
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
    CENTRE: tl.constexpr,
    PAIRS: tl.constexpr,
    BALANCED: tl.constexpr,
    HAS_INIT: tl.constexpr,
    ANNEALED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PART_N: tl.constexpr,
    PART_M: tl.constexpr,
    WARPS: tl.constexpr,
    ROW_LANES: tl.constexpr,
    COLUMN_LANES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Writes potentials of the moved clouds' costs to f_ptr and g_ptr, in units of the cost.

    With WHOLE also those of the points' own costs, with <a, f> = <b, g> where BALANCED, to whole_f_ptr and
    whole_g_ptr, which hold the terms in the meantime. Values and convergence are written where BALANCED.
    """
    scratch_ptr += tl.program_id(0).to(tl.int64) * (BLOCK_N * BLOCK_M + 2 * (BLOCK_N + BLOCK_M))
    if PAIRS:  # so many that they take turns
        for turn in range(0, PROBLEMS - tl.program_id(0), tl.num_programs(0)):
            problem = turn + tl.program_id(0).to(tl.int64)
            _solve_problem(
                problem, x_ptr, y_ptr, a_ptr, b_ptr, x_centre_ptr, y_centre_ptr, eps_ptr, rho_x_ptr,
                rho_y_ptr, init_ptr, start_ptr, scratch_ptr, value_ptr, f_ptr, g_ptr, whole_f_ptr,
                whole_g_ptr, error_ptr, iterations_ptr, converged_ptr, N, M, D, K, tol, scaling, max_iter,
                stride_xb, stride_xn, stride_xd, stride_yb, stride_yn, stride_yd, COST, CENTRE, PAIRS,
                BALANCED, HAS_INIT, ANNEALED, WHOLE, BLOCK_N, BLOCK_M, BLOCK_D, PART_N, PART_M, WARPS,
                ROW_LANES, COLUMN_LANES, PRECISION,
            )  # fmt: skip
    else:  # what a loop keeps from problem to problem would not fit beside the tile
        problem = tl.program_id(0).to(tl.int64)
        _solve_problem(
            problem, x_ptr, y_ptr, a_ptr, b_ptr, x_centre_ptr, y_centre_ptr, eps_ptr, rho_x_ptr, rho_y_ptr,
            init_ptr, start_ptr, scratch_ptr, value_ptr, f_ptr, g_ptr, whole_f_ptr, whole_g_ptr, error_ptr,
            iterations_ptr, converged_ptr, N, M, D, K, tol, scaling, max_iter, stride_xb, stride_xn,
            stride_xd, stride_yb, stride_yn, stride_yd, COST, CENTRE, PAIRS, BALANCED, HAS_INIT, ANNEALED,
            WHOLE, BLOCK_N, BLOCK_M, BLOCK_D, PART_N, PART_M, WARPS, ROW_LANES, COLUMN_LANES, PRECISION,
        )  # fmt: skip


# --- launches -----------------------------------------------------------------------------------------------


def fits(n: int, m: int) -> bool:
    """Whether an n x m problem stays on chip."""
    block_n, block_m = block_size(n), block_size(m)
    return block_n <= MAX_BLOCK_N and block_m <= MAX_BLOCK_M and block_n * block_m <= MAX_TILE


def tile_configuration(
    n: int, m: int, balanced: bool = True, pairs: bool = False, hip: bool = HIP
) -> dict[str, Any]:
    """Blocks, warps and lanes of the solver for an n x m problem."""
    block_n, block_m = block_size(n), block_size(m)
    warps = solver_warps(block_n, block_m, hip)
    lanes = 64 if hip else 32
    row_lanes = _row_lanes(block_n, block_m, warps, lanes)
    # With 128 registers two programs share a multiprocessor. Free marginals and loops over pairs need more,
    # and so do tiles that are not square. Without a number the compiler would rather spill than use 255.
    shared = balanced and not pairs and block_n == block_m == 128 and warps == 8
    registers = {} if hip else {"maxnreg": 128 if shared else min(255, REGISTERS // (lanes * warps))}
    return {
        "BLOCK_N": block_n,
        "BLOCK_M": block_m,
        "BLOCK_D": 16,
        "PART_N": min(block_n, 64 if warps > 1 else 32),
        "PART_M": min(block_m, 32),
        "WARPS": warps,
        "ROW_LANES": row_lanes,
        "COLUMN_LANES": lanes // row_lanes,
        "num_warps": warps,
        "num_stages": 1,
    } | registers


def solver_warps(block_n: int, block_m: int, hip: bool = HIP) -> int:
    """Warps of a program that solves a problem of at most block_n x block_m points."""
    cells = CELLS_OF_WARP * (2 if hip else 1)  # AMD's are twice as wide
    return max(1, block_n * block_m // cells)


def _row_lanes(block_n: int, block_m: int, warps: int, lanes: int) -> int:
    """How many of a warp's lanes stand along the rows: where an iteration takes the fewest instructions.

    A thread's vectors have block_n / row_lanes rows and block_m / (warps column_lanes) columns. Each entry
    takes about six instructions, and two for each halving of the lanes that its sum crosses.
    """

    def instructions(row_lanes: int) -> float:
        column_lanes = lanes // row_lanes
        rows, columns = block_n / row_lanes, block_m / (warps * column_lanes)
        return rows * (6 + 2 * math.log2(column_lanes)) + columns * (6 + 2 * math.log2(row_lanes))

    powers = [2**power for power in range(int(math.log2(lanes)) + 1)]
    fitting = [r for r in powers if r <= block_n and warps * lanes // r <= block_m]
    return min(fitting, key=instructions)


def solve(problem: Problem, init: Tensor | None, settings: SolverSettings) -> Solution:
    """Launch the solver, once for as many problems as ``MAX_SCRATCH`` has room for; pairs share one launch.

    Where a problem that is not one of pairs comes without centres, the kernel centres the clouds itself, and
    finds the points' own potentials too.
    """
    solution, centre = _empty_solution(problem)
    configuration = tile_configuration(*problem.size, problem.balanced, problem.pairs)
    tile = configuration["BLOCK_N"] * configuration["BLOCK_M"]
    floats = tile + 2 * (configuration["BLOCK_N"] + configuration["BLOCK_M"])
    most, count = max(1, MAX_SCRATCH // floats), math.prod(problem.shape)
    scratch = problem.eps.new_empty(min(most, count) * floats)
    start = problem.eps
    if settings.scaling:
        start = start_temperature(problem, with_masks=settings.from_masks)
    named = vars(solution) | {"init": init, "start": start}
    for first in range(0, count, count if problem.pairs else most):  # pairs take turns
        some = slice(first, first + most)
        part = problem if count <= most or problem.pairs else problem.rows(first, first + most)
        # Tensors that the kernel will not use are replaced by others.
        tensors = {k: problem.eps if t is None else t.contiguous() for k, t in named.items()}
        pointers = {f"{k}_ptr": t if part is problem else t[some] for k, t in tensors.items()}
        arguments = launch_arguments(part) | rho_arguments(part) | pointers
        del arguments["CENTRED"]
        launch(
            _sinkhorn_fwd_kernel,
            (min(most, count - first),),
            **arguments,
            scratch_ptr=scratch,
            PROBLEMS=count,
            K=problem.shape[-1],
            tol=settings.tol,
            scaling=settings.scaling,
            max_iter=settings.max_iter,
            CENTRE=centre,
            PAIRS=problem.pairs,
            BALANCED=problem.balanced,
            HAS_INIT=init is not None,
            ANNEALED=bool(settings.scaling),
            WHOLE=solution.whole_f is not None,
            **configuration,
        )
    return solution


def _empty_solution(problem: Problem) -> tuple[Solution, int]:
    """The tensors that the kernel writes, and which centres it uses: one of the constants above."""
    (n, m), shape, empty = problem.size, problem.shape, problem.eps.new_empty
    centre = _centre_code(problem.cost, problem.balanced, problem.x_centre is not None)
    own = centre >= OWN_CENTRES.value
    whole = problem.balanced and not problem.pairs and centre != CENTRES_GIVEN.value
    d = problem.x.shape[2]
    solution = Solution(
        f=empty(*shape, n),
        g=empty(*shape, m),
        error=empty(shape),
        iterations=empty(shape, dtype=torch.int32),
        value=empty(shape) if problem.balanced else None,
        whole_f=empty(*shape, n) if whole else None,
        whole_g=empty(*shape, m) if whole else None,
        converged=empty(shape, dtype=torch.bool) if problem.balanced else None,
        x_centre=empty(*shape, d) if own else problem.x_centre,
        y_centre=empty(*shape, d) if own else problem.y_centre,
    )
    return solution, centre


def _centre_code(cost: str, balanced: bool, given: bool) -> int:
    if given:
        return CENTRES_GIVEN.value
    if cost not in CENTRED_COSTS:
        return NOT_CENTRED.value
    return OWN_CENTRES.value if cost == "sqeuclidean" and balanced else COMMON_CENTRE.value


# --- what compiles ------------------------------------------------------------------------------------------


def compile_cases(hip: bool) -> Iterator[CompileCase]:
    """Every launch above; some come twice.

    hip: compile for AMD's GPUs, whatever torch itself is built for.
    """
    sides = [2**power for power in range(4, 9)]
    for n, m in itertools.product(sides, sides):
        if not fits(n, m):
            continue
        for dtype, cost, used in itertools.product(DTYPES, COST_CODES, fp32_precisions(hip)):
            kind = {"COST": COST_CODES[cost], "PRECISION": used}
            for flags in _flags(cost):
                tile = tile_configuration(n, m, flags["BALANCED"], flags["PAIRS"], hip)
                yield compile_case(_sinkhorn_fwd_kernel, dtype, kind | flags, tile, CONVENTIONS)


def _flags(cost: str) -> Iterator[dict[str, Any]]:
    """The flags of every launch for a cost."""
    for pairs, balanced, has_init, annealed in itertools.product((False, True), repeat=4):
        if pairs and (cost == "given" or has_init):
            continue
        given = cost in CENTRED_COSTS and (pairs or has_init or annealed)
        centre = _centre_code(cost, balanced, given)
        yield {
            "CENTRE": centre,
            "PAIRS": pairs,
            "BALANCED": balanced,
            "HAS_INIT": has_init,
            "ANNEALED": annealed,
            "WHOLE": balanced and not pairs and centre != CENTRES_GIVEN.value,
        }
