"""Sinkhorn updates for clouds of any size in Triton: costs are formed tile by tile and never stored.

    lse_i = T log sum_j b_j exp((g_j - C_ij / eps) / T)

Once per solve each point is centred (and for the cosine normalised) and written as the sum of two fp16
numbers, a high and a low half of 11 bits each, after an exact scaling by a power of two: of each point where
it is a row, of each tile of points where they are columns. Three products of halves are then as exact as
three of TF32, for half the time and bytes. What depends on a column alone, its potential, weight and squared
norm, is one number; what depends on a row alone is added at the end. A cell then costs a product, a
multiply-add, a maximum and an exp2; the Euclidean distance adds a square root.

A half-update is two kernels. In the first a program holds BLOCK_N rows and passes over a part of the columns
with a running maximum and sum; the second merges the parts in their order and updates the potential and, for
rows, the marginal error. The columns' update is the same with the roles exchanged. Where marginals are free
it also leaves the logarithms of the targets' masses, from which the last kernel of an iteration finds how far
f moves up and g down (:class:`ecgot.kernels.ot.iteration.Shift`). Programs of a problem that is done return
at once. Bytes moved: for each tile of rows, the halves of all of y; memory O((N + M) D).
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecgot.kernels.compilation import DTYPES, CompileCase, Conventions, compile_case
from ecgot.kernels.dispatch import launch
from ecgot.kernels.ot.checks import CENTRED_COSTS, COSTS
from ecgot.kernels.ot.iteration import Shift, annealing, run
from ecgot.kernels.ot.problem import Problem, Result, SolverSettings
from ecgot.kernels.ot.triton_tiles import (
    COSINE,
    COST_CODES,
    EPSILON,
    EUCLIDEAN,
    LN_2,
    LOG2_E,
    SQEUCLIDEAN,
    inverse_norm,
    load_chunk,
    load_weights,
    log2,
    row_errors,
)

PROGRAMS = 1024  # of a half-update at least, where there are columns enough: several on every multiprocessor
MIN_TILES = 2  # of columns for a program, which first loads its rows
# Rows of a table [steps, B] are aligned or not: one compilation for both.
_BY_PROBLEM = ["temperature_ptr", "following_ptr"]
MERGE = {"BLOCK_N": 128, "BLOCK_S": 16, "num_warps": 4, "num_stages": 1}  # rows, and parts at a time
SETTLE = {"BLOCK_N": 128, "num_warps": 1, "num_stages": 1}


# --- preparation --------------------------------------------------------------------------------------------


@triton.jit
def _power_of_two(largest):
    """A power of two that brings numbers up to ``largest`` below 2^14, and its inverse; NaN if infinite."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
    usable = tl.minimum(tl.maximum(exponent, 14), 253)
    scale = ((267 - usable) << 23).to(tl.float32, bitcast=True)
    inverse = ((usable - 13) << 23).to(tl.float32, bitcast=True)
    return scale, tl.where(exponent == 255, float("nan"), inverse)


@triton.jit
def _store_halves(ptr, offsets, low_at, scaled, PARTS: tl.constexpr):
    high = scaled.to(tl.float16)
    tl.store(ptr + offsets, high)
    if PARTS == 2:
        tl.store(ptr + low_at + offsets, (scaled - high.to(tl.float32)).to(tl.float16))


@triton.jit
def _column_term(potential, weight, square, per_unit, temperature, COST: tl.constexpr):
    """What a column adds to its exponents of exp2."""
    term = potential * (LOG2_E / temperature) + log2(weight)
    if COST == SQEUCLIDEAN:
        term -= square * per_unit
    return tl.where(weight > 0, term, float("-inf"))  # a point without weight may be anywhere


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=_BY_PROBLEM)
def _softmin_prepare_kernel(
    x_ptr,
    centre_ptr,
    weight_ptr,
    potential_ptr,
    eps_ptr,
    temperature_ptr,
    row_parts_ptr,
    row_scale_ptr,
    column_parts_ptr,
    column_scale_ptr,
    square_ptr,
    column_ptr,
    N,
    D,
    padded,
    width,
    stride_xb,
    stride_xn,
    stride_xd,
    COST: tl.constexpr,
    CENTRED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Halves, scales, squared norms and the first column terms of one side's points, in both of their roles.

    row_parts and column_parts are [B, PARTS, padded, width]; points past N and coordinates past D are 0.
    """
    tiles = padded // BLOCK_M
    problem = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    index = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    weight, valid = load_weights(weight_ptr + problem * N, index, N)
    points_ptr = x_ptr + problem * stride_xb
    centre_ptr += problem * D
    square = tl.zeros((BLOCK_M,), dtype=tl.float32)
    largest = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for k in range(0, width, BLOCK_D):
        points = load_chunk(
            points_ptr, centre_ptr, index, valid, k, D, stride_xn, stride_xd, CENTRED, BLOCK_D
        )
        square += tl.sum(points * points, axis=1)
        largest = tl.maximum(largest, tl.max(tl.abs(points), axis=1))
    inverse = tl.full((BLOCK_M,), 1.0, dtype=tl.float32)
    if COST == COSINE:
        inverse = inverse_norm(square)
        largest = largest * inverse
    row_scale, row_inverse = _power_of_two(largest)
    # Where a point has no weight it is no column, and its coordinates may not spoil those of its tile.
    heaviest = tl.max(tl.where(weight > 0, largest, 0.0), axis=0)
    column_scale, column_inverse = _power_of_two(heaviest)
    at = problem * padded + index
    rows = index.to(tl.int64)[:, None] * width + tl.arange(0, BLOCK_D)[None, :]
    low_at = padded.to(tl.int64) * width
    row_parts_ptr += problem * PARTS * padded * width
    column_parts_ptr += problem * PARTS * padded * width
    for k in range(0, width, BLOCK_D):
        points = load_chunk(
            points_ptr, centre_ptr, index, valid, k, D, stride_xn, stride_xd, CENTRED, BLOCK_D
        )
        points = points * inverse[:, None]
        _store_halves(row_parts_ptr, rows + k, low_at, points * row_scale[:, None], PARTS)
        points = tl.where((weight > 0)[:, None], points * column_scale, 0.0)
        _store_halves(column_parts_ptr, rows + k, low_at, points, PARTS)
    tl.store(row_scale_ptr + at, row_inverse)
    tl.store(column_scale_ptr + problem * tiles + tile, column_inverse)
    tl.store(square_ptr + at, square)
    temperature = tl.load(temperature_ptr + problem)
    per_unit = LOG2_E / (tl.load(eps_ptr + problem) * temperature)
    potential = tl.load(potential_ptr + problem * N + index, mask=index < N, other=0.0)
    tl.store(column_ptr + at, _column_term(potential, weight, square, per_unit, temperature, COST))


# --- updates ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["splits", "tiles"], do_not_specialize_on_alignment=_BY_PROBLEM)
def _softmin_kernel(
    x_parts_ptr,
    y_parts_ptr,
    x_scale_ptr,
    y_scale_ptr,
    x_square_ptr,
    y_square_ptr,
    column_ptr,
    eps_ptr,
    temperature_ptr,
    going_ptr,
    top_ptr,
    total_ptr,
    N,
    M,
    width,
    splits,
    tiles,
    COST: tl.constexpr,
    PARTS: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Maximum and sum of exp2 over ``tiles`` tiles of columns, [B, splits, N]; N and M are padded.

    RESIDENT: one chunk of BLOCK_D holds all coordinates, and a program loads its rows once.
    """
    blocks = N // BLOCK_N
    block = tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks % splits
    problem = (tl.program_id(0) // (blocks * splits)).to(tl.int64)
    if tl.load(going_ptr + problem) == 0:
        return
    if RESIDENT:
        width = BLOCK_D
    chunk = tl.arange(0, BLOCK_D)
    x_offsets = tl.arange(0, BLOCK_N)[:, None] * width + chunk[None, :]
    y_offsets = tl.arange(0, BLOCK_M)[:, None] * width + chunk[None, :]
    x_parts_ptr += (problem * PARTS * N + block * BLOCK_N) * width
    first = split * tiles
    y_parts_ptr += (problem * PARTS * M + first * BLOCK_M) * width
    x_low_at = N.to(tl.int64) * width
    y_low_at = M.to(tl.int64) * width
    if RESIDENT:
        x_high = tl.load(x_parts_ptr + x_offsets)
        if PARTS == 2:
            x_low = tl.load(x_parts_ptr + x_low_at + x_offsets)
    per_unit = LOG2_E / (tl.load(eps_ptr + problem) * tl.load(temperature_ptr + problem))
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    x_rate = tl.load(x_scale_ptr + problem * N + rows)
    if COST == EUCLIDEAN:
        x_rate *= -2.0
        x_square = tl.load(x_square_ptr + problem * N + rows)
    elif COST == SQEUCLIDEAN:
        x_rate *= 2.0 * per_unit
    else:
        x_rate *= per_unit
    top = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for tile in range(first, tl.minimum(first + tiles, M // BLOCK_M)):
        columns = problem * M + tile * BLOCK_M + tl.arange(0, BLOCK_M)
        column = tl.load(column_ptr + columns)  # before the products, so that it has come when they are done
        inner = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        if RESIDENT:
            y_high = tl.load(y_parts_ptr + y_offsets)
            if PARTS == 2:
                y_low = tl.load(y_parts_ptr + y_low_at + y_offsets)
                inner = tl.dot(x_low, tl.trans(y_high), inner)
                inner = tl.dot(x_high, tl.trans(y_low), inner)
            inner = tl.dot(x_high, tl.trans(y_high), inner)
        else:
            for k in range(0, width, BLOCK_D):
                x_high = tl.load(x_parts_ptr + k + x_offsets)
                y_high = tl.load(y_parts_ptr + k + y_offsets)
                if PARTS == 2:
                    x_low = tl.load(x_parts_ptr + x_low_at + k + x_offsets)
                    y_low = tl.load(y_parts_ptr + y_low_at + k + y_offsets)
                    inner = tl.dot(x_low, tl.trans(y_high), inner)
                    inner = tl.dot(x_high, tl.trans(y_low), inner)
                inner = tl.dot(x_high, tl.trans(y_high), inner)
        rate = x_rate * tl.load(y_scale_ptr + problem * (M // BLOCK_M) + tile)
        if COST == EUCLIDEAN:
            y_square = tl.load(y_square_ptr + columns)
            square = inner * rate[:, None] + (x_square[:, None] + y_square[None, :])
            cost = tl.sqrt(tl.maximum(square, 0.0, propagate_nan=tl.PropagateNan.ALL))
            exponent = column[None, :] - cost * per_unit
        else:
            exponent = inner * rate[:, None] + column[None, :]
        higher = tl.maximum(top, tl.max(exponent, axis=1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(exponent - shift[:, None]), axis=1)
        top = higher
        y_parts_ptr += BLOCK_M * width
    at = (problem * splits + split) * N + rows
    tl.store(top_ptr + at, top)
    tl.store(total_ptr + at, total)


@triton.jit
def _log_targets(weight, potential, slack):
    """log2(weight exp(-potential / rho))."""
    return tl.where(weight > 0, log2(weight) - slack * LOG2_E * potential, float("-inf"))


@triton.jit(do_not_specialize=["N", "splits"], do_not_specialize_on_alignment=_BY_PROBLEM)
def _softmin_merge_kernel(
    top_ptr,
    total_ptr,
    weight_ptr,
    square_ptr,
    eps_ptr,
    temperature_ptr,
    following_ptr,
    going_ptr,
    before_ptr,
    potential_ptr,
    column_ptr,
    block_errors_ptr,
    slack_ptr,
    shift_ptr,
    log_mass_ptr,
    mass_ptr,
    N,
    padded,
    splits,
    COST: tl.constexpr,
    FREE: tl.constexpr,
    SHIFTED: tl.constexpr,
    JUDGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The potential [B, N] from the parts [B, splits, padded], and what it adds to the other side's update.

    FREE: also what :func:`_log_mass` reads, [B, blocks, 3].
    SHIFTED: from the other side's potential after its shift.
    JUDGE: also the error of the marginal that the potential ``before`` gave after its shift, [B, blocks].
    """
    blocks = tl.cdiv(padded, BLOCK_N)
    block = tl.program_id(0) % blocks
    problem = (tl.program_id(0) // blocks).to(tl.int64)
    if tl.load(going_ptr + problem) == 0:
        return
    index = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = index < padded
    top = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(0, splits, BLOCK_S):
        part = first + tl.arange(0, BLOCK_S)
        at = (problem * splits + part)[:, None] * padded + index[None, :]
        mask = (part < splits)[:, None] & inside[None, :]
        some = tl.load(top_ptr + at, mask=mask, other=float("-inf"))
        higher = tl.maximum(top, tl.max(some, axis=0))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        sums = tl.load(total_ptr + at, mask=mask, other=0.0)
        total = total * tl.exp2(top - shift) + tl.sum(sums * tl.exp2(some - shift[None, :]), axis=0)
        top = higher
    eps = tl.load(eps_ptr + problem)
    temperature = tl.load(temperature_ptr + problem)
    square = tl.load(square_ptr + problem * padded + index, mask=inside, other=0.0)
    lse = (tl.where(top == float("-inf"), 0.0, top) + tl.log2(total)) * (LN_2 * temperature)
    if COST == SQEUCLIDEAN:
        lse -= square / eps
    elif COST == COSINE:
        lse -= 1.0 / eps
    slack = 0.0
    shift = 0.0
    if FREE:
        slack = tl.load(slack_ptr + problem)
        shift = tl.load(shift_ptr + problem)
    if SHIFTED:
        lse += shift
    potential = -lse / (1.0 + slack * temperature)
    weight, _ = load_weights(weight_ptr + problem * N, index, N)
    own = problem * N + index
    if JUDGE:
        before = tl.load(before_ptr + own, mask=index < N, other=0.0)
        step = (before + shift - potential) * ((1.0 + slack) * LOG2_E)
        if FREE:
            share = _log_targets(weight, before, slack) - tl.load(log_mass_ptr + problem)
            error = row_errors(share, step)
        else:  # points without weight may overflow
            error = tl.where(weight > 0, weight * tl.abs(tl.exp2(step) - 1.0), 0.0)
        tl.store(block_errors_ptr + problem * blocks + block, tl.sum(error, axis=0))
    tl.store(potential_ptr + own, potential, mask=index < N)
    if FREE:
        target = _log_targets(weight, potential, slack)
        top = tl.max(target, axis=0)
        top = tl.where(top == float("-inf"), 0.0, top)
        at = mass_ptr + (problem * blocks + block) * 3
        tl.store(at, top)
        tl.store(at + 1, tl.sum(tl.exp2(target - top), axis=0))
        tl.store(at + 2, tl.max(tl.where(weight > 0, tl.abs(potential), 0.0), axis=0))
    following = tl.load(following_ptr + problem)
    term = _column_term(potential, weight, square, LOG2_E / (eps * following), following, COST)
    tl.store(column_ptr + problem * padded + index, term, mask=inside)


@triton.jit
def _log_mass(mass_ptr, blocks, BLOCK_N: tl.constexpr):
    """log2 of the mass of a side's targets, and its largest potential, from those of its blocks."""
    top = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    size = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(0, blocks, BLOCK_N):
        block = first + tl.arange(0, BLOCK_N)
        inside = block < blocks
        sums = tl.load(mass_ptr + block * 3 + 1, mask=inside, other=0.0)
        some = tl.load(mass_ptr + block * 3, mask=inside, other=0.0)
        some = tl.where(sums == 0, float("-inf"), some)
        higher = tl.maximum(top, some)
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - shift) + sums * tl.exp2(some - shift)
        top = higher
        size = tl.maximum(size, tl.load(mass_ptr + block * 3 + 2, mask=inside, other=0.0))
    most = tl.max(top, axis=0)
    most = tl.where(most == float("-inf"), 0.0, most)
    return most + tl.log2(tl.sum(total * tl.exp2(top - most), axis=0)), tl.max(size, axis=0)


@triton.jit(do_not_specialize=["blocks_x", "blocks_y"])
def _softmin_settle_kernel(
    block_errors_ptr,
    error_ptr,
    iterations_ptr,
    going_ptr,
    slack_x_ptr,
    slack_y_ptr,
    mass_x_ptr,
    mass_y_ptr,
    log_mass_ptr,
    shift_ptr,
    applied_ptr,
    tol,
    blocks_x,
    blocks_y,
    FREE: tl.constexpr,
    JUDGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What a problem's blocks found, put together in their order.

    JUDGE: the marginal error, and whether the problem goes on.
    FREE: the shift of the next update; that of the potential that was judged goes to ``applied``.
    """
    problem = tl.program_id(0).to(tl.int64)
    if tl.load(going_ptr + problem) == 0:
        return
    if JUDGE:
        total = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for first in range(0, blocks_x, BLOCK_N):
            block = first + tl.arange(0, BLOCK_N)
            total += tl.load(block_errors_ptr + problem * blocks_x + block, mask=block < blocks_x, other=0.0)
        error = tl.sum(total, axis=0)
        tl.store(error_ptr + problem, error)
        tl.store(iterations_ptr + problem, tl.load(iterations_ptr + problem) + 1)
        tl.store(going_ptr + problem, (error > tol).to(tl.int32))  # 0 for NaN, which would never converge
    if FREE:
        tl.store(applied_ptr + problem, tl.load(shift_ptr + problem))
        of_x, size_x = _log_mass(mass_x_ptr + problem * blocks_x * 3, blocks_x, BLOCK_N)
        of_y, size_y = _log_mass(mass_y_ptr + problem * blocks_y * 3, blocks_y, BLOCK_N)
        slack = tl.load(slack_x_ptr + problem) + tl.load(slack_y_ptr + problem)
        shift = (of_x - of_y) * LN_2 / tl.where(slack > 0, slack, float("inf"))
        certain = tl.abs(shift) > (size_x + size_y) * EPSILON
        tl.store(log_mass_ptr + problem, of_x)
        tl.store(shift_ptr + problem, tl.where(certain, shift, 0.0))


# --- launches -----------------------------------------------------------------------------------------------

_CONVENTIONS = Conventions(
    in_dtype=frozenset(("x_ptr",)),
    types={"going_ptr": "*i32", "iterations_ptr": "*i32", "tol": "fp32"}
    | {f"{name}_parts_ptr": "*fp16" for name in ("x", "y", "row", "column")},
    words={"COST": tuple(COST_CODES).__getitem__},
)


def configuration(n: int, m: int, d: int, cost: str) -> dict[str, Any]:
    """Tiles and launch options of the kernel that passes over the columns."""
    large = min(n, m) > 512  # a smaller problem would be padding to a good part
    resident = d <= (64 if cost == "euclidean" else 128)  # its distances would spill beside 128 coordinates
    block_d = max(16, triton.next_power_of_2(d)) if resident else 64
    return {
        "RESIDENT": resident,
        "BLOCK_N": 128 if large else 64,
        "BLOCK_M": 128 if large and d <= 64 else 64,
        "BLOCK_D": block_d,
        "num_warps": 8 if large else 4,
        "num_stages": 2,
    }


def _prepare_configuration(chosen: dict[str, Any]) -> dict[str, Any]:
    block_m = chosen["BLOCK_M"]  # which share a scale
    return {"BLOCK_M": block_m, "BLOCK_D": 16, "num_warps": block_m // 8, "num_stages": 1}


def tiles_of_a_program(blocks: int, tiles: int) -> int:
    """How many of the tiles of columns a program takes: by the sizes alone, as results are."""
    return max(MIN_TILES, triton.cdiv(tiles, triton.cdiv(PROGRAMS, blocks)))


def parts(problem: Problem) -> int:
    """Halves of a coordinate that enter products: one, of 11 bits, where it is exact or TF32 is asked for."""
    exact = problem.x.dtype in (torch.float16, torch.bfloat16) and problem.cost == "dot"
    return 1 if exact or problem.precision == "tf32" else 2


@dataclass
class _Side:
    """The points of one side as the kernels read them, and its potential.

    Attributes:
        count, padded: points, and points with those that fill the last block.
        row_parts, column_parts: fp16 [B, parts, padded, width].
        row_scale, column_scale: [B, padded] and [B, tiles], by which products are multiplied.
        square: squared norms [B, padded].
        column: what a point adds to the exponents of the other side's update, [B, padded].
        slack: eps / rho [B].
        mass: of the targets in each block of the merge, see :func:`_log_mass`, [B, blocks, 3].
    """

    count: int
    padded: int
    weight: Tensor
    row_parts: Tensor
    column_parts: Tensor
    row_scale: Tensor
    column_scale: Tensor
    square: Tensor
    column: Tensor
    slack: Tensor
    mass: Tensor


class StreamingUpdates:
    """:class:`ecgot.kernels.ot.iteration.Updates` by the kernels above: five launches an iteration.

    f has two buffers, read and written by turns: the one that holds a problem's last f is written no more
    once the problem is done.
    """

    def __init__(self, problem: Problem, init: Tensor | None, temperature: Tensor, tol: float) -> None:
        assert problem.y is not None
        self._tol, self._cost = tol, COST_CODES[problem.cost]
        self._eps = problem.eps.contiguous()
        self._once = torch.ones_like(self._eps)
        self._configuration = configuration(*problem.size, problem.x.shape[2], problem.cost)
        self._parts = parts(problem)
        solvable = problem.solvable()
        self.going = solvable.int()
        self._f = [torch.zeros_like(problem.a, memory_format=torch.contiguous_format) for _ in range(2)]
        self._g = torch.zeros_like(problem.b, memory_format=torch.contiguous_format)
        if init is not None:
            self._g.copy_(init / problem.eps[:, None])
        slack_x, slack_y = problem.slack()
        self._x = self._prepared(problem.x, problem.a, problem.x_centre, slack_x, self._f[0], temperature)
        self._y = self._prepared(problem.y, problem.b, problem.y_centre, slack_y, self._g, temperature)
        self._free = not problem.balanced
        self._shift, self._applied, self._log_mass = torch.zeros_like(self._eps).repeat(3, 1)
        if self._free:  # of g, from which the first update of f comes
            targets = Shift(problem).log_targets(self._g, 1)
            self._y.mass.zero_()
            self._y.mass[:, 0, 0] = torch.logsumexp(targets, 1) / LN_2.value
            self._y.mass[:, 0, 1] = 1.0
            self._y.mass[:, 0, 2] = torch.where(problem.b > 0, self._g.abs(), 0.0).amax(1)
        blocks = triton.cdiv(self._x.padded, MERGE["BLOCK_N"])
        self._block_errors = self._eps.new_empty(len(self._eps), blocks)
        self._error = torch.where(solvable, torch.inf, 0.0).to(problem.dtype)
        self._iterations = torch.zeros_like(self.going)
        self._taken = 0

    def anneal(self, temperature: Tensor, following: Tensor, hot: Tensor) -> None:
        """See :class:`ecgot.kernels.ot.iteration.Updates`."""
        going = hot.int()
        self._update(self._x, self._y, self._f[0], going, temperature, temperature)
        if self._free:
            self._settle(going, judge=False)
        self._update(self._y, self._x, self._g, going, temperature, following)

    def start(self) -> None:
        """See :class:`ecgot.kernels.ot.iteration.Updates`."""
        self._update(self._x, self._y, self._f[0], self.going, self._once, self._once)
        if self._free:
            self._settle(self.going, judge=False)

    def advance(self) -> None:
        """See :class:`ecgot.kernels.ot.iteration.Updates`."""
        before, after = self._f if self._taken % 2 == 0 else self._f[::-1]
        self._taken += 1
        self._update(self._y, self._x, self._g, self.going, self._once, self._once)
        self._update(self._x, self._y, after, self.going, self._once, self._once, before)
        self._settle(self.going, judge=True)

    def _settle(self, going: Tensor, *, judge: bool) -> None:
        launch(
            _softmin_settle_kernel,
            (len(self._eps),),
            block_errors_ptr=self._block_errors,
            error_ptr=self._error,
            iterations_ptr=self._iterations,
            going_ptr=going,
            slack_x_ptr=self._x.slack,
            slack_y_ptr=self._y.slack,
            mass_x_ptr=self._x.mass,
            mass_y_ptr=self._y.mass,
            log_mass_ptr=self._log_mass,
            shift_ptr=self._shift,
            applied_ptr=self._applied,
            tol=self._tol,
            blocks_x=self._x.mass.shape[1],
            blocks_y=self._y.mass.shape[1],
            FREE=self._free,
            JUDGE=judge,
            **SETTLE,
        )

    def result(self) -> Result:
        """See :class:`ecgot.kernels.ot.iteration.Updates`."""
        first, second = self._f
        f = torch.where((self._iterations % 2 == 1)[:, None], first, second)
        return f + self._applied[:, None] if self._free else f, self._g, self._error, self._iterations

    def _prepared(
        self,
        points: Tensor,
        weight: Tensor,
        centre: Tensor | None,
        slack: Tensor,
        potential: Tensor,
        temperature: Tensor,
    ) -> _Side:
        block_n, block_m = self._configuration["BLOCK_N"], self._configuration["BLOCK_M"]
        batch, count, d = points.shape
        padded = triton.cdiv(count, block_n) * block_n
        block_d = self._configuration["BLOCK_D"]
        width = triton.cdiv(d, block_d) * block_d
        halves, empty = (batch, self._parts, padded, width), self._eps.new_empty
        side = _Side(
            count=count,
            padded=padded,
            weight=weight.contiguous(),
            row_parts=empty(halves, dtype=torch.float16),
            column_parts=empty(halves, dtype=torch.float16),
            row_scale=empty(batch, padded),
            column_scale=empty(batch, padded // block_m),
            square=empty(batch, padded),
            column=empty(batch, padded),
            slack=slack.contiguous(),
            mass=empty(batch, triton.cdiv(padded, MERGE["BLOCK_N"]), 3),
        )
        strides = zip(("stride_xb", "stride_xn", "stride_xd"), points.stride(), strict=True)
        launch(
            _softmin_prepare_kernel,
            (batch * (padded // block_m),),
            x_ptr=points,
            centre_ptr=self._eps if centre is None else centre.contiguous(),
            weight_ptr=side.weight,
            potential_ptr=potential,
            eps_ptr=self._eps,
            temperature_ptr=temperature,
            row_parts_ptr=side.row_parts,
            row_scale_ptr=side.row_scale,
            column_parts_ptr=side.column_parts,
            column_scale_ptr=side.column_scale,
            square_ptr=side.square,
            column_ptr=side.column,
            N=count,
            D=d,
            padded=padded,
            width=width,
            **dict(strides),
            COST=self._cost,
            CENTRED=centre is not None,
            PARTS=self._parts,
            **_prepare_configuration(self._configuration),
        )
        return side

    def _update(
        self,
        rows: _Side,
        columns: _Side,
        potential: Tensor,
        going: Tensor,
        temperature: Tensor,
        following: Tensor,
        before: Tensor | None = None,
    ) -> None:
        """The potential of ``rows`` from that of ``columns``; ``before`` is one whose error is asked for."""
        batch = len(self._eps)
        blocks = rows.padded // self._configuration["BLOCK_N"]
        count = columns.padded // self._configuration["BLOCK_M"]
        tiles = tiles_of_a_program(blocks, count)
        splits = triton.cdiv(count, tiles)
        top, total = self._eps.new_empty(2, batch, splits, rows.padded)
        shared = {
            "top_ptr": top,
            "total_ptr": total,
            "eps_ptr": self._eps,
            "temperature_ptr": temperature,
            "going_ptr": going,
            "splits": splits,
            "COST": self._cost,
        }
        launch(
            _softmin_kernel,
            (batch * splits * blocks,),
            x_parts_ptr=rows.row_parts,
            y_parts_ptr=columns.column_parts,
            x_scale_ptr=rows.row_scale,
            y_scale_ptr=columns.column_scale,
            x_square_ptr=rows.square,
            y_square_ptr=columns.square,
            column_ptr=columns.column,
            N=rows.padded,
            M=columns.padded,
            width=rows.row_parts.shape[3],
            tiles=tiles,
            PARTS=self._parts,
            **shared,
            **self._configuration,
        )
        launch(
            _softmin_merge_kernel,
            (batch * triton.cdiv(rows.padded, MERGE["BLOCK_N"]),),
            weight_ptr=rows.weight,
            square_ptr=rows.square,
            following_ptr=following,
            before_ptr=potential if before is None else before,
            potential_ptr=potential,
            column_ptr=rows.column,
            block_errors_ptr=self._block_errors,
            N=rows.count,
            padded=rows.padded,
            JUDGE=before is not None,
            **self._free_arguments(rows),
            **shared,
            **MERGE,
        )

    def _free_arguments(self, rows: _Side) -> dict[str, Any]:
        """What the merge needs of free marginals."""
        return {
            "slack_ptr": rows.slack,
            "shift_ptr": self._shift,
            "log_mass_ptr": self._log_mass,
            "mass_ptr": rows.mass,
            "FREE": self._free,
            "SHIFTED": self._free and rows is self._y,
        }


def solve(problem: Problem, init: Tensor | None, settings: SolverSettings) -> Result:
    """As :func:`ecgot.kernels.ot.iteration.iterate`."""
    temperatures = annealing(problem, settings)
    updates = StreamingUpdates(problem, init, temperatures[0], settings.tol)
    return run(updates, temperatures, problem, settings)


def compile_cases(hip: bool) -> Iterator[CompileCase]:
    """Every launch above, as in :func:`ecgot.kernels.ot.triton_onchip.compile_cases`."""
    sizes = [(n, n, d) for n in (256, 1024) for d in (16, 32, 64, 128, 256)]
    for size, cost, halves in itertools.product(sizes, COSTS, (1, 2)):
        chosen = configuration(*size, cost)
        flags = {"COST": COST_CODES[cost], "PARTS": halves, "RESIDENT": chosen["RESIDENT"]}
        yield compile_case(_softmin_kernel, "fp16", flags, chosen, _CONVENTIONS)
        del flags["RESIDENT"]
        flags["CENTRED"] = cost in CENTRED_COSTS
        for dtype in DTYPES:
            if halves == 2 or dtype == "fp32" or cost == "dot":
                yield compile_case(
                    _softmin_prepare_kernel, dtype, flags, _prepare_configuration(chosen), _CONVENTIONS
                )
    for cost, judge, free in itertools.product(COSTS, (False, True), (False, True)):
        for shifted in (False, True) if free and not judge else (False,):
            flags = {"COST": COST_CODES[cost], "JUDGE": judge, "FREE": free, "SHIFTED": shifted}
            yield compile_case(_softmin_merge_kernel, "fp32", flags, MERGE, _CONVENTIONS)
    for judge, free in ((True, False), (True, True), (False, True)):
        flags = {"JUDGE": judge, "FREE": free}
        yield compile_case(_softmin_settle_kernel, "fp32", flags, SETTLE, _CONVENTIONS)
