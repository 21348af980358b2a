"""Options, fixtures and the CSV of the benchmarks: ``pytest benchmarks/ [--csv PATH] [--threads N]``.

Check, then time: a benchmark hands its errors against fp64 to ``measure`` or ``compare`` together with the
function, and a wrong result is never timed. A peer that is wrong is skipped with its error; ecgot fails.

``ecgot.bench.stopwatch`` says what a time is. All products are true fp32 (no TF32), for every provider.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.output import stamp, write_rows
from ecgot.bench.cases import Measurement
from ecgot.bench.providers import OURS
from ecgot.bench.stopwatch import Budget, Call, Times, seconds, summary, synchronize, take_turns
from ecgot.kernels.dispatch import INTERPRETED

COLUMNS = (
    "benchmark",
    "provider",
    "case",
    "device",
    "torch",
    "triton",
    "pot",
    "geomloss",
    "flash_sinkhorn",
    "numba",
    "ecgot commit",
    "steps",
    "rounds",
    "median_ms",
    "q20_ms",
    "q80_ms",
    "value_error",
    "gradient_error",
    "marginal_error",
    "max_error",
    "peak_mb",
    "gflop_s",
    "gbyte_s",
    "refused",
)
BUDGET = Budget(0.5, 5, 100)  # of a function timed alone
TURNS_BUDGET_S, MIN_TURNS, MAX_TURNS = 3.0, 9, 100  # of each provider where they take turns

Row = dict[str, Any]
Errors = Mapping[str, tuple[float, float]]  # name to (error, tolerance)
Measure = Callable[..., None]
Compare = Callable[..., None]
Record = Callable[[str, list[Measurement]], None]
Maker = Callable[[], tuple[Call, Errors]]
ROWS: pytest.StashKey[list[Row]] = pytest.StashKey()
STAMP: pytest.StashKey[dict[str, str]] = pytest.StashKey()


# --- options and set-up -------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--csv`` and ``--threads``."""
    parser.addoption("--csv", type=Path, metavar="PATH", help="write the measurements to this file")
    parser.addoption("--threads", type=int, metavar="N", help="CPU threads of torch (default: torch's)")


def pytest_configure(config: pytest.Config) -> None:
    """Check the options and set torch's precision and threads."""
    if INTERPRETED:
        raise pytest.UsageError("TRITON_INTERPRET=1: interpreted kernels are not worth timing; unset it")
    path, threads = config.getoption("--csv"), config.getoption("--threads")
    if path is not None and not path.parent.is_dir():
        raise pytest.UsageError(f"--csv: expected a file in a folder that exists, got {path}")
    if threads is not None:
        if threads < 1:
            raise pytest.UsageError(f"--threads: expected an integer >= 1, got {threads}")
        torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True  # shapes are fixed: cuDNN may look for its best algorithm
    if "s" not in config.option.reportchars:
        config.option.reportchars += "s"  # why something was not timed is part of the result
    config.stash[ROWS] = []
    config.stash[STAMP] = stamp()


# --- fixtures -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What a call does, for the rates at which it is done; None where it is not known."""

    gflop: float | None = None
    gbyte: float | None = None

    def rates(self, median_ms: float) -> Row:
        """Columns of the CSV."""
        work = {"gflop_s": self.gflop, "gbyte_s": self.gbyte}
        return {
            rate: "" if amount is None else f"{1e3 * amount / median_ms:.4g}" for rate, amount in work.items()
        }


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same data in every run."""
    torch.manual_seed(0)


@pytest.fixture
def measure(benchmark: BenchmarkFixture, device: torch.device, request: pytest.FixtureRequest) -> Measure:
    """measure(function, provider=, case=, errors=, work=): check the errors, then time and record."""

    def run(
        function: Call, *, provider: str, case: str, errors: Errors | None = None, work: Work | None = None
    ) -> None:
        errors = errors or {}
        refused = _too_large(errors)
        if refused:
            refuse = pytest.fail if provider == OURS else pytest.skip
            refuse(f"{provider} is not timed: {refused}")
        name = request.node.originalname.removeprefix("test_")
        error = max((error for error, _ in errors.values()), default=math.nan)
        benchmark.group = f"{name} {case}"
        benchmark.extra_info["max_error"] = None if math.isnan(error) else error

        def synchronized() -> None:
            function()
            synchronize(device)

        if benchmark.disabled:  # it is enough that it runs
            function()
            return
        seconds(function, device)  # compiles, tunes, allocates
        rounds = BUDGET.rounds(seconds(function, device))
        benchmark.pedantic(synchronized, rounds=rounds, warmup_rounds=2)
        if benchmark.stats is not None:
            times = summary(benchmark.stats.stats.data)
            row: Row = {"benchmark": name, "provider": provider, "case": case} | _columns(times)
            row["max_error"] = "" if math.isnan(error) else f"{error:.2e}"
            _keep(request.config, [row | (work or Work()).rates(times.median_ms)])

    return run


@pytest.fixture
def compare(device: torch.device, request: pytest.FixtureRequest) -> Compare:
    """compare({provider: make}, case=, work=) times what ``make()`` returns: a function and its errors.

    On a CPU, whose speed wavers, providers take turns; on a GPU each runs alone, as graphs hold much memory.
    A provider that is wrong or fails is recorded with the reason; ecgot also fails the test.
    """

    def run(makers: Mapping[str, Maker], *, case: str, work: Work | None = None) -> None:
        name = request.node.originalname.removeprefix("test_")
        groups = [list(makers)] if device.type == "cpu" else [[provider] for provider in makers]
        rows: list[Row] = []
        for group in groups:
            found = _compare_group({provider: makers[provider] for provider in group}, work or Work(), device)
            rows += [{"benchmark": name, "case": case} | row for row in found]
        _keep(request.config, rows)
        for row in rows:
            print(f"{name} {case} {row['provider']}: {row.get('median_ms', '-')} ms {row.get('refused', '')}")
        _fail_where_refused(rows)

    return run


def _compare_group(makers: Mapping[str, Maker], work: Work, device: torch.device) -> list[Row]:
    """A row for each provider, those that are right timed in turns."""
    rows: dict[str, Row] = {provider: {"provider": provider} for provider in makers}
    ready: dict[str, Call] = {}
    for provider, make in makers.items():
        row = rows[provider]
        try:
            function, errors = make()
        except (RuntimeError, torch.OutOfMemoryError) as failure:
            row["refused"] = str(failure).partition("\n")[0]
            continue
        row["max_error"] = f"{max(error for error, _ in errors.values()):.2e}"
        refused = _too_large(errors)
        if refused:
            row["refused"] = refused
        else:
            ready[provider] = function
    budget = Budget(TURNS_BUDGET_S * len(ready), MIN_TURNS, MAX_TURNS)
    for provider, times in take_turns(ready, device, budget).items():
        rows[provider] |= _columns(times) | work.rates(times.median_ms)
    return list(rows.values())


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """record(benchmark, measurements): into the CSV; fails where ecgot was refused."""

    def run(name: str, measurements: list[Measurement]) -> None:
        rows = [_shown(measurement.as_row()) for measurement in measurements]
        _keep(request.config, [{"benchmark": name} | row for row in rows])
        _fail_where_refused(rows)

    return run


def _too_large(errors: Errors) -> str:
    """The errors above their tolerance in words; empty where there are none."""
    return ", ".join(
        f"{name} error {error:.1e} > {tolerance:.1e}"
        for name, (error, tolerance) in errors.items()
        if not error <= tolerance  # NaN is wrong as well
    )


def _fail_where_refused(rows: Iterable[Row]) -> None:
    for row in rows:
        if row["provider"] == OURS and row.get("refused"):
            pytest.fail(f"{OURS} is not timed: {row['refused']}")


def _columns(times: Times) -> Row:
    return _shown(vars(times))


def _shown(values: Mapping[str, Any]) -> Row:
    """Numbers with four digits; what is not known is left out."""
    known = {name: value for name, value in values.items() if value is not None}
    return {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in known.items()}


# --- CSV ----------------------------------------------------------------------------------------------------


def _keep(config: pytest.Config, rows: list[Row]) -> None:
    """Take rows and write the CSV anew, so that a session that is killed leaves what it has measured."""
    config.stash[ROWS].extend(rows)
    path = config.getoption("--csv")
    if path is not None:
        write_rows(path, [config.stash[STAMP] | row for row in config.stash[ROWS]], COLUMNS)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what the CSV holds."""
    path = config.getoption("--csv")
    if path is not None:
        terminalreporter.write_line(f"{path}: {len(config.stash[ROWS])} measurements")
