"""The Sinkhorn divergence: optimal transport, debiased."""

import math

import torch
from torch import Tensor

from ecgot.kernels.ot import checks
from ecgot.kernels.ot.outputs import SinkhornDivergenceOutput
from ecgot.kernels.ot.problem import ABSENT, padded
from ecgot.kernels.ot.sinkhorn import sinkhorn


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
    makes the value 0. The three problems of each pair are solved together, as one batch.

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
    length = max(n, m)
    x, y = padded(x, length), padded(y, length)
    a, b = padded(a, length, ABSENT), padded(b, length, ABSENT)
    a, b = torch.cat([a, a, b]), torch.cat([b, a, b])
    out = sinkhorn(
        torch.cat([x, x, y]),
        torch.cat([y, x, y]),
        eps=eps.repeat(3),
        cost=cost,
        a=a.clamp_min(0),
        b=b.clamp_min(0),
        x_mask=a >= 0,
        y_mask=b >= 0,
        rho=None if rho is None else rho.repeat(3),
        max_iter=max_iter,
        tol=tol,
        scaling=scaling,
        precision=precision,
    )
    between, of_x, of_y = out.value.view(3, problems)
    (f, f_x, f_y), (g, g_x, g_y) = (t.view(3, problems, length) for t in (out.f, out.g))
    value = between - of_x / 2 - of_y / 2
    solvable = (x_mass > 0) & (y_mass > 0)
    if rho is not None:
        value = value + eps * (x_mass - y_mass).square() / 2
        solvable = solvable | (rho < math.inf)
    value = torch.where(solvable, value, 0.0)
    f, g = (torch.where(solvable[:, None], t, 0.0) for t in (f - (f_x + g_x) / 2, g - (f_y + g_y) / 2))
    return SinkhornDivergenceOutput(
        value=value,
        f=f[:, :n],
        g=g[:, :m],
        marginal_error=out.marginal_error.view(3, problems).amax(0),
        iterations=out.iterations.view(3, problems).amax(0),
        converged=out.converged.view(3, problems).all(0),
        backend=out.backend,
    )
