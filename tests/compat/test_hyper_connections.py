"""The matrices of hyper-connections beside the formula of the paper, and Triton's launches."""

import pytest
import torch
from torch import Tensor

from ecgot.compat.hyper_connections import sinkhorn_knopp
from ecgot.kernels import dispatch


def published(logits: Tensor, iterations: int) -> Tensor:
    """M(t) = T_r(T_c(M(t - 1))) from M(0) = exp(logits): columns, then rows."""
    matrix = logits.exp()
    for _ in range(iterations):
        matrix = matrix / matrix.sum(-2, keepdim=True)
        matrix = matrix / matrix.sum(-1, keepdim=True)
    return matrix


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
@pytest.mark.parametrize("iterations", [1, 20])
def test_equals_the_published_iteration(iterations: int, dtype: torch.dtype, atol: float) -> None:
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(5, 7, 4, 4, generator=generator).to(dtype)
    weights = torch.randn(5, 7, 4, 4, generator=generator).to(dtype)
    found, wanted = [], []
    for function, into in ((sinkhorn_knopp, found), (published, wanted)):
        logits = given.clone().requires_grad_()
        out = function(logits, iterations)
        into += [out.detach(), torch.autograd.grad((out * weights).sum(), logits)[0]]
    for each, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(each, other, rtol=0, atol=4 * atol)


@pytest.mark.skipif(not dispatch.INTERPRETED, reason="launches are recorded under TRITON_INTERPRET=1")
def test_one_launch_forward_and_one_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    from ecgot.kernels.scaling import triton_iteration

    launched: list[str] = []

    def launch(kernel: object, grid: tuple[int, ...], **arguments: object) -> None:
        launched.append(kernel.__name__)  # type: ignore[attr-defined]
        dispatch.launch(kernel, grid, **arguments)

    monkeypatch.setattr(triton_iteration, "launch", launch)
    logits = torch.randn(3, 100, 4, 4, dtype=torch.bfloat16).requires_grad_()
    sinkhorn_knopp(logits).sum().backward()
    assert launched == ["_doubly_stochastic_fwd_kernel", "_doubly_stochastic_bwd_kernel"]
