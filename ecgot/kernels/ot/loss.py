"""Entropic optimal transport as a loss module."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ecgot.kernels.ot import checks
from ecgot.kernels.ot.divergence import sinkhorn_divergence
from ecgot.kernels.ot.sinkhorn import sinkhorn


class SinkhornLoss(torch.nn.Module):
    """:func:`sinkhorn` as a loss module: ``loss(x, y) -> Tensor``, in units of the cost.

    Args:
        eps, cost, rho, rho_x, rho_y, max_iter, tol, scaling, precision: as in :func:`sinkhorn`.
        debias: use :func:`sinkhorn_divergence` instead, which takes ``rho`` but not ``rho_x`` and ``rho_y``.
        reduction: ``"mean"`` or ``"sum"`` over the batch, or ``"none"`` for the values [B].

    >>> import torch
    >>> x, y = torch.tensor([[[0.0, 0.0]], [[1.0, 1.0]]]), torch.tensor([[[3.0, 4.0]], [[1.0, 1.0]]])
    >>> SinkhornLoss(eps=0.1)(x, y)  # of 25 and 0
    tensor(12.5000)
    """

    def __init__(
        self,
        eps: float = 0.1,
        *,
        cost: str = "sqeuclidean",
        rho: float | None = None,
        rho_x: float | None = None,
        rho_y: float | None = None,
        debias: bool = False,
        max_iter: int = 1000,
        tol: float = 1e-4,
        scaling: float | None = None,
        precision: str = "fp32",
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        checks.check_cost(cost)
        checks.check_rho(rho, rho_x, rho_y, checks.check_eps(eps, torch.empty(0), 1))
        checks.check_settings(max_iter, tol, scaling)
        checks.check_precision(precision)
        if debias and (rho_x is not None or rho_y is not None):
            raise ValueError("rho_x and rho_y: expected rho for both marginals with debias, got one side's")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: expected 'mean', 'sum' or 'none', got {reduction!r}")
        self.eps, self.cost, self.debias, self.precision = eps, cost, debias, precision
        self.rho, self.rho_x, self.rho_y = rho, rho_x, rho_y
        self.max_iter, self.tol, self.scaling, self.reduction = max_iter, tol, scaling, reduction

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        a: Tensor | None = None,
        b: Tensor | None = None,
        *,
        x_mask: Tensor | None = None,
        y_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss (scalar, or [B] unreduced) of x [B, N, D] and y [B, M, D]; see :func:`sinkhorn`."""
        solve: Callable[..., Any] = sinkhorn
        if self.debias:
            solve = sinkhorn_divergence
        elif self.rho_x is not None or self.rho_y is not None:
            solve = partial(sinkhorn, rho_x=self.rho_x, rho_y=self.rho_y)
        value = solve(
            x,
            y,
            eps=self.eps,
            cost=self.cost,
            a=a,
            b=b,
            x_mask=x_mask,
            y_mask=y_mask,
            rho=self.rho,
            max_iter=self.max_iter,
            tol=self.tol,
            scaling=self.scaling,
            precision=self.precision,
        ).value
        if self.reduction == "none":
            return value
        return value.mean() if self.reduction == "mean" else value.sum()

    def extra_repr(self) -> str:
        """The settings, as ``repr`` shows them."""
        return (
            f"eps={self.eps}, cost={self.cost!r}, rho={self.rho}, rho_x={self.rho_x}, rho_y={self.rho_y}, "
            f"debias={self.debias}, max_iter={self.max_iter}, tol={self.tol}, scaling={self.scaling}, "
            f"precision={self.precision!r}, reduction={self.reduction!r}"
        )
