"""The OT solver against oracles. Run with TRITON_INTERPRET=1 (or on a GPU) it tests the Triton kernels."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from ecgot.kernels import sinkhorn, sinkhorn_from_cost, sinkhorn_pairwise
from tests.kernels.ot.problems import BACKEND, DEVICE, FP64, TOLERANCE, close, oracle, problem

# No size is a multiple of anything; single points and single columns are in.
SHAPES = [(3, 7, 5, 3), (2, 17, 33, 19), (2, 1, 9, 40), (1, 30, 1, 1), (2, 3, 3, 35)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine"])
@pytest.mark.parametrize(("masked", "weighted"), [(False, False), (True, False), (False, True), (True, True)])
def test_equals_fp64_reference(shape, cost, masked, weighted, poisoned_empty):
    tensors = problem(shape, masked=masked, weighted=weighted)
    value, grads, solutions = oracle(tensors, eps=0.2, cost=cost)
    x, y = tensors["x"].requires_grad_(), tensors["y"].requires_grad_()
    out = sinkhorn(**tensors, eps=0.2, cost=cost, tol=1e-6, max_iter=5000)
    assert out.backend == BACKEND
    value_tolerance, grad_tolerance = TOLERANCE[torch.float32]
    close(out.value, value, value_tolerance)
    out.value.sum().backward()
    close(x.grad, grads[0], grad_tolerance)
    close(y.grad, grads[1], grad_tolerance)
    plan = out.plan().cpu().double()
    for index, solution in enumerate(solutions):
        keep_x = tensors["x_mask"][index].cpu() if masked else torch.ones(shape[1], dtype=torch.bool)
        keep_y = tensors["y_mask"][index].cpu() if masked else torch.ones(shape[2], dtype=torch.bool)
        close(plan[index][keep_x][:, keep_y], solution.plan.detach(), grad_tolerance)
        assert plan[index][~keep_x].abs().sum() == 0
        assert plan[index][:, ~keep_y].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_dtypes(dtype):
    tensors = problem((3, 11, 6, 9), masked=True, dtype=dtype)
    value, grads, _ = oracle(tensors, eps=0.2, cost="sqeuclidean")
    tensors["x"].requires_grad_()
    tol = 1e-10 if dtype == torch.float64 else 1e-5
    out = sinkhorn(**tensors, eps=0.2, tol=tol, max_iter=20_000)
    assert out.value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert out.backend == (BACKEND if dtype == torch.float16 else FP64)
    close(out.value, value, TOLERANCE[dtype][0])
    (grad,) = torch.autograd.grad(out.value.sum(), tensors["x"])
    assert grad.dtype == dtype
    close(grad, grads[0], TOLERANCE[dtype][1])


@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine"])
def test_bf16_points_are_solved_in_fp32(cost):
    tensors = problem((2, 8, 5, 6), dtype=torch.bfloat16)
    value, _, _ = oracle(tensors, eps=0.3, cost=cost)
    out = sinkhorn(**tensors, eps=0.3, cost=cost, tol=1e-6)
    close(out.value, value, TOLERANCE[torch.float32][0])  # the oracle sees the same rounded inputs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_rounded_to_half_still_converge(dtype):
    tensors = problem((3, 9, 5, 4), weighted=True)
    out = sinkhorn(**tensors | {"a": tensors["a"].to(dtype), "b": tensors["b"].to(dtype)}, eps=0.5)
    assert out.converged.all()
    close(out.value, oracle(tensors, eps=0.5, cost="sqeuclidean")[0], 1e-2)


def test_the_gradient_at_a_point_without_weight_is_its_potential():
    tensors = problem((1, 6, 5, 4), seed=3)
    a = torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0, 0.0]], device=DEVICE, requires_grad=True)
    out = sinkhorn(**tensors, a=a, eps=0.5)
    (grad,) = torch.autograd.grad(out.value.sum(), a)
    difference = grad - out.f  # a constant: potentials are determined up to one
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference))


def test_subnormal_weights_count_as_none():
    tensors = problem((1, 6, 5, 4), seed=3)
    a = torch.tensor([[0.5, 0.5, 1e-42, 0.0, 1e-44, 0.0]], device=DEVICE)
    out = sinkhorn(**tensors, a=a, eps=1e-3, max_iter=1)
    none = sinkhorn(**tensors, a=torch.tensor([[0.5, 0.5, 0, 0, 0, 0]], device=DEVICE), eps=1e-3, max_iter=1)
    assert torch.isfinite(out.marginal_error).all()
    torch.testing.assert_close(out.value, none.value)


@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine"])
def test_gradients_by_finite_differences(cost):
    tensors = problem((2, 5, 4, 3), masked=True, dtype=torch.float64)
    tensors = {name: t.nan_to_num(0.0) if name in "xy" else t for name, t in tensors.items()}
    logits_a = torch.randn(2, 5, dtype=torch.float64, device=DEVICE, requires_grad=True)
    logits_b = torch.randn(2, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def value(x, y, logits_a, logits_b):
        # Only changes that keep the mass matter; softmax makes no others.
        a = logits_a.masked_fill(~tensors["x_mask"], -math.inf).softmax(1)
        b = logits_b.masked_fill(~tensors["y_mask"], -math.inf).softmax(1)
        masks = {"x_mask": tensors["x_mask"], "y_mask": tensors["y_mask"]}
        return sinkhorn(x, y, a=a, b=b, eps=0.3, cost=cost, tol=1e-13, max_iter=50_000, **masks).value

    x, y = tensors["x"].requires_grad_(), tensors["y"].requires_grad_()
    assert torch.autograd.gradcheck(value, (x, y, logits_a, logits_b), eps=1e-5, atol=1e-6)


def test_potentials_solve_the_dual():
    tensors = problem((2, 9, 12, 4), weighted=True)
    out = sinkhorn(**tensors, eps=0.2, tol=1e-6, max_iter=5000)
    plan = out.plan()
    torch.testing.assert_close(plan.sum(2), tensors["a"].float(), atol=2e-6, rtol=0)
    torch.testing.assert_close(plan.sum(1), tensors["b"].float(), atol=2e-6, rtol=0)
    cost = torch.cdist(tensors["x"].double(), tensors["y"].double()).square()
    joint = tensors["a"][:, :, None] * tensors["b"][:, None, :]
    kl = torch.special.xlogy(plan.double(), plan.double() / joint.clamp_min(1e-300)).sum((1, 2))
    primal = (plan * cost).sum((1, 2)) + 0.2 * kl
    torch.testing.assert_close(out.value.double(), primal, atol=2e-5, rtol=0)


def test_equals_pot():
    ot = pytest.importorskip("ot")
    tensors = problem((3, 13, 8, 5), weighted=True)
    out = sinkhorn(**tensors, eps=0.15, tol=1e-6, max_iter=5000)
    for index in range(3):
        x, y = tensors["x"][index].cpu().double().numpy(), tensors["y"][index].cpu().double().numpy()
        a, b = tensors["a"][index].cpu().numpy(), tensors["b"][index].cpu().numpy()
        plan = ot.sinkhorn(
            a, b, ot.dist(x, y), reg=0.15, method="sinkhorn_log", stopThr=1e-12, numItermax=20_000, warn=False
        )
        np.testing.assert_allclose(out.plan()[index].cpu().numpy(), plan, atol=1e-5)


def test_equals_geomloss():
    geomloss = pytest.importorskip("geomloss")
    tensors = problem((3, 13, 8, 5))
    eps = 0.2
    # geomloss's cost is half the squared distance, its eps is blur**2.
    peer = geomloss.SamplesLoss("sinkhorn", p=2, blur=math.sqrt(eps / 2), scaling=0.99, debias=False)
    expected = 2 * peer(tensors["x"].double(), tensors["y"].double())
    out = sinkhorn(**tensors, eps=eps, tol=1e-6)
    close(out.value, expected.cpu(), 1e-4)


def test_single_points_cost_their_distance():
    x = torch.tensor([[[1.0, 2.0]]], device=DEVICE)
    y = torch.tensor([[[4.0, 6.0]]], device=DEVICE)
    out = sinkhorn(x, y, eps=0.1)
    assert out.value.item() == pytest.approx(25.0)
    assert out.converged.all()
    assert sinkhorn(x, y, eps=0.1, cost="cosine").value.item() == pytest.approx(
        1 - 16 / (math.sqrt(5) * math.sqrt(52)), abs=1e-6
    )


def test_small_eps_gives_the_optimal_assignment():
    tensors = problem((2, 8, 8, 2), seed=3)
    eps = 0.02
    out = sinkhorn(**tensors, eps=eps, tol=1e-4, max_iter=1000)
    assert out.converged.all()
    cost = torch.cdist(tensors["x"].double(), tensors["y"].double()).square().cpu().numpy()
    exact = [c[linear_sum_assignment(c)].mean() for c in cost]
    # The entropic cost exceeds the exact one by at most eps KL(P | a x b) <= eps log n.
    gap = out.value.cpu().numpy() - np.array(exact)
    assert np.all(gap > -1e-4)
    assert np.all(gap < eps * math.log(8) + 1e-4)


def test_translation_adds_the_squared_shift():
    x = problem((1, 20, 20, 3))["x"]
    shift = torch.tensor([3.0, -1.0, 2.0], device=DEVICE)
    centred = sinkhorn(x, x, eps=0.05, tol=1e-6, max_iter=5000).value
    moved = sinkhorn(x, x + shift, eps=0.05, tol=1e-6, max_iter=5000).value
    assert (moved - centred).item() == pytest.approx(14.0, abs=1e-4)


def test_symmetric_in_its_arguments():
    tensors = problem((2, 9, 14, 4), weighted=True)
    forth = sinkhorn(tensors["x"], tensors["y"], a=tensors["a"], b=tensors["b"], eps=0.2, tol=1e-6)
    back = sinkhorn(tensors["y"], tensors["x"], a=tensors["b"], b=tensors["a"], eps=0.2, tol=1e-6)
    torch.testing.assert_close(forth.value, back.value, atol=1e-5, rtol=0)


def test_problems_do_not_see_their_batch_mates():
    tensors = problem((3, 10, 13, 4), masked=True, seed=1)
    tensors["x"][2] *= 4  # needs many more iterations than the others
    together = sinkhorn(**tensors, eps=0.1, tol=1e-5, max_iter=3000)
    assert len(set(together.iterations.tolist())) > 1
    for index in range(3):
        alone = sinkhorn(
            **{name: t[index : index + 1] for name, t in tensors.items()}, eps=0.1, tol=1e-5, max_iter=3000
        )
        assert abs(int(alone.iterations) - int(together.iterations[index])) <= 1  # rounding at the threshold
        torch.testing.assert_close(alone.value[0], together.value[index], atol=1e-5, rtol=1e-5)


def test_marginal_error_is_that_of_the_plan_and_convergence_is_said():
    tensors = problem((3, 10, 12, 3))
    out = sinkhorn(**tensors, eps=0.02, tol=1e-6, max_iter=3)
    plan = out.plan()
    error = (plan.sum(2) - 1 / 10).abs().sum(1)
    torch.testing.assert_close(out.marginal_error, error, atol=1e-5, rtol=1e-3)
    assert not out.converged.any()
    assert out.iterations.tolist() == [3, 3, 3]
    torch.testing.assert_close(plan.sum(1), torch.full((3, 12), 1 / 12, device=DEVICE), atol=1e-6, rtol=0)


@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine"])
def test_tiny_eps_stays_finite(cost):
    tensors = problem((2, 9, 7, 5), weighted=True)
    tensors["x"].requires_grad_()
    out = sinkhorn(**tensors, eps=1e-4, cost=cost, max_iter=40)
    (grad,) = torch.autograd.grad(out.value.sum(), tensors["x"])
    for tensor in (out.value, out.f, out.g, out.marginal_error, out.plan(), grad):
        assert torch.isfinite(tensor).all()


def test_far_from_the_origin_does_not_cancel():
    tensors = problem((2, 9, 7, 5))
    near = sinkhorn(**tensors, eps=0.1).value
    far = sinkhorn(tensors["x"] + 1000, tensors["y"] + 1000, eps=0.1).value
    torch.testing.assert_close(near, far, atol=2e-3, rtol=0)  # the inputs themselves are rounded to 6e-5


@pytest.mark.parametrize("weighted", [False, True])
def test_clouds_far_apart_are_solved_as_near_ones(weighted):
    tensors = problem((2, 9, 7, 16), masked=True, weighted=weighted)
    tensors["y"] = tensors["y"] + 300
    # Rounding in costs of 10^6 keeps the reference, which centres nothing, from its own tolerance.
    value, grads, solutions = oracle(tensors, eps=0.5, cost="sqeuclidean", max_iter=100)
    x = tensors["x"].requires_grad_()
    out = sinkhorn(**tensors, eps=0.5, tol=1e-5, max_iter=5000)
    assert out.converged.all()
    torch.testing.assert_close(out.value.cpu().double(), value, rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(out.value.sum(), x)
    torch.testing.assert_close(grad.cpu().double(), grads[0], rtol=1e-5, atol=1e-4)
    plan = out.plan().cpu().double()
    for index, solution in enumerate(solutions):
        kept = plan[index][tensors["x_mask"][index].cpu()][:, tensors["y_mask"][index].cpu()]
        close(kept, solution.plan.detach(), 1e-3)


def test_potentials_of_clouds_far_apart_solve_the_dual():
    tensors = problem((2, 6, 5, 3), weighted=True, dtype=torch.float64)
    tensors["y"] = tensors["y"] + 20
    a = tensors["a"].requires_grad_()
    out = sinkhorn(**tensors, eps=0.5, tol=1e-12, max_iter=10_000)
    dual = (a * out.f).sum(1) + (tensors["b"] * out.g).sum(1)
    torch.testing.assert_close(out.value, dual)
    (grad,) = torch.autograd.grad(out.value.sum(), a)
    difference = grad - out.f  # a constant: potentials are determined up to one
    torch.testing.assert_close(difference, difference[:, :1].expand_as(difference), atol=1e-9, rtol=0)
    cost = torch.cdist(tensors["x"], tensors["y"]).square()
    exponent = (out.f[:, :, None] + out.g[:, None, :] - cost) / 0.5
    torch.testing.assert_close(
        a[:, :, None] * tensors["b"][:, None, :] * exponent.exp(), out.plan(), atol=1e-9, rtol=0
    )


def test_a_point_without_weight_does_not_matter_wherever_it_is():
    tensors = problem((2, 9, 7, 5), weighted=True)
    near = sinkhorn(**tensors, eps=0.1, tol=1e-6, max_iter=5000)
    tensors["x"] = tensors["x"].index_fill(1, torch.tensor([0], device=DEVICE), 1e4)
    far = sinkhorn(**tensors, eps=0.1, tol=1e-6, max_iter=5000)
    torch.testing.assert_close(near.value, far.value, atol=1e-6, rtol=0)
    torch.testing.assert_close(near.plan(), far.plan(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("scale", "right"), [(1e-15, True), (1e15, True), (1e30, False)])
def test_cosine_of_short_and_long_vectors(scale, right):
    tensors = problem((2, 6, 5, 4))
    plain = sinkhorn(**tensors, eps=0.2, cost="cosine")
    x = (tensors["x"] * scale).requires_grad_()
    out = sinkhorn(x, tensors["y"], eps=0.2, cost="cosine")
    assert out.converged.tolist() == [right] * 2  # no answer is better than a wrong one
    if right:
        torch.testing.assert_close(out.value, plain.value)
        (grad,) = torch.autograd.grad(out.value.sum(), x)
        expected = torch.autograd.grad(
            sinkhorn(tensors["x"].requires_grad_(), tensors["y"], eps=0.2, cost="cosine").value.sum(),
            tensors["x"],
        )[0]
        torch.testing.assert_close(grad * scale, expected, rtol=1e-4, atol=1e-6)


def test_weights_that_sum_to_one_but_for_rounding_converge():
    tensors = problem((2, 6, 5, 4), weighted=True)
    a = tensors["a"].float() * 1.0005
    out = sinkhorn(**tensors | {"a": a}, eps=0.3, tol=1e-6, max_iter=5000)
    assert out.converged.all()
    torch.testing.assert_close(out.value, sinkhorn(**tensors, eps=0.3, tol=1e-6, max_iter=5000).value)


def test_numbers_of_numpy_are_welcome():
    tensors = problem((2, 6, 5, 4))
    out = sinkhorn(**tensors, eps=np.float32(0.25), max_iter=np.int64(7), tol=np.float64(0))
    assert out.iterations.tolist() == [7, 7]
    torch.testing.assert_close(out.value, sinkhorn(**tensors, eps=0.25, max_iter=7, tol=0).value)


@pytest.mark.parametrize("seed", range(12))
def test_random_problems_equal_the_reference(seed):
    rng = np.random.default_rng(seed)
    shape = (2, *(int(n) for n in rng.integers(1, 40, 2)), int(rng.integers(1, 70)))
    tensors = problem(shape, seed=seed, masked=True, weighted=True)
    # Masks and weights on none, one or both sides.
    names = [name for name in ("x_mask", "y_mask") if rng.random() < 0.4]
    for name in names:
        points, weight, count = ("x", "a", shape[1]) if name == "x_mask" else ("y", "b", shape[2])
        tensors[points] = tensors[points].nan_to_num(0.1)
        del tensors[name]
        tensors[weight] = torch.full((2, count), 1 / count, dtype=torch.float64, device=DEVICE)
    for name in ("a", "b"):
        if rng.random() < 0.4:
            del tensors[name]
    cost, eps = str(rng.choice(["sqeuclidean", "cosine"])), float(rng.uniform(0.2, 1.0))
    value, grads, _ = oracle(tensors, eps=eps, cost=cost)
    tensors["x"].requires_grad_()
    out = sinkhorn(**tensors, eps=eps, cost=cost, tol=1e-6, max_iter=5000)
    close(out.value, value, TOLERANCE[torch.float32][0])
    (grad,) = torch.autograd.grad(out.value.sum(), tensors["x"])
    close(grad, grads[0], TOLERANCE[torch.float32][1])


@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine"])
def test_empty_problem_is_zero(cost, poisoned_empty):
    tensors = problem((3, 6, 5, 4), masked=True)
    tensors["x_mask"][1] = False
    tensors["x"].requires_grad_()
    out = sinkhorn(**tensors, eps=0.1, cost=cost)
    assert out.value[1] == 0
    assert out.iterations[1] == 0
    assert out.converged[1]
    assert out.f[1].abs().sum() + out.g[1].abs().sum() + out.plan()[1].sum() == 0
    (grad,) = torch.autograd.grad(out.value.sum(), tensors["x"])
    assert torch.isfinite(grad).all()
    assert grad[1].abs().sum() == 0


@pytest.mark.parametrize("shape", [(0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 2)])
def test_empty_dimensions(shape):
    tensors = (
        problem(shape)
        if shape[0] == 0
        else {
            "x": torch.zeros(*shape[:2], shape[3], device=DEVICE),
            "y": torch.zeros(shape[0], shape[2], shape[3], device=DEVICE),
        }
    )
    tensors["x"].requires_grad_()
    out = sinkhorn(**tensors, eps=0.1)
    assert out.value.shape == (shape[0],)
    assert out.value.abs().sum() == 0
    out.value.sum().backward()
    assert tensors["x"].grad.shape == tensors["x"].shape


def test_zero_vector_has_cosine_distance_one_and_no_gradient():
    x = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]], device=DEVICE, requires_grad=True)
    y = torch.tensor([[[0.0, 1.0]]], device=DEVICE)
    out = sinkhorn(x, y, eps=0.1, cost="cosine")
    assert out.value.item() == pytest.approx(1.0)
    (grad,) = torch.autograd.grad(out.value.sum(), x)
    assert grad[0, 0].tolist() == [0, 0]
    assert grad[0, 1].tolist() == pytest.approx([0, -0.5])


def test_strided_inputs():
    tensors = problem((3, 8, 6, 10))
    x = tensors["x"].transpose(1, 2).contiguous().transpose(1, 2)  # columns outermost
    y = torch.stack([tensors["y"], tensors["y"]], dim=-1)[..., 0]  # every second element
    mask = torch.rand(8, 3, device=DEVICE).T < 0.8
    mask[:, 0] = True
    assert not x.is_contiguous()
    assert not y.is_contiguous()
    assert not mask.is_contiguous()
    x.requires_grad_()
    strided = sinkhorn(x, y, eps=0.1, x_mask=mask)
    plain = sinkhorn(tensors["x"].requires_grad_(), tensors["y"], eps=0.1, x_mask=mask.contiguous())
    torch.testing.assert_close(strided.value, plain.value)
    weight = torch.tensor([1.0, -2.0, 0.5], device=DEVICE)
    (grad,) = torch.autograd.grad(strided.value @ weight, x)
    (expected,) = torch.autograd.grad(plain.value @ weight, tensors["x"])
    torch.testing.assert_close(grad, expected)


def test_nan_input_is_not_called_converged():
    tensors = problem((2, 5, 4, 3))
    tensors["x"][1, 2, 0] = math.nan
    out = sinkhorn(**tensors, eps=0.1)
    assert out.converged.tolist() == [True, False]
    assert torch.isfinite(out.value[0])
    assert out.value[1].isnan()


@pytest.mark.parametrize("optional", [False, True])
def test_opcheck(optional):
    tensors = problem((2, 5, 4, 3), masked=optional, weighted=optional)
    tensors = {name: t.nan_to_num(0.0) if name in "xy" else t for name, t in tensors.items()}
    x, y = tensors["x"].requires_grad_(), tensors["y"].requires_grad_()
    a, b = (tensors.get(name, torch.full(size, 1 / size[1])) for name, size in (("a", (2, 5)), ("b", (2, 4))))
    a, b = a.float().requires_grad_(), b.float().requires_grad_()
    x_centre, y_centre = (x.detach().mean(1), y.detach().mean(1)) if optional else (None, None)
    init = torch.zeros(2, 4, device=DEVICE) if optional else None
    eps = torch.tensor([0.2, 0.3], device=DEVICE)
    rho = torch.tensor([1.0, math.inf], device=DEVICE) if optional else None
    kind = ("sqeuclidean", False, "fp32")
    args = (x, y, a.to(DEVICE), b.to(DEVICE), x_centre, y_centre, eps, rho, rho)
    start = (*args[:4], *args[6:], init)
    torch.library.opcheck(torch.ops.ecgot.sinkhorn.default, (*start, *kind, 5, 1e-4, 0.5, True))
    _, f, g, *_, kept = torch.ops.ecgot.sinkhorn(*start, *kind, 5, 1e-4, 0.0, True)
    f, g = f.detach(), g.detach()
    with torch.no_grad():
        args = tuple(None if t is None else t.detach() for t in args)
        torch.library.opcheck(
            torch.ops.ecgot.sinkhorn_pull.default,
            (*args, f, g, torch.ones(2, device=DEVICE), None, None, kept.detach(), *kind),
        )
        torch.library.opcheck(
            torch.ops.ecgot.sinkhorn_implicit.default,
            (*args, f, g, torch.ones_like(f) / f.shape[1], torch.ones_like(g) / g.shape[1], *kind),
        )


@pytest.mark.parametrize("masked", [False, True])
def test_compiles_whole(masked):
    tensors = problem((2, 5, 4, 3), masked=masked)

    def step(x, y, masks):
        out = sinkhorn(x * 2, y, eps=0.2, **masks)
        return out.value.sum() + out.marginal_error.sum(), out.converged

    masks = {name: t for name, t in tensors.items() if "mask" in name}
    x = tensors["x"].requires_grad_()
    expected, _ = step(x, tensors["y"], masks)
    (expected_grad,) = torch.autograd.grad(expected, x)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    value, converged = compiled(x, tensors["y"], masks)
    (grad,) = torch.autograd.grad(value, x)
    assert converged.all()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_output_object_leaves_a_compiled_function():
    tensors = problem((2, 5, 4, 3))
    compiled = torch.compile(lambda x, y: sinkhorn(x, y, eps=0.2), fullgraph=True, backend="aot_eager")
    out = compiled(tensors["x"], tensors["y"])
    torch.testing.assert_close(out.plan().sum((1, 2)), torch.ones(2, device=DEVICE))


def test_forward_mode_is_refused_not_wrong():
    tensors = problem((1, 3, 3, 2))
    with pytest.raises(RuntimeError, match="x: expected no tangent"):
        torch.func.jvp(lambda x: sinkhorn(x, tensors["y"], eps=0.2).value, (tensors["x"],), (tensors["x"],))


def test_eps_may_vary_in_a_compiled_function():
    tensors = problem((2, 5, 4, 3))
    compiled = torch.compile(
        lambda eps: sinkhorn(**tensors, eps=eps).value, fullgraph=True, backend="aot_eager"
    )
    for eps in (0.5, 0.3, 0.2):
        torch.testing.assert_close(compiled(eps), sinkhorn(**tensors, eps=eps).value)


def test_autocast_solves_in_fp32():
    tensors = problem((2, 5, 4, 3))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = sinkhorn(**tensors, eps=0.2)
    torch.testing.assert_close(out.value, sinkhorn(**tensors, eps=0.2).value)


def test_a_cost_is_shared_by_problems_with_their_own_weights():
    cost = torch.rand(5, 4, device=DEVICE, requires_grad=True)
    a = torch.rand(3, 5, device=DEVICE)
    a = a / a.sum(1, keepdim=True)
    out = sinkhorn_from_cost(cost, eps=0.2, a=a, tol=1e-6)
    copied = cost.detach().repeat(3, 1, 1).requires_grad_()
    expected = sinkhorn_from_cost(copied, eps=0.2, a=a, tol=1e-6)
    torch.testing.assert_close(out.value, expected.value)
    (grad,) = torch.autograd.grad(out.value.sum(), cost)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.value.sum(), copied)[0].sum(0))
    assert sinkhorn_from_cost(cost, eps=0.2).value.shape == (1,)
    assert out._problem.x.untyped_storage().nbytes() == cost.untyped_storage().nbytes()


@pytest.mark.parametrize("rho", [None, 0.7])
def test_eps_has_a_gradient(rho):
    tensors = problem((2, 6, 5, 3), masked=True, weighted=True)
    eps = torch.tensor([0.3, 0.6], device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(
        sinkhorn(**tensors, eps=eps, rho=rho, tol=1e-6, max_iter=5000).value.sum(), eps
    )
    tensors = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}

    def value(eps):
        return sinkhorn(**tensors, eps=eps, rho=rho, tol=1e-12, max_iter=50_000).value

    step, exact = 1e-4, eps.detach().double()
    torch.testing.assert_close(
        grad.double(), (value(exact + step) - value(exact - step)) / (2 * step), rtol=1e-3, atol=1e-4
    )
    with pytest.raises(ValueError, match="eps: expected a number without gradient"):
        sinkhorn_pairwise(tensors["x"], tensors["y"], eps=eps[0])
