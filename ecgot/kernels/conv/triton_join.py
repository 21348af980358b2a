"""The join of a residual block in Triton: act(normalised y + residual), and its gradients.

    z = act((y - mean) * scale + shift + r),    r = residual  or  act((residual - mean) * scale + shift)

The trick: the backward pass recomputes what it needs from y and the residual, and reduces the gradients of
both norms' vectors tile by tile. The tiles' sums are added in a fixed order: no atomics, the same bits every
time.

Bytes moved: forward y and the residual once, z once; backward z's gradient, y, and z (ReLU) or the residual
(GELU, SiLU, or a normalised residual) once, both gradients once.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ecgot.kernels.compilation import DTYPES, CompileCase, compile_case
from ecgot.kernels.conv.operands import LazyActivation, in_dtype
from ecgot.kernels.conv.triton_statistics import merge_sums
from ecgot.kernels.conv.triton_tiles import (
    ACTIVATION_CODES,
    CONVENTIONS,
    activate,
    affine,
    times_slope,
    unreadable,
)
from ecgot.kernels.dispatch import launch

JOIN_CONFIGURATION = {"BLOCK_M": 64, "BLOCK_C": 64, "num_warps": 8, "num_stages": 1}


@triton.jit
def _join_fwd_kernel(
    y_ptr,
    y_mean_ptr,
    y_scale_ptr,
    y_shift_ptr,
    r_ptr,
    r_mean_ptr,
    r_scale_ptr,
    r_shift_ptr,
    z_ptr,
    ROWS,  # B * T
    C,
    R_NORM: tl.constexpr,
    R_ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """z = act((y - mean) * scale + shift + r), r as it is or normalised and activated."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_valid = c < C
    valid = (m < ROWS)[:, None] & c_valid[None, :]
    offset = m[:, None] * C + c[None, :]
    y = tl.load(y_ptr + offset, valid, 0.0)
    value = affine(y, y_mean_ptr, y_scale_ptr, y_shift_ptr, c, c_valid)
    if HAS_RESIDUAL:
        r = tl.load(r_ptr + offset, valid, 0.0).to(tl.float32)
        if R_NORM:
            r = activate(affine(r, r_mean_ptr, r_scale_ptr, r_shift_ptr, c, c_valid), R_ACTIVATION)
        value += r
    z = activate(value, ACTIVATION)
    tl.store(z_ptr + offset, z.to(z_ptr.dtype.element_ty), valid)


@triton.jit
def _join_bwd_kernel(
    g_ptr,
    y_ptr,
    y_mean_ptr,
    y_scale_ptr,
    y_shift_ptr,
    r_ptr,
    r_mean_ptr,
    r_scale_ptr,
    r_shift_ptr,
    z_ptr,
    grad_y_ptr,
    grad_r_ptr,
    sums_ptr,  # [4 or 2, tiles of rows, C]: of grad, grad * (y - mean), and the same of a normalised r
    ROWS,
    C,
    R_NORM: tl.constexpr,
    R_ACTIVATION: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_valid = c < C
    valid = (m < ROWS)[:, None] & c_valid[None, :]
    offset = m[:, None] * C + c[None, :]
    g = tl.load(g_ptr + offset, valid, 0.0).to(tl.float32)
    y = tl.load(y_ptr + offset, valid, 0.0).to(tl.float32)
    if HAS_RESIDUAL and (R_NORM or ACTIVATION > 1):
        r = tl.load(r_ptr + offset, valid, 0.0).to(tl.float32)
    if ACTIVATION == 1:  # ReLU's slope is read off its output: no residual need be read
        g = tl.where(tl.load(z_ptr + offset, valid, 0.0) <= 0, 0.0, g)
    elif ACTIVATION > 1:
        value = affine(y, y_mean_ptr, y_scale_ptr, y_shift_ptr, c, c_valid)
        if HAS_RESIDUAL:
            if R_NORM:
                value += activate(affine(r, r_mean_ptr, r_scale_ptr, r_shift_ptr, c, c_valid), R_ACTIVATION)
            else:
                value += r
        g = tl.where(valid, times_slope(g, value, ACTIVATION), 0.0)
    tiles = tl.num_programs(0).to(tl.int64)
    partial = tl.program_id(0).to(tl.int64) * C + c
    deviation = tl.where(valid, y - tl.load(y_mean_ptr + c, c_valid, 0.0)[None, :], 0.0)
    tl.store(sums_ptr + partial, tl.sum(g, axis=0), c_valid)
    tl.store(sums_ptr + tiles * C + partial, tl.sum(g * deviation, axis=0), c_valid)
    grad_y = g * tl.load(y_scale_ptr + c, c_valid, 0.0)[None, :]
    tl.store(grad_y_ptr + offset, grad_y.to(grad_y_ptr.dtype.element_ty), valid)
    if HAS_RESIDUAL:
        if R_NORM:
            g = times_slope(g, affine(r, r_mean_ptr, r_scale_ptr, r_shift_ptr, c, c_valid), R_ACTIVATION)
            deviation = tl.where(valid, r - tl.load(r_mean_ptr + c, c_valid, 0.0)[None, :], 0.0)
            tl.store(sums_ptr + 2 * tiles * C + partial, tl.sum(g, axis=0), c_valid)
            tl.store(sums_ptr + 3 * tiles * C + partial, tl.sum(g * deviation, axis=0), c_valid)
            g *= tl.load(r_scale_ptr + c, c_valid, 0.0)[None, :]
        tl.store(grad_r_ptr + offset, g.to(grad_r_ptr.dtype.element_ty), valid)


def join(y: LazyActivation, residual: LazyActivation | None, activation: str | None) -> Tensor:
    """z [B, T, C] = act(normalised y + residual)."""
    if unreadable(y.values):
        r = None if residual is None else in_dtype(residual, torch.float32)
        return join(in_dtype(y, torch.float32), r, activation).to(y.values.dtype)
    z = torch.empty(y.values.shape, dtype=y.values.dtype, device=y.values.device)
    if z.numel():
        launch(_join_fwd_kernel, _join_grid(z), z_ptr=z, **_join_arguments(y, residual, activation))
    return z


def join_gradient(
    g: Tensor, z: Tensor | None, y: LazyActivation, residual: LazyActivation | None, activation: str | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Gradients of a join from z's: in y.values and residual.values [B, T, C], and sums of y's and of its.

    The sums are what ``merge_sums`` returns, None for a residual that is not normalised. z is read where the
    activation is ReLU; the residual where it is normalised, or with another activation.
    """
    if unreadable(g):
        r = None if residual is None else in_dtype(residual, torch.float32)
        wide = (g.float(), None if z is None else z.float(), in_dtype(y, torch.float32), r)
        grad_y, grad_r, of_y, of_r = join_gradient(*wide, activation)
        return grad_y.to(g.dtype), None if grad_r is None else grad_r.to(g.dtype), of_y, of_r
    grad_y = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    grad_r = None if residual is None else torch.empty_like(grad_y)
    r_norm = residual is not None and residual.mean is not None
    rows, tiles = 4 if r_norm else 2, _join_grid(g)[0]
    sums = torch.empty(rows, tiles, g.shape[2], dtype=torch.float32, device=g.device)
    if g.numel():
        launch(
            _join_bwd_kernel,
            _join_grid(g),
            g_ptr=g.contiguous(),
            z_ptr=g if z is None else z,
            grad_y_ptr=grad_y,
            grad_r_ptr=grad_y if grad_r is None else grad_r,
            sums_ptr=sums,
            **_join_arguments(y, residual, activation),
        )
    of_r = merge_sums(sums[2:], residual) if residual is not None and r_norm else None
    return grad_y, grad_r, merge_sums(sums[:2], y), of_r


def _join_grid(z: Tensor) -> tuple[int, int]:
    return (
        triton.cdiv(z.shape[0] * z.shape[1], JOIN_CONFIGURATION["BLOCK_M"]),
        triton.cdiv(z.shape[2], JOIN_CONFIGURATION["BLOCK_C"]),
    )


def _join_arguments(
    y: LazyActivation, residual: LazyActivation | None, activation: str | None
) -> dict[str, Any]:
    assert y.mean is not None
    batch, t, channels = y.values.shape
    r = y if residual is None else residual
    norm = r.mean is not None
    return {
        "y_ptr": y.values.contiguous(),
        "y_mean_ptr": y.mean,
        "y_scale_ptr": y.scale,
        "y_shift_ptr": y.shift,
        "r_ptr": r.values.contiguous(),
        "r_mean_ptr": r.mean if norm else y.mean,
        "r_scale_ptr": r.scale if norm else y.mean,
        "r_shift_ptr": r.shift if norm else y.mean,
        "ROWS": batch * t,
        "C": channels,
        "R_NORM": norm,
        "R_ACTIVATION": ACTIVATION_CODES[r.activation],
        "HAS_RESIDUAL": residual is not None,
        "ACTIVATION": ACTIVATION_CODES[activation],
        **JOIN_CONFIGURATION,
    }


# --- what compiles ------------------------------------------------------------------------------------------


def compile_cases(hip: bool) -> Iterator[CompileCase]:
    """Every launch above, as :func:`ecgot.kernels.conv.triton_conv1d.compile_cases`; alike on every GPU."""
    norms = [(False, None), *((True, activation) for activation in ACTIVATION_CODES)]
    for name in DTYPES:
        for (r_norm, r_activation), activation, residual in itertools.product(
            norms, ACTIVATION_CODES, (False, True)
        ):
            given = {
                "R_NORM": r_norm,
                "R_ACTIVATION": ACTIVATION_CODES[r_activation],
                "HAS_RESIDUAL": residual,
                "ACTIVATION": ACTIVATION_CODES[activation],
            }
            for kernel in (_join_fwd_kernel, _join_bwd_kernel):
                yield compile_case(kernel, name, given, JOIN_CONFIGURATION, CONVENTIONS)
