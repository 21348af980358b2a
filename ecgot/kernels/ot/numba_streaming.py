"""Problems of points too large for a cost matrix, on a CPU: costs are formed tile by tile and never kept.

The algorithm is that of :mod:`ecgot.kernels.ot.iteration`, whose log-sum-exps these are. A pass over the
tiles of rows forms each cost and its exponential once. It yields the log-sum-exps of the rows and, as the
potential f that follows from them is then known up to a constant, the column sums that f leads to as well.
So an iteration is one pass; only columns whose sum left the range of the dtype take another of their own.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ecgot.kernels.ot.iteration import Softmins, iterate
from ecgot.kernels.ot.numba_loops import FAST, _exp, _highest
from ecgot.kernels.ot.numba_solver import _in_threads
from ecgot.kernels.ot.problem import PlanWeights, Problem, Result, SolverSettings, inverse_norm
from ecgot.kernels.ot.torch_solver import chain

TILE_CELLS = 2**18  # of the costs that a thread forms at once, 1 MB in fp32
MIN_ROWS, MAX_ROWS = 32, 256  # of a tile: fewer would read the other side too often
MIN_SUM = 1e-30  # of a column: below, what underflowed in it may count


def solve(problem: Problem, init: Tensor | None, settings: SolverSettings) -> Result:
    """As :func:`ecgot.kernels.ot.torch_solver.solve`."""
    return iterate(problem, softmins(problem), init, settings)


def softmins(problem: Problem) -> Softmins:
    """Log-sum-exps from tiles of costs."""
    sides = [_Sides(problem, index) for index in range(len(problem.a))]

    def rows(g: Tensor, t: Tensor | None) -> Tensor:
        return torch.stack(
            [each.rows(g[k], None if t is None else t[k].item()) for k, each in enumerate(sides)]
        )

    def columns(f: Tensor, t: Tensor | None) -> Tensor:
        return torch.stack(
            [each.columns(f[k], None if t is None else t[k].item()) for k, each in enumerate(sides)]
        )

    return Softmins(rows, columns)


@dataclass
class _Side:
    """Points of one problem's side.

    Attributes:
        points: [n, D] prepared; those of x carry the factor of the product in S = x y^T + terms.
        weight: [n], 0 where no point exists.
        term: [n], what S lacks of -C / eps; for the Euclidean distance 0.
        square: [n], squared lengths, for the Euclidean distance alone; else empty.
    """

    points: Tensor
    weight: Tensor
    term: Tensor
    square: Tensor
    present: Tensor
    log_weight: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.log_weight = self.weight.log()

    def some(self, index: Tensor) -> "_Side":
        """The points of these numbers."""
        square = self.square[index] if len(self.square) else self.square
        return _Side(self.points[index], self.weight[index], self.term[index], square, self.present[index])


class _Sides:
    """One problem, and the columns' log-sum-exps that its last pass over the rows found."""

    def __init__(self, problem: Problem, index: int) -> None:
        part = problem.rows(index, index + 1)
        x, y = (points[0] for points in part.points())
        a, b = (weight[0] for weight in part.weights())
        self.eps = part.eps[0]
        self.cost = problem.cost
        self.tau = float(part.damping()[0][0])
        squares = [points.square().sum(1) for points in (x, y)]
        terms = [torch.zeros_like(square) for square in squares]
        factor: float | Tensor = 1 / self.eps
        if problem.cost == "sqeuclidean":
            terms, factor = [square / -self.eps for square in squares], 2 / self.eps
        elif problem.cost == "cosine":
            terms[0] -= 1 / self.eps
        elif problem.cost == "euclidean":
            factor = 2.0
        if problem.cost != "euclidean":
            squares = [square[:0] for square in squares]
        self.x = _Side(x * factor, a, terms[0], squares[0], part.a[0] >= 0)
        self.y = _Side(y.contiguous(), b, terms[1], squares[1], part.b[0] >= 0)
        self._ahead: tuple[Tensor, Tensor] | None = None

    def rows(self, g: Tensor, t: float | None) -> Tensor:
        """[N]; at temperature 1 the column sums of the f that follows are found ahead."""
        if t is not None:
            self._ahead = None
            return self._pass(self.x, self.y, g, t)
        sums = torch.zeros(len(self.y.points), dtype=torch.float64)
        lse = self._pass(self.x, self.y, g, 1.0, sums)
        log_sums = torch.where(sums >= MIN_SUM, sums.log(), math.nan)
        self._ahead = -self.tau * lse, (log_sums - (g + self.y.log_weight)).to(g.dtype)
        return lse

    def columns(self, f: Tensor, t: float | None) -> Tensor:
        """[M]; from what the last pass found where f is its potential plus a constant."""
        if t is not None or self._ahead is None:
            return self._pass(self.y, self.x, f, 1.0 if t is None else t)
        known, lse = self._ahead
        step = (f - known)[self.x.weight > 0]
        shift = step.mean()
        rounding = 8 * torch.finfo(f.dtype).eps * known.abs().max()
        if not bool((step - shift).abs().max() <= rounding):
            return self._pass(self.y, self.x, f, 1.0)
        lse = torch.where(self.y.present, lse + shift, 0.0)
        missing = (~lse.isfinite()).nonzero().squeeze(1)
        if len(missing):
            lse[missing] = self._pass(self.y.some(missing), self.x, f, 1.0)
        return lse

    def _pass(
        self, own: _Side, other: _Side, potential: Tensor, temperature: float, sums: Tensor | None = None
    ) -> Tensor:
        """T log sum_j b_j exp((potential_j - C_ij / eps) / T) [n]; fills the columns' ``sums`` [m] if wanted.

        With e_ij the exponentials that were added up for row i, sums_j = sum_i a_i exp(f_i + S_ij + ...) but
        for the column's own factor, which the caller takes out.
        """
        h = (potential + other.term + temperature * other.log_weight).numpy()
        lse = torch.empty_like(own.weight)
        real = lse.numpy().dtype.type
        numbers = (real(1 / self.eps.item()), real(temperature), real(self.tau))
        arrays = [each.numpy() for each in (own.square, other.square, own.term, own.weight)]
        transposed = other.points.T
        m, wanted = len(other.points), sums is not None

        def task(begin: int, end: int) -> np.ndarray:
            total, tile_sums = np.zeros(m if wanted else 0), np.empty(m if wanted else 0, real)
            step = tile_rows(m)
            buffer = own.points.new_empty(min(step, end - begin), m)
            for first in range(begin, end, step):
                tile = torch.mm(
                    own.points[first : min(first + step, end)], transposed, out=buffer[: end - first]
                )
                arguments = (first, *arrays, h, *numbers, lse.numpy(), tile_sums, total)
                row_tile(tile.numpy(), *arguments)
            return total

        parts = _in_threads(len(own.points), task)
        if sums is not None:
            for part in parts:
                sums += torch.from_numpy(part)
        return lse


def tile_rows(m: int) -> int:
    """Rows of a tile."""
    return max(MIN_ROWS, min(MAX_ROWS, TILE_CELLS // m))


def cost_vjp(problem: Problem, given: PlanWeights) -> tuple[Tensor, Tensor]:
    """As :func:`ecgot.kernels.ot.torch_solver.cost_vjp`, of the plan alone (no ``left`` and ``right``)."""
    grads = [_cost_vjp(problem, given, index) for index in range(len(problem.a))]
    grad_x, grad_y = (torch.stack(each) for each in zip(*grads, strict=True))
    return grad_x, grad_y


def _cost_vjp(problem: Problem, given: PlanWeights, index: int) -> tuple[Tensor, Tensor]:
    sides, part = _Sides(problem, index), problem.rows(index, index + 1)
    x, y = (points[0] for points in part.points())
    scale = torch.where(part.solvable(), given.scale[index], 0.0)[0]
    if scale == 0:  # nothing asks for this problem: what is NaN in it stays there
        return torch.zeros_like(x), torch.zeros_like(y)
    f, g = given.f[index] / sides.eps + sides.x.term, given.g[index] / sides.eps + sides.y.term
    left = sides.x.weight * scale
    to_y, row_sums = torch.empty_like(x), torch.empty_like(sides.x.weight)
    inverse_eps = row_sums.numpy().dtype.type(1 / sides.eps.item())
    arrays = [each.numpy() for each in (sides.x.square, sides.y.square, f, g, left, sides.y.weight, row_sums)]
    transposed = y.T

    def task(begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Fills its rows of to_y and row_sums; returns its share of Q^T x and of the column sums."""
        to_x, column_sums = torch.zeros_like(y), torch.zeros_like(sides.y.weight)
        step = tile_rows(len(y))
        buffer = x.new_empty(min(step, end - begin), len(y))
        for first in range(begin, end, step):
            some = slice(first, min(first + step, end))
            tile = torch.mm(sides.x.points[some], transposed, out=buffer[: end - first])
            arguments = (first, *arrays, inverse_eps, column_sums.numpy())
            weight_tile(tile.numpy(), *arguments)
            torch.mm(tile, y, out=to_y[some])
            to_x.addmm_(tile.T, x[some])
        return to_x, column_sums

    assert problem.y is not None
    parts = _in_threads(len(x), task)
    to_x, column_sums = (sum(each[1:], each[0]) for each in zip(*parts, strict=True))
    return (
        _through(problem, (problem.x[index], x, part.a[0]), to_y, row_sums),
        _through(problem, (problem.y[index], y, part.b[0]), to_x, column_sums),
    )


def _through(problem: Problem, own: tuple[Tensor, Tensor, Tensor], product: Tensor, sums: Tensor) -> Tensor:
    """[n, D], the gradient in one side's points, given raw, prepared, and with their weights."""
    raw, points, weight = own
    inverse = None
    if problem.cost == "cosine":
        inverse = inverse_norm(torch.where((weight >= 0)[:, None], raw.to(points.dtype), 0.0)[None])
    return chain(problem.cost, points[None], product[None], sums[None], inverse)[0]


# --- a tile -------------------------------------------------------------------------------------------------


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _to_distances(row, own, other, inverse_eps):
    """-|x - y| / eps of twice the product x y."""
    for j in range(len(row)):
        row[j] = -inverse_eps * math.sqrt(max(own + other[j] - row[j], own * 0))


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def row_tile(
    S, first, square, other_square, term, weight, h, inverse_eps, temperature, tau, lse, sums, total
):  # fmt: skip
    """Log-sum-exps of rows ``first`` on, whose products are S; adds to the columns' ``total``, unless empty.

    S is overwritten. h: the columns' potentials, terms and weights together. sums: scratch as ``total``.
    """
    n, m = S.shape
    real = S.dtype.type
    lowest, one, zero = real(-np.inf), real(1), real(0)
    rate, ahead = one / temperature, len(total) > 0
    sums[:] = zero
    for i in range(n):
        row, at = S[i], first + i
        if len(square) > 0:
            _to_distances(row, square[at], other_square, inverse_eps)
        top = _highest(row, h)
        if top == lowest:  # no point of the other side has weight
            lse[at] = lowest
            continue
        s = zero
        for j in range(m):
            e = _exp((row[j] + h[j] - top) * rate)
            row[j] = e
            s += e
        lse[at] = term[at] + top + temperature * math.log(s)
        if ahead and weight[at] > 0:
            z = weight[at] / s
            if tau < one:
                z *= math.exp((one - tau) * lse[at])
            for j in range(m):
                sums[j] += z * row[j]
    for j in range(len(total)):
        total[j] += sums[j]


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def weight_tile(
    S, first, square, other_square, f, g, left, right, row_sums, inverse_eps, column_sums
):  # fmt: skip
    """S_ij <- exp(S_ij + f_i + g_j) left_i right_j (over the distance) of rows ``first`` on, and its sums."""
    n, m = S.shape
    zero = S.dtype.type(0)
    for i in range(n):
        row, at = S[i], first + i
        fi, factor, total = f[at], left[at], zero
        if len(square) > 0:
            _to_distances(row, square[at], other_square, inverse_eps)
            for j in range(m):
                e = _exp(row[j] + fi + g[j]) * (factor * right[j] * inverse_eps)
                row[j] = -e / row[j] if row[j] < zero else zero
        else:
            for j in range(m):
                row[j] = _exp(row[j] + fi + g[j]) * (factor * right[j])
        for j in range(m):
            total += row[j]
            column_sums[j] += row[j]
        row_sums[at] = total
