"""Max and mean pooling of signals that may not be normalised yet."""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ecgot.kernels.conv import torch_conv1d
from ecgot.kernels.conv.checks import check_lengths
from ecgot.kernels.conv.geometry import valid_samples
from ecgot.kernels.conv.join import materialize
from ecgot.kernels.conv.operands import LazyActivation


def max_pool1d(x: LazyActivation, kernel_size: int, stride: int, padding: int) -> LazyActivation:
    """As ``torch.nn.functional.max_pool1d``, of each record alone; the backward needs nothing but x."""
    lengths = None
    if x.lengths is not None:
        lengths = ((x.lengths + 2 * padding - kernel_size) // stride + 1).clamp_min(0)
    window = kernel_size, stride, padding
    z = _MaxPool.apply(x.values, x.mean, x.scale, x.shift, x.rstd, x.activation, x.lengths, lengths, window)
    return LazyActivation(z, lengths=lengths)


def mean_pool1d(x: LazyActivation) -> LazyActivation:
    """Means of two samples each, as ``AvgPool1d(2, ceil_mode=True)``: an odd last sample stays itself."""
    x = materialize(x)
    values = x.values
    if x.lengths is not None:
        x = dataclasses.replace(x, lengths=check_lengths(x.lengths, values))
        valid = valid_samples(x.lengths, values.shape[1])
        assert valid is not None
        values = torch.where(valid, values, 0.0)
    if values.shape[1] % 2:
        values = F.pad(values, (0, 0, 0, 1))
    pooled = values[:, ::2] + values[:, 1::2]
    half = torch.full((pooled.shape[1],), 0.5, dtype=pooled.dtype, device=pooled.device)
    if x.lengths is None:
        if x.values.shape[1] % 2:
            half[-1] = 1.0
        return LazyActivation(pooled * half[:, None])
    pair = torch.arange(pooled.shape[1], device=pooled.device)
    whole = pair < (x.lengths // 2)[:, None]
    return LazyActivation(torch.where(whole[:, :, None], pooled * 0.5, pooled), lengths=(x.lengths + 1) // 2)


class _MaxPool(torch.autograd.Function):
    """Keeps neither the activation nor torch's int64 indices: both are computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        mean: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        rstd: Tensor | None,
        activation: str | None,
        x_lengths: Tensor | None,
        lengths: Tensor | None,
        window: tuple[int, int, int],
    ) -> Tensor:
        ctx.save_for_backward(values, mean, scale, shift, rstd, x_lengths, lengths)
        ctx.settings = activation, window
        h = torch_conv1d.read(LazyActivation(values, mean, scale, shift, activation))
        return _pooled(h, x_lengths, lengths, window)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, mean, scale, shift, rstd, x_lengths, lengths = ctx.saved_tensors
        activation, window = ctx.settings
        x = LazyActivation(values, mean, scale, shift, activation, x_lengths, rstd)
        h = torch_conv1d.read(dataclasses.replace(x, lengths=None))
        grad_h = _pooled_gradient(grad, h, x_lengths, lengths, window)
        if mean is None or scale is None:
            return grad_h, *[None] * 9
        grad_x, grad_shift, grad_scale = torch_conv1d.normalized_gradients(grad_h, h, x)
        grad_mean = -scale * grad_shift if rstd is None else None
        return grad_x, grad_mean, grad_scale, grad_shift, *[None] * 6


def _pooled(
    h: Tensor, x_lengths: Tensor | None, lengths: Tensor | None, window: tuple[int, int, int]
) -> Tensor:
    z, _ = F.max_pool2d_with_indices(_pooled_image(h, x_lengths), *_pooling(window))
    valid = valid_samples(lengths, z.shape[3])
    z = torch_conv1d.as_signal(z)
    # A window may lie in the padding and beyond the end alone; it has no maximum.
    return z if valid is None else torch.where(valid & (z > -torch.inf), z, 0.0)


def _pooled_gradient(
    grad: Tensor, h: Tensor, x_lengths: Tensor | None, lengths: Tensor | None, window: tuple[int, int, int]
) -> Tensor:
    """The gradient in h [B, T, C] from that in the pooled signal."""
    valid = valid_samples(lengths, grad.shape[1])
    grad = grad if valid is None else torch.where(valid, grad, 0.0)
    image, sizes = _pooled_image(h, x_lengths), _pooling(window)
    _, indices = F.max_pool2d_with_indices(image, *sizes)
    grad_image = torch.ops.aten.max_pool2d_with_indices_backward(
        torch_conv1d.as_image(grad), image, *sizes, [1, 1], False, indices
    )
    grad_h = torch_conv1d.as_signal(grad_image)
    valid = valid_samples(x_lengths, h.shape[1])
    return grad_h if valid is None else torch.where(valid, grad_h, 0.0)


def _pooled_image(h: Tensor, x_lengths: Tensor | None) -> Tensor:
    """What is pooled: an image of h that has no maximum beyond the records' ends."""
    valid = valid_samples(x_lengths, h.shape[1])
    return torch_conv1d.as_image(h if valid is None else torch.where(valid, h, -torch.inf))


def _pooling(window: tuple[int, int, int]) -> tuple[list[int], list[int], list[int]]:
    kernel_size, stride, padding = window
    return [1, kernel_size], [1, stride], [0, padding]
