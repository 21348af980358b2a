"""One problem too large for the chip, to the same marginal error, against flash-sinkhorn and torch.

ecgot stops by itself; in a CUDA graph ("_graph") it is told how many iterations to make, as its peers always
are. Products are true fp32, or TF32 where a name says so: right only if the marginal error still holds.
flash-sinkhorn tunes itself over 8 of its 44 tiles, see ``bound_tuning``. "torch_graph" is a compiled loop
over the whole matrix of costs. The truth is solved in fp64 in chunks of rows.
"""

import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.first_contact import truth
from benchmarks.first_contact.items import Item, Row, checked, peak_mb, recorded, relative, timed
from benchmarks.first_contact.sizes import Sizes
from ecgot.bench.cases import points
from ecgot.bench.measure import ROUNDING
from ecgot.bench.providers import OURS, half_step, solve_by_envelope
from ecgot.kernels import sinkhorn

FLASH = "flash_sinkhorn"
# Relative to the norm. At a marginal error of tol the value is exact to second order, the gradient to first.
VALUE_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 2e-2
TILES, BLOCK_K = ((128, 128), (128, 64), (64, 128)), 32  # BLOCK_M, BLOCK_N that flash-sinkhorn is tuned over
TUNED = 8  # of its tiles
MORE_ITERATIONS = 4  # that a peer may need beyond those of the fp64 loop
PROVIDERS = (
    OURS,
    FLASH,
    f"{FLASH}_tf32",
    f"{OURS}_tf32",
    f"{OURS}_graph",
    f"{FLASH}_graph",
    f"{FLASH}_tf32_graph",
    "torch_graph",
)
Results = tuple[Tensor, ...]  # values, and gradients in x and y where they are asked for


@dataclass(frozen=True)
class Solver:
    """solve(n) is what is timed, with n iterations; marginal(n) its plan's error. Ours may choose n."""

    solve: Callable[[int], Results]
    marginal: Callable[[int], float]


def items(sizes: Sizes, _out: Path) -> list[Item]:
    """With gradients and forward alone, each provider for itself."""
    return [
        Item(f"streaming {what} {provider}", functools.partial(streamed, provider, what == "gradient", sizes))
        for what in ("gradient", "forward")
        for provider in PROVIDERS
    ]


@functools.lru_cache(maxsize=1)
def _truth(sizes: Sizes) -> truth.Streamed:
    (x,), (y,) = points(sizes.streamed, sizes.device)
    return truth.streamed(x, y, sizes.streamed.eps, sizes.streamed.tol)


def streamed(provider: str, gradients: bool, sizes: Sizes) -> Iterator[Row]:
    """Check and time one provider; a peer gets the fewest iterations that hold the marginal error."""
    case = sizes.streamed
    row: Row = {"case": f"{case} fp32", "provider": provider}
    if provider.startswith(FLASH) and importlib.util.find_spec(FLASH) is None:
        yield row | {"refused": f"{FLASH} is not installed"}
        return
    x, y = (each.detach().requires_grad_(gradients) for each in points(case, sizes.device))
    exact = _truth(sizes)
    solver = _solver(provider, x, y, sizes)
    steps, limit = exact.iterations, ROUNDING[0] * case.tol + ROUNDING[1]
    while (marginal := solver.marginal(steps)) > limit and steps < exact.iterations + MORE_ITERATIONS:
        steps += 1
    graph = provider.endswith("_graph")
    solve = functools.partial(solver.solve, steps)
    call, found = recorded(solve, sizes.device) if graph else (solve, solve())
    peak = None if graph else peak_mb(solve, sizes.device)
    row |= {"iterations": steps, "marginal_error": marginal, "peak_mb": peak}
    row |= checked({"marginal": (marginal, limit)} | _errors(found, exact))
    yield row if "refused" in row else row | timed(call, sizes, graph=graph)


def _errors(found: Results, exact: truth.Streamed) -> dict[str, tuple[float, float]]:
    errors = {"value": (relative(found[0].flatten(), exact.value[None]), VALUE_TOLERANCE)}
    for name, each, wanted in zip(
        ("grad x", "grad y"), found[1:], (exact.grad_x, exact.grad_y), strict=False
    ):
        errors[name] = relative(each.view_as(wanted), wanted), GRADIENT_TOLERANCE
    return errors


# --- providers ----------------------------------------------------------------------------------------------


def _solver(provider: str, x: Tensor, y: Tensor, sizes: Sizes) -> Solver:
    if provider.startswith(OURS):
        return _ours(provider, x, y, sizes)
    return _flash(provider, x, y, sizes) if provider.startswith(FLASH) else _loop(x, y, sizes)


def _with_gradients(value: Tensor, x: Tensor, y: Tensor) -> Results:
    return (value, *torch.autograd.grad(value.sum(), (x, y))) if x.requires_grad else (value,)


def _marginal(x: Tensor, y: Tensor, f: Tensor, g: Tensor, sizes: Sizes) -> float:
    return truth.marginal_error(x[0], y[0], f.detach().flatten(), g.detach().flatten(), sizes.streamed.eps)


def _ours(provider: str, x: Tensor, y: Tensor, sizes: Sizes) -> Solver:
    case = sizes.streamed
    options: dict[str, Any] = {"eps": case.eps, "precision": "tf32" if "_tf32" in provider else "fp32"}

    def solved(steps: int, x: Tensor = x, y: Tensor = y) -> Any:
        if provider.endswith("_graph"):
            return sinkhorn(x, y, max_iter=steps, tol=0.0, **options)
        return sinkhorn(x, y, tol=case.tol, **options)

    def marginal(steps: int) -> float:
        out = solved(steps, x.detach(), y.detach())
        return _marginal(x, y, out.f, out.g, sizes)

    return Solver(lambda steps: _with_gradients(solved(steps).value, x, y), marginal)


def _flash(provider: str, x: Tensor, y: Tensor, sizes: Sizes) -> Solver:
    bound_tuning()
    samples_loss = importlib.import_module(FLASH).SamplesLoss
    settings = {"backend": "alternating", "use_epsilon_scaling": False, "eps": sizes.streamed.eps}
    settings |= {"allow_tf32": "_tf32" in provider}

    def marginal(steps: int) -> float:
        f, g = samples_loss(potentials=True, n_iters=steps, **settings)(x[0].detach(), y[0].detach())
        return _marginal(x, y, f, g, sizes)

    def solve(steps: int) -> Results:
        return _with_gradients(samples_loss(n_iters=steps, **settings)(x[0], y[0]), x, y)

    return Solver(solve, marginal)


def bound_tuning() -> None:
    """Leave each of flash-sinkhorn's tuners a handful of tiles: 44 for each kernel take minutes."""
    from triton.runtime.autotuner import Autotuner

    folder = importlib.import_module(f"{FLASH}.kernels")
    for found in pkgutil.iter_modules(folder.__path__):
        module = importlib.import_module(f"{FLASH}.kernels.{found.name}")
        for tuner in vars(module).values():
            if isinstance(tuner, Autotuner):
                # The likely ones first; the sort keeps the order of the others, which come next.
                tuner.configs = sorted(tuner.configs, key=lambda each: not likely(each.kwargs))[:TUNED]


def likely(tile: dict[str, int]) -> bool:
    """Whether a tile of flash-sinkhorn's is one of those it is tuned over."""
    return (tile.get("BLOCK_M"), tile.get("BLOCK_N")) in TILES and tile.get("BLOCK_K") == BLOCK_K


def _loop(x: Tensor, y: Tensor, sizes: Sizes) -> Solver:
    compiled = torch.compile(half_step, dynamic=False, backend=sizes.inductor)

    def run(steps: int, gradients: bool) -> Results:
        return solve_by_envelope(x.detach(), y.detach(), sizes.streamed, steps, compiled, gradients=gradients)

    def marginal(steps: int) -> float:
        plan = run(steps, True)[1].double()
        return max((plan.sum(dim) - 1 / plan.shape[3 - dim]).abs().sum().item() for dim in (1, 2))

    def solve(steps: int) -> Results:
        value, *rest = run(steps, x.requires_grad)
        return (value, *rest[1:])

    return Solver(solve, marginal)
