"""OTPlanSampler beside torchcfm's own where that is installed, and beside POT's plans where it is not."""

import warnings

import numpy as np
import ot
import pytest
import torch
from torch import Tensor

from ecgot.compat.torchcfm import OTPlanSampler, exact_plan


def batches(n: int = 12, m: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 2, 3, generator=generator), 1 + torch.randn(m, 2, 3, generator=generator)


def costs(x0: Tensor, x1: Tensor) -> np.ndarray:
    return torch.cdist(x0.flatten(1).double(), x1.flatten(1).double()).square().numpy()


@pytest.mark.parametrize("m", [12, 9])
@pytest.mark.parametrize("method", ["exact", "sinkhorn", "unbalanced"])
def test_plans_are_pots(method: str, m: int) -> None:
    x0, x1 = batches(12, m)
    sampler = OTPlanSampler(method, reg=1.0, reg_m=2.0)
    sampler.tol, sampler.max_iter = 1e-9, 20_000
    a, b, cost = ot.unif(12), ot.unif(m), costs(x0, x1)
    options = {"numItermax": 20_000, "stopThr": 1e-12}
    if method == "exact":
        wanted = ot.emd(a, b, cost)
    elif method == "sinkhorn":
        wanted = ot.sinkhorn(a, b, cost, 1.0, **options)
    else:
        wanted = ot.sinkhorn_unbalanced(a, b, cost, 1.0, 2.0, **options)
    found = sampler.get_map(x0, x1)
    assert found.dtype == np.float64
    if method == "exact":  # where several plans are best, any of them
        np.testing.assert_allclose((found * cost).sum(), (wanted * cost).sum(), rtol=1e-6)
        np.testing.assert_allclose(found.sum(0), b, atol=1e-9)
        np.testing.assert_allclose(found.sum(1), a, atol=1e-9)
    else:
        np.testing.assert_allclose(found, wanted, atol=1e-7)


def test_normalised_costs() -> None:
    x0, x1 = batches()
    sampler = OTPlanSampler("sinkhorn", reg=0.1, normalize_cost=True)
    sampler.tol = 1e-9
    cost = costs(x0, x1)
    wanted = ot.sinkhorn(ot.unif(12), ot.unif(12), cost / cost.max(), 0.1, stopThr=1e-12)
    np.testing.assert_allclose(sampler.get_map(x0, x1), wanted, atol=1e-6)


def test_sampled_pairs_follow_the_plan() -> None:
    sampler = OTPlanSampler("sinkhorn")
    plan = np.array([[0.4, 0.1], [0.0, 0.5]])
    np.random.seed(0)  # noqa: NPY002
    i, j = sampler.sample_map(plan, 20_000)
    found = np.zeros((2, 2))
    np.add.at(found, (i, j), 1 / 20_000)
    np.testing.assert_allclose(found, plan, atol=0.01)
    i, j = sampler.sample_map(np.full((3, 3), 1 / 9), 9, replace=False)
    assert len(set(zip(i, j, strict=True))) == 9


def test_pairs_keep_their_labels() -> None:
    x0, x1 = batches()
    labels = torch.arange(12)
    found = OTPlanSampler("exact").sample_plan_with_labels(x0, x1, labels, None)
    assert torch.equal(found[0], x0[found[2]])
    assert found[3] is None


def test_trajectories_follow_the_plans() -> None:
    """Populations that are one, shuffled: every trajectory stays where it is."""
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
    population = torch.stack([x, x[torch.randperm(8)], x[torch.randperm(8)]], 1)
    found = OTPlanSampler("exact").sample_trajectory(population)
    assert found.shape == (8, 3, 2)
    np.testing.assert_array_equal(found, np.repeat(x.numpy()[:, None], 3, 1))


def test_a_plan_without_mass_becomes_uniform() -> None:
    x0, x1 = batches()
    sampler = OTPlanSampler("unbalanced", reg_m=1e-3)
    with pytest.warns(UserWarning, match="plan: expected finite mass, got none"):
        plan = sampler.get_map(x0, x1 + 1e3)
    np.testing.assert_array_equal(plan, np.full((12, 12), 1 / 144))
    sampler.warn = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.get_map(x0, x1 + 1e3)


def test_exact_plan_by_hand() -> None:
    np.testing.assert_allclose(exact_plan(np.array([[0.0, 1.0, 9.0]])), [[1 / 3, 1 / 3, 1 / 3]])


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(
        ValueError, match="method: expected one of 'exact', 'sinkhorn', 'unbalanced', got 'partial'"
    ):
        OTPlanSampler("partial")


@pytest.mark.parametrize("method", ["exact", "sinkhorn", "unbalanced"])
def test_the_same_draws_as_torchcfm(method: str) -> None:
    """With one seed, the same pairs, labels and trajectories."""
    original = pytest.importorskip("torchcfm.optimal_transport", reason="torchcfm is not installed")
    x0, x1 = batches()
    labels = torch.arange(12), 100 + torch.arange(12)
    populations = torch.stack([x0, x1, x0 + x1], 1)
    drawn = []
    for kind in (OTPlanSampler, original.OTPlanSampler):
        sampler = kind(method, reg=1.0, reg_m=2.0)
        np.random.seed(3)  # noqa: NPY002
        of_batch = sampler.sample_plan_with_labels(x0, x1, *labels)
        drawn.append(
            [*of_batch, *sampler.sample_plan(x0, x1), torch.tensor(sampler.sample_trajectory(populations))]
        )
    for each, other in zip(*drawn, strict=True):
        assert torch.equal(each, other)
