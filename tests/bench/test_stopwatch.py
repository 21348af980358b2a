"""The clock: how many rounds it takes, and in which order."""

import time

import pytest
import torch

from ecgot.bench.stopwatch import Budget, seconds, summary, take_turns, turn

CPU = torch.device("cpu")


@pytest.mark.parametrize(("each", "rounds"), [(1.0, 5), (0.1, 20), (1e-9, 100)])
def test_as_many_rounds_as_the_budget_holds_within_bounds(each, rounds):
    assert Budget(2.0, 5, 100).rounds(each) == rounds


def test_quantiles_are_of_rounds_that_were_timed():
    times = summary([0.005, 0.001, 0.002, 0.004, 0.003, 0.006])
    assert (times.rounds, times.q20_ms, times.median_ms, times.q80_ms) == (6, 2.0, 3.5, 5.0)


def test_a_call_is_timed_whole():
    assert seconds(lambda: time.sleep(0.01), CPU) >= 0.01


def test_providers_take_turns():
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    times = take_turns(calls, CPU, Budget(0.0, 3, 3))
    assert {name: each.rounds for name, each in times.items()} == {"a": 3, "b": 3}
    assert called == ["a", "b"] * 5  # two rounds to compile and to find the number of rounds


def test_a_turn_leaves_out_its_first_call_unless_that_fills_it():
    waits = iter((0.02, 0.004, 0.006, 0.02))
    assert [round(each, 2) for each in turn(lambda: time.sleep(next(waits)), CPU, 0.01)] == [0.02]
    assert len(turn(lambda: time.sleep(next(waits)), CPU, 0.005)) == 1
    assert len(turn(lambda: None, CPU, 1.0, most=3)) == 3
