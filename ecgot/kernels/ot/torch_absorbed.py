"""Log-sum-exps over stored costs by matrix products: potentials are absorbed into the kernel.

With K_ij = exp(f0_i + g0_j - C_ij / eps) the log-sum-exp of row i, log sum_j b_j exp(g_j - C_ij / eps), is
log (K (b exp(g - g0)))_i - f0_i: one product in place of five passes over the costs. Where a potential has
left the range in which that loses nothing, the log-sum-exp is formed as it stands, and absorbed anew. To know
that, values are read: this is for CPUs.
"""

import torch
from torch import Tensor

# How far a potential may move, and a sum be from 1, in logarithms: what underflowed in K stays negligible.
MAX_MOVE = {torch.float32: 23.0, torch.float64: 230.0}
CLAMP = {
    torch.float32: 80.0,
    torch.float64: 600.0,
}  # of an exponent: it then shows in its sum, and is no inf * 0


class Absorbed:
    """The log-sum-exps of :class:`ecgot.kernels.ot.iteration.Softmins` at temperature 1.

    Args:
        kernel: -C / eps [B, N, M], finite.
        a, b: weights [B, N] and [B, M].
    """

    def __init__(self, kernel: Tensor, a: Tensor, b: Tensor) -> None:
        self._kernel, self._a, self._b = kernel, a, b
        self._log_a, self._log_b = a.log(), b.log()
        self._limit = MAX_MOVE[kernel.dtype]
        self._absorbed: tuple[Tensor, Tensor, Tensor] | None = None  # K, f0, g0

    def rows(self, g: Tensor) -> Tensor:
        """log sum_j b_j exp(g_j - C_ij / eps) [B, N]."""
        if self._absorbed is not None:
            scaled, f0, g0 = self._absorbed
            move = g - g0
            if self._near(move, self._b):
                sums = torch.bmm(scaled, (self._b * move.exp())[:, :, None]).squeeze(2).log()
                if self._near(sums, self._a):
                    return sums - f0
        moved = self._kernel + g[:, None, :]
        lse = torch.logsumexp(moved + self._log_b[:, None, :], 2)
        # Columns without weight bound nothing; their sums then leave the range and are formed in full.
        scaled = moved.sub_(lse[:, :, None]).clamp_max_(CLAMP[g.dtype]).exp_()
        self._absorbed = scaled, -lse, g
        return lse

    def columns(self, f: Tensor) -> Tensor:
        """log sum_i a_i exp(f_i - C_ij / eps) [B, M]."""
        if self._absorbed is not None:
            scaled, f0, g0 = self._absorbed
            move = f - f0
            if self._near(move, self._a):
                sums = torch.bmm((self._a * move.exp())[:, None, :], scaled).squeeze(1).log()
                if bool((sums.abs() <= self._limit).logical_or_(sums.isnan()).all()):
                    return sums - g0
        return torch.logsumexp(self._kernel + (f + self._log_a)[:, :, None], 1)

    def _near(self, move: Tensor, weight: Tensor) -> bool:
        """Whether no point that weighs has moved too far; NaN counts as near, as it stays NaN."""
        return not bool(((move.abs() > self._limit) & (weight > 0)).any())
