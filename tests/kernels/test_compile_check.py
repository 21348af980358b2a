"""The kernels compile for every target without a GPU, and the check sees it when one does not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ecgot.kernels import compile_check
from ecgot.kernels.dispatch import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

BROKEN = """
import triton
import triton.language as tl

@triton.jit
def broken(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), undefined)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code where Triton compiles, whatever this process does."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("target", compile_check.TARGETS)
def test_one_case_of_each_kernel_compiles(target: str) -> None:
    code = f"""
import dataclasses, json
from ecgot.kernels.compile_check import cases, check
first = {{case.kernel: case for case in reversed(list(cases()))}}
print(json.dumps([dataclasses.asdict(check(case, {target!r})) for case in first.values()]))
"""
    done = run(code)
    outcomes = json.loads(done.stdout)
    assert len(outcomes) == 3, done.stderr
    assert [outcome["error"] for outcome in outcomes] == [None] * 3
    if target.startswith("sm_"):
        assert all(0 < outcome["registers"] <= 255 for outcome in outcomes)


def test_a_kernel_that_does_not_compile_is_reported(tmp_path: Path) -> None:
    (tmp_path / "broken_kernel.py").write_text(BROKEN)
    code = """
from ecgot.kernels.compile_check import Case, check
options = (("num_warps", 4), ("num_stages", 1))
print(check(Case("broken_kernel", "broken", "*fp32", (("BLOCK", 16),), options), "sm_90").error)
"""
    assert run(code, PYTHONPATH=str(tmp_path)).stdout.strip() not in ("", "None")


def test_interpreted_kernels_are_refused() -> None:
    done = run(
        "import sys; from ecgot.kernels.compile_check import main; sys.exit(main([]))", TRITON_INTERPRET="1"
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_unknown_target_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert compile_check.main(["--targets", "sm_10"]) == 2
    assert "sm_10" in capsys.readouterr().err


def test_a_full_check_holds_every_tile_that_fits() -> None:
    from ecgot.kernels import _triton_sinkhorn

    tiles = {
        (dict(c.constants)["BLOCK_N"], dict(c.constants)["BLOCK_M"])
        for c in compile_check.cases(everything=True)
        if c.kernel == "_sinkhorn_fwd_kernel"
    }
    wanted = {
        (_triton_sinkhorn._block(n), _triton_sinkhorn._block(m))
        for n in range(1, 600, 3)
        for m in range(1, 600, 3)
        if _triton_sinkhorn.fits(n, m)
    }
    assert tiles == wanted
