"""The object that POT's solvers return, with its fields; what costs time is computed when it is asked for."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ecgot.compat.pot.arrays import Arrays
from ecgot.compat.pot.transport import Transport
from ecgot.compat.pot.utils import costs

GRADIENTS = ("autodiff", "last_step", "envelope", "detach")


class LazyPlan:
    """A plan [N, M] between points that is computed where it is indexed, as POT's ``LazyTensor`` is.

    ``plan[i]`` and ``plan[i, j]`` take integers and slices, and always have two dimensions: an integer keeps
    its own, with length 1.

    Attributes:
        shape, ndim: (N, M), and 2.
        X_a, X_b, metric, reg: the points and their costs.
        f, g: logarithms of the scalings, so that the plan is exp(f + g - M / reg).
    """

    ndim = 2

    def __init__(
        self,
        transport: Transport,
        arrays: Arrays,
        points: tuple[Tensor, Tensor],
        metric: str,
        block: int,
        *,
        detach: bool,
    ) -> None:
        f, g = transport.log_scalings()
        self._arrays, self._rows, self.metric, self.reg = arrays, block, metric, transport.reg
        self._held = [each.detach() if detach else each for each in (*points, f[0], g[0])]
        self.shape = (len(f[0]), len(g[0]))
        self.X_a, self.X_b, self.f, self.g = map(arrays.back, self._held)

    def __getitem__(self, key: Any) -> Any:
        keys = key if isinstance(key, tuple) else (key,)
        if len(keys) > 2:
            raise IndexError(f"lazy_plan: expected at most 2 indices, got {len(keys)}")
        return self._arrays.back(self._block(*keys))

    def _block(self, i: Any = slice(None), j: Any = slice(None)) -> Tensor:
        i, j = _kept(i, self.shape[0]), _kept(j, self.shape[1])
        x, y, f, g = self._held
        cost = costs(x[i][None], y[j][None], self.metric)[0]
        return (f[i, None] + g[None, j] - cost / self.reg).exp()

    @cached_property
    def sums(self) -> tuple[Any, Any]:
        """The sums of its rows [N] and of its columns [M], computed a block of rows at a time."""
        rows, columns = [], torch.zeros_like(self._held[3])
        for start in range(0, self.shape[0], self._rows):
            part = self._block(slice(start, start + self._rows))
            rows.append(part.sum(1))
            columns = columns + part.sum(0)
        return self._arrays.back(torch.cat(rows)), self._arrays.back(columns)

    def __repr__(self) -> str:
        return f"LazyPlan(shape={self.shape})"


def _kept(at: Any, length: int) -> slice:
    """An integer as a slice of length 1."""
    if isinstance(at, slice):
        return at
    if not hasattr(at, "__index__"):
        raise TypeError(f"lazy_plan: expected integers and slices as indices, got {type(at).__name__}")
    at = int(at)
    if not -length <= at < length:
        raise IndexError(f"lazy_plan: expected an index below {length}, got {at}")
    return slice(at % length, at % length + 1)


class OTResult:
    """POT's ``OTResult``.

    Attributes:
        value: the objective with its regulariser, with POT's constants; see
            :mod:`ecgot.compat.pot.transport`.
        value_linear: <P, M>.
        plan: [N, M] ([B, N, M] in batches).
        potentials, potential_a, potential_b: logarithms of the scalings u and v.
        marginals, marginal_a, marginal_b: sums of the plan over columns and rows.
        sparse_plan: the plan as SciPy's or torch's sparse matrix.
        lazy_plan: with ``solve_sample(..., lazy=True)`` a :class:`LazyPlan`; then, as in POT, ``plan``,
            ``sparse_plan`` and ``marginals`` are None, while ``marginal_a`` and ``marginal_b`` are summed in
            blocks of rows. Unlike POT we have a ``value``. Otherwise None.
        log: of a lazy plan POT's dictionary, with ``err``, ``u``, ``v``, ``niter`` and ``lazy_plan``; in
            batches ``n_iter``; otherwise None.
        status, value_quad: None, as POT leaves them.
        citation: None; POT's text is in POT.
        converged, marginal_error: of our solver.
    """

    value_quad = None
    status = None
    citation = None
    lazy_plan: "LazyPlan | None" = None

    def __init__(
        self,
        transport: Transport,
        arrays: Arrays,
        *,
        reg_type: str,
        grad: str,
        batched: bool,
        potentials: tuple[Tensor, Tensor],
        cost: Tensor | None = None,
    ) -> None:
        self._transport, self._arrays, self._batched = transport, arrays, batched
        self._reg_type, self._grad, self._cost = reg_type, grad, cost
        self.potentials = tuple(self._back(each, detach=self._fixed) for each in potentials)
        self.converged = self._back(transport.out.converged)
        self.marginal_error = self._back(transport.out.marginal_error)

    @property
    def _fixed(self) -> bool:
        """Whether plan and potentials have no gradient."""
        return self._grad in ("envelope", "detach")

    def _back(self, found: Tensor, detach: bool = False) -> Any:
        found = found.detach() if detach else found
        return self._arrays.back(found if self._batched else found[0])

    @cached_property
    def value(self) -> Any:
        """The objective; its gradient is exact unless ``grad`` is "detach"."""
        return self._back(self._transport.value(self._reg_type), detach=self._grad == "detach")

    @cached_property
    def value_linear(self) -> Any:
        """<P, M>, differentiable where the plan is; in batches with "envelope" in M alone."""
        if self._grad == "envelope" and self._cost is not None:
            plan = self._transport.plan().detach()
            return self._back((plan * self._cost.masked_fill(plan == 0, 0.0)).sum((1, 2)))
        return self._back(self._transport.value_linear(), detach=self._fixed)

    @cached_property
    def plan(self) -> Any:
        """The plan, differentiable unless ``grad`` is "envelope" or "detach"; None where it is lazy."""
        if self.lazy_plan is not None:
            return None
        return self._back(self._transport.plan(), detach=self._fixed)

    @cached_property
    def log(self) -> dict[str, Any] | None:
        """In batches the number of iterations, ``n_iter``; of a lazy plan what POT has there."""
        if self.lazy_plan is not None:
            out, (u, v) = self._transport.out, self.potentials
            found = {"err": [float(out.marginal_error.max())], "niter": int(out.iterations.max())}
            return {**found, "u": u, "v": v, "lazy_plan": self.lazy_plan}
        return {"n_iter": int(self._transport.out.iterations.max())} if self._batched else None

    @cached_property
    def sparse_plan(self) -> Any:
        """The plan as a sparse matrix; None where it is lazy."""
        if self.lazy_plan is not None:
            return None
        if self._arrays.is_torch:
            return self.plan.to_sparse_csr()
        from scipy.sparse import csr_matrix

        return csr_matrix(self.plan)

    @property
    def potential_a(self) -> Any:
        """The first of ``potentials``."""
        return self.potentials[0]

    @property
    def potential_b(self) -> Any:
        """The second of ``potentials``."""
        return self.potentials[1]

    @property
    def marginal_a(self) -> Any:
        """The plan's sums over its last dimension."""
        return self.plan.sum(-1) if self.lazy_plan is None else self.lazy_plan.sums[0]

    @property
    def marginal_b(self) -> Any:
        """The plan's sums over its last dimension but one."""
        return self.plan.sum(-2) if self.lazy_plan is None else self.lazy_plan.sums[1]

    @property
    def marginals(self) -> tuple[Any, Any] | None:
        """Both of them; None where the plan is lazy."""
        return None if self.lazy_plan is not None else (self.marginal_a, self.marginal_b)

    def __repr__(self) -> str:
        lazy = "" if self.lazy_plan is None else f",lazy_plan={self.lazy_plan!r}"
        return f"OTResult(value={self.value},value_linear={self.value_linear}{lazy})"
