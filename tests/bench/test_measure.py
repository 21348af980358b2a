"""The check, the comparison and the command, on cases of a few points: wrong results are never timed."""

import json
import math

import pytest
import torch
from click.testing import CliRunner

from ecgot.bench import apart, cases, measure, providers
from ecgot.bench.providers import PAIRS, PROVIDERS, WITHOUT_NUMBA, PairsProvider, Provider
from ecgot.cli.main import cli

CASE = cases.Case(3, 7, 5, 4, eps=0.2)
FEW_PAIRS = cases.PairsCase(4, 4, 6, 5, 4, iterations=10)
CPU = torch.device("cpu")


def _shifted(x, y, case, steps):
    value, plan = providers.solve_torch(x, y, case, steps)
    return value + 0.01, plan


def _without_gradient_in_y(x, y, case, steps):
    value, plan = providers.solve_torch(x, y.detach(), case, steps)
    return value + 0 * y.sum(), plan


def _checked(name, case=CASE, device=CPU):
    return measure.checked(name, case, device, measure.truth(case, device))


def test_right_providers_are_timed_in_processes_of_their_own():
    rows = {row.provider: row for row in apart.compare(CASE, CPU, ("ecgot", WITHOUT_NUMBA, "torch"))}
    assert list(rows) == ["ecgot", WITHOUT_NUMBA, "torch"]
    for row in rows.values():
        assert not row.refused
        assert 0 < row.q20_ms <= row.median_ms <= row.q80_ms
        assert row.rounds >= apart.TURNS
        assert row.marginal_error <= CASE.tol * measure.ROUNDING[0] + measure.ROUNDING[1]
        assert row.peak_mb > 0
    assert rows["torch"].steps >= 2
    assert rows["ecgot"].steps is None  # it stops by itself


def test_a_process_that_dies_is_a_row(monkeypatch):
    seat = apart._Seat("torch", CASE, CPU, [each.numpy() for each in measure.truth(CASE, CPU)])
    seat._process.kill()
    assert not seat.check()
    assert seat.row.refused == "its process ended with -9"
    seat.close()


def test_a_wrong_value_or_gradient_is_not_timed(monkeypatch):
    monkeypatch.setitem(PROVIDERS, "wrong", Provider("torch", _shifted))
    row, call = _checked("wrong")
    assert "value error" in row.refused
    assert math.isnan(row.median_ms)
    assert call is None
    monkeypatch.setitem(PROVIDERS, "wrong", Provider("torch", _without_gradient_in_y))
    row, _ = _checked("wrong")
    assert "gradient error" in row.refused
    assert "value" not in row.refused


def test_a_provider_that_stops_too_early_is_not_timed(monkeypatch):
    monkeypatch.setitem(
        PROVIDERS, "early", Provider("torch", lambda x, y, case, _: providers.solve_torch(x, y, case, 1))
    )
    monkeypatch.setattr(measure, "MAX_STEPS", 60)
    assert "marginal error" in _checked("early")[0].refused


def test_the_envelope_of_a_recorded_loop_is_that_of_autograd():
    """What a CUDA graph records, here without one."""
    x, y = (cases.unit_vectors(3, count, 4, CPU, count).double().requires_grad_() for count in (7, 5))
    value, plan, *grads = providers.solve_by_envelope(x, y, CASE, 400)
    expected, expected_plan = providers.solve_torch(x, y, CASE, 400)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(plan, expected_plan())
    for grad, wanted in zip(grads, torch.autograd.grad(expected.sum(), (x, y)), strict=True):
        torch.testing.assert_close(grad, wanted)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_loop_follows_its_input():
    device = torch.device("cuda")
    row, _ = _checked("torch_graph", CASE, device)
    assert not row.refused
    x, y = (cases.unit_vectors(3, count, 4, device, count + 9).requires_grad_() for count in (7, 5))
    value, _ = providers.solve_torch_graph(x, y, CASE, row.steps)
    torch.testing.assert_close(value, providers.solve_torch(x, y, CASE, row.steps)[0])


def test_what_is_not_installed_or_fails_is_a_row(monkeypatch):
    def fails(*_):
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setitem(PROVIDERS, "absent", Provider("no_such_package", fails))
    monkeypatch.setitem(PROVIDERS, "fails", Provider("torch", fails))
    rows = [_checked(name)[0] for name in ("absent", "fails")]
    assert [row.refused for row in rows] == ["no_such_package is not installed", "out of memory"]


def test_wrong_pairs_are_not_timed(monkeypatch):
    wrong = PairsProvider(lambda x, y, case: providers.pairs_torch(x, y, case) * 1.1)
    monkeypatch.setitem(PAIRS, "wrong", wrong)
    row, call = _checked("wrong", FEW_PAIRS)
    assert "value error" in row.refused
    assert call is None
    row, call = _checked("ecgot", FEW_PAIRS)
    assert not row.refused
    assert call is not None


@pytest.mark.parametrize("as_json", [True, False])
def test_the_command(as_json, monkeypatch):
    monkeypatch.setattr(cases, "SHORT", [CASE])
    monkeypatch.setattr(cases, "CPU_PAIRS", FEW_PAIRS)
    monkeypatch.setattr(apart, "TURN_S", 0.0)
    run = CliRunner().invoke(cli, ["bench", *(["--json"] if as_json else [])])
    assert run.exit_code == 0, run.output
    if not as_json:
        assert "against ecgot" in run.output
        assert "1.0 x" in run.output
        return
    found = json.loads(run.stdout)
    assert found["origin"]["torch"] == torch.__version__
    of_case = [row for row in found["rows"] if row["case"] == str(CASE)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert {row["provider"] for row in of_case} == set(providers.providers(device))
    assert all((row["median_ms"] is None) == bool(row["refused"]) for row in found["rows"])
