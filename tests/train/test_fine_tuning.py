"""Training that goes on from another run: whose weights and words it takes, and what does not fit."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from ecgot.cli.main import cli
from ecgot.data.synth import write_dataset
from ecgot.errors import EcgotError
from ecgot.models.language_models import build_reporter
from ecgot.runs.checkpoints import load_alignment, load_reporter
from ecgot.runs.config import Config, fine_tuning, resolve
from ecgot.runs.progress import Progress
from ecgot.runs.run import PRETRAINED, Run
from ecgot.train import report as report_module
from ecgot.train.stages import train
from tests.conftest import small_settings

STILL = ("align.learning_rate=1e-9", "report.learning_rate=1e-9", "align.average=0")
QUICK = ("align.epochs=1", "report.epochs=1", "align.phrase_min_count=2")


@pytest.fixture(scope="module")
def start(few, tiny_bert, cache_dir, tmp_path_factory) -> Run:
    """A run with both stages; do not write into it."""
    config = resolve(None, [*small_settings(few, tiny_bert), "align.epochs=1"])
    return train(config, tmp_path_factory.mktemp("start") / "run", cache_dir=cache_dir)


@pytest.fixture(scope="module")
def mine(tmp_path_factory) -> Path:
    """60 records without folds and codes, with recorders, and with words that the start never read."""
    folder = tmp_path_factory.mktemp("mine") / "data"
    write_dataset(folder, records=60, seed=5)
    (folder / "scp_statements.csv").unlink()
    table = pd.read_csv(folder / "ptbxl_database.csv", dtype=str)
    table = table.drop(columns=["scp_codes", "strat_fold"])
    table = table.assign(report="zigzag trace. " + table["report"], device=["NEW  1"] * 50 + ["RARE"] * 10)
    table.to_csv(folder / "ptbxl_database.csv", index=False)
    return folder


def settings(start: Run, data: Path, *more: str) -> Config:
    return resolve(None, [f"data.root={data}", *QUICK, *more], base=fine_tuning(start.config(), start.name))


def weights(run: Run, stage: str) -> dict[str, torch.Tensor]:
    return load_file(run.folder / f"{stage}.safetensors")


def test_both_stages_begin_with_the_weights_and_the_words_of_the_start(start, mine, tmp_path, cache_dir):
    run = train(settings(start, mine, *STILL), tmp_path / "run", cache_dir=cache_dir)
    for stage in ("align", "report"):
        before, after = weights(start, stage), weights(run, stage)
        assert before.keys() == after.keys() - {"recorder_embedding.weight"}
        for name, tensor in before.items():
            if "running" not in name and "num_batches" not in name:  # norms see the data at any rate
                torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=1e-6, msg=name)
    for name in ("tokenizer.json", "config.json"):
        first, second = (each.folder / "language_model" / name for each in (start, run))
        assert json.loads(first.read_text()) == json.loads(second.read_text())
    assert run.recorders == ("NEW 1",)


def test_training_goes_on_from_there_and_the_result_can_be_read_with(start, mine, tmp_path, cache_dir):
    run = train(settings(start, mine), tmp_path / "run", cache_dir=cache_dir)
    for stage, name in (("align", "project_ecg.weight"), ("report", "projector.1.weight")):
        moved = (weights(run, stage)[name] - weights(start, stage)[name]).abs().max()
        assert 1e-5 < moved < 0.02
    model = load_alignment(run, None)
    reporter = load_reporter(run, model.ecg_width)
    assert reporter.recorders == ("NEW 1",)
    encoded = model.encoder(torch.randn(1, 12, 1000))
    assert isinstance(reporter.write(encoded.tokens, encoded.mask, recorders=["NEW 1"])[0].text, str)


def test_the_prior_of_phrases_is_kept(start, mine, tmp_path, cache_dir):
    run = train(settings(start, mine, *STILL), tmp_path / "run", stages=["align"], cache_dir=cache_dir)
    name = "phrase_prior.2.bias"
    torch.testing.assert_close(weights(run, "align")[name], weights(start, "align")[name], atol=1e-6, rtol=0)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stage", ["align", "report"])
def test_an_interrupted_fine_tuning_resumes_to_the_same_weights(
    start, mine, tmp_path, cache_dir, monkeypatch, stage
):
    config = settings(start, mine, "align.epochs=2", "report.epochs=2")
    expected = train(config, tmp_path / "whole", cache_dir=cache_dir)

    def note(line: str) -> None:
        if line.startswith(f"{stage}: epoch 2"):
            raise Stopped

    copy = tmp_path / "start"
    shutil.copytree(start.folder, copy)
    config = settings(Run(copy), mine, "align.epochs=2", "report.epochs=2")
    with pytest.raises(Stopped):
        train(config, tmp_path / "cut", cache_dir=cache_dir, progress=Progress(note=note))
    if stage == "report":
        shutil.rmtree(copy)  # what has begun needs its start no more
    resumed = train(config, tmp_path / "cut", resume=True, cache_dir=cache_dir)
    for each in ("align", "report"):
        for name, tensor in weights(expected, each).items():
            torch.testing.assert_close(tensor, weights(resumed, each)[name], atol=0, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "encoder.name=resnet1d_small",
            r"encoder\.name: expected resnet1d_tiny, as in .*, got resnet1d_small",
        ),
        ("align.width=64", r"align\.width: expected 32, as in .*, got 64"),
        ("report.layers=2", r"report\.layers: expected 1, as in .*, got 2"),
        ("data.leads=I,II", r"data\.leads: expected .* as in .*"),
    ],
)
def test_settings_that_do_not_fit_the_start_are_refused(start, mine, tmp_path, cache_dir, setting, message):
    with pytest.raises(EcgotError, match=message) as caught:
        train(settings(start, mine, setting), tmp_path / "run", cache_dir=cache_dir)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_start_that_is_not_trained_is_refused(mine, tmp_path, cache_dir):
    bare = Run.create(tmp_path / "bare", Config(), resume=False)
    with pytest.raises(EcgotError, match=r"start: expected a run with a trained stage align, got .*bare"):
        train(settings(bare, mine), tmp_path / "run", cache_dir=cache_dir)


def test_fine_tuning_takes_the_settings_of_its_start_but_no_paths_and_smaller_steps(start):
    found, given = fine_tuning(start.config(), "packaged"), start.config()
    assert (found.data.root, found.data.reports_csv, found.start) == ("", "", "packaged")
    assert found.encoder == given.encoder
    assert found.report.hidden_size == given.report.hidden_size
    assert found.align.learning_rate < Config().align.learning_rate
    assert found.report.learning_rate < Config().report.learning_rate


def test_a_run_is_named_by_its_folder_and_the_packaged_one_by_a_word(start):
    assert Run.named("packaged").folder == PRETRAINED
    assert Run.named("packaged").name == "packaged"
    assert Run.named(start.name).folder == start.folder.resolve()


def test_recorders_keep_their_embedding_and_new_ones_begin_as_the_unknown_one():
    torch.manual_seed(0)
    made = build_reporter("scratch", 8, reports=["a b"], hidden_size=16, layers=1, recorders=("A", "B"))
    old = made.recorder_embedding.weight.detach().clone()
    report_module._rename_recorders(made, ("B", "C"))
    assert made.recorders == ("B", "C")
    torch.testing.assert_close(made.recorder_embedding.weight, old[[0, 2, 0]])
    report_module._rename_recorders(made, ())
    assert made.recorder_embedding is None
    report_module._rename_recorders(made, ("D",))
    assert made.recorder_embedding.weight.shape == (2, 16)


def test_a_command_fine_tunes(start, mine, tmp_path, cache_dir):
    out = tmp_path / "run"
    arguments = ["train", "--data", str(mine), "--from", str(start.folder), "--out", str(out)]
    result = CliRunner().invoke(
        cli, [*arguments, "--stage", "align", "--cache", str(cache_dir), *QUICK], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert Run.open(out).config() == settings(start, mine)
    result = CliRunner().invoke(cli, ["train", "--out", str(out), "--resume", "--cache", str(cache_dir)])
    assert result.exit_code == 0, result.output
    assert Run.open(out).done("report")
