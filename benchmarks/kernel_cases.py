"""Launch every Triton kernel once, for compute-sanitizer and ncu to look at.

    compute-sanitizer --tool memcheck python -m benchmarks.kernel_cases
    ncu --kernel-name regex:_sinkhorn_fwd python -m benchmarks.kernel_cases --large sinkhorn

By default the cases are small and fill no tile; ``--large`` takes the sizes whose speed matters. Needs a GPU,
or TRITON_INTERPRET=1. Exits with 1 where a result is not finite.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ecgot.kernels import (
    BatchNorm,
    FusedLayer,
    LazyActivation,
    conv1d,
    conv1d_bottleneck,
    conv1d_norm,
    doubly_stochastic,
    join,
    sinkhorn,
    sinkhorn_pairwise,
)
from ecgot.kernels.dispatch import HAS_TRITON, INTERPRETED


@dataclass(frozen=True)
class Sizes:
    """Sizes of transport problems and of a convolution.

    streamed_n: points of a problem that does not fit on chip. dtype: of the convolutions and of "solver";
    other transport is fp32.
    """

    batch: int
    n: int
    m: int
    d: int
    iterations: int
    streamed_n: int
    length: int
    channels: int
    dtype: torch.dtype


SMALL = Sizes(3, 37, 21, 19, 5, 300, 45, 24, torch.float32)
LARGE = Sizes(256, 128, 128, 256, 100, 2000, 1000, 64, torch.bfloat16)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GENERATOR = torch.Generator()


def draw(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values that require gradients."""
    return torch.randn(size, generator=GENERATOR).to(DEVICE, dtype).requires_grad_()


def run_sinkhorn(sizes: Sizes) -> Iterator[Tensor]:
    """On chip: values and their gradients, then the plan's, which solve a linear system."""
    options: dict[str, Any] = {"eps": 0.1, "cost": "cosine", "max_iter": sizes.iterations, "tol": 0.0}
    x, y = draw(sizes.batch, sizes.n, sizes.d), draw(sizes.batch, sizes.m, sizes.d)
    yield from torch.autograd.grad(sinkhorn(x, y, **options).value.sum(), (x, y))
    few = slice(0, 32)
    plan = sinkhorn(x[:, few], y[:, few], **options).plan()
    yield from torch.autograd.grad(plan.square().sum(), (x, y))


def run_solver(sizes: Sizes) -> Iterator[Tensor]:
    """On chip, as a loss is trained with: squared distances of points in a network's dtype."""
    x, y = (draw(sizes.batch, count, sizes.d, dtype=sizes.dtype) for count in (sizes.n, sizes.m))
    value = sinkhorn(x, y, eps=0.1 * sizes.d, max_iter=sizes.iterations, tol=0.0).value
    yield from torch.autograd.grad(value.sum(), (x, y))


def run_streaming(sizes: Sizes) -> Iterator[Tensor]:
    """A problem too large for the chip: the value and its gradients."""
    x, y = draw(1, sizes.streamed_n, sizes.d), draw(1, sizes.streamed_n, sizes.d)
    value = sinkhorn(x, y, eps=0.1, cost="cosine", max_iter=min(sizes.iterations, 20), tol=0.0).value
    yield from torch.autograd.grad(value.sum(), (x, y))


def run_pairs(sizes: Sizes) -> Iterator[Tensor]:
    """Every cloud of one batch with every one of another: values and their gradients."""
    x, y = draw(sizes.batch, 33, sizes.d), draw(sizes.batch, 20, sizes.d)
    value = sinkhorn_pairwise(x, y, eps=0.1, cost="cosine", max_iter=min(sizes.iterations, 20), tol=0.0)
    yield from torch.autograd.grad(value.sum(), (x, y))


def run_matrices(sizes: Sizes) -> Iterator[Tensor]:
    """Many small matrices made doubly stochastic, and the gradient in their logits."""
    for side in (3, 4, 16):
        logits = draw(sizes.batch * sizes.n, side, side, dtype=sizes.dtype)
        yield from torch.autograd.grad(doubly_stochastic(logits).square().sum(), logits)


def _layer(sizes: Sizes) -> tuple[Tensor, Tensor]:
    c = sizes.channels
    return draw(sizes.batch, sizes.length, c, dtype=sizes.dtype), draw(c, c, 5, dtype=sizes.dtype)


def run_convolution(sizes: Sizes) -> Iterator[Tensor]:
    """A convolution with its activation: gradients in input and weight."""
    x, weight = _layer(sizes)
    y = conv1d(x, weight, padding=2, activation="relu", backend="triton")
    yield from torch.autograd.grad(y.square().mean(), (x, weight))


def run_norm(sizes: Sizes) -> Iterator[Tensor]:
    """A convolution with its batch norm in training, joined with a shortcut."""
    x, weight = _layer(sizes)
    gamma, beta = draw(sizes.channels), draw(sizes.channels)
    signal = conv1d_norm(LazyActivation(x), weight, BatchNorm(gamma, beta), padding=2, backend="triton")
    y = join(signal, LazyActivation(x), "relu").values
    yield from torch.autograd.grad(y.square().mean(), (x, weight, gamma, beta))


@torch.no_grad()
def run_bottleneck(sizes: Sizes) -> Iterator[Tensor]:
    """The fused block of three convolutions, at inference."""
    c, dtype = min(sizes.channels, 64), sizes.dtype
    layers = [
        FusedLayer(draw(*shape, dtype=dtype), None, draw(shape[0]))
        for shape in ((c, c, 5), (4 * c, c, 1), (c, 4 * c, 1))
    ]
    x, residual = (draw(sizes.batch, sizes.length, width, dtype=dtype) for width in (c, 4 * c))
    for each in conv1d_bottleneck(x, layers[0], layers[1], residual, layers[2], padding=2, backend="triton"):
        assert each is not None
        yield each


CASES: dict[str, Callable[[Sizes], Iterator[Tensor]]] = {
    "sinkhorn": run_sinkhorn,
    "solver": run_solver,
    "streaming": run_streaming,
    "pairs": run_pairs,
    "matrices": run_matrices,
    "convolution": run_convolution,
    "norm": run_norm,
    "bottleneck": run_bottleneck,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the named cases; 1 where a result is not finite, 2 where no kernel can run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--large", action="store_true", help="the sizes whose speed matters")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in CASES]
    if unknown:
        parser.error(f"CASE: expected one of {', '.join(CASES)}, got {unknown[0]}")
    if not HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED):
        print("kernel_cases: there is no GPU, and TRITON_INTERPRET=1 is not set", file=sys.stderr)
        return 2
    wrong = []
    for name in options.names or CASES:
        GENERATOR.manual_seed(0)
        finite = [bool(tensor.isfinite().all()) for tensor in CASES[name](LARGE if options.large else SMALL)]
        print(f"{name}: {len(finite)} results, {'all finite' if all(finite) else 'NOT FINITE'}", flush=True)
        wrong += [name] * (not all(finite))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
