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
