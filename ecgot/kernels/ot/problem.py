"""The transport problem that every backend solves: its points, weights and costs, and what follows from them.

B is the batch, N and M the points of a problem's two sides, D their dimension; all pairs of B clouds x and K
clouds y are B x K problems. Costs and potentials are in units of the cost.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ABSENT = -1.0  # the weight of a point that does not exist
MAX_EXPONENT = 80.0  # of exp: at a point without weight a larger one would overflow, and inf * 0 is NaN
MAX_ANNEALING = 1e7  # largest cost / eps from which annealing starts
GAP = 1e3  # between the costs of a problem and what is no cost but a mask
EXACT = 2.0**12  # potentials in units of eps up to which rounding does not count: in fp32 it is 6e-5 there
Result = tuple[Tensor, Tensor, Tensor, Tensor]  # f, g, marginal error, iterations


@dataclass(frozen=True)
class SolverSettings:
    """When the solver stops, and how it gets there.

    Attributes:
        max_iter: most iterations at the final eps.
        tol: the marginal error (L1, relative to the marginal's mass) at which a problem stops.
        scaling: factor of eps per annealing step; 0 does not anneal.
        from_masks: whether annealing starts above costs that look like masks, see :class:`CostRange`.
    """

    max_iter: int
    tol: float
    scaling: float = 0.0
    from_masks: bool = False


@dataclass(frozen=True)
class Problem:
    """B problems, or all B x K pairs of B clouds x and K clouds y.

    Attributes:
        x: [B, N, D]; with cost "given" the costs [B, N, M] themselves.
        y: [B, M, D]; [K, M, D] for pairs; None with cost "given".
        a, b: weights [B, N] and [B, M] ([K, M] for pairs) in the solver's dtype; negative where no point
            exists.
        x_centre, y_centre: [B, D] ([K, D] for pairs), subtracted from the points before distances are formed;
            None for no centring, or none yet. Where the two differ, ``cost_matrix`` is that of the moved
            clouds; see :mod:`ecgot.kernels.ot.centring`.
        eps: [B]; [B * K] for pairs.
        cost: "sqeuclidean", "euclidean", "cosine", "dot" or "given".
        rho_x, rho_y: penalty of a missed marginal, [B] ([B * K] for pairs) in the solver's dtype, infinite
            where a problem keeps it; None where all do.
        pairs: whether every cloud x meets every cloud y.
        precision: of fp32 products on a GPU, "fp32" or "tf32".
    """

    x: Tensor
    y: Tensor | None
    a: Tensor
    b: Tensor
    x_centre: Tensor | None
    y_centre: Tensor | None
    eps: Tensor
    cost: str
    rho_x: Tensor | None = None
    rho_y: Tensor | None = None
    pairs: bool = False
    precision: str = "fp32"

    def flatten(self) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
        """The nine tensors and the three other values, as a registered operator takes them."""
        tensors = (self.x, self.y, self.a, self.b, self.x_centre, self.y_centre, self.eps)
        return (*tensors, self.rho_x, self.rho_y), (self.cost, self.pairs, self.precision)

    @classmethod
    def unflatten(cls, tensors: Sequence[Any], values: Sequence[Any]) -> "Problem":
        """The inverse of :meth:`flatten`."""
        x, y, a, b, x_centre, y_centre, eps, rho_x, rho_y = tensors
        cost, pairs, precision = values
        return cls(x, y, a, b, x_centre, y_centre, eps, cost, rho_x, rho_y, pairs, precision)

    @property
    def dtype(self) -> torch.dtype:
        """The solver's: fp32 or fp64, whatever the points' own."""
        return self.eps.dtype

    @property
    def size(self) -> tuple[int, int]:
        """N and M."""
        return self.a.shape[1], self.b.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        """(B,), or (B, K) for pairs."""
        return (self.a.shape[0], self.b.shape[0]) if self.pairs else (self.a.shape[0],)

    @property
    def empty(self) -> bool:
        """Whether there is no problem or no point at all; the solvers never see such a batch."""
        return not all((*self.shape, *self.size))

    @property
    def balanced(self) -> bool:
        """Whether every problem keeps both marginals."""
        return self.rho_x is None and self.rho_y is None

    def kept(self) -> Tensor:
        """[B] ([B * K] for pairs), whether a problem keeps both marginals."""
        kept = torch.ones_like(self.eps, dtype=torch.bool)
        for rho in (self.rho_x, self.rho_y):
            kept = kept if rho is None else kept & (rho == math.inf)
        return kept

    def slack(self) -> tuple[Tensor, Tensor]:
        """eps / rho of x and y, [B] ([B * K] for pairs) each: 0 where the marginal is kept."""
        return _slack(self.rho_x, self.eps), _slack(self.rho_y, self.eps)

    def damping(self) -> tuple[Tensor, Tensor]:
        """rho / (rho + eps) of x and y, as :meth:`slack`: 1 where the marginal is kept."""
        slack_x, slack_y = self.slack()
        return 1 / (1 + slack_x), 1 / (1 + slack_y)

    def weights(self) -> tuple[Tensor, Tensor]:
        """a and b, 0 where no point exists."""
        return self.a.clamp_min(0), self.b.clamp_min(0)

    def solvable(self) -> Tensor:
        """[B] ([B, K] for pairs), False where a side has no mass: such a problem has no plan."""
        a, b = (weight.sum(1) > 0 for weight in self.weights())
        return a[:, None] & b if self.pairs else a & b

    def rows(self, start: int, stop: int) -> "Problem":
        """Problems ``start`` to ``stop``; for pairs, every pair of a cloud x in that range, as a problem."""
        b, y, y_centre = self.b, self.y, self.y_centre
        k = len(b) if self.pairs else 1
        own = slice(start * k, stop * k)
        rho_x, rho_y = (None if rho is None else rho[own] for rho in (self.rho_x, self.rho_y))
        x, a = self.x[start:stop], self.a[start:stop]
        x_centre = None if self.x_centre is None else self.x_centre[start:stop]
        if not self.pairs:
            y = None if y is None else y[start:stop]
            y_centre = None if y_centre is None else y_centre[start:stop]
            b = b[start:stop]
        else:
            count = stop - start
            x, a = x.repeat_interleave(k, 0), a.repeat_interleave(k, 0)
            x_centre = None if x_centre is None else x_centre.repeat_interleave(k, 0)
            assert y is not None
            b, y = b.repeat(count, 1), y.repeat(count, 1, 1)
            y_centre = None if y_centre is None else y_centre.repeat(count, 1)
        part = replace(self, x=x, y=y, a=a, b=b, x_centre=x_centre, y_centre=y_centre, pairs=False)
        return replace(part, eps=self.eps[own], rho_x=rho_x, rho_y=rho_y)

    def with_rows(self, some: slice) -> "Problem":
        """The problems restricted to some points of x; the weights a then no longer sum to 1."""
        return replace(self, x=self.x[:, some], a=self.a[:, some])

    def points(self) -> tuple[Tensor, Tensor]:
        """x [B, N, D] and y [B, M, D] as :func:`prepared` makes them."""
        assert self.y is not None
        x = prepared(self.x, self.a, self.x_centre, self.cost, self.dtype)
        return x, prepared(self.y, self.b, self.y_centre, self.cost, self.dtype)

    def cost_matrix(self) -> Tensor:
        """[B, N, M], differentiable; finite where a point does not exist."""
        if self.cost == "given":
            present = (self.a >= 0)[:, :, None] & (self.b >= 0)[:, None, :]
            return self.x.to(self.dtype).masked_fill(~present, 0.0)
        return cost_of(*self.points(), self.cost)

    def kernel(self, f: Tensor, g: Tensor) -> Tensor:
        """exp((f + g - C) / eps) [B, N, M]: the plan without its weights."""
        f, g = partnered(f), partnered(g)
        exponent = f[:, :, None] + g[:, None, :] - self.cost_matrix()
        if self.cost != "given":
            return torch.exp((exponent / self.eps[:, None, None]).clamp_max(MAX_EXPONENT))
        forbidden = exponent == -math.inf  # kept from the quotient, whose derivative in eps would be NaN
        exponent = torch.where(forbidden, 0.0, exponent) / self.eps[:, None, None]
        return torch.where(forbidden, 0.0, torch.exp(exponent.clamp_max(MAX_EXPONENT)))

    def plan(self, f: Tensor, g: Tensor) -> Tensor:
        """P [B, N, M], differentiable; 0 where a point does not exist or has no weight."""
        a, b = self.weights()
        return self.kernel(f, g) * a[:, :, None] * b[:, None, :]

    def value(self, f: Tensor, g: Tensor) -> Tensor:
        """The dual objective [B] ([B, K] for pairs) at potentials f [..., N] and g [..., M].

        Assumes that g was updated last, so that the plan has the column marginals that g asks for.
        """
        a, b = self.weights()
        a_mass, b_mass = a.sum(1), b.sum(1)
        solvable = self.solvable()
        eps, rho_x, rho_y = self._each()
        if self.pairs:
            a, a_mass, b_mass = a[:, None, :], a_mass[:, None], b_mass[None, :]
        value = _dual_side(a, f, rho_x) + _dual_side(b, g, rho_y)
        alone = torch.zeros_like(value)  # without a plan only the penalties of missed marginals are left
        if not self.balanced:
            moved = b_mass if rho_y is None else _weighted(b, torch.exp(-g / rho_y[..., None]))
            value = value - eps * (moved - a_mass * b_mass)
            for rho, mass in ((rho_x, a_mass), (rho_y, b_mass)):
                if rho is not None:
                    alone = alone + torch.where(rho < math.inf, rho * mass, 0.0)
        return torch.where(solvable, value, alone)

    def _each(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """eps, rho_x and rho_y in the shape of the problems, [B] or [B, K]."""
        rho_x, rho_y = (None if rho is None else rho.view(self.shape) for rho in (self.rho_x, self.rho_y))
        return self.eps.view(self.shape), rho_x, rho_y

    def weight_gradients(self, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """d value / d a [B, N] and d value / d b [B, M] at the optimum, differentiable.

        [B, K, N] and [B, K, M] for pairs. Where balanced these are the potentials.
        """
        a_mass, b_mass = (weight.sum(1) for weight in self.weights())
        eps, rho_x, rho_y = self._each()
        if self.pairs:
            a_mass, b_mass = a_mass[:, None], b_mass[None, :]
        return (
            _dual_slope(f, rho_x, eps[..., None], b_mass[..., None]),
            _dual_slope(g, rho_y, eps[..., None], a_mass[..., None]),
        )

    def largest_cost(self, *, with_masks: bool = True) -> Tensor:
        """[B] ([B * K] for pairs), a bound on the spread of the costs, where annealing starts.

        with_masks: also of costs that look like masks, see :class:`CostRange`; infinite ones never count.
        """
        if self.cost == "given":
            costs = CostRange.of(self)
            return costs.top if with_masks else torch.where(costs.masked, costs.low, costs.top)
        if self.cost == "cosine":
            return torch.full_like(self.eps, 2.0)
        x_norm, y_norm = (p.square().sum(2).amax(1).sqrt() for p in self.points())
        if self.pairs:
            x_norm, y_norm = x_norm.repeat_interleave(len(y_norm)), y_norm.repeat(len(x_norm))
        bound = {
            "sqeuclidean": (x_norm + y_norm).square(),
            "euclidean": x_norm + y_norm,
            "dot": 2 * x_norm * y_norm,
        }[self.cost]
        return bound.nan_to_num(0.0)


@dataclass(frozen=True)
class CostRange:
    """Which given costs a plan can be expected to use: annealing has to start from their spread.

    Large finite costs may stand for forbidden pairs. An annealing that starts from them leaves potentials of
    their size, which the iterations at eps cannot bring back. But they may as well be the way between two
    clusters whose masses differ. So costs are taken for masks only if they are ``GAP`` times eps and the next
    smaller cost, and if each point with weight has a partner below; and
    :func:`ecgot.kernels.ot.backends.solve` starts from them after all where that does not converge.

    Attributes:
        top: [B], the largest finite cost between points with weight, less the smallest.
        low: [B], the same without masks; ``top`` where ``masked`` is False.
        masked: [B], whether there are masks.
    """

    top: Tensor
    low: Tensor
    masked: Tensor

    @classmethod
    def of(cls, problem: Problem) -> "CostRange":
        """The ranges of a problem with cost "given"."""
        weighty = (problem.a > 0)[:, :, None] & (problem.b > 0)[:, None, :]
        cost = problem.cost_matrix()
        usable = weighty & cost.isfinite()
        cost = torch.where(usable, cost, math.inf)
        cost = cost - cost.amin((1, 2), keepdim=True)  # infinity or NaN where not usable
        top = torch.where(usable, cost, 0.0).amax((1, 2))
        near = usable & (cost <= top[:, None, None] / GAP)
        low = torch.where(near, cost, 0.0).amax((1, 2))
        high = torch.where(usable & ~near, cost, math.inf).amin((1, 2))
        partnered_rows = (near.any(2) | (problem.a <= 0)).all(1)
        partnered_columns = (near.any(1) | (problem.b <= 0)).all(1)
        masked = (high >= GAP * torch.maximum(low, problem.eps)) & (high < math.inf)
        masked = masked & partnered_rows & partnered_columns
        return cls(top, torch.where(masked, low, top), masked)


def _slack(rho: Tensor | None, eps: Tensor) -> Tensor:
    return torch.zeros_like(eps) if rho is None else (eps / rho).clamp_max(torch.finfo(eps.dtype).max)


def _dual_side(weight: Tensor, potential: Tensor, rho: Tensor | None) -> Tensor:
    kept = _weighted(weight, potential)
    if rho is None:
        return kept
    finite = torch.where(rho < math.inf, rho, 1.0)
    free = -finite * _weighted(weight, torch.expm1(-potential / finite[..., None]))
    return torch.where(rho < math.inf, free, kept)


def _weighted(weight: Tensor, moved: Tensor) -> Tensor:
    """The sum over points with weight: at the others ``moved`` may be infinite."""
    return torch.where(weight > 0, weight * moved, 0.0).sum(-1)


def _dual_slope(potential: Tensor, rho: Tensor | None, eps: Tensor, other_mass: Tensor) -> Tensor:
    kept = potential - eps * (1 - other_mass)
    if rho is None:
        return kept
    rho = rho[..., None]
    finite = torch.where(rho < math.inf, rho, 1.0)
    free = -finite * torch.expm1(-potential / finite) - eps * (torch.exp(-potential / finite) - other_mass)
    return torch.where(rho < math.inf, free, kept)


def partnered(potential: Tensor) -> Tensor:
    """What a potential adds to exponents: nothing reaches a point that may match nothing.

    Its potential is infinity, and so are its costs. With -infinity in its place exp gives 0, and never NaN.
    """
    return torch.where(potential == math.inf, -math.inf, potential)


def rounding(problem: Problem, f: Tensor, g: Tensor) -> Tensor:
    """What rounding of f + g - C may add to the marginal error, [B] ([B, K] for pairs).

    A quarter of a unit in the last place of the largest potentials, as roundings average out over a row. Up
    to ``EXACT`` units of eps they do not count: tolerances of ordinary problems have to stay in reach.
    """
    a, b = problem.a, problem.b
    if problem.pairs:
        a = a[:, None, :]
    eps, rho_x, rho_y = problem._each()
    largest = []
    for weight, potential, rho in ((a, f, rho_x), (b, g, rho_y)):
        counts = (weight > 0) & (potential != math.inf)
        if rho is not None:  # a point that is as good as left out rounds nothing
            counts = counts & (torch.exp(-potential / rho[..., None]) > 0)
        largest.append(torch.where(counts, potential.abs(), 0.0).amax(-1))
    units = (largest[0] + largest[1]) / eps
    return (units - EXACT).clamp_min(0) * (torch.finfo(problem.dtype).eps / 8)


def prepared(points: Tensor, weights: Tensor, centre: Tensor | None, cost: str, dtype: torch.dtype) -> Tensor:
    """Points [B, N, D] in the solver's dtype, centred, and of unit length for the cosine.

    Where a point does not exist the result is 0, even if the input is NaN.
    """
    points = points.to(dtype)
    if centre is not None:
        points = points - centre[:, None, :]
    if all_present(weights):
        return points * inverse_norm(points) if cost == "cosine" else points
    points = torch.where((weights >= 0)[:, :, None], points, 0.0)
    return points * inverse_norm(points) if cost == "cosine" else points


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Products stay in their operands' precision; on the meta device there is no autocast to switch off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def can_read_values(tensor: Tensor) -> bool:
    """Whether reading values is free: a GPU would have to be waited for; while tracing there are none."""
    real = type(tensor) in (Tensor, torch.nn.Parameter)
    if not real or tensor.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not torch._C._are_functorch_transforms_active()


def all_present(weights: Tensor) -> bool:
    """True if every point exists; False also where finding out would cost a wait."""
    return can_read_values(weights) and (weights.numel() == 0 or weights.min().item() >= 0)


def inverse_norm(points: Tensor) -> Tensor:
    """1 / |point| [B, N, 1]; 0 for a zero vector (whose cosine with everything is 0), NaN on overflow."""
    square = points.square().sum(2, keepdim=True)
    usable = square >= torch.finfo(points.dtype).tiny
    inverse = torch.where(usable, torch.where(usable, square, 1.0).rsqrt(), 0.0)
    inverse = torch.where(square.isnan(), math.nan, inverse)
    return torch.where(square == math.inf, math.nan, inverse)


def cost_of(x: Tensor, y: Tensor, cost: str) -> Tensor:
    """The costs [B, N, M] of prepared points."""
    inner = x @ y.mT
    if cost == "dot":
        return -inner
    if cost == "cosine":
        return 1 - inner
    square = (x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None, :] - 2 * inner).clamp_min(0)
    if cost == "sqeuclidean":
        return square
    positive = square > 0  # coinciding points: the distance has no derivative there, and we take 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), square * 0)  # NaN stays NaN


def padded(points: Tensor, length: int, value: float = 0.0) -> Tensor:
    """[B, n, ...] padded with ``value`` to [B, length, ...]."""
    return F.pad(points, (0, 0) * (points.dim() - 2) + (0, length - points.shape[1]), value=value)


def start_temperature(problem: Problem, *, with_masks: bool = True) -> Tensor:
    """[B] ([B * K] for pairs), :meth:`Problem.largest_cost` in units of eps, at least 1."""
    return (problem.largest_cost(with_masks=with_masks) / problem.eps).clamp(1.0, MAX_ANNEALING)


# --- solutions ----------------------------------------------------------------------------------------------


@dataclass
class Solution:
    """What a solver found; it may leave to :func:`ecgot.kernels.ot.centring.complete` what is None.

    Attributes:
        f, g: potentials [B, N] and [B, M] ([B, K, N] and [B, K, M] for pairs) of the moved clouds' costs.
        error, iterations: [B] ([B, K] for pairs), the marginal error, and how many updates it took.
        value: [B] ([B, K] for pairs), the dual objective of the points' own costs.
        whole_f, whole_g: potentials of the points' own costs, with <a, f> = <b, g> where both marginals are
            kept; None for pairs.
        converged: [B] ([B, K] for pairs), bool.
        x_centre, y_centre: [B, D] ([K, D] for pairs), what was subtracted from the points; None for nothing.
    """

    f: Tensor
    g: Tensor
    error: Tensor
    iterations: Tensor
    value: Tensor | None = None
    whole_f: Tensor | None = None
    whole_g: Tensor | None = None
    converged: Tensor | None = None
    x_centre: Tensor | None = None
    y_centre: Tensor | None = None


# --- gradients ----------------------------------------------------------------------------------------------


@dataclass
class PlanWeights:
    """Weights Q_ij = E_ij (scale a_i b_j + left_i b_j + a_i right_j) of costs, E = exp((f + g - C) / eps).

    Attributes:
        f, g: potentials [B, N] and [B, M] ([B, K, N] and [B, K, M] for pairs).
        scale: [B] ([B, K] for pairs), the gradient of the value: with it alone Q is the plan times ``scale``.
        left, right: [B, N] and [B, M], what the gradients of the potentials add; both None if nothing.
    """

    f: Tensor
    g: Tensor
    scale: Tensor
    left: Tensor | None = None
    right: Tensor | None = None

    def weights(self, problem: Problem) -> Tensor:
        """Q [B, N, M], differentiable."""
        a, b = problem.weights()
        kernel = problem.kernel(self.f, self.g)
        a_scaled = a * torch.where(problem.solvable(), self.scale, 0.0)[:, None]
        if self.left is None or self.right is None:
            return kernel * a_scaled[:, :, None] * b[:, None, :]
        rows = a_scaled + self.left
        return kernel * (rows[:, :, None] * b[:, None, :] + a[:, :, None] * self.right[:, None, :])

    def rows(self, problem: Problem, start: int, stop: int) -> "PlanWeights":
        """The part that belongs to :meth:`Problem.rows`."""

        def cut(tensor: Tensor) -> Tensor:
            return tensor[start:stop].flatten(0, 1) if problem.pairs else tensor[start:stop]

        left = None if self.left is None else cut(self.left)
        right = None if self.right is None else cut(self.right)
        return PlanWeights(cut(self.f), cut(self.g), cut(self.scale), left, right)
