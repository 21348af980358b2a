"""What the package's Triton kernels need on several GPUs; no GPU is needed.

    python -m ecgot.kernels.resources [--all] [--targets sm_90,gfx942] [--kernel SUBSTRING]
                                      [--spills any|inner|none] [--json]

compiles the configurations that the launchers can pick, or a representative part, and prints one line for
each and target: whether it compiled; registers and spilled bytes of a thread; shared bytes of a program; and
the exponentials, multiply-adds, matrix products and stack accesses in the inner loop, as
ecgot.kernels._machine_code finds it. What is unknown, for want of a tool or of a loop, is "-". Exit code 1 if
anything does not compile or spills (--spills says which spills count), 2 if an argument is wrong.
"""

import argparse
import dataclasses
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
from typing import Any, NoReturn

from ecgot.kernels._machine_code import (
    Instruction,
    inner_work,
    parse_amdgcn,
    parse_sass,
    spilled_bytes,
    stores_anything,
)
from ecgot.kernels.dispatch import HAS_TRITON


@dataclass(frozen=True)
class Target:
    """A GPU as Triton names it.

    shared_bytes: the shared memory that one program may have there.
    """

    backend: str
    architecture: int | str
    warp_size: int
    shared_bytes: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}
TENSOR_MEMORY_COLUMNS = 512  # that one program may have, on the GPUs with tensor memory
# Each has compile_cases(hip), built from what its launchers read.
MODULES = (
    "ecgot.kernels._triton_sinkhorn",
    "ecgot.kernels._triton_streaming",
    "ecgot.kernels._triton_conv1d",
    "ecgot.kernels._triton_bottleneck",
)


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
    """error is None where the case compiled and may be launched; the rest is None where unknown.

    registers, spilled_bytes, exponentials and multiply_adds are a thread's, matrix_products a warp's or
    several warps'. The last four are of the inner loop, and None where there is none.
    """

    case: str
    target: str
    error: str | None
    registers: int | None = None
    spilled_bytes: int | None = None
    shared_bytes: int | None = None
    exponentials: int | None = None
    multiply_adds: int | None = None
    matrix_products: int | None = None
    stack_accesses: int | None = None


def cases(target: str, everything: bool = False, kernel: str = "") -> Iterator[Case]:
    """The launchers' configurations on a target: all, or the part that ``_representative`` describes.

    kernel: only kernels with this in their names.
    """
    kernels: dict[str, dict[Case, None]] = {}  # the inner dictionaries are ordered sets
    for module in MODULES:
        found = importlib.import_module(module).compile_cases(TARGETS[target].backend == "hip")
        for name, function, *parts in found:
            if kernel not in function.__name__:
                continue
            case = Case(module, function.__name__, name, *(tuple(part.items()) for part in parts))
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
    # A kernel with few tiles has not shown every pair by now.
    rest = [candidate for of_tile in tiles.values() for candidate in of_tile]
    while rest:
        case, pairs = max(rest, key=lambda candidate: sum(not seen[p] for p in candidate[1]))
        if all(seen[p] for p in pairs):
            break
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
    outcome = Outcome(
        str(case), target, _refused(compiled.metadata, target), shared_bytes=compiled.metadata.shared
    )
    if gpu.backend == "hip":
        return _with_machine_code(outcome, *_amd(compiled.asm["amdgcn"]))
    listing = _disassembled(compiled.asm["cubin"])
    return outcome if listing is None else _with_machine_code(outcome, *_nvidia(listing))


def _refused(metadata: Any, target: str) -> str | None:
    """Why a compiled kernel would be refused when launched."""
    needed, limit = metadata.shared, TARGETS[target].shared_bytes
    if needed > limit:
        return f"needs {needed} bytes of shared memory, {target} has {limit}"
    columns = getattr(metadata, "tmem_size", None) or 0
    if columns > TENSOR_MEMORY_COLUMNS:
        return f"needs {columns} columns of tensor memory, {target} has {TENSOR_MEMORY_COLUMNS}"
    return None


def _with_machine_code(
    outcome: Outcome, instructions: Sequence[Instruction], registers: int, spilled_bytes: int
) -> Outcome:
    work = inner_work(instructions)
    error = None if stores_anything(instructions) else "the machine code stores nothing"
    return dataclasses.replace(
        outcome,
        error=outcome.error or error,
        registers=registers,
        spilled_bytes=spilled_bytes,
        **({} if work is None else dataclasses.asdict(work)),
    )


def _amd(text: str) -> tuple[list[Instruction], int, int]:
    """Instructions, registers and spilled bytes.

    Registers include the accumulation registers, which take what the others cannot hold; that is no spill
    yet. What LLVM counts as spilled has gone to memory, 4 bytes a register. Scalar registers spill into
    vector registers.
    """
    counts = {name: int(value) for name, value in re.findall(r"\.(vgpr\w*_count):\s+(\d+)", text)}
    return parse_amdgcn(text), counts["vgpr_count"], 4 * counts["vgpr_spill_count"]


def _nvidia(listing: str) -> tuple[list[Instruction], int, int]:
    """The same of what ``_disassembled`` gives.

    The size of the stack would be no measure of spilling: it is rounded up, and its slots are used more than
    once. ``ptxas -v`` tells the bytes of all spilling stores. But a kernel in Triton's cache has its ptxas
    behind it, and a second run would take seconds more, and flags that differ between Triton's releases. The
    stores to the stack in the machine code that is launched have the same sum.
    """
    registers = re.search(r"\bREG:(\d+)", listing)
    assert registers, listing[:200]
    instructions = parse_sass(listing)
    return instructions, int(registers[1]), spilled_bytes(instructions)


def _disassembled(cubin: bytes) -> str | None:
    """Resources and instructions, by the cuobjdump that comes with Triton; None without it."""
    from triton import knobs

    try:
        tool = knobs.nvidia.cuobjdump.path
    except (AttributeError, RuntimeError):
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", "-sass", file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"resources: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; returns the exit code."""
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
    options = parser.parse_args(arguments)
    targets = options.targets.split(",")
    problem = _unusable(targets)
    jobs = []
    if problem is None:
        jobs = [(case, target) for target in targets for case in cases(target, options.all, options.kernel)]
        problem = None if jobs else f"--kernel: no kernel has {options.kernel!r} in its name"
    if problem:
        print(f"resources: {problem}", file=sys.stderr)
        return 2
    outcomes = _run(jobs, printing=not options.json)
    failed = sum(outcome.error is not None for outcome in outcomes)
    spilling = sum(bool(outcome.spilled_bytes) for outcome in outcomes)
    inner = sum(bool(outcome.stack_accesses) for outcome in outcomes)
    if options.json:
        print(json.dumps([dataclasses.asdict(outcome) for outcome in outcomes]))
    else:
        print(f"{len(outcomes)} compilations, {failed} failed, {spilling} spilling, {inner} in inner loops")
    return 1 if failed or {"any": spilling, "inner": inner, "none": 0}[options.spills] else 0


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
    columns = (
        ("registers", outcome.registers, 3),
        ("spilled", outcome.spilled_bytes, 5),
        ("shared", outcome.shared_bytes, 6),
        ("exp", outcome.exponentials, 4),
        ("multiply-add", outcome.multiply_adds, 5),
        ("matrix", outcome.matrix_products, 4),
        ("stack", outcome.stack_accesses, 4),
    )
    shown = " ".join(f"{name} {'-' if value is None else value:>{width}}" for name, value, width in columns)
    status = "SPILLS" if outcome.spilled_bytes else "ok"
    return f"{status:6} {outcome.target:7} {shown} {outcome.case}"


if __name__ == "__main__":
    sys.exit(main())
