"""xresnet1d of the PTB-XL benchmark, in plain torch and fused.

Source: Strodthoff et al. 2021, "Deep Learning for ECG Analysis: Benchmarks and Insights from PTB-XL", and its
repository helme/ecg_ptbxl_benchmarking; after fastai's xresnet (He et al. 2019, "Bag of Tricks for Image
Classification with Convolutional Neural Networks").
"""

from collections.abc import Sequence
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from ecgot.kernels import LazyActivation, max_pool1d, mean_pool1d
from ecgot.models.encoders.layers import (
    EncoderOutput,
    Layer,
    bottlenecks,
    conv_norm,
    encoder_input,
    encoder_output,
    plain_conv,
)


class PlainConvLayer(nn.Sequential):
    """fastai's layer: convolution, batch norm, and optionally ReLU."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int, stride: int = 1, relu: bool = True) -> None:
        conv = plain_conv(c_in, c_out, kernel_size, stride)
        nn.init.kaiming_normal_(conv.weight)
        super().__init__(conv, nn.BatchNorm1d(c_out), *([nn.ReLU(inplace=True)] if relu else []))

    @property
    def conv_and_norm(self) -> tuple[nn.Conv1d, nn.BatchNorm1d]:
        """The convolution and its norm."""
        conv, norm = list(self)[:2]
        assert isinstance(conv, nn.Conv1d)
        assert isinstance(norm, nn.BatchNorm1d | nn.SyncBatchNorm)
        return conv, norm  # type: ignore[return-value]


class PlainXBlock(nn.Module):
    """A bottleneck whose shortcut averages pairs of samples before its 1x1 convolution."""

    def __init__(self, c_in: int, middle: int, c_out: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            PlainConvLayer(c_in, middle, 1),
            PlainConvLayer(middle, middle, kernel_size, stride),
            PlainConvLayer(middle, c_out, 1, relu=False),
        )
        nn.init.zeros_(self.convs[2][1].weight)  # type: ignore[index]
        self.idpath = nn.Sequential()
        if stride != 1:
            self.idpath.append(nn.AvgPool1d(2, ceil_mode=True))
        if c_in != c_out:
            self.idpath.append(PlainConvLayer(c_in, c_out, 1, relu=False))

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C_in, T] to [B, C_out, ceil(T / stride)]."""
        return F.relu(self.convs(x) + self.idpath(x), inplace=True)


class PlainXResNet1d(nn.Sequential):
    """xresnet1d in plain torch, without its head.

    Args:
        leads: L.
        blocks: blocks of each stage.
        width: output channels of every stage; a bottleneck's inner convolution has a quarter.
        kernel_size: of the stem's and the bottlenecks' convolutions.
    """

    block: type[nn.Module] = PlainXBlock

    def __init__(
        self, leads: int = 12, blocks: Sequence[int] = (3, 4, 23, 3), width: int = 256, kernel_size: int = 5
    ) -> None:
        stem = (leads, 32, 32, 64)
        layers: list[nn.Module] = [
            PlainConvLayer(stem[i], stem[i + 1], kernel_size, 2 if i == 0 else 1) for i in range(3)
        ]
        layers.append(nn.MaxPool1d(3, 2, 1))
        c_in = stem[-1]
        for index, count in enumerate(blocks):
            stage = nn.Sequential()
            for number in range(count):
                stride = 2 if index and number == 0 else 1
                stage.append(self.block(c_in, width // 4, width, kernel_size, stride))
                c_in = width
            layers.append(stage)
        super().__init__(*layers)
        self.leads, self.width = leads, width

    def forward(self, waveform: Tensor) -> Tensor:
        """waveform [B, L, T] in mV to tokens [B, N, D]."""
        return super().forward(waveform).transpose(1, 2)


class XBlock(PlainXBlock):
    """See :class:`PlainXBlock`; run by :func:`ecgot.models.encoders.layers.bottlenecks`."""

    def layers(self) -> tuple[Layer, Layer, Layer]:
        """Narrow, middle and wide."""
        narrow, middle, wide = cast(list[PlainConvLayer], list(self.convs))
        return narrow.conv_and_norm, middle.conv_and_norm, wide.conv_and_norm

    def shortcut_of(self, x: LazyActivation) -> LazyActivation:
        """[B, T, C_in] to [B, ceil(T / stride), C_out]."""
        for module in self.idpath:
            x = conv_norm(x, *module) if isinstance(module, PlainConvLayer) else mean_pool1d(x)
        return x


class XResNet1d(PlainXResNet1d):
    """See :class:`PlainXResNet1d`."""

    block = XBlock

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> EncoderOutput:  # type: ignore[override]
        """waveform [B, L, T] in mV, lengths [B] valid samples of each record (all T where omitted)."""
        x = encoder_input(waveform, lengths, self.leads)
        *stem, _pool = list(self)[:4]
        for layer in cast(list[PlainConvLayer], stem):
            x = conv_norm(x, *layer.conv_and_norm, "relu")
        x = max_pool1d(x, 3, 2, 1)
        stages = cast(list[nn.Sequential], list(self)[4:])
        blocks = [block for stage in stages for block in stage]
        return encoder_output(bottlenecks(x, cast(list[XBlock], blocks)))
