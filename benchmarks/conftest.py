"""Options, fixtures and the CSV of the benchmarks: ``pytest benchmarks/ [--csv PATH] [--threads N]``.

Gate, then time: a benchmark hands its errors against fp64 to ``measure`` together with the function, and a
wrong result is never timed. A peer that is wrong is skipped with its error; ecgot fails.

A time is the wall clock of one call, from an idle device until it is idle again. Launches and Python are
part of it, as they are part of a training step. All products are true fp32 (no TF32), for every provider.
"""

import csv
import math
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from ecgot.bench import OURS, Measurement, as_row, origin
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
# A measurement gets as many rounds as fit in the budget, within these bounds.
BUDGET_S, MIN_ROUNDS, MAX_ROUNDS = 0.5, 5, 100
TURNS_BUDGET_S, MIN_TURNS = 3.0, 9  # of each provider where they take turns

Row = dict[str, str | int]
Gate = Callable[[str, dict[str, tuple[float, float]]], None]
Measure = Callable[..., None]
Errors = dict[str, tuple[float, float]]
ROWS = pytest.StashKey[list[Row]]()
ORIGIN = pytest.StashKey[Row]()


# --- options and set-up -------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--csv", type=Path, metavar="PATH", help="write the measurements to this file")
    parser.addoption("--threads", type=int, metavar="N", help="CPU threads of torch (default: torch's)")


def pytest_configure(config: pytest.Config) -> None:
    if INTERPRETED:
        raise pytest.UsageError("TRITON_INTERPRET=1: interpreted kernels are not worth timing; unset it")
    path, threads = config.getoption("--csv"), config.getoption("--threads")
    if path is not None and not path.parent.is_dir():
        raise pytest.UsageError(f"--csv: got {path}, accepted is a file in a folder that exists")
    if threads is not None:
        if threads < 1:
            raise pytest.UsageError(f"--threads: got {threads}, accepted is an integer >= 1")
        torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True  # shapes are fixed: cuDNN may look for its best algorithm
    if "s" not in config.option.reportchars:
        config.option.reportchars += "s"  # why something was not timed is part of the result
    config.stash[ROWS] = []
    config.stash[ORIGIN] = {**origin(), "ecgot commit": commit(config.rootpath)}


def commit(root: Path) -> str:
    """The short commit, "+dirty" where the code measured or measuring differs from it."""
    try:
        head = _git(root, "rev-parse", "--short", "HEAD")
        # Earlier results beside the benchmarks do not make the code another one.
        changes = _git(root, "status", "--porcelain", "--", "ecgot", ":(glob)benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+dirty" if changes else head


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


# --- fixtures -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def gate() -> Gate:
    """gate(provider, {name: (error, tolerance)}): skips a peer, fails ecgot, where an error is too large."""

    def check(provider: str, errors: dict[str, tuple[float, float]]) -> None:
        wrong = [
            f"{name} error {error:.1e} > {tolerance:.1e}"
            for name, (error, tolerance) in errors.items()
            if not error <= tolerance  # NaN is wrong as well
        ]
        if wrong:
            refuse = pytest.fail if provider == OURS else pytest.skip
            refuse(f"{provider} is not timed: {', '.join(wrong)}")

    return check


@pytest.fixture
def measure(
    benchmark: BenchmarkFixture, device: torch.device, gate: Gate, request: pytest.FixtureRequest
) -> Measure:
    """measure(function, provider=, case=, errors=) gates by {name: (error, tolerance)}, times and records.

    gflop, gbyte: work of a call, for the rates at which it is done.
    """

    def run(
        function: Callable[[], object],
        *,
        provider: str,
        case: str,
        errors: dict[str, tuple[float, float]] | None = None,
        gflop: float | None = None,
        gbyte: float | None = None,
    ) -> None:
        gate(provider, errors or {})
        name = request.node.originalname.removeprefix("test_")
        error = max((error for error, _ in (errors or {}).values()), default=math.nan)
        benchmark.group = f"{name} {case}"
        benchmark.extra_info["max_error"] = None if math.isnan(error) else error

        def synchronised() -> None:
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(synchronised, rounds=_rounds(synchronised), warmup_rounds=2)
        if benchmark.stats is not None:  # None under --benchmark-disable
            row: Row = {"benchmark": name, "provider": provider, "case": case} | _timing(benchmark)
            row["max_error"] = "" if math.isnan(error) else f"{error:.2e}"
            for rate, work in (("gflop_s", gflop), ("gbyte_s", gbyte)):
                row[rate] = "" if work is None else f"{1e3 * work / float(row['median_ms']):.4g}"
            request.config.stash[ROWS].append(row)

    return run


@pytest.fixture
def compare(device: torch.device, request: pytest.FixtureRequest) -> Callable[..., None]:
    """compare({provider: make}, case=) times what ``make()`` returns: a function and its errors.

    On a CPU, whose speed wavers, providers take turns; on a GPU each runs alone, as graphs hold much memory.
    Who is wrong or fails is recorded with the reason; ecgot also fails the test.
    """

    def run(
        makers: dict[str, Callable[[], tuple[Callable[[], object], Errors]]],
        *,
        case: str,
        gflop: float | None = None,
        gbyte: float | None = None,
    ) -> None:
        name = request.node.originalname.removeprefix("test_")
        groups = [list(makers)] if device.type == "cpu" else [[provider] for provider in makers]
        rows: list[Row] = []
        for group in groups:
            ready, made = {}, {}
            for provider in group:
                row: Row = {"benchmark": name, "provider": provider, "case": case}
                rows.append(row)
                try:
                    function, errors = makers[provider]()
                    ready[provider], made[provider] = function, row
                    worst = max(errors, key=lambda error: errors[error][0] / max(errors[error][1], 1e-30))
                    error, tolerance = errors[worst]
                    row["max_error"] = f"{error:.2e}"
                    if not error <= tolerance:
                        row["refused"] = f"{worst} error {error:.1e} > {tolerance:.1e}"
                        del ready[provider]
                except (RuntimeError, torch.OutOfMemoryError) as failure:
                    row["refused"] = str(failure).partition("\n")[0]
            for provider, times in _in_turns(ready, device).items():
                row = made[provider]
                row |= _quantiles(times)
                for rate, work in (("gflop_s", gflop), ("gbyte_s", gbyte)):
                    row[rate] = "" if work is None else f"{1e3 * work / float(row['median_ms']):.4g}"
        request.config.stash[ROWS].extend(rows)
        for row in rows:
            print(f"{name} {case} {row['provider']}: {row.get('median_ms', '-')} ms {row.get('refused', '')}")
            if row["provider"] == OURS and "refused" in row:
                pytest.fail(f"{OURS} is not timed: {row['refused']}")

    return run


def _in_turns(functions: dict[str, Callable[[], object]], device: torch.device) -> dict[str, list[float]]:
    """Sorted seconds of each function's calls."""

    def seconds(function: Callable[[], object]) -> float:
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for function in functions.values():
        seconds(function)  # compiles, tunes, allocates
    slowest = max((seconds(function) for function in functions.values()), default=1.0)
    rounds = int(min(max(TURNS_BUDGET_S / slowest, MIN_TURNS), MAX_ROUNDS))
    times: dict[str, list[float]] = {provider: [] for provider in functions}
    for _ in range(rounds):
        for provider, function in functions.items():
            times[provider].append(seconds(function))
    return {provider: sorted(each) for provider, each in times.items()}


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, list[Measurement]], None]:
    """record(benchmark, measurements): into the CSV; fails where ecgot was refused."""

    def run(name: str, measurements: list[Measurement]) -> None:
        for measurement in measurements:
            values = as_row(measurement)
            shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items()}
            request.config.stash[ROWS].append(
                {"benchmark": name} | {k: v for k, v in shown.items() if v is not None}
            )
            if measurement.provider == OURS and measurement.refused:
                pytest.fail(f"{OURS} is not timed: {measurement.refused}")

    return run


def _rounds(function: Callable[[], None]) -> int:
    function()  # compiles, tunes, allocates
    start = time.perf_counter()
    function()
    rounds = BUDGET_S / max(time.perf_counter() - start, 1e-6)
    return int(min(max(rounds, MIN_ROUNDS), MAX_ROUNDS))


def _timing(benchmark: BenchmarkFixture) -> Row:
    return _quantiles(sorted(benchmark.stats.stats.data))


def _quantiles(times: list[float]) -> Row:
    last = len(times) - 1
    chosen = {
        "median_ms": statistics.median(times),
        "q20_ms": times[last // 5],
        "q80_ms": times[4 * last // 5],
    }
    return {"rounds": len(times)} | {name: f"{1e3 * seconds:.4g}" for name, seconds in chosen.items()}


# --- CSV ----------------------------------------------------------------------------------------------------


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    path, rows = config.getoption("--csv"), config.stash[ROWS]
    if path is None:
        return
    finished = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    if not (finished and rows):
        terminalreporter.write_line(f"{path}: not written, the session is not complete or measured nothing")
        return
    _write_csv(path, [config.stash[ORIGIN] | row for row in rows])
    terminalreporter.write_line(f"{path}: {len(rows)} measurements")


def _write_csv(path: Path, rows: list[Row]) -> None:
    """Written beside its place and renamed, so that no half of it is ever seen."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
