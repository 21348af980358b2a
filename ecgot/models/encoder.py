"""ECG encoders: waveform [B, L, T] in mV to tokens [B, N, D], a mask and a pooled embedding.

The residual network is the basic-block ResNet of He et al. 2016 in one dimension, channels-last inside and
built on :func:`ecgot.kernels.conv1d`, which fuses scale, shift, residual and activation at inference.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ecgot.errors import EcgotError
from ecgot.kernels import conv1d


@dataclass
class EncoderOutput:
    """tokens [B, N, D], mask [B, N] (True where a token covers signal), pooled [B, D] (mean of tokens)."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor


class ConvNorm(nn.Module):
    """Convolution, batch norm, optional residual, ReLU; one fused kernel in eval mode.

    Args:
        c_in, c_out, kernel_size, stride: as in ``torch.nn.Conv1d``; the kernel is odd and padded by its half,
            so that T samples become ceil(T / stride).
        activation: apply ReLU at the end.
    """

    def __init__(
        self, c_in: int, c_out: int, kernel_size: int, stride: int = 1, *, activation: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c_out, c_in, kernel_size))
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        # Channels-last activations [B, T, C] are images of height 1 to torch: one view, no copy.
        self.norm = nn.BatchNorm2d(c_out)
        self.stride, self.padding, self.activation = stride, kernel_size // 2, activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [B, T, c_in] (and residual [B, ceil(T / stride), c_out]) to [B, ceil(T / stride), c_out]."""
        if not self.training:
            return self._fused(x, residual)
        y = conv1d(x, self.weight, stride=self.stride, padding=self.padding)
        y = self.norm(y.permute(0, 2, 1).unsqueeze(2)).squeeze(2).permute(0, 2, 1)
        if residual is not None:
            y = y + residual
        return torch.relu(y) if self.activation else y

    def _fused(self, x: Tensor, residual: Tensor | None) -> Tensor:
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        scale = self.norm.weight * torch.rsqrt(self.norm.running_var + self.norm.eps)
        shift = self.norm.bias - self.norm.running_mean * scale
        return conv1d(
            x,
            self.weight,
            stride=self.stride,
            padding=self.padding,
            scale=scale,
            shift=shift,
            residual=residual,
            activation="relu" if self.activation else None,
        )


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut; the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(c_in, c_out, kernel_size, stride)
        self.conv2 = ConvNorm(c_out, c_out, kernel_size)
        nn.init.zeros_(self.conv2.norm.weight)  # a block starts as its shortcut
        self.shortcut = (
            ConvNorm(c_in, c_out, 1, stride, activation=False) if stride != 1 or c_in != c_out else None
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x [B, T, c_in] with its validity [B, T] to [B, ceil(T / stride), c_out] with its own."""
        residual = x if self.shortcut is None else self.shortcut(x)
        mask = _strided(mask, self.conv1.stride)
        y = _masked(self.conv1(x), mask)
        return _masked(self.conv2(y, residual), mask), mask


class ResNet1d(nn.Module):
    """Residual network over an ECG.

    Args:
        leads: L, input channels.
        channels: width of each stage; each stage halves the length.
        blocks: blocks of each stage.
        kernel_size: of the blocks' convolutions, odd.
        stem_kernel_size: of the first convolution, odd, stride 2.

    A record of T samples gives ceil(T / 2 ** (1 + len(channels))) tokens of width channels[-1].
    """

    def __init__(
        self,
        leads: int = 12,
        channels: tuple[int, ...] = (32, 64, 128, 256),
        blocks: tuple[int, ...] = (1, 1, 1, 1),
        kernel_size: int = 5,
        stem_kernel_size: int = 15,
    ) -> None:
        super().__init__()
        self.leads, self.width = leads, channels[-1]
        self.stem = ConvNorm(leads, channels[0], stem_kernel_size, stride=2)
        stages, c_in = [], channels[0]
        for c_out, count in zip(channels, blocks, strict=True):
            for index in range(count):
                stages.append(BasicBlock(c_in, c_out, kernel_size, stride=2 if index == 0 else 1))
                c_in = c_out
        self.blocks = nn.ModuleList(stages)

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> EncoderOutput:
        """waveform [B, L, T] in mV, lengths [B] valid samples of each record (all T where omitted).

        A record padded beyond its length gives what the cropped record gives (in eval mode).
        """
        if waveform.dim() != 3 or waveform.shape[1] != self.leads:
            raise EcgotError(
                f"waveform: got shape {tuple(waveform.shape)}, accepted is [B, {self.leads} leads, T]"
            )
        x = waveform.transpose(1, 2)
        mask = None
        if lengths is not None:
            mask = torch.arange(x.shape[1], device=x.device) < lengths.to(x.device)[:, None]
            x = x.masked_fill(~mask[:, :, None], 0.0)  # not a product: what is padded may be NaN
        mask = _strided(mask, self.stem.stride)
        x = _masked(self.stem(x), mask)
        for block in self.blocks:
            x, mask = block(x, mask)
        if mask is None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return EncoderOutput(x, mask, masked_mean(x, mask))


def masked_mean(tokens: Tensor, mask: Tensor) -> Tensor:
    """Mean [B, D] of tokens [B, N, D] over the N where mask [B, N] is True; 0 where there is none."""
    weight = mask.to(tokens.dtype)
    weight = weight / weight.sum(1, keepdim=True).clamp_min(1)
    return (weight[:, None, :] @ tokens).squeeze(1)


def _strided(mask: Tensor | None, stride: int) -> Tensor | None:
    return mask if mask is None or stride == 1 else mask[:, ::stride]


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask[:, :, None]


ENCODERS: dict[str, Callable[[int], ResNet1d]] = {
    "resnet1d_tiny": lambda leads: ResNet1d(leads, channels=(16, 32, 64, 128)),
    "resnet1d_small": lambda leads: ResNet1d(leads, channels=(32, 64, 128, 256)),
    "resnet1d": lambda leads: ResNet1d(leads, channels=(64, 128, 256, 512), blocks=(2, 2, 2, 2)),
}


def encoder(name: str, *, leads: int = 12) -> ResNet1d:
    """An encoder by name, with random weights.

    Raises:
        EcgotError: the name is unknown.
    """
    if name not in ENCODERS:
        raise EcgotError(f"encoder.name: got {name!r}, accepted are {', '.join(ENCODERS)}")
    return ENCODERS[name](leads)
