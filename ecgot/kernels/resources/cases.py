"""The configurations that the launchers can pick, and the GPUs to compile them for."""

import importlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ecgot.kernels.compilation import CompileCase


@dataclass(frozen=True)
class Target:
    """A GPU as Triton names it, and what its multiprocessor shares among programs.

    Attributes:
        shared_bytes: the most shared memory that one program can have.
        registers: of 32 bits, of each of the four schedulers.
        warps: the most that each scheduler can hold.
        programs: the most that a multiprocessor can hold (AMD: of more than one warp).
        shared_total: bytes of shared memory.
        shared_reserved: bytes that the system takes of it for each program.
    """

    backend: str
    architecture: int | str
    warp_size: int
    shared_bytes: int
    registers: int
    warps: int
    programs: int
    shared_total: int
    shared_reserved: int

    def resident(self, warps: int, registers: int, shared_bytes: int) -> int:
        """How many programs a multiprocessor holds at a time.

        Args:
            warps: of a program.
            registers: of a thread; they are given out in eights.
            shared_bytes: of a program.
        """
        of_warp = math.ceil(max(registers, 1) / 8) * 8 * self.warp_size
        by_registers = SCHEDULERS * min(self.warps, self.registers // of_warp) // warps
        by_memory = self.shared_total // max(shared_bytes + self.shared_reserved, 1)
        return min(self.programs, by_registers, by_memory)


SCHEDULERS = 4  # of a multiprocessor
# CUDA C++ programming guide, "Technical specifications per compute capability"; LLVM's AMDGPUBaseInfo.cpp.
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024, 16384, 16, 32, 164 * 1024, 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024, 16384, 16, 32, 228 * 1024, 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024, 16384, 16, 32, 228 * 1024, 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024, 512 * 64, 8, 16, 64 * 1024, 0),
}
# Each has compile_cases(hip), made by the functions that its launchers call.
MODULES = (
    "ecgot.kernels.ot.triton_onchip",
    "ecgot.kernels.ot.triton_gradient",
    "ecgot.kernels.ot.triton_implicit",
    "ecgot.kernels.ot.triton_streaming",
    "ecgot.kernels.scaling.triton_iteration",
    "ecgot.kernels.conv.triton_conv1d",
    "ecgot.kernels.conv.triton_join",
    "ecgot.kernels.conv.triton_statistics",
    "ecgot.kernels.conv.triton_bottleneck",
)


@dataclass(frozen=True)
class Case:
    """A CompileCase by name: it is hashable, and is sent to other processes."""

    module: str
    kernel: str
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]
    divisible: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kernel} {self.name}"


def cases(target: str, everything: bool = False, kernel: str = "") -> Iterator[Case]:
    """The launchers' configurations on a target.

    Args:
        target: one of ``TARGETS``.
        everything: all of them, not only the part that ``_representative`` picks.
        kernel: only kernels with this in their names.
    """
    kernels: dict[str, dict[Case, None]] = {}  # the inner dictionaries are ordered sets
    for module in MODULES:
        found = importlib.import_module(module).compile_cases(TARGETS[target].backend == "hip")
        for each in found:
            if kernel in each.kernel.__name__:
                case = named(module, each)
                kernels.setdefault(case.kernel, {})[case] = None
    for of_kernel in kernels.values():
        yield from of_kernel if everything else _representative(of_kernel)


def named(module: str, case: CompileCase) -> Case:
    """A case whose kernel stands in a module."""
    return Case(
        module,
        case.kernel.__name__,
        case.name,
        tuple(case.signature.items()),
        tuple(case.constants.items()),
        tuple(case.options.items()),
        case.divisible,
    )


def _representative(of_kernel: Iterable[Case]) -> Iterable[Case]:
    """A part with every tile, and with every pair of dtype, cost, activation, K and flags in some tile."""
    tiles: dict[tuple[int, ...], list[tuple[Case, list[Any]]]] = {}
    for case in of_kernel:
        tile = tuple(value for name, value in case.constants if name.startswith("BLOCK_"))
        others = [item for item in case.constants if not item[0].startswith(("BLOCK_", "PRECISION"))]
        others.append(("dtype", dict(case.signature).get("x_ptr")))
        tiles.setdefault(tile, []).append((case, list(itertools.combinations(others, 2))))
    seen: Counter[Any] = Counter()
    # The largest tiles choose first, and twice: they are the most likely to spill or to fail.
    order = sorted(tiles, key=math.prod, reverse=True)
    twice = [tile for tile in order if math.prod(tile) == math.prod(order[0])]
    chosen: dict[Case, None] = {}  # an ordered set, as a tile may have but one case
    for tile in twice + order:
        case, pairs = max(tiles[tile], key=lambda candidate: sum(1 / (1 + seen[p]) for p in candidate[1]))
        seen.update(pairs)
        chosen[case] = None
    # A kernel with few tiles does not have every pair by now.
    rest = [candidate for of_tile in tiles.values() for candidate in of_tile]
    while rest := [candidate for candidate in rest if not all(seen[p] for p in candidate[1])]:
        case, pairs = max(rest, key=lambda candidate: sum(not seen[p] for p in candidate[1]))
        seen.update(pairs)
        chosen[case] = None
    return chosen
