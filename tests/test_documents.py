"""The documents say what is: links and paths resolve, examples run, commands and options exist."""

import ast
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

from ecgot.cli.main import cli
from ecgot.data.synth import write_dataset
from ecgot.version import __version__

ROOT = Path(__file__).parents[1]
README_LINES = 120
PICTURE_BYTES = 200_000
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
# What stands in backticks and looks like a file or folder of the repository.
PATH = re.compile(r"`((?:ecgot|tests|benchmarks|docs|examples)/[\w./-]*|[A-Z][A-Z]+(?:\.md|\.cff))`")


def documents() -> list[Path]:
    folders = ("docs", "examples", "benchmarks", "ecgot", "tests")
    return [
        *ROOT.glob("*.md"),
        *(path for folder in folders for path in sorted((ROOT / folder).rglob("*.md"))),
    ]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def without_code(text: str) -> str:
    return FENCE.sub("", text)


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    text = without_code(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    for heading in HEADING.findall(text):
        plain = re.sub(r"[`*]", "", heading).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = next(n for n in range(len(found) + 1) if (f"{slug}-{n}" if n else slug) not in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found


def broken_links(path: Path, text: str) -> list[str]:
    """The relative links of a document's text that lead nowhere."""
    found = []
    for link in LINK.findall(without_code(text)):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            found.append(link)
    return found


@pytest.mark.parametrize("path", documents(), ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    assert not broken_links(path, path.read_text(encoding="utf-8"))


def test_a_broken_link_is_found() -> None:
    text = "[a](docs/nowhere.md) [b](docs/ot.md#nothing) [c](docs/ot.md#precision) [d](https://example.org)"
    assert broken_links(ROOT / "README.md", text) == ["docs/nowhere.md", "docs/ot.md#nothing"]


@pytest.mark.parametrize("path", documents(), ids=name)
def test_paths_in_backticks_exist(path: Path) -> None:
    text = without_code(path.read_text(encoding="utf-8"))
    made = {"ecgot/kernels/conv/backends.csv"}  # by a measurement on a GPU
    missing = [found for found in PATH.findall(text) if not (ROOT / found).exists() and found not in made]
    assert not missing


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    required = {"cff-version", "message", "title", "authors"}
    assert required <= citation.keys()
    assert citation["version"] == __version__


def test_the_picture_is_small() -> None:
    assert (ROOT / "docs/reading.png").stat().st_size <= PICTURE_BYTES


# --- examples that run --------------------------------------------------------------------------------------


def python_blocks(path: Path) -> Iterator[tuple[int, str]]:
    """The line and source of each Python block of a document that is to be run."""
    text = path.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        if match[1].strip() == "python":
            yield text.count("\n", 0, match.start()) + 2, match[2]


WITH_PYTHON = [path for path in documents() if any(python_blocks(path))]


@pytest.fixture(scope="module")
def folder_with_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `ecgot synth data --records 30` leaves in a folder."""
    folder = tmp_path_factory.mktemp("documents")
    write_dataset(folder / "data", records=30, seed=0)
    return folder


@pytest.mark.parametrize("path", WITH_PYTHON, ids=name)
def test_python_blocks_run(path: Path, folder_with_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, in one namespace for each document."""
    monkeypatch.chdir(folder_with_data)
    monkeypatch.setenv("ECGOT_CACHE", str(folder_with_data / "cache"))
    names: dict[str, object] = {}
    for line, source in python_blocks(path):
        tree = ast.parse(source)
        ast.increment_lineno(tree, line - 1)
        exec(compile(tree, name(path), "exec"), names)


@pytest.mark.parametrize("script", ["use_the_loss.py", "read_a_record.py"])
def test_examples_run(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [script])
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    assert capsys.readouterr().out


def test_the_loss_finds_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    example = runpy.run_path(str(ROOT / "examples/use_the_loss.py"))
    layer, losses = example["train"]()
    assert losses[-1] < 1e-2 * losses[0]
    assert (layer.weight - example["TRUE_MAP"]).abs().max() < 0.02


def test_the_picture_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="ecgot[bench] is not installed")
    out = tmp_path / "reading.png"
    monkeypatch.setattr(sys, "argv", ["draw_reading.py", str(out)])
    runpy.run_path(str(ROOT / "examples/draw_reading.py"), run_name="__main__")
    assert out.read_bytes().startswith(b"\x89PNG")
    assert out.stat().st_size <= PICTURE_BYTES


# --- commands -----------------------------------------------------------------------------------------------


def commands(text: str) -> Iterator[str]:
    """The ecgot command lines of a document: in shell blocks, and in backticks."""
    for info, block in FENCE.findall(text):
        if info.strip() in ("", "sh", "bash", "shell", "console"):
            for line in block.replace("\\\n", " ").splitlines():
                command = re.sub(r"\s+#.*$", "", line)
                command = re.split(r"[;|]\s*do |&&|; ", command)[-1].strip()
                if command.startswith("ecgot "):
                    yield command
    for found in re.findall(r"`(ecgot [^`]+)`", FENCE.sub("", text)):
        yield " ".join(found.split())


def wrong_in(command: str) -> str:
    """What a command line names that the command line interface does not have; "" where all is there."""
    text = re.sub(r"\[(--[^\]]*)\]", r"\1", command).replace("|", " ")  # "[--encoder NAME | --from RUN]"
    _, *words = shlex.split(text.split("; done")[0])
    known = cli.commands.get(words[0])
    if known is None:
        return "" if words[0].startswith(("-", "COMMAND")) else words[0]
    options = {o for parameter in known.params for o in parameter.opts if isinstance(parameter, click.Option)}
    unknown = [word.split("=")[0] for word in words[1:] if word.startswith("--")]
    return next((word for word in unknown if word not in options), "")


@pytest.mark.parametrize("path", documents(), ids=name)
def test_commands_and_their_options_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not [command for command in commands(text) if wrong_in(command)]


def test_a_wrong_command_is_found() -> None:
    assert wrong_in("ecgot train --dat DATA --out RUN") == "--dat"
    assert wrong_in("ecgot teach") == "teach"
    assert not wrong_in("ecgot report RECORD")


def test_settings_in_commands_exist() -> None:
    from ecgot.runs.config import resolve

    for path in documents():
        if "results" in path.parts:  # commands of their time
            continue
        for command in commands(path.read_text(encoding="utf-8")):
            if command.startswith("ecgot train"):
                words = shlex.split(command)
                settings = [word for word in words if re.match(r"[a-z_.]+=", word)]
                resolve(None, settings)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for path in documents():
        named = re.findall(r"(?:^|`)make ([a-z-]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert set(named) <= targets, path


def test_scripts_in_commands_exist() -> None:
    """`python benchmarks/x.py`, `python -m benchmarks.x` and `pytest tests/x`."""
    for path in documents():
        text = path.read_text(encoding="utf-8")
        scripts = re.findall(r"python ((?:benchmarks|examples)/[\w/]+\.py)", text)
        scripts += re.findall(r"pytest ((?:benchmarks|tests)/[\w/]*(?:\.py)?)", text)
        modules = re.findall(r"python -m ((?:benchmarks|ecgot)(?:\.\w+)+)", text)
        scripts += [module.replace(".", os.sep) for module in modules]
        missing = [
            each for each in scripts if not (ROOT / each).exists() and not (ROOT / f"{each}.py").exists()
        ]
        assert not missing, path
