"""Writes the folder of a Hugging Face kernel from ``ecgot/kernels``: python -m tools.hf_kernel FOLDER.

What the Hub asks of a kernel (https://huggingface.co/docs/kernels/kernel-requirements), and how it is met:

    imports only of itself, relative, of torch and of     the modules that ``ROOTS`` need are copied, their
    the standard library (Triton comes with torch)        imports rewritten; the loops of numba stay behind
    operators in a namespace of the build's own           their names go through ``_ops``, as kernel-builder's
    layers without state of their own                     ``layers.py`` in the template
    build.toml, torch-ext/NAME, a card                    the template
"""

import ast
import hashlib
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEMPLATE = Path(__file__).parent / "template"
NAME = "ecgot_ot"
# The public functions; everything that they import comes along.
ROOTS = tuple(f"ecgot.kernels.ot.{name}" for name in ("divergence", "loss", "pairwise", "sinkhorn", "varlen"))
ROOTS += ("ecgot.kernels.scaling.doubly_stochastic",)
LEFT_BEHIND = re.compile(r"ecgot\.kernels\.ot\.numba_\w+")
CHOOSES = "ecgot.kernels.ot.backends"  # whose names with numba in them say whether its loops serve
# kernel-builder writes its own in this place; with this one the folder works as it is.
OPS = '''"""The namespace of the operators: one of its own for each content of this folder."""

import torch

NAMESPACE = "_ecgot_ot_{digest}"
ops = getattr(torch.ops, NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """An operator's whole name."""
    return f"{{NAMESPACE}}::{{op_name}}"
'''
OPERATOR = re.compile(r"ecgot::(\w+)")
OWN_NAMESPACE = 'NAMESPACE = "ecgot"\n'


def write(folder: Path) -> None:
    """Write the kernel's folder, in place of what was in it."""
    if folder.exists() and any(folder.iterdir()) and not (folder / "build.toml").exists():
        raise SystemExit(f"FOLDER: expected none, an empty one or a kernel's, got {folder} with other files")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(TEMPLATE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    package = folder / "torch-ext" / NAME
    for module in needed(ROOTS):
        path = package.joinpath(*_parts(module)).with_suffix(".py")
        if source(module).name == "__init__.py":
            path = path.with_suffix("") / "__init__.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(rewritten(module), encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", folder / "LICENSE")
    (package / "_ops.py").write_text(OPS.format(digest=_digest(package)), encoding="utf-8")


def source(module: str) -> Path:
    """The file of a module of this repository."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def needed(roots: tuple[str, ...]) -> list[str]:
    """The roots, their packages, and every module of ours that they import, at any depth."""
    found: set[str] = set()
    waiting = list(roots)
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found.add(module)
        package = module.rpartition(".")[0]
        if package.startswith("ecgot.kernels."):
            waiting.append(package)
        waiting += [used for node in _imports(_tree(module)) for used in _targets(node)]
    return sorted(found)


def rewritten(module: str) -> str:
    """A module's source with relative imports, without numba, and with operators of the kernel's own."""
    text = source(module).read_text(encoding="utf-8")
    text = without_numba(text) if module == CHOOSES else text
    lines = text.splitlines(keepends=True)
    depth = len(_parts(module)) - (source(module).name != "__init__.py")
    tree = ast.parse(text)
    for node in _imports(tree):
        first = lines[node.lineno - 1]
        lines[node.lineno - 1] = re.sub(
            r"from (ecgot[\w.]*) import", lambda found: f"from {_relative(found[1], depth)} import", first
        )
    operators = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and _operator(node)]
    for name in operators:
        at = name.lineno - 1
        lines[at] = re.sub(r'"ecgot::(\w+)"', r'add_op_namespace_prefix("\1")', lines[at])
    if operators:
        last = max(
            node.end_lineno or 0 for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
        )
        lines.insert(last, f"from {'.' * (depth + 1)}_ops import add_op_namespace_prefix\n")
    own = f"from {'.' * (depth + 1)}_ops import NAMESPACE\n"
    return "".join(own if line == OWN_NAMESPACE else line for line in lines)


def without_numba(text: str) -> str:
    """A source in which what is named after numba, a constant or a function, is False."""
    lines = text.splitlines(keepends=True)
    replaced = 0
    for node in reversed(ast.parse(text).body):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, new = node.targets[0].id, "{} = False\n"
        elif isinstance(node, ast.FunctionDef):
            name, new = node.name, "def {}() -> bool:\n    return False\n"
        else:
            continue
        if "numba" in name.lower():
            first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])
            lines[first - 1 : node.end_lineno] = [new.format(name)]
            replaced += 1
    if not replaced:
        raise ValueError(f"{CHOOSES}: expected a constant or function named after numba, got none")
    return "".join(lines)


def _parts(module: str) -> tuple[str, ...]:
    """Where a module stands in the kernel: the kernels' folders, and what is on our ground, at the top."""
    return tuple(module.removeprefix("ecgot.").removeprefix("kernels.").split("."))


def _relative(module: str, depth: int) -> str:
    """A module's name as a module that is ``depth`` folders deep imports it."""
    return "." * (depth + 1) + ".".join(() if module == "ecgot.kernels" else _parts(module))


def _tree(module: str) -> ast.Module:
    return ast.parse(source(module).read_text(encoding="utf-8"))


def _imports(tree: ast.Module) -> Iterator[ast.ImportFrom]:
    """Every import of a module of ours, those within functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            wrong = [alias.name for alias in node.names if alias.name.split(".")[0] == "ecgot"]
            if wrong:
                raise ValueError(f"import: expected from ... import ..., got import {wrong[0]}")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ecgot":
            yield node


def _targets(node: ast.ImportFrom) -> Iterator[str]:
    """The modules that an import loads, without those that stay behind."""
    assert node.module is not None
    for alias in node.names:
        module = f"{node.module}.{alias.name}"
        module = module if source(module).exists() else node.module
        if not LEFT_BEHIND.fullmatch(module):
            yield module


def _digest(package: Path) -> str:
    files = sorted(package.rglob("*.py"))
    content = b"".join(str(path.relative_to(package)).encode() + path.read_bytes() for path in files)
    return hashlib.sha256(content).hexdigest()[:12]


def _operator(node: ast.Constant) -> bool:
    return isinstance(node.value, str) and OPERATOR.fullmatch(node.value) is not None


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("python -m tools.hf_kernel FOLDER")
    write(Path(sys.argv[1]))
