"""The debiased cost."""

import math

import pytest
import torch

from ecgot.kernels import sinkhorn, sinkhorn_divergence
from tests.kernels.ot.problems import close, problem


@pytest.mark.parametrize("rho", [None, 0.5])
def test_divergence_is_the_debiased_cost(rho):
    tensors = problem((2, 9, 6, 4), masked=True, weighted=True)
    of = lambda p, q: sinkhorn(  # noqa: E731
        tensors[p], tensors[q], eps=0.5, rho=rho, tol=1e-6, max_iter=5000,
        a=tensors["a" if p == "x" else "b"], b=tensors["a" if q == "x" else "b"],
        x_mask=tensors[f"{p}_mask"], y_mask=tensors[f"{q}_mask"],
    ).value  # fmt: skip
    out = sinkhorn_divergence(**tensors, eps=0.5, rho=rho, tol=1e-6, max_iter=5000)
    expected = of("x", "y") - of("x", "x") / 2 - of("y", "y") / 2
    torch.testing.assert_close(out.value, expected, atol=1e-5, rtol=0)
    assert out.converged.all()
    assert (out.value > 0).all()


def test_divergence_of_equal_clouds_is_zero_and_flat():
    x = problem((2, 9, 9, 4))["x"]
    moved = x.clone().requires_grad_()
    out = sinkhorn_divergence(moved, x, eps=0.5, tol=1e-6, max_iter=5000)
    assert out.value.abs().max() < 1e-5
    (grad,) = torch.autograd.grad(out.value.sum(), moved)
    assert grad.abs().max() < 1e-4


def test_divergence_equals_geomloss():
    geomloss = pytest.importorskip("geomloss")
    tensors = problem((3, 13, 8, 5))
    peer = geomloss.SamplesLoss("sinkhorn", p=2, blur=math.sqrt(0.1), scaling=0.99, debias=True)
    expected = 2 * peer(tensors["x"].double(), tensors["y"].double())
    close(sinkhorn_divergence(**tensors, eps=0.2, tol=1e-6).value, expected.cpu(), 2e-4)
