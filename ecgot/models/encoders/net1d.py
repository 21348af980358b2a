"""Net1D as ECGFounder has it, in plain torch and fused.

Source: Li et al. 2024, "An Electrocardiogram Foundation Model Built on over 10 Million Recordings"
(ECGFounder), and its repository PKUDigitalHealth/ECGFounder; after Hong et al. 2020 (hsd1503/resnet1d).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecgot.kernels import LazyActivation, max_pool1d
from ecgot.kernels.conv.geometry import fill_past
from ecgot.models.encoders.layers import EncoderOutput, conv_act, encoder_input, encoder_output


class PlainConvSame(nn.Module):
    """A convolution of T samples to ceil(T / stride), for even kernels too."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(c_in, c_out, kernel_size, stride, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C_in, T] to [B, C_out, ceil(T / stride)]."""
        (kernel_size,), (stride,) = self.conv.kernel_size, self.conv.stride
        t = x.shape[-1]
        whole = max(0, (-(-t // stride) - 1) * stride + kernel_size - t)
        return self.conv(F.pad(x, (whole // 2, whole - whole // 2)))


class PlainNet1dBlock(nn.Module):
    """Swish before each of 1x1, grouped k16 and 1x1 convolutions, and squeeze-and-excitation."""

    def __init__(
        self, c_in: int, c_out: int, kernel_size: int, stride: int, group_width: int, first: bool
    ) -> None:
        super().__init__()
        self.first, self.stride, self.widened = first, stride, c_out - c_in
        self.conv1 = PlainConvSame(c_in, c_out, 1)
        self.conv2 = PlainConvSame(c_out, c_out, kernel_size, stride, c_out // group_width)
        self.conv3 = PlainConvSame(c_out, c_out, 1)
        self.se_fc1, self.se_fc2 = nn.Linear(c_out, c_out // 2), nn.Linear(c_out // 2, c_out)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C_in, T] to [B, C_out, ceil(T / stride)]."""
        y = self.conv1(x if self.first else F.silu(x))
        y = self.conv3(F.silu(self.conv2(F.silu(y))))
        gate = torch.sigmoid(self.se_fc2(F.silu(self.se_fc1(y.mean(-1)))))
        y = y * gate[:, :, None]
        if self.stride > 1:
            x = F.max_pool1d(F.pad(x, (0, self.stride - 1)), self.stride)
        before = self.widened // 2
        return y + F.pad(x, (0, 0, before, self.widened - before))


class PlainNet1d(nn.Module):
    """ECGFounder's Net1D in plain torch: Swish, and no batch norm.

    Args:
        leads: L.
        stem_width: of the first convolution, stride 2.
        widths, blocks: of each stage; a stage's first block halves the length.
        kernel_size, group_width: of the grouped convolutions.
    """

    block: type[nn.Module] = PlainNet1dBlock

    def __init__(
        self,
        leads: int = 12,
        widths: Sequence[int] = (64, 160, 160, 400, 400, 1024, 1024),
        blocks: Sequence[int] = (2, 2, 2, 3, 3, 4, 4),
        *,
        stem_width: int = 64,
        kernel_size: int = 16,
        group_width: int = 16,
    ) -> None:
        super().__init__()
        self.leads, self.width = leads, widths[-1]
        self.first_conv = PlainConvSame(leads, stem_width, kernel_size, 2)
        self.stage_list = nn.ModuleList()
        c_in = stem_width
        for index, (c_out, count) in enumerate(zip(widths, blocks, strict=True)):
            stage = nn.Module()
            stage.block_list = nn.ModuleList()
            for number in range(count):
                stride, first = (2 if number == 0 else 1), index == number == 0
                stage.block_list.append(self.block(c_in, c_out, kernel_size, stride, group_width, first))
                c_in = c_out
            self.stage_list.append(stage)

    def forward(self, waveform: Tensor) -> Tensor:
        """waveform [B, L, T] in mV to tokens [B, N, D]."""
        x = F.silu(self.first_conv(waveform))
        for stage in self.stage_list:
            for block in stage.block_list:  # type: ignore[union-attr]
                x = block(x)
        return x.transpose(1, 2)


class Net1dBlock(PlainNet1dBlock):
    """See :class:`PlainNet1dBlock`."""

    def forward(self, x: LazyActivation) -> LazyActivation:  # type: ignore[override]
        """x [B, T, C_in] to [B, ceil(T / stride), C_out]."""
        y = x if self.first else LazyActivation(F.silu(x.values), lengths=x.lengths)
        y = _same(_same(y, self.conv1, "silu"), self.conv2, "silu")
        y = _same(y, self.conv3)
        gate = torch.sigmoid(self.se_fc2(F.silu(self.se_fc1(encoder_output(y).pooled))))
        before = self.widened // 2
        identity = F.pad(self._pooled(x), (before, self.widened - before))
        return LazyActivation(torch.addcmul(identity, y.values, gate[:, None, :]), lengths=y.lengths)

    def _pooled(self, x: LazyActivation) -> Tensor:
        """The shortcut, padded with zeros on the right that take part in the maximum, as published."""
        if self.stride == 1:
            return x.values
        values = fill_past(x.values, x.lengths)
        padded = LazyActivation(F.pad(values, (0, 0, 0, self.stride - 1)))
        return max_pool1d(padded, self.stride, self.stride, 0).values


class Net1d(PlainNet1d):
    """See :class:`PlainNet1d`."""

    block = Net1dBlock

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> EncoderOutput:  # type: ignore[override]
        """waveform [B, L, T] in mV, lengths [B] valid samples of each record (all T where omitted)."""
        x = _same(encoder_input(waveform, lengths, self.leads), self.first_conv, "silu")
        for stage in self.stage_list:
            for block in stage.block_list:  # type: ignore[union-attr]
                x = block(x)
        return encoder_output(x)


def _same(x: LazyActivation, module: PlainConvSame, activation: str | None = None) -> LazyActivation:
    """activation(module(x)). The padding on the left does not depend on the length, unlike the module's."""
    (kernel_size,), (stride,) = module.conv.kernel_size, module.conv.stride
    start = (kernel_size - stride) // 2
    return conv_act(x, module.conv, activation, padding=(start, kernel_size - 1 - start))
