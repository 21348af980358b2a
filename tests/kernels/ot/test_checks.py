"""Bad arguments are named in one line."""

import math

import pytest
import torch

from ecgot.kernels import sinkhorn


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"x: expected \[B, points, D\], got shape \(2, 3\)"),
        (
            {"x": torch.zeros(2, 5, 4)},
            r"x and y: expected \[B, N, D\] and \[B, M, D\], got shapes \(2, 5, 4\) and \(2, 4, 3\)",
        ),
        (
            {"x": torch.zeros(2, 5, 3, dtype=torch.int64)},
            "x: expected a dense fp16, bf16, fp32 or fp64 tensor, got torch.int64",
        ),
        ({"x": [1.0]}, "x: expected a torch.Tensor, got list"),
        ({"eps": 0.0}, r"eps: expected a number from 1e-30 to 1e\+30, got 0.0"),
        ({"eps": math.nan}, "eps: expected a number .*, got nan"),
        ({"eps": 1e31}, r"eps: expected a number .*, got 1e\+31"),
        ({"x": torch.zeros(2, 5, 3).to_sparse()}, "x: expected a dense .*, got torch.sparse_coo"),
        (
            {"cost": "manhattan"},
            "cost: expected one of 'sqeuclidean', 'euclidean', 'cosine', 'dot', got 'manhattan'",
        ),
        ({"max_iter": 0}, "max_iter: expected an integer >= 1, got 0"),
        ({"tol": -1.0}, "tol: expected a number >= 0, got -1.0"),
        ({"tol": math.inf}, "tol: expected a number >= 0, got inf"),
        ({"a": torch.zeros(2, 5)}, "a: expected weights that sum to 1, got 0 in problem 0"),
        ({"a": [0.2]}, "a: expected a torch.Tensor, got list"),
        ({"x_mask": [True]}, "x_mask: expected a torch.Tensor, got list"),
        (
            {"x_mask": torch.ones(2, 5)},
            r"x_mask: expected torch.bool \(2, 5\) on cpu, got torch.float32 \(2, 5\)",
        ),
        (
            {"y_mask": torch.ones(2, 5, dtype=torch.bool)},
            r"y_mask: expected torch.bool \(2, 4\) on cpu, got torch.bool \(2, 5\)",
        ),
        ({"a": torch.ones(2, 4)}, r"a: expected floating point \(2, 5\) on cpu, got torch.float32 \(2, 4\)"),
        (
            {"a": torch.full((2, 5), 0.3)},
            "a: expected weights that sum to 1, got 1.5 in problem 0",
        ),
        (
            {"b": torch.tensor([[0.5, 0.7, -0.2, 0.0]] * 2)},
            "b: expected weights >= 0, got a negative or NaN weight",
        ),
    ],
)
def test_bad_input_is_named_in_one_line(change, message):
    arguments = {"x": torch.zeros(2, 5, 3), "y": torch.zeros(2, 4, 3), "eps": 0.1} | change
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        sinkhorn(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rho": 0.0}, "rho: expected None or a number > 0, got 0.0"),
        ({"rho": 1.0, "rho_x": 1.0}, "rho: expected it alone, or rho_x and rho_y in its place, got both"),
        ({"scaling": 1.0}, "scaling: expected None or a number > 0 and <= 0.999, got 1.0"),
        ({"scaling": 0.99999999}, "scaling: expected None or a number > 0 and <= 0.999, got 0.99999999"),
        (
            {"init": torch.zeros(2, 5)},
            r"init: expected the potential g .* \(2, 4\) on cpu, got torch.float32 \(2, 5\)",
        ),
        ({"init": [0.0]}, "init: expected a torch.Tensor, got list"),
        ({"precision": "bf16"}, "precision: expected 'fp32' or 'tf32', got 'bf16'"),
        (
            {"eps": torch.tensor([0.1])},
            r"eps: expected a number or floating point \[2\] on cpu, got torch.float32 \(1,\)",
        ),
        (
            {"eps": torch.tensor([0.1, -1.0])},
            r"eps: expected 1e-30 to 1e\+30, got a tensor with an entry outside",
        ),
        (
            {"rho": torch.tensor([0.1, 0.1], requires_grad=True)},
            "rho: expected a tensor without gradient, got one that requires it",
        ),
        ({"rho_x": torch.tensor([0.1, 0.0])}, "rho_x: expected entries > 0, got a tensor with another"),
        (
            {"rho_y": torch.ones(3)},
            r"rho_y: expected a number or floating point \[2\] on cpu, got torch.float32 \(3,\) on cpu",
        ),
        (
            {"rho": 1.0, "a": torch.full((2, 5), -1.0)},
            "a: expected weights >= 0, got a negative or NaN weight",
        ),
        (
            {"rho": 1.0, "a": torch.full((2, 5), math.inf)},
            "a: expected finite weights, got an infinite weight",
        ),
    ],
)
def test_bad_marginals_and_settings_are_named_in_one_line(change, message):
    arguments = {"x": torch.zeros(2, 5, 3), "y": torch.zeros(2, 4, 3), "eps": 0.1} | change
    with pytest.raises((ValueError, TypeError), match=message) as caught:
        sinkhorn(**arguments)
    assert "\n" not in str(caught.value)
