"""Max and mean pooling of activations that may not be materialized yet."""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ecgot.kernels.conv import torch_conv1d
from ecgot.kernels.conv.checks import check_lengths
from ecgot.kernels.conv.geometry import Geometry, fill_past
from ecgot.kernels.conv.join import materialize
from ecgot.kernels.conv.operands import LazyActivation
from ecgot.kernels.lengths import length_mask

_PAIRS = Geometry(stride=2, end=1)  # windows of two samples, and an odd last one


def max_pool1d(x: LazyActivation, kernel_size: int, stride: int, padding: int) -> LazyActivation:
    """The maximum of each window, as ``torch.nn.functional.max_pool1d`` of each record alone.

    Args:
        x: [B, T, C].
        kernel_size, stride, padding: in samples; padding has no maximum.

    Returns:
        [B, T_out, C]. The backward pass recomputes everything from x.

    >>> x = LazyActivation(torch.tensor([[[1.0], [3.0], [2.0], [9.0]]]), lengths=torch.tensor([3]))
    >>> y = max_pool1d(x, kernel_size=2, stride=2, padding=1)
    >>> y.values.flatten(), y.lengths
    (tensor([1., 3., 0.]), tensor([2]))
    """
    lengths = None
    if x.lengths is not None:
        lengths = Geometry(stride, padding).output_length(x.lengths, kernel_size)
    call = _Call(x.activation, ([1, kernel_size], [1, stride], [0, padding]))
    return LazyActivation(_MaxPool.apply(call, lengths, *x.tensors()), lengths=lengths)


def mean_pool1d(x: LazyActivation) -> LazyActivation:
    """Means of pairs of samples, as ``AvgPool1d(2, ceil_mode=True)``: an odd last sample stays itself.

    [B, T, C] to [B, ceil(T / 2), C], each record as if it were alone.

    >>> x = LazyActivation(torch.tensor([[[1.0], [3.0], [5.0], [9.0]]]), lengths=torch.tensor([3]))
    >>> mean_pool1d(x).values.flatten()
    tensor([2., 5.])
    """
    x = materialize(x)
    values, t = x.values, x.values.shape[1]
    if x.lengths is not None:
        x = dataclasses.replace(x, lengths=check_lengths(x.lengths, values))
        values = fill_past(values, x.lengths)
    if t % 2:
        values = F.pad(values, (0, 0, 0, 1))
    sums = values[:, ::2] + values[:, 1::2]
    if x.lengths is None:
        half = torch.full((sums.shape[1],), 0.5, dtype=sums.dtype, device=sums.device)
        if t % 2:
            half[-1] = 1.0
        return LazyActivation(sums * half[:, None])
    whole = length_mask(x.lengths // 2, sums.shape[1])  # pairs with both samples
    lengths = _PAIRS.output_length(x.lengths, 2)
    return LazyActivation(torch.where(whole[:, :, None], sums * 0.5, sums), lengths=lengths)


class _Call(NamedTuple):
    """What the autograd function gets beside tensors; window: kernel size, stride and padding of an image."""

    activation: str | None
    window: tuple[list[int], list[int], list[int]]


class _MaxPool(torch.autograd.Function):
    """Saves neither the activation nor torch's int64 indices: both are recomputed."""

    @staticmethod
    def forward(ctx: Any, call: _Call, lengths: Tensor | None, *x_tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(lengths, *x_tensors)
        ctx.call = call
        x = LazyActivation.from_tensors(x_tensors, call.activation)
        z, _ = F.max_pool2d_with_indices(_image(_all_values(x), x.lengths), *call.window)
        z = torch_conv1d.as_signal(z)
        if lengths is None:
            return z
        # A window that lies entirely in the padding or past the end has no maximum.
        return torch.where(length_mask(lengths, z.shape[1])[:, :, None] & (z > -torch.inf), z, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lengths, *x_tensors = ctx.saved_tensors
        x = LazyActivation.from_tensors(x_tensors, ctx.call.activation)
        h = _all_values(x)
        image = _image(h, x.lengths)
        _, indices = F.max_pool2d_with_indices(image, *ctx.call.window)
        grad_image = torch.ops.aten.max_pool2d_with_indices_backward(
            torch_conv1d.as_image(fill_past(grad, lengths)), image, *ctx.call.window, [1, 1], False, indices
        )
        grad_h = fill_past(torch_conv1d.as_signal(grad_image), x.lengths)
        if x.mean is None:
            return None, None, *x.gradients(grad_h, None, None)
        return None, None, *x.gradients(*torch_conv1d.normalized_gradients(grad_h, h, x))


def _all_values(x: LazyActivation) -> Tensor:
    """x [B, T, C] materialized; past each length it may hold anything."""
    return torch_conv1d.read(dataclasses.replace(x, lengths=None))


def _image(h: Tensor, lengths: Tensor | None) -> Tensor:
    """h as a channels-last image whose maxima are never past a length."""
    return torch_conv1d.as_image(fill_past(h, lengths, -torch.inf))
