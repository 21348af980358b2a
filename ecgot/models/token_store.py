"""Token embeddings of distinct texts, computed once by a frozen text encoder and cached on disk."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ecgot.errors import EcgotError
from ecgot.files import save_tensors
from ecgot.kernels.lengths import length_mask
from ecgot.models.text_encoder import TextEncoder, TextTokens


class TokenStore:
    """Token embeddings of distinct texts, packed back to back.

    Attributes:
        index: each text's number.
        tokens: [sum of lengths, D] fp16.
        offsets: [texts + 1], where each text's tokens start.
        pooled: [texts, D] fp32.
    """

    def __init__(self, texts: Sequence[str], packed: dict[str, Tensor]) -> None:
        self.index = {text: number for number, text in enumerate(texts)}
        self.tokens = packed["tokens"]
        self.offsets = packed["offsets"]
        self.pooled = packed["pooled"]

    def batch(self, indices: Tensor) -> TextTokens:
        """The texts numbered ``indices`` [b], with tokens [b, M, D] in fp32 padded to the longest text."""
        start, stop = self.offsets[indices], self.offsets[indices + 1]
        mask = length_mask(stop - start, int((stop - start).max()))
        row = (start[:, None] + torch.arange(mask.shape[1])).clamp_max(len(self.tokens) - 1)
        tokens = self.tokens[row].float().masked_fill(~mask[:, :, None], 0.0)
        return TextTokens(tokens, mask, self.pooled[indices])


def embed_texts(
    encoder: TextEncoder,
    texts: Sequence[str],
    *,
    cache_dir: Path | None,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> TokenStore:
    """Embed distinct texts with a frozen encoder, or read them from the cache.

    Args:
        texts: distinct texts.
        cache_dir: folder of the cache; ``None`` turns it off.
        progress: called with (texts done, total texts).
    """
    if not texts:
        raise EcgotError("texts: expected at least one, got none")
    path = None
    if cache_dir is not None:
        key = hashlib.blake2b("\0".join([encoder.fingerprint(), *texts]).encode(), digest_size=16)
        path = cache_dir / f"text-{key.hexdigest()}.safetensors"
        if path.exists():
            try:
                return TokenStore(texts, load_file(path))
            except SafetensorError:
                pass  # damaged: compute it again
    packed = _embed_packed(encoder, texts, batch_size, progress)
    if path is not None:
        save_tensors(packed, path)
    return TokenStore(texts, packed)


@torch.no_grad()
def _embed_packed(
    encoder: TextEncoder,
    texts: Sequence[str],
    batch_size: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Tensor]:
    encoder.eval()
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))  # similar lengths pad less
    tokens: list[Tensor] = [torch.empty(0)] * len(texts)
    pooled: list[Tensor] = [torch.empty(0)] * len(texts)
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        out = encoder([texts[number] for number in numbers])
        for row, number in enumerate(numbers):
            tokens[number] = out.tokens[row, out.mask[row]].half().cpu()
            pooled[number] = out.pooled[row].float().cpu()
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))
    lengths = torch.tensor([0] + [len(t) for t in tokens])
    return {"tokens": torch.cat(tokens), "offsets": lengths.cumsum(0), "pooled": torch.stack(pooled)}
