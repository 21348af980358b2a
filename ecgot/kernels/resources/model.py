"""How long a call should take on an H100: predicted from what its kernels issue, multiply and move.

    kernel: max(bytes / bandwidth, instructions / issue rate, products / their rate)
    call:   the sum of its kernels, and a gap after each

Instructions and products are those of the busiest multiprocessor, which has ceil(programs / 132) programs;
each region of the machine code (see machine_code.Regions) counts as often as ``PASSES`` says. Caches,
latencies and divergence are left out, so that a GPU will rather take longer.
"""

import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ecgot.kernels.compilation import DTYPES, CompileCase, specialised
from ecgot.kernels.resources.cases import SCHEDULERS, TARGETS, Case, named
from ecgot.kernels.resources.launches import Launch, Launches
from ecgot.kernels.resources.machine_code import Instruction, regions
from ecgot.kernels.resources.outcome import compiled, disassembled

TARGET = "sm_90"
TYPES = {dtype: name for name, dtype in DTYPES.items()} | {
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
MULTIPROCESSORS = 132
CLOCK_HZ = 1.755e9
BYTES_A_SECOND = 3.0e12
# Instructions a cycle that a scheduler issues: at most, and for each warp that it holds, as a warp waits for
# its own results.
ISSUE_RATE, ISSUE_RATE_OF_WARP = 0.65, 0.33
# Multiply-adds a cycle and scheduler in 16-bit products; half of it in TF32. A warp's own instructions reach
# less of it than those of four warps.
PRODUCT_RATE, OF_ONE_WARP, OF_FOUR_WARPS = 512, 0.62, 0.85
LIBRARY_FLOP_A_SECOND = {True: 6.0e14, False: 4.0e13}  # of torch's products in 16 bits, and in fp32
# From the end of a kernel to the start of the next, in a CUDA graph and launched one by one.
GAP_S = {"graph": 1e-6, "eager": 2e-6}


@dataclass(frozen=True)
class Passes:
    """How often a program runs each region of a kernel (see machine_code.Regions); ``once`` is once."""

    main: float = 1
    between: float = 1
    forming: float = 1
    others: float = 1


@dataclass(frozen=True)
class Code:
    """A compiled kernel.

    Attributes:
        registers: of a thread.
        warps: of a program.
        programs: that a multiprocessor holds at a time.
        instructions, products: of a warp in each region, see :class:`Passes`; the products in cycles of a
            scheduler.
    """

    registers: int
    warps: int
    programs: int
    instructions: dict[str, int]
    products: dict[str, float]

    @property
    def issued(self) -> int:
        """A program's instructions in one pass through the inner loop; 0 without one."""
        return self.instructions["main"] * self.warps

    def cycles(self, passes: Passes, programs: int) -> tuple[float, str]:
        """A multiprocessor's cycles for all of its programs; which of "instructions" or "products" limits."""
        times = {"once": 1} | vars(passes)
        resident = self.warps * min(self.programs, programs) / SCHEDULERS
        rate = SCHEDULERS * min(ISSUE_RATE, ISSUE_RATE_OF_WARP * resident)
        warps = self.warps * programs
        issue = sum(self.instructions[name] * times[name] for name in times) * warps / rate
        products = sum(self.products[name] * times[name] for name in times) * warps / SCHEDULERS
        return (issue, "instructions") if issue > products else (products, "products")


@dataclass(frozen=True)
class Estimate:
    """Of all launches of one kernel in a call, or of all of torch's kernels.

    Attributes:
        seconds: without gaps.
        limit: of the longest launch: "bytes", "instructions" or "products".
        code: of the longest launch; None for torch's kernels.
    """

    name: str
    launches: int
    megabytes: float
    seconds: float
    limit: str
    code: Code | None


def estimates(launches: Launches, pool: Executor) -> list[Estimate]:
    """An estimate of each kernel of a call, and one of all of torch's, the longest first.

    pool: whose workers compile the kernels.
    """
    cases = {case_of(launch): None for launch in launches.each if launch.kernel is not None}
    codes = dict(zip(cases, pool.map(code_of, cases), strict=True))
    found: dict[str, list[tuple[float, str, Launch, Code | None]]] = {}
    for launch in launches.each:
        name = "torch" if launch.kernel is None else launch.name
        code = None if launch.kernel is None else codes[case_of(launch)]
        found.setdefault(name, []).append((*_time(launch, code), launch, code))
    together = [_together(name, parts) for name, parts in found.items()]
    return sorted(together, key=lambda each: -each.seconds)


def _time(launch: Launch, code: Code | None) -> tuple[float, str]:
    """Seconds without the gap, and what limits: "bytes", "instructions" or "products"."""
    if code is None:
        busy, limit = launch.products / LIBRARY_FLOP_A_SECOND[launch.half], "products"
    else:
        passes = PASSES[launch.name](SimpleNamespace(**launch.arguments, PROGRAMS=math.prod(launch.grid)))
        cycles, limit = code.cycles(passes, math.ceil(math.prod(launch.grid) / MULTIPROCESSORS))
        busy = cycles / CLOCK_HZ
    moving = launch.bytes / BYTES_A_SECOND
    return (busy, limit) if busy > moving else (moving, "bytes")


def _together(name: str, parts: Sequence[tuple[float, str, Launch, Code | None]]) -> Estimate:
    _, limit, _, code = max(parts, key=lambda part: part[0])
    megabytes = sum(launch.bytes for _, _, launch, _ in parts) / 1e6
    return Estimate(name, len(parts), megabytes, sum(part[0] for part in parts), limit, code)


# --- how often loops run ------------------------------------------------------------------------------------


def _solver(a: Any) -> Passes:
    turns = math.ceil(a.PROBLEMS / a.PROGRAMS) if a.PAIRS else 1
    chunks = math.ceil(a.D / a.BLOCK_D)
    parts = a.BLOCK_N // a.PART_N * (a.BLOCK_M // a.PART_M)
    # What is around the loop counts once: the looks at the range of v, one in eight iterations, are short.
    return Passes(turns * a.max_iter, turns, turns * parts * chunks, turns * chunks)


def _gradient(a: Any) -> Passes:
    return Passes(main=math.ceil(a.D / a.BLOCK_OUT), forming=math.ceil(a.D / a.BLOCK_D))


def _tile_gradient(a: Any) -> Passes:
    tiles = math.ceil(a.M / a.BLOCK_M)
    return Passes(main=tiles * math.ceil(a.D / a.BLOCK_D), between=tiles)


def _softmin(a: Any) -> Passes:
    chunks = 1 if a.RESIDENT else math.ceil(a.width / a.BLOCK_D)
    return Passes(main=a.tiles * chunks, between=a.tiles)


def _convolution(a: Any) -> Passes:
    if a.KIND == "narrow":
        return Passes(main=math.ceil(a.K * a.C_IN / a.BLOCK_C))
    return Passes(main=a.K * math.ceil(a.C_IN / a.BLOCK_C))


def _input_gradient(a: Any) -> Passes:
    return Passes(main=a.K / a.TAP_STEP * math.ceil(a.C_OUT / a.BLOCK_O), others=a.TAP_STEP)


def _bottleneck(a: Any) -> Passes:
    # Of two loops with products, the one that writes the wide output has more.
    return Passes(main=math.ceil(a.W / a.BLOCK_W), forming=a.K * math.ceil(a.C / a.BLOCK_C))


# By kernel, from its arguments.
PASSES: dict[str, Callable[[Any], Passes]] = {
    "_sinkhorn_fwd_kernel": _solver,
    "_whole_gradient_kernel": _gradient,
    "_pair_plan_kernel": lambda a: Passes(main=math.ceil(a.D / a.BLOCK_D) * a.BLOCK_N // a.BLOCK_R),
    "_tile_gradient_kernel": _tile_gradient,
    "_softmin_kernel": _softmin,
    "_doubly_stochastic_fwd_kernel": lambda a: Passes(main=a.iterations - 1),
    # Two loops of the same length, of which one counts as the main loop and the other as what is not in it.
    "_doubly_stochastic_bwd_kernel": lambda a: Passes(main=a.iterations - 1, others=a.iterations - 1),
    "_softmin_prepare_kernel": lambda a: Passes(main=math.ceil(a.width / a.BLOCK_D)),
    "_softmin_merge_kernel": lambda a: Passes(main=math.ceil(a.splits / a.BLOCK_S)),
    "_softmin_settle_kernel": lambda a: Passes(others=math.ceil(max(a.blocks_x, a.blocks_y) / a.BLOCK_N)),
    "_conv1d_fwd_kernel": _convolution,
    "_conv1d_dgrad_kernel": _input_gradient,
    "_conv1d_wgrad_kernel": lambda a: Passes(main=math.ceil(a.ROWS_OF_PART / a.BLOCK_M)),
    "_merge_statistics_kernel": lambda a: Passes(main=math.ceil(a.TILES / a.BLOCK_M)),
    "_merge_sums_kernel": lambda a: Passes(others=math.ceil(a.TILES / a.BLOCK_M)),
    "_sum_parts_kernel": lambda a: Passes(others=math.ceil(a.PARTS / a.BLOCK_M)),
    "_join_fwd_kernel": lambda _: Passes(),
    "_join_bwd_kernel": lambda _: Passes(),
    "_bottleneck_kernel": _bottleneck,
}


# --- what is compiled ---------------------------------------------------------------------------------------


def case_of(launch: Launch) -> Case:
    """The kernel of a launch as its launcher would compile it."""
    kernel = launch.kernel
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    integers: dict[str, int] = {}
    for parameter in kernel.params:
        name = parameter.name
        value = launch.arguments.get(name, parameter.default)
        if parameter.is_constexpr or value is None:
            types[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            types[name] = f"*{TYPES[value.dtype]}"
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name], integers[name] = "i32" if abs(value) < 2**31 else "i64", value
    signature, constants, divisible = specialised(kernel, types, constants, integers)
    options = {name: value for name, value in launch.arguments.items() if name not in types}
    return named(kernel.__module__, CompileCase("", kernel, signature, constants, options, divisible))


def code_of(case: Case) -> Code:
    """Compile a case for ``TARGET``, and count its instructions and products by region."""
    found = compiled(case, TARGET)
    made = disassembled(found, TARGET)
    assert made is not None, "expected cuobjdump, which comes with Triton"
    instructions, registers, _ = made
    warps = found.metadata.num_warps
    parts = vars(regions(instructions))
    return Code(
        registers,
        warps,
        TARGETS[TARGET].resident(warps, registers, found.metadata.shared),
        {name: len(part) for name, part in parts.items()},
        {name: sum(map(product_cycles, part)) for name, part in parts.items()},
    )


def product_cycles(instruction: Instruction) -> float:
    """A scheduler's cycles for a warp's part of a matrix product; 0 for other instructions.

    >>> product_cycles(Instruction("HGMMA.64x64x16.F32.BF16", ""))  # 65,536 multiply-adds of four warps
    37.6...
    """
    name = instruction.opcode
    wide = re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name)
    narrow = re.match(r"HMMA\.(16)(8)(\d+)\.", name)
    if wide is None and narrow is None:
        return 0.0
    shape = (wide or narrow).groups()  # type: ignore[union-attr]
    rate = PRODUCT_RATE / (2 if ".TF32" in name else 1) * (OF_FOUR_WARPS if wide else OF_ONE_WARP)
    return math.prod(map(int, shape)) / (4 if wide else 1) / rate
