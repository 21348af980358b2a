"""What the public functions return: the value, how it was found, and the plan on demand."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ecgot.kernels.ot import checks
from ecgot.kernels.ot.backends import backend
from ecgot.kernels.ot.centring import separable_terms
from ecgot.kernels.ot.problem import Problem, without_autocast
from ecgot.kernels.ot.torch_solver import MAX_CELLS


@dataclass
class SinkhornOutput:
    """The solution of B problems.

    Attributes:
        value: [B], the regularised cost, in units of the cost; differentiable twice (envelope theorem).
        f, g: [B, N] and [B, M], potentials in units of the cost, 0 at masked points; differentiable once, by
            implicit differentiation. Where both marginals are kept they are determined up to a constant,
            which is chosen so that <a, f> = <b, g>.
        marginal_error: [B], L1 distance of the plan's row marginals from a; where rho is finite from
            a exp(-f / rho), the target that f sets, relative to its mass. Column marginals are exact in that
            sense. Where potentials pass 4,096 eps it includes what rounding costs.
        iterations: [B], int32, how many updates of (f, g) the problem took, annealing included.
        converged: [B], bool, whether ``marginal_error <= tol`` and the value is finite.
    """

    value: Tensor
    f: Tensor
    g: Tensor
    marginal_error: Tensor
    iterations: Tensor
    converged: Tensor
    _problem: Problem = field(repr=False)
    _raw: tuple[Tensor, Tensor] = field(repr=False)
    _versions: tuple[int, ...] | None = field(repr=False)

    @property
    def backend(self) -> str:
        """Which solver serves such a problem.

        ``"triton"`` (one problem on chip), ``"numba"`` or ``"torch"``; where costs are formed again for each
        update, without an N x M matrix, ``"triton-streaming"``, ``"numba-streaming"``, ``"torch-streaming"``.
        """
        return backend(self._problem)

    def plan(self) -> Tensor:
        """The transport plan P [B, N, M], differentiable once; 0 at masked points.

        Raises:
            RuntimeError: x, y, a weight or a mask was changed in place after solving.
        """
        self._check_unchanged()
        with without_autocast(self.f.device):
            return self._problem.plan(*self._raw)

    def log_plan(self) -> Tensor:
        """log P [B, N, M], differentiable once; minus infinity where P is 0 by definition.

        That is at masked points, points without weight and forbidden pairs. Elsewhere it is exact where P
        itself would underflow.

        Raises:
            RuntimeError: as :meth:`plan`.

        >>> import ecgot
        >>> cost = torch.tensor([[[0.0, 9.0], [torch.inf, 0.0]]])
        >>> ecgot.sinkhorn_from_cost(cost, eps=0.05).log_plan().round()
        tensor([[[  -1., -181.],
                 [ -inf,   -1.]]])
        """
        self._check_unchanged()
        problem, (f, g) = self._problem, self._raw
        with without_autocast(f.device):
            cost = problem.cost_matrix()
            a, b = problem.weights()
            weighted = (a > 0)[:, :, None] & (b > 0)[:, None, :] & problem.solvable()[:, None, None]
            log_a, log_b = (torch.where(weight > 0, weight, 1.0).log() for weight in (a, b))
            allowed = weighted & (cost != math.inf)
            exponent = torch.where(allowed, f[:, :, None] + g[:, None, :] - cost, 0.0)
            exponent = exponent / problem.eps[:, None, None] + log_a[:, :, None] + log_b[:, None, :]
            return torch.where(allowed, exponent, -math.inf)

    def apply(self, v: Tensor, *, transpose: bool = False) -> Tensor:
        """P v [B, N, E] of v [B, M, E], or P^T v [B, M, E] of v [B, N, E]; differentiable once.

        P is formed in chunks of rows (2^24 numbers at a time), and again for the gradient; other memory is
        O((N + M) E).

        >>> import ecgot
        >>> cost = torch.tensor([[[0.0, 9.0], [9.0, 0.0]]])
        >>> out = ecgot.sinkhorn_from_cost(cost, eps=0.1)
        >>> out.apply(torch.tensor([[[2.0], [4.0]]])).flatten().tolist()
        [1.0, 2.0]
        """
        n, m = self._problem.size
        wanted = (len(self._problem.a), n if transpose else m)
        checks.check_floating("v", v, 3, f"[{wanted[0]}, {wanted[1]}, E]")
        if v.device != self.f.device:
            raise ValueError(f"v: expected the device of x, {self.f.device}, got {v.device}")
        if tuple(v.shape[:2]) != wanted:
            raise ValueError(f"v: expected [{wanted[0]}, {wanted[1]}, E], got shape {tuple(v.shape)}")
        if transpose:
            parts = self._by_rows(lambda part, f, g, some: part.plan(f, g).mT @ v[:, some].to(f.dtype))
            return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        return torch.cat(self._by_rows(lambda part, f, g, _: part.plan(f, g) @ v.to(f.dtype)), 1)

    def barycentric_projection(self) -> Tensor:
        """Where P sends each x: sum_j P_ij y_j / sum_j P_ij [B, N, D]; 0 where a point has no mass.

        >>> import ecgot
        >>> x = torch.tensor([[[0.0], [5.0]]])
        >>> out = ecgot.sinkhorn(x, x + 1, eps=0.01)
        >>> out.barycentric_projection().flatten().round(decimals=3).tolist()
        [1.0, 6.0]
        """
        y = self._problem.y
        if y is None:
            raise ValueError(
                "barycentric_projection: expected a solution between points, got one of a given cost"
            )
        y = torch.where((self._problem.b >= 0)[:, :, None], y.to(self.f.dtype), 0.0)
        moved = self.apply(torch.cat([y, torch.ones_like(y[:, :, :1])], 2))
        mass = moved[:, :, -1:]
        return torch.where(mass > 0, moved[:, :, :-1] / torch.where(mass > 0, mass, 1.0), 0.0)

    def transport_cost(self) -> Tensor:
        """<P, C> [B], without the entropy; differentiable once, by implicit differentiation."""
        terms = separable_terms(self._problem)

        def part_cost(part: Problem, f: Tensor, g: Tensor, _: slice) -> Tensor:
            plan, cost = part.plan(f, g), part.cost_matrix()
            # A forbidden pair costs infinity and carries nothing.
            allowed = cost != math.inf
            return torch.where(allowed, plan * torch.where(allowed, cost, 0.0), 0.0).sum((1, 2))

        total = torch.stack(self._by_rows(part_cost)).sum(0)
        if terms is None:
            return total
        # Added to the costs, what far clouds have in common would drown the rest.
        a, b = self._problem.weights()
        return total + (a * terms[0]).sum(1) + (b * terms[1]).sum(1)

    def _by_rows(self, function: Callable[[Problem, Tensor, Tensor, slice], Tensor]) -> list[Tensor]:
        """function(problem, f, g, rows) for each chunk of rows of x; the gradient forms the chunk again."""
        self._check_unchanged()
        problem, (f, g) = self._problem, self._raw
        n, m = problem.size
        step = max(1, MAX_CELLS // max(1, m * len(f)))

        def of_rows(start: int) -> Tensor:
            some = slice(start, start + step)
            part = problem.with_rows(some)
            with without_autocast(f.device):
                return function(part, f[:, some], g, some)

        if step >= n:  # a checkpoint would save little, and torch.func knows none
            return [of_rows(0)]
        starts = range(0, n, step)
        if not torch.is_grad_enabled():
            return [of_rows(start) for start in starts]
        return [checkpoint(of_rows, start, use_reentrant=False) for start in starts]

    def __copy__(self) -> "SinkhornOutput":
        return replace(self)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle, ``torch.save`` and ``copy.deepcopy``: the copy has no gradient history."""
        self._check_unchanged()
        state = {name: _detached(value) for name, value in vars(self).items()}
        tensors, values = self._problem.flatten()
        state["_problem"] = Problem.unflatten([_detached(t) for t in tensors], values)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._versions = tensor_versions(self._problem)

    def _check_unchanged(self) -> None:
        if self._versions is not None and self._versions != tensor_versions(self._problem):
            raise RuntimeError("plan: expected unchanged x, y, weights and masks, got one changed in place")


def _detached(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_detached, value))
    return value.detach() if isinstance(value, Tensor) else value


def tensor_versions(problem: Problem) -> tuple[int, ...] | None:
    """How often each tensor was changed in place; None where torch does not count that."""
    given = [t for t in (problem.x, problem.y, problem.a, problem.b) if t is not None]
    if torch.compiler.is_compiling() or any(t.is_inference() for t in given):
        return None
    return tuple(t._version for t in given)


@dataclass
class SinkhornDivergenceOutput:
    """The debiased cost of B problems.

    Attributes:
        value: [B], in units of the cost, differentiable.
        f, g: [B, N] and [B, M], potentials of OT(x, y) less those of OT(x, x) and OT(y, y), in units of the
            cost, 0 at masked points; differentiable once. Where both marginals are kept they are the
            gradients of ``value`` in a and b, up to a constant.
        marginal_error, iterations: [B], the largest of the three problems behind each value.
        converged: [B], whether all three converged.
        backend: which solver ran, as in :class:`SinkhornOutput`.
    """

    value: Tensor
    f: Tensor
    g: Tensor
    marginal_error: Tensor
    iterations: Tensor
    converged: Tensor
    backend: str

    def __getstate__(self) -> dict[str, Any]:
        """As that of :class:`SinkhornOutput`."""
        return {name: _detached(value) for name, value in vars(self).items()}


@dataclass
class SinkhornPairwiseOutput:
    """The solutions of all B x K pairs.

    Attributes:
        value: [B, K], in units of the cost, differentiable once.
        marginal_error, iterations, converged: [B, K], as in :class:`SinkhornOutput`.
        backend: which solver ran.
    """

    value: Tensor
    marginal_error: Tensor
    iterations: Tensor
    converged: Tensor
    backend: str

    def __getstate__(self) -> dict[str, Any]:
        """As that of :class:`SinkhornOutput`."""
        return {name: _detached(value) for name, value in vars(self).items()}


# torch.load reads what torch.save wrote of them without weights_only=False.
torch.serialization.add_safe_globals(
    [SinkhornOutput, SinkhornDivergenceOutput, SinkhornPairwiseOutput, Problem]
)
