"""Residual networks: MERL's ResNet18 and 50, the PTB-XL benchmark's resnet1d_wang, and our own."""

from torch import Tensor

from ecgot.kernels import Signal
from ecgot.models.encoders.blocks import EncoderOutput, Layer, bottlenecks, entered, left, normalized, shared
from ecgot.models.encoders.plain import PlainBasicBlock, PlainBottleneck, PlainResNet1d


class BasicBlock(PlainBasicBlock):
    def forward(self, x: Signal) -> Signal:  # type: ignore[override]
        residual = x
        if len(self.shortcut):
            x = shared(x)
            residual = normalized(x, *self.shortcut)
        y = normalized(x, self.conv1, self.bn1, "relu")
        return normalized(y, self.conv2, self.bn2, "relu", residual=residual)


class Bottleneck(PlainBottleneck):
    def layers(self) -> tuple[Layer, Layer, Layer]:
        return (self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)

    def shortcut_of(self, x: Signal) -> Signal:
        return normalized(x, *self.shortcut) if len(self.shortcut) else x


class ResNet1d(PlainResNet1d):
    """Residual network over an ECG; see :class:`PlainResNet1d` for its arguments."""

    basic, bottleneck = BasicBlock, Bottleneck

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> EncoderOutput:  # type: ignore[override]
        """waveform [B, L, T] in mV, lengths [B] valid samples of each record (all T where omitted).

        A record padded beyond its length gives what the cropped record gives.
        """
        x = normalized(entered(waveform, lengths, self.leads), self.conv1, self.bn1, "relu")
        blocks = [block for index in range(self.depth) for block in getattr(self, f"layer{index + 1}")]
        if isinstance(blocks[0], Bottleneck):
            return left(bottlenecks(x, blocks))
        for block in blocks:
            x = block(x)
        return left(x)
