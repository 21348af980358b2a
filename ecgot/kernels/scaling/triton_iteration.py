"""Row and column normalisation of many small matrices in Triton: one launch forward, one backward.

    C = P / column sums,  P' = C / row sums,    iterations times, from P = exp(logits)
    backward, with H the gradient in log P':    H - P' rowsum(H),  then  H - C colsum(H)

The trick: after the first iteration, which is done in the logarithm, every sum lies between 1 / n and n (see
torch_iteration.py). So the others take n multiply-adds an entry and no exponential, and the backward runs
them in reverse: P' times the row sums is C again, C times the column sums P. Only the sums are remembered.

Bytes moved per matrix, of n^2 numbers: forward 2 n^2; backward 3 n^2, and 2 n (iterations - 1) sums are
written to a scratch and read again by the same program.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecgot.kernels.compilation import DTYPES, CompileCase, Conventions, compile_case
from ecgot.kernels.dispatch import HIP, launch

CELLS, MATRICES = 1024, 128  # a program's, at most
LOG2_E = tl.constexpr(1.4426950408889634)
CONVENTIONS = Conventions(
    in_dtype=frozenset(("x_ptr", "grad_ptr", "out_ptr")),
    types={},
    tile=("BLOCK", "SIDE"),
    examples={"MATRICES": 65536, "N": 4, "iterations": 20, **dict.fromkeys(("stride_b", "grad_stride_b"), 16)}
    | dict.fromkeys(("stride_i", "grad_stride_i"), 4)
    | dict.fromkeys(("stride_j", "grad_stride_j"), 1),
)


@triton.jit
def _load(pointer, matrix, row, column, MATRICES, N, stride_b, stride_i, stride_j):
    """Entries [BLOCK, SIDE, SIDE] in fp32; 0 where there is none."""
    offset = matrix.to(tl.int64) * stride_b + row * stride_i + column * stride_j
    return tl.load(pointer + offset, mask=(matrix < MATRICES) & (row < N) & (column < N), other=0.0).to(
        tl.float32
    )


@triton.jit
def _first(logits, inside, outside):
    """exp(logits) after its columns, and then also its rows, were divided by their sums; 0 beyond n."""
    scaled = tl.where(inside, logits, float("-inf")) * LOG2_E
    columns = scaled - tl.where(outside, 0.0, tl.max(scaled, axis=1))[:, None, :]
    columns -= tl.log2(tl.where(outside, 1.0, tl.sum(tl.exp2(columns), axis=1)))[:, None, :]
    plan = tl.exp2(columns - tl.where(outside, 0.0, tl.max(columns, axis=2))[:, :, None])
    plan /= tl.where(outside, 1.0, tl.sum(plan, axis=2))[:, :, None]
    return tl.exp2(columns), plan


@triton.jit
def _doubly_stochastic_fwd_kernel(
    x_ptr,
    out_ptr,
    MATRICES,
    N,
    iterations,
    stride_b,
    stride_i,
    stride_j,
    BLOCK: tl.constexpr,
    SIDE: tl.constexpr,
):
    matrix = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None, None]
    row, column = tl.arange(0, SIDE)[None, :, None], tl.arange(0, SIDE)[None, None, :]
    inside = (row < N) & (column < N)
    logits = _load(x_ptr, matrix, row, column, MATRICES, N, stride_b, stride_i, stride_j)
    outside = tl.arange(0, SIDE)[None, :] >= N  # what does not exist sums to 0, and stays when divided by 1
    _, plan = _first(logits, inside, outside)
    for _ in range(1, iterations):
        # Multiplied by reciprocals: one division a sum, not one an entry.
        plan *= (1.0 / tl.where(outside, 1.0, tl.sum(plan, axis=1)))[:, None, :]
        plan *= (1.0 / tl.where(outside, 1.0, tl.sum(plan, axis=2)))[:, :, None]
    offset = (matrix.to(tl.int64) * N + row) * N + column
    tl.store(out_ptr + offset, plan, mask=(matrix < MATRICES) & inside)


@triton.jit
def _doubly_stochastic_bwd_kernel(
    x_ptr,
    grad_ptr,
    sums_ptr,
    out_ptr,
    MATRICES,
    N,
    iterations,
    stride_b,
    stride_i,
    stride_j,
    grad_stride_b,
    grad_stride_i,
    grad_stride_j,
    BLOCK: tl.constexpr,
    SIDE: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK
    matrix = (first + tl.arange(0, BLOCK))[:, None, None]
    row, column = tl.arange(0, SIDE)[None, :, None], tl.arange(0, SIDE)[None, None, :]
    inside = (row < N) & (column < N)
    logits = _load(x_ptr, matrix, row, column, MATRICES, N, stride_b, stride_i, stride_j)
    outside = tl.arange(0, SIDE)[None, :] >= N
    columns, plan = _first(logits, inside, outside)
    # [programs, 2 (iterations - 1), BLOCK, SIDE]
    kept = tl.arange(0, BLOCK)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    sums_ptr += tl.program_id(0).to(tl.int64) * (iterations - 1) * (2 * BLOCK * SIDE)
    for step in range(1, iterations):
        at = sums_ptr + (step - 1) * (2 * BLOCK * SIDE) + kept
        sums = tl.where(outside, 1.0, tl.sum(plan, axis=1))
        plan *= (1.0 / sums)[:, None, :]
        tl.store(at, sums)
        sums = tl.where(outside, 1.0, tl.sum(plan, axis=2))
        plan *= (1.0 / sums)[:, :, None]
        tl.store(at + BLOCK * SIDE, sums)
    tl.debug_barrier()  # other threads may read what one has written
    slope = plan * _load(
        grad_ptr, matrix, row, column, MATRICES, N, grad_stride_b, grad_stride_i, grad_stride_j
    )
    for back in range(1, iterations):
        at = sums_ptr + (iterations - 1 - back) * (2 * BLOCK * SIDE) + kept
        slope -= plan * tl.sum(slope, axis=2)[:, :, None]
        plan *= tl.load(at + BLOCK * SIDE)[:, :, None]
        slope -= plan * tl.sum(slope, axis=1)[:, None, :]
        plan *= tl.load(at)[:, None, :]
    slope -= plan * tl.sum(slope, axis=2)[:, :, None]
    slope -= columns * tl.sum(slope, axis=1)[:, None, :]
    offset = (matrix.to(tl.int64) * N + row) * N + column
    tl.store(out_ptr + offset, slope, mask=(matrix < MATRICES) & inside)


def _configuration(n: int, hip: bool = HIP) -> dict[str, Any]:
    """How many matrices a program has, the side of their tiles, and its warps; AMD's are twice as wide."""
    side = max(2, triton.next_power_of_2(n))
    block = min(MATRICES, CELLS // side**2)
    return {"BLOCK": block, "SIDE": side, "num_warps": 2 if hip else 4, "num_stages": 1}


def forward(logits: Tensor, iterations: int) -> Tensor:
    """Launch :func:`ecgot.kernels.scaling.torch_iteration.forward`, up to 16 x 16."""
    matrices, n = logits.shape[:2]
    out = logits.new_empty(logits.shape)
    tile = _configuration(n)
    launch(
        _doubly_stochastic_fwd_kernel,
        (triton.cdiv(matrices, tile["BLOCK"]),),
        x_ptr=logits,
        out_ptr=out,
        MATRICES=matrices,
        N=n,
        iterations=iterations,
        **dict(zip(("stride_b", "stride_i", "stride_j"), logits.stride(), strict=True)),
        **tile,
    )
    return out


def backward(logits: Tensor, grad: Tensor, iterations: int) -> Tensor:
    """Launch :func:`ecgot.kernels.scaling.torch_iteration.backward`, up to 16 x 16."""
    matrices, n = logits.shape[:2]
    out = logits.new_empty(logits.shape)
    tile = _configuration(n)
    programs = triton.cdiv(matrices, tile["BLOCK"])
    sums = logits.new_empty(programs, 2 * (iterations - 1), tile["BLOCK"], tile["SIDE"], dtype=torch.float32)
    strides = ("stride_b", "stride_i", "stride_j")
    launch(
        _doubly_stochastic_bwd_kernel,
        (programs,),
        x_ptr=logits,
        grad_ptr=grad,
        sums_ptr=sums,
        out_ptr=out,
        MATRICES=matrices,
        N=n,
        iterations=iterations,
        **dict(zip(strides, logits.stride(), strict=True)),
        **{f"grad_{name}": value for name, value in zip(strides, grad.stride(), strict=True)},
        **tile,
    )
    return out


# --- what compiles ------------------------------------------------------------------------------------------


def compile_cases(hip: bool) -> Iterator[CompileCase]:
    """Every launch above: all dtypes and sides of tiles."""
    kernels = (_doubly_stochastic_fwd_kernel, _doubly_stochastic_bwd_kernel)
    for kernel, dtype, side in itertools.product(kernels, DTYPES, (2, 4, 8, 16)):
        yield compile_case(kernel, dtype, {}, _configuration(side, hip), CONVENTIONS)
