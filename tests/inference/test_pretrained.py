"""The model that comes with the package: small, offline, without a text encoder."""

import json
from pathlib import Path

import pytest
import torch

import ecgot
from ecgot.choices import GROUPS
from ecgot.data.ptbxl import read_table
from ecgot.eval.evaluate import evaluate
from ecgot.inference.zeroshot import read_prompts
from ecgot.models.encoders import Encoder, fuse_norms
from ecgot.runs.run import PRETRAINED, Run

MAX_BYTES = 20 * 10**6


@pytest.fixture
def without_text_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_arguments: object, **_settings: object) -> None:
        raise AssertionError("a text encoder was loaded")

    monkeypatch.setattr("ecgot.models.text_encoder.TextEncoder", absent)
    monkeypatch.setattr("ecgot.eval.evaluate.TextEncoder", absent)


def test_it_is_small_and_says_what_it_is() -> None:
    assert sum(path.stat().st_size for path in PRETRAINED.rglob("*") if path.is_file()) <= MAX_BYTES
    card = " ".join((PRETRAINED / "README.md").read_text(encoding="utf-8").split())
    for part in (
        "not a medical device",
        "CC BY 4.0",
        "Wagner",
        "Limits",
        "superclass",
    ):
        assert part in card
    config = json.loads((PRETRAINED / "config.json").read_text(encoding="utf-8"))
    assert config["data"]["root"] == config["data"]["reports_csv"] == ""
    assert config["data"]["train_folds"] == list(range(1, 9))


def test_it_reads_a_record(few: Path, without_text_encoder: None) -> None:
    reader = ecgot.EcgReader.from_pretrained()
    table = read_table(few)
    reading = reader(few / table.record_paths[0], force=True)
    prompts = read_prompts()
    assert {group: set(scores) for group, scores in reading.scores.items()} == {
        group: set(prompts[group]) for group in GROUPS
    }
    assert reading.report


def test_its_norms_are_fused_once_and_its_encoder_stays_as_trained(
    few: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused: list[Encoder] = []

    def noting(encoder: Encoder) -> Encoder:
        fused.append(fuse_norms(encoder))
        return fused[-1]

    monkeypatch.setattr("ecgot.inference.scorers.fuse_norms", noting)
    reader = ecgot.EcgReader.from_pretrained()
    for path in read_table(few).record_paths[:2]:
        reader(few / path)
    (copy,) = fused
    waveform = torch.randn(1, 12, 1000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reader.scorer.model.encoder(waveform)
        torch.testing.assert_close(copy(waveform).tokens, expected.tokens, atol=1e-4, rtol=1e-4)
        reader.scorer.model.encoder.train()(waveform)  # which leaves the copy alone
        torch.testing.assert_close(copy(waveform).tokens, expected.tokens, atol=1e-4, rtol=1e-4)


def test_it_knows_synthetic_fibrillation_and_blocks(
    few: Path, cache_dir: Path, without_text_encoder: None
) -> None:
    """Far from what it was trained on, and yet well above chance where the signal is plain."""
    evaluation = evaluate(
        Run.open(PRETRAINED), few, folds=(9, 10), num_beams=1, cache_dir=cache_dir, resamples=10
    )
    assert evaluation.zero_shot["rhythm"].auroc["AFIB"] > 0.8
    assert evaluation.zero_shot["superclass"].auroc["CD"] > 0.7


def test_it_is_as_good_as_its_card_on_real_records(
    ptbxl: Path, cache_dir: Path, without_text_encoder: None
) -> None:
    """On the few records of fold 9 at hand, which it was not trained on; their values spread more."""
    evaluation = evaluate(Run.open(PRETRAINED), ptbxl, num_beams=1, cache_dir=cache_dir, resamples=10)
    assert evaluation.zero_shot["superclass"].macro > 0.89
    assert evaluation.zero_shot["subclass"].macro > 0.83
    assert evaluation.zero_shot["rhythm"].macro > 0.93
    found, shuffled = (
        evaluation.reports[system]["label_f1_superclass"]["value"] for system in ("generated", "shuffled")
    )
    assert found > 0.55
    assert shuffled < found / 2
