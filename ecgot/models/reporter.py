"""Report generation: ECG tokens, through a projector, condition a language model.

Any Hugging Face causal language model or encoder-decoder serves. A causal model reads the projected ECG
tokens as a prefix of its own embeddings; an encoder-decoder reads them as its encoder's input. The report
under training is never part of the condition.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from ecgot.errors import EcgotError, first_line
from ecgot.models.text import quiet_transformers

SCRATCH = "scratch"
IGNORED = -100  # the label that Hugging Face losses leave out


def fit_tokenizer(texts: Sequence[str], *, vocabulary_size: int = 2000) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer fitted on reports; decodes what it encodes up to runs of white space."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=["[PAD]", "[BOS]", "[EOS]", "[UNK]"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        bos_token="[BOS]",
        eos_token="[EOS]",
        unk_token="[UNK]",
        clean_up_tokenization_spaces=False,
    )


class Reporter(nn.Module):
    """A language model that writes a report from ECG tokens.

    Args:
        language_model: a causal or encoder-decoder Hugging Face model.
        tokenizer: its tokenizer.
        ecg_width: D of the ECG tokens.
        max_tokens: longest report, in the tokenizer's tokens.
    """

    def __init__(self, language_model: Any, tokenizer: Any, ecg_width: int, *, max_tokens: int = 96) -> None:
        super().__init__()
        self.language_model, self.tokenizer, self.max_tokens = language_model, tokenizer, max_tokens
        self.is_encoder_decoder: bool = language_model.config.is_encoder_decoder
        if tokenizer.eos_token_id is None:
            raise EcgotError(
                "report.language_model: its tokenizer has no end-of-text token, which reports need"
            )
        # GPT-2 and Llama come without a padding token; its positions are masked, so any token serves.
        self.pad_id: int = (
            tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        )
        self.bos_id: int = (
            tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        )
        width = language_model.get_input_embeddings().embedding_dim
        self.projector = nn.Sequential(
            nn.LayerNorm(ecg_width), nn.Linear(ecg_width, width), nn.GELU(), nn.Linear(width, width)
        )
        # Models differ in what they take; logits of the ECG's own positions would be computed for nothing.
        self._takes = inspect.signature(language_model.forward).parameters.keys()

    def forward(self, tokens: Tensor, mask: Tensor, reports: Sequence[str]) -> Tensor:
        """Mean cross-entropy per report token of B reports, given ECG tokens [B, N, D] and mask [B, N]."""
        labels = self._labels(reports).to(tokens.device)
        prefix = self._condition(tokens)
        if self.is_encoder_decoder:
            return self.language_model(inputs_embeds=prefix, attention_mask=mask.long(), labels=labels).loss
        inputs = labels.masked_fill(labels == IGNORED, self.pad_id)
        start = torch.full_like(inputs[:, :1], self.bos_id)
        embedded = self.language_model.get_input_embeddings()(torch.cat([start, inputs], 1))
        written = torch.cat([torch.ones_like(start), (labels != IGNORED).long()], 1)
        attention = torch.cat([mask.long(), written], 1)
        optional = {"position_ids": _positions(attention), "logits_to_keep": embedded.shape[1]}
        kept = embedded.shape[1] if "logits_to_keep" in self._takes else attention.shape[1]
        silent = torch.full((len(labels), kept - labels.shape[1]), IGNORED, device=labels.device)
        return self.language_model(
            inputs_embeds=torch.cat([prefix, embedded], 1),
            attention_mask=attention,
            labels=torch.cat([silent, labels], 1),
            **{name: value for name, value in optional.items() if name in self._takes},
        ).loss

    @torch.no_grad()
    def generate(self, tokens: Tensor, mask: Tensor, *, num_beams: int = 1) -> list[str]:
        """Reports of B ECGs, greedy or by beam search; a record's report does not depend on its batch."""
        prefix, attention = self._condition(tokens), mask.long()
        if not self.is_encoder_decoder:
            start = torch.full((len(tokens), 1), self.bos_id, device=tokens.device)
            prefix = torch.cat([prefix, self.language_model.get_input_embeddings()(start)], 1)
            attention = torch.cat([attention, torch.ones_like(start)], 1)
        config = GenerationConfig(
            max_new_tokens=self.max_tokens,
            num_beams=num_beams,
            do_sample=False,
            pad_token_id=self.pad_id,
            bos_token_id=self.bos_id,
            eos_token_id=self.tokenizer.eos_token_id,
            decoder_start_token_id=getattr(self.language_model.config, "decoder_start_token_id", None),
        )
        written = self.language_model.generate(
            inputs_embeds=prefix, attention_mask=attention, generation_config=config
        )
        return [text.strip() for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)]

    def _condition(self, tokens: Tensor) -> Tensor:
        return self.projector(tokens).to(self.language_model.get_input_embeddings().weight.dtype)

    def _tokenized(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _labels(self, reports: Sequence[str]) -> Tensor:
        """Report tokens [B, S], each ended by the end-of-text token and padded with IGNORED."""
        rows = [
            [*self._tokenized(text)[: self.max_tokens - 1], self.tokenizer.eos_token_id] for text in reports
        ]
        longest = max(map(len, rows))
        return torch.tensor([row + [IGNORED] * (longest - len(row)) for row in rows])


def build_reporter(
    name: str,
    ecg_width: int,
    *,
    reports: Sequence[str],
    max_tokens: int = 96,
    hidden_size: int = 192,
    layers: int = 3,
) -> Reporter:
    """A reporter on a language model by name.

    Args:
        name: "scratch" (a small Llama-style decoder with random weights and a tokenizer fitted on
            ``reports``), a folder, or a name on the Hugging Face hub; causal or encoder-decoder.
        ecg_width: D of the ECG tokens.
        reports: the training reports.
        hidden_size, layers: of the decoder from scratch; the hidden size is even.

    Raises:
        EcgotError: the model cannot be had.
    """
    if name == SCRATCH:
        tokenizer = fit_tokenizer(reports)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=_heads(hidden_size),
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        return Reporter(AutoModelForCausalLM.from_config(config), tokenizer, ecg_width, max_tokens=max_tokens)
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(name)
            auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            model, words = auto.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise _unknown_language_model(name, error) from error
    return Reporter(model, words, ecg_width, max_tokens=max_tokens)


def _heads(hidden_size: int) -> int:
    """Attention heads of about 48 channels; of an even number, as rotary positions turn pairs."""
    return next(heads for heads in range(max(1, hidden_size // 48), 0, -1) if hidden_size % (2 * heads) == 0)


def check_language_model(name: str) -> None:
    """Raise EcgotError where :func:`build_reporter` would not find ``name``; loads no weights."""
    if name == SCRATCH:
        return
    with quiet_transformers():
        try:
            AutoConfig.from_pretrained(name)
            AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise _unknown_language_model(name, error) from error


def _unknown_language_model(name: str, error: Exception) -> EcgotError:
    return EcgotError(
        f"report.language_model: got {name!r}, which does not load ({first_line(error)}); "
        f"accepted are {SCRATCH!r}, a folder, or a name on the Hugging Face hub"
    )


def save_language_model_shape(reporter: Reporter, folder: Path) -> None:
    """Configuration and tokenizer, all that :func:`empty_reporter` needs beside the weights."""
    reporter.language_model.config.save_pretrained(folder)
    reporter.tokenizer.save_pretrained(folder)


def empty_reporter(folder: Path, ecg_width: int, *, max_tokens: int) -> Reporter:
    """A reporter as saved in ``folder``, with random weights; reads nothing else and needs no network."""
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise EcgotError(f"run: {folder} does not hold a language model ({first_line(error)})") from error
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return Reporter(auto.from_config(config), tokenizer, ecg_width, max_tokens=max_tokens)


def _positions(attention: Tensor) -> Tensor:
    """Positions that count attended tokens alone, as ``generate`` counts them."""
    return (attention.cumsum(1) - 1).clamp_min(0)
