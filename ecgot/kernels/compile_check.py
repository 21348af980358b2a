"""Compile the package's Triton kernels for several GPUs; no GPU is needed.

    python -m ecgot.kernels.compile_check [--all] [--targets sm_90,gfx942] [--json]

prints one line a kernel, configuration and target: compiled or the error, and the registers and stack bytes
(spills) of a thread where the target's tools tell them. Exit code 1 if anything does not compile.
"""

import argparse
import dataclasses
import glob
import importlib
import itertools
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecgot.kernels.dispatch import HAS_TRITON


@dataclass(frozen=True)
class Target:
    """A GPU as Triton names it.

    shared_bytes: the shared memory that one program may have there.
    precision: of fp32 products, as the launchers choose it where torch is built for that GPU.
    """

    backend: str
    architecture: int | str
    warp_size: int
    shared_bytes: int
    precision: str


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024, "tf32x3"),
    "sm_90": Target("cuda", 90, 32, 227 * 1024, "tf32x3"),
    "sm_100": Target("cuda", 100, 32, 227 * 1024, "tf32x3"),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024, "ieee"),
}
# Each has compile_cases(precision), built from what its launchers read.
MODULES = ("ecgot.kernels._triton_sinkhorn", "ecgot.kernels._triton_conv1d")


@dataclass(frozen=True)
class Case:
    """A kernel as one launch would compile it; names and not objects, as it travels between processes."""

    module: str
    kernel: str
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        return f"{self.kernel} {self.name}"


@dataclass(frozen=True)
class Outcome:
    """error is None where the case compiled; registers and stack_bytes are None where unknown."""

    case: str
    target: str
    error: str | None
    registers: int | None = None
    stack_bytes: int | None = None
    shared_bytes: int | None = None


def cases(target: str, everything: bool = False) -> Iterator[Case]:
    """The launchers' configurations on a target: all, or the part that ``_representative`` describes."""
    kernels: dict[str, dict[Case, None]] = {}  # the inner dictionaries are ordered sets
    for module in MODULES:
        found = importlib.import_module(module).compile_cases(TARGETS[target].precision)
        for name, kernel, *parts in found:
            case = Case(module, kernel.__name__, name, *(tuple(part.items()) for part in parts))
            kernels.setdefault(case.kernel, {})[case] = None
    for of_kernel in kernels.values():
        yield from of_kernel if everything else _representative(of_kernel)


def _representative(of_kernel: Iterable[Case]) -> Iterable[Case]:
    """A part with every tile and, in some tile, every pair of dtype, cost, activation, K and flags."""
    tiles: dict[tuple[int, ...], list[tuple[Case, list[Any]]]] = {}
    for case in of_kernel:
        tile = tuple(value for name, value in case.constants if name.startswith("BLOCK_"))
        others = [item for item in case.constants if not item[0].startswith(("BLOCK_", "PRECISION"))]
        others.append(("dtype", dict(case.signature).get("x_ptr")))
        tiles.setdefault(tile, []).append((case, list(itertools.combinations(others, 2))))
    seen: Counter[Any] = Counter()
    # The largest tiles choose first, and twice: they are the likeliest to spill or to fail.
    order = sorted(tiles, key=math.prod, reverse=True)
    twice = [tile for tile in order if math.prod(tile) == math.prod(order[0])]
    chosen: dict[Case, None] = {}  # an ordered set, as a tile may have but one case
    for tile in twice + order:
        case, pairs = max(tiles[tile], key=lambda candidate: sum(1 / (1 + seen[p]) for p in candidate[1]))
        seen.update(pairs)
        chosen[case] = None
    return chosen


def check(case: Case, target: str) -> Outcome:
    """Compile one case for one target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(case.module), case.kernel)
    gpu = TARGETS[target]
    chip = GPUTarget(gpu.backend, gpu.architecture, gpu.warp_size)
    try:
        source = ASTSource(kernel, dict(case.signature), constexprs=dict(case.constants))
        compiled = triton.compile(source, target=chip, options=dict(case.options))
    except Exception as error:  # a compiler fails in many ways, and each is a finding
        return Outcome(str(case), target, str(error).strip().partition("\n")[0] or repr(error))
    registers, stack = _resources(compiled.asm.get("cubin"))
    shared = compiled.metadata.shared
    error_line: str | None = None
    if shared > gpu.shared_bytes:  # it compiles, and would fail when launched
        error_line = f"needs {shared} bytes of shared memory, {target} has {gpu.shared_bytes}"
    return Outcome(str(case), target, error_line, registers, stack, shared)


def _resources(cubin: bytes | None) -> tuple[int | None, int | None]:
    """Registers and stack bytes of a thread, by the cuobjdump that comes with Triton; None without it."""
    import triton

    tools = glob.glob(str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump*"))
    if cubin is None or not tools:
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run([tools[0], "-res-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    return (int(found[1]), int(found[2])) if found else (None, None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ecgot.kernels.compile_check", description=__doc__)
    parser.add_argument("--all", action="store_true", help="every configuration (hours)")
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    options = parser.parse_args(arguments)
    targets = options.targets.split(",")
    problem = _unusable(targets)
    if problem:
        print(f"compile_check: {problem}", file=sys.stderr)
        return 2
    jobs = [(case, target) for target in targets for case in cases(target, options.all)]
    # Forked workers would share torch's thread pools.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        outcomes = []
        for outcome in pool.map(check, *zip(*jobs, strict=True)):
            outcomes.append(outcome)
            if not options.json:
                print(_line(outcome), flush=True)
    failed = sum(outcome.error is not None for outcome in outcomes)
    spilling = sum(bool(outcome.stack_bytes) for outcome in outcomes)
    if options.json:
        print(json.dumps([dataclasses.asdict(outcome) for outcome in outcomes]))
    else:
        print(f"{len(outcomes)} compilations, {failed} failed, {spilling} with stack use")
    return 1 if failed else 0


def _unusable(targets: Sequence[str]) -> str | None:
    unknown = [target for target in targets if target not in TARGETS]
    if unknown:
        return f"--targets: got {unknown[0]!r}, accepted are {', '.join(TARGETS)}"
    if not HAS_TRITON:
        return "triton is not installed"
    from triton import knobs

    if knobs.runtime.interpret:  # not dispatch.INTERPRETED: Triton also takes "true", "yes" and "on"
        return "TRITON_INTERPRET is set, which leaves nothing to compile; unset it"
    return None


def _line(outcome: Outcome) -> str:
    if outcome.error is not None:
        return f"FAILED {outcome.target:7} {outcome.case}: {outcome.error}"
    registers = "-" if outcome.registers is None else outcome.registers
    stack = "-" if outcome.stack_bytes is None else outcome.stack_bytes
    return (
        f"ok {outcome.target:7} registers {registers:>3} stack {stack:>4} shared {outcome.shared_bytes:>6} "
        f"{outcome.case}"
    )


if __name__ == "__main__":
    sys.exit(main())
