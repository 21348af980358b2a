"""The loss module."""

import pytest
import torch

from ecgot.kernels import SinkhornLoss, sinkhorn
from tests.kernels.ot.problems import problem


def test_loss_module_reduces():
    tensors = problem((3, 5, 4, 3), masked=True)
    settings = {"eps": 0.2, "cost": "cosine", "max_iter": 10, "tol": 1e-5}
    values = sinkhorn(**tensors, **settings).value
    for reduction, expected in (("none", values), ("sum", values.sum()), ("mean", values.mean())):
        loss = SinkhornLoss(**settings, reduction=reduction)
        torch.testing.assert_close(loss(**tensors), expected)


def test_bad_reduction():
    with pytest.raises(ValueError, match="reduction: expected 'mean', 'sum' or 'none', got 'median'"):
        SinkhornLoss(reduction="median")


def test_loss_with_one_free_marginal():
    tensors = problem((3, 5, 4, 3), masked=True)
    expected = sinkhorn(**tensors, eps=0.2, rho_y=0.5).value.mean()
    torch.testing.assert_close(SinkhornLoss(0.2, rho_y=0.5)(**tensors), expected)
    with pytest.raises(ValueError, match="rho_x and rho_y: expected rho for both marginals with debias"):
        SinkhornLoss(0.2, rho_y=0.5, debias=True)
