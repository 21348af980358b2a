"""The table that chooses between the kernels and the vendor's library, and the script that measures it."""

import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

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
        "gpu,pass,c_in,c_out,k,stride,dilation,groups,dtype,length,backend\n"
        "cpu,forward,64,128,3,1,1,1,bfloat16,1000,torch\n"
        "cpu,forward,64,128,3,1,1,1,bfloat16,100,triton\n"
        "NVIDIA X1,forward,64,128,3,2,1,1,bfloat16,1000,torch\n"
    )

    def found(stride: int = 1, dtype: torch.dtype = torch.bfloat16, length: int = 1000) -> dict[str, str]:
        return conv1d_backends((128, 64, 3), stride=stride, dtype=dtype, length=length)

    assert found() == {"forward": "torch", "input_gradient": "triton", "weight_gradient": "triton"}
    assert found(dtype=torch.float16)["forward"] == "triton"
    # 316 is as many times 100 as 1000 is times 316.
    assert [found(length=n)["forward"] for n in (1, 316, 317, 5000)] == ["triton", "triton", "torch", "torch"]
    assert found(stride=2)["forward"] == "triton"


def test_a_gpu_follows_its_own_rows(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table.write_text(
        "gpu,pass,c_in,c_out,k,stride,dilation,groups,dtype,length,backend\n"
        "NVIDIA X1,forward,64,128,3,1,1,1,bfloat16,1000,torch\n"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, expected in (("NVIDIA X1", "torch"), ("NVIDIA X2", "triton")):
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _device, name=name: SimpleNamespace(name=name)
        )
        assert conv1d_backends((128, 64, 3), dtype=torch.bfloat16)["forward"] == expected


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
    other = {"gpu": "NVIDIA X1", "pass": "forward", "backend": "torch"}
    table.write_text("\n".join(",".join(row) for row in (other, other.values())) + "\n")
    done = measured("--out", str(table), *small, "--rounds", "3", interpreted=True)
    assert done.returncode == 0, done.stderr
    with table.open() as file:
        first, *rows = csv.DictReader(file)
    assert {name: first[name] for name in other} == other  # another GPU's rows stay
    assert {row["gpu"] for row in rows} == {"cpu"}
    assert {row["length"] for row in rows if row["stride"] == "2"} >= {"33"}
    # What remains of it here are whole rows. Interpreted kernels are always slower.
    table.write_text("".join(line for line in table.read_text().splitlines(True) if "X1" not in line))
    backends._measured.cache_clear()
    assert set(conv1d_backends((16, 12, 15), stride=2).values()) == {"torch"}
    assert conv1d_backends((16, 12, 15), stride=1)["forward"] == "triton"


def test_without_a_gpu_the_script_says_so() -> None:
    done = measured(interpreted=False)
    assert done.returncode == 2
    assert done.stderr == "conv1d_backends: there is no GPU to measure\n"
