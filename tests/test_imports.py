"""Which subpackage may import which."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GROUND = {"choices", "errors", "files", "version"}
# Kernels can be taken elsewhere: of the ground they know no more than this.
KERNELS_GROUND = {"errors", "files"}
# A subpackage may import the ground, itself, and these.
SUBPACKAGES = {
    "kernels": set(),
    "text": set(),
    "data": {"text"},
    "models": {"kernels", "text"},
    "runs": {"data", "models", "text"},
    "inference": {"data", "models", "page", "runs", "text"},
    "page": {"inference"},  # its notice alone; readings come as values
    "train": {"data", "models", "runs", "text"},
    "eval": {"data", "inference", "models", "runs", "text", "train"},
    "bench": {"kernels"},
    "compat": {"kernels"},
    "cli": {"bench", "data", "eval", "inference", "page", "runs", "text", "train"},
}
# Within kernels the families know nothing of each other, and none knows who compiles it.
FAMILIES = {"ot", "conv", "scaling"}
KERNELS = {**{family: set() for family in FAMILIES}, "resources": FAMILIES}
# Whose launches are counted; where kernels go elsewhere, this part stays.
COUNTED = {"resources": {"models"}}


def modules() -> list[Path]:
    return sorted((ROOT / "ecgot").rglob("*.py"))


def imported(source: str) -> Iterator[tuple[str, ...]]:
    """Every module of this package that a source imports, at any depth, as the parts of its name."""
    for node in ast.walk(ast.parse(source)):
        assert not getattr(node, "level", 0), "expected absolute imports, which the rules can read"
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "ecgot":
            names = [f"ecgot.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (tuple(name.split(".")) for name in names if name.split(".")[0] == "ecgot")


def violations(subpackage: str, part: str, source: str) -> list[str]:
    """What a source of a subpackage (and of a part of kernels) imports against the rules."""
    found = []
    ground = KERNELS_GROUND if subpackage == "kernels" else GROUND
    for _, target, *rest in imported(source):
        above = COUNTED.get(part, set()) if subpackage == "kernels" else set()
        if target not in ground | SUBPACKAGES[subpackage] | {subpackage} | above:
            found.append(f"{subpackage} imports {target}")
        elif part in KERNELS and rest and rest[0] in KERNELS.keys() - KERNELS[part] - {part}:
            found.append(f"kernels.{part} imports kernels.{rest[0]}")
    return found


def test_every_module_stands_in_a_subpackage() -> None:
    """Or on the ground; a new folder wants a rule here."""
    found = {path.relative_to(ROOT / "ecgot").parts[0].removesuffix(".py") for path in modules()}
    assert found == GROUND | set(SUBPACKAGES) | {"__init__"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    subpackage, *rest = path.relative_to(ROOT / "ecgot").parts
    source = path.read_text(encoding="utf-8")
    subpackage = subpackage.removesuffix(".py")
    if subpackage == "__init__":
        return
    if subpackage in GROUND:
        assert all(target in GROUND for _, target, *_ in imported(source))
        return
    assert not violations(subpackage, rest[0] if rest else "", source)


@pytest.mark.parametrize(
    ("subpackage", "part", "source"),
    [
        ("inference", "", "from ecgot.train.loop import train_epochs"),
        ("inference", "", "def late():\n    from ecgot.eval import auroc"),
        ("kernels", "ot", "import ecgot.data.record"),
        ("kernels", "ot", "from ecgot.models import encoder"),
        ("kernels", "resources", "from ecgot.data.record import Record"),
        ("kernels", "conv", "from ecgot.choices import BEAMS"),
        ("kernels", "ot", "from ecgot.kernels.conv.conv1d import conv1d"),
        ("train", "", "from ecgot import eval"),
        ("data", "", "from ecgot.models import encoder"),
    ],
)
def test_an_import_against_the_rules_is_found(subpackage: str, part: str, source: str) -> None:
    assert violations(subpackage, part, source)


def test_no_two_modules_import_each_other() -> None:
    """Also within a subpackage, where every module imports what stands below it."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in modules()}
    uses = {
        name: {
            target
            for parts in imported(path.read_text(encoding="utf-8"))
            for target in (".".join(parts), ".".join(parts[:-1]))
            if target in names and target != name
        }
        for name, path in names.items()
    }
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in sorted(uses[name]):
                visit(other, (*way, name))
            done.add(name)

    for name in names:
        visit(name, ())
