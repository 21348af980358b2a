"""All that a GPU has to tell, in steps: correctness, ceilings, comparisons, tuning, profiles.

    python -m benchmarks.campaign OUT [STEP ...] [--minutes 14] [--list]

A step writes OUT/STEP.log and what it measures as OUT/STEP.csv. One that succeeded is not run again, so that
the same command goes on where an earlier one stopped, on this day or another. A step that would not end in
the minutes that are left is cut off and is not done. OUT/campaign.json says what ran, for how long, on what.

``throughput`` trains on the data set that ECGOT_PTBXL names; ``memcheck`` and ``racecheck`` want
compute-sanitizer, the profiles ncu. What is missing is named and left out.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ecgot.bench import origin
from ecgot.files import write_text

PYTHON = sys.executable
SANITIZE = ("compute-sanitizer", "--error-exitcode", "1")
# Clocks stay as they are, so that a profile's times compare with a benchmark's.
PROFILE = ("ncu", "--clock-control", "none", "--set", "full", "--launch-count", "3", "--force-overwrite")


@dataclass(frozen=True)
class Step:
    """command: ``{out}`` is the step's path without suffix; needs: a program, or a variable with $."""

    command: tuple[str, ...]
    needs: str = ""


def _pytest(*arguments: str) -> tuple[str, ...]:
    return PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments


def _cases(*arguments: str) -> tuple[str, ...]:
    return PYTHON, "-m", "benchmarks.kernel_cases", *arguments


def _profile(kernel: str, case: str) -> tuple[str, ...]:
    return *PROFILE, "--kernel-name", f"regex:{kernel}", "--export", "{out}", *_cases("--large", case)


TRAIN = (
    PYTHON,
    "-c",
    "from ecgot.cli import main; main()",
    "train",
    "--data",
    "$ECGOT_PTBXL",
    "--out",
    "{out}",
)
STEPS = {  # the cheapest that can show a mistake come first
    "cases": Step(_cases()),
    "kernels": Step(_pytest("tests/kernels")),
    "tests": Step(_pytest("tests", "--ignore=tests/kernels")),
    "memcheck": Step((*SANITIZE, "--tool", "memcheck", *_cases()), "compute-sanitizer"),
    "racecheck": Step((*SANITIZE, "--tool", "racecheck", *_cases()), "compute-sanitizer"),
    "peaks": Step(_pytest("benchmarks/test_encoders.py", "-k", "peak", "--csv", "{out}.csv")),
    "transport": Step(_pytest("benchmarks/test_sinkhorn.py", "--csv", "{out}.csv")),
    "convolutions": Step(_pytest("benchmarks/test_conv1d.py", "--csv", "{out}.csv")),
    "training_step": Step(_pytest("benchmarks/test_training_step.py", "--csv", "{out}.csv")),
    "throughput": Step(
        (*TRAIN, "--stage", "align", "--resume", "align.epochs=2", "cuda_graph=true"), "$ECGOT_PTBXL"
    ),
    "warps": Step((PYTHON, "-m", "benchmarks.sinkhorn_warps", "{out}.csv")),
    "table": Step((PYTHON, "-m", "benchmarks.conv1d_table", "--out", "{out}.csv")),
    "profile_sinkhorn": Step(_profile("_sinkhorn_fwd", "sinkhorn"), "ncu"),
    "profile_forward": Step(_profile("_conv1d_fwd", "norm"), "ncu"),
    "profile_weight": Step(_profile("_conv1d_wgrad", "norm"), "ncu"),
    "growth": Step((PYTHON, "-m", "benchmarks.growth", "{out}.csv", "{out}.png")),
    "encoders": Step(_pytest("benchmarks/test_encoders.py", "-k", "not peak", "--csv", "{out}.csv")),
}


def missing(step: Step) -> str:
    """What a step needs and does not find; empty where it has all."""
    if step.needs.startswith("$"):
        return "" if os.environ.get(step.needs[1:]) else f"{step.needs} is not set"
    return "" if not step.needs or shutil.which(step.needs) else f"{step.needs} is not installed"


def run(name: str, out: Path, seconds: float) -> dict[str, object]:
    """Run a step within ``seconds``; what campaign.json says of it."""
    step = STEPS[name]
    why = missing(step)
    if why:
        return {"state": "left out", "why": why}
    known = {"{out}": str(out / name), "$ECGOT_PTBXL": os.environ.get("ECGOT_PTBXL", "")}
    command = list(step.command)
    for mark, value in known.items():
        command = [part.replace(mark, value) for part in command]
    start = time.perf_counter()
    with (out / f"{name}.log").open("w", encoding="utf-8") as log:
        try:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=seconds)
            state = "done" if done.returncode == 0 else f"failed with {done.returncode}"
        except subprocess.TimeoutExpired:
            state = "cut off"
    return {"state": state, "seconds": round(time.perf_counter() - start, 1), "command": command} | origin()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=14.0, help="for all steps together (default: 14)")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.steps if name not in STEPS]
    if unknown:
        parser.error(f"STEP: got {unknown[0]}, accepted are {', '.join(STEPS)}")
    names = options.steps or list(STEPS)
    if options.list:
        for name in names:
            print(f"{name}: {' '.join(STEPS[name].command).replace('{out}', str(options.out / name))}")
        return 0
    if not torch.cuda.is_available():
        print("campaign: there is no GPU to measure", file=sys.stderr)
        return 2
    return _campaign(names, options.out, 60 * options.minutes)


def _campaign(names: list[str], out: Path, seconds: float) -> int:
    """1 where a step failed; those that are left out or cut off are for another time."""
    out.mkdir(parents=True, exist_ok=True)
    record = out / "campaign.json"
    told = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    end, failed = time.perf_counter() + seconds, False
    for name in names:
        left = end - time.perf_counter()
        if told.get(name, {}).get("state") == "done" or left <= 0:
            continue
        told[name] = run(name, out, left)
        write_text(record, json.dumps(told, indent=1) + "\n")
        print(f"{name}: {told[name]['state']}", flush=True)
        failed = failed or str(told[name]["state"]).startswith("failed")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
