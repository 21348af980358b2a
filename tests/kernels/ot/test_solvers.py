"""Every solver gives the same: on chip, streaming, compiled loops, torch and torch in chunks of rows."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ecgot.kernels import sinkhorn, sinkhorn_pairwise
from ecgot.kernels.ot import torch_solver
from ecgot.kernels.ot.torch_absorbed import Absorbed
from tests.kernels.ot.problems import BACKEND, COSTS, DEVICE, FP64, close, oracle, problem, solved


def test_offsets_beyond_two_to_the_31():
    step = 2**29  # elements between two points
    storage = torch.empty(5 * step + 8, dtype=torch.float16).as_strided((1, 6, 4), (0, step, 1))
    tensors = problem((1, 6, 5, 4), dtype=torch.float16)
    storage.copy_(tensors["x"].cpu())
    out = sinkhorn(storage.to(DEVICE) if DEVICE == "cpu" else tensors["x"], tensors["y"], eps=0.3)
    torch.testing.assert_close(out.value, sinkhorn(**tensors, eps=0.3).value)


def test_too_large_for_the_chip_streams():
    x = torch.randn(1, 300, 2, device=DEVICE)
    assert sinkhorn(x, x, eps=0.5, max_iter=1).backend == (
        "triton-streaming" if BACKEND == "triton" else BACKEND
    )


@pytest.mark.parametrize("cost", COSTS)
def test_large_problems_in_chunks_of_rows_are_the_same(cost, monkeypatch):
    tensors = problem((2, 40, 30, 5), masked=True, weighted=True, dtype=torch.float64)
    tensors = {k: t.cpu() for k, t in tensors.items()}
    x = tensors["x"].nan_to_num(0.0).requires_grad_()
    tensors["x"] = x
    settings = {"eps": 0.1, "cost": cost, "tol": 1e-9, "scaling": 0.5, "max_iter": 5000}
    whole = sinkhorn(**tensors, **settings)
    (expected,) = torch.autograd.grad(whole.value.sum(), x)
    monkeypatch.setattr(torch_solver, "MAX_CELLS", 300)
    out = sinkhorn(**tensors, **settings)
    assert out.backend == f"{FP64}-streaming"
    torch.testing.assert_close(out.value, whole.value, atol=1e-7, rtol=0)
    (grad,) = torch.autograd.grad(out.value.sum(), x)
    torch.testing.assert_close(grad, expected, atol=1e-6, rtol=0)


def test_streaming_kernel():
    if BACKEND != "triton":
        pytest.skip("of the Triton kernels: set TRITON_INTERPRET=1 or use a GPU")
    tensors = problem((1, 260, 70, 5), masked=True, weighted=True)
    value, grads, _ = oracle(tensors, eps=0.3, cost="sqeuclidean")
    x, y = tensors["x"].requires_grad_(), tensors["y"].requires_grad_()
    out = sinkhorn(**tensors, eps=0.3, tol=1e-5, scaling=0.5)
    assert out.backend == "triton-streaming"
    close(out.value, value, 3e-5)
    for found, expected in zip(torch.autograd.grad(out.value.sum(), (x, y)), grads, strict=True):
        close(found, expected, 1e-4)


@pytest.mark.parametrize("rho", [{}, {"rho": 0.5}], ids=str)
def test_torch_path_alone(rho, monkeypatch):
    """What serves without numba, and on devices without Triton."""
    monkeypatch.setattr("ecgot.kernels.ot.backends.backend", lambda problem: "torch")
    tensors = problem((3, 9, 7, 4), masked=True, weighted=True)
    value, _ = solved(tensors, eps=0.2, **{"rho_x": 0.5, "rho_y": 0.5} if rho else {})
    x = tensors["x"].requires_grad_()
    out = sinkhorn(**tensors, eps=0.2, tol=1e-6, max_iter=5000, scaling=0.5, **rho)
    close(out.value, value, 3e-5)
    pairs = sinkhorn_pairwise(
        x, tensors["y"], x_mask=tensors["x_mask"], y_mask=tensors["y_mask"], a=tensors["a"], b=tensors["b"],
        eps=0.2, tol=1e-6, max_iter=5000, **rho,
    )  # fmt: skip
    close(pairs.diagonal(), value, 3e-5)
    (grad,) = torch.autograd.grad(pairs.trace(), x, retain_graph=True)
    (expected,) = torch.autograd.grad(out.value.sum(), x)
    torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rho", [{}, {"rho": 0.5}], ids=str)
@pytest.mark.parametrize("cost", COSTS)
def test_torch_path_of_all_pairs(cost, rho, monkeypatch):
    """Each pair is the problem of its two clouds, in value and gradient, however few clouds are a chunk."""
    monkeypatch.setattr("ecgot.kernels.ot.backends.backend", lambda problem: "torch")
    monkeypatch.setattr(torch_solver, "CHUNK_CELLS", 400)  # two clouds x of five
    first, second = (problem((count, 9, 7, 4), masked=True, weighted=True, seed=count) for count in (5, 3))
    given = {"x": first["x"], "a": first["a"], "x_mask": first["x_mask"]}
    given |= {"y": second["y"], "b": second["b"], "y_mask": second["y_mask"]}
    given = {name: t.cpu() for name, t in given.items()}
    settings = {"eps": 0.2, "cost": cost, "tol": 1e-6, "max_iter": 5000, **rho}
    scale = torch.arange(1.0, 16.0).view(5, 3)
    pair = {
        name: t.repeat_interleave(3, 0) if name in ("x", "a", "x_mask") else torch.cat([t] * 5)
        for name, t in given.items()
    }
    expected, _ = solved(pair, eps=0.2, cost=cost, **{"rho_x": 0.5, "rho_y": 0.5} if rho else {})
    x, y = given["x"].requires_grad_(), given["y"].requires_grad_()
    value = sinkhorn_pairwise(**given, **settings)
    close(value.flatten(), expected, 3e-5)
    grads = torch.autograd.grad((value * scale).sum(), (x, y))
    px, py = pair["x"].requires_grad_(), pair["y"].requires_grad_()
    one_by_one = sinkhorn(**pair | {"x": px, "y": py}, **settings).value
    wanted = torch.autograd.grad((one_by_one * scale.flatten()).sum(), (px, py))
    wanted = wanted[0].view(5, 3, 9, 4).sum(1), wanted[1].view(5, 3, 7, 4).sum(0)
    for found, each in zip(grads, wanted, strict=True):
        torch.testing.assert_close(found.nan_to_num(), each.nan_to_num(), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_absorbed_log_sum_exps_are_those_of_the_costs(dtype):
    generator = torch.Generator().manual_seed(0)
    kernel = -300 * torch.rand(3, 8, 6, generator=generator, dtype=dtype)
    a, b = (torch.rand(3, n, generator=generator, dtype=dtype) for n in (8, 6))
    b[1, 2], a[2, 4] = 0, 0
    absorbed = Absorbed(kernel, a, b)
    g = torch.zeros(3, 6, dtype=dtype)
    for move in (0.0, 1.0, 5.0, 60.0, 150.0, 600.0, 1.0):  # from within the range, beyond it, and back
        g = g + move * (torch.rand(3, 6, generator=generator, dtype=dtype) - 0.5)
        lse = absorbed.rows(g)
        exact = torch.logsumexp(kernel.double() + (g + b.log())[:, None].double(), 2)
        close(lse, exact, 1e-5 if dtype == torch.float32 else 1e-12)
        for f in (-lse, -0.5 * lse):
            exact = torch.logsumexp(kernel.double() + (f + a.log())[:, :, None].double(), 1)
            close(absorbed.columns(f), exact, 1e-5 if dtype == torch.float32 else 1e-12)


def test_what_underflowed_on_absorption_comes_back():
    absorbed = Absorbed(torch.tensor([[[0.0, -110.0]]]), torch.ones(1, 1), torch.full((1, 2), 0.5))
    absorbed.rows(torch.zeros(1, 2))  # the second column is lost: exp(-110)
    g = torch.tensor([[-60.0, 60.0]])
    close(absorbed.rows(g), torch.tensor([[-50.0 - math.log(2)]]).double(), 1e-4)


def test_many_threads_at_once_and_the_number_of_torchs_threads():
    before = torch.get_num_threads()
    batches = [problem((4, 9, 7, 4), seed=seed, masked=True) for seed in range(6)]
    expected = [sinkhorn(**tensors, eps=0.5).value for tensors in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda tensors: sinkhorn(**tensors, eps=0.5).value, batches))
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted)
    assert torch.get_num_threads() == before


def test_fifty_thousand_points_need_no_matrix():
    """One iteration at the advertised size would take long on a CPU: the chunk rule is what bounds memory."""
    from ecgot.kernels.ot.backends import backend
    from ecgot.kernels.ot.problem import Problem

    x = torch.empty(1, 50_000, 64, device="meta")
    weights = torch.empty(1, 50_000, device="meta")
    eps = torch.empty(1, device="meta")
    assert backend(Problem(x, x, weights, weights, None, None, eps, "dot")) == "torch-streaming"  # no CPU's
