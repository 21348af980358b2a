"""POT's costs between points, and uniform weights."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ecgot.compat.pot.arrays import Arrays
from ecgot.compat.pot.missing import refuse_others

__all__ = ["dist", "unif"]
__getattr__ = refuse_others(__name__, __all__)

METRICS = ("sqeuclidean", "euclidean", "cosine", "cityblock", "minkowski", "chebyshev")


def unif(n: int, type_as: Any = None) -> Any:
    """Uniform weights [n] with sum 1, like ``type_as``; of NumPy without it."""
    if isinstance(type_as, Tensor):
        return torch.full((n,), 1 / n, dtype=type_as.dtype, device=type_as.device)
    return np.full((n,), 1 / n, dtype=None if type_as is None else np.asarray(type_as).dtype)


def dist(
    x1: Any,
    x2: Any = None,
    metric: str = "sqeuclidean",
    p: float = 2,
    w: Any = None,
    backend: str = "auto",
    nx: Any = None,
    use_tensor: bool = False,
) -> Any:
    """``ot.dist``: costs [N, M] between points [N, D] and [M, D].

    Args:
        x1, x2: points; x1 again where x2 is None.
        metric: one of ``METRICS``.
        p, w: of "minkowski": its order, and weights of the dimensions.
        backend, nx, use_tensor: taken, and without effect.
    """
    arrays = Arrays(x1, x2)
    x, y = points(arrays, ("x1", "x2"), x1, x2, "[N, D]")
    weights = None if w is None else arrays.tensor(w, x.dtype)
    return arrays.back(costs(x[None], y[None], metric, p, weights)[0])


def points(arrays: Arrays, names: tuple[str, str], x: Any, y: Any, sizes: str) -> tuple[Tensor, Tensor]:
    """Points x and y, x again for None, of the ``sizes`` that are written so, and of one dimension D."""
    x = arrays.shaped(names[0], x, f"points {sizes}")
    y = x if y is None else arrays.shaped(names[1], y, f"points {sizes}")
    batches = zip(x.shape[:-2], y.shape[:-2], strict=True)
    if x.shape[-1] != y.shape[-1] or any(one != other and 1 not in (one, other) for one, other in batches):
        raise ValueError(
            f"{names[0]} and {names[1]}: expected points {sizes} that differ in nothing but N, "
            f"got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    return x, y


def costs(x: Tensor, y: Tensor, metric: str, p: float = 2, w: Tensor | None = None) -> Tensor:
    """[B, N, M] of points [B, N, D] and [B, M, D]; one of ``METRICS``."""
    if metric == "cosine":
        return 1 - _unit(x) @ _unit(y).mT
    if metric == "sqeuclidean":
        # Of differences, not of products: nothing cancels, and equal points are at distance 0.
        square = (x[:, :, None] - y[:, None]).square().sum(3) if x.shape[2] <= 3 else None
        return _expanded_square(x, y) if square is None else square
    orders = {"euclidean": 2.0, "cityblock": 1.0, "minkowski": float(p), "chebyshev": float("inf")}
    if metric not in orders:
        raise ValueError(f"metric: expected one of {', '.join(map(repr, METRICS))}, got {metric!r}")
    if metric == "minkowski" and w is not None:
        x, y = x * w ** (1 / p), y * w ** (1 / p)
    return torch.cdist(x, y, p=orders[metric], compute_mode="donot_use_mm_for_euclid_dist")


def _expanded_square(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances by one product; each cloud moved by the mean of y, which keeps them small."""
    centre = y.detach().mean(1, keepdim=True)
    x, y = x - centre, y - centre
    return (x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None] - 2 * x @ y.mT).clamp_min(0)


def _unit(points: Tensor) -> Tensor:
    return points / points.norm(dim=2, keepdim=True)
