"""Small problems on a CPU, where the overhead of a call counts: compiled calls around matrix products.

They do what ``centring``, ``numba_solver`` and ``problem`` do by some hundred operations of torch, for the
usual problem: points that all exist and weigh, both marginals kept, a cost that is a product but for terms of
its rows and columns. Where a batch is not that, the functions here return None, and the others serve.
"""

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from ecgot.kernels.ot.numba_loops import FAST, _exp, solve_blocks
from ecgot.kernels.ot.problem import EXACT, PlanWeights, Problem, Solution, SolverSettings

MAX_CELLS = 2**17  # costs of a batch, which one thread solves in a few milliseconds
MAX_UNITS = EXACT / 2  # of eps in a potential: beyond, rounding is to be judged
COSTS = {"dot": 0, "cosine": 1, "sqeuclidean": 2}
TINY = 2.0**-126


def fits(problem: Problem) -> bool:
    """Whether a batch is small and, as far as its values need not be looked at, usual."""
    (n, m), x, y = problem.size, problem.x, problem.y
    return (
        problem.cost in COSTS
        and problem.balanced
        and not problem.pairs
        and not problem.empty
        and len(x) * n * m <= MAX_CELLS
        and y is not None
        and x.dtype == y.dtype == problem.dtype
    )


def solve(problem: Problem, settings: SolverSettings, cache: Tensor) -> Solution | None:
    """The whole solution of a batch that :func:`fits`; ``cache`` [B, N, M] gets the products."""
    if settings.scaling or not cache.numel():
        return None
    batch, n, m = cache.shape
    given = _arrays(problem)
    real, d = given[-1].dtype, problem.x.shape[2]
    centres = np.empty((2, batch, d), real)
    sides = _prepared(given, centres, COSTS[problem.cost], False)
    if sides is None:
        return None
    torch.bmm(torch.from_numpy(sides[0]), torch.from_numpy(sides[1]).mT, out=cache)
    outputs = [
        np.empty(shape, real) for shape in ((batch, n), (batch, m), (batch, n), (batch, m), batch, batch)
    ]
    outputs += [np.empty(batch, np.int32), np.empty(batch, np.bool_)]
    stopping = (COSTS[problem.cost], settings.tol, settings.max_iter)
    arguments = (cache.numpy(), *given[2:], *sides, *centres, *stopping, *outputs)
    if not _solve(*arguments):
        return None
    f, g, whole_f, whole_g, value, error, iterations, converged = map(torch.from_numpy, outputs)
    moved = (torch.from_numpy(centres[0]), torch.from_numpy(centres[1].copy()))  # they may not share memory
    used = moved if problem.cost == "sqeuclidean" else (None, None)
    return Solution(f, g, error, iterations, value, whole_f, whole_g, converged, *used)


def cost_vjp(problem: Problem, plan: PlanWeights, cache: Tensor) -> tuple[Tensor, Tensor] | None:
    """As :func:`ecgot.kernels.ot.backends.cost_vjp`, of a batch that :func:`fits` and the plan alone."""
    if plan.left is not None or not cache.numel():
        return None
    batch, n, m = cache.shape
    given, code = _arrays(problem), COSTS[problem.cost]
    real = given[-1].dtype
    if problem.x_centre is None or problem.y_centre is None:
        centres = np.zeros((2, batch, problem.x.shape[2]), real)
    else:
        centres = np.stack([_array(problem.x_centre), _array(problem.y_centre)])
    sides = _prepared(given, centres, code, True)
    if sides is None:
        return None
    scale, sums = _array(plan.scale), (np.empty((batch, n), real), np.empty((batch, m), real))
    weights = torch.empty_like(cache)
    arguments = (
        _array(cache), *given[2:], *sides[2:], _array(plan.f), _array(plan.g), scale, weights.numpy(), *sums,
    )  # fmt: skip
    _weigh(*arguments)
    grad_x = torch.bmm(weights, torch.from_numpy(sides[1]))
    grad_y = torch.bmm(weights.mT, torch.from_numpy(sides[0]))
    grads = (grad_x.numpy(), grad_y.numpy())
    arguments = (*given[:2], *sides[:2], *given[2:], scale, *centres, *sums, *grads)
    _through_cost(code, *arguments)
    return grad_x, grad_y


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


def _arrays(problem: Problem) -> tuple[np.ndarray, ...]:
    """x, y, a, b and eps."""
    assert problem.y is not None
    return tuple(map(_array, (problem.x, problem.y, problem.a, problem.b, problem.eps)))


def _prepared(
    given: tuple[np.ndarray, ...], centres: np.ndarray, code: int, centres_given: bool
) -> tuple[np.ndarray, ...] | None:
    """x and y, whose products are S, and S's terms of rows and columns; fills the centres unless given."""
    sides = tuple(map(np.empty_like, given[:4]))
    arguments = (*given, *sides, *centres, code, centres_given)
    return sides if _prepare(*arguments) else None


# --- compiled -----------------------------------------------------------------------------------------------


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _mean(points, weight, out):
    """The weighted mean; -> whether moving the cloud there would hardly shorten its longest point."""
    real = points.dtype.type
    mass, longest, square = real(0), real(0), real(0)
    out[:] = real(0)
    for i in range(len(points)):
        mass += weight[i]
        length = real(0)
        for c in range(len(out)):
            out[c] += weight[i] * points[i, c]
            length += points[i, c] * points[i, c]
        longest = max(longest, length)
    for c in range(len(out)):
        out[c] /= mass
        square += out[c] * out[c]
    return real(4) * math.sqrt(square) <= math.sqrt(longest)


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _side(raw, centre, eps, code, factor, out, term):
    """Prepared points times ``factor``, and each one's term. -> whether all can be squared"""
    real = raw.dtype.type
    zero = real(0)
    total = zero
    for i in range(len(raw)):
        square = zero
        for c in range(len(centre)):
            value = raw[i, c] - centre[c] if code == 2 else raw[i, c]
            out[i, c] = value
            square += value * value
        total += square
        scale = factor
        if code == 1:
            scale = factor / math.sqrt(square) if square >= real(TINY) else zero
        for c in range(len(centre)):
            out[i, c] *= scale
        term[i] = -square / eps if code == 2 else zero
    return total < real(np.inf)


@njit(nogil=True, error_model="numpy", cache=True)
def _prepare(x, y, a, b, eps, x_out, y_out, p, q, x_centre, y_centre, code, centres_given):
    """-> whether all problems are usual"""
    real = x.dtype.type
    one = real(1)
    for k in range(len(eps)):
        if not (a[k].min() > 0 and b[k].min() > 0):
            return False
        if code == 2 and not centres_given:
            near_x, near_y = _mean(x[k], a[k], x_centre[k]), _mean(y[k], b[k], y_centre[k])
            if near_x and near_y:
                x_centre[k], y_centre[k] = real(0), real(0)
        factor = (real(2) if code == 2 else one) / eps[k]
        fine = _side(x[k], x_centre[k], eps[k], code, factor, x_out[k], p[k])
        fine &= _side(y[k], y_centre[k], eps[k], code, one, y_out[k], q[k])
        if not fine:
            return False
        if code == 1:
            p[k] = -one / eps[k]
    return True


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _add_terms(points, scale, step, half_square, sign, potential, whole):
    """whole_i = potential_i + 2 sign x_i step + |step|^2 / 2, in which scale x_i are the points."""
    for i in range(len(points)):
        inner = half_square * 0
        for c in range(len(step)):
            inner += points[i, c] * step[c]
        whole[i] = potential[i] + sign * 2 * inner * scale + half_square


@njit(nogil=True, error_model="numpy", cache=True)
def _solve(
    S, a, b, eps, x, y, p, q, x_centre, y_centre, code, tol, max_iter, f, g, whole_f, whole_g, value, error,
    iterations, converged,
):  # fmt: skip
    """-> whether all problems are usual"""
    batch, n, m = S.shape
    real = S.dtype.type
    zero, one, half = real(0), real(1), real(0.5)
    number, nothing = np.arange(batch), np.zeros(batch, np.int64)
    rows, columns, taken = nothing + n, nothing + m, nothing.copy()
    ones, kept = np.ones(batch, S.dtype), np.zeros(batch, S.dtype)
    f[:], g[:] = zero, q
    solve_blocks(
        S.reshape((batch * n, m)), ones > zero, number * n, rows, nothing, columns, a.ravel(), number * n,
        b.ravel(), number * m, p.ravel(), q.ravel(), kept, kept, f.ravel(), number * n, g.ravel(), number * m,
        ones, zero, real(tol), max_iter, error, taken, 0, batch,
    )  # fmt: skip
    step = np.zeros(x_centre.shape[1], S.dtype)
    for k in range(batch):
        largest, half_square = zero, zero
        for i in range(n):
            f[k, i] = (f[k, i] - p[k, i]) * eps[k]
            largest = max(largest, abs(f[k, i]))
        for j in range(m):
            g[k, j] = (g[k, j] - q[k, j]) * eps[k]
            largest = max(largest, abs(g[k, j]))
        if not largest <= real(MAX_UNITS) * eps[k]:
            return False
        if code == 2:
            for c in range(len(step)):
                step[c] = x_centre[k, c] - y_centre[k, c]
                half_square += half * step[c] * step[c]
        _add_terms(x[k], eps[k] * half, step, half_square, one, f[k], whole_f[k])
        _add_terms(y[k], one, step, half_square, -one, g[k], whole_g[k])
        of_x, of_y = (a[k] * whole_f[k]).sum(), (b[k] * whole_g[k]).sum()
        value[k] = of_x + of_y
        shift = (of_x - of_y) * half
        for i in range(n):
            whole_f[k, i] -= shift
        for j in range(m):
            whole_g[k, j] += shift
        iterations[k] = taken[k]
        converged[k] = error[k] <= real(tol) and abs(value[k]) < real(np.inf)
    return True


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _weigh(S, a, b, eps, p, q, f, g, scale, plan, row_sums, column_sums):
    """The plan times the gradient of the value, and its sums."""
    batch, n, m = S.shape
    zero, one = S.dtype.type(0), S.dtype.type(1)
    h = np.empty(m, S.dtype)
    for k in range(batch):
        rate = one / eps[k]
        column_sums[k] = zero
        for j in range(m):
            h[j] = g[k, j] * rate + q[k, j]
        for i in range(n):
            out, row, weight, sums = plan[k, i], S[k, i], b[k], column_sums[k]
            fi, factor, total = f[k, i] * rate + p[k, i], a[k, i] * scale[k], zero
            for j in range(m):
                e = _exp(row[j] + fi + h[j]) * (factor * weight[j])
                out[j] = e
                total += e
                sums[j] += e
            row_sums[k, i] = total


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _finish(raw, points, unit, sums, weight, push, step, code, grad):
    """grad holds Q (points of the other side); ``unit`` times points are the prepared ones."""
    real = raw.dtype.type
    zero, one, two = real(0), real(1), real(2)
    for i in range(len(raw)):
        if code == 0:
            for c in range(raw.shape[1]):
                grad[i, c] = -grad[i, c]
        elif code == 1:  # d(1 - x^ y^) / dx = (x^ (x^ y^) - y^) / |x|
            square, inner = zero, zero
            for c in range(raw.shape[1]):
                square += raw[i, c] * raw[i, c]
                inner += unit * points[i, c] * grad[i, c]
            inverse = one / math.sqrt(square) if square >= real(TINY) else zero
            for c in range(raw.shape[1]):
                grad[i, c] = (unit * points[i, c] * inner - grad[i, c]) * inverse
        else:
            moved = two * weight[i] * push
            for c in range(raw.shape[1]):
                grad[i, c] = two * (unit * points[i, c] * sums[i] - grad[i, c]) + moved * step[c]


@njit(nogil=True, error_model="numpy", cache=True)
def _through_cost(
    code, raw_x, raw_y, x, y, a, b, eps, scale, x_centre, y_centre, row_sums, column_sums, grad_x, grad_y
):  # fmt: skip
    """Gradients in the points from Q y, in grad_x, and (factor of x) Q^T x, in grad_y."""
    one = raw_x.dtype.type(1)
    for k in range(len(eps)):
        unit = eps[k] / raw_x.dtype.type(2 if code == 2 else 1)
        grad_y[k] *= unit
        step = x_centre[k] - y_centre[k]
        _finish(raw_x[k], x[k], unit, row_sums[k], a[k], scale[k], step, code, grad_x[k])
        _finish(raw_y[k], y[k], one, column_sums[k], b[k], -scale[k], step, code, grad_y[k])
