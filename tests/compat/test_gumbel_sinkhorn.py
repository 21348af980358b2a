"""Gumbel-Sinkhorn beside its published formulas."""

import pytest
import torch
from torch import Tensor

from ecgot.compat.gumbel_sinkhorn import gumbel_sinkhorn, sample_gumbel, sinkhorn


def published(log_alpha: Tensor, n_iters: int) -> Tensor:
    """S^l(X), equation 3 of the paper: rows, then columns, in the logarithm."""
    for _ in range(n_iters):
        log_alpha = log_alpha - torch.logsumexp(log_alpha, 2, keepdim=True)
        log_alpha = log_alpha - torch.logsumexp(log_alpha, 1, keepdim=True)
    return log_alpha.exp()


def logits_of(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("n", [3, 25])
@pytest.mark.parametrize("n_iters", [1, 20])
def test_the_operator(n_iters: int, n: int, dtype: torch.dtype, atol: float) -> None:
    found, wanted = [], []
    for function, into in ((sinkhorn, found), (published, wanted)):
        logits = (5 * logits_of(4, n, n, dtype=dtype)).requires_grad_()
        out = function(logits, n_iters)
        into += [out.detach(), *torch.autograd.grad((out * logits_of(4, n, n, dtype=dtype)).sum(), logits)]
    for each, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(each, other, rtol=0, atol=atol)


@pytest.mark.parametrize(("n_samples", "squeeze"), [(1, True), (1, False), (5, True)])
def test_samples(n_samples: int, squeeze: bool) -> None:
    logits = logits_of(3, 4, 4)
    torch.manual_seed(0)
    matrices, noisy = gumbel_sinkhorn(logits, 0.5, n_samples, 2.0, 10, squeeze)
    shape = (3, 4, 4) if n_samples == 1 and squeeze else (3, n_samples, 4, 4)
    assert matrices.shape == noisy.shape == shape
    torch.manual_seed(0)
    noise = sample_gumbel(torch.Size((3, n_samples, 4, 4)), logits)
    wanted = (logits[:, None] + 2.0 * noise) / 0.5
    torch.testing.assert_close(noisy, wanted.view(shape))
    torch.testing.assert_close(matrices.view(-1, 4, 4), published(wanted.view(-1, 4, 4), 10))


def test_without_noise_and_without_a_batch() -> None:
    logits = logits_of(4, 4)
    matrices, used = gumbel_sinkhorn(logits, temp=0.1, noise_factor=0.0)
    torch.testing.assert_close(used, logits[None] / 0.1)
    torch.testing.assert_close(matrices, published(logits[None] / 0.1, 20))


def test_gumbel_noise() -> None:
    """Its mean is Euler's constant, its variance pi^2 / 6."""
    torch.manual_seed(0)
    noise = sample_gumbel(torch.Size((200_000,)), torch.zeros(1))
    assert noise.mean().item() == pytest.approx(0.57722, abs=0.01)
    assert noise.var().item() == pytest.approx(1.64493, abs=0.02)
    assert noise.isfinite().all()


def test_small_temperatures_give_permutations() -> None:
    torch.manual_seed(0)
    matrices, _ = gumbel_sinkhorn(logits_of(4, 4), temp=0.01, n_samples=20, n_iters=200)
    assert (matrices.amax(-1) > 0.95).float().mean() > 0.9
