"""Each adapter's example runs, and prints what it promises."""

import re
import runpy
from pathlib import Path

import pytest

# An example that does not converge shows settings that nobody should copy.
pytestmark = pytest.mark.filterwarnings("error::ecgot.kernels.SinkhornWarning")

FOLDER = Path(__file__).parents[1] / "examples"


def run(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


def numbers(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"-?\d+\.?\d*(?:e[-+]\d+)?", text)]


def line(printed: str, start: str) -> list[float]:
    """The numbers of the line that starts so."""
    return numbers(next(each for each in printed.splitlines() if each.startswith(start)).removeprefix(start))


def test_instead_of_geomloss(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("instead_of_geomloss", capsys)
    assert line(printed, "step 19: loss")[1] < 1e-3


def test_instead_of_pot(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("instead_of_pot", capsys)
    assert line(printed, "marginals are met to")[0] < 1e-9
    cost, of_plan = line(printed, "sinkhorn2:")
    assert cost == pytest.approx(of_plan, abs=1e-5)
    assert 0.5 < line(printed, "unbalanced:")[0] < 1
    assert line(printed, "the gradient points to")[-1] < 1e-6


def test_match_keypoints(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("match_keypoints", capsys)
    found, shared, left_over, others = numbers(printed.splitlines()[0])
    assert found >= 0.9 * shared
    assert left_over >= 0.8 * others


def test_match_flows(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("match_flows", capsys)
    random, exact, sinkhorn = (
        line(printed, f"{kind} pairs: mean squared way")[0] for kind in ("random", "exact", "sinkhorn")
    )
    assert exact < random / 3
    assert sinkhorn < random / 3


def test_assign_prototypes(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("assign_prototypes", capsys)
    best = line(printed, "by the best score:")
    assert min(best) == 0
    for kind in ("SwAV, soft assignments:", "DINOv2, 20 iterations:"):
        used = line(printed, kind)
        assert sum(used) == pytest.approx(sum(best), abs=4)
        assert min(used) > 0.9 * sum(best) / len(best)


def test_learn_to_sort(capsys: pytest.CaptureFixture[str]) -> None:
    assert numbers(run("learn_to_sort", capsys).splitlines()[-1])[0] > 95


def test_mix_streams(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("mix_streams", capsys)
    before, free, ours = line(printed, "largest stream")
    assert ours < before < 1e3 < free
    assert printed.rstrip().endswith("finite: True")


def test_use_the_loss(capsys: pytest.CaptureFixture[str]) -> None:
    assert "8 of 8 problems converged" in run("use_the_loss", capsys)


def test_every_example_is_tested() -> None:
    """The first ones in tests/test_documents.py."""
    source = Path(__file__).read_text(encoding="utf-8")
    names = {path.stem for path in FOLDER.glob("*.py")} - {"draw_reading", "read_a_record"}
    assert names == set(re.findall(r'run\("(\w+)", capsys\)', source))
