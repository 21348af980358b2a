"""What a kernel needs to be compiled without a launch: types, constants, options, and a name for tables.

A launcher compiles a kernel for what it knows of a call's arguments: an integer that is 1 becomes a
constant, and multiples of 16, addresses among them, are declared to be such, which makes loads wider and
address arithmetic shorter. ``compile_case`` does the same for a typical call: torch's memory is aligned, and
integers have the values of ``EXAMPLES``, where a family's conventions give no others.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

# Those that the kernels are compiled for, by Triton's names.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# A typical call: clouds of 128 points in 256 dimensions; a convolution of 64 channels over 250 samples of 256
# records, to 64 channels, with stride 1; contiguous tensors. Others are neither 1 nor multiples of 16.
EXAMPLES = {
    **dict.fromkeys(("N", "M", "padded"), 128),
    **dict.fromkeys(("D", "W", "stride_xn", "stride_yn"), 256),
    **dict.fromkeys(("stride_xb", "stride_yb"), 128 * 256),
    **dict.fromkeys(("T", "T_OUT"), 250),
    **dict.fromkeys(("C_IN", "C_OUT", "C", "width", "stride_xt", "stride_wc"), 64),
    **dict.fromkeys(("TILES", "stride_wk"), 64 * 64),
    **dict.fromkeys(("ROWS", "ROWS_OF_PART"), 250 * 256),
    **dict.fromkeys(("stride_xd", "stride_yd", "stride_xc", "stride_wo"), 1),
    **dict.fromkeys(("GROUPS", "STRIDE", "DILATION", "TAP_STEP"), 1),
}
OPTIONS = ("num_warps", "num_stages", "maxnreg")  # of a compilation, as Triton names them
DIVISOR = 16  # of integers and addresses that are declared to be its multiples


class CompileCase(NamedTuple):
    """A kernel as one launch would compile it.

    signature: Triton's type of each argument, "constexpr" for constants. options: some of ``OPTIONS``.
    divisible: names of the arguments that are multiples of 16.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    divisible: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conventions:
    """How a family of kernels types its arguments and names its cases.

    Attributes:
        in_dtype: pointers to tensors of the case's dtype; other pointers are fp32.
        types: Triton types of further arguments by name; other scalars are i32.
        tile: the constants that name the tile; all ``BLOCK_*`` unless given.
        words: for constants that stand as a word of their own in the name, how to spell their values.
        examples: values of integer arguments by name in a typical call, before those of ``EXAMPLES``.
    """

    in_dtype: frozenset[str]
    types: Mapping[str, str]
    tile: tuple[str, ...] | None = None
    words: Mapping[str, Callable[[Any], str]] = field(default_factory=dict)
    examples: Mapping[str, int] = field(default_factory=dict)


def compile_case(
    kernel: Any,
    dtype: str,
    flags: Mapping[str, Any],
    configuration: Mapping[str, Any],
    conventions: Conventions,
) -> CompileCase:
    """The case of one launch.

    Args:
        kernel: a ``triton.jit`` function.
        dtype: as Triton names it, such as "fp16".
        flags: constants that depend on the call; those that are set appear in the name.
        configuration: what the launcher picked: tile sizes, other constants, and ``OPTIONS``.
        conventions: of the kernel's family.
    """
    options = {name: configuration[name] for name in OPTIONS if name in configuration}
    constants = {**flags, **{name: value for name, value in configuration.items() if name not in options}}

    def argument_type(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in conventions.types:
            return conventions.types[name]
        if not name.endswith("_ptr"):
            return "i32"
        return f"*{dtype}" if name in conventions.in_dtype else "*fp32"

    types = {name: argument_type(name) for name in kernel.arg_names}
    values = {**EXAMPLES, **conventions.examples}
    integers = {
        name: values[name] for name, kind in types.items() if kind in ("i32", "i64") and name in values
    }
    name = _case_name(dtype, flags, constants, conventions)
    signature, constants, divisible = specialised(kernel, types, constants, integers)
    return CompileCase(name, kernel, signature, constants, options, divisible)


def specialised(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], integers: Mapping[str, int]
) -> tuple[dict[str, str], dict[str, Any], tuple[str, ...]]:
    """Signature, constants and names of multiples of 16 of a launch with aligned tensors.

    Args:
        kernel: says which arguments are not to be looked at, where it is compiled, not interpreted.
        types: of all arguments, "constexpr" for constants.
        constants: their values.
        integers: values of the integers among the other arguments, as far as they are known.
    """
    parameters = getattr(kernel, "params", ())
    general = {each.name for each in parameters if each.do_not_specialize}
    unaligned = general | {each.name for each in parameters if each.do_not_specialize_on_alignment}
    ones = {name: 1 for name, value in integers.items() if value == 1 and name not in general}
    signature = {name: "constexpr" if name in ones else kind for name, kind in types.items()}
    divisible = [
        name
        for name, kind in signature.items()
        if name not in unaligned and (kind.startswith("*") or _divisible(integers.get(name)))
    ]
    return signature, {**constants, **ones}, tuple(divisible)


def _divisible(value: int | None) -> bool:
    return value is not None and value % DIVISOR == 0


def _case_name(
    dtype: str, flags: Mapping[str, Any], constants: Mapping[str, Any], conventions: Conventions
) -> str:
    """Tile, dtype, words and flags, such as "64x32 fp16 dense norm x_activation=1"."""
    tile = conventions.tile or tuple(name for name in constants if name.startswith("BLOCK"))
    words = [spell(constants[name]) for name, spell in conventions.words.items() if name in constants]
    said = [
        name.lower() if value is True else f"{name.lower()}={value}"
        for name, value in flags.items()
        if name not in conventions.words and isinstance(value, int) and value
    ]
    blocks = [str(constants[name]) for name in tile if name in constants]
    return " ".join(["x".join(blocks), dtype, *words, *said])
