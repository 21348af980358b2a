"""The folder of the Hugging Face kernel: what the Hub asks, and that it works with torch and Triton alone."""

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import ecgot
import tools.hf_kernel.__main__
from tools.hf_kernel.__main__ import NAME, needed, rewritten, without_numba, write

ALLOWED = {"torch", "triton"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as ``make hf-kernel`` writes it."""
    folder = tmp_path_factory.mktemp("hub") / "ecgot-ot"
    write(folder)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site-packages folder with torch, Triton, what they require, and nothing else."""
    site = tmp_path_factory.mktemp("site-packages")
    waiting, seen = ["torch", "triton"], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # for another platform
            continue
        required = (each for each in distribution.requires or () if "extra ==" not in each)
        waiting += [re.split(r"[^\w.-]", each.strip(), maxsplit=1)[0] for each in required]
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}:
            target = Path(str(distribution.locate_file(top)))
            if top != "__pycache__" and target.exists() and not (site / top).exists():
                (site / top).symlink_to(target)
    return site


def python(environment: Path, script: str, *paths: Path) -> str:
    """What a script prints in an interpreter that sees only that site-packages folder and ``paths``."""
    search = [str(path) for path in (*paths, environment)]
    start = f"import sys; sys.path += {search!r}\n"
    command = [sys.executable, "-I", "-S", "-W", "ignore", "-c", start + script]
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # needs NumPy
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=plain)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_layout(folder: Path) -> None:
    build = tomllib.loads((folder / "build.toml").read_text(encoding="utf-8"))
    assert build["general"]["name"].replace("-", "_") == NAME
    assert {"version", "license", "backends"} <= build["general"].keys()
    assert "torch-noarch" in build  # Python and Triton alone: nothing is compiled
    for path in (
        "CARD.md",
        "LICENSE",
        "flake.nix",
        f"torch-ext/{NAME}/__init__.py",
        f"torch-ext/{NAME}/layers.py",
    ):
        assert (folder / path).is_file()


def test_imports_are_relative_or_allowed(folder: Path) -> None:
    """Of the kernel itself, torch, Triton and the standard library, at any depth."""
    sources = sorted((folder / "torch-ext").rglob("*.py"))
    assert len(sources) > 20
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                continue
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            tops = {name.split(".")[0] for name in names}
            assert tops <= ALLOWED | sys.stdlib_module_names, path
        assert "ecgot::" not in re.sub(r'""".*?"""', "", path.read_text(encoding="utf-8"), flags=re.DOTALL), (
            path
        )


def test_layers_have_no_state(folder: Path) -> None:
    tree = ast.parse((folder / "torch-ext" / NAME / "layers.py").read_text(encoding="utf-8"))
    layers = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    assert [layer.name for layer in layers] == ["SinkhornLoss", "DoublyStochastic"]
    for layer in layers:
        assert [node.name for node in layer.body if isinstance(node, ast.FunctionDef)] == ["forward"]
        valued = [node for node in layer.body if isinstance(node, ast.AnnAssign) and node.value is not None]
        assert [ast.unparse(node.target) for node in valued] == ["can_torch_compile"]


SCRIPT = f'''
import importlib.util, json, pkgutil, sys
import torch
import {NAME} as ot

for name in ("numpy", "numba", "ecgot", "scipy", "transformers"):
    assert importlib.util.find_spec(name) is None, name
for module in pkgutil.walk_packages(ot.__path__, ot.__name__ + "."):
    importlib.import_module(module.name)
generator = torch.Generator().manual_seed(0)
x = torch.randn(3, 20, 5, generator=generator).requires_grad_()
y = torch.randn(3, 30, 5, generator=generator)
out = ot.sinkhorn(x, y, eps=0.5)
out.value.sum().backward()
logits = torch.randn(10, 4, 4, generator=generator).requires_grad_()
ot.doubly_stochastic(logits)[:, 0, 0].sum().backward()


def adopting(layer, **attributes):
    """A module whose forward is a layer's, with the attributes that the layer says it reads."""
    assert attributes.keys() == {{name for name in layer.__annotations__ if name != "can_torch_compile"}}
    return type("Adopting", (torch.nn.Module,), attributes | {{"forward": layer.forward}})()


own = ot.SinkhornLoss(0.5, cost="cosine", debias=True, max_iter=100, reduction="none")
public = {{name: value for name, value in vars(own).items() if name[0] != "_" and name != "training"}}
loss = adopting(ot.layers.SinkhornLoss, **public)(x, y)
plan = adopting(ot.layers.DoublyStochastic, iterations=20)(logits)
torch.testing.assert_close(plan, ot.doubly_stochastic(logits))
compiled = torch.compile(lambda x: ot.sinkhorn(x, y, eps=0.5).value, fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(x), out.value)
print(json.dumps([out.value.tolist(), x.grad.tolist(), out.backend, logits.grad.tolist(), loss.tolist()]))
'''


def test_it_works_with_torch_and_triton_alone(folder: Path, environment: Path) -> None:
    """And says what the package says."""
    value, slope, backend, logits_slope, loss = json.loads(python(environment, SCRIPT, folder / "torch-ext"))
    assert backend == "torch"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 20, 5, generator=generator).requires_grad_()
    y = torch.randn(3, 30, 5, generator=generator)
    out = ecgot.sinkhorn(x, y, eps=0.5)
    out.value.sum().backward()
    torch.testing.assert_close(torch.tensor(value), out.value.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(slope), x.grad, rtol=1e-3, atol=1e-3)
    logits = torch.randn(10, 4, 4, generator=generator).requires_grad_()
    ecgot.kernels.doubly_stochastic(logits)[:, 0, 0].sum().backward()
    torch.testing.assert_close(torch.tensor(logits_slope), logits.grad, rtol=1e-4, atol=1e-6)
    wanted = ecgot.SinkhornLoss(0.5, cost="cosine", debias=True, max_iter=100, reduction="none")(x, y)
    torch.testing.assert_close(torch.tensor(loss), wanted.detach(), rtol=1e-3, atol=1e-4)


def test_it_leaves_numba_alone_where_there_is_one(folder: Path, environment: Path, tmp_path: Path) -> None:
    """The compiled loops stayed behind, whatever else is installed."""
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba/__init__.py").write_text("", encoding="utf-8")
    script = f"import torch, {NAME} as ot\nx = torch.rand(1, 3, 2)\nprint(ot.sinkhorn(x, x, eps=1.0).backend)"
    assert python(environment, script, folder / "torch-ext", tmp_path).strip() == "torch"


def test_two_contents_have_two_namespaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions of the kernel are loaded side by side, and beside ecgot."""
    names = []
    for at in ("one", "again", "other"):
        if at == "other":
            monkeypatch.setattr(
                tools.hf_kernel.__main__, "rewritten", lambda module: "# " + rewritten(module)
            )
        write(tmp_path / at)
        names.append((tmp_path / at / "torch-ext" / NAME / "_ops.py").read_text(encoding="utf-8"))
    assert names[0] == names[1] != names[2]
    assert re.search(r'NAMESPACE = "_ecgot_ot_[0-9a-f]{12}"', names[0])


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("irreplaceable", encoding="utf-8")
    with pytest.raises(SystemExit, match="FOLDER: expected none, an empty one or a kernel's"):
        write(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_numba_stays_behind() -> None:
    assert not [module for module in needed(("ecgot.kernels.ot.sinkhorn",)) if "numba" in module]
    constant = "import importlib\n\nHAS_NUMBA = (\n    importlib.find()\n)\nOTHER = 1\n"
    assert without_numba(constant) == "import importlib\n\nHAS_NUMBA = False\nOTHER = 1\n"
    function = "@cache\ndef numba_serves():\n    return probe()\n\n\ndef other(): ...\n"
    assert without_numba(function) == "def numba_serves() -> bool:\n    return False\n\n\ndef other(): ...\n"
    with pytest.raises(ValueError, match="expected a constant or function named after numba, got none"):
        without_numba("OTHER = 1\n")


def test_imports_are_rewritten_at_every_depth() -> None:
    text = rewritten("ecgot.kernels.ot.backends")
    assert "from ..dispatch import use_triton" in text
    assert "        from ..ot import triton_onchip" in text
    assert "from ecgot" not in text
