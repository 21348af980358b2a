"""Plans, potentials and projections, and what they say of the value."""

import pytest
import torch

from ecgot.kernels import sinkhorn
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
