"""The command line: the whole way on a small data set, JSON, and bad input in one line with exit code 2."""

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import wfdb

from ecgot.choices import SCORES, STAGES
from ecgot.cli import main as cli
from ecgot.data.leads import STANDARD_LEADS
from ecgot.data.synth import simulate
from ecgot.eval.evaluate import evaluate
from ecgot.eval.supervise import supervise
from ecgot.inference.reader import EcgReader
from ecgot.runs.config import parse_folds, resolve
from ecgot.runs.run import Run
from ecgot.train.stages import train
from tests.conftest import small_settings


@pytest.fixture
def ecgot(monkeypatch, capsys, cache_dir):
    """ecgot(*arguments) -> (exit code, stdout, stderr)."""
    monkeypatch.setenv("ECGOT_CACHE", str(cache_dir))

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ecgot", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capsys.readouterr()
        return int(exit.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def run_dir(few, tiny_bert, cache_dir, tmp_path_factory) -> Path:
    """A trained run; do not write into it."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    train(resolve(None, small_settings(few, tiny_bert)), folder, cache_dir=cache_dir)
    return folder


def refused(result: tuple[int, str, str], *parts: str) -> None:
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("ecgot: ")
    assert err.count("\n") == 1, err
    for part in parts:
        assert part in err


def test_the_whole_way(ecgot, tmp_path, tiny_bert):
    data, run = tmp_path / "data", tmp_path / "run"
    code, out, _ = ecgot("synth", data, "--records", 60, "--seed", 3)
    assert (code, out) == (0, f"60 synthetic records in {data}\n")
    settings = [s for s in small_settings(data, tiny_bert) if not s.startswith("data.root")]
    code, _, err = ecgot("train", "--data", data, "--out", run, *settings)
    assert code == 0
    assert "align: epoch 2/2" in err
    code, out, _ = ecgot("evaluate", run, "--data", data, "--resamples", 20, "--examples", 2, "--grounding")
    assert code == 0
    assert "of a premature beat (by chance)" in " ".join(out.split())
    for part in ("zero-shot", "superclass", "BLEU-4", "METEOR", "ROUGE-L", "sacrebleu", "reference:"):
        assert part in out
    assert out.count("generated:") == 2
    assert "not a medical device" in " ".join(out.split())
    code, out, _ = ecgot("report", run, data / "records100" / "00000" / "00007_lr")
    assert code == 0
    assert "report: " in out
    assert "Found" in out
    assert "not a medical device" in " ".join(out.split())


def test_json_is_one_object_and_nothing_else(ecgot, tmp_path, run_dir, few):
    record = next((few / "records100").rglob("*.hea"))
    settings = [f"{k}={v}" for k, v in (("align.epochs", 1), ("align.width", 8), ("report.epochs", 1))]
    base = ["train", "--config", run_dir / "config.json", "--out", tmp_path / "run", "--json"]
    for arguments, keys in (
        (["synth", tmp_path / "data", "--records", 3, "--json"], {"out", "records", "seed"}),
        ([*base, *settings], {"run", "metrics"}),
        (["evaluate", run_dir, "--data", few, "--resamples", 5, "--json"], {"zero_shot", "probe", "reports"}),
        (["report", run_dir, record, "--json"], {"findings", "scores", "report", "notes", "notice"}),
    ):
        code, out, err = ecgot(*arguments)
        assert (code, err) == (0, "")
        assert keys <= json.loads(out).keys()


def test_an_exported_run_reads_without_a_text_encoder(ecgot, tmp_path, run_dir, few, monkeypatch):
    out = tmp_path / "exported"
    assert ecgot("export", run_dir, out)[0] == 0
    names = {"config.json", "align.safetensors", "report.safetensors", "prompts.safetensors", "README.md"}
    assert {path.name for path in out.iterdir()} == names | {"language_model"}
    assert str(few) not in (out / "config.json").read_text()
    assert "not a medical device" in (out / "README.md").read_text()
    refused(ecgot("export", run_dir, out), "expected a new folder")
    record = next((few / "records100").rglob("*.hea"))
    whole = json.loads(ecgot("report", run_dir, record, "--json")[1])
    _, text, _ = ecgot(
        "classify", out, record, "--prompt", "sinus rhythm", "--prompt", "no st elevation", "--json"
    )
    assert list(json.loads(text)["scores"]) == ["sinus rhythm", "no st elevation"]
    results = [["evaluate", folder, "--data", few, "--resamples", 5, "--json"] for folder in (run_dir, out)]
    before = json.loads(ecgot(*results[0])[1])

    def absent(*_arguments, **_settings):
        raise AssertionError("a text encoder was loaded")

    monkeypatch.setattr("ecgot.models.text_encoder.TextEncoder", absent)
    monkeypatch.setattr("ecgot.eval.evaluate.TextEncoder", absent)
    found = json.loads(ecgot("report", out, record, "--json")[1])
    assert found["report"] == whole["report"]
    for group, scores in whole["scores"].items():
        assert found["scores"][group] == pytest.approx(scores, abs=1e-4)
    after = json.loads(ecgot(*results[1], "--out", tmp_path / "evaluation")[1])
    assert (tmp_path / "evaluation" / "evaluation.json").exists()
    for group, result in before["zero_shot"].items():
        assert after["zero_shot"][group]["auroc"] == pytest.approx(result["auroc"], abs=1e-6)
    refused(ecgot("report", out, record, record), "got 3 paths")
    refused(ecgot("report"), "got 0 paths")


def test_help_explains_every_command_and_setting(ecgot):
    code, out, _ = ecgot("--help")
    assert code == 0
    for command in cli.cli.commands:
        assert command in out
        code, text, _ = ecgot(command, "--help")
        assert code == 0
        assert "--json" in text or command == "export"
    assert "not a medical device" in " ".join(out.split())


def test_help_does_not_wait_for_torch():
    """Nor that of a command, whose choices and defaults stand where models read them too."""
    code = """if True:
        import sys
        from ecgot.cli.main import cli
        for command in cli.commands:
            cli.main([command, "--help"], standalone_mode=False)
        sys.exit("torch" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_bad_arguments(ecgot, tmp_path, few, run_dir):
    out = tmp_path / "run"
    refused(ecgot("trian"), "trian")
    refused(ecgot("synth", tmp_path / "d", "--records", 0), "--records")
    refused(ecgot("synth", few), "new or empty folder")
    refused(ecgot("train", "--out", out), "--data")
    refused(ecgot("train", "--data", tmp_path / "absent", "--out", out), "absent/ptbxl_database.csv")
    refused(ecgot("train", "--data", few, "--out", out, "align.depth=3"), "align.depth", "align")
    refused(ecgot("train", "--data", few, "--out", out, "encoder.name=vgg"), "vgg", "resnet1d_small")
    refused(ecgot("train", "--data", few, "--out", out, "--stage", "report"), "config.json")
    refused(ecgot("evaluate", run_dir, "--data", few, "--folds", "nine"), "'nine'", "1-8,10")
    refused(ecgot("evaluate", run_dir, "--data", few, "--folds", "9-7"), "'9-7'", "1-8,10")
    refused(ecgot("evaluate", few, "--data", few), "config.json")
    refused(ecgot("report", run_dir, tmp_path / "absent"), "absent.hea")
    assert not out.exists()


def test_a_cache_that_cannot_be_written(ecgot, few, tmp_path, run_dir):
    (tmp_path / "file").touch()
    refused(ecgot("evaluate", run_dir, "--data", few, "--cache", tmp_path / "file" / "cache"), "file")


def heart() -> np.ndarray:
    """[1000, 12] in mV at 100 Hz: a simulated heart of plain shape."""
    return simulate(np.random.default_rng([2, 1])).signal_mv.T.copy()


def write(path: Path, signal: np.ndarray, leads: tuple[str, ...] = STANDARD_LEADS) -> Path:
    wfdb.wrsamp(
        path.name,
        fs=100,
        units=["mV"] * len(leads),
        sig_name=list(leads),
        p_signal=signal,
        fmt=["16"] * len(leads),
        adc_gain=[1000.0] * len(leads),
        baseline=[0] * len(leads),
        write_dir=str(path.parent),
    )
    return path


def test_bad_records_are_refused_in_one_line(ecgot, run_dir, tmp_path):
    signal = heart()
    good = write(tmp_path / "good", signal)
    assert ecgot("report", run_dir, good)[0] == 0

    cut = write(tmp_path / "cut", signal).with_suffix(".dat")
    cut.write_bytes(cut.read_bytes()[:5000])
    refused(ecgot("report", run_dir, tmp_path / "cut"), "cut.dat", "5000", "24000")

    write(tmp_path / "gone", signal).with_suffix(".dat").unlink()
    refused(ecgot("report", run_dir, tmp_path / "gone"), "gone.dat")

    header = write(tmp_path / "wrong", signal).with_suffix(".hea")
    header.write_text(header.read_text().replace("wrong 12 100 1000", "wrong 12 100 2000"))
    refused(ecgot("report", run_dir, tmp_path / "wrong"), "48000")


def test_what_is_no_ecg_is_told_and_not_read(ecgot, run_dir, tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.3, (1000, 12))
    for name, signal, reason in (("noise", noise, "no ECG"), ("flat", 0 * noise, "flat")):
        code, out, _ = ecgot("report", run_dir, write(tmp_path / name, signal))
        assert code == 0
        assert "not a usable ECG" in out
        assert reason in out
        assert "report" not in out.replace("--force", "")
    code, out, _ = ecgot("report", run_dir, tmp_path / "noise", "--force")
    assert code == 0
    assert "report: " in out


def test_missing_leads_are_derived_and_estimated(ecgot, run_dir, tmp_path):
    signal = heart()
    eight = ("I", "II", *STANDARD_LEADS[6:])
    rows = [STANDARD_LEADS.index(lead) for lead in eight]
    out = ecgot("report", run_dir, write(tmp_path / "eight", signal[:, rows], eight))[1]
    assert "III, aVR, aVL, aVF derived from other leads" in out
    signal[:, 8] = np.nan
    out = ecgot("report", run_dir, write(tmp_path / "nan", signal))[1]
    assert "V3 estimated from other leads" in out


def test_repairs_are_told(ecgot, run_dir, tmp_path):
    signal = heart()[:600]
    signal[50:60, 6] = np.nan
    signal[:, 2] = 0
    code, out, _ = ecgot("report", run_dir, write(tmp_path / "repaired", signal))
    text = " ".join(out.split())
    assert code == 0
    assert "10 missing samples filled in lead V1" in text
    assert "lead III is flat" in text
    assert "shorter than the 10 s" in text


def test_a_bad_record_in_training_is_named_and_skipped_and_too_many_stop(ecgot, few, tmp_path, tiny_bert):
    data = tmp_path / "data"
    shutil.copytree(few, data)
    settings = [s for s in small_settings(data, tiny_bert) if not s.startswith("data.root")]
    files = sorted((data / "records100").rglob("*.dat"))
    files[4].write_bytes(b"")
    code, _, err = ecgot(
        "train", "--data", data, "--out", tmp_path / "run", "--stage", "align", *settings, "align.epochs=1"
    )
    assert code == 0
    assert files[4].name in err
    assert "1 skipped" in err
    for file in files[:40]:
        file.write_bytes(b"")
    refused(ecgot("train", "--data", data, "--out", tmp_path / "b", *settings), "at most 5%", "got 0")
    assert not (tmp_path / "b").exists()
    code, _, err = ecgot(
        "train",
        "--data",
        data,
        "--out",
        tmp_path / "c",
        "--stage",
        "align",
        *settings,
        "align.epochs=1",
        "data.max_bad_share=0.5",
    )
    assert code == 0
    assert Run.open(tmp_path / "c").done("align")


def test_bad_tables_and_checkpoints(ecgot, few, tmp_path, run_dir, tiny_bert):
    data = tmp_path / "data"
    shutil.copytree(few, data)
    table = data / "ptbxl_database.csv"
    whole = table.read_text()
    table.write_text(whole.splitlines()[0] + "\n")
    refused(ecgot("train", "--data", data, "--out", tmp_path / "r"), "expected some of no folds")
    (tmp_path / "reports.csv").write_text("id,text\n1,x\n")
    refused(
        ecgot("train", "--data", few, "--reports", tmp_path / "reports.csv", "--out", tmp_path / "r"),
        "expected column ecg_id, report",
    )
    assert not (tmp_path / "r").exists()

    copy = tmp_path / "run"
    shutil.copytree(run_dir, copy)
    config = json.loads((copy / "config.json").read_text())
    config["encoder"]["name"] = "resnet1d_small"
    (copy / "config.json").write_text(json.dumps(config))
    refused(ecgot("evaluate", copy, "--data", few), "another configuration", "resnet1d_small")
    (copy / "config.json").write_text("{")
    refused(ecgot("evaluate", copy, "--data", few), "expected valid JSON")


def test_resuming_takes_the_settings_of_the_run(ecgot, few, tmp_path, tiny_bert, monkeypatch):
    run = tmp_path / "run"
    settings = [s for s in small_settings(few, tiny_bert) if not s.startswith("data.root")]
    monkeypatch.chdir(few.parent)  # a relative path is kept whole
    code, *_ = ecgot("train", "--data", few.name, "--out", run, "--stage", "align", *settings)
    assert code == 0
    monkeypatch.chdir(tmp_path)
    code, _, err = ecgot("train", "--out", run, "--resume")
    assert code == 0, err
    assert Run.open(run).done("report")
    assert Run.open(run).config() == resolve(None, [*settings, f"data.root={few.resolve()}"])


def test_defaults_and_choices_are_those_of_python():
    options = {
        command: {option.name: option for option in cli.cli.commands[command].params}
        for command in ("evaluate", "supervise", "report", "classify", "train")
    }
    in_python = {"evaluate": evaluate, "supervise": supervise, "report": EcgReader}
    for command, function in in_python.items():
        for name, parameter in inspect.signature(function).parameters.items():
            if name in ("num_beams", "resamples"):
                assert options[command][name].default == parameter.default
            if name == "folds":
                assert parse_folds(options[command][name].default) == parameter.default
    for command in ("evaluate", "report", "classify"):
        assert options[command]["score"].type.choices == SCORES
    assert options["train"]["stage"].type.choices == ("all", *STAGES)


def test_a_folder_needs_an_out_and_a_record_none(ecgot, tmp_path):
    record = write(tmp_path / "one", heart())
    refused(ecgot("report", tmp_path), "--out", "the folder")
    refused(ecgot("report", record, "--out", tmp_path / "x.csv"), "expected a folder of records")
    refused(ecgot("report", tmp_path, "--out", tmp_path / "x.csv", "--json"), "--json")
    code, out, _ = ecgot("report", tmp_path, "--out", tmp_path / "x.csv", "--no-report")
    assert code == 0
    assert "1 records read" in out
    assert "not a medical device" in out
