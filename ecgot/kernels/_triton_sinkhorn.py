"""Batched log-domain Sinkhorn: one program solves one whole problem in one launch.

    f_i <- -eps log sum_j b_j exp((g_j - C_ij) / eps)
    g_j <- -eps log sum_i a_i exp((f_i - C_ij) / eps)

until the plan P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps) has the row marginals a within tol (its column
marginals are exact after each g update).

The trick: the cost tile C [N, M] is built from x and y with matrix products and then stays in registers
for all iterations; nothing returns to memory until the potentials do. Everything is kept in units of
eps / log2(e), so that the loop uses exp2 and log2, one instruction each. The next f update gives the marginal
error for free: row i of P sums to a_i exp2(f_i - f_i'), with f' the updated f.

Bytes moved per problem: forward (N + M) D reads, N + M + 3 writes; backward, for each tile of 64 or fewer
points of one side, that tile and the whole other side, twice, and the tile's gradient. No problem looks at
another, so a result never depends on its batch mates.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Problems whose tile is at most this, and no side of it longer than MAX_BLOCK, stay in registers.
MAX_TILE = 128 * 128
MAX_BLOCK = 256
MAX_BWD_TILE = 64 * 64
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _load_points(mask_ptr, count, BLOCK: tl.constexpr, HAS_MASK: tl.constexpr):  # -> indices, validity
    index = tl.arange(0, BLOCK)
    valid = index < count
    if HAS_MASK:
        valid = valid & (tl.load(mask_ptr + index, mask=valid, other=0) != 0)
    return index, valid


@triton.jit
def _load_weights(weight_ptr, index, valid, HAS_WEIGHT: tl.constexpr):
    if HAS_WEIGHT:
        return tl.load(weight_ptr + index, mask=valid, other=0.0).to(tl.float32)
    total = tl.sum(valid.to(tl.float32), axis=0)
    return valid.to(tl.float32) / tl.maximum(total, 1.0)


@triton.jit
def _load_chunk(points_ptr, index, valid, k, D, stride_n, stride_d, BLOCK_D: tl.constexpr):
    column = k + tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (column < D)[None, :]
    rows = points_ptr + index.to(tl.int64) * stride_n  # offsets may pass 2^31
    tile = rows[:, None] + (column.to(tl.int64) * stride_d)[None, :]
    return tl.load(tile, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_centred_chunk(
    points_ptr, centre_ptr, index, valid, k, D, stride_n, stride_d, BLOCK_D: tl.constexpr
):
    points = _load_chunk(points_ptr, index, valid, k, D, stride_n, stride_d, BLOCK_D)
    column = k + tl.arange(0, BLOCK_D)
    centre = tl.load(centre_ptr + column, mask=column < D, other=0.0)
    return tl.where(valid[:, None], points - centre[None, :], 0.0)


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
    COSINE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # -> cost [BLOCK_N, BLOCK_M], squared norms of x and y
    inner = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    x_square = tl.zeros((BLOCK_N,), dtype=tl.float32)
    y_square = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for k in range(0, D, BLOCK_D):
        if COSINE:
            x = _load_chunk(x_ptr, x_index, x_valid, k, D, stride_xn, stride_xd, BLOCK_D)
            y = _load_chunk(y_ptr, y_index, y_valid, k, D, stride_yn, stride_yd, BLOCK_D)
        else:
            x = _load_centred_chunk(
                x_ptr, x_centre_ptr, x_index, x_valid, k, D, stride_xn, stride_xd, BLOCK_D
            )
            y = _load_centred_chunk(
                y_ptr, y_centre_ptr, y_index, y_valid, k, D, stride_yn, stride_yd, BLOCK_D
            )
        inner += tl.dot(x, tl.trans(y), input_precision=PRECISION)
        x_square += tl.sum(x * x, axis=1)
        y_square += tl.sum(y * y, axis=1)
    if COSINE:
        cost = 1.0 - inner * _inverse_norm(x_square)[:, None] * _inverse_norm(y_square)[None, :]
    else:
        cost = tl.maximum(x_square[:, None] + y_square[None, :] - 2.0 * inner, 0.0)
    return cost, x_square, y_square


@triton.jit
def _log2(weight):
    return tl.where(weight > 0, tl.log2(tl.where(weight > 0, weight, 1.0)), float("-inf"))


@triton.jit
def _softmin(exponent, AXIS: tl.constexpr):
    """-log2 sum exp2(exponent) along AXIS; rows of nothing but -inf give +inf without a NaN."""
    top = tl.max(exponent, axis=AXIS)
    top = tl.where(top == float("-inf"), 0.0, top)
    return -(top + tl.log2(tl.sum(tl.exp2(exponent - tl.expand_dims(top, AXIS)), axis=AXIS)))


@triton.jit
def _sinkhorn_fwd_kernel(
    x_ptr,
    y_ptr,
    a_ptr,
    b_ptr,
    x_mask_ptr,
    y_mask_ptr,
    x_centre_ptr,
    y_centre_ptr,
    value_ptr,
    f_ptr,
    g_ptr,
    error_ptr,
    iterations_ptr,
    N,
    M,
    D,
    eps,
    tol,
    max_iter,
    stride_xb,
    stride_xn,
    stride_xd,
    stride_yb,
    stride_yn,
    stride_yd,
    HAS_A: tl.constexpr,
    HAS_B: tl.constexpr,
    HAS_X_MASK: tl.constexpr,
    HAS_Y_MASK: tl.constexpr,
    COSINE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    row = problem * N
    column = problem * M
    x_index, x_valid = _load_points(x_mask_ptr + row, N, BLOCK_N, HAS_X_MASK)
    y_index, y_valid = _load_points(y_mask_ptr + column, M, BLOCK_M, HAS_Y_MASK)
    a = _load_weights(a_ptr + row, x_index, x_valid, HAS_A)
    b = _load_weights(b_ptr + column, y_index, y_valid, HAS_B)
    cost, _, _ = _cost_tile(
        x_ptr + problem * stride_xb,
        y_ptr + problem * stride_yb,
        x_centre_ptr + problem * D,
        y_centre_ptr + problem * D,
        x_index,
        y_index,
        x_valid,
        y_valid,
        D,
        stride_xn,
        stride_xd,
        stride_yn,
        stride_yd,
        COSINE,
        BLOCK_N,
        BLOCK_M,
        BLOCK_D,
        PRECISION,
    )
    cost = cost * (LOG2_E / eps)
    log2_a = _log2(a)
    log2_b = _log2(b)

    f_next = _softmin(log2_b[None, :] - cost, 1)
    f = f_next
    g = tl.zeros((BLOCK_M,), dtype=tl.float32)
    # A problem without points on one side has no plan: no iteration, every output 0.
    solvable = (tl.sum(a, axis=0) > 0) & (tl.sum(b, axis=0) > 0)
    error = tl.where(solvable, float("inf"), 0.0)
    iteration = 0
    while (iteration < max_iter) & (error > tol):
        f = f_next
        g = _softmin((f + log2_a)[:, None] - cost, 0)
        f_next = _softmin((g + log2_b)[None, :] - cost, 1)
        # Points without weight may overflow here; they carry no mass, so they carry no error.
        residual = tl.where(a > 0, tl.exp2(f - f_next) - 1.0, 0.0)
        error = tl.sum(a * tl.abs(residual), axis=0)
        iteration += 1

    unit = eps * LN_2
    f = tl.where(solvable, tl.where(x_valid, f * unit, 0.0), 0.0)
    g = tl.where(solvable, tl.where(y_valid, g * unit, 0.0), 0.0)
    tl.store(value_ptr + problem, tl.sum(a * f, axis=0) + tl.sum(b * g, axis=0))
    tl.store(f_ptr + row + x_index, f, mask=x_index < N)
    tl.store(g_ptr + column + y_index, g, mask=y_index < M)
    tl.store(error_ptr + problem, error)
    tl.store(iterations_ptr + problem, iteration)


@triton.jit
def _sinkhorn_bwd_kernel(
    grad_ptr,
    x_ptr,
    y_ptr,
    x_centre_ptr,
    y_centre_ptr,
    f_ptr,
    g_ptr,
    grad_x_ptr,
    N,
    M,
    D,
    eps,
    stride_xb,
    stride_xn,
    stride_xd,
    stride_yb,
    stride_yn,
    stride_yd,
    COSINE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Envelope gradient in BLOCK_N points of x: d value / d C = P, and C is a smooth function of x and y.

    f and g hold potential / eps + log(weight): -inf where a point has no weight, is masked or lies beyond
    the end, so that P = exp(f + g - C / eps) is 0 there without a look at masks and weights. P is symmetric
    in its two sides, so the same kernel with the roles exchanged gives the gradient in y.
    """
    problem = tl.program_id(0).to(tl.int64)
    x_index = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    y_index = tl.arange(0, BLOCK_M)
    x_ptr += problem * stride_xb
    y_ptr += problem * stride_yb
    x_centre_ptr += problem * D
    y_centre_ptr += problem * D
    f = tl.load(f_ptr + problem * N + x_index, mask=x_index < N, other=float("-inf")) * LOG2_E
    g = tl.load(g_ptr + problem * M + y_index, mask=y_index < M, other=float("-inf")) * LOG2_E
    x_valid = f != float("-inf")  # NaN counts, so that NaN points give NaN and not silently 0
    y_valid = g != float("-inf")
    cost, x_square, y_square = _cost_tile(
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
        COSINE,
        BLOCK_N,
        BLOCK_M,
        BLOCK_D,
        PRECISION,
    )
    plan = tl.exp2(f[:, None] + g[None, :] - cost * (LOG2_E / eps)) * tl.load(grad_ptr + problem)
    x_scale = _inverse_norm(x_square)
    y_scale = _inverse_norm(y_square)
    # Cosine: d(1 - x^ y^) / dx = (x^ (x^ y^) - y^) / |x|.
    own = tl.sum(plan * (1.0 - cost), axis=1) if COSINE else tl.sum(plan, axis=1)

    for k in range(0, D, BLOCK_D):
        if COSINE:
            x = _load_chunk(x_ptr, x_index, x_valid, k, D, stride_xn, stride_xd, BLOCK_D) * x_scale[:, None]
            y = _load_chunk(y_ptr, y_index, y_valid, k, D, stride_yn, stride_yd, BLOCK_D) * y_scale[:, None]
        else:
            x = _load_centred_chunk(
                x_ptr, x_centre_ptr, x_index, x_valid, k, D, stride_xn, stride_xd, BLOCK_D
            )
            y = _load_centred_chunk(
                y_ptr, y_centre_ptr, y_index, y_valid, k, D, stride_yn, stride_yd, BLOCK_D
            )
        grad_x = own[:, None] * x - tl.dot(plan, y, input_precision=PRECISION)
        grad_x = grad_x * x_scale[:, None] if COSINE else grad_x * 2.0
        d = k + tl.arange(0, BLOCK_D)
        tile = grad_x_ptr + (problem * N + x_index)[:, None] * D + d[None, :]
        mask = (x_index < N)[:, None] & (d < D)[None, :]
        tl.store(tile, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))  # a matrix product wants at least 16


def fits(n: int, m: int) -> bool:
    """Whether an n x m problem can stay on chip."""
    return max(_block(n), _block(m)) <= MAX_BLOCK and _block(n) * _block(m) <= MAX_TILE


def _fwd_configuration(n: int, m: int) -> dict[str, Any]:
    """Blocks, warps and precision of the solver of an n x m problem."""
    return _configuration(_block(n), _block(m))


def _bwd_configuration(n: int, m: int) -> dict[str, Any]:
    """The same for the gradient in the n points: its products want a smaller tile than the solver's loop."""
    return _configuration(min(_block(n), max(16, MAX_BWD_TILE // _block(m))), _block(m))


def _configuration(block_n: int, block_m: int) -> dict[str, Any]:
    return {
        "BLOCK_N": block_n,
        "BLOCK_M": block_m,
        # 16 columns of x and y at a time: with 32 the products' operands push the tile out of the registers.
        "BLOCK_D": 16,
        # Three TF32 products give fp32's accuracy on NVIDIA's tensor cores; AMD's multiply fp32 as it is.
        "PRECISION": "ieee" if torch.version.hip else "tf32x3",
        "num_warps": 8 if block_n * block_m > 32 * 32 else 4,
        "num_stages": 1,
    }


def _weights_and_masks(
    x: Tensor, a: Tensor | None, b: Tensor | None, x_mask: Tensor | None, y_mask: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, bool]]:
    """Contiguous kernel arguments; x stands in for a pointer that the kernel will not read."""
    pointers = {
        "a_ptr": x if a is None else a.contiguous(),
        "b_ptr": x if b is None else b.contiguous(),
        "x_mask_ptr": x if x_mask is None else x_mask.contiguous().view(torch.uint8),
        "y_mask_ptr": x if y_mask is None else y_mask.contiguous().view(torch.uint8),
    }
    flags = {
        "HAS_A": a is not None,
        "HAS_B": b is not None,
        "HAS_X_MASK": x_mask is not None,
        "HAS_Y_MASK": y_mask is not None,
    }
    return pointers, flags


def _sinkhorn_fwd(
    x: Tensor,
    y: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    x_centre: Tensor | None,
    y_centre: Tensor | None,
    eps: float,
    cost: str,
    max_iter: int,
    tol: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the solver; returns value [B], f [B, N], g [B, M], marginal_error [B], iterations [B]."""
    batch, n, d = x.shape
    m = y.shape[1]
    f = torch.empty(batch, n, dtype=torch.float32, device=x.device)
    g = torch.empty(batch, m, dtype=torch.float32, device=x.device)
    value = torch.empty(batch, dtype=torch.float32, device=x.device)
    error = torch.empty(batch, dtype=torch.float32, device=x.device)
    iterations = torch.empty(batch, dtype=torch.int32, device=x.device)
    if batch:
        pointers, flags = _weights_and_masks(x, a, b, x_mask, y_mask)
        _sinkhorn_fwd_kernel[(batch,)](
            x,
            y,
            x_centre_ptr=f if x_centre is None else x_centre,  # f and g stand in for what is not read
            y_centre_ptr=g if y_centre is None else y_centre,
            value_ptr=value,
            f_ptr=f,
            g_ptr=g,
            error_ptr=error,
            iterations_ptr=iterations,
            N=n,
            M=m,
            D=d,
            eps=eps,
            tol=tol,
            max_iter=max_iter,
            **_strides(x, y),
            **pointers,
            **flags,
            COSINE=cost == "cosine",
            **_fwd_configuration(n, m),
        )
    return value, f, g, error, iterations


def _sinkhorn_bwd(
    grad_value: Tensor,
    x: Tensor,
    y: Tensor,
    x_centre: Tensor | None,
    y_centre: Tensor | None,
    f: Tensor,
    g: Tensor,
    eps: float,
    cost: str,
) -> tuple[Tensor, Tensor]:
    """Launch the envelope gradient; returns grad_x [B, N, D] and grad_y [B, M, D], contiguous.

    f [B, N] and g [B, M] are potential / eps + log(weight).
    """
    grad_value, f, g = grad_value.contiguous(), f.contiguous(), g.contiguous()
    return (
        _one_side(grad_value, x, y, x_centre, y_centre, f, g, eps, cost),
        _one_side(grad_value, y, x, y_centre, x_centre, g, f, eps, cost),
    )


def _one_side(
    grad_value: Tensor,
    x: Tensor,
    y: Tensor,
    x_centre: Tensor | None,
    y_centre: Tensor | None,
    f: Tensor,
    g: Tensor,
    eps: float,
    cost: str,
) -> Tensor:
    batch, n, d = x.shape
    m = y.shape[1]
    grad_x = torch.empty(batch, n, d, dtype=x.dtype, device=x.device)
    if not (batch and n and m):
        return grad_x.zero_()
    configuration = _bwd_configuration(n, m)
    _sinkhorn_bwd_kernel[(batch, triton.cdiv(n, configuration["BLOCK_N"]))](
        grad_value,
        x,
        y,
        x_centre_ptr=f if x_centre is None else x_centre,
        y_centre_ptr=g if y_centre is None else y_centre,
        f_ptr=f,
        g_ptr=g,
        grad_x_ptr=grad_x,
        N=n,
        M=m,
        D=d,
        eps=eps,
        **_strides(x, y),
        COSINE=cost == "cosine",
        **configuration,
    )
    return grad_x


def _strides(x: Tensor, y: Tensor) -> dict[str, int]:
    names = ("stride_xb", "stride_xn", "stride_xd", "stride_yb", "stride_yn", "stride_yd")
    return dict(zip(names, (*x.stride(), *y.stride()), strict=True))


def compile_cases(
    precision: str,
) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]]:
    """(name, kernel, signature, constexprs, options) of every launch above; some come twice.

    precision: of the fp32 products, in place of the one for the GPUs that torch is built for.
    """
    sides = [2**power for power in range(4, 13)]  # a configuration knows no other sizes
    for n, m in itertools.product(sides, sides):
        if not fits(n, m):
            continue
        for dtype, cosine in itertools.product(("fp32", "fp16", "bf16"), (False, True)):
            yield _compile_case(
                _sinkhorn_bwd_kernel, dtype, {"COSINE": cosine}, _bwd_configuration(n, m), precision
            )
            for given in itertools.product((False, True), repeat=4):
                flags = dict(zip(("HAS_A", "HAS_B", "HAS_X_MASK", "HAS_Y_MASK"), given, strict=True))
                flags["COSINE"] = cosine
                yield _compile_case(_sinkhorn_fwd_kernel, dtype, flags, _fwd_configuration(n, m), precision)


def _compile_case(
    kernel: Any, dtype: str, flags: dict[str, bool], configuration: dict[str, Any], precision: str
) -> tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]:
    options = {name: configuration.pop(name) for name in ("num_warps", "num_stages")}
    constants = flags | configuration | {"PRECISION": precision}
    # Of the launchers' tensors, those below are not fp32; and x stands in for what is not given.
    types = {"x_mask_ptr": "*u8", "y_mask_ptr": "*u8", "iterations_ptr": "*i32", "eps": "fp32", "tol": "fp32"}
    types |= dict.fromkeys(("x_ptr", "y_ptr", "grad_x_ptr"), f"*{dtype}")
    types |= {
        f"{flag.removeprefix('HAS_').lower()}_ptr": f"*{dtype}" for flag, given in flags.items() if not given
    }
    types |= dict.fromkeys(constants, "constexpr")
    signature = {
        name: types.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in kernel.arg_names
    }
    given = " ".join(flag.removeprefix("HAS_").lower() for flag, value in flags.items() if value)
    name = f"{configuration['BLOCK_N']}x{configuration['BLOCK_M']} {dtype} {given}".rstrip()
    return name, kernel, signature, constants, options
