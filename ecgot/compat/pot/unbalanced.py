"""POT's ``ot.sinkhorn_unbalanced`` and ``ot.sinkhorn_unbalanced2``."""

from typing import Any

from ecgot.compat.pot.arrays import Arrays
from ecgot.compat.pot.missing import refuse_others
from ecgot.compat.pot.solvers import penalties
from ecgot.compat.pot.transport import Stopping, Transport, check_reg, solve_cost

__all__ = ["sinkhorn_unbalanced", "sinkhorn_unbalanced2"]
__getattr__ = refuse_others(__name__, __all__)

METHODS = ("sinkhorn", "sinkhorn_stabilized", "sinkhorn_translation_invariant", "sinkhorn_reg_scaling")


def sinkhorn_unbalanced(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    reg_m: Any,
    method: str = "sinkhorn",
    reg_type: str = "kl",
    c: Any = None,
    warmstart: Any = None,
    numItermax: int = 1000,
    stopThr: float = 1e-6,
    verbose: bool = False,
    log: bool = False,
    **kwargs: Any,
) -> Any:
    """``ot.sinkhorn_unbalanced``: the plan [N, M] whose marginals may miss a and b at the price reg_m KL.

    Args:
        a, b: weights [N] and [M] of any mass; empty for uniform ones.
        M: costs [N, M].
        reg: strength of the regulariser, KL(P | a b): ``reg_type`` must be "kl" and ``c`` None.
        reg_m: one price, or one for each marginal; infinity keeps it.
        method: one of POT's, which all have one solution.
        log: also return a dictionary with ``err``, ``logu``, ``logv``, ``cost`` and ``total_cost``.
        warmstart: logarithms of u and v to start from.
        numItermax, stopThr: most iterations, and the marginal error to stop at.
        verbose, kwargs: taken, and without effect.
    """
    arrays, found = _solved(a, b, M, reg, reg_m, (method, reg_type, c), (numItermax, stopThr, warmstart))
    plan = arrays.back(found.plan()[0])
    return (plan, _log(found, arrays)) if log else plan


def sinkhorn_unbalanced2(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    reg_m: Any,
    method: str = "sinkhorn",
    reg_type: str = "kl",
    c: Any = None,
    warmstart: Any = None,
    returnCost: str = "linear",
    numItermax: int = 1000,
    stopThr: float = 1e-6,
    verbose: bool = False,
    log: bool = False,
    **kwargs: Any,
) -> Any:
    """``ot.sinkhorn_unbalanced2``: <P, M> of that plan, or with ``returnCost="total"`` the objective."""
    if returnCost not in ("linear", "total"):
        raise ValueError(f"returnCost: expected 'linear' or 'total', got {returnCost!r}")
    arrays, found = _solved(a, b, M, reg, reg_m, (method, reg_type, c), (numItermax, stopThr, warmstart))
    cost = arrays.back((found.value_linear() if returnCost == "linear" else found.value("kl"))[0])
    return (cost, _log(found, arrays)) if log else cost


def _solved(
    a: Any, b: Any, M: Any, reg: float, reg_m: Any, kind: tuple[Any, ...], run: tuple[Any, ...]
) -> tuple[Arrays, Transport]:
    """``kind``: method, reg_type and c; ``run``: numItermax, stopThr and warmstart."""
    method, reg_type, c = kind
    if method.lower() not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if reg_type.lower() != "kl" or c is not None:
        raise ValueError(f"reg_type and c: expected 'kl' and None (else use POT itself), got {reg_type!r}")
    if getattr(b, "ndim", 1) > 1:
        raise ValueError(f"b: expected weights [M] (for several histograms use POT itself), got {b.shape}")
    arrays = Arrays(a, b, M)
    cost = arrays.shaped("M", M, "costs [N, M]")
    n, m = cost.shape
    a, b = arrays.weights("a", a, n, cost)[None], arrays.weights("b", b, m, cost)[None]
    start = None if run[2] is None else arrays.of_shape("warmstart", run[2][1], (m,), cost)[None]
    options: dict[str, Any] = {"rhos": penalties(reg_m), "start": start}
    return arrays, solve_cost(cost[None], a, b, check_reg(reg), Stopping(run[0], run[1]), **options)


def _log(found: Transport, arrays: Arrays) -> dict[str, Any]:
    log_u, log_v = found.relative_scalings()
    return {
        "err": [float(found.out.marginal_error.max())],
        "logu": arrays.back(log_u[0]),
        "logv": arrays.back(log_v[0]),
        "cost": arrays.back(found.value_linear()[0]),
        "total_cost": arrays.back(found.value("kl")[0]),
    }
