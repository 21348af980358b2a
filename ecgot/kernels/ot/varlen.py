"""Optimal transport between packed clouds of any length."""

from typing import Any

import torch
from torch import Tensor

from ecgot.kernels.lengths import length_mask
from ecgot.kernels.ot import checks
from ecgot.kernels.ot.outputs import SinkhornOutput
from ecgot.kernels.ot.sinkhorn import sinkhorn


def sinkhorn_varlen(
    x: Tensor,
    y: Tensor,
    cu_seqlens_x: Tensor,
    cu_seqlens_y: Tensor,
    *,
    max_seqlen_x: int | None = None,
    max_seqlen_y: int | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    init: Tensor | None = None,
    **settings: Any,
) -> SinkhornOutput:
    """:func:`sinkhorn` of packed clouds of any length, with FlashAttention's calling convention.

    Args:
        x, y: [total_x, D] and [total_y, D], all clouds one after another.
        cu_seqlens_x, cu_seqlens_y: int32 [B + 1], where each cloud starts, and the end of the last.
        max_seqlen_x, max_seqlen_y: the longest cloud; if None it is read from the device, which waits.
        a, b: weights [total_x] and [total_y].
        init: the packed potential g [total_y] of an earlier solution to start from.
        settings: those of :func:`sinkhorn` except masks.

    Returns:
        SinkhornOutput, whose ``f`` and ``g`` are packed like x and y. What its methods take and return is
        padded: ``plan()`` is [B, max_seqlen_x, max_seqlen_y], ``apply`` takes [B, max_seqlen_y, E].

    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0], [5.0]])  # a cloud of two points and one of a single point
    >>> y = torch.tensor([[1.0], [0.0], [7.0]])
    >>> offsets = torch.tensor([0, 2, 3], dtype=torch.int32)
    >>> out = sinkhorn_varlen(x, y, offsets, offsets, eps=0.01)
    >>> out.plan().mul(2).round().int().tolist()
    [[[0, 1], [1, 0]], [[2, 0], [0, 0]]]
    """
    for name in ("x_mask", "y_mask"):
        if name in settings:
            raise TypeError(
                f"{name}: expected none for packed clouds, whose lengths cu_seqlens give, got one"
            )
    x, y = checks.check_points(x, y, dims=2)
    x_offsets, n = checks.check_cu_seqlens("cu_seqlens_x", cu_seqlens_x, x, max_seqlen_x)
    y_offsets, m = checks.check_cu_seqlens("cu_seqlens_y", cu_seqlens_y, y, max_seqlen_y)
    if len(x_offsets) != len(y_offsets):
        raise ValueError(
            f"cu_seqlens_y: expected as many clouds as in x, {len(x_offsets) - 1}, got {len(y_offsets) - 1}"
        )
    x_at, x_mask = _places(x_offsets, n)
    y_at, y_mask = _places(y_offsets, m)
    out = sinkhorn(
        _unpacked(x, x_at),
        _unpacked(y, y_at),
        a=None if a is None else _unpacked_weights("a", a, x, x_at),
        b=None if b is None else _unpacked_weights("b", b, y, y_at),
        x_mask=x_mask,
        y_mask=y_mask,
        init=None if init is None else _unpacked_weights("init", init, y, y_at),
        **settings,
    )
    out.f, out.g = _packed(out.f, x_offsets, len(x)), _packed(out.g, y_offsets, len(y))
    return out


def _places(offsets: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """Index [B, longest] into the packed points, and the mask [B, longest] of the points that exist."""
    mask = length_mask(offsets.diff(), longest)
    step = torch.arange(longest, device=offsets.device)
    return torch.where(mask, offsets[:-1, None] + step, 0), mask


def _unpacked(points: Tensor, index: Tensor) -> Tensor:
    if not len(points):
        return points.new_zeros(*index.shape, points.shape[1])
    return points.index_select(0, index.flatten()).view(*index.shape, points.shape[1])


def _unpacked_weights(name: str, weights: Tensor, points: Tensor, index: Tensor) -> Tensor:
    if not isinstance(weights, Tensor) or weights.shape != points.shape[:1]:
        came = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"{name}: expected floating point [{len(points)}], got {came}")
    return _unpacked(weights[:, None], index).squeeze(2)


def _packed(potential: Tensor, offsets: Tensor, total: int) -> Tensor:
    place = torch.arange(total, device=offsets.device)
    cloud = torch.searchsorted(offsets, place, right=True) - 1
    return potential[cloud, place - offsets[cloud]]
