"""xresnet1d of the PTB-XL benchmark."""

from typing import cast

from torch import Tensor, nn

from ecgot.kernels import Signal, max_pool1d, mean_pool1d
from ecgot.models.encoders.blocks import EncoderOutput, entered, left, normalized
from ecgot.models.encoders.plain import PlainConvLayer, PlainXBlock, PlainXResNet1d


class XBlock(PlainXBlock):
    def forward(self, x: Signal) -> Signal:  # type: ignore[override]
        residual = x
        for module in self.idpath:
            residual = (
                normalized(residual, *module) if isinstance(module, PlainConvLayer) else mean_pool1d(residual)
            )
        narrow, middle, wide = cast(list[PlainConvLayer], list(self.convs))
        y = normalized(x, *narrow.conv_and_norm, "relu")
        y = normalized(y, *middle.conv_and_norm, "relu")
        return normalized(y, *wide.conv_and_norm, "relu", residual=residual, recompute=True)


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
        for stage in cast(list[nn.Sequential], list(self)[4:]):
            for block in stage:
                x = block(x)
        return left(x)
