"""Layers without state of their own: what they read belongs to the module whose forward they replace."""

import torch
from torch import Tensor, nn

from .ot import loss
from .scaling.doubly_stochastic import doubly_stochastic


class SinkhornLoss(nn.Module):
    """The forward of ``ecgot.SinkhornLoss``, with its attributes."""

    can_torch_compile: bool = True
    eps: float
    cost: str
    rho: float | None
    rho_x: float | None
    rho_y: float | None
    debias: bool
    max_iter: int
    tol: float
    scaling: float | None
    reduction: str
    precision: str

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        a: Tensor | None = None,
        b: Tensor | None = None,
        *,
        x_mask: Tensor | None = None,
        y_mask: Tensor | None = None,
    ) -> torch.Tensor:
        """The loss between points [B, N, D] and [B, M, D], [B] unless reduced."""
        return loss.SinkhornLoss.forward(self, x, y, a, b, x_mask=x_mask, y_mask=y_mask)


class DoublyStochastic(nn.Module):
    """The forward of a module with a number of ``iterations``: matrices [..., n, n] from their logits."""

    can_torch_compile: bool = True
    iterations: int

    def forward(self, logits: Tensor) -> Tensor:
        """exp(logits), its columns and then its rows divided by their sums, ``iterations`` times."""
        return doubly_stochastic(logits, iterations=self.iterations)
