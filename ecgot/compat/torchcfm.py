"""torchcfm's ``OTPlanSampler``: pairs of a mini-batch drawn from a transport plan, for flow matching.

Source: Tong et al. 2023, "Improving and generalizing flow-based generative models with minibatch optimal
transport".
"""

import warnings
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment, linprog
from scipy.sparse import coo_array
from torch import Tensor

from ecgot.kernels import sinkhorn_from_cost

METHODS = ("exact", "sinkhorn", "unbalanced")


class OTPlanSampler:
    """``torchcfm.optimal_transport.OTPlanSampler``, without POT.

    Args:
        method: "exact" (SciPy's assignment; a linear program between batches of different sizes), "sinkhorn"
            or "unbalanced". For "partial" use torchcfm itself.
        reg: eps of "sinkhorn" and "unbalanced", in units of the squared distance.
        reg_m: rho of "unbalanced".
        normalize_cost: divide the costs by the largest.
        warn: whether to warn where the plan has no mass and a uniform one takes its place.
        num_threads: taken, and without effect.

    Attributes:
        max_iter, tol: of :func:`ecgot.sinkhorn`; set them on the class or on an instance.

    Draws from NumPy's global generator, as the original does: with one seed and one plan, one sample.

    >>> x = torch.tensor([[0.0, 0.0], [5.0, 5.0]])
    >>> OTPlanSampler("exact").get_map(x, x[[1, 0]] + 1.0).tolist()
    [[0.0, 0.5], [0.5, 0.0]]
    """

    max_iter: int = 1000
    tol: float = 1e-6

    def __init__(
        self,
        method: str,
        reg: float = 0.05,
        reg_m: float = 1.0,
        normalize_cost: bool = False,
        num_threads: int | str = 1,
        warn: bool = True,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(map(repr, METHODS))}, got {method!r}")
        self.method, self.reg, self.reg_m = method, reg, reg_m
        self.normalize_cost, self.warn = normalize_cost, warn

    def get_map(self, x0: Tensor, x1: Tensor) -> np.ndarray:
        """The plan [N, M] between samples [N, ...] and [M, ...], both of uniform weights, in fp64."""
        x0, x1 = x0.detach().flatten(1), x1.detach().flatten(1)
        cost = torch.cdist(x0, x1).square()
        if self.normalize_cost:
            cost = cost / cost.max()
        plan = exact_plan(cost.cpu().numpy()) if self.method == "exact" else self._entropic_plan(cost)
        if not np.isfinite(plan).all() or plan.sum() < 1e-8:
            if self.warn:
                warnings.warn("plan: expected finite mass, got none; a uniform plan is used", stacklevel=2)
            plan = np.full(plan.shape, 1 / plan.size)
        return plan

    def _entropic_plan(self, cost: Tensor) -> np.ndarray:
        rho = self.reg_m if self.method == "unbalanced" else None
        settings: dict[str, Any] = {"eps": self.reg, "rho": rho, "max_iter": self.max_iter, "tol": self.tol}
        # In fp64: costs far above eps leave an fp32 plan few digits, and it is what is sampled from.
        return sinkhorn_from_cost(cost.double()[None], **settings).plan()[0].cpu().numpy()

    def sample_map(
        self, pi: np.ndarray, batch_size: int, replace: bool = True
    ) -> tuple[np.ndarray, np.ndarray]:
        """Indices i and j of ``batch_size`` pairs drawn from a plan [N, M]."""
        p = pi.flatten()
        choices = np.random.choice(p.size, p=p / p.sum(), size=batch_size, replace=replace)  # noqa: NPY002
        i, j = np.divmod(choices, pi.shape[1])
        return i, j

    def sample_plan(self, x0: Tensor, x1: Tensor, replace: bool = True) -> tuple[Tensor, Tensor]:
        """N pairs drawn from the plan between samples x0 [N, ...] and x1 [M, ...]."""
        i, j = self.sample_map(self.get_map(x0, x1), x0.shape[0], replace=replace)
        return x0[i], x1[j]

    def sample_plan_with_labels(
        self,
        x0: Tensor,
        x1: Tensor,
        y0: Tensor | None = None,
        y1: Tensor | None = None,
        replace: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """:meth:`sample_plan` with the pairs' labels, None for labels that are not given."""
        i, j = self.sample_map(self.get_map(x0, x1), x0.shape[0], replace=replace)
        return x0[i], x1[j], y0[i] if y0 is not None else None, y1[j] if y1 is not None else None

    def sample_trajectory(self, X: Tensor) -> np.ndarray:
        """N trajectories [N, times, ...] through populations [N, times, ...], from one plan to the next."""
        plans = [self.get_map(X[:, t], X[:, t + 1]) for t in range(X.shape[1] - 1)]
        indices = [np.arange(X.shape[0])]
        for pi in plans:
            rows = pi[indices[-1]]
            drawn = [np.random.choice(pi.shape[1], p=row / row.sum()) for row in rows]  # noqa: NPY002
            indices.append(np.array(drawn))
        return np.stack([X[:, t][index] for t, index in enumerate(indices)], axis=1)


def exact_plan(cost: np.ndarray) -> np.ndarray:
    """The plan [N, M] of least cost between uniform weights."""
    n, m = cost.shape
    if n == m:
        plan = np.zeros((n, m))
        plan[linear_sum_assignment(cost)] = 1 / n
        return plan
    cells = np.arange(n * m)
    rows = np.concatenate([cells // m, n + cells % m])
    sums = coo_array((np.ones(2 * n * m), (rows, np.tile(cells, 2))))
    wanted = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    found = linprog(cost.flatten(), A_eq=sums.tocsr(), b_eq=wanted)  # type: ignore[call-overload]
    return found.x.reshape(n, m)
