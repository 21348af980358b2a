"""Report generation: ECG tokens, through a projector, condition a language model.

Any Hugging Face causal language model or encoder-decoder works. A causal model gets the projected ECG tokens
as a prefix of input embeddings, an encoder-decoder as its encoder's input. During training the report is
never part of that condition.

A pretrained model is either trained whole, or frozen and trained with low-rank adapters (LoRA).
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from ecgot.choices import BEAMS
from ecgot.errors import EcgotError
from ecgot.models.writer import Writer, WrittenReport, with_sentences

IGNORED = -100  # label that Hugging Face losses ignore


class Reporter(Writer):
    """A language model that writes a report from ECG tokens.

    Args:
        language_model: a causal or encoder-decoder Hugging Face model.
        tokenizer: its tokenizer.
        ecg_width: D, width of the ECG tokens.
        max_tokens: maximum report length in the tokenizer's tokens.
        recorders: names with an embedding; all others are unknown. Empty: no conditioning on recorders.

    Raises:
        EcgotError: the tokenizer has no end-of-text token.
    """

    def __init__(
        self,
        language_model: Any,
        tokenizer: Any,
        ecg_width: int,
        *,
        max_tokens: int = 96,
        recorders: Sequence[str] = (),
    ) -> None:
        width = language_model.get_input_embeddings().embedding_dim
        super().__init__(ecg_width, width, recorders)
        self.language_model, self.tokenizer, self.max_tokens = language_model, tokenizer, max_tokens
        self.is_encoder_decoder: bool = language_model.config.is_encoder_decoder
        eos_id = self.eos_id = end_of_text(tokenizer)
        # GPT-2 and Llama have no padding token; padding is masked, so any token will do.
        self.pad_id: int = _first(tokenizer.pad_token_id, eos_id)  # type: ignore[assignment]
        self.bos_id: int = _first(  # type: ignore[assignment]
            tokenizer.bos_token_id, tokenizer.cls_token_id, eos_id
        )
        # Drop a published model's generation settings, such as a minimum length, which suit other texts.
        language_model.generation_config = GenerationConfig()
        # Arguments differ between models. "logits_to_keep" avoids computing logits at the ECG's positions.
        self._takes = frozenset(inspect.signature(language_model.forward).parameters)

    def forward(
        self, tokens: Tensor, mask: Tensor, reports: Sequence[str], *, recorders: Sequence[str] | None = None
    ) -> Tensor:
        """Mean cross-entropy per report token of B reports, given ECG tokens [B, N, D] and mask [B, N].

        Args:
            recorders: names of the B recorders, "" if unknown; None: all unknown.
        """
        labels = self._labels(reports).to(tokens.device)
        return self._language_model_output(*self._condition(tokens, mask, recorders), labels).loss

    def _language_model_output(self, prefix: Tensor, mask: Tensor, labels: Tensor) -> Any:
        """Hugging Face's output for labels [B, S] after a prefix [B, P, W] with mask [B, P].

        The logits of a causal model stand one position before their labels.
        """
        if self.is_encoder_decoder:
            return self.language_model(inputs_embeds=prefix, attention_mask=mask, labels=labels)
        inputs = labels.masked_fill(labels == IGNORED, self.pad_id)
        start = torch.full_like(inputs[:, :1], self.bos_id)
        embedded = self.language_model.get_input_embeddings()(torch.cat([start, inputs], 1))
        written = torch.cat([torch.ones_like(start), (labels != IGNORED).long()], 1)
        attention = torch.cat([mask, written], 1)
        optional = {"position_ids": _positions(attention), "logits_to_keep": embedded.shape[1]}
        kept = embedded.shape[1] if "logits_to_keep" in self._takes else attention.shape[1]
        silent = torch.full((len(labels), kept - labels.shape[1]), IGNORED, device=labels.device)
        return self.language_model(
            inputs_embeds=torch.cat([prefix, embedded], 1),
            attention_mask=attention,
            labels=torch.cat([silent, labels], 1),
            **{name: value for name, value in optional.items() if name in self._takes},
        )

    @torch.no_grad()
    def write(
        self,
        tokens: Tensor,
        mask: Tensor,
        *,
        recorders: Sequence[str] | None = None,
        num_beams: int = BEAMS,
    ) -> list[WrittenReport]:
        """See :meth:`Writer.write`."""
        prefix, attention = self._condition(tokens, mask, recorders)
        reports = self.search(prefix, attention, num_beams)
        labels = self._labels(reports, whole=True).to(tokens.device)
        logits = self._language_model_output(prefix, attention, labels).logits
        # A causal model's logits are one position ahead of their tokens; an encoder-decoder's are aligned.
        count = labels.shape[1]
        logits = logits[:, -count:] if self.is_encoder_decoder else logits[:, -count - 1 : -1]
        chosen = labels.clamp_min(0)[:, :, None]
        log_probability = logits.float().log_softmax(-1).gather(2, chosen).squeeze(2).cpu()
        return [
            with_sentences(report, self._token_spans(report), row)
            for report, row in zip(reports, log_probability, strict=True)
        ]

    def _token_spans(self, text: str) -> list[tuple[int, int]]:
        """Start and end of each token in the text, in characters."""
        if self.tokenizer.is_fast:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            return encoded.offset_mapping
        # No offsets, as with byte tokenizers: decode ever longer prefixes.
        ids = self._tokenized(text)
        ends = [len(self.tokenizer.decode(ids[: count + 1])) for count in range(len(ids))]
        return list(zip([0, *ends], ends, strict=False))

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        mask: Tensor,
        *,
        recorders: Sequence[str] | None = None,
        num_beams: int = BEAMS,
    ) -> list[str]:
        """Write reports of B ECGs by beam search, which is greedy with one beam.

        A record's report does not depend on the rest of its batch. For ``recorders`` see :meth:`forward`.
        """
        return self.search(*self._condition(tokens, mask, recorders), num_beams)

    def search(self, prefix: Tensor, attention: Tensor, num_beams: int) -> list[str]:
        """The best reports found by beam search after a prefix [B, P, W] with mask [B, P]."""
        if not self.is_encoder_decoder:
            start = torch.full((len(prefix), 1), self.bos_id, device=prefix.device)
            prefix = torch.cat([prefix, self.language_model.get_input_embeddings()(start)], 1)
            attention = torch.cat([attention, torch.ones_like(start)], 1)
        config = GenerationConfig(
            max_new_tokens=self.max_tokens,
            num_beams=num_beams,
            do_sample=False,
            pad_token_id=self.pad_id,
            bos_token_id=self.bos_id,
            eos_token_id=self.eos_id,
            decoder_start_token_id=getattr(self.language_model.config, "decoder_start_token_id", None),
        )
        written = self.language_model.generate(
            inputs_embeds=prefix, attention_mask=attention, generation_config=config
        )
        return [text.strip() for text in self.tokenizer.batch_decode(written, skip_special_tokens=True)]

    def _condition(
        self, tokens: Tensor, mask: Tensor, recorders: Sequence[str] | None
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`condition`, in the language model's dtype."""
        prefix, mask = self.condition(tokens, mask, recorders)
        return prefix.to(self.language_model.get_input_embeddings().weight.dtype), mask

    def _tokenized(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _labels(self, reports: Sequence[str], *, whole: bool = False) -> Tensor:
        """Report tokens [B, S], each followed by the end-of-text token and padded with IGNORED.

        Reports are truncated to ``max_tokens`` unless ``whole``.
        """
        longest_text = None if whole else self.max_tokens - 1
        rows = [[*self._tokenized(text)[:longest_text], self.eos_id] for text in reports]
        longest = max(map(len, rows))
        return torch.tensor([row + [IGNORED] * (longest - len(row)) for row in rows])


def end_of_text(tokenizer: Any) -> int:
    """The id of the end-of-text token; for BERT, that of [SEP].

    Raises:
        EcgotError: the tokenizer has none.
    """
    token = _first(tokenizer.eos_token_id, tokenizer.sep_token_id)
    if token is None:
        raise EcgotError(
            "report.language_model: expected a tokenizer with an end-of-text token, got one without"
        )
    return token


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _positions(attention: Tensor) -> Tensor:
    """Position ids that count only attended tokens, as ``generate`` does."""
    return (attention.cumsum(1) - 1).clamp_min(0)
