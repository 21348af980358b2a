"""Compiled loops of the CPU path: one problem stays in cache for all its iterations.

Everything is in units of eps. A problem is a block of a matrix S [rows, columns], and with terms p of its
rows and q of its columns, S_ij + p_i + q_j = -C_ij / eps: the terms move the potentials (f + p and g + q are
what the loops see) and touch nothing else, so that S may be a bare matrix product.

A pass in the log domain absorbs the potentials into the block K, whose rows then have weighted sums of 1;
from there an iteration is multiply-adds alone, a row and what it gives to the columns in one sweep. Where the
scaling of a column leaves a safe range, or that of a row does (which only unbalanced problems can make it),
one iteration runs in the log domain and absorbs anew.

A point that may match nothing has the potential infinity, and takes no part.
"""

import math

import numpy as np
from numba import njit, types
from numba.extending import overload

SAFE = 1e10  # of u and v: what underflowed in K, below 1e-38, then still is below 1e-18 of a row
# Sums may be reordered, which lets them use vector registers; NaN and infinity keep their meaning.
FAST = {"reassoc", "contract", "nsz", "arcp"}


def _exp(x):
    return math.exp(x)


@overload(_exp, inline="always")
def _exp_of(x):
    """In fp32 a polynomial, good to 2e-7 between -87 and 88: a loop over it uses vector registers."""
    if x != types.float32:
        return lambda x: math.exp(min(x, 700.0))

    def polynomial(x):
        x = min(max(x, np.float32(-87.0)), np.float32(88.0))
        k = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
        r = x - k * np.float32(0.693359375) + k * np.float32(2.12194440e-4)
        p = np.float32(1.9875691500e-4) * r + np.float32(1.3981999507e-3)
        p = p * r + np.float32(8.3334519073e-3)
        p = p * r + np.float32(4.1665795894e-2)
        p = p * r + np.float32(1.6666665459e-1)
        p = p * r + np.float32(5.0000001201e-1)
        p = p * r * r + r + np.float32(1.0)
        return p * np.int32(np.int32(np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)

    return polynomial


@njit(nogil=True, fastmath=FAST | {"nnan"}, error_model="numpy", cache=True)
def _highest(row, g):
    """max_j row_j + g_j. Without heed of NaN, which would keep it from vector registers: the caller knows."""
    top = row.dtype.type(-np.inf)
    for j in range(len(row)):
        top = max(top, row[j] + g[j])
    return top


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _row_pass(S, r, c, b, g, temperature, lse, K, absorb, h):
    """lse_i = T log sum_j b_j exp((S_ij + g_j) / T); where ``absorb``, K_ij = exp(S_ij + g_j - lse_i).

    The block of S begins at row r and column c. (A view of it would hide that its rows are contiguous.)
    """
    n, m = K.shape
    real = S.dtype.type
    lowest, one = real(-np.inf), real(1)
    rate = one / temperature
    for j in range(m):
        h[j] = lowest if b[j] == 0 or g[j] == np.inf else g[j]
    for i in range(n):
        row, out = S[r + i][c : c + m], K[i]
        top = _highest(row, h)
        if top == lowest:  # every cost is infinite
            lse[i] = lowest
            out[:] = real(0)
            continue
        total = real(0)
        for j in range(m):
            e = _exp((row[j] + h[j] - top) * rate)
            out[j] = e
            total += b[j] * e
        lse[i] = top + temperature * math.log(total)
        if absorb:
            scale = one / total
            for j in range(m):
                out[j] *= scale


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _column_pass(S, r, c, a, f, temperature, top, total, lse):
    """lse_j = T log sum_i a_i exp((S_ij + f_i) / T)."""
    n, m = len(a), len(lse)
    real = S.dtype.type
    lowest, rate = real(-np.inf), real(1) / temperature
    top[:] = lowest
    total[:] = real(0)
    for i in range(n):
        if a[i] > 0 and f[i] != np.inf:
            row, fi = S[r + i][c : c + m], f[i]
            for j in range(m):
                top[j] = max(top[j], row[j] + fi)
    for i in range(n):
        if a[i] > 0 and f[i] != np.inf:
            row, fi, ai = S[r + i][c : c + m], f[i], a[i]
            for j in range(m):
                total[j] += ai * _exp((row[j] + fi - top[j]) * rate)
    for j in range(m):  # where every cost is infinite the total is NaN, or what is left of an exponential
        lse[j] = lowest if top[j] == lowest else top[j] + temperature * math.log(total[j])


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _damp(lse, slack, term, out):
    """The potential of a log-sum-exp, slack = eps / rho; ``term`` is what S leaves out of the cost."""
    one = lse.dtype.type(1)
    tau = one / (one + slack)
    for i in range(len(lse)):
        out[i] = -tau * lse[i] + slack * tau * term[i]


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _has_no_partner(weight, potential):
    """Whether a point with weight may match nothing."""
    found = False
    for i in range(len(weight)):
        found |= weight[i] > 0 and potential[i] == np.inf
    return found


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _in_range(a, u):
    one, highest = u.dtype.type(1), u.dtype.type(SAFE)
    fine = True
    for i in range(len(u)):
        fine &= not a[i] > 0 or (u[i] <= highest and u[i] * highest >= one)
    return fine


# --- both marginals are kept --------------------------------------------------------------------------------


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _residual(a, f, f_next):
    """L1 distance of the row marginals of (f, g) from a; f_next is the update from g."""
    error = f.dtype.type(0)
    for i in range(len(a)):
        if a[i] > 0:
            error += a[i] * abs(math.expm1(f[i] - f_next[i]))
    return error


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _sweep(K, a, w, u, u_next, t):
    """One iteration: u_next from the columns' w, and from it the column sums t. -> marginal error"""
    n, m = K.shape
    one, error = K.dtype.type(1), K.dtype.type(0)
    t[:] = K.dtype.type(0)
    for i in range(n):
        row = K[i]
        s = K.dtype.type(0)
        for j in range(m):
            s += row[j] * w[j]
        if s == 0:  # a point without weight that may match nothing
            s = one
        u_next[i] = one / s
        error += a[i] * abs(u[i] * s - one)
        z = a[i] * u_next[i]
        for j in range(m):
            t[j] += z * row[j]
    return error


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _columns(t, b, v, w):
    """The columns' scaling v, and w = b v, from their sums. -> whether all that weigh are in range"""
    one, highest = t.dtype.type(1), t.dtype.type(SAFE)
    fine = True
    for j in range(len(t)):
        v[j] = one / t[j]
        if b[j] == 0:  # its potential moves nothing, and is found at the end
            v[j] = one
        fine &= v[j] <= highest and v[j] * highest >= one
        w[j] = b[j] * v[j]
    return fine


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _solve_kept(S, r, c, a, b, p, q, f, g, tol, iteration, last, K, x_work, y_work):
    """f and g at eps, of which g holds where to start. -> marginal error, iterations"""
    n, m = K.shape
    real = S.dtype.type
    one, zero = real(1), real(0)
    lse, u, u_next = x_work[0][:n], x_work[1][:n], x_work[2][:n]
    t, v, v_next, w = y_work[0][:m], y_work[1][:m], y_work[2][:m], y_work[3][:m]
    updated = False  # whether g is an update from f, so that there is a plan to judge
    error = real(np.inf)
    while True:
        _row_pass(S, r, c, b, g, one, lse, K, True, t)
        _damp(lse, zero, p, u_next)
        if updated:
            error = _residual(a, f, u_next)
            if not error > tol or iteration >= last:  # so that NaN stops as well
                return error, iteration
        for i in range(n):
            f[i] = u_next[i]
            u[i] = one
        iteration += 1
        if _has_no_partner(a, f) or _has_no_partner(b, g):  # there is no plan
            return real(np.inf), iteration
        t[:] = zero
        for i in range(n):
            if a[i] > 0:
                row, z = K[i], a[i]
                for j in range(m):
                    t[j] += z * row[j]
        if not _columns(t, b, v, w):
            _column_pass(S, r, c, a, f, one, t, v, w)
            _damp(w, zero, q, g)
            updated = True
            continue
        while True:
            error = _sweep(K, a, w, u, u_next, t)
            if not error > tol or iteration >= last:
                for i in range(n):
                    f[i] = math.log(u[i]) - lse[i]
                for j in range(m):
                    g[j] += math.log(v[j])
                return error, iteration
            if not _in_range(a, u_next) or not _columns(t, b, v_next, w):
                break
            u, u_next = u_next, u
            v, v_next = v_next, v
            iteration += 1
        for j in range(m):
            g[j] += math.log(v[j])
        updated = False


# --- a marginal is free -------------------------------------------------------------------------------------
# With s the row sums over K, log u = away (lse + p) - tau log s, away = 1 - tau. The first term, ``base``,
# stays while K does, and may be far from 0 where rho is small: it enters the rows' masses a exp(base), whose
# sum is kept apart as a logarithm, the ``level``. f may be so large that differences of it would be rounding.


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _log_sum(log_values):
    """log sum exp; -inf if there is nothing."""
    real = log_values.dtype.type
    top = real(-np.inf)
    for i in range(len(log_values)):
        top = max(top, log_values[i])
    if top == -np.inf:
        return top
    total = real(0)
    for i in range(len(log_values)):
        total += math.exp(log_values[i] - top)
    return top + math.log(total)


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _shift(of_rows, of_columns, rate, unit):
    """As iteration.Shift, from the logarithms of both sides' masses; ``unit`` is their rounding."""
    certain = abs(of_rows - of_columns) > unit * (abs(of_rows) + abs(of_columns))
    return rate * (of_rows - of_columns) * certain


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _log_targets(log_weight, slack, potential, term, out):
    """out_i = log(a_i exp(-f_i / rho)). -> their log-sum-exp"""
    lowest = out.dtype.type(-np.inf)
    for i in range(len(out)):
        if log_weight[i] == lowest or potential[i] == np.inf:
            out[i] = lowest
        else:
            out[i] = log_weight[i] - slack * (potential[i] - term[i])
    return _log_sum(out)


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _free_sweep(K, mass, w, base, tau, sums, jump, share, sums_next, t):
    """The logarithms of the row sums, and the column sums t that they lead to. -> marginal error

    jump: shift / tau of the potential that is judged, whose row sums were ``sums``.
    """
    n, m = K.shape
    real = K.dtype.type
    lowest, zero, error = real(-np.inf), real(0), real(0)
    t[:] = zero
    for i in range(n):
        if base[i] == lowest:
            sums_next[i] = zero
            continue
        row = K[i]
        s = zero
        for j in range(m):
            s += row[j] * w[j]
        ls = math.log(s)
        sums_next[i] = ls
        if share[i] > lowest:
            d = ls - sums[i] + jump
            error += math.exp(share[i] + max(d, zero)) * -math.expm1(-abs(d))
            z = mass[i] * math.exp(-tau * ls)
            for j in range(m):
                t[j] += z * row[j]
    return error


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _free_rows(log_a, base, away, sums, target):
    """target_i = log(a_i exp(-f_i / rho)) less their log-sum-exp, which is returned; before the shift"""
    lowest = target.dtype.type(-np.inf)
    for i in range(len(target)):
        if log_a[i] == lowest or base[i] == lowest:
            target[i] = lowest
        else:
            target[i] = log_a[i] + base[i] + away * sums[i]
    total = _log_sum(target)
    for i in range(len(target)):
        target[i] -= total
    return total


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _free_columns(t, b, log_b, g0, slack, term, level, least, v, w, target):
    """v, w = b v and the columns' targets from their sums. -> whether all are in range and exact"""
    real = t.dtype.type
    one, highest, lowest = real(1), real(SAFE), real(-np.inf)
    tau, fine = one / (one + slack), True
    for j in range(len(t)):
        v[j] = one
        w[j] = real(0)
        target[j] = lowest
        if b[j] > 0 and g0[j] != np.inf:
            lse = math.log(t[j]) + level
            away = slack * tau * (g0[j] - term[j])
            v[j] = math.exp(-tau * lse - away)
            w[j] = b[j] * v[j]
            target[j] = log_b[j] + slack * tau * lse - away
            # Where tau is small v stays near 1 even if the sum that it comes from underflows.
            fine &= v[j] <= highest and v[j] * highest >= one and t[j] >= least
    return fine


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _free_range(mass, tau, sums):
    """Whether the rows' scaling since K was formed is in range."""
    most = mass.dtype.type(math.log(SAFE))
    fine = True
    for i in range(len(mass)):
        fine &= not mass[i] > 0 or abs(tau * sums[i]) <= most
    return fine


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _solve_free(S, r, c, a, b, p, q, slack_x, slack_y, f, g, tol, iteration, last, K, x_work, y_work):
    """As _solve_kept; before each update of the columns the potentials are shifted, see iteration.Shift."""
    n, m = K.shape
    real = S.dtype.type
    one, zero, lowest = real(1), real(0), real(-np.inf)
    lse, base, sums, sums_next = x_work[0][:n], x_work[1][:n], x_work[2][:n], x_work[3][:n]
    mass, share, share_next, log_a = x_work[4][:n], x_work[5][:n], x_work[6][:n], x_work[7][:n]
    t, v, v_next, w = y_work[0][:m], y_work[1][:m], y_work[2][:m], y_work[3][:m]
    target, log_b = y_work[4][:m], y_work[5][:m]
    tau_x, rate = one / (one + slack_x), one / (slack_x + slack_y)
    away_x = slack_x * tau_x
    unit, least = real(4) * np.finfo(S.dtype).eps, np.finfo(S.dtype).tiny * real(1e8)
    updated = False
    error = real(np.inf)
    while True:
        _row_pass(S, r, c, b, g, one, lse, K, True, t)
        if updated:
            error = zero
            for i in range(n):
                if share[i] > lowest:  # the step from f to the update from g, as below: at rest it is 0
                    d = (f[i] - (away_x * (lse[i] + p[i]) - lse[i])) / tau_x
                    error += math.exp(share[i] + max(d, zero)) * -math.expm1(-abs(d))
            if not error > tol or iteration >= last:
                return error, iteration
        for i in range(n):
            base[i] = lowest if lse[i] == lowest else away_x * (lse[i] + p[i])
            sums[i] = zero
        level = _free_rows(log_a, base, away_x, sums, share)
        shift = _shift(level, _log_targets(log_b, slack_y, g, q, target), rate, unit)
        for i in range(n):
            f[i] = real(np.inf) if base[i] == lowest else base[i] + shift - lse[i]
        iteration += 1
        if (slack_x == zero and _has_no_partner(a, f)) or (slack_y == zero and _has_no_partner(b, g)):
            return real(np.inf), iteration
        t[:] = zero
        for i in range(n):
            mass[i] = math.exp(share[i])
            row, z = K[i], mass[i]
            for j in range(m):
                t[j] += z * row[j]
        if not _free_columns(t, b, log_b, g, slack_y, q, level + shift, least, v, w, target):
            _column_pass(S, r, c, a, f, one, t, v, w)
            _damp(w, slack_y, q, g)
            updated = True
            continue
        while True:
            error = _free_sweep(K, mass, w, base, tau_x, sums, shift / tau_x, share, sums_next, t)
            stop = not error > tol or iteration >= last
            if stop:
                for i in range(n):
                    if base[i] > lowest:
                        f[i] = base[i] - tau_x * sums[i] + shift - lse[i]
                break
            if not _free_range(mass, tau_x, sums_next):
                break
            rows = _free_rows(log_a, base, away_x, sums_next, share_next)
            following = _shift(rows, _log_sum(target), rate, unit)
            if not _free_columns(t, b, log_b, g, slack_y, q, level + following, least, v_next, w, target):
                break
            shift = following
            sums, sums_next = sums_next, sums
            share, share_next = share_next, share
            v, v_next = v_next, v
            iteration += 1
        for j in range(m):
            g[j] += math.log(v[j])
        if stop:
            return error, iteration
        updated = False


# --- problems -----------------------------------------------------------------------------------------------


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _solve(S, r, c, a, b, p, q, slack_x, slack_y, f, g, start, scaling, tol, max_iter, K, x_work, y_work):
    """One problem; f and g are filled, g holds where to start. -> marginal error, iterations"""
    n, m = K.shape
    one = S.dtype.type(1)
    free, unit = slack_x > 0 or slack_y > 0, S.dtype.type(4) * np.finfo(S.dtype).eps
    lse, share, log_a = x_work[0][:n], x_work[5][:n], x_work[7][:n]
    t, v, w, target, log_b = y_work[0][:m], y_work[1][:m], y_work[3][:m], y_work[4][:m], y_work[5][:m]
    if free:
        for i in range(n):
            log_a[i] = math.log(a[i])
        for j in range(m):
            log_b[j] = math.log(b[j])
    iteration, temperature = 0, start
    while temperature > one:
        _row_pass(S, r, c, b, g, temperature, lse, K, False, t)
        _damp(lse, temperature * slack_x, p, f)
        if free:
            rows = _log_targets(log_a, slack_x, f, p, share)
            columns = _log_targets(log_b, slack_y, g, q, target)
            shift = _shift(rows, columns, one / (slack_x + slack_y), unit)
            for i in range(n):
                f[i] += shift
        _column_pass(S, r, c, a, f, temperature, t, v, w)
        _damp(w, temperature * slack_y, q, g)
        temperature *= scaling
        iteration += 1
    last = iteration + max_iter
    if free:
        return _solve_free(
            S, r, c, a, b, p, q, slack_x, slack_y, f, g, tol, iteration, last, K, x_work, y_work
        )  # fmt: skip
    return _solve_kept(S, r, c, a, b, p, q, f, g, tol, iteration, last, K, x_work, y_work)


@njit(nogil=True, error_model="numpy", cache=True)
def solve_blocks(
    S, usable, row, rows, column, columns, a, a_at, b, b_at, p, q, slack_x, slack_y, f, f_at, g, g_at, start,
    scaling, tol, max_iter, error, iterations, first, last,
):  # fmt: skip
    """Solve the usable blocks of ``first`` to ``last`` of S.

    Block k is S[row[k] : row[k] + rows[k], column[k] : column[k] + columns[k]]. Its weights stand
    from a_at[k] and b_at[k] in a and b (as do p and q), its potentials from f_at[k] and g_at[k] in f and g,
    of which g holds where to start; error and iterations take its outcome.
    """
    if last <= first:
        return
    n, m = rows[first:last].max(), columns[first:last].max()
    buffer = np.empty(n * m, S.dtype)
    x_work, y_work = np.empty((8, n), S.dtype), np.empty((6, m), S.dtype)
    for k in range(first, last):
        if not usable[k]:
            continue
        n, m, r, c = rows[k], columns[k], row[k], column[k]
        ak, bk = a[a_at[k] : a_at[k] + n], b[b_at[k] : b_at[k] + m]
        pk, qk = p[a_at[k] : a_at[k] + n], q[b_at[k] : b_at[k] + m]
        fk, gk = f[f_at[k] : f_at[k] + n], g[g_at[k] : g_at[k] + m]
        K = buffer[: n * m].reshape((n, m))
        error[k], iterations[k] = _solve(
            S, r, c, ak, bk, pk, qk, slack_x[k], slack_y[k], fk, gk, start[k], scaling, tol, max_iter, K,
            x_work, y_work,
        )  # fmt: skip
        if bk.min() <= 0:  # the potential of a column without weight
            one, lse, more = S.dtype.type(1), y_work[2][:m], y_work[3][:m]
            _column_pass(S, r, c, ak, fk, one, y_work[0][:m], y_work[1][:m], lse)
            _damp(lse, slack_y[k], qk, more)
            for j in range(m):
                if bk[j] == 0:
                    gk[j] = more[j]


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def vjp_blocks(
    S, row, rows, column, columns, left, left_at, right, right_at, f, f_at, g, g_at, scale, distance, first,
    last,
):  # fmt: skip
    """S_ij <- exp(S_ij + f_i + g_j) left_i right_j scale in blocks ``first`` to ``last``.

    Args:
        left, right: from left_at[k] and right_at[k]; f and g from f_at[k] and g_at[k].
        scale: of each block.
        distance: S is minus a distance in units of eps; divide by it once more, as its derivative wants.
    """
    zero = S.dtype.type(0)
    for k in range(first, last):
        n, m, c = rows[k], columns[k], column[k]
        if scale[k] == zero:  # nothing asks for this problem: what is NaN in it stays there
            for i in range(n):
                S[row[k] + i][c : c + m] = zero
            continue
        gk, rk = g[g_at[k] : g_at[k] + m], right[right_at[k] : right_at[k] + m]
        for i in range(n):
            out, fi, factor = S[row[k] + i][c : c + m], f[f_at[k] + i], left[left_at[k] + i] * scale[k]
            if distance:
                for j in range(m):
                    e = _exp(out[j] + fi + gk[j]) * (factor * rk[j])
                    out[j] = -e / out[j] if out[j] < zero else zero
            else:
                for j in range(m):
                    out[j] = _exp(out[j] + fi + gk[j]) * (factor * rk[j])
