"""A vision transformer over patches of an ECG, in plain torch and fused.

Source: Liu et al. 2024, "Zero-Shot ECG Classification with Multimodal Learning and Test-time Clinical
Knowledge Enhancement" (MERL), and its repository cheliu-computation/MERL-ICML2024; after Dosovitskiy et al.
2021.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ecgot.errors import EcgotError
from ecgot.kernels.lengths import length_mask
from ecgot.models.encoders.layers import EncoderOutput, conv_act, encoder_input, masked_mean


class PlainPreNorm(nn.Module):
    """A layer norm before a module."""

    def __init__(self, width: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(width), fn

    def forward(self, x: Tensor, *mask: Tensor | None) -> Tensor:
        """x [B, N, D]; a mask goes on to the module."""
        return self.fn(self.norm(x), *mask)


class PlainFeedForward(nn.Module):
    """Two linear layers with GELU between, D to ``hidden`` and back."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        # The published network has dropouts of rate 0 at positions 2 and 4.
        self.net = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, width), nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [B, N, D]."""
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
    """Self-attention and a feed-forward network, each behind a norm and with a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = PlainPreNorm(width, PlainAttention(width, heads))
        self.ff = PlainPreNorm(width, PlainFeedForward(width, 4 * width))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, N, D], mask [B, N], True where a token may be attended to."""
        x = self.attn(x, mask) + x
        return self.ff(x) + x


class PlainViT1d(nn.Module):
    """MERL's vision transformer in plain torch.

    Args:
        leads: L.
        width, depth, heads: of the transformer; an attention head has 64 dimensions.
        patch_size: samples of a token.
        seq_len: samples of the longest record; shorter ones take the first positions.
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
        """waveform [B, L, T] in mV to tokens [B, N, D]."""
        x = self.to_patch_embedding(waveform).transpose(1, 2)
        x = x + self.pos_embedding[:, : x.shape[1]]
        for index in range(self.depth):
            x = getattr(self, f"block{index}")(x)
        return self.norm(x)


class ViT1d(PlainViT1d):
    """See :class:`PlainViT1d`. Every token is normed; pooled is the norm of their mean, as published."""

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> EncoderOutput:  # type: ignore[override]
        """waveform [B, L, T] in mV, lengths [B] valid samples of each record (all T where omitted).

        Raises:
            EcgotError: the record is longer than the positions, or shorter than a patch.
        """
        signal = encoder_input(waveform, lengths, self.leads)
        longest = self.pos_embedding.shape[1] * self.patch_size
        if not self.patch_size <= waveform.shape[2] <= longest:
            raise EcgotError(
                f"waveform: expected T of {self.patch_size} to {longest}, got {waveform.shape[2]}"
            )
        patches = conv_act(signal, self.to_patch_embedding)
        x = patches.values
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if patches.lengths is not None:
            mask = length_mask(patches.lengths, x.shape[1])
        # A record shorter than a patch attends to its padding, so that nothing is NaN; its mask stays empty.
        attended = None if patches.lengths is None else mask | ~mask.any(1, keepdim=True)
        x = x + self.pos_embedding[:, : x.shape[1]]
        for index in range(self.depth):
            x = getattr(self, f"block{index}")(x, attended)
        tokens = torch.where(mask[:, :, None], self.norm(x), 0.0)
        return EncoderOutput(tokens, mask, self.norm(masked_mean(x, mask)))
