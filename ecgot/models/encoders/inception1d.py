"""inception1d of the PTB-XL benchmark."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ecgot.kernels import Signal, max_pool1d
from ecgot.models.encoders.blocks import EncoderOutput, convolved, entered, left, normalized
from ecgot.models.encoders.plain import PlainInception1d, PlainInceptionBlock, PlainInceptionShortcut


class InceptionBlock(PlainInceptionBlock):
    def forward(self, x: Signal) -> Signal:  # type: ignore[override]
        narrow = convolved(x, self.bottleneck)
        branches: list[tuple[Signal, Any]] = [(narrow, conv) for conv in self.convs]
        branches.append((max_pool1d(x, 3, 1, 1), self.conv_bottle[1]))
        norm: Any = self.bn_relu[0]
        share = norm.num_features // len(branches)
        return _beside(
            [
                normalized(y, conv, norm, "relu", channels=slice(number * share, (number + 1) * share))
                for number, (y, conv) in enumerate(branches)
            ]
        )


def _beside(signals: list[Signal]) -> Signal:
    """Signals of the same form, their channels side by side."""
    beside = lambda name, axis: torch.cat([getattr(x, name) for x in signals], axis)  # noqa: E731
    values = beside("values", 2)
    if signals[0].mean is None:
        return dataclasses.replace(signals[0], values=values)
    vectors = {
        name: beside(name, 0)
        for name in ("mean", "scale", "shift", "rstd")
        if getattr(signals[0], name) is not None
    }
    return dataclasses.replace(signals[0], values=values, **vectors)  # type: ignore[arg-type]


class InceptionShortcut(PlainInceptionShortcut):
    def forward(self, x: Signal, y: Signal) -> Signal:  # type: ignore[override]
        return normalized(x, self.conv, self.bn, "relu", residual=y)


class Inception1d(PlainInception1d):
    """See :class:`PlainInception1d`."""

    block, shortcut = InceptionBlock, InceptionShortcut

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> EncoderOutput:  # type: ignore[override]
        """waveform [B, L, T] in mV, lengths [B] valid samples of each record (all T where omitted)."""
        x = before = entered(waveform, lengths, self.leads)
        for index, block in enumerate(self.im):
            x = block(x)
            if index % 3 == 2:
                x = before = self.sk[index // 3](before, x)
        return left(x)
