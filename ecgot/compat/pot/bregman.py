"""POT's ``ot.sinkhorn``, the plan, and ``ot.sinkhorn2``, what it costs."""

from typing import Any

import torch
from torch import Tensor

from ecgot.compat.pot.arrays import Arrays
from ecgot.compat.pot.missing import refuse_others
from ecgot.compat.pot.transport import Stopping, Transport, check_reg, solve_cost

__all__ = ["sinkhorn", "sinkhorn2"]
__getattr__ = refuse_others(__name__, __all__)

METHODS = ("sinkhorn", "sinkhorn_log", "greenkhorn", "sinkhorn_stabilized", "sinkhorn_epsilon_scaling")


def sinkhorn(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: Any = None,
    **kwargs: Any,
) -> Any:
    """``ot.sinkhorn``: the plan [N, M]; costs <P, M> [K] where b holds K histograms, [M, K].

    Args:
        a, b: weights [N] and [M] of one sum; empty for uniform ones.
        M: costs [N, M]; infinity forbids a pair.
        reg: strength of the entropy.
        method: one of POT's, which all have one solution.
        numItermax, stopThr: most iterations, and the marginal error to stop at; in fp32 one below 1e-5 counts
            as that.
        log: also return a dictionary with ``err``, ``niter``, ``u``, ``v``, ``log_u`` and ``log_v``.
        warn: warn where it did not converge.
        warmstart: logarithms of u and v to start from.
        verbose, kwargs: taken, and without effect.
    """
    arrays, found, many = _solved(a, b, M, reg, method, Stopping(numItermax, stopThr, warn), warmstart)
    result = found.value_linear() if many else found.plan()[0]
    return (arrays.back(result), _log(found, arrays, many)) if log else arrays.back(result)


def sinkhorn2(
    a: Any,
    b: Any,
    M: Any,
    reg: float,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = False,
    warmstart: Any = None,
    **kwargs: Any,
) -> Any:
    """``ot.sinkhorn2``: <P, M> of the plan of :func:`sinkhorn`, without the entropy; [K] for K histograms."""
    arrays, found, many = _solved(a, b, M, reg, method, Stopping(numItermax, stopThr, warn), warmstart)
    linear = found.value_linear()
    result = arrays.back(linear if many else linear[0])
    return (result, _log(found, arrays, many)) if log else result


def _solved(
    a: Any, b: Any, M: Any, reg: float, method: str, stopping: Stopping, warmstart: Any
) -> tuple[Arrays, Transport, bool]:
    """The solution, and whether b held several histograms."""
    if method.lower() not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(map(repr, METHODS))}, got {method!r}")
    arrays = Arrays(a, b, M)
    cost = arrays.shaped("M", M, "costs [N, M]")
    many = getattr(b, "ndim", 1) > 1
    n, m = cost.shape
    if many:
        b_rows = arrays.of_shape("b", b, (m, b.shape[-1]), cost).mT
    else:
        b_rows = arrays.weights("b", b, m, cost)[None]
    a_rows = arrays.weights("a", a, n, cost).expand(len(b_rows), -1)
    start = None
    if warmstart is not None:
        shape = (m, len(b_rows)) if many else (m,)
        log_v = arrays.of_shape("warmstart", warmstart[1], shape, cost)
        weight = b_rows.detach()
        start = torch.where(weight > 0, (log_v.mT if many else log_v[None]) - weight.log(), 0.0)
    costs = cost.expand(len(b_rows), -1, -1)
    return arrays, solve_cost(costs, a_rows, b_rows, check_reg(reg), stopping, start=start), many


def _log(found: Transport, arrays: Arrays, many: bool) -> dict[str, Any]:
    log_u, log_v = found.log_scalings()

    def shaped(scaling: Tensor) -> Any:
        return arrays.back(scaling.mT if many else scaling[0])

    return {
        "err": [float(found.out.marginal_error.max())],
        "niter": int(found.out.iterations.max()),
        "u": shaped(log_u.exp()),
        "v": shaped(log_v.exp()),
        "log_u": shaped(log_u),
        "log_v": shaped(log_v),
    }
