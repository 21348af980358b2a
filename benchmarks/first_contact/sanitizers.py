"""Every kernel once under compute-sanitizer: reads and writes out of bounds, and races in shared memory."""

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.first_contact.items import Item, Row
from benchmarks.first_contact.sizes import Sizes
from benchmarks.kernel_cases import CASES
from benchmarks.output import ROOT
from ecgot.bench.providers import OURS

TOOLS = ("memcheck", "racecheck")


def items(sizes: Sizes, _out: Path) -> list[Item]:
    """A tool and a case each; without a GPU or Triton's interpreter no kernel runs."""
    if not sizes.kernels:
        return []
    return [
        Item(f"{tool} {case}", functools.partial(sanitize, tool, case), 120)
        for tool in TOOLS
        for case in CASES
    ]


def sanitize(tool: str, case: str) -> Iterator[Row]:
    """Refused where the tool found an error or could not look."""
    row: Row = {"case": f"{tool} {case}", "provider": OURS}
    if shutil.which("compute-sanitizer") is None:
        yield row | {"refused": "compute-sanitizer is not installed"}
        return
    # Without torch's cache each tensor is an allocation of its own, with bounds that a tool can check.
    command = ["compute-sanitizer", "--tool", tool, sys.executable, "-m", "benchmarks.kernel_cases", case]
    settings = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    said = done.stdout + done.stderr
    print(said, file=sys.stderr)
    yield row | verdict(said)


def verdict(said: str) -> Row:
    """What a tool's last lines say: how many errors (memcheck) or hazards (racecheck), or why neither."""
    found = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", said)
    if not found:
        last = said.strip().splitlines()[-1:] or ["nothing"]
        return {"refused": f"no verdict: {last[0]}"[:300]}
    count = sum(int(errors or hazards) for errors, hazards in found)
    first = next(
        (line for line in said.splitlines() if re.search(r"=+ *(Invalid|Error|Race|Warning)", line)), ""
    )
    return (
        {"note": "nothing found"} if not count else {"refused": f"{count} found: {first.strip('= ')}"[:300]}
    )
