"""One kernel compiled for one GPU: whether it may be launched there, and what it needs."""

import dataclasses
import importlib
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ecgot.kernels.resources.cases import TARGETS, Case
from ecgot.kernels.resources.machine_code import (
    Instruction,
    inner_work,
    parse_amdgcn,
    parse_sass,
    spilled_bytes,
    stores_anything,
)

TENSOR_MEMORY_COLUMNS = 512  # the most that one program can have, on GPUs with tensor memory


@dataclass(frozen=True)
class Outcome:
    """What a case needs on a target; numbers that are not known are None.

    error is None where the case compiled and can be launched. registers, spilled_bytes, exponentials and
    multiply_adds are per thread, matrix_products per warp or several warps, shared_bytes per program. The
    last four are those of the inner loop, and None if there is none.
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
    except Exception as error:  # compilers fail in many ways, each of which is a result
        return Outcome(str(case), target, str(error).strip().partition("\n")[0] or repr(error))
    outcome = Outcome(
        str(case), target, launch_refusal(compiled.metadata, target), shared_bytes=compiled.metadata.shared
    )
    if gpu.backend == "hip":
        return _with_machine_code(outcome, *_amd(compiled.asm["amdgcn"]))
    listing = _disassembled(compiled.asm["cubin"])
    return outcome if listing is None else _with_machine_code(outcome, *_nvidia(listing))


def launch_refusal(metadata: Any, target: str) -> str | None:
    """Why launching a compiled kernel would fail."""
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

    Registers include the accumulation registers, which hold what does not fit into the others; that is not a
    spill yet. What LLVM counts as spilled went to memory, 4 bytes per register. Scalar registers spill into
    vector registers.
    """
    counts = {name: int(value) for name, value in re.findall(r"\.(vgpr\w*_count):\s+(\d+)", text)}
    return parse_amdgcn(text), counts["vgpr_count"], 4 * counts["vgpr_spill_count"]


def _nvidia(listing: str) -> tuple[list[Instruction], int, int]:
    """Instructions, registers and spilled bytes, from the output of ``_disassembled``.

    The size of the stack does not measure spilling: it is rounded up, and its slots are reused. ``ptxas -v``
    prints the bytes of all spilling stores, but for a kernel in Triton's cache it would have to run again,
    which takes seconds and flags that differ between Triton's releases. The stores to the stack in the
    machine code add up to the same number.
    """
    registers = re.search(r"\bREG:(\d+)", listing)
    assert registers, listing[:200]
    instructions = parse_sass(listing)
    return instructions, int(registers[1]), spilled_bytes(instructions)


def _disassembled(cubin: bytes) -> str | None:
    """Resources and instructions, printed by the cuobjdump that comes with Triton; None without it."""
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
