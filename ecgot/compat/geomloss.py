"""geomloss's ``SamplesLoss``: the Sinkhorn divergence between samples, with blur, reach and half costs.

geomloss writes eps = blur^p and rho = reach^p in units of its own cost, which for p = 2 is half the squared
distance. With the squared distance itself, eps and rho are twice as much, and so is the value.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ecgot.kernels import sinkhorn, sinkhorn_divergence, sinkhorn_from_cost
from ecgot.kernels.ot.checks import MAX_SCALING
from ecgot.kernels.ot.divergence import solve_symmetric
from ecgot.kernels.ot.outputs import SinkhornOutput

BACKENDS = ("auto", "tensorized", "online", "multiscale")
MIN_SCALING = 0.8  # what falls faster only has to be made up for by iterations
# The formulas that geomloss itself gives to KeOps.
FORMULAS = {"Norm2(X-Y)": 1, "(SqDist(X,Y) / IntCst(2))": 2}
Cost = Callable[[Tensor, Tensor], Tensor]
Solver = Callable[..., SinkhornOutput]


def _called(solver: Solver) -> SinkhornOutput:
    return solver()


class SamplesLoss(torch.nn.Module):
    """``geomloss.SamplesLoss`` with ``loss="sinkhorn"``, solved to a marginal error of ``tol``.

    Args:
        loss: "sinkhorn"; for kernel norms and the Hausdorff distance use geomloss.
        p: 1 for the distance, 2 for half the squared distance.
        blur: the length below which nothing is resolved; eps = blur^p.
        reach: the length beyond which mass is rather lost than moved; rho = reach^p. None keeps the
            marginals.
        scaling: factor of the blur per step of annealing; at least ``MIN_SCALING`` is used. Unlike geomloss
            we go on until the problem is solved: nearer to 1 is no more exact.
        cost: a function of x [B, N, D] and y [B, M, D] that returns costs [B, N, M], in place of p's.
        debias: whether to subtract half of each cloud's transport to itself.
        potentials: return potentials F and G in place of the loss.
        diameter, truncate, kernel, cluster_scale, verbose, backend: taken, and without effect: they choose
            how geomloss computes, not what.

    Attributes:
        max_iter, tol: most iterations of each of the loss's problems, 2000, and the marginal error to stop
            at, 1e-3; set them on the class or on an instance.

    Where geomloss ends after a schedule, this goes on until it has converged: with a small blur it takes
    longer than geomloss at its default ``scaling``, and may warn. It anneals already, so that of the
    warning's advice ``max_iter``, ``tol`` and a larger ``blur`` are left: ``loss.tol = 1e-2`` saves most of
    the time and moves the value little, ``loss.max_iter = 100`` bounds the time whatever the problem.

    The gradient is that of the loss at its solution. (geomloss's own, unbalanced, is too small by a factor of
    (rho + eps / 2) / (rho + eps).) Potentials, and the gradients in weights, are determined up to a constant
    where the marginals are kept.

    >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    >>> f"{SamplesLoss(blur=0.01)(x, x + 2.0).item():.3f}"  # half the squared distance, 8 / 2
    '4.000'
    """

    max_iter: int = 2000
    tol: float = 1e-3

    def __init__(
        self,
        loss: str = "sinkhorn",
        p: int = 2,
        blur: float = 0.05,
        reach: float | None = None,
        diameter: float | None = None,
        scaling: float = 0.5,
        truncate: float | None = 5,
        cost: Cost | str | None = None,
        kernel: Any = None,
        cluster_scale: float | None = None,
        debias: bool = True,
        potentials: bool = False,
        verbose: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if loss != "sinkhorn":
            raise ValueError(f"loss: expected 'sinkhorn' (for others use geomloss itself), got {loss!r}")
        if isinstance(cost, str):
            if cost not in FORMULAS:
                names = " or ".join(map(repr, FORMULAS))
                raise ValueError(f"cost: expected a function of x and y, {names}, got {cost!r}")
            p = FORMULAS[cost]
            cost = None
        if p not in (1, 2):
            raise ValueError(f"p: expected 1 or 2, got {p!r}")
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
        self.loss, self.p, self.blur, self.reach, self.scaling = loss, p, blur, reach, scaling
        self.cost, self.debias, self.potentials = cost, debias, potentials
        self.diameter, self.truncate, self.kernel = diameter, truncate, kernel
        self.cluster_scale, self.verbose, self.backend = cluster_scale, verbose, backend

    def forward(self, *args: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The loss of (x, y), (a, x, b, y) or (labels, a, x, labels, b, y).

        Args:
            args: points [N, D] and [M, D], or [B, N, D] and [B, M, D]; weights [N] or [N, 1], [B, N] or
                [B, N, 1], uniform with sum 1 if not given. Labels of clusters change nothing.

        Returns:
            A scalar, or [B]; with ``potentials`` F [1, N] or [B, N], and G.
        """
        a, x, b, y = _arguments(args)
        batched = x.dim() == 3
        if not batched:
            a, x, b, y = (tensor[None] for tensor in (a, x, b, y))
        found = self._potentials(a, x, b, y) if self.potentials else self._value(a, x, b, y)
        return found if batched or self.potentials else found[0]

    def _value(self, a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> Tensor:
        eps = self.blur**self.p
        if not self.debias:
            value = self._transport(a, x, b, y)[0]
            # Where unbalanced, geomloss leaves out what does not depend on the plan.
            a_mass, b_mass = a.sum(1), b.sum(1)
            constant = eps * ((a_mass + b_mass) / 2 - a_mass * b_mass)
            return value if self.reach is None else value + constant
        if self.cost is None:
            a, b, mass = self._of_mass_one(a, b)
            settings = self._settings()
            return mass / self._half * sinkhorn_divergence(x, y, a=a, b=b, **settings, **self._ground()).value
        between = self._transport(a, x, b, y)[0]
        of_x, of_y = (self._to_itself(*each)[0] for each in ((a, x), (b, y)))
        value = between - of_x / 2 - of_y / 2
        return value if self.reach is None else value + eps / 2 * (a.sum(1) - b.sum(1)).square()

    def _potentials(self, a: Tensor, x: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        _, f, g = self._transport(a, x, b, y)
        if self.debias:
            f, g = f - self._to_itself(a, x)[1], g - self._to_itself(b, y)[2]
        return f, g

    def _to_itself(self, a: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def solve(problem: Solver) -> SinkhornOutput:
            return solve_symmetric(partial(problem, scaling=None), self.max_iter)

        return self._transport(a, x, a, x, solve)

    def _transport(
        self, a: Tensor, x: Tensor, b: Tensor, y: Tensor, solve: Callable[[Solver], SinkhornOutput] = _called
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Value [B] and potentials [B, N] and [B, M] of one problem, in geomloss's units."""
        a, b, mass = self._of_mass_one(a, b)
        settings = self._settings()
        if self.cost is not None:
            out = solve(partial(sinkhorn_from_cost, self.cost(x, y), a=a, b=b, **settings))
        else:
            out = solve(partial(sinkhorn, x, y, a=a, b=b, **settings, **self._ground()))
        # P = mass P' has a_i b_j = mass^2 a'_i b'_j: both potentials give up half of eps log(mass).
        shift = self.blur**self.p / 2 * mass.log()
        f, g = (potential / self._half - shift[:, None] for potential in (out.f, out.g))
        return mass * (out.value / self._half - 2 * shift), f, g

    def _of_mass_one(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights that sum to 1 and the mass [B] of both; where unbalanced as they are, and 1."""
        mass, other = a.detach().sum(1), b.detach().sum(1)
        if self.reach is not None:
            return a, b, torch.ones_like(mass)
        if a.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_equal_masses(mass, other)
        mass, other = (torch.where(each > 0, each, 1.0) for each in (mass, other))
        return a / mass[:, None], b / other[:, None], mass

    @property
    def _half(self) -> int:
        """How many times geomloss's cost ours is: its p = 2 is half the squared distance."""
        return 2 if self.p == 2 and self.cost is None else 1

    def _ground(self) -> dict[str, Any]:
        return {"cost": "sqeuclidean" if self.p == 2 else "euclidean"}

    def _settings(self) -> dict[str, Any]:
        rho = None if self.reach is None else self._half * self.reach**self.p
        factor = min(max(self.scaling, MIN_SCALING) ** self.p, MAX_SCALING)
        return {
            "eps": self._half * self.blur**self.p,
            "rho": rho,
            "scaling": factor,
            "max_iter": self.max_iter,
            "tol": self.tol,
        }

    def extra_repr(self) -> str:
        """The settings that matter, as ``repr`` shows them."""
        return f"p={self.p}, blur={self.blur}, reach={self.reach}, debias={self.debias}"


def _arguments(args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """a, x, b and y in any of the three forms, the weights without a last dimension of 1."""
    if len(args) not in (2, 4, 6):
        raise ValueError(
            f"arguments: expected (x, y), (a, x, b, y) or (l_x, a, x, l_y, b, y), got {len(args)}"
        )
    if len(args) == 6:
        l_x, a, x, l_y, b, y = args
        if x.dim() == 3 and (l_x is not None or l_y is not None):
            raise NotImplementedError("labels: expected None in batches, got labels of clusters")
    elif len(args) == 4:
        a, x, b, y = args
    else:
        (x, y), a, b = args, None, None
    if (
        x.dim() not in (2, 3)
        or x.dim() != y.dim()
        or x.shape[:-2] != y.shape[:-2]
        or x.shape[-1] != y.shape[-1]
    ):
        raise ValueError(
            f"x and y: expected [N, D] and [M, D], or [B, N, D] and [B, M, D], "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    return _weights("a", a, x), x, _weights("b", b, y), y


def _weights(name: str, weights: Tensor | None, points: Tensor) -> Tensor:
    shape = points.shape[:-1]
    if weights is None:
        return points.new_full(shape, 1 / max(shape[-1], 1))
    if weights.shape not in (shape, (*shape, 1)):
        raise ValueError(f"{name}: expected {tuple(shape)}, got {tuple(weights.shape)}")
    return weights.view(shape)


def _check_equal_masses(a_mass: Tensor, b_mass: Tensor) -> None:
    wrong = (a_mass - b_mass).abs() > 1e-3 * torch.maximum(a_mass, b_mass)
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"weights: expected equal sums where reach is None, got {a_mass[at].item():.6g} and "
            f"{b_mass[at].item():.6g} in problem {at}"
        )
