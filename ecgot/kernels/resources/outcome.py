"""One kernel compiled for one GPU: whether it may be launched there, and what it needs."""

import dataclasses
import importlib
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ecgot.kernels.compilation import DIVISOR
from ecgot.kernels.resources.cases import TARGETS, Case, Target
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

    Attributes:
        error: None where the case compiled and can be launched.
        registers, spilled_bytes: per thread.
        shared_bytes: per program.
        warps: of a program.
        programs: that a multiprocessor holds at a time.
        instructions: of a warp in the inner loop, all of them; this and the following are None without one.
        barriers, shuffles: those among them that wait for the other warps, and that exchange values between
            threads of the warp.
        exponentials, multiply_adds: among them, per thread.
        matrix_products: among them, each of the warp or of several.
        stack_accesses: loads and stores of spilled values among them.
    """

    case: str
    target: str
    error: str | None
    registers: int | None = None
    spilled_bytes: int | None = None
    shared_bytes: int | None = None
    warps: int | None = None
    programs: int | None = None
    instructions: int | None = None
    barriers: int | None = None
    shuffles: int | None = None
    exponentials: int | None = None
    multiply_adds: int | None = None
    matrix_products: int | None = None
    stack_accesses: int | None = None

    @property
    def issued(self) -> int | None:
        """Instructions that a program issues in one pass through the inner loop."""
        return None if self.instructions is None or self.warps is None else self.instructions * self.warps


def check(case: Case, target: str) -> Outcome:
    """Compile one case for one target."""
    try:
        found = compiled(case, target)
    except Exception as error:  # compilers fail in many ways, each of which is a result
        return Outcome(str(case), target, str(error).strip().partition("\n")[0] or repr(error))
    needed = found.metadata
    outcome = Outcome(
        str(case),
        target,
        launch_refusal(needed, target),
        shared_bytes=needed.shared,
        warps=needed.num_warps,
    )
    code = disassembled(found, target)
    return outcome if code is None else _with_machine_code(outcome, *code)


def compiled(case: Case, target: str) -> Any:
    """The kernel as Triton compiles it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(case.module), case.kernel)
    gpu = TARGETS[target]
    source = ASTSource(kernel, dict(case.signature), dict(case.constants), _attributes(case, kernel, gpu))
    chip = GPUTarget(gpu.backend, gpu.architecture, gpu.warp_size)
    return triton.compile(source, target=chip, options=dict(case.options))


def disassembled(found: Any, target: str) -> tuple[list[Instruction], int, int] | None:
    """Instructions, registers and spilled bytes of what :func:`compiled` returned; None without the tool."""
    if TARGETS[target].backend == "hip":
        return _amd(found.asm["amdgcn"])
    listing = _sass_listing(found.asm["cubin"])
    return None if listing is None else _nvidia(listing)


def _attributes(case: Case, kernel: Any, gpu: Target) -> dict[tuple[int], list[list[Any]]]:
    """What Triton is told of arguments, by their place, as its launcher does."""
    known: dict[tuple[int], list[list[Any]]] = {}
    types = dict(case.signature)
    for place, parameter in enumerate(kernel.params):
        given: list[list[Any]] = []
        if parameter.name in case.divisible:
            given.append(["tt.divisibility", DIVISOR])
        pointer = types[parameter.name].startswith("*")
        if gpu.backend == "hip" and pointer and not parameter.do_not_specialize:
            given.append(["tt.pointer_range", 32])  # tensors of less than 2 GB
        if given:
            known[(place,)] = given
    return known


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
    assert outcome.warps is not None
    assert outcome.shared_bytes is not None
    needed = outcome.warps, registers, outcome.shared_bytes
    error = None if stores_anything(instructions) else "the machine code stores nothing"
    return dataclasses.replace(
        outcome,
        error=outcome.error or error,
        registers=registers,
        spilled_bytes=spilled_bytes,
        programs=TARGETS[outcome.target].resident(*needed),
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
    """Instructions, registers and spilled bytes, from the output of ``_sass_listing``.

    The size of the stack does not measure spilling: it is rounded up, and its slots are reused. ``ptxas -v``
    prints the bytes of all spilling stores, but for a kernel in Triton's cache it would have to run again,
    which takes seconds and flags that differ between Triton's releases. The stores to the stack in the
    machine code add up to the same number.
    """
    registers = re.search(r"\bREG:(\d+)", listing)
    assert registers, listing[:200]
    instructions = parse_sass(listing)
    return instructions, int(registers[1]), spilled_bytes(instructions)


def _sass_listing(cubin: bytes) -> str | None:
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
