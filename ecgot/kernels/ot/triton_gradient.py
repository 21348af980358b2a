"""The gradient of the transport cost in the points in Triton, for clouds of any size.

Bytes moved: for each tile of points of one side, that tile and the whole other side, twice, and the tile's
gradient.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecgot.kernels.compilation import DTYPES, CompileCase, compile_case
from ecgot.kernels.dispatch import HIP, launch
from ecgot.kernels.ot.checks import CENTRED_COSTS, COSTS
from ecgot.kernels.ot.problem import PlanWeights, Problem
from ecgot.kernels.ot.triton_tiles import (
    CONVENTIONS,
    COSINE,
    COST_CODES,
    DOT,
    EUCLIDEAN,
    LOG2_E,
    MAX_EXPONENT,
    SQEUCLIDEAN,
    block_size,
    cost_tile,
    exchanged,
    fp32_precisions,
    inverse_norm,
    launch_arguments,
    load_chunk,
    load_weights,
)

MAX_GRADIENT_N, MAX_GRADIENT_M = 64, 32
GRADIENT_WIDTH = 64  # columns of the gradient that one program makes


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
    """The gradient of sum Q_ij C_ij, Q held fixed, in BLOCK_N points of x and BLOCK_OUT of their coordinates.

    Q_ij = exp((f_i + g_j - C_ij) / eps) (scale a_i b_j + left_i b_j + a_i right_j) is symmetric in its two
    sides, so the same kernel with the roles exchanged gives the gradient in y. Cloud ``own`` of x meets
    ``others`` clouds of y: cloud own * other_own + i, in problem own * pair_own + i * pair_other.
    """
    own = tl.program_id(0).to(tl.int64)
    x_index = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(2) * BLOCK_OUT
    x_ptr += own * stride_xb
    x_centre_ptr += own * D
    a, x_valid = load_weights(a_ptr + own * N, x_index, N)
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
        wanted = scale != 0  # skip problems that get no gradient, so that their NaN stays theirs
        if IMPLICIT:
            wanted = True
        if wanted:
            rows = a * scale
            if IMPLICIT:
                rows += tl.load(left_ptr + problem * N + x_index, mask=x_index < N, other=0.0)
            for m in range(0, M, BLOCK_M):
                y_index = m + tl.arange(0, BLOCK_M)
                b, y_valid = load_weights(b_ptr + cloud * M, y_index, M)
                g = tl.load(g_ptr + problem * M + y_index, mask=y_index < M, other=0.0) * per_unit
                y_tile_ptr = y_ptr + cloud * stride_yb
                y_tile_centre_ptr = y_centre_ptr + cloud * D
                cost, x_square, y_square = cost_tile(
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
                y = load_chunk(
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
                    y = y * inverse_norm(y_square)[:, None]
                to_y += tl.dot(q, y, input_precision=PRECISION)
    if COST == DOT:
        grad = -to_y
    else:
        x = load_chunk(
            x_ptr, x_centre_ptr, x_index, x_valid, first, D, stride_xn, stride_xd, CENTRED, BLOCK_OUT
        )
        if COST == COSINE:  # d(1 - x^ y^) / dx = (x^ (x^ y^) - y^) / |x|
            per_x = inverse_norm(x_square)[:, None]
            grad = (along[:, None] * x * per_x - to_y) * per_x
        elif COST == SQEUCLIDEAN:
            grad = 2.0 * (along[:, None] * x - to_y)
        else:
            grad = along[:, None] * x - to_y
    d = first + tl.arange(0, BLOCK_OUT)
    tile = grad_x_ptr + (own * N + x_index)[:, None] * D + d[None, :]
    tl.store(tile, grad.to(grad_x_ptr.dtype.element_ty), mask=(x_index < N)[:, None] & (d < D)[None, :])


def _gradient_configuration(n: int, m: int, d: int, hip: bool = HIP) -> dict[str, Any]:
    """Blocks and warps: the products need a smaller tile than the solver's loop."""
    block_n, block_m = min(block_size(n), MAX_GRADIENT_N), min(block_size(m), MAX_GRADIENT_M)
    cells = block_n * block_m
    warps = 1 if cells <= 16 * 16 else 2 if cells <= 16 * 32 else 4 if cells <= 32 * 32 or hip else 8
    return {
        "BLOCK_N": block_n,
        "BLOCK_M": block_m,
        "BLOCK_D": 16,
        "BLOCK_OUT": min(block_size(d), GRADIENT_WIDTH),
        "num_warps": warps,
        "num_stages": 1,
    }


def cost_vjp(problem: Problem, given: PlanWeights) -> tuple[Tensor, Tensor]:
    """Launch the gradients in x [B, N, D] and y [B, M, D] ([K, M, D] for pairs)."""
    assert problem.y is not None
    count_x, count_y = len(problem.a), len(problem.b)
    shared = launch_arguments(problem)
    f, g, scale = given.f.contiguous(), given.g.contiguous(), given.scale.contiguous()
    left = given.left.contiguous() if given.left is not None else f
    right = given.right.contiguous() if given.right is not None else g
    x_side: dict[str, Any]
    y_side: dict[str, Any]
    if problem.pairs:
        x_side = {"others": count_y, "pair_own": count_y, "pair_other": 1, "other_own": 0}
        y_side = {"others": count_x, "pair_own": 1, "pair_other": count_y, "other_own": 0}
    else:
        x_side = y_side = {"others": 1, "pair_own": 1, "pair_other": 0, "other_own": 1}
    same = {"scale_ptr": scale, "IMPLICIT": given.left is not None}
    x_side = x_side | {"f_ptr": f, "g_ptr": g, "left_ptr": left, "right_ptr": right} | same
    y_side = y_side | {"f_ptr": g, "g_ptr": f, "left_ptr": right, "right_ptr": left} | same
    return _one_side(problem.x, shared | x_side), _one_side(problem.y, exchanged(shared) | y_side)


def _one_side(points: Tensor, arguments: dict[str, Any]) -> Tensor:
    grad = torch.empty(points.shape, dtype=points.dtype, device=points.device)
    count, n, d = points.shape
    if not d:
        return grad
    configuration = _gradient_configuration(n, arguments["M"], d)
    grid = (count, triton.cdiv(n, configuration["BLOCK_N"]), triton.cdiv(d, configuration["BLOCK_OUT"]))
    launch(_sinkhorn_pull_kernel, grid, **arguments, grad_x_ptr=grad, **configuration)
    return grad


# --- what compiles ------------------------------------------------------------------------------------------


def compile_cases(hip: bool) -> Iterator[CompileCase]:
    """Every launch above, as in :func:`ecgot.kernels.ot.triton_onchip.compile_cases`."""
    sides = [2**power for power in range(4, 9)]
    precisions = fp32_precisions(hip)
    for n, m, d in itertools.product(sides, sides, (16, 32, 64)):
        configuration = _gradient_configuration(n, m, d, hip)
        for dtype, cost, used in itertools.product(DTYPES, COSTS, precisions):
            kind = {
                "COST": COST_CODES[cost],
                "CENTRED": cost in CENTRED_COSTS,
                "PRECISION": used,
            }
            for implicit_too in (False, True):
                flags = kind | {"IMPLICIT": implicit_too}
                yield compile_case(_sinkhorn_pull_kernel, dtype, flags, configuration, CONVENTIONS)
