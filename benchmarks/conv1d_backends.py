"""Measure each encoder's layers by this package's kernels and by the vendor's library, and write the table
that ``backend="auto"`` follows (:func:`ecgot.kernels.conv1d_backends`).

    python benchmarks/conv1d_backends.py [--out ecgot/kernels/conv/backends.csv]

Needs a GPU. A layer is timed as in training: it normalises what it reads and reduces its output's statistics.
"""

import argparse
import csv
import io
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ecgot.bench import origin
from ecgot.files import write_text
from ecgot.kernels import LazyActivation
from ecgot.kernels.conv.backends import PASSES
from ecgot.kernels.conv.geometry import Geometry
from ecgot.kernels.conv.operands import OutputGradient
from ecgot.kernels.conv.operators import forward, gradients
from ecgot.kernels.dispatch import HAS_TRITON, INTERPRETED
from ecgot.models.encoders import ENCODERS, plain_encoder

TABLE = Path(__file__).parents[1] / "ecgot" / "kernels" / "conv" / "backends.csv"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ROUNDS = 20


@dataclass(frozen=True)
class Layer:
    c_in: int
    c_out: int
    k: int
    stride: int
    dilation: int
    groups: int
    length: int  # of its input


def layers(name: str, samples: int) -> Iterator[Layer]:
    """An encoder's convolutions, as a record of this many samples meets them."""
    found: list[Layer] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        assert isinstance(module, nn.Conv1d)
        c_out, c_in, k = module.weight.shape
        shape = c_in * module.groups, c_out, k, module.stride[0], module.dilation[0], module.groups
        found.append(Layer(*shape, inputs[0].shape[2]))

    model = plain_encoder(name).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv1d):
            module.register_forward_hook(note)
    with torch.no_grad():
        model(torch.zeros(1, 12, samples))
    yield from found


def passes(layer: Layer, dtype: torch.dtype, batch: int, device: str) -> dict[str, Callable[[str], object]]:
    """Each pass as a function of the backend."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    geometry = Geometry(layer.stride, layer.k // 2, layer.dilation, layer.groups)
    c_in, c_out = layer.c_in, layer.c_out
    vectors = [draw(c_in, dtype=torch.float32) for _ in range(3)]
    x = LazyActivation(draw(batch, layer.length, c_in), *vectors, "relu")
    weight = draw(c_out, c_in // layer.groups, layer.k)
    y = draw(batch, int(geometry.length(layer.length, layer.k)), c_out)
    grad = OutputGradient(y, y, *(draw(c_out, dtype=torch.float32) for _ in range(3)))
    settings = {"precision": "fp32"}

    def backward(needs_x: bool, backend: str) -> object:
        return gradients(grad, weight, geometry, x, needs_x, not needs_x, backend=backend, **settings)

    made: list[Callable[[str], object]] = [
        lambda backend: forward(x, weight, geometry, statistics=True, backend=backend, **settings),
        lambda backend: backward(True, backend),
        lambda backend: backward(False, backend),
    ]
    return dict(zip(PASSES, made, strict=True))


def median_us(function: Callable[[], object], device: str, rounds: int) -> float:
    """Wall clock of a call, from an idle device until it is idle again."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    times = []
    for _ in range(rounds + 2):  # two to compile and to tune
        wait()
        start = time.perf_counter()
        function()
        wait()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times[2:])


def measure(
    names: list[str], dtypes: list[str], batch: int, samples: int, device: str, rounds: int
) -> list[dict[str, str]]:
    # Where a layer comes at several lengths, the longest decides: it takes the most time.
    longest: dict[tuple[int, ...], Layer] = {}
    for layer in (layer for name in names for layer in layers(name, samples)):
        key = layer.c_in, layer.c_out, layer.k, layer.stride, layer.dilation, layer.groups
        if key not in longest or layer.length > longest[key].length:
            longest[key] = layer
    rows = []
    for dtype in dtypes:
        for key, layer in sorted(longest.items()):
            for name, run in passes(layer, DTYPES[dtype], batch, device).items():
                times = {
                    backend: median_us(lambda run=run, backend=backend: run(backend), device, rounds)
                    for backend in ("triton", "torch")
                }
                columns = dict(zip(("c_in", "c_out", "k", "stride", "dilation", "groups"), key, strict=True))
                row = {"pass": name, **columns, "dtype": dtype, "backend": min(times, key=times.__getitem__)}
                row |= {f"{backend}_us": f"{value:.1f}" for backend, value in times.items()}
                row |= {"batch": batch, "length": layer.length, **origin()}
                rows.append({column: str(value) for column, value in row.items()})
                print(" ".join(rows[-1].values()), file=sys.stderr)
    return rows


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, table.getvalue())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--encoders", default=",".join(ENCODERS))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not HAS_TRITON or (device == "cpu" and not INTERPRETED):
        print("conv1d_backends: there is no GPU to measure", file=sys.stderr)
        return 2
    sizes = (options.batch, options.samples, device, options.rounds)
    rows = measure(options.encoders.split(","), options.dtypes.split(","), *sizes)
    write_rows(options.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
