"""Versions, and every family of kernels where D (or the channels) fill no tile, against fp64.

Where the inner dimension of a product is shorter than its block, compilers have gone wrong before.
"""

import functools
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from shutil import which

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.first_contact import truth
from benchmarks.first_contact.items import Item, Row, checked, compared, relative
from benchmarks.first_contact.sizes import Sizes
from ecgot.bench.providers import OURS
from ecgot.kernels import conv1d, sinkhorn, sinkhorn_pairwise

# eps and iterations; converged, where all ways to write the value and the gradient agree
SPREAD, CLUSTERS = (2.0, 20), (0.1, 100)
# Relative to the norm: of values, of gradients. Rounding a gradient to bf16 costs up to 1.9e-3 of its norm.
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-3, 5e-3)}
# Of the gradient where clouds are clusters, in which rounding the plan shows most.
CLUSTERED_TOLERANCE = 2e-3
CONVOLUTION = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SHAPES = {"on chip": (3, 37, 21), "streaming": (1, 300, 280)}  # B, N, M
COSTS = ("sqeuclidean", "cosine")


def _costs(d: int) -> tuple[str, ...]:
    return COSTS if d > 1 else COSTS[:1]  # the angle of a number has no gradient


def items(sizes: Sizes, _out: Path) -> list[Item]:
    """The versions, then a family of kernels and a D each; those that are likeliest to be wrong first."""
    found = [Item("versions", functools.partial(versions, sizes), 30)]
    for d in sizes.small_d:
        for kind in SHAPES:
            found.append(Item(f"{kind} D={d}", functools.partial(_solver, kind, d, sizes)))
        found.append(Item(f"pairs D={d}", functools.partial(_pairs, d, sizes)))
        found.append(Item(f"convolution C={d}", functools.partial(_convolution, d, sizes)))
    found.append(Item("clustered clouds", functools.partial(_clustered, sizes)))
    return found


def versions(sizes: Sizes) -> Iterator[Row]:
    """What this machine is, one row each: not measured, but what measurements depend on."""
    told = {"python": platform.python_version(), "CUDA of torch": torch.version.cuda}
    for tool in ("ncu", "compute-sanitizer", "nvidia-smi"):
        told[tool] = which(tool) or "not installed"
    if sizes.device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        told["multiprocessors"] = str(properties.multi_processor_count)
        told["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        told["capability"] = f"{properties.major}.{properties.minor}"
        told["cudnn"] = str(torch.backends.cudnn.version())
    if which("nvidia-smi"):
        query = "driver_version,clocks.sm,clocks.max.sm,clocks.max.mem,power.limit"
        told[query] = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    yield from ({"case": name, "provider": "machine", "note": value} for name, value in told.items())


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return (done.stdout or done.stderr).strip()


# --- transport ----------------------------------------------------------------------------------------------


def _dtypes(sizes: Sizes) -> tuple[torch.dtype, ...]:
    return (torch.float32,) if sizes.dtype == torch.float32 else (torch.float32, sizes.dtype)


def _cloud(sizes: Sizes, batch: int, count: int, d: int) -> Tensor:
    generator = torch.Generator().manual_seed(count + d)
    return torch.randn(batch, count, d, generator=generator).div_(d**0.5).to(sizes.device)


def _solver(kind: str, d: int, sizes: Sizes) -> Iterator[Row]:
    batch, n, m = SHAPES[kind]
    clouds = _cloud(sizes, batch, n, d), _cloud(sizes, batch, m, d)
    for dtype in _dtypes(sizes):
        for cost in _costs(d):
            yield _solved(clouds, dtype, cost, f"{kind} D={d}", TOLERANCE[dtype])


def _solved(
    clouds: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    cost: str,
    case: str,
    tolerance: tuple[float, float],
    schedule: tuple[float, int] = SPREAD,
) -> Row:
    """A batch of problems solved, and how wrong values and gradients are."""
    eps, iterations = schedule
    x, y = (each.to(dtype).requires_grad_() for each in clouds)
    expected = truth.value_and_gradients(x, y, eps, iterations, cost)
    found = sinkhorn(x, y, eps=eps, cost=cost, max_iter=iterations, tol=0.0)
    grads = torch.autograd.grad(found.value.sum(), (x, y))
    errors = compared((found.value, *grads), expected, tolerance)
    return _case(case, dtype, cost) | {"note": found.backend} | checked(errors)


def _pairs(d: int, sizes: Sizes) -> Iterator[Row]:
    for dtype in _dtypes(sizes):
        for cost in _costs(d):
            x, y = (_cloud(sizes, *shape, d).to(dtype).requires_grad_() for shape in ((4, 33), (3, 20)))
            expected = truth.value_and_gradients(x[:, None], y[None], *SPREAD, cost)
            value = sinkhorn_pairwise(x, y, eps=SPREAD[0], cost=cost, max_iter=SPREAD[1], tol=0.0)
            grads = torch.autograd.grad(value.sum(), (x, y))
            wanted = expected[0], expected[1][:, 0], expected[2][0]
            errors = compared((value, *grads), wanted, TOLERANCE[dtype])
            yield _case(f"pairs D={d}", dtype, cost) | checked(errors)


def _clustered(sizes: Sizes) -> Iterator[Row]:
    """Points in few tight clusters, whose gradient is a difference of near equals."""
    centres = _cloud(sizes, 3, 4, 64)
    x = centres[:, torch.arange(64) % 4] + 0.05 * _cloud(sizes, 3, 64, 64)
    y = centres[:, torch.arange(48) % 4] + 0.05 * _cloud(sizes, 3, 48, 64)
    for cost in (*COSTS, "dot"):
        tolerance = TOLERANCE[sizes.dtype][0], CLUSTERED_TOLERANCE
        yield _solved((x, y), sizes.dtype, cost, "clustered clouds", tolerance, CLUSTERS)


def _case(case: str, dtype: torch.dtype, cost: str = "") -> Row:
    return {"case": f"{case} {str(dtype).removeprefix('torch.')} {cost}".strip(), "provider": OURS}


# --- convolutions -------------------------------------------------------------------------------------------


def _convolution(channels: int, sizes: Sizes) -> Iterator[Row]:
    """So many channels on either side, with ReLU; values and gradients."""
    backend = "triton" if sizes.kernels else "torch"
    for dtype in _dtypes(sizes):
        for c_in, c_out in ((channels, 24), (24, channels)):
            x = _cloud(sizes, 3, 45, c_in).to(dtype).requires_grad_()
            weight = _cloud(sizes, c_out, c_in, 5).to(dtype).requires_grad_()
            y = conv1d(x, weight, padding=2, activation="relu", backend=backend)
            cotangent = _cloud(sizes, *y.shape)
            grads = torch.autograd.grad(y, (x, weight), cotangent.to(y.dtype))
            leaves = [each.detach().double().requires_grad_() for each in (x, weight)]
            exact = F.conv1d(leaves[0].mT, leaves[1], padding=2).relu().mT
            wanted = torch.autograd.grad(exact, leaves, cotangent.to(y.dtype).double())
            errors = {
                name: (relative(each, expected), CONVOLUTION[dtype])
                for name, each, expected in zip(
                    ("y", "grad x", "grad weight"), (y, *grads), (exact.detach(), *wanted), strict=True
                )
            }
            yield _case(f"convolution {c_in} to {c_out}", dtype) | {"note": backend} | checked(errors)
