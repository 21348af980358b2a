"""The clock and the memory meter of every benchmark.

A time is that of one call, from an idle device until it is idle again. Launches and Python are part of it, as
they are part of a training step.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]
QUEUED = 20  # calls in a measurement of ``queued_seconds``
# The GPU pauses for so many cycles, in which the calls are queued.
QUEUE_CYCLES = 50_000_000


@dataclass(frozen=True)
class Budget:
    """As many rounds as fit in the seconds, within bounds."""

    seconds: float
    min_rounds: int
    max_rounds: int

    def rounds(self, seconds: float) -> int:
        """How many rounds of this length (in seconds) to take."""
        return int(min(max(self.seconds / max(seconds, 1e-6), self.min_rounds), self.max_rounds))


@dataclass(frozen=True)
class Times:
    """Median, 20 % and 80 % quantile of the rounds, in milliseconds."""

    rounds: int
    median_ms: float
    q20_ms: float
    q80_ms: float


def summary(seconds: Iterable[float]) -> Times:
    """The times of all rounds, given in seconds, by their quantiles."""
    ordered = sorted(1e3 * each for each in seconds)
    last = len(ordered) - 1
    q20, q80 = ordered[round(0.2 * last)], ordered[round(0.8 * last)]
    return Times(len(ordered), statistics.median(ordered), q20, q80)


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Call, device: torch.device) -> float:
    """Time one call: by the GPU's own clock where there is one, which leaves out the host's wake-up."""
    if device.type == "cuda":
        return _event_seconds(call, device)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def queued_seconds(call: Call, device: torch.device) -> float:
    """Seconds of one of ``QUEUED`` calls that wait in the GPU's queue, so without the time to launch them.

    On a CPU, which has no queue, the time of one call.
    """
    if device.type != "cuda":
        return seconds(call, device)

    def calls() -> None:
        for _ in range(QUEUED):
            call()

    return _event_seconds(calls, device, pause=QUEUE_CYCLES) / QUEUED


def median_us(
    call: Call, device: torch.device, rounds: int, clock: Callable[[Call, torch.device], float] = seconds
) -> float:
    """Median of so many rounds in microseconds, after two calls to compile and to tune."""
    call()
    call()
    return 1e3 * summary(clock(call, device) for _ in range(rounds)).median_ms


def _event_seconds(call: Call, device: torch.device, pause: int = 0) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize(device)
    if pause:
        torch.cuda._sleep(pause)
    begin.record()
    call()
    end.record()
    synchronize(device)
    return begin.elapsed_time(end) / 1e3


def take_turns(calls: Mapping[str, Call], device: torch.device, budget: Budget) -> dict[str, Times]:
    """Time the calls by name, one of each a round; the budget is for all together."""
    for call in calls.values():
        seconds(call, device)  # compiles, tunes, allocates
    rounds = budget.rounds(sum(seconds(call, device) for call in calls.values()))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, device))
    return {name: summary(each) for name, each in times.items()}


def turn(call: Call, device: torch.device, lasting: float, most: int = 1000) -> list[float]:
    """Seconds of each of the calls that fit in so many seconds, at least one and at most ``most``.

    The first call wakes threads and fills caches; it counts only if it takes all the time.
    """
    first = seconds(call, device)
    if first > lasting:
        return [first]
    found: list[float] = []
    while sum(found) < lasting and len(found) < most:
        found.append(seconds(call, device))
    return found


def peak_mb(call: Call, device: torch.device) -> float:
    """Most megabytes that torch has allocated at a time during a call, on top of its inputs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes its own notes to stderr
    with torch.profiler.profile(profile_memory=True) as profiler:
        call()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 1e6
