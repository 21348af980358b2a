"""The warning of problems that were not solved."""

import warnings

import pytest
import torch

from ecgot.kernels import (
    SinkhornLoss,
    SinkhornWarning,
    sinkhorn,
    sinkhorn_divergence,
    sinkhorn_from_cost,
    sinkhorn_pairwise,
)
from tests.kernels.ot.problems import DEVICE, problem

pytestmark = pytest.mark.skipif(DEVICE == "cuda", reason="nothing looks at results on a GPU")
UNSOLVED = {"eps": 0.01, "max_iter": 2}


def clouds():
    tensors = problem((2, 6, 5, 4))
    return tensors["x"], tensors["y"]


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: sinkhorn(x, y, **UNSOLVED),
        lambda x, y: sinkhorn_from_cost(torch.cdist(x, y), **UNSOLVED),
        lambda x, y: sinkhorn_pairwise(x, y, **UNSOLVED),
        lambda x, y: sinkhorn_divergence(x, y, **UNSOLVED),
        lambda x, y: SinkhornLoss(**UNSOLVED)(x, y),
    ],
)
def test_a_problem_that_did_not_converge_warns_where_it_was_called(call):
    with pytest.warns(SinkhornWarning, match="sinkhorn: expected a marginal error of at most tol") as seen:
        call(*clouds())
    assert [each.filename for each in seen] == [__file__]


def test_one_place_warns_once():
    x, y = clouds()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for step in range(1, 4):
            sinkhorn(x * step, y, **UNSOLVED)
    assert len(seen) == 1


def test_solved_problems_fixed_iterations_nan_and_tracing_do_not_warn():
    x, y = clouds()
    with warnings.catch_warnings():
        warnings.simplefilter("error", SinkhornWarning)
        sinkhorn(x, y, eps=1.0)
        sinkhorn(x, y, **UNSOLVED, tol=0)
        sinkhorn(x.fill_(torch.nan), y, **UNSOLVED)
        torch.compile(lambda x: sinkhorn(x, y, **UNSOLVED).value, backend="eager", fullgraph=True)(x)


def test_an_eps_that_the_dtype_does_not_resolve_warns():
    x, y = clouds()
    with pytest.warns(SinkhornWarning, match="eps: expected more than float32 resolves at these costs"):
        sinkhorn(x, y, eps=1e-8, max_iter=20)
