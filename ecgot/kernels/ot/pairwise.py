"""Optimal transport between every cloud of one batch and every cloud of another."""

from typing import Any, Literal, overload

from torch import Tensor

from ecgot.kernels.ot import checks, operators
from ecgot.kernels.ot.backends import backend
from ecgot.kernels.ot.convergence import warn_if_unsolved
from ecgot.kernels.ot.outputs import SinkhornPairwiseOutput
from ecgot.kernels.ot.problem import Problem


@overload
def sinkhorn_pairwise(
    x: Tensor, y: Tensor, *, full_output: Literal[True], **settings: Any
) -> SinkhornPairwiseOutput: ...


@overload
def sinkhorn_pairwise(
    x: Tensor, y: Tensor, *, full_output: Literal[False] = ..., **settings: Any
) -> Tensor: ...


def sinkhorn_pairwise(  # type: ignore[misc]  # the overloads leave its settings unnamed
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    cost: str = "sqeuclidean",
    a: Tensor | None = None,
    b: Tensor | None = None,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    rho: float | None = None,
    rho_x: float | None = None,
    rho_y: float | None = None,
    max_iter: int = 1000,
    tol: float = 1e-4,
    scaling: float | None = None,
    precision: str = "fp32",
    full_output: bool = False,
) -> Tensor | SinkhornPairwiseOutput:
    """Entropic optimal transport between each of B clouds and each of K others (late interaction).

    Args:
        x: [B, N, D], with weights ``a`` [B, N] and mask ``x_mask`` [B, N].
        y: [K, M, D], with weights ``b`` [K, M] and mask ``y_mask`` [K, M].
        eps: a number.
        full_output: return a :class:`SinkhornPairwiseOutput`: the values, and how each pair was solved.

    The other arguments are those of :func:`sinkhorn`.

    Returns:
        The values [B, K] in units of the cost, differentiable once in x, y, a and b. No [B, K, N, M] tensor
        is kept for the backward pass, only the potentials, B K (N + M) numbers: costs are formed for some
        pairs at a time, and again in the backward pass, where the Triton kernels hold the plans of at most
        2^26 cells (256 MB, 384 MB for fp32 points). Pairs with an empty cloud have value 0. NaN in a cloud
        makes the values of its pairs NaN, and their gradients if they enter a loss.

    >>> import torch
    >>> x, y = torch.tensor([[[0.0]], [[1.0]], [[2.0]]]), torch.tensor([[[0.0]], [[3.0]]])
    >>> sinkhorn_pairwise(x, y, eps=0.1).round(decimals=3)  # single points: their squared distances
    tensor([[0., 9.],
            [1., 4.],
            [4., 1.]])
    """
    x, y = checks.check_points(x, y, same_batch=False)
    checks.check_cost(cost)
    checks.check_precision(precision)
    if isinstance(eps, Tensor) and eps.dim():
        raise ValueError(f"eps: expected a number, got a tensor {tuple(eps.shape)}")
    if isinstance(eps, Tensor) and eps.requires_grad:
        raise ValueError("eps: expected a number without gradient, got a tensor that requires it")
    for name, value in (("rho", rho), ("rho_x", rho_x), ("rho_y", rho_y)):
        if isinstance(value, Tensor) and value.dim():
            raise ValueError(f"{name}: expected a number, got a tensor {tuple(value.shape)}")
    eps_each = checks.check_eps(eps, x, x.shape[0] * y.shape[0]).detach()
    rhos = checks.check_rho(rho, rho_x, rho_y, eps_each)
    settings = checks.check_settings(max_iter, tol, scaling)
    free = rhos != (None, None)
    a = checks.check_weights("a", a, x, x_mask, any_mass=free)
    b = checks.check_weights("b", b, y, y_mask, any_mass=free)
    problem = Problem(x, y, a, b, None, None, eps_each, cost, *rhos, True, precision)
    problem, found = operators.solve(problem, None, settings)
    warn_if_unsolved(problem, found, settings.tol)
    assert found.value is not None
    assert found.converged is not None
    if not full_output:
        return found.value
    return SinkhornPairwiseOutput(
        value=found.value,
        marginal_error=found.error,
        iterations=found.iterations,
        converged=found.converged,
        backend=backend(problem),
    )
