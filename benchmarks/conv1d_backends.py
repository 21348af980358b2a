"""Time each encoder's layers in this package's kernels and in the vendor's library, and write the table that
``backend="auto"`` follows (:func:`ecgot.kernels.conv1d_backends`).

    python -m benchmarks.conv1d_backends [--out ecgot/kernels/conv/backends.csv]

Needs a GPU. A layer is timed as in training: it normalises its input and reduces its output's statistics.
Rows of other GPUs that the table holds already are kept.
"""

import argparse
import csv
import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.output import ROOT, write_rows
from ecgot.bench.origin import origin
from ecgot.bench.stopwatch import median_us
from ecgot.kernels import LazyActivation
from ecgot.kernels.conv.backends import PASSES, gpu_name
from ecgot.kernels.conv.geometry import Geometry
from ecgot.kernels.conv.operands import OutputGradient, Settings
from ecgot.kernels.conv.operators import forward, gradients
from ecgot.kernels.dispatch import HAS_TRITON, INTERPRETED
from ecgot.models.encoders import ENCODERS, plain_encoder

TABLE = ROOT / "ecgot" / "kernels" / "conv" / "backends.csv"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ROUNDS = 20
SHAPE = ("c_in", "c_out", "k", "stride", "dilation", "groups")


@dataclass(frozen=True)
class Layer:
    """A convolution of an encoder, with the length of its input in samples."""

    c_in: int
    c_out: int
    k: int
    stride: int
    dilation: int
    groups: int
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        """What the table tells layers apart by: the fields named in ``SHAPE``."""
        return tuple(getattr(self, name) for name in SHAPE)


@dataclass(frozen=True)
class Run:
    """Records in a batch, where, and how many calls a median is of."""

    batch: int
    device: torch.device
    rounds: int


def layers(name: str, samples: int) -> Iterator[Layer]:
    """An encoder's convolutions in the order in which a record of this many samples passes them."""
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


def passes(
    layer: Layer, dtype: torch.dtype, batch: int, device: torch.device
) -> dict[str, Callable[[str], object]]:
    """Each pass as a function of the backend."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    geometry = Geometry(layer.stride, layer.k // 2, layer.dilation, layer.groups)
    c_in, c_out = layer.c_in, layer.c_out
    mean, scale, shift = (draw(c_in, dtype=torch.float32) for _ in range(3))
    x = LazyActivation(draw(batch, layer.length, c_in), mean, scale, shift, "relu")
    weight = draw(c_out, c_in // layer.groups, layer.k)
    y = draw(batch, geometry.output_length(layer.length, layer.k), c_out)
    grad = OutputGradient(y, y, *(draw(c_out, dtype=torch.float32) for _ in range(3)))

    def settings(backend: str) -> Settings:
        return Settings(geometry, backend=backend)

    def backward(needs_x: bool, backend: str) -> object:
        return gradients(grad, weight, settings(backend), x, (needs_x, not needs_x))

    made: list[Callable[[str], object]] = [
        lambda backend: forward(x, weight, settings(backend), statistics=True),
        lambda backend: backward(True, backend),
        lambda backend: backward(False, backend),
    ]
    return dict(zip(PASSES, made, strict=True))


def measure(found: Iterable[Layer], dtype: str, run: Run) -> Iterator[dict[str, object]]:
    """Rows of the table, one a pass, shape and length."""
    different = {(layer.shape, layer.length): layer for layer in found}
    for (shape, length), layer in sorted(different.items()):
        for name, call in passes(layer, DTYPES[dtype], run.batch, run.device).items():
            times = {
                backend: median_us(functools.partial(call, backend), run.device, run.rounds)
                for backend in ("triton", "torch")
            }
            row: dict[str, object] = {"gpu": gpu_name(run.device), "pass": name}
            row |= {**dict(zip(SHAPE, shape, strict=True)), "dtype": dtype, "length": length}
            row["backend"] = min(times, key=times.__getitem__)
            row |= {f"{backend}_us": f"{value:.1f}" for backend, value in times.items()}
            row |= {"batch": run.batch, **origin()}
            print(" ".join(map(str, row.values())), file=sys.stderr)
            yield row


def main(arguments: list[str] | None = None) -> int:
    """Write the table; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--encoders", default=",".join(ENCODERS))
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not HAS_TRITON or (device.type == "cpu" and not INTERPRETED):
        print("conv1d_backends: there is no GPU to measure", file=sys.stderr)
        return 2
    found = [layer for name in options.encoders.split(",") for layer in layers(name, options.samples)]
    run = Run(options.batch, device, options.rounds)
    rows = [row for dtype in options.dtypes.split(",") for row in measure(found, dtype, run)]
    write_rows(options.out, [*_of_others(options.out, gpu_name(device)), *rows], list(rows[0]))
    return 0


def _of_others(table: Path, gpu: str) -> list[dict[str, object]]:
    """The rows of other GPUs that a table holds."""
    if not table.exists():
        return []
    with table.open(encoding="utf-8", newline="") as file:
        return [dict(row) for row in csv.DictReader(file) if row["gpu"] != gpu]


if __name__ == "__main__":
    sys.exit(main())
