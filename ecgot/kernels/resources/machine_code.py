"""Loops in disassembled machine code, and the instructions in them: all, and those of some kinds.

``parse_sass`` reads what ``cuobjdump -sass`` prints, ``parse_amdgcn`` what LLVM writes for AMD. The rest is
common to both: basic blocks, dominators, natural loops (Aho et al. 2006, "Compilers", 9.6), counts.

All counts are static: instructions in the machine code, not instructions run. A loop that the compiler
unrolled four times shows four times the work of one pass through the source, and one that it unrolled
completely does not show. Called subroutines (slow paths of divisions) are not counted, nor is code that only
a diverged warp reaches.
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    target: index of the instruction that it may jump to. ends: it never falls through to the next one.
    """

    opcode: str
    operands: str
    target: int | None = None
    ends: bool = False


@dataclass(frozen=True)
class Work:
    """What a warp issues.

    Attributes:
        instructions: all of them.
        barriers: those that wait for a program's other warps.
        shuffles: those that exchange values between the threads of a warp.
        exponentials: of one thread.
        multiply_adds: of one thread; a packed instruction makes two.
        matrix_products: of one or several warps; their size depends on the target.
        stack_accesses: loads and stores of spilled values.
    """

    instructions: int = 0
    barriers: int = 0
    shuffles: int = 0
    exponentials: int = 0
    multiply_adds: int = 0
    matrix_products: int = 0
    stack_accesses: int = 0

    def __bool__(self) -> bool:
        """Whether anything is computed: a loop that only waits or copies is no work."""
        return bool(self.exponentials or self.multiply_adds or self.matrix_products)


WAITING = 8  # instructions that a loop which only waits may have
_SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;", re.MULTILINE)
_SASS_ENDS = ("EXIT", "RET", "BRX", "BRXU", "JMX", "JMXU", "KILL")
_SASS_MULTIPLY_ADDS = {"FFMA": 1, "FFMA32I": 1, "DFMA": 1, "FFMA2": 2, "HFMA2": 2}
_SASS_STORE = re.compile(r"STL(?:\.([US]?\d+))?")
_STORE_BYTES = {"": 4, "64": 8, "128": 16, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
_AMD_LINE = re.compile(r"^(?:([.\w$]+):|\s+([a-z]+_\w+)([^;\n]*))", re.MULTILINE)
_AMD_MULTIPLY_ADD = re.compile(
    r"v_(pk_)?(fma|fmac|mad|mac|fma[am]k|mad[am]k|fma_mix(lo|hi)?)_(legacy_)?[bf]\d\d"
)
_AMD_SHUFFLE = re.compile(r"ds_b?permute_|ds_swizzle_|v_permlane|v_\w+_dpp\b")
_AMD_MATRIX = re.compile(r"v_(s?mfmac?|s?wmmac?)_")


def parse_sass(listing: str) -> list[Instruction]:
    """Instructions of the single function in a listing of cuobjdump."""
    found = _SASS.findall(listing)
    at = {int(address, 16): index for index, (address, *_) in enumerate(found)}
    return [_sass_instruction(predicate, opcode, operands, at) for _, predicate, opcode, operands in found]


def _sass_instruction(predicate: str, opcode: str, operands: str, at: dict[int, int]) -> Instruction:
    base, *modifiers = opcode.split(".")
    if base in _SASS_ENDS:
        return Instruction(opcode, operands, ends=not predicate)
    # BRA.DIV leads to a copy of a shuffle for warps whose threads have diverged. A Triton program's have not,
    # and the copy, which is placed after the kernel and jumps back, would be counted as well.
    if base not in ("BRA", "JMP") or "DIV" in modifiers:
        return Instruction(opcode, operands)
    *conditions, address = operands.split(",")  # BRA P6, 0x40 and BRA.U !UP0, 0x40 have a condition too
    target = at.get(int(address, 16)) if re.fullmatch(r"\s*0x[0-9a-f]+", address) else None
    return Instruction(opcode, operands, target, ends=not predicate and not conditions)


def parse_amdgcn(text: str) -> list[Instruction]:
    """Instructions of the single function in LLVM's assembly for AMD."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for label, opcode, operands in _AMD_LINE.findall(text):
        if label:
            labels[label] = len(found)
        else:
            found.append((opcode, operands.strip()))
    return [
        Instruction(
            opcode,
            operands,
            labels.get(operands) if "branch" in opcode else None,
            ends=opcode in ("s_branch", "s_endpgm", "s_setpc_b64"),
        )
        for opcode, operands in found
    ]


def inner_work(instructions: Sequence[Instruction]) -> Work | None:
    """The work in the inner loop; None where no loop computes.

    Inner loops hold no other loop. Loops without arithmetic, such as those that wait for a copy, do not
    count. Of the inner loops without matrix products, the inner loop is the one with the most multiply-adds
    and exponentials: a kernel that builds a tile by matrix products and then iterates on it spends its time
    in the iteration. If all have matrix products, it is the one with the most of them.
    """
    loops = _loops(instructions)
    main = _main(instructions, loops)
    return None if main is None else count(instructions[i] for i in main)


@dataclass(frozen=True)
class Regions:
    """A kernel's instructions by how often they run.

    Attributes:
        once: in no loop.
        between: in a loop around others.
        main: of the inner loop, see :func:`inner_work`.
        forming: of the other loops that hold none, where they have matrix products.
        others: of those that have none.
    """

    once: list[Instruction]
    between: list[Instruction]
    main: list[Instruction]
    forming: list[Instruction]
    others: list[Instruction]


def regions(instructions: Sequence[Instruction]) -> Regions:
    """All instructions; loops of a few that compute nothing are part of what is around them."""
    every = _loops(instructions)
    main = _main(instructions, every)
    loops = [loop for loop in every if len(loop) > WAITING or count(instructions[i] for i in loop)]
    found = Regions([], [], [], [], [])
    for i, instruction in enumerate(instructions):
        around = [loop for loop in loops if i in loop]
        smallest = min(around, key=len, default=None)
        if smallest is None:
            found.once.append(instruction)
        elif smallest == main:
            found.main.append(instruction)
        elif any(other < smallest for other in loops):
            found.between.append(instruction)
        elif count(instructions[j] for j in smallest).matrix_products:
            found.forming.append(instruction)
        else:
            found.others.append(instruction)
    return found


def _main(instructions: Sequence[Instruction], loops: Iterable[frozenset[int]]) -> frozenset[int] | None:
    working = [(loop, work) for loop in loops if (work := count(instructions[i] for i in loop))]
    inner = [each for each in working if not any(other < each[0] for other, _ in working)]
    plain = [each for each in inner if not each[1].matrix_products]
    return max(plain or inner, key=lambda each: _weight(each[1]), default=(None, None))[0]


def _weight(work: Work) -> tuple[int, int]:
    return work.matrix_products, work.multiply_adds + work.exponentials


def count(instructions: Iterable[Instruction]) -> Work:
    """The instructions by kind."""
    total = barriers = shuffles = exponentials = multiply_adds = matrix_products = stack_accesses = 0
    for each in instructions:
        base = each.opcode.partition(".")[0]
        total += 1
        barriers += base in ("BAR", "s_barrier")
        shuffles += base in ("SHFL", "REDUX") or bool(_AMD_SHUFFLE.match(base))
        exponentials += each.opcode.startswith(("MUFU.EX2", "v_exp_f"))
        matrix_products += base.endswith("MMA") or bool(_AMD_MATRIX.match(base))
        multiply_adds += _multiply_adds(base, each.operands)
        stack_accesses += base in ("STL", "LDL") or base.startswith(("scratch_load", "scratch_store"))
    return Work(total, barriers, shuffles, exponentials, multiply_adds, matrix_products, stack_accesses)


def _multiply_adds(opcode: str, operands: str) -> int:
    amd = _AMD_MULTIPLY_ADD.match(opcode)
    if amd:
        return 2 if amd[1] else 1
    # HFMA2 R1, -RZ, RZ, 1, 1 multiplies nothing: it loads a constant.
    loads = opcode == "HFMA2" and re.match(r"\w+, -?RZ, -?RZ,", operands)
    return 0 if loads else _SASS_MULTIPLY_ADDS.get(opcode, 0)


def stores_anything(instructions: Sequence[Instruction]) -> bool:
    """Whether anything is written to global memory; a kernel without that is empty or a trap."""
    nvidia = r"STG|ST|RED|REDG|ATOM|ATOMG|UTMASTG|UTMAREDG|UBLKCP|UBLKRED"
    amd = r"(global|flat|buffer)_(store|atomic)\w*"
    return any(re.fullmatch(f"{nvidia}|{amd}", each.opcode.partition(".")[0]) for each in instructions)


def spilled_bytes(instructions: Iterable[Instruction]) -> int:
    """Bytes of all stores of NVIDIA's code to fixed places on the stack, as ``ptxas -v`` counts spills.

    Arrays whose index is only known at run time are also on the stack, but have other addresses: no spills.
    """
    return sum(
        _STORE_BYTES[found[1] or ""]
        for each in instructions
        if (found := _SASS_STORE.fullmatch(each.opcode))
        and re.match(r"\[R1(\+-?0x[0-9a-f]+)?\]", each.operands)
    )


def _loops(instructions: Sequence[Instruction]) -> list[frozenset[int]]:
    """The natural loops, each the indices of its instructions.

    A jump to an earlier address does not make a loop: compilers move unlikely code to the end, from where it
    jumps back. A loop is a jump to an instruction that every path to the jump has passed.
    """
    blocks, following = _blocks(instructions)
    preceding: list[list[int]] = [[] for _ in blocks]
    # Unreachable code may jump into a loop without being part of it.
    reachable = _connected(0, following, set()) if blocks else set()
    for block in reachable:
        for successor in following[block]:
            preceding[successor].append(block)
    dominators = _dominators(preceding)
    bodies: dict[int, set[int]] = {}  # by the block where the loop begins, as several jumps may lead to it
    for block in reachable:
        for head in following[block]:
            if head in dominators[block]:
                bodies.setdefault(head, set()).update(_connected(block, preceding, {head}))
    return [frozenset(itertools.chain(*(blocks[block] for block in body))) for body in bodies.values()]


def _blocks(instructions: Sequence[Instruction]) -> tuple[list[range], list[list[int]]]:
    """Basic blocks and their successors."""
    starts = {0} | {each.target for each in instructions if each.target is not None}
    starts |= {i + 1 for i, each in enumerate(instructions) if each.ends or each.target is not None}
    edges = [*sorted(start for start in starts if start < len(instructions)), len(instructions)]
    blocks = [range(*pair) for pair in itertools.pairwise(edges)]
    number = {block.start: index for index, block in enumerate(blocks)}
    following = []
    for block in blocks:
        last = instructions[block[-1]]
        after = [last.target] if last.target is not None else []
        after += [] if last.ends else [block.stop]
        following.append([number[start] for start in after if start in number])
    return blocks, following


def _connected(block: int, neighbours: Sequence[Sequence[int]], found: set[int]) -> set[int]:
    """``found``, the block, and all blocks reachable from it without passing through ``found``."""
    waiting = [block]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting.extend(neighbours[current])
    return found


def _dominators(preceding: Sequence[Sequence[int]]) -> list[set[int]]:
    """For each block, those on every path to it from block 0; all blocks where there is no path."""
    everything = set(range(len(preceding)))
    dominators = [everything if block else {0} for block in sorted(everything)]
    changed = True
    while changed:
        changed = False
        for block, sources in enumerate(preceding):
            if block == 0 or not sources:
                continue
            updated = set.intersection(*(dominators[source] for source in sources)) | {block}
            changed |= updated != dominators[block]
            dominators[block] = updated
    return dominators
