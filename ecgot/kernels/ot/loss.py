"""Entropic optimal transport as a loss module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ecgot.kernels.ot import checks as arguments
from ecgot.kernels.ot.sinkhorn import sinkhorn
from ecgot.kernels.ot.variants import sinkhorn_divergence


class SinkhornLoss(torch.nn.Module):
    """``sinkhorn`` as a loss module: ``loss(x, y) -> Tensor``.

    Args:
        eps, cost, rho, max_iter, tol, scaling: as in :func:`sinkhorn`.
        debias: the loss is :func:`sinkhorn_divergence`.
        reduction: ``"mean"`` or ``"sum"`` over the batch, or ``"none"`` for the values [B].
    """

    def __init__(
        self,
        eps: float = 0.1,
        *,
        cost: str = "sqeuclidean",
        rho: float | None = None,
        debias: bool = False,
        max_iter: int = 1000,
        tol: float = 1e-4,
        scaling: float | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        arguments.check_cost(cost)
        arguments.check_rho(rho, None, None)
        arguments.check_eps(eps, torch.empty(0), 1)
        arguments.check_iterations(max_iter, tol, scaling)
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction: got {reduction!r}, accepted are 'mean', 'sum' and 'none'")
        self.eps, self.cost, self.rho, self.debias = eps, cost, rho, debias
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
        """x [B, N, D], y [B, M, D], weights and masks as in :func:`sinkhorn`; a scalar, or [B] unreduced."""
        solve: Callable[..., Any] = sinkhorn_divergence if self.debias else sinkhorn
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
        ).value
        if self.reduction == "none":
            return value
        return value.mean() if self.reduction == "mean" else value.sum()

    def extra_repr(self) -> str:
        return (
            f"eps={self.eps}, cost={self.cost!r}, rho={self.rho}, debias={self.debias}, "
            f"max_iter={self.max_iter}, tol={self.tol}, scaling={self.scaling}, reduction={self.reduction!r}"
        )
