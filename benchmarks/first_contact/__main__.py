"""Check and measure everything on a GPU that the kernels are new to, in nine minutes and eight files at most.

    python -m benchmarks.first_contact OUT [STEP ...] [--minutes 9]

runs the steps of ``steps.py`` from the repository's root; not even the package has to be installed.
OUT/summary.md begins with a verdict: which kernels are right, which goals are met and by what factor. Each
finding is in OUT the moment it is known. Run again, the command resumes from the files in OUT, whatever ended
it before.

For a machine without a network or git, prepare the sources elsewhere: ``python -m benchmarks.output >
COMMIT``, and ``pip download --no-deps -d wheels flash-sinkhorn`` for what it lacks.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from benchmarks.first_contact import journal, runner
from benchmarks.first_contact.steps import REHEARSED, STEPS


def main(arguments: list[str] | None = None) -> int:
    """Run the named steps; 2 where there is no GPU."""
    start = time.perf_counter()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all steps together (default: 9)")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a CPU: nothing is measured")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.steps if name not in STEPS]
    if unknown:
        parser.error(f"STEP: expected one of {', '.join(STEPS)}, got {unknown[0]}")
    if not (options.rehearse or torch.cuda.is_available()):
        print("first_contact: there is no GPU to measure; --rehearse runs without one", file=sys.stderr)
        return 2
    runner.end_with_a_signal()
    steps = REHEARSED if options.rehearse else STEPS
    call = runner.Call(options.out.resolve(), start + 60 * options.minutes, steps, rehearse=options.rehearse)
    runner.run(call, options.steps or list(STEPS))
    print((call.out / journal.SUMMARY).read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
