"""Entropic transport between batches of unit vectors, value and gradients: ecgot and its peers.

Equal work means equal marginal error (L1, the larger of the two sides, of the worst problem of the batch),
not equal iterations. ecgot runs to ``tol=TOL`` and pays for its own stopping test. A peer is told, for
nothing, the least number of iterations with which its marginal error is at most TOL too. Values and gradients
are then checked against ``ecgot.kernels.reference``, solved in fp64 to a far smaller error.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.conftest import OURS, Gate, Measure
from ecgot.kernels import reference, sinkhorn

EPS = 0.1
TOL = 1e-4  # marginal error of everyone
ROUNDING = 1.05  # a marginal computed anew in fp64 may exceed the one that the solver saw
VALUE_TOLERANCE = 1e-5  # relative; second order in TOL, and a few fp32 roundings
GRADIENT_TOLERANCE = 1e-3  # relative to the largest entry; the plan itself is only good to TOL
MOST_STEPS = 200

CASES = [(64, 16, 32, 256), (64, 64, 32, 128), (32, 250, 64, 384)]  # B, N, M, D
if torch.cuda.is_available():
    CASES += [(64, 128, 128, 256), (256, 128, 128, 256), (1024, 32, 32, 256), (256, 250, 64, 384)]

# Values [B] with a graph to the points, and the plan [B, N, M], which only the gate asks for.
Solution = tuple[Tensor, Callable[[], Tensor]]


# --- providers: points x [B, N, D], y [B, M, D] and a number of steps to a Solution -------------------------


def _ecgot(x: Tensor, y: Tensor, _steps: int) -> Solution:
    out = sinkhorn(x, y, eps=EPS, tol=TOL)
    return out.value, out.plan


def _pot(method: str) -> Callable[[Tensor, Tensor, int], Solution]:
    def solve(x: Tensor, y: Tensor, steps: int) -> Solution:
        batch = pytest.importorskip("ot.batch")
        out = batch.solve_sample_batch(
            x, y, EPS, method=method, max_iter=steps, tol=0.0, reg_type="kl", grad="envelope"
        )
        return out.value, lambda: out.plan

    return solve


def _geomloss(x: Tensor, y: Tensor, steps: int) -> Solution:
    # geomloss has half the squared distance as its cost and eps = blur**2: half the eps, half the value.
    # It anneals eps from diameter**2 down to blur**2, a factor scaling**2 a step. A descent that hardly moves
    # from blur**2 reaches TOL in tens of steps; one from the true diameter would take thousands.
    blur, scaling = math.sqrt(EPS / 2), 1 - 1e-6
    settings = {"p": 2, "blur": blur, "scaling": scaling, "diameter": blur * scaling ** (0.5 - steps)}
    samples_loss = pytest.importorskip("geomloss").SamplesLoss
    value = 2 * samples_loss("sinkhorn", debias=False, backend="tensorized", **settings)(x, y)

    def plan() -> Tensor:
        f, g = samples_loss("sinkhorn", debias=False, backend="tensorized", potentials=True, **settings)(x, y)
        return _plan(-_cost(x, y) / EPS, 2 * f / EPS, 2 * g / EPS)

    return value, plan


def _torch(x: Tensor, y: Tensor, steps: int) -> Solution:
    """What one writes without a library; autograd goes through all iterations."""
    exponent = -_cost(x, y) / EPS
    log_n, log_m = math.log(x.shape[1]), math.log(y.shape[1])
    g = torch.zeros_like(y[:, :, 0])
    for _ in range(steps):
        f = log_m - torch.logsumexp(exponent + g[:, None, :], dim=2)
        g = log_n - torch.logsumexp(exponent + f[:, :, None], dim=1)
    return EPS * (f.mean(1) + g.mean(1)), lambda: _plan(exponent, f, g)


def _cost(x: Tensor, y: Tensor) -> Tensor:
    return x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None, :] - 2 * x @ y.mT


def _plan(exponent: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """The plan of uniform weights; exponent and potentials in units of eps."""
    return torch.exp(exponent + f[:, :, None] + g[:, None, :]) / (f.shape[1] * g.shape[1])


SOLVERS: dict[str, Callable[[Tensor, Tensor, int], Solution]] = {
    OURS: _ecgot,
    "torch": _torch,
    "pot_log": _pot("log_sinkhorn"),
    "pot_scaling": _pot("sinkhorn"),
    "geomloss": _geomloss,
}


# --- problems and their fp64 solution -----------------------------------------------------------------------


@dataclass
class Problem:
    """Points, and the value [B] and gradients that a solver should find."""

    case: str
    x: Tensor
    y: Tensor
    value: Tensor
    grads: tuple[Tensor, Tensor]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "x".join(map(str, case)))
def problem(request: pytest.FixtureRequest, device: torch.device) -> Problem:
    batch, n, m, width = request.param
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(batch, n, width, generator=generator), dim=2).to(device)
    y = F.normalize(torch.randn(batch, m, width, generator=generator), dim=2).to(device)
    solutions = reference.sinkhorn(x, y, eps=EPS)
    grads = [_gradient(*points) for points in zip(x.double(), y.double(), solutions, strict=True)]
    return Problem(
        case=f"B={batch} N={n} M={m} D={width}",
        x=x.requires_grad_(),
        y=y.requires_grad_(),
        value=torch.stack([solution.value for solution in solutions]),
        grads=(torch.stack([grad for grad, _ in grads]), torch.stack([grad for _, grad in grads])),
    )


def _gradient(x: Tensor, y: Tensor, solution: reference.ReferenceSolution) -> tuple[Tensor, ...]:
    """Of one problem's value: its derivative in the cost is the plan."""
    x, y = x.requires_grad_(), y.requires_grad_()
    return torch.autograd.grad((solution.plan * reference.cost_matrix(x, y, "sqeuclidean")).sum(), (x, y))


# --- benchmark ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", SOLVERS)
def test_sinkhorn(provider: str, problem: Problem, gate: Gate, measure: Measure) -> None:
    solve = SOLVERS[provider]
    steps = _least_steps(provider, problem, gate)

    def forward_backward() -> tuple[Tensor, tuple[Tensor, ...]]:
        value, _ = solve(problem.x, problem.y, steps)
        return value, torch.autograd.grad(value.sum(), (problem.x, problem.y))

    value, grads = forward_backward()
    errors = {
        "value": (_relative_error(value, problem.value), VALUE_TOLERANCE),
        "gradient": (max(map(_relative_error, grads, problem.grads)), GRADIENT_TOLERANCE),
    }
    measure(forward_backward, provider=provider, case=problem.case, errors=errors)


@torch.no_grad()
def _least_steps(provider: str, problem: Problem, gate: Gate) -> int:
    """The number of iterations with which a peer reaches TOL; ecgot finds its own."""
    error = math.nan
    for steps in (0,) if provider == OURS else itertools.chain(range(1, 50), range(50, MOST_STEPS + 1, 10)):
        try:
            error = _marginal_error(SOLVERS[provider](problem.x, problem.y, steps)[1]())
        except RuntimeError as reason:  # such as tensors on two devices
            if provider == OURS:
                raise
            pytest.skip(f"{provider} is not timed: {reason}")
        if error <= ROUNDING * TOL:
            return steps
    gate(provider, {"marginal": (error, ROUNDING * TOL)})
    raise AssertionError("the gate lets no such error pass")


def _marginal_error(plan: Tensor) -> float:
    plan = plan.double()
    _, n, m = plan.shape
    rows, columns = (plan.sum(2) - 1 / n).abs().sum(1), (plan.sum(1) - 1 / m).abs().sum(1)
    return torch.maximum(rows, columns).max().item()


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()
