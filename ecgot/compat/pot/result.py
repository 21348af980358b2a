"""The object that POT's solvers return, with its fields; what costs time is computed when it is asked for."""

from functools import cached_property
from typing import Any

from torch import Tensor

from ecgot.compat.pot.arrays import Arrays
from ecgot.compat.pot.transport import Transport

GRADIENTS = ("autodiff", "last_step", "envelope", "detach")


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
        status, log, value_quad, lazy_plan: as POT leaves them; ``log`` holds the number of iterations.
        converged, marginal_error: of our solver.
    """

    value_quad = None
    lazy_plan = None
    status = None

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
        """The plan, differentiable unless ``grad`` is "envelope" or "detach"."""
        return self._back(self._transport.plan(), detach=self._fixed)

    @cached_property
    def log(self) -> dict[str, Any] | None:
        """In batches the number of iterations, ``n_iter``."""
        return {"n_iter": int(self._transport.out.iterations.max())} if self._batched else None

    @cached_property
    def sparse_plan(self) -> Any:
        """The plan as a sparse matrix."""
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
        return self.plan.sum(-1)

    @property
    def marginal_b(self) -> Any:
        """The plan's sums over its last dimension but one."""
        return self.plan.sum(-2)

    @property
    def marginals(self) -> tuple[Any, Any]:
        """Both of them."""
        return self.marginal_a, self.marginal_b

    def __repr__(self) -> str:
        return f"OTResult(value={self.value},value_linear={self.value_linear})"
