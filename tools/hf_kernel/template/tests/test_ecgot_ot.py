"""What kernel-builder runs: the plan of shuffled points is their permutation, and the gradient is finite."""

import ecgot_ot
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.kernels_ci
def test_the_plan_is_a_permutation():
    x = torch.arange(8.0, device=DEVICE).view(1, 8, 1).requires_grad_()
    order = torch.tensor([3, 1, 4, 7, 5, 0, 2, 6], device=DEVICE)
    out = ecgot_ot.sinkhorn(x, x.detach()[:, order], eps=0.01)
    out.value.sum().backward()
    assert (8 * out.plan()[0]).round().argmax(0).tolist() == order.tolist()
    assert x.grad.isfinite().all()


@pytest.mark.kernels_ci
def test_rows_and_columns_sum_to_one():
    plan = ecgot_ot.doubly_stochastic(torch.randn(1000, 4, 4, device=DEVICE), iterations=100)
    torch.testing.assert_close(plan.sum(1), torch.ones(1000, 4, device=DEVICE))
    torch.testing.assert_close(plan.sum(2), torch.ones(1000, 4, device=DEVICE))
