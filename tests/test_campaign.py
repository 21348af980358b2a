"""The GPU campaign's bookkeeping, with steps of a second; and that the benchmarks it runs still run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import campaign
from benchmarks.campaign import Step

ROOT = Path(__file__).parents[1]


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


def test_a_step_that_does_not_fit_is_for_another_time(steps, tmp_path):
    assert campaign.main([str(tmp_path / "out"), "slow", "good", "--minutes", "0.02"]) == 0
    assert states(tmp_path / "out") == {"slow": "cut off"}


def test_no_gpu_and_unknown_steps_are_refused(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit, match="2"):
        campaign.main([str(tmp_path / "out"), "peak"])
    assert "STEP: got peak, accepted are cases, kernels" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert campaign.main([str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_a_training_step_can_be_measured():
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-disable", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "benchmarks/test_training_step.py", "-k", "1.0-ecgot"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
