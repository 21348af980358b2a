"""The comparison: each provider in a process of its own, one of them at work at a time.

What a library leaves behind in a process, such as threads that wait by spinning, slows the others in it down;
so they share none. They still take turns, so that a busy machine slows all of them alike.
"""

import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection

import torch

from ecgot.bench import measure
from ecgot.bench.cases import Case, Measurement, PairsCase
from ecgot.bench.providers import PAIRS, providers
from ecgot.bench.stopwatch import peak_mb, summary, turn

TURNS, TURN_S = 7, 0.15  # of each provider, and how long one lasts


def compare(
    case: Case | PairsCase, device: torch.device, names: Iterable[str] | None = None
) -> list[Measurement]:
    """Measure the named providers, by default all of the device, on one case: check, then time in turns."""
    known = (
        list(PAIRS if isinstance(case, PairsCase) else providers(device)) if names is None else list(names)
    )
    exact = [each.cpu().numpy() for each in measure.truth(case, device)]
    seats = [_Seat(name, case, device, exact) for name in known]
    try:
        ready = [seat for seat in seats if seat.check()]
        for _ in range(TURNS):
            for seat in ready:
                seat.turn()
        for seat in ready:
            seat.finish()
    finally:
        for seat in seats:
            seat.close()
    return [seat.row for seat in seats]


class _Seat:
    """A provider's process, and what it has measured."""

    def __init__(
        self, name: str, case: Case | PairsCase, device: torch.device, exact: Sequence[object]
    ) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        threads = case.threads or torch.get_num_threads()
        arguments = (theirs, name, case, device.type, exact, threads)
        self._process = spawn.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self._seconds: list[float] = []
        self.row = Measurement(str(case), name)

    def check(self) -> bool:
        """Whether the provider is right, and may be timed."""
        self._receive("row")
        return not self.row.refused

    def turn(self) -> None:
        """Some calls, or one that takes long."""
        if not self.row.refused:
            self._connection.send(TURN_S)
            self._receive("seconds")

    def finish(self) -> None:
        """The times in order, and the memory of a call."""
        if self.row.refused:
            return
        took = summary(self._seconds)
        self.row.rounds, self.row.median_ms = took.rounds, took.median_ms
        self.row.q20_ms, self.row.q80_ms = took.q20_ms, took.q80_ms
        self._connection.send(None)
        self._receive("memory")

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join(5)
        self._process.kill()

    def _receive(self, what: str) -> None:
        try:
            found = self._connection.recv()
        except (EOFError, ConnectionError):  # out of memory, say
            self._process.join(5)
            self.row = Measurement(
                self.row.case, self.row.provider, f"its process ended with {self._process.exitcode}"
            )
            return
        if what == "row":
            self.row = found
        elif what == "seconds":
            self._seconds += found
        else:
            self.row.peak_mb = found


def _limit_memory() -> None:
    """Let this process fail at three quarters of the machine's memory, before the system ends others."""
    if importlib.util.find_spec("resource") is None:  # Windows
        return
    resource = importlib.import_module("resource")
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_AS, (whole * 3 // 4,) * 2)


def _serve(
    connection: Connection,
    name: str,
    case: Case | PairsCase,
    device_type: str,
    exact: Sequence[object],
    threads: int,
) -> None:
    """A provider's process: its row, then the seconds of calls for each turn, then a call's memory."""
    pairs, device = isinstance(case, PairsCase), torch.device(device_type)
    provider = PAIRS[name] if pairs else providers(device)[name]
    if provider.hidden:
        sys.modules[provider.hidden] = None  # type: ignore[assignment]  # an import then fails
    if device_type == "cpu":
        _limit_memory()
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    row, call = measure.checked(name, case, device, tuple(map(torch.as_tensor, exact)))
    connection.send(row)
    if call is None:
        return
    try:
        while (wanted := connection.recv()) is not None:
            connection.send(turn(call, device, wanted))
        # A graph takes its memory when it is recorded, not during a call.
        connection.send(float("nan") if getattr(provider, "is_graph", False) else peak_mb(call, device))
    except EOFError:  # nobody waits any more
        return
