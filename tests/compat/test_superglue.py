"""SuperGlue's assignment: equal to the original, which transformers ships, at every number of iterations."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.superglue.modeling_superglue import log_optimal_transport as original

from ecgot.compat.superglue import log_optimal_transport, log_sinkhorn_iterations

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


def scores_of(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return (3 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).to(dtype)


def slopes(function: Callable[..., Tensor], scores: Tensor, alpha: Tensor, iters: int) -> list[Tensor]:
    scores, alpha = scores.detach().requires_grad_(), alpha.detach().requires_grad_()
    out = function(scores, alpha, iters)
    weights = scores_of(*out.shape, dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), (scores, alpha))]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("iters", [0, 1, 7, 100])
@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 6, 9), (2, 1, 4)], ids=str)
@pytest.mark.parametrize("one_alpha", [True, False])
def test_equals_the_original(shape: tuple[int, ...], iters: int, dtype: torch.dtype, one_alpha: bool) -> None:
    scores = scores_of(*shape, dtype=dtype)
    alpha = torch.tensor(0.7, dtype=dtype) if one_alpha else scores_of(shape[0], 1, 1, dtype=dtype)
    found, wanted = (slopes(function, scores, alpha, iters) for function in (log_optimal_transport, original))
    for each, other in zip(found, wanted, strict=True):
        assert each.dtype == other.dtype
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(each, other, rtol=0, atol=TOLERANCE[dtype] * scale)


def test_the_marginals() -> None:
    """Each point has mass 1, each dustbin as much as the other side has points."""
    plan = log_optimal_transport(scores_of(2, 4, 6), torch.tensor(1.0), 300).exp()
    torch.testing.assert_close(plan.sum(2), torch.tensor([[1.0] * 4 + [6.0]] * 2, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(1), torch.tensor([[1.0] * 6 + [4.0]] * 2, dtype=torch.float64))


def test_gradcheck_also_in_the_marginals() -> None:
    log_mu, log_nu = scores_of(2, 3).log_softmax(1), scores_of(2, 4).log_softmax(1)
    inputs = [tensor.requires_grad_() for tensor in (scores_of(2, 3, 4), log_mu, log_nu)]
    assert torch.autograd.gradcheck(lambda *given: log_sinkhorn_iterations(*given, 5), inputs)


def test_what_is_kept_does_not_grow_with_the_matrices() -> None:
    scores = scores_of(1, 30, 40).requires_grad_()
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    for function, most in ((log_optimal_transport, 4 * 31 * 41 + 100 * (31 + 41)), (original, None)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            function(scores, torch.tensor(1.0, dtype=torch.float64), 100)
        assert sum(kept) <= most if most else sum(kept) > 200 * 31 * 41


def test_half_precision_is_computed_in_fp32() -> None:
    scores = scores_of(2, 5, 6)
    found = log_optimal_transport(scores.bfloat16(), torch.tensor(1.0), 20)
    wanted = log_optimal_transport(scores.bfloat16().float(), torch.tensor(1.0), 20)
    assert torch.equal(found, wanted)
