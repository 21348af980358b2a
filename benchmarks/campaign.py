"""All that a GPU has to tell, in steps: correctness, ceilings, comparisons, tuning, profiles.

    python -m benchmarks.campaign OUT [STEP ...] [--minutes 9] [--list]

A step writes OUT/STEP.log and what it measures beside it. One that succeeded at this commit is not run again,
so that the same command goes on where an earlier one stopped, on this day or another. A step is cut off after
its own limit or when the minutes are over; it then comes last. OUT/campaign.json says what ran, for how long,
on what.

``throughput`` trains on the data set that ECGOT_PTBXL names; ``memcheck`` and ``racecheck`` want
compute-sanitizer, the profiles ncu. What is missing is named and left out.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.output import ROOT, commit
from ecgot.bench.origin import origin
from ecgot.files import write_text
from ecgot.models.encoders import ENCODERS

PYTHON, DONE, CUT_OFF = sys.executable, "done", "cut off"
# Without torch's cache of memory each tensor is an allocation of its own, with bounds that a tool can check.
SANITIZE = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--error-exitcode", "1")
# Clocks stay as they are, so that a profile's times compare with a benchmark's.
PROFILE = ("ncu", "--clock-control", "none", "--set", "full", "--launch-count", "3", "--force-overwrite")


@dataclass(frozen=True)
class Step:
    """command: ``{out}`` is the step's path without suffix; needs: a program, or a variable with $."""

    command: tuple[str, ...]
    needs: str = ""
    minutes: float = 6.0


def _pytest(*arguments: str) -> tuple[str, ...]:
    return PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments


def _cases(*arguments: str) -> tuple[str, ...]:
    return PYTHON, "-m", "benchmarks.kernel_cases", *arguments


def _profile(kernel: str, case: str) -> tuple[str, ...]:
    return *PROFILE, "--kernel-name", f"regex:{kernel}", "--export", "{out}", *_cases("--large", case)


TRAIN = (
    PYTHON,
    "-c",
    "from ecgot.cli.main import main; main()",
    "train",
    "--data",
    "$ECGOT_PTBXL",
    "--out",
    "{out}",
)


def _encoder(name: str) -> tuple[str, ...]:
    return _pytest("benchmarks/test_encoders.py", "-k", f"[{name}-", "--csv", "{out}.csv")


def _table(dtype: str) -> tuple[str, ...]:
    return PYTHON, "-m", "benchmarks.conv1d_backends", "--dtypes", dtype, "--out", "{out}.csv"


STEPS = {  # the cheapest that can show a mistake come first
    "cases": Step(_cases(), minutes=3),
    "kernels": Step(_pytest("tests/kernels", "--ignore=tests/kernels/resources")),
    "tests": Step(_pytest("tests", "--ignore=tests/kernels")),
    "memcheck": Step((*SANITIZE, "--tool", "memcheck", *_cases()), "compute-sanitizer"),
    "racecheck": Step((*SANITIZE, "--tool", "racecheck", *_cases()), "compute-sanitizer"),
    "peaks": Step(_pytest("benchmarks/test_encoders.py", "-k", "peak", "--csv", "{out}.csv"), minutes=2),
    "transport": Step(_pytest("benchmarks/test_sinkhorn.py", "--csv", "{out}.csv")),
    "convolutions": Step(_pytest("benchmarks/test_conv1d.py", "--csv", "{out}.csv"), minutes=3),
    "training_step": Step(_pytest("benchmarks/test_training_step.py", "--csv", "{out}.csv"), minutes=3),
    "throughput": Step(
        (*TRAIN, "--stage", "align", "--resume", "align.epochs=2", "cuda_graph=true"), "$ECGOT_PTBXL"
    ),
    "warps": Step((PYTHON, "-m", "benchmarks.sinkhorn_warps", "{out}.csv"), minutes=3),
    "warps_1024": Step(
        (PYTHON, "-m", "benchmarks.sinkhorn_warps", "{out}.csv", "--batch", "1024"), minutes=3
    ),
    "profile_sinkhorn": Step(_profile("_sinkhorn_fwd", "sinkhorn"), "ncu", minutes=3),
    "profile_forward": Step(_profile("_conv1d_fwd", "norm"), "ncu", minutes=3),
    "profile_weight": Step(_profile("_conv1d_wgrad", "norm"), "ncu", minutes=3),
    **{f"table_{dtype}": Step(_table(dtype)) for dtype in ("bfloat16", "float16", "float32")},
    **{f"encoder_{name}": Step(_encoder(name)) for name in ENCODERS},
    "growth": Step((PYTHON, "-m", "benchmarks.growth", "{out}.csv", "{out}.png")),
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
    command = _command(name, out)
    start = time.perf_counter()
    with (out / f"{name}.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
        try:
            code = process.wait(min(seconds, 60 * step.minutes))
            state = DONE if code == 0 else f"failed with {code}"
        except subprocess.TimeoutExpired:
            state = CUT_OFF
        finally:
            _end(process)
    took = round(time.perf_counter() - start, 1)
    return {"state": state, "seconds": took, "command": shlex.join(command)} | origin()


def _command(name: str, out: Path) -> list[str]:
    known = {
        "{out}": str(out.resolve() / name),
        "$ECGOT_PTBXL": os.environ.get("ECGOT_PTBXL", "$ECGOT_PTBXL"),
    }
    command = list(STEPS[name].command)
    for mark, value in known.items():
        command = [part.replace(mark, value) for part in command]
    return command


def _end(process: subprocess.Popen[bytes]) -> None:
    """Whatever the step started, under a profiler too: none of it may keep the GPU."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(arguments: list[str] | None = None) -> int:
    """Run the named steps; 1 where one failed, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all steps together (default: 9)")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.steps if name not in STEPS]
    if unknown:
        parser.error(f"STEP: expected one of {', '.join(STEPS)}, got {unknown[0]}")
    names = options.steps or list(STEPS)
    if options.list:
        for name in names:
            print(f"{name}: {shlex.join(_command(name, options.out))}")
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
    version, end, failed = commit(), time.perf_counter() + seconds, False
    told = {name: each for name, each in told.items() if each["commit"] == version}
    for name in sorted(names, key=lambda name: told.get(name, {}).get("state") == CUT_OFF):
        left = end - time.perf_counter()
        if told.get(name, {}).get("state") == DONE:
            continue
        if left <= 0:
            print(f"{name}: not reached", flush=True)
            continue
        told[name] = run(name, out, left) | {"commit": version}
        write_text(record, json.dumps(told, indent=1) + "\n")
        print(f"{name}: {told[name]['state']}", flush=True)
        failed = failed or str(told[name]["state"]).startswith("failed")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
