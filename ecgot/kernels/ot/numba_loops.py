"""Compiled loops of the CPU path: one problem stays in cache for all its iterations.

Everything is in units of eps. A problem is a block of a matrix S [rows, columns], and with terms p of its
rows and q of its columns, S_ij + p_i + q_j = -C_ij / eps: the terms move the potentials (f + p and g + q are
what the loops see) and touch nothing else, so that S may be a bare matrix product.

A pass in the log domain absorbs the potentials into the block K, whose rows then have weighted sums of 1;
from there an iteration is multiply-adds alone, a row and what it gives to the columns in one sweep. Where the
scaling of a column leaves a safe range, or that of a row does (which only unbalanced problems can make it),
one iteration runs in the log domain and absorbs anew.
"""

import math

import numpy as np
from numba import njit, types
from numba.extending import overload

TINY = 2.0**-126
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
        h[j] = g[j] if b[j] > 0 else lowest
    for i in range(n):
        row, out = S[r + i][c : c + m], K[i]
        top = _highest(row, h)
        if top == lowest:  # every cost is infinite
            top = real(0)
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
        if a[i] > 0:
            row, fi = S[r + i][c : c + m], f[i]
            for j in range(m):
                top[j] = max(top[j], row[j] + fi)
    for j in range(m):
        if top[j] == lowest:
            top[j] = real(0)
    for i in range(n):
        if a[i] > 0:
            row, fi, ai = S[r + i][c : c + m], f[i], a[i]
            for j in range(m):
                total[j] += ai * _exp((row[j] + fi - top[j]) * rate)
    for j in range(m):
        lse[j] = top[j] + temperature * math.log(total[j])


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _damp(lse, tau, term, out):
    """The potential of a log-sum-exp; ``term`` is what S leaves out of the cost."""
    one = lse.dtype.type(1)
    for i in range(len(lse)):
        out[i] = -tau * lse[i] + (one - tau) * term[i]


@njit(nogil=True, fastmath=FAST, error_model="numpy", inline="always")
def _row_error(a, f, f_next, tau, term):
    """|row marginal - a exp(-f / rho)| of a row; f_next is the update from g."""
    one, target = type(f)(1), type(f)(1)
    if tau < one:
        # Far clouds: the target underflows while the step to it overflows, and 0 * inf would be NaN.
        target = max(math.exp(-(f - term) * (one / tau - one)), type(f)(TINY))
    return a * (target * abs(math.expm1((f - f_next) / tau)))


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _residual(a, f, f_next, tau, term):
    """L1 distance of the row marginals of (f, g) from those that f asks for; f_next is the update from g."""
    error = f.dtype.type(0)
    for i in range(len(a)):
        if a[i] > 0:
            error += _row_error(a[i], f[i], f_next[i], tau, term[i])
    return error


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _sweep(K, a, w, u, u_next, t):
    """One balanced iteration: u_next from the columns' w, and from it the column sums t. -> marginal error"""
    n, m = K.shape
    one, error = K.dtype.type(1), K.dtype.type(0)
    t[:] = K.dtype.type(0)
    for i in range(n):
        row = K[i]
        s = K.dtype.type(0)
        for j in range(m):
            s += row[j] * w[j]
        u_next[i] = one / s
        error += a[i] * abs(u[i] * s - one)
        z = a[i] * u_next[i]
        for j in range(m):
            t[j] += z * row[j]
    return error


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _damped_sweep(K, a, w, f, f_next, u_next, t, lse, tau, term):
    """The same where the rows' marginals are not kept; u is free at rows without weight, f is not."""
    n, m = K.shape
    real = K.dtype.type
    one, error = real(1), real(0)
    t[:] = real(0)
    for i in range(n):
        row = K[i]
        s = real(0)
        for j in range(m):
            s += row[j] * w[j]
        f_next[i] = -tau * (math.log(s) + lse[i]) + (one - tau) * term[i]
        u_next[i] = math.exp(f_next[i] + lse[i])
        if a[i] > 0:
            error += _row_error(a[i], f[i], f_next[i], tau, term[i])
            z = a[i] * u_next[i]
            for j in range(m):
                t[j] += z * row[j]
    return error


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _columns(t, b, g0, tau, term, v, w):
    """The columns' scaling v, and w = b v, from their sums. -> whether all that weigh are in range"""
    real = t.dtype.type
    one, highest = real(1), real(SAFE)
    fine = True
    for j in range(len(t)):
        if tau == one:
            v[j] = one / t[j]
        else:
            v[j] = math.exp(-tau * (math.log(t[j]) - g0[j]) + (one - tau) * term[j] - g0[j])
        if b[j] == 0:  # its potential moves nothing, and is found at the end
            v[j] = one
        fine &= v[j] <= highest and v[j] * highest >= one
        w[j] = b[j] * v[j]
    return fine


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _in_range(a, u):
    one, highest = u.dtype.type(1), u.dtype.type(SAFE)
    fine = True
    for i in range(len(u)):
        fine &= not a[i] > 0 or (u[i] <= highest and u[i] * highest >= one)
    return fine


@njit(nogil=True, fastmath=FAST, error_model="numpy", cache=True)
def _solve(S, r, c, a, b, p, q, tau_x, tau_y, f, g, start, scaling, tol, max_iter, K, x_work, y_work):
    """One problem; f and g are filled, g holds where to start. -> marginal error, iterations"""
    n, m = K.shape
    real = S.dtype.type
    one = real(1)
    lse, u, u_next, f_next = x_work[0][:n], x_work[1][:n], x_work[2][:n], x_work[3][:n]
    t, v, v_next, w = y_work[0][:m], y_work[1][:m], y_work[2][:m], y_work[3][:m]
    iteration, temperature = 0, start
    while temperature > one:
        damped_x = one / (one + temperature * (one / tau_x - one))
        damped_y = one / (one + temperature * (one / tau_y - one))
        _row_pass(S, r, c, b, g, temperature, lse, K, False, t)
        _damp(lse, damped_x, p, f)
        _column_pass(S, r, c, a, f, temperature, t, v, w)
        _damp(w, damped_y, q, g)
        temperature *= scaling
        iteration += 1
    last = iteration + max_iter
    updated = False  # whether g is an update from f, so that there is a plan to judge
    error = real(np.inf)
    while True:
        _row_pass(S, r, c, b, g, one, lse, K, True, t)
        _damp(lse, tau_x, p, u_next)
        if updated:
            error = _residual(a, f, u_next, tau_x, p)
            if not error > tol or iteration >= last:  # so that NaN stops as well
                return error, iteration
        for i in range(n):
            f[i] = u_next[i]
            u[i] = one if tau_x == one else math.exp(f[i] + lse[i])
        iteration += 1
        absorbed = _in_range(a, u)
        if absorbed:
            t[:] = real(0)
            for i in range(n):
                if a[i] > 0:
                    row, z = K[i], a[i] * u[i]
                    for j in range(m):
                        t[j] += z * row[j]
            absorbed = _columns(t, b, g, tau_y, q, v, w)
        if not absorbed:
            _column_pass(S, r, c, a, f, one, t, v, w)
            _damp(w, tau_y, q, g)
            updated = True
            continue
        while True:
            if tau_x == one:
                error = _sweep(K, a, w, u, u_next, t)
            else:
                error = _damped_sweep(K, a, w, f, f_next, u_next, t, lse, tau_x, p)
            if not error > tol or iteration >= last:
                if tau_x == one:
                    for i in range(n):
                        f[i] = math.log(u[i]) - lse[i]
                for j in range(m):
                    g[j] += math.log(v[j])
                return error, iteration
            if not _in_range(a, u_next) or not _columns(t, b, g, tau_y, q, v_next, w):
                break
            u, u_next = u_next, u
            v, v_next = v_next, v
            if tau_x < one:
                for i in range(n):
                    f[i] = f_next[i]
            iteration += 1
        for j in range(m):
            g[j] += math.log(v[j])
        updated = False


@njit(nogil=True, error_model="numpy", cache=True)
def solve_blocks(
    S, usable, row, rows, column, columns, a, a_at, b, b_at, p, q, tau_x, tau_y, f, f_at, g, g_at, start,
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
    x_work, y_work = np.empty((4, n), S.dtype), np.empty((4, m), S.dtype)
    for k in range(first, last):
        if not usable[k]:
            continue
        n, m, r, c = rows[k], columns[k], row[k], column[k]
        ak, bk = a[a_at[k] : a_at[k] + n], b[b_at[k] : b_at[k] + m]
        pk, qk = p[a_at[k] : a_at[k] + n], q[b_at[k] : b_at[k] + m]
        fk, gk = f[f_at[k] : f_at[k] + n], g[g_at[k] : g_at[k] + m]
        K = buffer[: n * m].reshape((n, m))
        error[k], iterations[k] = _solve(
            S, r, c, ak, bk, pk, qk, tau_x[k], tau_y[k], fk, gk, start[k], scaling, tol, max_iter, K, x_work,
            y_work,
        )  # fmt: skip
        if bk.min() <= 0:  # the potential of a column without weight
            one, lse = S.dtype.type(1), y_work[2][:m]
            _column_pass(S, r, c, ak, fk, one, y_work[0][:m], y_work[1][:m], lse)
            for j in range(m):
                if bk[j] == 0:
                    gk[j] = -tau_y[k] * lse[j] + (one - tau_y[k]) * qk[j]


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
