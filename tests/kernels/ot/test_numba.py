"""The compiled loops as a guest: what they leave behind in a process, and what serves where they cannot."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")
ROOT = Path(__file__).parents[3]
SOLVE = """
import torch, warnings
warnings.simplefilter("always")
from ecgot.kernels import sinkhorn
x = torch.randn(64, 64, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
def solve():
    out = sinkhorn(x, x.detach().flip(1) + 1, eps=100.0)
    out.value.sum().backward()
    return out.backend
"""
# The lower decile: what another process takes from the cores does not count.
NEIGHBOUR = """
import os, time
torch.set_num_threads(2)
grid = torch.randn(64, 64, 32)
def us(call):
    times = []
    for _ in range(300):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1e6 * sorted(times)[30]
def measure():
    return us(grid.exp), us(lambda: grid.logsumexp(2))
def threads():
    return len(os.listdir("/proc/self/task"))
measure()
import scipy.linalg.cython_blas  # numba imports it, with a thread of its own
before, had = measure(), threads()
assert solve() == "numba"
print(*(after / first for first, after in zip(before, measure())), threads() - had)
"""


def run(source: str, root: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", source],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root), "TRITON_INTERPRET": "0"} | environment,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_a_solve_leaves_torch_as_fast_as_it_was():
    ratios = []
    for _ in range(5):
        *ratios, more = run(SOLVE + NEIGHBOUR, OMP_NUM_THREADS="2").stdout.split()
        assert int(more) <= 2  # the pool's own; a team of OpenMP for each would be more
        if max(map(float, ratios)) <= 1.1:
            return
    raise AssertionError(f"expected at most 1.1 times as long after a solve, got {ratios}")


def test_without_numba_torch_serves_and_says_so_once():
    hidden = "import sys; sys.modules['numba'] = None\n"
    done = run(hidden + SOLVE + "print(solve(), solve())")
    assert done.stdout.split() == ["torch", "torch"]
    assert done.stderr.count("RuntimeWarning: numba: expected") == 1


def test_without_a_place_for_the_cache_torch_serves_and_says_so_once(tmp_path):
    for path in (ROOT / "ecgot").rglob("*.py"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    (tmp_path / "ecgot/kernels/ot/__pycache__").touch()  # a file, so that no folder of that name can be made
    nowhere = "/dev/null/nowhere"
    done = run(
        SOLVE + "print(solve(), solve())",
        tmp_path,
        HOME=nowhere,
        XDG_CACHE_HOME=nowhere,
        NUMBA_CACHE_DIR=nowhere,
    )
    assert done.stdout.split() == ["torch", "torch"]
    assert done.stderr.count("RuntimeWarning: numba: expected") == 1
    assert "no locator available" in done.stderr
