"""inception1d of the PTB-XL benchmark, in plain torch and fused.

Source: Strodthoff et al. 2021, "Deep Learning for ECG Analysis: Benchmarks and Insights from PTB-XL", and its
repository helme/ecg_ptbxl_benchmarking; after InceptionTime (Fawaz et al. 2020).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecgot.kernels import LazyActivation, max_pool1d
from ecgot.models.encoders.layers import (
    EncoderOutput,
    conv_act,
    conv_norm,
    encoder_input,
    encoder_output,
    plain_conv,
)


class PlainInceptionBlock(nn.Module):
    """Convolutions of three lengths and a pooled one side by side, over a bottleneck."""

    def __init__(self, c_in: int, filters: int, kernel_sizes: Sequence[int], bottleneck: int) -> None:
        super().__init__()
        self.bottleneck = plain_conv(c_in, bottleneck, 1)
        self.convs = nn.ModuleList([plain_conv(bottleneck, filters, k) for k in kernel_sizes])
        self.conv_bottle = nn.Sequential(nn.MaxPool1d(3, 1, padding=1), plain_conv(c_in, filters, 1))
        self.bn_relu = nn.Sequential(nn.BatchNorm1d((len(kernel_sizes) + 1) * filters), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C_in, T] to [B, 4 filters, T], with three kernel sizes."""
        narrow = self.bottleneck(x)
        return self.bn_relu(torch.cat([*(conv(narrow) for conv in self.convs), self.conv_bottle(x)], dim=1))


class PlainInceptionShortcut(nn.Module):
    """A 1x1 convolution and its norm beside three blocks."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv, self.bn = plain_conv(c_in, c_out, 1), nn.BatchNorm1d(c_out)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [B, C_in, T] of before the blocks, y [B, C_out, T] of after them."""
        return F.relu(y + self.bn(self.conv(x)), inplace=True)


class PlainInception1d(nn.Module):
    """inception1d in plain torch, without its head: blocks at full length, a shortcut over every three.

    Args:
        leads: L.
        depth: blocks.
        filters: output channels of each of a block's convolutions.
        kernel_sizes: of the convolutions side by side in a block.
        bottleneck: channels that they read.
    """

    block: type[nn.Module] = PlainInceptionBlock
    shortcut: type[nn.Module] = PlainInceptionShortcut

    def __init__(
        self,
        leads: int = 12,
        depth: int = 6,
        filters: int = 32,
        kernel_sizes: Sequence[int] = (39, 19, 9),
        bottleneck: int = 32,
    ) -> None:
        super().__init__()
        self.leads, self.width = leads, (len(kernel_sizes) + 1) * filters
        inputs = [leads] + [self.width] * (depth - 1)
        self.im = nn.ModuleList([self.block(c_in, filters, kernel_sizes, bottleneck) for c_in in inputs])
        self.sk = nn.ModuleList([self.shortcut(c_in, self.width) for c_in in inputs[: depth // 3]])

    def forward(self, waveform: Tensor) -> Tensor:
        """waveform [B, L, T] in mV to tokens [B, T, D]."""
        x = before = waveform
        for index, block in enumerate(self.im):
            x = block(x)
            if index % 3 == 2:
                x = before = self.sk[index // 3](before, x)
        return x.transpose(1, 2)


class InceptionBlock(PlainInceptionBlock):
    """See :class:`PlainInceptionBlock`."""

    def forward(self, x: LazyActivation) -> LazyActivation:  # type: ignore[override]
        """x [B, T, C_in] to [B, T, 4 filters], with three kernel sizes."""
        narrow = conv_act(x, self.bottleneck)
        branches: list[tuple[LazyActivation, Any]] = [(narrow, conv) for conv in self.convs]
        branches.append((max_pool1d(x, 3, 1, 1), self.conv_bottle[1]))
        norm: Any = self.bn_relu[0]
        share = norm.num_features // len(branches)
        return _concatenated(
            [
                conv_norm(y, conv, norm, "relu", channels=slice(number * share, (number + 1) * share))
                for number, (y, conv) in enumerate(branches)
            ]
        )


def _concatenated(branches: list[LazyActivation]) -> LazyActivation:
    """Activations of the same form, their channels side by side."""
    first = branches[0]
    changed = {"values": torch.cat([x.values for x in branches], 2)}
    for name in ("mean", "scale", "shift", "rstd"):
        if getattr(first, name) is not None:
            changed[name] = torch.cat([getattr(x, name) for x in branches])
    return dataclasses.replace(first, **changed)  # type: ignore[arg-type]


class InceptionShortcut(PlainInceptionShortcut):
    """See :class:`PlainInceptionShortcut`."""

    def forward(self, x: LazyActivation, y: LazyActivation) -> LazyActivation:  # type: ignore[override]
        """x [B, T, C_in] of before the blocks, y [B, T, C_out] of after them."""
        return conv_norm(x, self.conv, self.bn, "relu", residual=y)


class Inception1d(PlainInception1d):
    """See :class:`PlainInception1d`."""

    block, shortcut = InceptionBlock, InceptionShortcut

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> EncoderOutput:  # type: ignore[override]
        """waveform [B, L, T] in mV, lengths [B] valid samples of each record (all T where omitted)."""
        x = before = encoder_input(waveform, lengths, self.leads)
        for index, block in enumerate(self.im):
            x = block(x)
            if index % 3 == 2:
                x = before = self.sk[index // 3](before, x)
        return encoder_output(x)
