"""xresnet1d of the PTB-XL benchmark."""

from typing import cast

from torch import Tensor, nn

from ecgot.kernels import Signal, max_pool1d, mean_pool1d
from ecgot.models.encoders.blocks import EncoderOutput, Layer, bottlenecks, entered, left, normalized
from ecgot.models.encoders.plain import PlainConvLayer, PlainXBlock, PlainXResNet1d


class XBlock(PlainXBlock):
    def layers(self) -> tuple[Layer, Layer, Layer]:
        narrow, middle, wide = cast(list[PlainConvLayer], list(self.convs))
        return narrow.conv_and_norm, middle.conv_and_norm, wide.conv_and_norm

    def shortcut_of(self, x: Signal) -> Signal:
        for module in self.idpath:
            x = normalized(x, *module) if isinstance(module, PlainConvLayer) else mean_pool1d(x)
        return x


class XResNet1d(PlainXResNet1d):
    """See :class:`PlainXResNet1d`."""

    block = XBlock

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> EncoderOutput:  # type: ignore[override]
        """waveform [B, L, T] in mV, lengths [B] valid samples of each record (all T where omitted)."""
        x = entered(waveform, lengths, self.leads)
        *stem, _pool = list(self)[:4]
        for layer in cast(list[PlainConvLayer], stem):
            x = normalized(x, *layer.conv_and_norm, "relu")
        x = max_pool1d(x, 3, 2, 1)
        stages = cast(list[nn.Sequential], list(self)[4:])
        blocks = [block for stage in stages for block in stage]
        return left(bottlenecks(x, cast(list[XBlock], blocks)))
