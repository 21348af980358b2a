"""The Sinkhorn divergence: optimal transport, debiased."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ecgot.kernels.ot import checks
from ecgot.kernels.ot.outputs import SinkhornDivergenceOutput, SinkhornOutput
from ecgot.kernels.ot.problem import ABSENT, padded
from ecgot.kernels.ot.sinkhorn import sinkhorn

MEANS = 3  # of f and g, before the transport of a cloud to itself is solved
BETWEEN_MEANS = 3  # iterations


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    cost: str = "sqeuclidean",
    a: Tensor | None = None,
    b: Tensor | None = None,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    rho: float | Tensor | None = None,
    max_iter: int = 1000,
    tol: float = 1e-4,
    scaling: float | None = None,
    precision: str = "fp32",
) -> SinkhornDivergenceOutput:
    """The debiased cost OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2: 0 for equal clouds, else positive.

    The arguments are those of :func:`sinkhorn`. With ``rho`` the term eps (mass_a - mass_b)^2 / 2 is added
    (Séjourné et al. 2019, "Sinkhorn Divergences for Unbalanced Optimal Transport"); without it an empty cloud
    makes the value 0. ``scaling`` anneals the problem between the clouds; their own need none.

    >>> import torch
    >>> x = torch.tensor([[[0.0], [1.0]]])
    >>> f"{sinkhorn_divergence(x, x + 3, eps=0.1).value.item():.3f}"  # a shift costs its square
    '9.000'
    >>> f"{sinkhorn_divergence(x, x, eps=0.1).value.abs().item():.3f}"
    '0.000'
    """
    x, y = checks.check_points(x, y)
    eps = checks.check_eps(eps, x, problems := x.shape[0])
    rho = checks.check_rho(rho, None, None, eps.detach())[0]
    a = checks.check_weights("a", a, x, x_mask, any_mass=rho is not None)
    b = checks.check_weights("b", b, y, y_mask, any_mass=rho is not None)
    x_mass, y_mass = a.clamp_min(0).sum(1), b.clamp_min(0).sum(1)
    n, m = x.shape[1], y.shape[1]
    settings: dict[str, Any] = {"cost": cost, "max_iter": max_iter, "tol": tol, "precision": precision}
    between = sinkhorn(
        x,
        y,
        eps=eps,
        rho=rho,
        scaling=scaling,
        **_weighted("a", "x", a),
        **_weighted("b", "y", b),
        **settings,
    )
    length = max(n, m)
    both = torch.cat([padded(x, length), padded(y, length)])
    weights = torch.cat([padded(a, length, ABSENT), padded(b, length, ABSENT)])
    inside = _to_itself(both, weights, eps.repeat(2), None if rho is None else rho.repeat(2), settings)
    of_x, of_y = inside.value.view(2, problems)
    value = between.value - of_x / 2 - of_y / 2
    solvable = (x_mass > 0) & (y_mass > 0)
    if rho is not None:
        value = value + eps * (x_mass - y_mass).square() / 2
        solvable = solvable | (rho < math.inf)
    value = torch.where(solvable, value, 0.0)
    own_f, own_g = ((inside.f + inside.g) / 2).view(2, problems, length)
    f, g = between.f - own_f[:, :n], between.g - own_g[:, :m]
    errors = torch.cat([between.marginal_error[None], inside.marginal_error.view(2, problems)])
    iterations = torch.cat([between.iterations[None], inside.iterations.view(2, problems)])
    return SinkhornDivergenceOutput(
        value=value,
        f=torch.where(solvable[:, None], f, 0.0),
        g=torch.where(solvable[:, None], g, 0.0),
        marginal_error=errors.amax(0),
        iterations=iterations.amax(0),
        converged=between.converged & inside.converged.view(2, problems).all(0),
        backend=between.backend,
    )


def _weighted(weight: str, points: str, values: Tensor) -> dict[str, Any]:
    """A side's weights and mask as arguments, from checked weights."""
    return {weight: values.clamp_min(0), f"{points}_mask": values >= 0}


def _to_itself(
    x: Tensor, weights: Tensor, eps: Tensor, rho: Tensor | None, settings: dict[str, Any]
) -> SinkhornOutput:
    """The transport of clouds to themselves."""
    arguments = {**_weighted("a", "x", weights), **_weighted("b", "y", weights), "eps": eps, "rho": rho}

    def solve(**changed: Any) -> SinkhornOutput:
        return sinkhorn(x, x, **arguments, **{**settings, **changed})

    return solve_symmetric(solve, settings["max_iter"])


def solve_symmetric(solve: Callable[..., SinkhornOutput], max_iter: int) -> SinkhornOutput:
    """What ``solve`` returns, a solver of problems whose two sides are the same, in few iterations.

    There f = g, and alternating updates come near it slowly where few points share a partner: an eigenvalue
    lambda of the plan near 1 is a factor lambda^2 of what f and g are apart in an iteration. The mean of both
    after k iterations has lambda^(2 k - 1) (1 - lambda) / 2 of it, at most .034 for k = 3. So the solver
    starts from the mean of a mean of a mean (Feydy et al. 2019 take the mean after every half-iteration).

    Args:
        solve: takes ``max_iter``, ``tol`` and ``init`` by name.
        max_iter: most iterations of all calls together.
    """
    means = min(MEANS, (max_iter - 1) // BETWEEN_MEANS)
    g = None
    with torch.no_grad():
        for _ in range(means):
            out = solve(max_iter=BETWEEN_MEANS, tol=0.0, init=g)
            g = (out.f + out.g) / 2
    out = solve(max_iter=max_iter - means * BETWEEN_MEANS, init=g)
    return replace(out, iterations=out.iterations + means * BETWEEN_MEANS)
