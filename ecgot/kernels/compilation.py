"""What a kernel needs to be compiled without a launch: types, constants, options, and a name for tables."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

# Those that the kernels are compiled for, by Triton's names.
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class CompileCase(NamedTuple):
    """A kernel as one launch would compile it.

    signature: Triton's type of each argument, "constexpr" for constants. options: num_warps and num_stages.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Conventions:
    """How a family of kernels types its arguments and names its cases.

    Attributes:
        in_dtype: pointers to tensors of the case's dtype; other pointers are fp32.
        types: Triton types of further arguments by name; other scalars are i32.
        tile: the constants that name the tile; all ``BLOCK_*`` unless given.
        words: for constants that stand as a word of their own in the name, how to spell their values.
    """

    in_dtype: frozenset[str]
    types: Mapping[str, str]
    tile: tuple[str, ...] | None = None
    words: Mapping[str, Callable[[Any], str]] = field(default_factory=dict)


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
        configuration: what the launcher picked: tile sizes, other constants, num_warps and num_stages.
        conventions: of the kernel's family.
    """
    options = {name: configuration[name] for name in ("num_warps", "num_stages")}
    constants = {**flags, **{name: value for name, value in configuration.items() if name not in options}}

    def argument_type(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in conventions.types:
            return conventions.types[name]
        if not name.endswith("_ptr"):
            return "i32"
        return f"*{dtype}" if name in conventions.in_dtype else "*fp32"

    signature = {name: argument_type(name) for name in kernel.arg_names}
    name = _case_name(dtype, flags, constants, conventions)
    return CompileCase(name, kernel, signature, constants, options)


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
