"""The GPU campaign's bookkeeping, with steps of a second; and that the benchmarks it runs still run."""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import campaign
from benchmarks.campaign import Step

ROOT = Path(__file__).parents[2]


def python(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", code


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {
        "good": Step(python("open(r'{out}.csv', 'a').write('x'); print('said')")),
        "bad": Step(python("raise SystemExit(3)")),
        "slow": Step(python("import time; time.sleep(60)")),
        "tool": Step(python("pass"), "no-such-program"),
        "data": Step(python("pass"), "$ECGOT_NOT_SET"),
    }
    monkeypatch.setattr(campaign, "STEPS", made)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(campaign, "origin", dict)


def states(out: Path) -> dict[str, str]:
    return {name: told["state"] for name, told in json.loads((out / "campaign.json").read_text()).items()}


def test_what_is_done_is_not_run_again(steps, tmp_path):
    out = tmp_path / "out"
    assert campaign.main([str(out), "good", "bad", "tool", "data"]) == 1
    assert states(out) == {"good": "done", "bad": "failed with 3", "tool": "left out", "data": "left out"}
    assert (out / "good.log").read_text() == "said\n"
    assert campaign.main([str(out), "good", "tool"]) == 0
    assert (out / "good.csv").read_text() == "x"


def test_another_commit_is_measured_anew(steps, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for version in ("first", "second", "second"):
        monkeypatch.setattr(campaign, "commit", lambda version=version: version)
        assert campaign.main([str(out), "good"]) == 0
    assert (out / "good.csv").read_text() == "xx"


def test_a_step_that_does_not_fit_comes_last_another_time(steps, tmp_path, capsys):
    out = tmp_path / "out"
    assert campaign.main([str(out), "slow", "good", "--minutes", "0.02"]) == 0
    assert states(out) == {"slow": "cut off"}
    assert "good: not reached" in capsys.readouterr().out
    campaign.STEPS["slow"] = Step(campaign.STEPS["slow"].command, minutes=0.02)
    assert campaign.main([str(out), "slow", "good"]) == 0
    assert states(out) == {"slow": "cut off", "good": "done"}
    assert capsys.readouterr().out.splitlines() == ["good: done", "slow: cut off"]


def test_what_a_step_started_ends_with_it(monkeypatch, steps, tmp_path):
    """A profiler's child would keep the GPU."""
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', CODE]); time.sleep(60)"
    code = f"import time; time.sleep(2); open({str(tmp_path / 'alive')!r}, 'w')"
    campaign.STEPS["slow"] = Step(python(child.replace("CODE", repr(code))), minutes=0.015)
    campaign.main([str(tmp_path / "out"), "slow"])
    time.sleep(2.5)
    assert not (tmp_path / "alive").exists()


def test_no_gpu_and_unknown_steps_are_refused(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit, match="2"):
        campaign.main([str(tmp_path / "out"), "peak"])
    assert "STEP: expected one of cases, kernels" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert campaign.main([str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_every_step_is_a_command_that_can_be_pasted(capsys, tmp_path):
    assert campaign.main([str(tmp_path), "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(campaign.STEPS)
    for line in lines:
        arguments = shlex.split(line.partition(": ")[2])
        assert not any("{out}" in part for part in arguments)
        files = [part for part in arguments if part.startswith(("tests", "benchmarks/"))]
        assert all((ROOT / file).exists() for file in files)


def test_an_encoder_step_takes_its_encoder_alone():
    """net1d is part of other names."""
    done = subprocess.run(
        [*campaign.STEPS["encoder_net1d"].command[:-2], "--collect-only"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    lengths = 2 if torch.cuda.is_available() else 1
    assert f"benchmarks/test_encoders.py: {2 * lengths}\n" in done.stdout  # inference and training


def test_a_training_step_can_be_measured():
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-disable", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "benchmarks/test_training_step.py", "-k", "1.0-ecgot"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
