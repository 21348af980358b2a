"""The solvers that are compared: ecgot, what one writes in torch, POT, geomloss and flash-sinkhorn.

Each takes points x [B, N, D] and y [B, M, D], the case and a number of iterations.
"""

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ecgot.bench.cases import Case, PairsCase
from ecgot.kernels import sinkhorn, sinkhorn_pairwise

OURS = "ecgot"
WITHOUT_NUMBA = "ecgot_torch"  # what serves where numba does not
MAX_LOOPED = 64  # problems given to a solver that loops over them in Python

# Values [B] with a graph to the points, and the plan [B, N, M], which only the check asks for.
Solution = tuple[Tensor, Callable[[], Tensor]]
Solver = Callable[[Tensor, Tensor, Case, int], Solution]


@dataclass(frozen=True)
class Provider:
    """A solver and how to measure it.

    Args:
        package: module that must be installed.
        counter: solver that does the same iterations and finds sooner how many are needed; default: its own.
        is_graph: it takes its memory once, when the graph is recorded, not during a call.
        stops: by itself, at the tolerance.
        hidden: a module that its process cannot import.
    """

    package: str
    solve: Solver
    counter: Solver | None = None
    is_graph: bool = False
    stops: bool = False
    hidden: str = ""


def solve_ecgot(x: Tensor, y: Tensor, case: Case, _steps: int) -> Solution:
    """To the tolerance; the number of iterations is its own."""
    out = sinkhorn(x, y, eps=case.eps, tol=case.tol)
    return out.value, out.plan


def solve_torch(x: Tensor, y: Tensor, case: Case, steps: int) -> Solution:
    """What one writes without a library; autograd goes through all iterations."""
    exponent = -_cost(x, y) / case.eps
    log_n, log_m = math.log(x.shape[1]), math.log(y.shape[1])
    f, g = torch.zeros_like(x[:, :, 0]), torch.zeros_like(y[:, :, 0])
    for _ in range(steps):
        f = log_m - torch.logsumexp(exponent + g[:, None, :], dim=2)
        g = log_n - torch.logsumexp(exponent + f[:, :, None], dim=1)
    return case.eps * (f.mean(1) + g.mean(1)), lambda: _plan(exponent, f, g)


def _cost(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances [B, N, M]."""
    return x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None, :] - 2 * x @ y.mT


def _plan(exponent: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """The plan of uniform weights; exponent and potentials in units of eps."""
    return torch.exp(exponent + f[:, :, None] + g[:, None, :]) / (f.shape[1] * g.shape[1])


# --- libraries ----------------------------------------------------------------------------------------------


def _pot(method: str) -> Solver:
    def solve(x: Tensor, y: Tensor, case: Case, steps: int) -> Solution:
        batch = importlib.import_module("ot.batch")
        out = batch.solve_sample_batch(
            x, y, case.eps, method=method, max_iter=steps, tol=0.0, reg_type="kl", grad="envelope"
        )
        return out.value, lambda: out.plan

    return solve


def _geomloss(x: Tensor, y: Tensor, case: Case, steps: int) -> Solution:
    # geomloss has half the squared distance as its cost and eps = blur**2: half the eps, half the value.
    # It anneals eps from diameter**2 down to blur**2, a factor scaling**2 a step. A descent that hardly moves
    # from blur**2 reaches the tolerance in tens of steps; one from the true diameter would take thousands.
    blur, scaling = math.sqrt(case.eps / 2), 1 - 1e-6
    settings = {"p": 2, "blur": blur, "scaling": scaling, "diameter": blur * scaling ** (0.5 - steps)}
    samples_loss = importlib.import_module("geomloss").SamplesLoss
    value = 2 * samples_loss("sinkhorn", debias=False, backend="tensorized", **settings)(x, y)

    def plan() -> Tensor:
        f, g = samples_loss("sinkhorn", debias=False, backend="tensorized", potentials=True, **settings)(x, y)
        return _plan(-_cost(x, y) / case.eps, 2 * f / case.eps, 2 * g / case.eps)

    return value, plan


def _flash_sinkhorn(x: Tensor, y: Tensor, case: Case, steps: int) -> Solution:
    if len(x) > MAX_LOOPED:
        raise RuntimeError(f"loops over problems in Python: expected at most {MAX_LOOPED}, got {len(x)}")
    samples_loss = importlib.import_module("flash_sinkhorn").SamplesLoss
    settings = {"backend": "alternating", "use_epsilon_scaling": False, "allow_tf32": False}
    settings |= {"eps": case.eps, "n_iters": steps}

    def plan() -> Tensor:
        f, g = samples_loss(potentials=True, **settings)(x.detach(), y.detach())
        return _plan(-_cost(x, y).detach() / case.eps, f / case.eps, g / case.eps)

    return samples_loss(**settings)(x, y), plan


# --- torch in a CUDA graph ----------------------------------------------------------------------------------


def solve_torch_graph(x: Tensor, y: Tensor, case: Case, steps: int) -> Solution:
    """The best that one writes by hand: the same iterations without autograd, compiled, with gradients by the
    envelope theorem, all of it in one CUDA graph."""
    solve = _graph(x.shape, y.shape, case, steps, x.device)
    value, plan = _Replay.apply(x, y, solve)
    return value, lambda: plan


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, solve: Callable[..., tuple[Tensor, ...]]) -> Any:
        value, plan, grad_x, grad_y = solve(x, y)
        ctx.save_for_backward(grad_x, grad_y)
        ctx.mark_non_differentiable(plan)
        ctx.set_materialize_grads(False)  # else backward fills the plan's gradient with zeros
        return value.clone(), plan

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        return *(grad[:, None, None] * each for each in ctx.saved_tensors), None


@functools.lru_cache(maxsize=1)  # a graph keeps its memory
def _graph(
    shape_x: torch.Size, shape_y: torch.Size, case: Case, steps: int, device: torch.device
) -> Callable[..., tuple[Tensor, ...]]:
    """x, y to values, plan and gradients, recorded once and replayed; each replay overwrites its results."""
    x, y = torch.empty(shape_x, device=device), torch.empty(shape_y, device=device)
    torch.compiler.reset()  # torch compiles a function for only a few shapes
    compiled = torch.compile(half_step, dynamic=False)

    def solve() -> tuple[Tensor, ...]:
        return solve_by_envelope(x, y, case, steps, compiled)

    x.normal_(), y.normal_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, which recording must not
        solve()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = solve()

    def replay(new_x: Tensor, new_y: Tensor) -> tuple[Tensor, ...]:
        x.copy_(new_x)
        y.copy_(new_y)
        graph.replay()
        return found

    return replay


def half_step(exponent: Tensor, potential: Tensor, log_count: float, dim: int) -> Tensor:
    """A potential in units of eps from the other, which runs over ``dim`` of the exponent [B, N, M]."""
    return log_count - torch.logsumexp(exponent + potential.unsqueeze(3 - dim), dim=dim)


@torch.no_grad()
def solve_by_envelope(
    x: Tensor,
    y: Tensor,
    case: Case,
    steps: int,
    step: Callable[..., Tensor] = half_step,
    gradients: bool = True,
) -> tuple[Tensor, ...]:
    """Values [B], plan [B, N, M], and the gradients of the values in x and y with the plan held fixed.

    Args:
        step: :func:`half_step`, or what it was compiled to.
        gradients: without them the values alone.
    """
    exponent = -_cost(x, y) / case.eps
    log_n, log_m = math.log(x.shape[1]), math.log(y.shape[1])
    g = torch.zeros_like(y[:, :, 0])
    for _ in range(steps):
        f = step(exponent, g, log_m, 2)
        g = step(exponent, f, log_n, 1)
    value = case.eps * (f.mean(1) + g.mean(1))
    if not gradients:
        return (value,)
    plan = _plan(exponent, f, g)
    grad_x = 2 * (plan.sum(2)[:, :, None] * x - plan @ y)
    grad_y = 2 * (plan.sum(1)[:, :, None] * y - plan.mT @ x)
    return value, plan, grad_x, grad_y


# --- who runs where -----------------------------------------------------------------------------------------

PROVIDERS = {
    OURS: Provider("ecgot", solve_ecgot, stops=True),
    WITHOUT_NUMBA: Provider("ecgot", solve_ecgot, stops=True, hidden="numba"),
    "torch": Provider("torch", solve_torch),
    "pot_log": Provider("ot", _pot("log_sinkhorn")),
    "pot_scaling": Provider("ot", _pot("sinkhorn")),
    "geomloss": Provider("geomloss", _geomloss),
}
GPU_PROVIDERS = {
    "torch_graph": Provider("torch", solve_torch_graph, counter=solve_torch, is_graph=True),
    "flash_sinkhorn": Provider("flash_sinkhorn", _flash_sinkhorn, counter=solve_torch),
}


def providers(device: torch.device) -> dict[str, Provider]:
    """The providers that run on a device, by name."""
    if device.type != "cuda":
        return PROVIDERS
    return {name: each for name, each in PROVIDERS.items() if name != WITHOUT_NUMBA} | GPU_PROVIDERS


# --- all pairs: x [B, N, D], y [K, M, D] to values [B, K] ---------------------------------------------------


def pairs_ecgot(x: Tensor, y: Tensor, case: PairsCase) -> Tensor:
    """The pairwise solver, whose memory does not hold B x K plans."""
    return sinkhorn_pairwise(x, y, eps=case.eps, cost="cosine", max_iter=case.iterations, tol=0)


def pairs_torch(x: Tensor, y: Tensor, case: PairsCase) -> Tensor:
    """Similarity tensor, scaling by matrix products, autograd through the similarity (envelope theorem)."""
    similarity = torch.einsum("bnd,kmd->bknm", x, y)
    with torch.no_grad():
        kernel = torch.exp((similarity - 1) / case.eps)
        u = torch.ones_like(kernel[..., :1])
        v = torch.ones_like(kernel[..., :1, :]).mT
        for _ in range(case.iterations):
            u = 1 / (kernel @ (v / case.m))
            v = 1 / (kernel.mT @ (u / case.n))
        plan = kernel * u * v.mT
        entropy = case.eps * (plan * plan.clamp_min(1e-30).log()).mean((2, 3))
        plan = plan / (case.n * case.m)
    return (plan * (1 - similarity)).sum((2, 3)) + entropy


@dataclass(frozen=True)
class PairsProvider:
    """A solver of all pairs; ``hidden`` as in :class:`Provider`."""

    solve: Callable[[Tensor, Tensor, PairsCase], Tensor]
    hidden: str = ""


PAIRS = {
    OURS: PairsProvider(pairs_ecgot),
    WITHOUT_NUMBA: PairsProvider(pairs_ecgot, hidden="numba"),
    "torch": PairsProvider(pairs_torch),
}
