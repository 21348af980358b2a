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


def test_divergence_from_an_empty_cloud_is_zero_and_flat():
    tensors = problem((2, 5, 4, 3))
    x = tensors["x"].requires_grad_()
    y_mask = torch.ones(2, 4, dtype=torch.bool, device=x.device)
    y_mask[1] = False
    out = sinkhorn_divergence(x, tensors["y"], y_mask=y_mask, eps=0.3)
    assert out.value[1] == 0
    assert (out.f[1] == 0).all()
    assert out.value[0] > 0
    (grad,) = torch.autograd.grad(out.value.sum(), x)
    assert (grad[1] == 0).all()
    assert (grad[0] != 0).any()


def test_potentials_of_the_divergence_are_its_gradients_in_the_weights():
    tensors = problem((2, 6, 4, 3), weighted=True, dtype=torch.float64)
    a, b = tensors["a"].requires_grad_(), tensors["b"].requires_grad_()
    out = sinkhorn_divergence(**tensors, eps=0.4, tol=1e-12, max_iter=20_000)
    assert out.f.shape == (2, 6)
    assert out.g.shape == (2, 4)
    for potential, grad in zip((out.f, out.g), torch.autograd.grad(out.value.sum(), (a, b)), strict=True):
        difference = potential - grad
        torch.testing.assert_close(difference, difference.mean(1, keepdim=True).expand_as(difference))
