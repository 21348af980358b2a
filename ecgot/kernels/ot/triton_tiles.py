"""What the transport kernels share: cost tiles formed from points, and the arguments of a launch."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecgot.kernels.compilation import Conventions
from ecgot.kernels.dispatch import HIP
from ecgot.kernels.ot.checks import COSTS
from ecgot.kernels.ot.problem import Problem

COST_CODES = {cost: code for code, cost in enumerate((*COSTS, "given"))}
SQEUCLIDEAN = tl.constexpr(0)
EUCLIDEAN = tl.constexpr(1)
COSINE = tl.constexpr(2)
DOT = tl.constexpr(3)
GIVEN = tl.constexpr(4)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MAX_EXPONENT = tl.constexpr(120.0)  # of exp2: a larger one would overflow, and inf * 0 is NaN
TINY = tl.constexpr(2.0**-126)  # the smallest normal number of fp32
EPSILON = tl.constexpr(2.0**-23)
LARGEST = tl.constexpr(3e38)


# --- shared pieces ------------------------------------------------------------------------------------------


@triton.jit
def load_weights(ptr, index, count):
    """Weights, 0 where no point exists; and where one does."""
    weight = tl.load(ptr + index, mask=index < count, other=-1.0)
    return tl.maximum(weight, 0.0), weight >= 0


@triton.jit
def load_chunk(
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
    """Coordinates k to k + BLOCK_D of some points as fp32, centred; 0 past D and where no point exists."""
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
def inverse_norm(square):
    """1 / sqrt(square); 0 for a zero vector, NaN on overflow: better no answer than a wrong one."""
    normal = square >= TINY
    inverse = tl.where(normal, tl.rsqrt(tl.where(normal, square, 1.0)), square * 0.0)
    return tl.where(square == float("inf"), float("nan"), inverse)


@triton.jit
def load_slack(rho_ptr, problem, eps, BALANCED: tl.constexpr):
    """eps / rho, 0 for infinite rho; BALANCED: every rho is known to be infinite, and none is read."""
    return 0.0 if BALANCED else tl.minimum(eps / tl.load(rho_ptr + problem), LARGEST)


@triton.jit
def partnered(potential):
    """What a potential adds to exponents, see :func:`ecgot.kernels.ot.problem.partnered`."""
    return tl.where(potential == float("inf"), float("-inf"), potential)


@triton.jit
def row_errors(share, step):
    """exp2(share) |exp2(step) - 1|, where either may overflow; 0 where ``share`` is -inf."""
    size = tl.abs(step)
    near = size * LN_2 * (1.0 - size * (0.5 * LN_2))  # the difference would be rounding
    part = tl.where(size < 1e-3, near, 1.0 - tl.exp2(-size))
    return tl.where(share == float("-inf"), 0.0, tl.exp2(share + tl.maximum(step, 0.0)) * part)


@triton.jit
def cost_tile(
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
):
    """The cost [BLOCK_N, BLOCK_M], and the squared norms of x [BLOCK_N] and y [BLOCK_M]."""
    x_square = tl.zeros((BLOCK_N,), dtype=tl.float32)
    y_square = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if COST == GIVEN:
        # Contiguous, so that offsets within a problem fit 32 bits: 64-bit pointers alone would spill.
        tile = x_ptr + (x_index * stride_xn)[:, None] + (y_index * stride_xd)[None, :]
        cost = tl.load(tile, mask=x_valid[:, None] & y_valid[None, :], other=0.0).to(tl.float32)
    else:
        inner = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for k in range(0, D, BLOCK_D):
            x = load_chunk(
                x_ptr, x_centre_ptr, x_index, x_valid, k, D, stride_xn, stride_xd, CENTRED, BLOCK_D
            )
            y = load_chunk(
                y_ptr, y_centre_ptr, y_index, y_valid, k, D, stride_yn, stride_yd, CENTRED, BLOCK_D
            )
            inner += tl.dot(x, tl.trans(y), input_precision=PRECISION)
            x_square += tl.sum(x * x, axis=1)
            y_square += tl.sum(y * y, axis=1)
        if COST == COSINE:
            cost = 1.0 - inner * inverse_norm(x_square)[:, None] * inverse_norm(y_square)[None, :]
        elif COST == DOT:
            cost = -inner
        else:
            square = x_square[:, None] + y_square[None, :] - 2.0 * inner
            cost = tl.where(square < 0.0, 0.0, square)  # NaN stays
            if COST == EUCLIDEAN:
                cost = tl.sqrt(cost)
    return cost, x_square, y_square


@triton.jit
def log2(weight):
    """The logarithm, -inf of 0."""
    return tl.where(weight > 0, tl.log2(tl.where(weight > 0, weight, 1.0)), float("-inf"))


# --- launches -----------------------------------------------------------------------------------------------


def block_size(size: int) -> int:
    """The power of two that holds ``size`` points; a matrix product needs at least 16."""
    return max(16, triton.next_power_of_2(size))


def all_registers(hip: bool) -> dict[str, int]:
    """Lets NVIDIA's compiler use all of a thread's registers; left alone it spills some at fewer."""
    return {} if hip else {"maxnreg": 255}


def product_precision(problem: Problem) -> str:
    """Triton's ``input_precision``: three TF32 products for fp32 accuracy on NVIDIA, plain fp32 on AMD.

    One TF32 product is exact for fp16 and bf16 points, unless a centre is subtracted from them first.
    """
    if HIP:
        return "ieee"
    exact = problem.x.dtype in (torch.float16, torch.bfloat16) and problem.cost in ("cosine", "dot")
    return "tf32" if exact or problem.precision == "tf32" else "tf32x3"


def launch_arguments(problem: Problem) -> dict[str, Any]:
    """The arguments that all kernels take; tensors that a kernel does not read are replaced by others."""
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
        "COST": COST_CODES[problem.cost],
        "CENTRED": centred,
        "PRECISION": product_precision(problem),
    } | dict(zip(names, (*x.stride(), *y.stride()), strict=True))


def rho_arguments(problem: Problem) -> dict[str, Tensor]:
    """The penalties as kernels take them; where every problem keeps both marginals they are not read."""
    rhos = {"rho_x_ptr": problem.rho_x, "rho_y_ptr": problem.rho_y}
    if problem.balanced:
        return dict.fromkeys(rhos, problem.eps)
    kept = torch.full_like(problem.eps, torch.inf)
    return {name: kept if rho is None else rho.contiguous() for name, rho in rhos.items()}


def exchanged(shared: dict[str, Any]) -> dict[str, Any]:
    """The same arguments with x and y exchanged."""
    couples = [("x_ptr", "y_ptr"), ("a_ptr", "b_ptr"), ("x_centre_ptr", "y_centre_ptr"), ("N", "M")]
    couples += [(f"stride_x{axis}", f"stride_y{axis}") for axis in "bnd"]
    couples += [("f_ptr", "g_ptr"), ("left_ptr", "right_ptr"), ("grad_x_ptr", "grad_y_ptr")]
    partner = dict(couples) | {right: left for left, right in couples}
    return {name: shared[partner.get(name, name)] for name in shared}


def fp32_precisions(hip: bool) -> tuple[str, ...]:
    """What ``product_precision`` returns for fp32 points."""
    return ("ieee",) if hip else ("tf32x3", "tf32")


CONVENTIONS = Conventions(
    in_dtype=frozenset(("x_ptr", "y_ptr", "grad_x_ptr")),
    types={"iterations_ptr": "*i32", "converged_ptr": "*i1"} | dict.fromkeys(("tol", "scaling"), "fp32"),
    tile=("BLOCK_N", "BLOCK_M"),
    words={"COST": tuple(COST_CODES).__getitem__},
)
