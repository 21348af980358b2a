"""Plans, potentials and projections, and what they say of the value."""

import copy
import math
import pickle

import pytest
import torch

from ecgot.kernels import sinkhorn, sinkhorn_divergence, sinkhorn_from_cost, sinkhorn_pairwise
from ecgot.kernels.ot import outputs
from tests.kernels.ot.problems import DEVICE, problem


def test_plan_after_a_change_in_place_is_refused():
    tensors = problem((2, 6, 5, 4))
    out = sinkhorn(**tensors, eps=0.3)
    tensors["x"] += 1
    with pytest.raises(RuntimeError, match="plan: expected unchanged x, y, weights and masks"):
        out.plan()


@pytest.mark.parametrize("whole", [True, False])
def test_apply_and_the_rest_are_what_the_plan_says(whole, monkeypatch):
    if not whole:
        # A few rows at a time. (The name ecgot.kernels.sinkhorn is the function.)
        monkeypatch.setattr(outputs, "MAX_CELLS", 40)
    tensors = problem((2, 9, 7, 4), masked=True, weighted=True, dtype=torch.float64)
    x = tensors["x"].nan_to_num(0.0).requires_grad_()
    out = sinkhorn(**tensors | {"x": x}, eps=0.2, tol=1e-10, max_iter=20_000)
    plan = out.plan()
    v, u = (
        torch.randn(2, 7, 3, dtype=torch.float64, device=DEVICE),
        torch.randn(2, 9, 3, device=DEVICE).double(),
    )
    torch.testing.assert_close(out.apply(v), plan @ v)
    torch.testing.assert_close(out.apply(u, transpose=True), plan.mT @ u)
    y = tensors["y"].nan_to_num(0.0)
    mass = plan.sum(2, keepdim=True)
    projection = torch.where(mass > 0, plan @ y / mass, 0.0)
    torch.testing.assert_close(out.barycentric_projection(), projection)
    cost = (x[:, :, None] - y[:, None]).square().sum(-1)
    torch.testing.assert_close(out.transport_cost(), (plan * cost).sum((1, 2)))
    weight = torch.randn(2, 9, 3, dtype=torch.float64, device=DEVICE)
    for by_rows, by_plan in (
        ((out.apply(v) * weight).sum(), (plan @ v * weight).sum()),
        (out.transport_cost().sum(), (plan * cost).sum()),
    ):
        found, expected = (torch.autograd.grad(s, x, retain_graph=True)[0] for s in (by_rows, by_plan))
        torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-6)
    with pytest.raises(ValueError, match=r"v: expected \[2, 7, E\], got shape \(2, 9, 3\)"):
        out.apply(u)
    with pytest.raises(TypeError, match=r"v: expected a torch\.Tensor, got list"):
        out.apply([1.0])


def test_the_value_is_the_transport_cost_and_the_entropy():
    tensors = problem((2, 9, 7, 4), weighted=True)
    tensors["y"] = tensors["y"] + 3
    out = sinkhorn(**tensors, eps=0.2, tol=1e-6, max_iter=5000)
    plan = out.plan().double()
    joint = (tensors["a"][:, :, None] * tensors["b"][:, None, :]).double()
    kl = torch.special.xlogy(plan, plan / joint.clamp_min(1e-300)).sum((1, 2))
    torch.testing.assert_close((out.transport_cost() + 0.2 * kl).float(), out.value, rtol=1e-5, atol=1e-4)


def test_log_plan_is_the_logarithm_of_the_plan_and_does_not_underflow():
    tensors = problem((2, 6, 5, 4), masked=True, weighted=True)
    out = sinkhorn(**tensors, eps=0.3, tol=1e-6, max_iter=5000)
    torch.testing.assert_close(out.log_plan().exp(), out.plan())
    x = torch.tensor([[[0.0], [1.0]]], dtype=torch.float64, device=DEVICE)
    out = sinkhorn(x, x, eps=1e-4, tol=1e-12)
    expected = math.log(0.5) + torch.tensor([[0.0, -1e4], [-1e4, 0.0]], dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(out.log_plan()[0], expected, rtol=1e-9, atol=1e-6)
    cost = torch.tensor([[[0.0, math.inf], [0.3, 0.1]]], device=DEVICE, requires_grad=True)
    out = sinkhorn_from_cost(cost, eps=0.5, a=torch.tensor([[0.3, 0.7]], device=DEVICE))
    log_plan = out.log_plan()
    assert log_plan[0, 0, 1] == -math.inf
    (grad,) = torch.autograd.grad(log_plan[0, 1, 0], cost)
    assert grad.isfinite().all()
    eps = torch.tensor([0.5], device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(sinkhorn_from_cost(cost.detach(), eps=eps).log_plan()[0, 0, 0], eps)
    assert grad.isfinite().all()


def test_transport_cost_counts_forbidden_pairs_by_the_cost_and_not_by_the_plan():
    # A plan that underflows in some cells still has a derivative there.
    cost = torch.tensor([[[0.3, 1.0], [math.inf, 0.2]]], dtype=torch.float64, device=DEVICE)
    a = torch.tensor([[0.4, 0.6]], dtype=torch.float64, device=DEVICE)
    b = torch.tensor([[0.3, 0.7]], dtype=torch.float64, device=DEVICE)

    def cost_at(b):
        out = sinkhorn_from_cost(cost, eps=0.2, a=a, b=b, rho=0.5, tol=1e-13, max_iter=20_000)
        return out.transport_cost().sum()

    b.requires_grad_()
    (grad,) = torch.autograd.grad(cost_at(b), b)
    steps = torch.eye(2, dtype=torch.float64, device=DEVICE)[:, None] * 1e-6
    numeric = torch.stack([(cost_at(b + step) - cost_at(b - step)) / 2e-6 for step in steps]).detach()
    torch.testing.assert_close(grad[0], numeric, rtol=1e-5, atol=1e-7)
    # At weight 0 as well, where the plan is 0 and what the point would add is not.
    b = torch.tensor([[0.0, 0.7]], dtype=torch.float64, device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(cost_at(b), b)
    one_sided = (cost_at(b + steps[0]) - cost_at(b)).detach() / 1e-6
    torch.testing.assert_close(grad[0, 0], one_sided, rtol=1e-4, atol=1e-6)


def test_eps_changed_in_place_moves_no_plan():
    tensors = problem((2, 6, 5, 4))
    eps = torch.tensor([0.3, 0.5], device=DEVICE)
    out = sinkhorn(**tensors, eps=eps)
    before = out.plan()
    eps *= 2
    assert torch.equal(out.plan(), before)


def test_copies_hold_their_plan_without_its_history(tmp_path):
    tensors = problem((2, 6, 5, 4), masked=True, weighted=True)
    out = sinkhorn(**tensors | {"x": tensors["x"].requires_grad_()}, eps=0.3)
    torch.save(out, tmp_path / "out.pt")
    for copied in (copy.deepcopy(out), pickle.loads(pickle.dumps(out)), torch.load(tmp_path / "out.pt")):
        assert torch.equal(copied.plan(), out.plan())
        assert torch.equal(copied.value, out.value)
        assert not copied.value.requires_grad
    assert copy.copy(out).value.requires_grad
    x, y = tensors["x"].nan_to_num(0.0), tensors["y"].nan_to_num(0.0)
    for other in (sinkhorn_divergence(x, y, eps=0.3), sinkhorn_pairwise(x, y, eps=0.3, full_output=True)):
        assert torch.equal(copy.deepcopy(other).value, other.value)
    tensors["y"] += 1
    with pytest.raises(RuntimeError, match="plan: expected unchanged x, y, weights and masks"):
        copy.deepcopy(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_transport_cost_of_clouds_far_apart_keeps_its_gradient(dtype):
    tensors = problem((1, 7, 5, 3))
    x, y = tensors["x"].to(dtype), (tensors["y"] + 1e3).to(dtype)

    def gradient(x):
        x = x.detach().requires_grad_()
        out = sinkhorn(
            x, y.to(x.dtype), eps=0.5, tol=1e-6 if x.dtype != torch.float64 else 1e-11, max_iter=20_000
        )
        return torch.autograd.grad(out.transport_cost().sum(), x)[0]

    exact = gradient(x.double())
    # What all points have in common is 2e3 / 7; the rest is what the plan changes.
    error = (gradient(x).double() - exact).abs().max() / exact.abs().max()
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-6)
