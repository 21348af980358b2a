"""SuperGlue's ``log_optimal_transport``: matching with a dustbin, a fixed number of iterations.

Source: Sarlin et al. 2020, "SuperGlue: Learning Feature Matching with Graph Neural Networks".
"""

import torch
from torch import Tensor


def log_optimal_transport(scores: Tensor, alpha: Tensor, iters: int) -> Tensor:
    """Logarithms of an assignment in which each point matches one point of the other side, or the dustbin.

    Args:
        scores: [B, m, n] of the pairs.
        alpha: score of leaving a point to the dustbin, one number, or one for each problem [B, 1, 1].
        iters: updates of rows and columns, as many as the original makes.

    Returns:
        [B, m + 1, n + 1], the logarithm of the plan times m + n: a matched point has 0. Equal to the original
        after ``iters`` iterations, and so is the gradient; but only the potentials of each iteration are kept
        for it, not iters matrices.

    >>> out = log_optimal_transport(torch.tensor([[[9.0, 0.0], [0.0, -9.0]]]), torch.tensor(1.0), 50)
    >>> out[0].exp().round().int().tolist()  # the first points match, the second are left over
    [[1, 0, 0], [0, 0, 1], [0, 1, 1]]
    """
    count, m, n = scores.shape
    scores = scores if scores.dtype in (torch.float32, torch.float64) else scores.float()
    alpha = torch.as_tensor(alpha, device=scores.device).to(scores.dtype)
    rows, column = alpha.expand(count, m, 1), alpha.expand(count, 1, n)
    couplings = torch.cat(
        [torch.cat([scores, rows], 2), torch.cat([column, alpha.expand(count, 1, 1)], 2)], 1
    )
    norm = -scores.new_tensor(m + n).log()
    log_mu = torch.cat([norm.expand(m), (scores.new_tensor(n).log() + norm)[None]]).expand(count, -1)
    log_nu = torch.cat([norm.expand(n), (scores.new_tensor(m).log() + norm)[None]]).expand(count, -1)
    return log_sinkhorn_iterations(couplings, log_mu, log_nu, iters) - norm


def log_sinkhorn_iterations(Z: Tensor, log_mu: Tensor, log_nu: Tensor, iters: int) -> Tensor:
    """Logarithm [B, n, m] of exp(Z) after ``iters`` divisions by its row and its column sums.

    Args:
        Z: [B, n, m].
        log_mu, log_nu: logarithms [B, n] and [B, m] of what the sums become.
    """
    u, v = _Iterations.apply(Z, log_mu, log_nu, iters)
    return Z + u[:, :, None] + v[:, None, :]


class _Iterations(torch.autograd.Function):
    """The potentials after a number of iterations; the backward forms each iteration's softmax again."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, Z: Tensor, log_mu: Tensor, log_nu: Tensor, iters: int
    ) -> tuple[Tensor, Tensor]:
        u, v = torch.zeros_like(log_mu), torch.zeros_like(log_nu)
        kept = []
        for _ in range(iters):
            kept.append(v)
            u = log_mu - torch.logsumexp(Z + v[:, None, :], 2)
            v = log_nu - torch.logsumexp(Z + u[:, :, None], 1)
            kept.append(u)
        ctx.save_for_backward(Z, *kept)
        return u, v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_u: Tensor, grad_v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        Z, *kept = ctx.saved_tensors  # type: ignore[attr-defined]
        slope = torch.zeros_like(Z)
        mu, nu = torch.zeros_like(grad_u), torch.zeros_like(grad_v)
        while kept:
            u, v = kept.pop(), kept.pop()
            nu += grad_v
            columns = torch.softmax(Z + u[:, :, None], 1) * grad_v[:, None, :]
            slope -= columns
            grad_u = grad_u - columns.sum(2)
            mu += grad_u
            rows = torch.softmax(Z + v[:, None, :], 2) * grad_u[:, :, None]
            slope -= rows
            grad_u, grad_v = torch.zeros_like(grad_u), -rows.sum(1)
        return slope, mu, nu, None
