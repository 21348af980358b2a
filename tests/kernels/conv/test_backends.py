"""The table that chooses between the kernels and the vendor's library, and the script that measures it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ecgot.kernels import conv1d_backends
from ecgot.kernels.conv import backends

ROOT = Path(__file__).parents[3]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the table is read from."""
    monkeypatch.setattr(backends.resources, "files", lambda _package: tmp_path)
    backends._measured.cache_clear()
    yield tmp_path / "backends.csv"
    backends._measured.cache_clear()


def test_what_was_measured_goes_before_the_rule(table: Path) -> None:
    table.write_text(
        "pass,c_in,c_out,k,stride,dilation,groups,dtype,backend\nforward,64,128,3,1,1,1,bfloat16,torch\n"
    )
    found = conv1d_backends((128, 64, 3), dtype=torch.bfloat16)
    assert found == {"forward": "torch", "input_gradient": "triton", "weight_gradient": "triton"}
    assert conv1d_backends((128, 64, 3), dtype=torch.float16)["forward"] == "triton"
    assert conv1d_backends((128, 64, 3), stride=2, dtype=torch.bfloat16)["forward"] == "triton"


def measured(*arguments: str, interpreted: bool) -> subprocess.CompletedProcess:
    # One thread: on a busy machine torch's threads wait for each other longer than the interpreter takes.
    environment = os.environ | {
        "TRITON_INTERPRET": "1" if interpreted else "0",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "benchmarks.conv1d_backends", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_the_script_writes_a_table_that_is_followed(table: Path) -> None:
    small = ("--encoders", "resnet1d_tiny", "--dtypes", "float32", "--batch", "1", "--samples", "33")
    done = measured("--out", str(table), *small, "--rounds", "3", interpreted=True)
    assert done.returncode == 0, done.stderr
    # Interpreted kernels are always slower.
    assert set(conv1d_backends((16, 12, 15), stride=2).values()) == {"torch"}
    assert conv1d_backends((16, 12, 15), stride=1)["forward"] == "triton"


def test_without_a_gpu_the_script_says_so() -> None:
    done = measured(interpreted=False)
    assert done.returncode == 2
    assert done.stderr == "conv1d_backends: there is no GPU to measure\n"
