"""Functions stay short enough to read and narrow enough to call."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES, MAX_ARGUMENTS = 60, 8
# Compiled as they are written, with tensors and sizes as flat arguments: Triton's kernels are not split, as a
# call would cost registers, and numba takes no values of ours. A command's arguments are its options.
EXEMPT_DECORATORS = ("triton.jit", "njit", "cli.command")
SIGNATURES_OF_OTHERS = "ecgot/compat/"  # whose public functions take what those that they stand for take

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(source: str) -> Iterator[Function]:
    """Every function of a source, nested ones and methods too."""
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, Function))


def lines(function: Function) -> int:
    """From ``def`` to the end, without the docstring."""
    assert function.end_lineno is not None
    count = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        text = function.body[0]
        assert text.end_lineno is not None
        count -= text.end_lineno - text.lineno + 1
    return count


def arguments(function: Function) -> int:
    """All of them; those that a public function takes by keyword alone do not count."""
    given = function.args
    names = [each.arg for each in (*given.posonlyargs, *given.args) if each.arg not in ("self", "cls")]
    private = function.name.startswith("_") and not function.name.startswith("__")
    return len(names) + (len(given.kwonlyargs) if private else 0)


def too_large(source: str, path: str = "") -> list[str]:
    """What is wrong with a source's functions."""
    found = []
    for function in functions(source):
        decorators = (ast.unparse(each) for each in function.decorator_list)
        name = f"{path}::{function.name}"
        if any(each.startswith(EXEMPT_DECORATORS) for each in decorators):
            continue
        if lines(function) > MAX_LINES:
            found.append(f"{name}: expected at most {MAX_LINES} lines, got {lines(function)}")
        private = function.name.startswith("_") and not function.name.startswith("__")
        if path.startswith(SIGNATURES_OF_OTHERS) and not private:
            continue
        if arguments(function) > MAX_ARGUMENTS:
            found.append(f"{name}: expected at most {MAX_ARGUMENTS} arguments, got {arguments(function)}")
    return found


def sources() -> Iterator[tuple[str, str]]:
    """Path from the root, and text."""
    for folder in ("ecgot", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


def test_no_function_is_too_long_or_takes_too_many_arguments() -> None:
    wrong = [line for path, source in sources() for line in too_large(source, path)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def long():\n" + "    x = 1\n" * 60, "60 lines, got 61"),
        ("def wide(a, b, c, d, e, f, g, h, i): ...", "8 arguments, got 9"),
        ("def _wide(a, b, c, d, e, f, g, h, *, i): ...", "8 arguments, got 9"),
        ("class A:\n    def __init__(self, a, b, c, d, e, f, g, h, i): ...", "8 arguments, got 9"),
    ],
)
def test_what_is_too_large_is_found(source: str, says: str) -> None:
    (wrong,) = too_large(source)
    assert says in wrong


@pytest.mark.parametrize(
    "source",
    [
        'def documented():\n    """A\n' + "    b\n" * 60 + '    """\n' + "    x = 1\n" * 50,
        "def public(a, *, b, c, d, e, f, g, h, i, j): ...",
        "@triton.jit\ndef _kernel(a, b, c, d, e, f, g, h, i, j): ...",
        "class A:\n    def method(self, a, b, c, d, e, f, g, h): ...",
    ],
)
def test_what_the_rules_allow_passes(source: str) -> None:
    assert not too_large(source)
