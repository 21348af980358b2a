"""What the profiler counts in the three kernels that matter most, and how near a roof each comes.

The roofs are the chip's own: the busiest of its units, and its memory's bandwidth. Clocks stay as they are.
"""

import csv
import functools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.first_contact import journal
from benchmarks.first_contact.items import Item, Row
from benchmarks.first_contact.sizes import Sizes
from benchmarks.output import ROOT, stamp
from ecgot.bench.providers import OURS

KERNELS = {  # what ncu is to look for, and the case that launches it
    "solver": ("_sinkhorn_fwd", "solver"),
    "convolution forward": ("_conv1d_fwd", "norm"),
    "convolution weight gradient": ("_conv1d_wgrad", "norm"),
}
COMPUTE = "sm__throughput.avg.pct_of_peak_sustained_elapsed"
MEMORY = "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed"
TIME = "gpu__time_duration.sum"
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "SchedulerStats", "InstructionStats")


def items(_sizes: Sizes, out: Path) -> list[Item]:
    """One kernel each."""
    return [Item(name, functools.partial(profile, name, out), 45) for name in KERNELS]


def profile(name: str, out: Path) -> Iterator[Row]:
    """One launch of a kernel under ncu: its numbers into ``profile.csv``, the share of its roof as a row."""
    kernel, case = KERNELS[name]
    row: Row = {"case": name, "provider": OURS}
    if shutil.which("ncu") is None:
        yield row | {"refused": "ncu is not installed"}
        return
    command = ["ncu", "--clock-control", "none", "--csv", "--page", "raw"]
    command += [part for section in SECTIONS for part in ("--section", section)]
    command += ["--kernel-name", f"regex:{kernel}", "--launch-count", "1"]
    command += [sys.executable, "-m", "benchmarks.kernel_cases", "--large", case]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stderr, file=sys.stderr)
    found = list(metrics(done.stdout))
    if not found:
        said = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
        yield row | {"refused": f"ncu counted nothing: {said[-1]}"[:300]}
        return
    stamped = stamp()
    for each in found:
        journal.append(out, journal.PROFILE, stamped | {"item": name} | each)
    values = {each["metric"]: f"{each['value']} {each['unit']}".strip() for each in found}
    shares = f"compute {values.get(COMPUTE, '?')}, memory {values.get(MEMORY, '?')}"
    yield row | {"rate": shares, "note": f"{found[0]['kernel']}: {values.get(TIME, '?')}"}


def metrics(output: str) -> Iterator[dict[str, str]]:
    """Kernel, metric, unit and value of ncu's raw CSV: a line of names, one of units, one for each kernel."""
    lines = output.splitlines()
    start = next((at for at, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    table = list(csv.reader(lines[start:]))
    if len(table) < 3:
        return
    names, units, *kernels = table
    for values in kernels:
        kernel = dict(zip(names, values, strict=False))["Kernel Name"]
        for metric, unit, value in zip(names, units, values, strict=False):
            if "__" in metric:
                yield {"kernel": kernel, "metric": metric, "unit": unit, "value": value}
