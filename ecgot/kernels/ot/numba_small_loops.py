"""The compiled part of ``numba_small``: what surrounds the iterations of ``numba_loops``.

A problem is a block of S [B, N, M], and with terms p of its rows and q of its columns, S + p + q = -C / eps.
"""

import math

import numpy as np
from numba import njit

from ecgot.kernels.ot.numba_loops import FAST, _exp, solve_blocks
from ecgot.kernels.ot.problem import EXACT

DOT, COSINE, SQEUCLIDEAN, EUCLIDEAN, GIVEN = range(5)
MAX_UNITS = EXACT / 2  # of eps in a potential: beyond, rounding is to be judged
TINY = 2.0**-126


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
    """Prepared points times ``factor``, and each one's term, or square for distances.

    -> whether all can be squared
    """
    real = raw.dtype.type
    zero = real(0)
    total = zero
    for i in range(len(raw)):
        square = zero
        for c in range(len(centre)):
            value = raw[i, c] - centre[c] if code >= SQEUCLIDEAN else raw[i, c]
            out[i, c] = value
            square += value * value
        total += square
        scale = factor
        if code == COSINE:
            scale = factor / math.sqrt(square) if square >= real(TINY) else zero
        if scale != real(1):
            for c in range(len(centre)):
                out[i, c] *= scale
        term[i] = -square / eps if code == SQEUCLIDEAN else square if code == EUCLIDEAN else zero
    return total < real(np.inf)


@njit(nogil=True, error_model="numpy", cache=True)
def prepare(x, y, a, b, eps, x_out, y_out, p, q, x_centre, y_centre, common, known, code):
    """Prepared points, of x times the factor of S = x y, and their terms; the centres unless ``known``.

    common: the clouds may not be moved apart. -> whether all problems are usual
    """
    real = x.dtype.type
    zero, one, two = real(0), real(1), real(2)
    for k in range(len(eps)):
        if not (a[k].min() > 0 and b[k].min() > 0):
            return False
        if code >= SQEUCLIDEAN and not known:
            near_x, near_y = _mean(x[k], a[k], x_centre[k]), _mean(y[k], b[k], y_centre[k])
            if near_x and near_y:
                x_centre[k], y_centre[k] = zero, zero
            if common or code == EUCLIDEAN:
                x_centre[k] = (x_centre[k] + y_centre[k]) / two
                y_centre[k] = x_centre[k]
        factor = one if code == EUCLIDEAN else (two if code == SQEUCLIDEAN else one) / eps[k]
        fine = _side(x[k], x_centre[k], eps[k], code, factor, x_out[k], p[k])
        fine &= _side(y[k], y_centre[k], eps[k], code, one, y_out[k], q[k])
        if not fine:
            return False
        if code == COSINE:
            p[k] = -one / eps[k]
        elif code == EUCLIDEAN and known:
            p[k], q[k] = zero, zero
    return True


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def to_distances(S, p, q, eps):
    """S = -|x - y| / eps of the products x y and the squares p and q, which have served then."""
    zero, two = S.dtype.type(0), S.dtype.type(2)
    for k in range(len(S)):
        rate = -S.dtype.type(1) / eps[k]
        for i in range(S.shape[1]):
            row, pi, squares = S[k, i], p[k, i], q[k]
            for j in range(len(row)):
                row[j] = math.sqrt(max(pi + squares[j] - two * row[j], zero)) * rate
        p[k], q[k] = zero, zero


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def form(cost, a, b, eps, S, p, q):
    """S = -C / eps, without terms. -> whether all problems are usual"""
    real = cost.dtype.type
    for k in range(len(cost)):
        if not (a[k].min() > 0 and b[k].min() > 0):
            return False
        rate, fine = -real(1) / eps[k], True
        p[k], q[k] = real(0), real(0)
        for i in range(cost.shape[1]):
            given, out = cost[k, i], S[k, i]
            for j in range(len(given)):
                fine &= given[j] > -real(np.inf)  # NaN is not
                out[j] = given[j] * rate
        if not fine:
            return False
    return True


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _add_terms(points, scale, step, half_square, sign, potential, whole):
    """whole_i = potential_i + 2 sign x_i step + |step|^2 / 2, in which scale x_i are the points."""
    for i in range(len(points)):
        inner = half_square * 0
        for c in range(len(step)):
            inner += points[i, c] * step[c]
        whole[i] = potential[i] + sign * 2 * inner * scale + half_square


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _in_units(potential, term, eps):
    """From units of eps to those of the cost. -> the largest"""
    largest = eps * 0
    for i in range(len(potential)):
        potential[i] = (potential[i] - term[i]) * eps
        largest = max(largest, abs(potential[i]))
    return largest


@njit(nogil=True, error_model="numpy", cache=True)
def _dual_side(weight, potential, rho):
    """One side of the dual objective, and the mass that its plan moves."""
    one = weight.dtype.type(1)
    value, moved = one * 0, one * 0
    for i in range(len(weight)):
        if rho < np.inf:
            change = math.expm1(-potential[i] / rho)
            value -= weight[i] * rho * change
            moved += weight[i] * (change + one)
        else:
            value += weight[i] * potential[i]
            moved += weight[i]
    return value, moved


@njit(nogil=True, error_model="numpy", cache=True)
def _forbids_all(cost_units, eps, value):
    """Whether the value is beyond all finite costs, as it may be where forbidden pairs leave no plan."""
    least = np.inf
    for i in range(cost_units.shape[0]):
        for j in range(cost_units.shape[1]):
            if cost_units[i, j] > -np.inf:
                least = min(least, cost_units[i, j])
    return value > -least * eps


@njit(nogil=True, error_model="numpy", cache=True)
def solve(
    S, x, y, p, q, a, b, eps, rho_x, free_x, rho_y, free_y, x_centre, y_centre, start, code, tol, max_iter, f,
    g, whole_f, whole_g, value, error, iterations, converged,
):  # fmt: skip
    """The penalty of a side that is not free is not read. -> whether all problems are usual

    start: the potential g of the points' own costs to start from.
    """
    batch, n, m = S.shape
    real = S.dtype.type
    if not free_x:
        rho_x = np.full(batch, real(np.inf))
    if not free_y:
        rho_y = np.full(batch, real(np.inf))
    free = free_x or free_y
    zero, one, half = real(0), real(1), real(0.5)
    number, nothing = np.arange(batch), np.zeros(batch, np.int64)
    rows, columns, taken = nothing + n, nothing + m, nothing.copy()
    ones, most = np.ones(batch, S.dtype), np.finfo(S.dtype).max
    slack_x, slack_y = np.minimum(eps / rho_x, most), np.minimum(eps / rho_y, most)
    f[:] = zero
    whole_g[:] = zero
    moved_apart = code == SQEUCLIDEAN and not free
    for k in range(batch):
        if moved_apart:
            step = x_centre[k] - y_centre[k]
            _add_terms(y[k], one, step, half * (step * step).sum(), -one, whole_g[k], whole_g[k])
        for j in range(m):
            g[k, j] = (start[k, j] - whole_g[k, j]) / eps[k] + q[k, j]
    solve_blocks(
        S.reshape((batch * n, m)), ones > zero, number * n, rows, nothing, columns, a.ravel(), number * n,
        b.ravel(), number * m, p.ravel(), q.ravel(), slack_x, slack_y, f.ravel(), number * n, g.ravel(),
        number * m, ones, zero, real(tol), max_iter, error, taken, 0, batch,
    )  # fmt: skip
    for k in range(batch):
        largest = max(_in_units(f[k], p[k], eps[k]), _in_units(g[k], q[k], eps[k]))
        if not largest <= real(MAX_UNITS) * eps[k]:
            return False
        whole_f[k], whole_g[k] = f[k], g[k]
        if moved_apart:
            step = x_centre[k] - y_centre[k]
            half_square = half * (step * step).sum()
            _add_terms(x[k], eps[k] * half, step, half_square, one, f[k], whole_f[k])
            _add_terms(y[k], one, step, half_square, -one, g[k], whole_g[k])
        of_x, _ = _dual_side(a[k], whole_f[k], rho_x[k])
        of_y, moved = _dual_side(b[k], whole_g[k], rho_y[k])
        value[k] = of_x + of_y
        if free:
            value[k] -= eps[k] * (moved - a[k].sum() * b[k].sum())
        elif code == GIVEN and _forbids_all(S[k], eps[k], value[k]):
            return False
        if slack_x[k] == zero and slack_y[k] == zero:
            shift = (of_x - of_y) * half
            whole_f[k] -= shift
            whole_g[k] += shift
        iterations[k] = taken[k]
        converged[k] = error[k] <= real(tol) and abs(value[k]) < real(np.inf)
    return True


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def weigh(S, a, b, eps, p, q, f, g, scale, code, plan, row_sums, column_sums):
    """The plan times the gradient of the value, over the distance if there is one, and its sums."""
    batch, n, m = S.shape
    zero, one = S.dtype.type(0), S.dtype.type(1)
    h = np.empty(m, S.dtype)
    for k in range(batch):
        rate = one / eps[k]
        column_sums[k] = zero
        for j in range(m):  # nothing reaches a point that may match nothing
            h[j] = -np.inf if g[k, j] == np.inf else g[k, j] * rate + q[k, j]
        for i in range(n):
            out, row, weight, sums = plan[k, i], S[k, i], b[k], column_sums[k]
            fi, factor, total = f[k, i] * rate + p[k, i], a[k, i] * scale[k], zero
            if f[k, i] == np.inf:
                fi = -fi
            for j in range(m):
                out[j] = _exp(row[j] + fi + h[j]) * (factor * weight[j])
            if code == EUCLIDEAN:
                for j in range(m):
                    out[j] = -out[j] * rate / row[j] if row[j] < zero else zero
            for j in range(m):
                total += out[j]
                sums[j] += out[j]
            row_sums[k, i] = total


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _finish(raw, points, unit, sums, weight, push, step, code, grad):
    """grad holds Q (points of the other side); ``unit`` times points are the prepared ones."""
    real = raw.dtype.type
    zero, one, two = real(0), real(1), real(2)
    for i in range(len(raw)):
        if code == DOT:
            for c in range(raw.shape[1]):
                grad[i, c] = -grad[i, c]
        elif code == COSINE:  # d(1 - x^ y^) / dx = (x^ (x^ y^) - y^) / |x|
            square, inner = zero, zero
            for c in range(raw.shape[1]):
                square += raw[i, c] * raw[i, c]
                inner += unit * points[i, c] * grad[i, c]
            inverse = one / math.sqrt(square) if square >= real(TINY) else zero
            for c in range(raw.shape[1]):
                grad[i, c] = (unit * points[i, c] * inner - grad[i, c]) * inverse
        else:
            twice = two if code == SQEUCLIDEAN else one
            moved = two * weight[i] * push
            for c in range(raw.shape[1]):
                grad[i, c] = twice * (unit * points[i, c] * sums[i] - grad[i, c]) + moved * step[c]


@njit(nogil=True, error_model="numpy", cache=True)
def through_cost(
    code, raw_x, raw_y, x, y, a, b, eps, scale, x_centre, y_centre, row_sums, column_sums, grad_x, grad_y
):  # fmt: skip
    """Gradients in the points from Q y, in grad_x, and (factor of x) Q^T x, in grad_y."""
    one = raw_x.dtype.type(1)
    for k in range(len(eps)):
        unit = one
        if code != EUCLIDEAN:
            unit = eps[k] / raw_x.dtype.type(2 if code == SQEUCLIDEAN else 1)
        grad_y[k] *= unit
        step = x_centre[k] - y_centre[k]  # 0 where the clouds were not moved apart
        _finish(raw_x[k], x[k], unit, row_sums[k], a[k], scale[k], step, code, grad_x[k])
        _finish(raw_y[k], y[k], one, column_sums[k], b[k], -scale[k], step, code, grad_y[k])
