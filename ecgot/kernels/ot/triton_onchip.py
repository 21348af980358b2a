"""On-chip Sinkhorn in Triton: one program solves one whole problem (or one pair of clouds) in one launch.

    f_i <- -tau_x eps log sum_j b_j exp((g_j - C_ij) / eps),    tau = rho / (rho + eps), 1 where balanced
    g_j <- -tau_y eps log sum_i a_i exp((f_i - C_ij) / eps)

until the plan P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps) has the row marginals that f asks for within tol.

The trick: the cost tile C [N, M] is built from x and y with matrix products; a pass in the log domain absorbs
the potentials into K = b exp((f + g - C) / eps), which stays in registers. From there an iteration is only
multiply-adds: f and g move by the logarithms of u = 1 / (K v) and v = b / (K^T a u). If v leaves a safe range
the tile is built and absorbed again. Potentials are in units of eps / log2(e), so that exp is exp2, a single
instruction. The next u gives the marginal error for free: row i sums to a_i u_i (K v)_i.

Bytes moved per problem: forward (N + M) D reads, N + M + 3 writes; the gradient, for each tile of points of
one side, that tile and the whole other side, twice, and the tile's gradient. No problem reads another's data,
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
from ecgot.kernels.ot.checks import CENTRED_COSTS
from ecgot.kernels.ot.problem import Problem, Result, SolverSettings, start_temperature
from ecgot.kernels.ot.triton_tiles import (
    CONVENTIONS,
    COST_CODES,
    LN_2,
    LOG2_E,
    MAX_EXPONENT,
    block_size,
    cost_tile,
    fp32_precisions,
    launch_arguments,
    load_weights,
    log2,
)

# Tiles of at most this many cells, with no side longer than its MAX_BLOCK, stay in registers.
MAX_TILE = 128 * 128
MAX_BLOCK_N, MAX_BLOCK_M = 256, 128  # 64 x 256 would need more tensor memory than sm_100 has
MAX_IMPLICIT_TILE = 64 * 64
SAFE = tl.constexpr(1e10)  # of u and v: what underflowed in K, below 2^-126, still is below 1e-18 of a row
ROUNDING = tl.constexpr(8 * 2.0**-23)
UNSAFE = tl.constexpr(1e-10)
TINY = tl.constexpr(2.0**-126)


@triton.jit
def _log_sum_exp2(exponent, AXIS: tl.constexpr):
    """log2 sum exp2(exponent) along AXIS; a row that is all -inf gives -inf, not NaN."""
    top = tl.max(exponent, axis=AXIS)
    top = tl.where(top == float("-inf"), 0.0, top)
    return top + tl.log2(tl.sum(tl.exp2(exponent - tl.expand_dims(top, AXIS)), axis=AXIS))


@triton.jit
def _damping(rho, eps):  # rho may be infinite
    return 1.0 / (1.0 + eps / rho)


@triton.jit
def _column_scaling(t, b, g, tau, BALANCED: tl.constexpr):
    """v from the column sums t of u K, where K has absorbed b and the potentials g; 1 without weight."""
    v = b / t if BALANCED else tl.exp2(-tau * (tl.log2(t / b) - g) - g)
    return tl.where(b > 0, v, 1.0)


@triton.jit
def _row_error(a, f, f_next, tau):
    """|row marginal - a exp(-f / rho)| per row; f_next is the update from g."""
    # Far clouds: the target underflows while the step to it overflows, and 0 * inf would be NaN.
    target = tl.maximum(tl.exp2(-f * (1.0 / tau - 1.0)), TINY)
    step = tl.abs(tl.exp2((f - f_next) / tau) - 1.0)
    return tl.where(a > 0, a * (target * step), 0.0)  # points without weight may overflow


@triton.jit
def _outside(scaling, weight):  # -> how many points with weight are out of range
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
    """f_ptr is written; g_ptr holds the start and is overwritten. Both are in units of the cost."""
    problem = tl.program_id(0).to(tl.int64)
    x_cloud = problem
    y_cloud = problem
    if PAIRS:
        x_cloud = problem // K
        y_cloud = problem % K
    x_index = tl.arange(0, BLOCK_N)
    y_index = tl.arange(0, BLOCK_M)
    a, x_valid = load_weights(a_ptr + x_cloud * N, x_index, N)
    b, y_valid = load_weights(b_ptr + y_cloud * M, y_index, M)
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
    columns = False  # an update of g in the log domain is due: annealing, K out of range, or the end
    judge = False  # g is an update from f, so there is a plan whose error counts
    finished = False
    going = solvable
    # Each pass appears once in this loop and builds its own tile, so that one tile and what the pass makes of
    # it fit into the registers.
    while going:
        cost, _, _ = cost_tile(
            x_ptr, y_ptr, x_centre_ptr, y_centre_ptr, x_index, y_index, x_valid, y_valid, D, stride_xn,
            stride_xd, stride_yn, stride_yd, COST, CENTRED, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
        )  # fmt: skip
        cost = cost * per_unit
        judge = columns & (temperature <= 1.0)
        if columns:
            rate = 1.0 / temperature
            lse_y = temperature * _log_sum_exp2((f * rate + log2(a))[:, None] - cost * rate, 0)
            update = -_damping(rho_y, eps * temperature) * lse_y
            # At the end only points without weight still lack a potential, and theirs moves nothing.
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
            exponent = (g * rate + log2(b))[None, :] - cost * rate
            top = tl.max(exponent, axis=1)
            top = tl.where(top == float("-inf"), 0.0, top)
            kernel = tl.exp2(exponent - top[:, None])
            s = tl.sum(kernel, axis=1)
            lse = temperature * (top + tl.log2(s))
            f_next = -_damping(rho_x, eps * temperature) * lse
            if judge:
                error = tl.sum(_row_error(a, f, f_next, tau_x), axis=0)
                going = (error > tol) & (iteration < last)  # False for NaN
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
    """Conjugate gradients on the tile that is in registers; see ``torch_solver.implicit``."""
    problem = tl.program_id(0).to(tl.int64)
    x_index = tl.arange(0, BLOCK_N)
    y_index = tl.arange(0, BLOCK_M)
    a, x_valid = load_weights(a_ptr + problem * N, x_index, N)
    b, y_valid = load_weights(b_ptr + problem * M, y_index, M)
    solvable = (tl.sum(a, axis=0) > 0) & (tl.sum(b, axis=0) > 0)
    eps = tl.load(eps_ptr + problem)
    per_unit = LOG2_E / eps
    tau_x = _damping(rho_x, eps)
    tau_y = _damping(rho_y, eps)
    cost, _, _ = cost_tile(
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
    # Cancellation leaves rounding in the right-hand side, which is no equation to solve.
    rounding = tl.where(b > 0, tl.abs(grad_g), 0.0) + tau_x * b * _to_columns(kernel, tl.abs(inner))
    rounding = rounding * ROUNDING
    diagonal = b * c
    preconditioner = _inverse(diagonal)
    if tau_x * tau_y == 1.0:  # singular: remove what is left of the gauge, or the iteration would chase it
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


def fits(n: int, m: int) -> bool:
    """Whether an n x m problem stays on chip."""
    block_n, block_m = block_size(n), block_size(m)
    return block_n <= MAX_BLOCK_N and block_m <= MAX_BLOCK_M and block_n * block_m <= MAX_TILE


def fits_implicit(n: int, m: int) -> bool:
    """Whether its linear system of implicit gradients does too: conjugate gradients need more vectors."""
    return fits(n, m) and block_size(n) * block_size(m) <= MAX_IMPLICIT_TILE


def tile_configuration(n: int, m: int, hip: bool = HIP) -> dict[str, Any]:
    """Blocks and warps of a kernel that holds a whole n x m problem."""
    block_n, block_m = block_size(n), block_size(m)
    return {
        "BLOCK_N": block_n,
        "BLOCK_M": block_m,
        # 16 columns of x and y at a time: with 32 the products' operands push the tile out of the registers.
        "BLOCK_D": 16,
        "num_warps": _warps(block_n, block_m, hip),
        "num_stages": 1,
    }


def _warps(block_n: int, block_m: int, hip: bool) -> int:
    """The fewest warps whose registers hold the tile, so that small problems share a multiprocessor.

    Found by compiling every tile with 1 to 16 warps. AMD's are twice as wide.
    """
    cells = block_n * block_m
    if hip:
        return 1 if cells <= 16 * 16 else 2 if cells <= 32 * 64 else 4 if cells <= 64 * 128 else 8
    if cells == 32 * 64 and max(block_n, block_m) == 64:
        return 4
    return 1 if cells <= 16 * 16 else 2 if cells <= 32 * 32 else 8


def solve(problem: Problem, init: Tensor | None, settings: SolverSettings) -> Result:
    """Launch the solver: f, g, marginal error and iterations."""
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
    start = start_temperature(problem) if settings.scaling else torch.ones_like(problem.eps)
    launch(
        _sinkhorn_fwd_kernel,
        (math.prod(shape),),
        **launch_arguments(problem),
        start_ptr=start.contiguous(),
        f_ptr=f,
        g_ptr=g,
        error_ptr=error,
        iterations_ptr=iterations,
        K=shape[-1],
        rho_x=problem.rho_x,
        rho_y=problem.rho_y,
        tol=settings.tol,
        scaling=settings.scaling,
        max_iter=settings.max_iter,
        PAIRS=problem.pairs,
        BALANCED=problem.balanced,
        **tile_configuration(n, m),
    )
    return f, g, error, iterations


def implicit(
    problem: Problem, f: Tensor, g: Tensor, grad_f: Tensor, grad_g: Tensor, max_iter: int, tol: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the linear solve of :func:`ecgot.kernels.ot.torch_solver.implicit`."""
    left, right, grad_a, grad_b = (f.new_zeros(t.shape) for t in (f, g, f, g))
    if f.numel() and g.numel():
        launch(
            _sinkhorn_implicit_kernel,
            (len(f),),
            **launch_arguments(problem),
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
            **tile_configuration(*problem.size),
        )
    return left, right, grad_a, grad_b


# --- what compiles ------------------------------------------------------------------------------------------


def compile_cases(hip: bool) -> Iterator[CompileCase]:
    """Every launch above; some come twice.

    hip: compile for AMD's GPUs, whatever torch itself is built for.
    """
    sides = [2**power for power in range(4, 9)]
    for n, m in itertools.product(sides, sides):
        if not fits(n, m):
            continue
        tile = tile_configuration(n, m, hip)
        for dtype, cost, used in itertools.product(DTYPES, COST_CODES, fp32_precisions(hip)):
            centred = cost in CENTRED_COSTS
            kind = {"COST": COST_CODES[cost], "CENTRED": centred, "PRECISION": used}
            for pairs, balanced in itertools.product((False, True), repeat=2):
                if pairs and cost == "given":
                    continue
                flags = kind | {"PAIRS": pairs, "BALANCED": balanced}
                yield compile_case(_sinkhorn_fwd_kernel, dtype, flags, tile, CONVENTIONS)
            if fits_implicit(n, m):
                yield compile_case(_sinkhorn_implicit_kernel, dtype, kind, tile, CONVENTIONS)
