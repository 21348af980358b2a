"""Residual networks in plain torch and fused: MERL's ResNet18 and 50, resnet1d_wang, and this package's.

Sources: He et al. 2016, "Deep Residual Learning for Image Recognition"; Liu et al. 2024 (MERL) and its
repository cheliu-computation/MERL-ICML2024; for resnet1d_wang Wang et al. 2017, as the PTB-XL benchmark has
it (Strodthoff et al. 2021; helme/ecg_ptbxl_benchmarking).
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from ecgot.kernels import LazyActivation
from ecgot.models.encoders.layers import (
    EncoderOutput,
    Layer,
    bottlenecks,
    conv_norm,
    conv_norm_beside,
    encoder_input,
    encoder_output,
    materialize_shared,
    plain_conv,
)


def _shortcut(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    """Nothing, or a 1x1 convolution where the shape changes."""
    if stride == 1 and c_in == c_out:
        return nn.Sequential()
    return nn.Sequential(plain_conv(c_in, c_out, 1, stride), nn.BatchNorm1d(c_out))


class PlainBasicBlock(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, c_in: int, c_out: int, kernel_sizes: tuple[int, int], stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = plain_conv(c_in, c_out, kernel_sizes[0], stride), nn.BatchNorm1d(c_out)
        self.conv2, self.bn2 = plain_conv(c_out, c_out, kernel_sizes[1]), nn.BatchNorm1d(c_out)
        self.shortcut = _shortcut(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C_in, T] to [B, C_out, ceil(T / stride)]."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


class PlainBottleneck(nn.Module):
    """1x1 to a quarter of the width, a convolution there, 1x1 back, and a shortcut."""

    def __init__(self, c_in: int, c_out: int, kernel_sizes: tuple[int, int], stride: int) -> None:
        super().__init__()
        middle = c_out // 4
        self.conv1, self.bn1 = plain_conv(c_in, middle, 1), nn.BatchNorm1d(middle)
        self.conv2, self.bn2 = plain_conv(middle, middle, kernel_sizes[0], stride), nn.BatchNorm1d(middle)
        self.conv3, self.bn3 = plain_conv(middle, c_out, 1), nn.BatchNorm1d(c_out)
        self.shortcut = _shortcut(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C_in, T] to [B, C_out, ceil(T / stride)]."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x), inplace=True)


class PlainResNet1d(nn.Module):
    """A residual network in one dimension, without the pooling after the stem.

    Args:
        leads: L, input channels.
        widths: output channels of each stage.
        blocks: blocks of each stage.
        bottleneck: 1x1, k, 1x1 blocks in place of basic ones.
        kernel_sizes: of a basic block's two convolutions; the first is a bottleneck's.
        stem_width, stem_kernel_size, stem_stride: of the first convolution; its width is the first stage's
            unless given.
        strides: of each stage's first block; 1 and then 2 unless given.
        he_init: weights drawn after He et al. 2015 (fan out), and every block starts as its shortcut, as its
            last batch norm's weight is 0. Otherwise torch's defaults, as in MERL and the benchmark.
    """

    basic: type[nn.Module] = PlainBasicBlock
    bottleneck: type[nn.Module] = PlainBottleneck

    def __init__(
        self,
        leads: int = 12,
        widths: Sequence[int] = (64, 128, 256, 512),
        blocks: Sequence[int] = (2, 2, 2, 2),
        *,
        bottleneck: bool = False,
        kernel_sizes: tuple[int, int] = (3, 3),
        stem_width: int | None = None,
        stem_kernel_size: int = 7,
        stem_stride: int = 2,
        strides: Sequence[int] | None = None,
        he_init: bool = False,
    ) -> None:
        super().__init__()
        self.leads, self.width = leads, widths[-1]
        c_in = stem_width or widths[0]
        self.conv1, self.bn1 = plain_conv(leads, c_in, stem_kernel_size, stem_stride), nn.BatchNorm1d(c_in)
        block = self.bottleneck if bottleneck else self.basic
        for index, (c_out, count) in enumerate(zip(widths, blocks, strict=True)):
            stride = strides[index] if strides is not None else 1 if index == 0 else 2
            stage = nn.Sequential()
            for number in range(count):
                stage.append(block(c_in, c_out, kernel_sizes, stride if number == 0 else 1))
                c_in = c_out
            setattr(self, f"layer{index + 1}", stage)
        self.depth = len(widths)
        if he_init:
            for module in self.modules():
                if isinstance(module, nn.Conv1d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                elif isinstance(module, block):
                    nn.init.zeros_(getattr(module, "bn3" if bottleneck else "bn2").weight)

    def forward(self, waveform: Tensor) -> Tensor:
        """waveform [B, L, T] in mV to tokens [B, N, D]."""
        x = F.relu(self.bn1(self.conv1(waveform)), inplace=True)
        for index in range(self.depth):
            x = getattr(self, f"layer{index + 1}")(x)
        return x.transpose(1, 2)


class BasicBlock(PlainBasicBlock):
    """See :class:`PlainBasicBlock`."""

    def forward(self, x: LazyActivation) -> LazyActivation:  # type: ignore[override]
        """x [B, T, C_in] to [B, ceil(T / stride), C_out]."""
        if len(self.shortcut):
            x = materialize_shared(x)
        y, x = conv_norm_beside(x, self.conv1, self.bn1, "relu")
        residual = conv_norm(x, *self.shortcut) if len(self.shortcut) else x
        return conv_norm(y, self.conv2, self.bn2, "relu", residual=residual)


class Bottleneck(PlainBottleneck):
    """See :class:`PlainBottleneck`; run by :func:`ecgot.models.encoders.layers.bottlenecks`."""

    def layers(self) -> tuple[Layer, Layer, Layer]:
        """Narrow, middle and wide."""
        return (self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)

    def shortcut_of(self, x: LazyActivation) -> LazyActivation:
        """[B, T, C_in] to [B, ceil(T / stride), C_out]."""
        return conv_norm(x, *self.shortcut) if len(self.shortcut) else x


class ResNet1d(PlainResNet1d):
    """See :class:`PlainResNet1d`."""

    basic, bottleneck = BasicBlock, Bottleneck

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> EncoderOutput:  # type: ignore[override]
        """waveform [B, L, T] in mV, lengths [B] valid samples of each record (all T where omitted).

        A padded record gives the same as one cropped to its length.
        """
        x = conv_norm(encoder_input(waveform, lengths, self.leads), self.conv1, self.bn1, "relu")
        blocks = [block for index in range(self.depth) for block in getattr(self, f"layer{index + 1}")]
        if isinstance(blocks[0], Bottleneck):
            return encoder_output(bottlenecks(x, blocks))
        for block in blocks:
            x = block(x)
        return encoder_output(x)
