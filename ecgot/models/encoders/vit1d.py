"""A vision transformer over patches of an ECG, as MERL's."""

import torch
from torch import Tensor

from ecgot.errors import EcgotError
from ecgot.models.encoders.blocks import EncoderOutput, convolved, entered, masked_mean
from ecgot.models.encoders.plain import PlainViT1d


class ViT1d(PlainViT1d):
    """See :class:`PlainViT1d`. Tokens are normed each; pooled is the norm of their mean, as published."""

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> EncoderOutput:  # type: ignore[override]
        """waveform [B, L, T] in mV, lengths [B] valid samples of each record (all T where omitted).

        Raises:
            EcgotError: the record is longer than the positions, or shorter than a patch.
        """
        signal = entered(waveform, lengths, self.leads)
        longest = self.pos_embedding.shape[1] * self.patch_size
        if not self.patch_size <= waveform.shape[2] <= longest:
            raise EcgotError(
                f"waveform: got T = {waveform.shape[2]}, accepted are {self.patch_size} to {longest}"
            )
        patches = convolved(signal, self.to_patch_embedding)
        x = patches.values
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if patches.lengths is not None:
            mask = torch.arange(x.shape[1], device=x.device) < patches.lengths[:, None]
        # A record without a whole patch attends to its padding, so that nothing is NaN; its mask stays empty.
        attended = None if patches.lengths is None else mask | ~mask.any(1, keepdim=True)
        x = x + self.pos_embedding[:, : x.shape[1]]
        for index in range(self.depth):
            x = getattr(self, f"block{index}")(x, attended)
        tokens = torch.where(mask[:, :, None], self.norm(x), 0.0)
        return EncoderOutput(tokens, mask, self.norm(masked_mean(x, mask)))
