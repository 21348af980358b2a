"""Check a provider against fp64: only what is right is timed."""

import importlib.util
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ecgot.bench.cases import Case, Measurement, PairsCase, points
from ecgot.bench.providers import PAIRS, Provider, Solver, providers
from ecgot.bench.stopwatch import Call
from ecgot.kernels.ot import reference

# A marginal computed anew may exceed the one the solver saw: by a factor, and a summand of fp32 rounding.
ROUNDING = 1.05, 3e-6
# A marginal error of tol may sit in one point of N, whose gradient then is wrong by N tol of itself.
GRADIENT_TOLERANCE = 0.5
PAIRS_TOLERANCE = {torch.float32: 2e-2, torch.bfloat16: 5e-2}
MAX_STEPS = 400
# Values, and with them the gradients in x and y where they are checked.
Truth = tuple[Tensor, ...]


def checked(
    name: str, case: Case | PairsCase, device: torch.device, exact: Truth
) -> tuple[Measurement, Call | None]:
    """A provider's errors on a case, and the call to time: forward and backward; None where it is refused."""
    exact = tuple(each.to(device) for each in exact)
    try:
        if isinstance(case, PairsCase):
            return _checked_pairs(name, case, device, exact)
        provider = providers(device)[name]
        if importlib.util.find_spec(provider.package) is None:
            return Measurement(str(case), name, f"{provider.package} is not installed"), None
        x, y = points(case, device)
        check = _Check(case, x, y, exact[0], (exact[1], exact[2]))
        row = check.run(name, provider)
    except (RuntimeError, MemoryError) as reason:  # such as tensors on two devices, or out of memory
        return Measurement(str(case), name, str(reason).partition("\n")[0]), None
    return row, None if row.refused else check.call(provider.solve, row.steps or 0)


def _checked_pairs(
    name: str, case: PairsCase, device: torch.device, exact: Truth
) -> tuple[Measurement, Call | None]:
    """The check covers 4 x 4 of the pairs."""
    x, y = points(case, device)

    def forward_backward() -> Tensor:
        value = PAIRS[name].solve(x, y, case)
        torch.autograd.grad(value.sum(), (x, y))
        return value.detach()

    # Away from convergence the two objectives differ by the marginals' error times the potentials.
    error = _relative_error(forward_backward()[:4, :4].double(), exact[0])
    tolerance = PAIRS_TOLERANCE[case.dtype]
    refused = "" if error <= tolerance else f"value error {error:.1e} > {tolerance:.0e}"
    row = Measurement(str(case), name, refused, case.iterations, error)
    return row, None if refused else forward_backward


# --- the truth ----------------------------------------------------------------------------------------------


def truth(case: Case | PairsCase, device: torch.device) -> Truth:
    """What :func:`checked` compares with, in fp64."""
    x, y = (each.detach() for each in points(case, device))
    return (_exact_pairs(x[:4], y[:4], case),) if isinstance(case, PairsCase) else _exact(x, y, case)


def _exact(x: Tensor, y: Tensor, case: Case) -> Truth:
    """Values [B] and gradients [B, N, D], [B, M, D] in fp64, solved a problem at a time."""
    values, grads_x, grads_y = [], [], []
    for a, b in zip(x.double(), y.double(), strict=True):
        (solution,) = reference.sinkhorn(a[None], b[None], eps=case.eps, tol=case.tol * 1e-3)
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        cost = (solution.plan * reference.cost_matrix(a, b, "sqeuclidean")).sum()
        grad_a, grad_b = torch.autograd.grad(cost, (a, b))
        values.append(solution.value)
        grads_x.append(grad_a)
        grads_y.append(grad_b)
    return torch.stack(values), torch.stack(grads_x), torch.stack(grads_y)


def _exact_pairs(x: Tensor, y: Tensor, case: PairsCase) -> Tensor:
    """Values [len(x), len(y)] in fp64."""

    def value(a: Tensor, b: Tensor) -> Tensor:
        (solution,) = reference.sinkhorn(
            a[None], b[None], eps=case.eps, cost="cosine", max_iter=case.iterations, tol=0.0
        )
        return solution.value

    return torch.stack([torch.stack([value(a, b) for b in y]) for a in x])


# --- the check ----------------------------------------------------------------------------------------------


class _Check:
    """Errors of providers on one case, against its values [B] and gradients in fp64."""

    def __init__(self, case: Case, x: Tensor, y: Tensor, value: Tensor, grads: tuple[Tensor, Tensor]) -> None:
        self.case, self.x, self.y, self.value, self.grads = case, x, y, value, grads
        self.marginal_tolerance = ROUNDING[0] * case.tol + ROUNDING[1]

    def call(self, solve: Solver, steps: int) -> Callable[[], tuple[Tensor, tuple[Tensor, ...]]]:
        """What is timed: a solve and its gradients."""

        def forward_backward() -> tuple[Tensor, tuple[Tensor, ...]]:
            found, _ = solve(self.x, self.y, self.case, steps)
            return found.detach(), torch.autograd.grad(found.sum(), (self.x, self.y))

        return forward_backward

    def run(self, name: str, provider: Provider) -> Measurement:
        """The provider's errors; refused where one is too large."""
        case = self.case
        steps, marginal = self._least_steps(provider)
        if provider.counter:
            marginal = self._marginal_error(provider.solve, steps)
        found, found_grads = self.call(provider.solve, steps)()
        value_error = _relative_error(found, self.value)
        gradient_error = max(map(_relative_error, found_grads, self.grads))
        limits = {
            "marginal": (marginal, self.marginal_tolerance),
            "value": (value_error, max(1e-5, case.tol)),  # second order in tol, and a few roundings of fp32
            "gradient": (gradient_error, max(1e-4, GRADIENT_TOLERANCE * max(case.n, case.m) * case.tol)),
        }
        wrong = [
            f"{what} error {error:.1e} > {most:.1e}"
            for what, (error, most) in limits.items()
            if not error <= most  # NaN is wrong as well
        ]
        shown = None if provider.stops else steps
        return Measurement(str(case), name, ", ".join(wrong), shown, value_error, gradient_error, marginal)

    @torch.no_grad()
    def _least_steps(self, provider: Provider) -> tuple[int, float]:
        """The fewest iterations that bring a peer to the tolerance, and its error; ecgot stops by itself."""
        error, solve = math.nan, provider.counter or provider.solve
        for steps in (0,) if provider.stops else itertools.chain(range(1, 50), range(50, MAX_STEPS + 1, 10)):
            error = self._marginal_error(solve, steps)
            if error <= self.marginal_tolerance:
                break
        return steps, error

    def _marginal_error(self, solve: Solver, steps: int) -> float:
        """L1 error of the plan's marginals, of the worse side of the worst problem."""
        plan = solve(self.x, self.y, self.case, steps)[1]().double()
        _, n, m = plan.shape
        rows, columns = (plan.sum(2) - 1 / n).abs().sum(1), (plan.sum(1) - 1 / m).abs().sum(1)
        return torch.maximum(rows, columns).max().item()


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()
