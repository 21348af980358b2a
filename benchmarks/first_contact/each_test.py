"""A pytest plugin: a row in OUT for each test as it ends; a test that loses the GPU loses it for no other.

It is loaded by ``-p benchmarks.first_contact.each_test`` with ``--contact-out OUT``. The first case of every
test comes first, then the second of each, so that a run cut short has still tried a bit of everything.
"""

import collections
import faulthandler
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.first_contact import journal
from benchmarks.output import stamp

LONGEST = 90.0  # seconds after which a test's process ends, and with it the test
SHOWN = 300
STAMP = pytest.StashKey[dict[str, str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the folder to write to and the tests that are known already."""
    # Plain strings, which xdist can hand to its workers.
    parser.addoption("--contact-out", required=True)
    parser.addoption("--contact-known", help="a file with tests not to run, one a line")


def pytest_configure(config: pytest.Config) -> None:
    """True fp32 in what kernels are compared with."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if not _is_worker(config):
        config.stash[STAMP] = stamp()
        config.pluginmanager.register(Reports(config))


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is known, and put the first case of every test first."""
    known = config.getoption("--contact-known")
    done = set(Path(known).read_text(encoding="utf-8").splitlines()) if known else set()
    due = [item for item in items if item.nodeid not in done]
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
    seen: collections.Counter[str] = collections.Counter()
    order: dict[str, int] = {}
    for item in due:
        test = item.nodeid.partition("[")[0]
        order[item.nodeid] = seen[test]
        seen[test] += 1
    items[:] = sorted(due, key=lambda item: order[item.nodeid])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """End a process that hangs; xdist starts another for the other tests."""
    faulthandler.dump_traceback_later(LONGEST, exit=_is_worker(item.config))
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Wait for what a test launched, so that it fails in that test and not in the next."""
    result = yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return result


def pytest_runtest_logfinish(nodeid: str) -> None:
    """End a worker that has lost its GPU: xdist starts another for the next test."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


class Reports:
    """Writes a row for each test that comes to an end."""

    def __init__(self, config: pytest.Config) -> None:
        self.out, self.stamp = Path(config.getoption("--contact-out")), config.stash[STAMP]
        self.seconds: dict[str, float] = collections.defaultdict(float)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test has ended with its call, or with whatever else failed."""
        self.seconds[report.nodeid] += getattr(report, "duration", 0.0)
        if report.when == "call" or not report.passed:
            row: dict[str, Any] = {"test": report.nodeid, "outcome": report.outcome}
            row |= {"seconds": self.seconds[report.nodeid], "message": _message(report)}
            journal.append(self.out, journal.TESTS, self.stamp | row)


def _message(report: pytest.TestReport) -> str:
    """The line that says what is wrong, or why a test was skipped."""
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):  # skipped: file, line, reason
        return report.longrepr[2][:SHOWN]
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(crash.message if crash else report.longrepr or "")
    return " ".join(text.split())[:SHOWN]
