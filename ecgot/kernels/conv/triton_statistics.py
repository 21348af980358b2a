"""What lies between the convolutions of a network in training, in Triton: statistics and sums over tiles.

    mean, var from each tile's n, mean and M2;   rstd = 1 / sqrt(var + eps),   scale = gamma * rstd
    c0 = -scale * sum(g) / n,   c1 = -scale * rstd^2 * sum(g (y - mean)) / n

The trick: one launch does all that a norm needs, its running statistics included, as the vectors are so short
that a launch costs more than the work. Statistics are merged by the rule of Chan, Golub and LeVeque (1983,
"Algorithms for Computing the Sample Variance"): tile after tile in as many lanes as a program has rows, then
the lanes. Everything is added in a fixed order, without atomics: the same input gives the same bits.

Bytes moved: the tiles' numbers once; a weight's partial gradients and its gradient once.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecgot.kernels.compilation import DTYPES, CompileCase, compile_case
from ecgot.kernels.conv.operands import VECTORS, BatchNorm, LazyActivation
from ecgot.kernels.conv.triton_tiles import CONVENTIONS, Configuration, unreadable
from ecgot.kernels.dispatch import launch

# 8 channels of a row are 32 bytes, the least that memory delivers; the other threads share the tiles.
MERGE = {"BLOCK_M": 128, "BLOCK_O": 8, "num_warps": 4, "num_stages": 1}
MANY_PARTS = 16  # of a weight's gradient, from which lanes share them


class TileStatistics(NamedTuple):
    """Of each tile of samples: n, how many count [tiles], and their mean and M2 [tiles, C]."""

    n: Tensor
    mean: Tensor
    m2: Tensor


@triton.jit
def _merge_statistics_kernel(
    count_ptr,
    mean_ptr,
    m2_ptr,
    gamma_ptr,
    beta_ptr,
    running_mean_ptr,
    running_var_ptr,
    batches_ptr,
    vectors_ptr,  # [5, C] of a norm: mean, scale, shift, rstd, 1 / n; else [2, C]: mean, biased variance
    TILES,
    C,
    eps,
    momentum,
    NORM: tl.constexpr,
    RUNNING: tl.constexpr,
    BATCHES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_valid = o < C
    n = tl.zeros((BLOCK_M,), dtype=tl.float32)
    mean = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    m2 = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    for start in range(0, TILES, BLOCK_M):
        tile = start + tl.arange(0, BLOCK_M)
        offset = tile.to(tl.int64)[:, None] * C + o[None, :]
        valid = (tile < TILES)[:, None] & o_valid[None, :]
        count = tl.load(count_ptr + tile, tile < TILES, 0.0)
        share = count / tl.maximum(n + count, 1.0)
        delta = tl.load(mean_ptr + offset, valid, 0.0) - mean
        mean += delta * share[:, None]
        m2 += tl.load(m2_ptr + offset, valid, 0.0) + delta * delta * (n * share)[:, None]
        n += count
    total = tl.maximum(tl.sum(n, axis=0), 1.0)
    merged = tl.sum(n[:, None] * mean, axis=0) / total
    deviation = mean - merged[None, :]
    var = tl.sum(m2 + n[:, None] * deviation * deviation, axis=0) / total
    tl.store(vectors_ptr + o, merged, o_valid)
    if not NORM:
        tl.store(vectors_ptr + C + o, var, o_valid)
    else:
        rstd = 1.0 / tl.sqrt(var + eps)
        tl.store(vectors_ptr + C + o, tl.load(gamma_ptr + o, o_valid, 0.0).to(tl.float32) * rstd, o_valid)
        tl.store(vectors_ptr + 2 * C + o, tl.load(beta_ptr + o, o_valid, 0.0).to(tl.float32), o_valid)
        tl.store(vectors_ptr + 3 * C + o, rstd, o_valid)
        tl.store(vectors_ptr + 4 * C + o, tl.zeros((BLOCK_O,), dtype=tl.float32) + 1.0 / total, o_valid)
    if RUNNING:
        unbiased = var * (total / tl.maximum(total - 1.0, 1.0))
        old_mean = tl.load(running_mean_ptr + o, o_valid, 0.0)
        old_var = tl.load(running_var_ptr + o, o_valid, 0.0)
        tl.store(running_mean_ptr + o, old_mean + momentum * (merged - old_mean), o_valid)
        tl.store(running_var_ptr + o, old_var + momentum * (unbiased - old_var), o_valid)
    if BATCHES:
        first = tl.program_id(0) == 0
        tl.store(batches_ptr, tl.load(batches_ptr, first, 0) + 1, first)


@triton.jit
def _merge_sums_kernel(
    sums_ptr,  # [TILES, C], of the gradient g in what the norm makes
    products_ptr,  # the same of g (y - mean)
    vectors_ptr,  # [5, C], as above
    merged_ptr,  # of a norm [5, C]: c0, c1, gradients in gamma and beta, 0; else [2, C]: both sums
    TILES,
    C,
    NORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_valid = o < C
    sums = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    products = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    for start in range(0, TILES, BLOCK_M):
        tile = start + tl.arange(0, BLOCK_M)
        offset = tile.to(tl.int64)[:, None] * C + o[None, :]
        valid = (tile < TILES)[:, None] & o_valid[None, :]
        sums += tl.load(sums_ptr + offset, valid, 0.0)
        products += tl.load(products_ptr + offset, valid, 0.0)
    shift = tl.sum(sums, axis=0)
    scale = tl.sum(products, axis=0)
    if NORM:
        rstd = tl.load(vectors_ptr + 3 * C + o, o_valid, 0.0)
        share = -tl.load(vectors_ptr + C + o, o_valid, 0.0) * tl.load(vectors_ptr + 4 * C + o, o_valid, 0.0)
        tl.store(merged_ptr + o, share * shift, o_valid)
        tl.store(merged_ptr + C + o, share * (rstd * rstd) * scale, o_valid)
        tl.store(merged_ptr + 2 * C + o, scale * rstd, o_valid)
        tl.store(merged_ptr + 3 * C + o, shift, o_valid)
        tl.store(merged_ptr + 4 * C + o, tl.zeros((BLOCK_O,), dtype=tl.float32), o_valid)
    else:
        tl.store(merged_ptr + o, shift, o_valid)
        tl.store(merged_ptr + C + o, scale, o_valid)


@triton.jit
def _sum_parts_kernel(
    partial_ptr,  # [parts, K, C_IN, C_OUT]
    grad_ptr,  # [C_OUT, C_IN, K], strided
    PARTS,
    C_IN,
    C_OUT,
    K,
    stride_wo,
    stride_wc,
    stride_wk,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    size = K * C_IN * C_OUT
    at = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    at_valid = at < size
    sums = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    for start in range(0, PARTS, BLOCK_M):
        part = start + tl.arange(0, BLOCK_M)
        valid = (part < PARTS)[:, None] & at_valid[None, :]
        sums += tl.load(partial_ptr + part.to(tl.int64)[:, None] * size + at[None, :], valid, 0.0)
    row = at // C_OUT
    to = (at % C_OUT) * stride_wo + (row % C_IN) * stride_wc + (row // C_IN) * stride_wk
    tl.store(grad_ptr + to, tl.sum(sums, axis=0).to(grad_ptr.dtype.element_ty), at_valid)


# --- launches -----------------------------------------------------------------------------------------------


def moments(tiles: TileStatistics) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C]; zeros where nothing counts."""
    mean, var = _merged(tiles, None)
    return mean, var.clone()  # no operator may return two views of one tensor


def normalise(tiles: TileStatistics, norm: BatchNorm) -> Tensor:
    """[5, C], see ``VECTORS``; moves the norm's running statistics and counts the batch, in training."""
    return _merged(tiles, norm)


def _merged(tiles: TileStatistics, norm: BatchNorm | None) -> Tensor:
    count, channels = tiles.mean.shape
    vectors = tiles.mean.new_empty(2 if norm is None else VECTORS, channels)
    updated: list[tuple[Tensor, Tensor]] = []  # what torch holds, and what the kernel takes for it
    gamma = beta = running_mean = running_var = batches = vectors
    running = counted = False
    if norm is not None:
        gamma, beta = norm.gamma.contiguous(), norm.beta.contiguous()
        if norm.training and norm.running_mean is not None and norm.running_var is not None:
            running = True
            updated = [(held, _plain(held)) for held in (norm.running_mean, norm.running_var)]
            running_mean, running_var = (taken for _, taken in updated)
        if norm.training and norm.batches is not None:
            counted, batches = True, norm.batches
    launch(
        _merge_statistics_kernel,
        (triton.cdiv(channels, MERGE["BLOCK_O"]),),
        count_ptr=tiles.n,
        mean_ptr=tiles.mean,
        m2_ptr=tiles.m2,
        gamma_ptr=gamma,
        beta_ptr=beta,
        running_mean_ptr=running_mean,
        running_var_ptr=running_var,
        batches_ptr=batches,
        vectors_ptr=vectors,
        TILES=count,
        C=channels,
        eps=0.0 if norm is None else norm.eps,
        momentum=0.0 if norm is None else norm.momentum,
        NORM=norm is not None,
        RUNNING=running,
        BATCHES=counted,
        **MERGE,
    )
    for held, taken in updated:
        if taken is not held:
            held.copy_(taken)
        else:  # so that autograd notices, had it saved the old values
            torch.autograd.graph.increment_version(held)
    return vectors


def _plain(vector: Tensor) -> Tensor:
    return vector if vector.dtype == torch.float32 and vector.is_contiguous() else vector.float().contiguous()


def merge_sums(sums: Tensor, x: LazyActivation) -> Tensor:
    """From sums [2, tiles, C] over each tile: what :meth:`LazyActivation.gradients` takes.

    [5, C] where the activation carries its norm's vectors: c0, c1, gradients in gamma and beta, and 0; else
    [2, C], the gradients in shift and scale.
    """
    _, tiles, channels = sums.shape
    norm = x.vectors is not None
    merged = sums.new_empty(VECTORS if norm else 2, channels)
    launch(
        _merge_sums_kernel,
        (triton.cdiv(channels, MERGE["BLOCK_O"]),),
        sums_ptr=sums[0],
        products_ptr=sums[1],
        vectors_ptr=x.vectors if norm else sums,
        merged_ptr=merged,
        TILES=tiles,
        C=channels,
        NORM=norm,
        **MERGE,
    )
    return merged


def sum_parts(partial: Tensor, like: Tensor) -> Tensor:
    """A weight's gradient from parts [parts, K, C_in / groups, C_out], in dtype and layout ``like`` it."""
    if unreadable(like):
        return sum_parts(partial, like.float()).to(like.dtype)
    parts, k, c_in, c_out = partial.shape
    size = k * c_in * c_out
    configuration = _sum_configuration(parts)
    grad = torch.empty_like(like)
    stride_wo, stride_wc, stride_wk = grad.stride()
    launch(
        _sum_parts_kernel,
        (triton.cdiv(size, configuration["BLOCK_O"]),),
        partial_ptr=partial,
        grad_ptr=grad,
        PARTS=parts,
        C_IN=c_in,
        C_OUT=c_out,
        K=k,
        stride_wo=stride_wo,
        stride_wc=stride_wc,
        stride_wk=stride_wk,
        **configuration,
    )
    return grad


def _sum_configuration(parts: int) -> Configuration:
    """A small weight has many parts, which lanes share; a large one has few, and many programs anyway."""
    block_m, block_o = (1, 1024) if parts < MANY_PARTS else (16, 128)
    return {"BLOCK_M": block_m, "BLOCK_O": block_o, "num_warps": 4, "num_stages": 1}


# --- what compiles ------------------------------------------------------------------------------------------


def compile_cases(hip: bool) -> Iterator[CompileCase]:
    """Every launch above, as :func:`ecgot.kernels.conv.triton_conv1d.compile_cases`; alike on every GPU."""
    for norm, running, batches in ((False, False, False), (True, True, True), (True, False, False)):
        flags = {"NORM": norm, "RUNNING": running, "BATCHES": batches}
        yield compile_case(_merge_statistics_kernel, "fp32", flags, MERGE, CONVENTIONS)
    for norm in (False, True):
        yield compile_case(_merge_sums_kernel, "fp32", {"NORM": norm}, MERGE, CONVENTIONS)
    for name, parts in itertools.product(DTYPES, (1, MANY_PARTS)):
        yield compile_case(_sum_parts_kernel, name, {}, _sum_configuration(parts), CONVENTIONS)
