"""Sinkhorn updates for clouds of any size in Triton: costs are formed tile by tile and never stored.

    lse_i = T log sum_j b_j exp((g_j - C_ij / eps) / T)

A program computes BLOCK_N rows, passing over y once with a running maximum and sum; the columns' update is
the same kernel with the roles exchanged. Bytes moved: for each tile of rows, all of y; memory O((N + M) D).
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecgot.kernels.compilation import DTYPES, CompileCase, compile_case
from ecgot.kernels.dispatch import launch
from ecgot.kernels.ot.checks import CENTRED_COSTS, COSTS
from ecgot.kernels.ot.iteration import Softmins
from ecgot.kernels.ot.problem import Problem
from ecgot.kernels.ot.triton_tiles import (
    CONVENTIONS,
    COST_CODES,
    LN_2,
    LOG2_E,
    cost_tile,
    exchanged,
    fp32_precisions,
    launch_arguments,
    load_weights,
    log2,
)

CONFIGURATION = {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_D": 16, "num_warps": 4, "num_stages": 1}


@triton.jit
def _softmin_kernel(
    x_ptr,
    y_ptr,
    a_ptr,
    b_ptr,
    x_centre_ptr,
    y_centre_ptr,
    eps_ptr,
    temperature_ptr,
    g_ptr,
    lse_ptr,
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
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    problem = tl.program_id(0).to(tl.int64)
    x_index = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptr += problem * stride_xb
    y_ptr += problem * stride_yb
    x_centre_ptr += problem * D
    y_centre_ptr += problem * D
    _, x_valid = load_weights(a_ptr + problem * N, x_index, N)
    temperature = tl.load(temperature_ptr + problem)
    per_unit = LOG2_E / (tl.load(eps_ptr + problem) * temperature)
    top = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for m in range(0, M, BLOCK_M):
        y_index = m + tl.arange(0, BLOCK_M)
        b, y_valid = load_weights(b_ptr + problem * M, y_index, M)
        g = tl.load(g_ptr + problem * M + y_index, mask=y_index < M, other=0.0) * (LOG2_E / temperature)
        cost, _, _ = cost_tile(
            x_ptr, y_ptr, x_centre_ptr, y_centre_ptr, x_index, y_index, x_valid, y_valid, D, stride_xn,
            stride_xd, stride_yn, stride_yd, COST, CENTRED, BLOCK_N, BLOCK_M, BLOCK_D, PRECISION,
        )  # fmt: skip
        exponent = (g + log2(b))[None, :] - cost * per_unit
        higher = tl.maximum(top, tl.max(exponent, axis=1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(exponent - shift[:, None]), axis=1)
        top = higher
    lse = (tl.where(top == float("-inf"), 0.0, top) + tl.log2(total)) * (LN_2 * temperature)
    tl.store(lse_ptr + problem * N + x_index, lse, mask=x_index < N)


def softmins(problem: Problem) -> Softmins:
    """The log-sum-exps of both sides, for :func:`ecgot.kernels.ot.iteration.iterate`."""
    shared = launch_arguments(problem)
    swapped = exchanged(shared)
    once = torch.ones_like(problem.eps)

    def update(arguments: dict[str, Any], potential: Tensor, temperature: Tensor | None) -> Tensor:
        batch, n = len(problem.a), arguments["N"]
        lse = torch.empty(batch, n, dtype=torch.float32, device=potential.device)
        if lse.numel():
            heat = once if temperature is None else temperature.contiguous()
            grid = (batch, triton.cdiv(n, CONFIGURATION["BLOCK_N"]))
            launch(
                _softmin_kernel,
                grid,
                **arguments,
                temperature_ptr=heat,
                g_ptr=potential.contiguous(),
                lse_ptr=lse,
                **CONFIGURATION,
            )
        return lse

    return Softmins(
        rows=lambda g, temperature: update(shared, g, temperature),
        columns=lambda f, temperature: update(swapped, f, temperature),
    )


def compile_cases(hip: bool) -> Iterator[CompileCase]:
    """Every launch above, as in :func:`ecgot.kernels.ot.triton_onchip.compile_cases`."""
    for dtype, cost, used in itertools.product(DTYPES, COSTS, fp32_precisions(hip)):
        centred = cost in CENTRED_COSTS
        flags = {"COST": COST_CODES[cost], "CENTRED": centred, "PRECISION": used}
        yield compile_case(_softmin_kernel, dtype, flags, CONFIGURATION, CONVENTIONS)
