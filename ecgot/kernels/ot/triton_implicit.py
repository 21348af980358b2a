"""Implicit gradients on chip: the linear solve of :func:`ecgot.kernels.ot.torch_solver.implicit` in Triton.

One program solves one problem by conjugate gradients on the kernel exp((f + g - C) / eps), which it forms
once and keeps in registers. Bytes moved per problem: (N + M) D points, and 4 (N + M) numbers.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ecgot.kernels.compilation import DTYPES, CompileCase, compile_case
from ecgot.kernels.dispatch import HIP, launch
from ecgot.kernels.ot.checks import CENTRED_COSTS
from ecgot.kernels.ot.problem import Problem
from ecgot.kernels.ot.triton_tiles import (
    CONVENTIONS,
    COST_CODES,
    GIVEN,
    LOG2_E,
    MAX_EXPONENT,
    all_registers,
    block_size,
    cost_tile,
    fp32_precisions,
    launch_arguments,
    load_slack,
    load_weights,
    partnered,
    rho_arguments,
)

MAX_TILE = 64 * 64  # conjugate gradients need many vectors beside the tile
ROUNDING = tl.constexpr(8 * 2.0**-23)


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
    rho_x_ptr,
    rho_y_ptr,
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
    BALANCED: tl.constexpr,
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
    tau_x = 1.0 / (1.0 + load_slack(rho_x_ptr, problem, eps, BALANCED))
    tau_y = 1.0 / (1.0 + load_slack(rho_y_ptr, problem, eps, BALANCED))
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
    if COST == GIVEN:
        f = partnered(f)
        g = partnered(g)
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
    """Whether the linear system of an n x m problem stays on chip."""
    return block_size(n) * block_size(m) <= MAX_TILE


def _configuration(n: int, m: int, hip: bool = HIP) -> dict[str, Any]:
    """Blocks, and the fewest warps whose registers hold the tile. AMD's are twice as wide."""
    block_n, block_m = block_size(n), block_size(m)
    cells = block_n * block_m
    if hip:
        warps = 1 if cells <= 16 * 16 else 2 if cells <= 32 * 64 else 4
    else:
        warps = 1 if cells <= 16 * 16 else 2 if cells <= 32 * 32 else 4 if cells <= 32 * 64 else 8
    blocks = {"BLOCK_N": block_n, "BLOCK_M": block_m, "BLOCK_D": 16}
    return blocks | {"num_warps": warps, "num_stages": 1} | all_registers(hip)


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
            BALANCED=problem.balanced,
            **rho_arguments(problem),
            tol=tol,
            max_iter=max_iter,
            **_configuration(*problem.size),
        )
    return left, right, grad_a, grad_b


# --- what compiles ------------------------------------------------------------------------------------------


def compile_cases(hip: bool) -> Iterator[CompileCase]:
    """Every launch above, as in :func:`ecgot.kernels.ot.triton_onchip.compile_cases`."""
    sides = [2**power for power in range(4, 9)]
    for n, m in itertools.product(sides, sides):
        if not fits(n, m):
            continue
        for dtype, cost, used in itertools.product(DTYPES, COST_CODES, fp32_precisions(hip)):
            kind = {"COST": COST_CODES[cost], "CENTRED": cost in CENTRED_COSTS, "PRECISION": used}
            for balanced in (False, True):
                flags = kind | {"BALANCED": balanced}
                chosen = _configuration(n, m, hip)
                yield compile_case(_sinkhorn_implicit_kernel, dtype, flags, chosen, CONVENTIONS)
