"""Random problems, their fp64 oracle and the tolerances that the tests of the solver share."""

import importlib.util
import math

import torch
from torch import Tensor

from ecgot.kernels import dispatch
from ecgot.kernels.ot import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


HAS_NUMBA = importlib.util.find_spec("numba") is not None


FP64 = "numba" if DEVICE == "cpu" and HAS_NUMBA else "torch"


BACKEND = "triton" if dispatch.INTERPRETED or DEVICE == "cuda" else FP64


# (absolute value, absolute gradient), and why.
TOLERANCE = {
    torch.float64: (1e-9, 1e-6),  # the stopping tolerance of 1e-10 in the marginals
    torch.float32: (2e-5, 1e-4),  # costs of about 30 eps carry 30 * 2^-24 into every exponent
    torch.float16: (2e-2, 2e-2),  # the inputs are rounded to 2^-11
}


def problem(shape, *, seed=0, masked=False, weighted=False, dtype=torch.float32) -> dict[str, Tensor]:
    """A random problem; masked points hold NaN."""
    batch, n, m, d = shape
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *size: torch.rand(*size, generator=generator, dtype=torch.float64)  # noqa: E731
    tensors = {"x": rand(batch, n, d) - 0.5, "y": rand(batch, m, d) - 0.3}
    for points, mask, weight, count in (("x", "x_mask", "a", n), ("y", "y_mask", "b", m)):
        keep = torch.ones(batch, count, dtype=torch.bool)
        if masked:
            keep = rand(batch, count) < 0.7
            keep[:, count // 2] = True
            tensors[mask] = keep
            tensors[points] = tensors[points].masked_fill(~keep[..., None], math.nan)
        if weighted:
            w = (rand(batch, count) + 0.1) * keep
            w[:, : count // 3] = 0  # points that exist and weigh nothing
            w[:, count // 2] += 1e-3
            w = w * keep
            tensors[weight] = w / w.sum(1, keepdim=True)
    return {
        name: t.to(DEVICE, t.dtype if t.dtype == torch.bool or name in "ab" else dtype)
        for name, t in tensors.items()
    }


def oracle(tensors, *, eps, cost, **stopping):
    """The fp64 reference's values and gradients in x and y, by autograd through its iterations."""
    leaves = {
        name: t.detach().cpu().double().requires_grad_() if name in "xy" else t.cpu()
        for name, t in tensors.items()
    }
    solutions = reference.sinkhorn(**leaves, eps=eps, cost=cost, **stopping)
    value = torch.stack([s.value for s in solutions])
    grads = torch.autograd.grad(value.sum(), (leaves["x"], leaves["y"]))
    return value.detach(), grads, solutions


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual.detach().cpu().double(), expected, atol=tolerance, rtol=tolerance)


COSTS = ("sqeuclidean", "euclidean", "cosine", "dot")


MARGINALS = ({"rho_x": 0.5, "rho_y": 0.5}, {"rho_x": 0.3}, {"rho_y": 0.3})


def solved(tensors, **settings):
    """value, f and g of the fp64 reference, padded problems cropped."""
    solutions = reference.sinkhorn(**{k: t.cpu() for k, t in tensors.items()}, **settings)
    return torch.stack([s.value for s in solutions]), solutions
