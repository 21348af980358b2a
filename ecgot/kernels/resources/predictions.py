"""The table of docs/benchmarks.md: what is counted and predicted of the headline cases."""

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor

from ecgot.kernels.resources.launches import count
from ecgot.kernels.resources.model import GAP_S, Estimate, estimates
from ecgot.kernels.resources.workloads import WORKLOADS

# The step of benchmarks.first_contact that measures a call, by the first word of its name, if one does.
STEPS: dict[str, str | None] = {
    "sinkhorn": "transport",
    "pairwise": "transport",
    "streaming": "streaming",
    "doubly": None,
    "conv1d_norm": "table",
    "xresnet1d101": "networks",
}
SHARE = 0.05  # of its call's time that a kernel must take for a row of its own
HEAD = (
    "| call, and its longest kernels | kernels | MB | inner loop: instructions x warps | programs an SM "
    "| predicted us (eager) | limit | measured |",
    "| --- | --- | --- | --- | --- | --- | --- | --- |",
)


def table(names: Iterable[str]) -> Iterator[str]:
    """Lines of Markdown, the rows of a call when it is done.

    names: of ``WORKLOADS``.
    """
    yield from HEAD
    context = multiprocessing.get_context("spawn")  # forked workers would share torch's thread pools
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        for name in names:
            found = estimates(count(WORKLOADS[name]()), pool)
            yield from rows(name, found)


def rows(name: str, found: list[Estimate]) -> Iterator[str]:
    """The rows of one call: its own, and one for each kernel that takes at least ``SHARE`` of its time."""
    kernels = sum(each.launches for each in found)
    seconds = sum(each.seconds for each in found)
    graph, eager = (1e6 * (seconds + kernels * gap) for gap in (GAP_S["graph"], GAP_S["eager"]))
    megabytes = sum(each.megabytes for each in found)
    step = STEPS[name.split()[0]]
    measured = f"not measured (`{step}`)" if step else "not measured"
    yield _row(name, kernels, f"{megabytes:.0f}", "", "", f"{graph:.0f} ({eager:.0f})", "", measured)
    for each in found:
        if each.seconds < SHARE * seconds:
            continue
        issued = programs = "-"
        if each.code is not None:
            programs = str(each.code.programs)
            issued = f"{each.code.instructions['main']} x {each.code.warps}" if each.code.issued else "-"
        time = f"{1e6 * each.seconds:.0f}"
        yield _row(
            f"- {each.name}", each.launches, f"{each.megabytes:.0f}", issued, programs, time, each.limit, ""
        )


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"
