"""What the package's Triton kernels need on several GPUs, and which kernels a call starts; no GPU is needed.

    python -m ecgot.kernels.resources [--all] [--targets sm_90,gfx942] [--kernel SUBSTRING]
                                      [--spills any|inner|none] [--json]

compiles the configurations that the launchers can pick, or a representative part of them (the default), as
the launcher does for the typical call of ecgot.kernels.compilation. One line for each of them and target says
whether it compiled; registers and spilled bytes per thread; shared bytes and warps of a program; how many
programs a multiprocessor holds; and of the inner loop, as found by ecgot.kernels.resources.machine_code: a
warp's instructions, the same times warps, and among them barriers, shuffles, exponentials, multiply-adds,
matrix products and stack accesses. "-" means unknown: the tool or the loop is missing. One line for each
target sums up. Exit code 1 if anything does not compile or spills (--spills says which spills count), 2 if an
argument is wrong.

    python -m ecgot.kernels.resources --launches [SUBSTRING] [--list]

counts the kernels that the calls of ecgot.kernels.resources.workloads start, torch's and Triton's, and the
bytes that these move, as ecgot.kernels.resources.launches says; with --list by kernel.

    python -m ecgot.kernels.resources --predict [SUBSTRING]

prints the table of docs/benchmarks.md: the same calls, and the time on an H100 that
ecgot.kernels.resources.model predicts.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NoReturn

from ecgot.kernels.dispatch import HAS_TRITON
from ecgot.kernels.resources.cases import TARGETS, Case, cases
from ecgot.kernels.resources.launches import count
from ecgot.kernels.resources.outcome import Outcome, check
from ecgot.kernels.resources.predictions import table
from ecgot.kernels.resources.workloads import WORKLOADS


class _Parser(argparse.ArgumentParser):
    """Its errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"resources: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check, the count or the prediction; returns the exit code."""
    options = _parser().parse_args(arguments)
    targets = options.targets.split(",")
    problem = _unusable(targets)
    for option, show in (("launches", _count), ("predict", _predict)):
        part = getattr(options, option)
        if problem is None and part is not None:
            chosen = [name for name in WORKLOADS if part in name]
            if chosen:
                show(chosen, options.list)
                return 0
            problem = f"--{option}: expected a part of {', '.join(map(repr, WORKLOADS))}, got {part!r}"
    jobs = []
    if problem is None:
        jobs = [(case, target) for target in targets for case in cases(target, options.all, options.kernel)]
        problem = None if jobs else f"--kernel: expected a part of a kernel's name, got {options.kernel!r}"
    if problem:
        print(f"resources: {problem}", file=sys.stderr)
        return 2
    outcomes = _run(jobs, printing=not options.json)
    if options.json:
        print(json.dumps([dataclasses.asdict(outcome) for outcome in outcomes]))
    else:
        for target in targets:
            print(f"{target}: {_summary([each for each in outcomes if each.target == target])}")
    failed, spilling, inner = _totals(outcomes)
    return 1 if failed or {"any": spilling, "inner": inner, "none": 0}[options.spills] else 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m ecgot.kernels.resources",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--all", action="store_true", help="every configuration (hours)")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated (default: %(default)s)")
    parser.add_argument(
        "--kernel", default="", metavar="SUBSTRING", help="only kernels with this in the name"
    )
    parser.add_argument(
        "--spills",
        choices=("any", "inner", "none"),
        default="any",
        help="which spills make the exit code 1: any, those with stack accesses in the inner loop, or none",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument(
        "--launches",
        nargs="?",
        const="",
        metavar="SUBSTRING",
        help="count kernels of the calls with this in the name (default: of all)",
    )
    parser.add_argument(
        "--predict",
        nargs="?",
        const="",
        metavar="SUBSTRING",
        help="predict the time of the calls with this in the name (default: of all)",
    )
    parser.add_argument("--list", action="store_true", help="with --launches: kernels by name")
    return parser


def _run(jobs: Sequence[tuple[Case, str]], printing: bool) -> list[Outcome]:
    outcomes = []
    # Forked workers would share torch's thread pools.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        for outcome in pool.map(check, *zip(*jobs, strict=True)):
            outcomes.append(outcome)
            if printing:
                print(_line(outcome), flush=True)
    return outcomes


def _unusable(targets: Sequence[str]) -> str | None:
    unknown = [target for target in targets if target not in TARGETS]
    if unknown:
        return f"--targets: expected some of {', '.join(TARGETS)}, got {unknown[0]!r}"
    if not HAS_TRITON:
        return "triton is not installed"
    from triton import knobs

    if knobs.runtime.interpret:  # Triton's own reading of the variable
        return "TRITON_INTERPRET: expected unset, as interpreted kernels are not compiled"
    return None


def _count(names: Sequence[str], listing: bool) -> None:
    width = max(map(len, names))
    for name in names:
        found = count(WORKLOADS[name]())
        print(
            f"{name:{width}} torch {found.torch:5} triton {found.triton:4} total {found.total:5} "
            f"MB {found.megabytes:9.1f}",
            flush=True,
        )
        for kernel, times, megabytes in found.by_name() if listing else ():
            print(f"    {times:5} {kernel:40} MB {megabytes:9.1f}")


def _predict(names: Sequence[str], _listing: bool) -> None:
    for row in table(names):
        print(row, flush=True)


def _line(outcome: Outcome) -> str:
    if outcome.error is not None:
        return f"FAILED {outcome.target:7} {outcome.case}: {outcome.error}"
    columns = (
        ("registers", outcome.registers, 3),
        ("spilled", outcome.spilled_bytes, 5),
        ("shared", outcome.shared_bytes, 6),
        ("warps", outcome.warps, 2),
        ("programs", outcome.programs, 2),
        ("instructions", outcome.instructions, 5),
        ("x warps", outcome.issued, 6),
        ("barriers", outcome.barriers, 2),
        ("shuffles", outcome.shuffles, 3),
        ("exp", outcome.exponentials, 4),
        ("multiply-add", outcome.multiply_adds, 5),
        ("matrix", outcome.matrix_products, 4),
        ("stack", outcome.stack_accesses, 4),
    )
    shown = " ".join(f"{name} {'-' if value is None else value:>{width}}" for name, value, width in columns)
    status = "SPILLS" if outcome.spilled_bytes else "ok"
    return f"{status:6} {outcome.target:7} {shown} {outcome.case}"


def _summary(outcomes: Sequence[Outcome]) -> str:
    failed, spilling, inner = _totals(outcomes)
    return f"{len(outcomes)} compilations, {failed} failed, {spilling} spilling, {inner} in inner loops"


def _totals(outcomes: Sequence[Outcome]) -> tuple[int, int, int]:
    """How many failed, spill, and do so in the inner loop."""
    return (
        sum(outcome.error is not None for outcome in outcomes),
        sum(bool(outcome.spilled_bytes) for outcome in outcomes),
        sum(bool(outcome.stack_accesses) for outcome in outcomes),
    )


if __name__ == "__main__":
    sys.exit(main())
