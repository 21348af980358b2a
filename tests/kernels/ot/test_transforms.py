"""torch.func, torch.vmap and torch.export over the public functions."""

import pytest
import torch

from ecgot.kernels import sinkhorn, sinkhorn_from_cost, sinkhorn_pairwise
from tests.kernels.ot.problems import DEVICE, problem

SOLVED = {"eps": 0.5, "tol": 1e-6}


def clouds(count=2):
    tensors = problem((count, 5, 6, 3))
    return tensors["x"], tensors["y"]


def test_gradients_of_torch_func_are_those_of_autograd():
    x, y = clouds()
    leaf = x.clone().requires_grad_()
    for quantity in (
        lambda out: out.value.sum(),
        lambda out: out.f.square().sum(),
        lambda out: out.transport_cost().sum(),
    ):
        (expected,) = torch.autograd.grad(quantity(sinkhorn(leaf, y, **SOLVED)), leaf)
        grad = torch.func.grad(lambda x, q=quantity: q(sinkhorn(x, y, **SOLVED)))(x)
        torch.testing.assert_close(grad, expected)
    jacobian = torch.func.jacrev(lambda x: sinkhorn(x, y, **SOLVED).value)(x)
    assert (jacobian[0, 1] == 0).all()
    torch.testing.assert_close(
        jacobian.sum(0), torch.autograd.grad(sinkhorn(leaf, y, **SOLVED).value.sum(), leaf)[0]
    )


def test_second_derivatives_of_torch_func_are_refused():
    x, y = clouds()
    with pytest.raises(RuntimeError, match="sinkhorn: expected a first derivative under torch"):
        torch.func.jacrev(torch.func.jacrev(lambda x: sinkhorn(x, y, **SOLVED).value.sum()))(x)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y, a: sinkhorn(x, y, a=a, **SOLVED).value,
        lambda x, y, a: sinkhorn(x, y, a=a, **SOLVED).plan(),
        lambda x, y, a: sinkhorn_pairwise(x, y, a=a, **SOLVED),
        lambda x, y, a: sinkhorn_from_cost(torch.cdist(x, y), a=a, **SOLVED).value,
        lambda x, y, a: torch.func.grad(lambda x: sinkhorn(x, y, a=a, **SOLVED).value.sum())(x),
    ],
)
def test_vmap_over_weights_and_points_is_a_loop(call):
    x, y = clouds()
    a = torch.rand(4, 2, 5, device=DEVICE)
    a = a / a.sum(2, keepdim=True)
    mapped = torch.vmap(lambda a: call(x, y, a))(a)
    torch.testing.assert_close(mapped, torch.stack([call(x, y, each) for each in a]))
    many = torch.randn(3, 2, 5, 3, device=DEVICE)
    mapped = torch.vmap(lambda x: call(x, y, a[0]), in_dims=0)(many)
    torch.testing.assert_close(mapped, torch.stack([call(each, y, a[0]) for each in many]))


def test_vmapped_values_have_gradients():
    x, y = clouds()
    many = torch.stack([x, x + 1, x * 2]).requires_grad_()
    (grad,) = torch.autograd.grad(torch.vmap(lambda x: sinkhorn(x, y, **SOLVED).value)(many).sum(), many)
    every = torch.stack([sinkhorn(each, y, **SOLVED).value for each in many]).sum()
    torch.testing.assert_close(grad, torch.autograd.grad(every, many)[0])


class Loss(torch.nn.Module):
    def forward(self, x, y):
        return sinkhorn(x, y, **SOLVED).value


@pytest.mark.parametrize("axis", [0, 1])
def test_programs_are_exported_with_a_free_size(axis):
    x, y = clouds()
    free = torch.export.Dim("free")
    shapes = ({axis: free}, {axis: free} if axis == 0 else None)
    program = torch.export.export(Loss(), (x, y), dynamic_shapes=shapes).module()
    x, y = (torch.cat([x, x]), torch.cat([y, y])) if axis == 0 else (torch.cat([x, x], 1), y)
    torch.testing.assert_close(program(x, y), sinkhorn(x, y, **SOLVED).value)


def test_meta_tensors_have_shapes_and_nothing_else():
    x, y = clouds()
    out = sinkhorn(x.to("meta"), y.to("meta"), **SOLVED)
    assert out.value.shape == (2,)
    assert out.value.device.type == "meta"
    for plan in (out.plan(), out.log_plan()):
        assert plan.shape == (2, 5, 6)
    assert out.transport_cost().shape == (2,)
