"""Packed clouds."""

import pytest
import torch

from ecgot.kernels import sinkhorn, sinkhorn_varlen
from tests.kernels.ot.problems import DEVICE, problem


def test_packed_clouds_are_the_padded_ones():
    tensors = problem((3, 8, 6, 4), weighted=True)
    x_lengths, y_lengths = torch.tensor([8, 0, 3], device=DEVICE), torch.tensor([2, 6, 6], device=DEVICE)
    x_mask = torch.arange(8, device=DEVICE) < x_lengths[:, None]
    y_mask = torch.arange(6, device=DEVICE) < y_lengths[:, None]
    x, y = tensors["x"][x_mask].requires_grad_(), tensors["y"][y_mask].requires_grad_()
    offsets = [torch.cat([n.new_zeros(1), n.cumsum(0)]).to(torch.int32) for n in (x_lengths, y_lengths)]
    packed = sinkhorn_varlen(x, y, *offsets, eps=0.2, tol=1e-6)
    padded = sinkhorn(tensors["x"], tensors["y"], x_mask=x_mask, y_mask=y_mask, eps=0.2, tol=1e-6)
    torch.testing.assert_close(packed.value, padded.value)
    torch.testing.assert_close(packed.f, padded.f[x_mask])
    torch.testing.assert_close(packed.g, padded.g[y_mask])
    (grad,) = torch.autograd.grad(packed.value.sum(), x)
    assert grad.shape == x.shape
    with pytest.raises(ValueError, match="cu_seqlens_x: expected offsets that rise from 0 to 11, got"):
        sinkhorn_varlen(x, y, offsets[0][:-1], offsets[1][:-1], eps=0.2)


def test_packed_outputs_move_points_and_start_other_solutions():
    tensors = problem((2, 5, 4, 3))
    x, y = tensors["x"].flatten(0, 1)[:8], tensors["y"].flatten(0, 1)[:7]
    offsets = [torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in ([0, 3, 8], [0, 4, 7])]
    out = sinkhorn_varlen(x, y, *offsets, eps=0.2, tol=1e-6)
    v = torch.randn(2, 4, 2, device=DEVICE)
    torch.testing.assert_close(out.apply(v), out.plan() @ v)
    u = torch.randn(2, 5, 2, device=DEVICE)
    torch.testing.assert_close(out.apply(u, transpose=True), out.plan().mT @ u)
    moved = out.plan()[0, :3] @ y[:4] * 3
    torch.testing.assert_close(out.barycentric_projection()[0, :3], moved, rtol=1e-4, atol=1e-5)
    again = sinkhorn_varlen(x, y, *offsets, eps=0.2, tol=1e-6, init=out.g)
    assert (again.iterations < out.iterations).all()
    with pytest.raises(ValueError, match=r"init: expected floating point \[7\], got \(6,\)"):
        sinkhorn_varlen(x, y, *offsets, eps=0.2, init=out.g[:6])
