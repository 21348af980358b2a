"""The kernels compile for every target without a GPU, and the check sees it when one does not."""

import itertools
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

def compile_cases(precision):
    yield "16", broken, {"x_ptr": "*fp32", "BLOCK": "constexpr"}, {"BLOCK": 16}, {"num_warps": 4}
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
last = {{case.kernel: case for case in cases({target!r})}}  # the largest tiles come first
print(json.dumps([dataclasses.asdict(check(case, {target!r})) for case in last.values()]))
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout)
    assert [outcome["error"] for outcome in outcomes] == [None] * 3
    if target.startswith("sm_"):
        assert all(0 < outcome["registers"] <= 255 for outcome in outcomes)


def test_a_kernel_that_does_not_compile_is_reported(tmp_path: Path) -> None:
    (tmp_path / "broken_kernel.py").write_text(BROKEN)
    code = """
import sys
from ecgot.kernels import compile_check
compile_check.MODULES = ("broken_kernel",)
sys.exit(compile_check.main(["--targets", "sm_90,gfx942"]))
"""
    done = run(code, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stderr
    *failures, summary = done.stdout.splitlines()
    assert [line.split()[:4] for line in failures] == [
        ["FAILED", target, "broken", "16:"] for target in ("sm_90", "gfx942")
    ]
    assert summary == "2 compilations, 2 failed, 0 with stack use"


@pytest.mark.parametrize("value", ["1", "true"])  # Triton takes both
def test_interpreted_kernels_are_refused(value: str) -> None:
    done = run(
        "import sys; from ecgot.kernels.compile_check import main; sys.exit(main([]))", TRITON_INTERPRET=value
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_unknown_target_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert compile_check.main(["--targets", "sm_10"]) == 2
    assert "sm_10" in capsys.readouterr().err


def test_a_missing_triton_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(compile_check, "HAS_TRITON", False)
    assert compile_check.main([]) == 2
    assert capsys.readouterr().err == "compile_check: triton is not installed\n"


def test_a_full_check_holds_every_tile_that_fits() -> None:
    from ecgot.kernels import _triton_sinkhorn

    tiles = {
        (dict(c.constants)["BLOCK_N"], dict(c.constants)["BLOCK_M"])
        for c in compile_check.cases("sm_90", everything=True)
        if c.kernel == "_sinkhorn_fwd_kernel"
    }
    wanted = {
        (_triton_sinkhorn._block(n), _triton_sinkhorn._block(m))
        for n in range(1, 600, 3)
        for m in range(1, 600, 3)
        if _triton_sinkhorn.fits(n, m)
    }
    assert tiles == wanted


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_the_default_part_holds_every_tile_and_every_pair_of_values(target: str) -> None:
    part, full = (_tiles_and_pairs(target, everything) for everything in (False, True))
    assert part == full


def test_the_default_part_holds_both_costs_at_the_largest_tiles() -> None:
    sinkhorn = [dict(case.constants) for case in compile_check.cases("sm_90") if "sinkhorn" in case.kernel]
    largest = {(128, 128), (64, 256), (256, 64), (16, 256)}  # three of the solver, one of the gradient
    found = {(c["BLOCK_N"], c["BLOCK_M"], c["COSINE"]) for c in sinkhorn}
    assert {(*tile, cosine) for tile in largest for cosine in (False, True)} <= found


def test_the_precision_is_that_of_the_target() -> None:
    found = {
        (target, dict(case.signature)["x_ptr"], dict(case.constants)["PRECISION"])
        for target in ("sm_90", "gfx942")
        for case in compile_check.cases(target)
        if case.kernel == "_conv1d_fwd_kernel"
    }
    halves = {(target, half, "ieee") for target in ("sm_90", "gfx942") for half in ("*fp16", "*bf16")}
    assert found == halves | {("sm_90", "*fp32", "tf32x3"), ("gfx942", "*fp32", "ieee")}


def _tiles_and_pairs(target: str, everything: bool) -> set[tuple]:
    """Every tile of every kernel, and every pair of its other values."""
    found: set[tuple] = set()
    for case in compile_check.cases(target, everything):
        values = dict(case.constants) | {"dtype": dict(case.signature)["x_ptr"]}
        blocks = [name for name in values if name.startswith("BLOCK_")]
        found.add((case.kernel, *(values.pop(name) for name in blocks)))
        del values["PRECISION"]  # follows from target and dtype
        found.update((case.kernel, *pair) for pair in itertools.combinations(values.items(), 2))
    return found
