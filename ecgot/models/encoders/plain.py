"""The encoders in plain torch, channels-first: modules, parameter names and initialisation as published.

The fused encoders inherit the modules from here and replace ``forward`` alone, so that state dicts are the
same. Those of this file are for tests and for the baseline of the benchmarks: ``forward`` takes a waveform
[B, L, T] and returns tokens [B, N, D].
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# --- residual networks --------------------------------------------------------------------------------------


def _conv(c_in: int, c_out: int, kernel_size: int, stride: int = 1) -> nn.Conv1d:
    return nn.Conv1d(c_in, c_out, kernel_size, stride, padding=(kernel_size - 1) // 2, bias=False)


def _shortcut(c_in: int, c_out: int, stride: int) -> nn.Sequential:
    """Nothing, or a 1x1 convolution where the shape changes."""
    if stride == 1 and c_in == c_out:
        return nn.Sequential()
    return nn.Sequential(_conv(c_in, c_out, 1, stride), nn.BatchNorm1d(c_out))


class PlainBasicBlock(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, c_in: int, c_out: int, kernel_sizes: tuple[int, int], stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(c_in, c_out, kernel_sizes[0], stride), nn.BatchNorm1d(c_out)
        self.conv2, self.bn2 = _conv(c_out, c_out, kernel_sizes[1]), nn.BatchNorm1d(c_out)
        self.shortcut = _shortcut(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


class PlainBottleneck(nn.Module):
    """1x1 to a quarter of the width, a convolution there, 1x1 back, and a shortcut."""

    def __init__(self, c_in: int, c_out: int, kernel_sizes: tuple[int, int], stride: int) -> None:
        super().__init__()
        middle = c_out // 4
        self.conv1, self.bn1 = _conv(c_in, middle, 1), nn.BatchNorm1d(middle)
        self.conv2, self.bn2 = _conv(middle, middle, kernel_sizes[0], stride), nn.BatchNorm1d(middle)
        self.conv3, self.bn3 = _conv(middle, c_out, 1), nn.BatchNorm1d(c_out)
        self.shortcut = _shortcut(c_in, c_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x), inplace=True)


class PlainResNet1d(nn.Module):
    """He et al. 2016 in one dimension, without a pooling after the stem.

    Args:
        leads: L, input channels.
        widths: output channels of each stage.
        blocks: blocks of each stage.
        bottleneck: 1x1, k, 1x1 blocks in place of basic ones.
        kernel_sizes: of a basic block's two convolutions; the first is a bottleneck's.
        stem_width, stem_kernel_size, stem_stride: of the first convolution; its width is the first stage's
            unless given.
        strides: of each stage's first block; 1 and then 2 unless given.
        he_init: weights after He et al. 2015 (fan out), and every block starts as its shortcut: its last
            batch norm's weight is 0. Otherwise torch's defaults, as MERL and the benchmark have it.
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
        self.conv1, self.bn1 = _conv(leads, c_in, stem_kernel_size, stem_stride), nn.BatchNorm1d(c_in)
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
        x = F.relu(self.bn1(self.conv1(waveform)), inplace=True)
        for index in range(self.depth):
            x = getattr(self, f"layer{index + 1}")(x)
        return x.transpose(1, 2)


# --- xresnet1d ----------------------------------------------------------------------------------------------


class PlainConvLayer(nn.Sequential):
    """fastai's: convolution, batch norm, and ReLU where asked for."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int, stride: int = 1, relu: bool = True) -> None:
        conv = _conv(c_in, c_out, kernel_size, stride)
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
        return F.relu(self.convs(x) + self.idpath(x), inplace=True)


class PlainXResNet1d(nn.Sequential):
    """xresnet1d of the PTB-XL benchmark (Strodthoff et al. 2021; helme/ecg_ptbxl_benchmarking), without its
    head.

    Every stage has the same width, and a bottleneck a quarter of it.
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
        return super().forward(waveform).transpose(1, 2)


# --- inception1d --------------------------------------------------------------------------------------------


class PlainInceptionBlock(nn.Module):
    """Convolutions of three lengths and a pooled one side by side, over a bottleneck."""

    def __init__(self, c_in: int, filters: int, kernel_sizes: Sequence[int], bottleneck: int) -> None:
        super().__init__()
        self.bottleneck = _conv(c_in, bottleneck, 1)
        self.convs = nn.ModuleList([_conv(bottleneck, filters, k) for k in kernel_sizes])
        self.conv_bottle = nn.Sequential(nn.MaxPool1d(3, 1, padding=1), _conv(c_in, filters, 1))
        self.bn_relu = nn.Sequential(nn.BatchNorm1d((len(kernel_sizes) + 1) * filters), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        narrow = self.bottleneck(x)
        return self.bn_relu(torch.cat([*(conv(narrow) for conv in self.convs), self.conv_bottle(x)], dim=1))


class PlainInceptionShortcut(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv, self.bn = _conv(c_in, c_out, 1), nn.BatchNorm1d(c_out)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(y + self.bn(self.conv(x)), inplace=True)


class PlainInception1d(nn.Module):
    """inception1d of the PTB-XL benchmark (after InceptionTime, Fawaz et al. 2020), without its head.

    depth blocks at the input's length, a shortcut over every three.
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
        x = before = waveform
        for index, block in enumerate(self.im):
            x = block(x)
            if index % 3 == 2:
                x = before = self.sk[index // 3](before, x)
        return x.transpose(1, 2)


# --- vit1d --------------------------------------------------------------------------------------------------


class PlainPreNorm(nn.Module):
    def __init__(self, width: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(width), fn

    def forward(self, x: Tensor, *mask: Tensor | None) -> Tensor:
        return self.fn(self.norm(x), *mask)


class PlainFeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        # The published network has dropouts of rate 0 at positions 2 and 4.
        self.net = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, width), nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class PlainAttention(nn.Module):
    """Multi-head self-attention, heads of 64 dimensions."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * 64 * heads)
        self.to_out = nn.Sequential(nn.Linear(64 * heads, width), nn.Identity())

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, N, D], mask [B, N], True where a token may be attended to."""
        q, k, v = self.to_qkv(x).unflatten(2, (3, self.heads, 64)).permute(2, 0, 3, 1, 4)
        allowed = None if mask is None else mask[:, None, None, :]
        y = F.scaled_dot_product_attention(q, k, v, allowed)
        return self.to_out(y.transpose(1, 2).flatten(2))


class PlainTransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = PlainPreNorm(width, PlainAttention(width, heads))
        self.ff = PlainPreNorm(width, PlainFeedForward(width, 4 * width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.attn(x, mask) + x
        return self.ff(x) + x


class PlainViT1d(nn.Module):
    """The vision transformer of MERL (Liu et al. 2024; cheliu-computation/MERL-ICML2024) over patches of an
    ECG.

    Args:
        leads: L.
        width, depth, heads: of the transformer; an attention head has 64 dimensions.
        patch_size: samples of a token.
        seq_len: the longest record, samples; shorter ones take the first of its positions.
    """

    def __init__(
        self,
        leads: int = 12,
        width: int = 192,
        depth: int = 12,
        heads: int = 3,
        *,
        patch_size: int = 50,
        seq_len: int = 5000,
    ) -> None:
        super().__init__()
        self.leads, self.width, self.depth, self.patch_size = leads, width, depth, patch_size
        self.to_patch_embedding = nn.Conv1d(leads, width, patch_size, patch_size, bias=False)
        self.pos_embedding = nn.Parameter(torch.randn(1, seq_len // patch_size, width))
        for index in range(depth):
            setattr(self, f"block{index}", PlainTransformerBlock(width, heads))
        self.norm = nn.LayerNorm(width)

    def forward(self, waveform: Tensor) -> Tensor:
        x = self.to_patch_embedding(waveform).transpose(1, 2)
        x = x + self.pos_embedding[:, : x.shape[1]]
        for index in range(self.depth):
            x = getattr(self, f"block{index}")(x)
        return self.norm(x)


# --- net1d --------------------------------------------------------------------------------------------------


class PlainConvSame(nn.Module):
    """A convolution that makes T samples ceil(T / stride), for even kernels too."""

    def __init__(self, c_in: int, c_out: int, kernel_size: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(c_in, c_out, kernel_size, stride, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
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
        y = self.conv1(x if self.first else F.silu(x))
        y = self.conv3(F.silu(self.conv2(F.silu(y))))
        gate = torch.sigmoid(self.se_fc2(F.silu(self.se_fc1(y.mean(-1)))))
        y = y * gate[:, :, None]
        if self.stride > 1:
            x = F.max_pool1d(F.pad(x, (0, self.stride - 1)), self.stride)
        before = self.widened // 2
        return y + F.pad(x, (0, 0, before, self.widened - before))


class PlainNet1d(nn.Module):
    """Net1D (Hong et al. 2020; hsd1503/resnet1d) as ECGFounder has it (Li et al. 2024): Swish, no batch norm.

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
        x = F.silu(self.first_conv(waveform))
        for stage in self.stage_list:
            for block in stage.block_list:  # type: ignore[union-attr]
                x = block(x)
        return x.transpose(1, 2)
