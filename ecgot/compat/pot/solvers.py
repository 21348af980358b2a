"""POT's ``ot.solve`` and ``ot.solve_sample`` for entropic transport, balanced or not."""

import math
from typing import Any

from torch import Tensor

from ecgot.compat.pot.arrays import Arrays
from ecgot.compat.pot.missing import refuse_others
from ecgot.compat.pot.result import GRADIENTS, LazyPlan, OTResult
from ecgot.compat.pot.transport import Stopping, Transport, check_reg, solve_cost, solve_points
from ecgot.compat.pot.utils import costs, points

__all__ = ["solve", "solve_sample"]
__getattr__ = refuse_others(__name__, __all__)

REG_TYPES = ("kl", "entropy")
METHODS = (None, "sinkhorn", "sinkhorn_log")
OUR_COSTS = ("sqeuclidean", "euclidean", "cosine")  # solved from points, without a matrix
BLOCK = 100  # POT's rows at a time of a lazy plan


def solve(
    M: Any,
    a: Any = None,
    b: Any = None,
    reg: float | None = None,
    c: Any = None,
    reg_type: str = "KL",
    unbalanced: Any = None,
    unbalanced_type: str = "KL",
    method: str | None = None,
    n_threads: int = 1,
    max_iter: int | None = None,
    plan_init: Any = None,
    potentials_init: Any = None,
    tol: float | None = None,
    verbose: bool = False,
    grad: str = "autodiff",
) -> OTResult:
    """``ot.solve`` with ``reg > 0``.

    Args:
        M: costs [N, M]; infinity forbids a pair.
        a, b: weights [N] and [M], uniform if None.
        reg, reg_type: strength of the regulariser, "KL" or "entropy".
        unbalanced: penalty of missed marginals, one number or two; infinity keeps one. ``reg_type`` is "KL".
        max_iter, tol: 1000 and 1e-9 if None; in fp32 a ``tol`` below 1e-5 counts as that.
        potentials_init: where to start, if ``unbalanced``.
        grad: "autodiff" and "last_step" make value, plan and potentials differentiable, by implicit
            differentiation; "envelope" only the value; "detach" nothing.
        c, unbalanced_type: None and "KL"; others are POT's.
        n_threads, plan_init, verbose: taken, and without effect.
    """
    kind = _check(reg_type, unbalanced, unbalanced_type, c, method, grad)
    arrays = Arrays(M, a, b)
    cost = arrays.shaped("M", M, "costs [N, M]")
    n, m = cost.shape
    weights = arrays.weights("a", a, n, cost)[None], arrays.weights("b", b, m, cost)[None]
    stopping = Stopping(1000 if max_iter is None else max_iter, 1e-9 if tol is None else tol)
    start = _start(arrays, potentials_init, unbalanced, weights[1])
    rhos = penalties(unbalanced)
    found = solve_cost(cost[None], *weights, check_reg(reg), stopping, rhos=rhos, start=start)
    return _result(found, arrays, kind, grad, unbalanced is not None)


def solve_sample(
    X_a: Any,
    X_b: Any,
    a: Any = None,
    b: Any = None,
    metric: str = "sqeuclidean",
    reg: float | None = None,
    c: Any = None,
    reg_type: str = "KL",
    unbalanced: Any = None,
    unbalanced_type: str = "KL",
    lazy: bool = False,
    batch_size: int | None = None,
    method: str | None = None,
    n_threads: int = 1,
    max_iter: int | None = None,
    plan_init: Any = None,
    rank: int = 100,
    scaling: float = 0.95,
    potentials_init: Any = None,
    X_init: Any = None,
    tol: float | None = None,
    verbose: bool = False,
    grad: str = "autodiff",
    random_state: Any = None,
    debias: bool = False,
    n_projections: int = 50,
    projections: Any = None,
    scaler: Any = None,
) -> OTResult:
    """``ot.solve_sample`` with ``reg > 0``: :func:`solve` between points [N, D] and [M, D].

    No matrix of costs is stored where ``metric`` is "sqeuclidean", "euclidean" or "cosine", and no plan until
    it is asked for, whether ``lazy`` or not. With ``lazy`` the result has a ``lazy_plan`` in place of a
    ``plan``, as POT's has, and sums it in blocks of ``batch_size`` rows, 100 if None.

    ``debias`` and ``scaler`` must be off; the other arguments that :func:`solve` does not have are taken, and
    without effect.
    """
    if debias:
        raise ValueError(f"debias: expected False (for True use ecgot.sinkhorn_divergence), got {debias!r}")
    if scaler is not None:
        raise ValueError(f"scaler: expected None, got {scaler!r}")
    kind = _check(reg_type, unbalanced, unbalanced_type, c, method, grad)
    arrays = Arrays(X_a, X_b, a, b)
    x, y = points(arrays, ("X_a", "X_b"), X_a, X_b, "[N, D]")
    weights = arrays.weights("a", a, len(x), x)[None], arrays.weights("b", b, len(y), x)[None]
    stopping = Stopping(1000 if max_iter is None else max_iter, 1e-9 if tol is None else tol)
    start = _start(arrays, potentials_init, unbalanced, weights[1])
    options: dict[str, Any] = {"rhos": penalties(unbalanced), "start": start}
    if metric in OUR_COSTS:
        found = solve_points(x[None], y[None], *weights, check_reg(reg), stopping, metric=metric, **options)
    else:
        found = solve_cost(costs(x[None], y[None], metric), *weights, check_reg(reg), stopping, **options)
    result = _result(found, arrays, kind, grad, unbalanced is not None)
    if lazy:
        differentiable = grad in ("autodiff", "last_step")
        block = batch_size or BLOCK
        result.lazy_plan = LazyPlan(found, arrays, (x, y), metric, block, detach=not differentiable)
    return result


def _result(found: Transport, arrays: Arrays, kind: str, grad: str, relative: bool) -> OTResult:
    """``relative``: whether the potentials leave the weights out, as POT's do where unbalanced."""
    potentials = found.relative_scalings() if relative else found.log_scalings()
    return OTResult(found, arrays, reg_type=kind, grad=grad, batched=False, potentials=potentials)


def _check(
    reg_type: Any, unbalanced: Any, unbalanced_type: str, c: Any, method: str | None, grad: str
) -> str:
    """The regulariser in lower case; what POT alone can do is an error."""
    kind = reg_type.lower() if isinstance(reg_type, str) else reg_type
    if kind not in REG_TYPES or (unbalanced is not None and kind != "kl"):
        expected = "'KL'" if unbalanced is not None else "'KL' or 'entropy'"
        raise ValueError(f"reg_type: expected {expected} (for others use POT itself), got {reg_type!r}")
    if unbalanced_type.lower() != "kl":
        raise ValueError(
            f"unbalanced_type: expected 'KL' (for others use POT itself), got {unbalanced_type!r}"
        )
    if c is not None:
        raise ValueError("c: expected None (for another reference measure use POT itself), got one")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS} (for others use POT itself), got {method!r}")
    if grad not in GRADIENTS:
        raise ValueError(f"grad: expected one of {', '.join(map(repr, GRADIENTS))}, got {grad!r}")
    return kind


def _start(arrays: Arrays, potentials: Any, unbalanced: Any, like: Tensor) -> Tensor | None:
    """log v, shaped like b [1, M], of potentials to start from; POT, too, does so only where unbalanced."""
    if unbalanced is None or potentials is None:
        return None
    return arrays.of_shape("potentials_init", potentials[1], (like.shape[1],), like)[None]


def penalties(unbalanced: Any) -> tuple[float, float]:
    """The price of missing either marginal, of one number or two; infinite where the marginals are kept."""
    if unbalanced is None:
        return math.inf, math.inf
    pair = [float(each) for each in unbalanced] if hasattr(unbalanced, "__len__") else [float(unbalanced)]
    return pair[0], pair[-1]
