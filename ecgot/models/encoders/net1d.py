"""Net1D as ECGFounder has it."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ecgot.kernels import Signal, max_pool1d
from ecgot.models.encoders.blocks import EncoderOutput, convolved, entered, left
from ecgot.models.encoders.plain import PlainConvSame, PlainNet1d, PlainNet1dBlock


class Net1dBlock(PlainNet1dBlock):
    def forward(self, x: Signal) -> Signal:  # type: ignore[override]
        y = x if self.first else Signal(F.silu(x.values), lengths=x.lengths)
        y = _same(_same(y, self.conv1, "silu"), self.conv2, "silu")
        y = _same(y, self.conv3)
        gate = torch.sigmoid(self.se_fc2(F.silu(self.se_fc1(left(y).pooled))))
        before = self.widened // 2
        identity = F.pad(self._pooled(x), (before, self.widened - before))
        return Signal(torch.addcmul(identity, y.values, gate[:, None, :]), lengths=y.lengths)

    def _pooled(self, x: Signal) -> Tensor:
        """As published, padded with a 0 at the right end, which takes part in the maximum."""
        if self.stride == 1:
            return x.values
        values = x.values
        if x.lengths is not None:
            inside = torch.arange(values.shape[1], device=values.device) < x.lengths[:, None]
            values = torch.where(inside[:, :, None], values, 0.0)
        padded = Signal(F.pad(values, (0, 0, 0, self.stride - 1)))
        return max_pool1d(padded, self.stride, self.stride, 0).values


class Net1d(PlainNet1d):
    """See :class:`PlainNet1d`."""

    block = Net1dBlock

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> EncoderOutput:  # type: ignore[override]
        """waveform [B, L, T] in mV, lengths [B] valid samples of each record (all T where omitted)."""
        x = _same(entered(waveform, lengths, self.leads), self.first_conv, "silu")
        for stage in self.stage_list:
            for block in stage.block_list:  # type: ignore[union-attr]
                x = block(x)
        return left(x)


def _same(x: Signal, module: PlainConvSame, activation: str | None = None) -> Signal:
    """ceil(T / stride) samples; the padding on the left does not depend on the length."""
    (kernel_size,), (stride,) = module.conv.kernel_size, module.conv.stride
    start = (kernel_size - stride) // 2
    return convolved(x, module.conv, activation, padding=(start, kernel_size - 1 - start))
