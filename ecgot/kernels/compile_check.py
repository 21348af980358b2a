"""Compile the package's Triton kernels for several GPUs; no GPU is needed.

    python -m ecgot.kernels.compile_check [--all] [--targets sm_90,gfx942] [--json]

prints one line a kernel, configuration and target: compiled or the error, and the registers and stack bytes
(spills) of a thread where the target's tools tell them. Exit code 1 if anything does not compile.
"""

import argparse
import dataclasses
import glob
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ecgot.kernels.dispatch import HAS_TRITON, INTERPRETED


@dataclass(frozen=True)
class Target:
    """A GPU as Triton names it, and the shared memory that one program may have there, in bytes."""

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
POINTER = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
DTYPES = tuple(POINTER)


@dataclass(frozen=True)
class Case:
    """A kernel in one configuration: ``module.kernel``, types of the other arguments, constexprs, options."""

    module: str
    kernel: str
    pointer: str  # of the data; weights, potentials and results have fixed types
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        constants = " ".join(f"{name}={value}" for name, value in self.constants)
        return f"{self.kernel} {self.pointer} {constants}"


@dataclass(frozen=True)
class Outcome:
    """error is None where the case compiled; registers and stack_bytes are None where unknown."""

    case: str
    target: str
    error: str | None
    registers: int | None
    stack_bytes: int | None
    shared_bytes: int | None


def cases(everything: bool = False) -> Iterator[Case]:
    """The launchers' configurations: all, or a part in which every tile extreme, dtype and flag occurs."""
    yield from _sinkhorn_cases(everything)
    yield from _conv1d_cases(everything)


def check(case: Case, target: str) -> Outcome:
    """Compile one case for one target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(__import__(case.module, fromlist=["_"]), case.kernel)
    constants = dict(case.constants)
    gpu = TARGETS[target]
    if gpu.backend == "hip":
        constants["PRECISION"] = "ieee"  # as the launchers choose where torch is built for HIP
    source = ASTSource(kernel, _signature(kernel.arg_names, case.pointer, constants), constexprs=constants)
    try:
        chip = GPUTarget(gpu.backend, gpu.architecture, gpu.warp_size)
        compiled = triton.compile(source, target=chip, options=dict(case.options))
    except Exception as error:  # a compiler fails in many ways, and each is a finding
        reason = str(error).strip().partition("\n")[0] or repr(error)
        return Outcome(str(case), target, reason, None, None, None)
    registers, stack = _resources(compiled.asm.get("cubin"))
    shared = compiled.metadata.shared
    error_line: str | None = None
    if shared > gpu.shared_bytes:  # it compiles, and would fail when launched
        error_line = f"needs {shared} bytes of shared memory, {target} has {gpu.shared_bytes}"
    return Outcome(str(case), target, error_line, registers, stack, shared)


def _sinkhorn_cases(everything: bool) -> Iterator[Case]:
    from ecgot.kernels import _triton_sinkhorn as module

    sizes = [2**power for power in range(4, 13)]
    tiles = [(n, m) for n, m in itertools.product(sizes, sizes) if module.fits(n, m)]
    flag_sets = list(itertools.product((False, True), repeat=4))
    if not everything:
        largest = max(n * m for n, m in tiles)
        tiles = [(n, m) for n, m in tiles if n * m == largest or (n, m) in ((16, 16), (32, 32), (64, 32))]
    dtypes, flags = itertools.cycle(DTYPES), itertools.cycle(flag_sets)
    for (n, m), cosine in itertools.product(tiles, (False, True)):
        chosen = itertools.product(DTYPES, flag_sets) if everything else [(next(dtypes), next(flags))]
        for dtype, (has_a, has_b, has_x_mask, has_y_mask) in chosen:
            constants = {
                "HAS_A": has_a,
                "HAS_B": has_b,
                "HAS_X_MASK": has_x_mask,
                "HAS_Y_MASK": has_y_mask,
                "COSINE": cosine,
            }
            configuration = module._fwd_configuration(n, m)
            yield _case(module.__name__, "_sinkhorn_fwd_kernel", dtype, configuration, constants)
        for dtype in DTYPES if everything else [next(dtypes)]:
            configuration = module._bwd_configuration(n, m)
            yield _case(module.__name__, "_sinkhorn_bwd_kernel", dtype, configuration, {"COSINE": cosine})


def _conv1d_cases(everything: bool) -> Iterator[Case]:
    from ecgot.kernels import _triton_conv1d as module

    blocks = list(itertools.product((16, 32, 64), (16, 32, 64), (16, 32)))
    if not everything:
        blocks = [(16, 16, 16), (64, 32, 16), (64, 64, 32), (32, 64, 32)]
    flag_sets = itertools.cycle(itertools.product((False, True), repeat=4))
    activations, taps = itertools.cycle(module.ACTIVATIONS.values()), itertools.cycle((1, 5, 15))
    for (length, c_out, c_in), dtype in itertools.product(blocks, DTYPES):
        for activation in module.ACTIVATIONS.values() if everything else [next(activations)]:
            has_bias, has_scale, has_shift, has_residual = next(flag_sets)
            constants = {
                "K": next(taps),
                "HAS_BIAS": has_bias,
                "HAS_SCALE": has_scale,
                "HAS_SHIFT": has_shift,
                "HAS_RESIDUAL": has_residual,
                "ACTIVATION": activation,
            }
            configuration = module._configuration(length, c_in, c_out, dtype)
            yield _case(module.__name__, "_conv1d_fwd_kernel", dtype, configuration, constants)


def _case(
    module: str, kernel: str, dtype: torch.dtype, configuration: dict[str, Any], constants: dict[str, Any]
) -> Case:
    names = ("num_warps", "num_stages")
    constants = constants | {name: value for name, value in configuration.items() if name not in names}
    options = tuple((name, configuration[name]) for name in names)
    return Case(module, kernel, POINTER[dtype], tuple(constants.items()), options)


def _signature(names: Sequence[str], pointer: str, constants: dict[str, Any]) -> dict[str, str]:
    """Types of a kernel's arguments, by the naming that all kernels here follow."""
    fixed = {"iterations_ptr": "*i32", "x_mask_ptr": "*u8", "y_mask_ptr": "*u8", "eps": "fp32", "tol": "fp32"}
    solver = ("a_ptr", "b_ptr", "value_ptr", "f_ptr", "g_ptr", "error_ptr", "grad_ptr")  # fp32 for all inputs
    types = {}
    for name in names:
        if name in constants:
            types[name] = "constexpr"
        elif name in solver:
            types[name] = "*fp32"
        else:
            types[name] = fixed.get(name, pointer if name.endswith("_ptr") else "i32")
    return types


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
    jobs = [(case, target) for case in cases(options.all) for target in targets]
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
    if INTERPRETED:
        return "TRITON_INTERPRET=1 is set, which leaves nothing to compile; unset it"
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
