"""The CPU path: matrix products by torch, iterations by the compiled loops of ``numba_loops``.

Costs are formed for a few problems at a time, so that they stay in cache, and again for the gradient. For
pairs only points that exist enter, with all clouds y of a batch in one matrix product.
"""

import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ecgot.kernels.ot import numba_loops as loops
from ecgot.kernels.ot.checks import CENTRED_COSTS
from ecgot.kernels.ot.problem import (
    PlanWeights,
    Problem,
    Result,
    SolverSettings,
    cost_of,
    inverse_norm,
    partnered,
    prepared,
    start_temperature,
)
from ecgot.kernels.ot.torch_solver import chain

CHUNK_CELLS = 2**20  # of the costs that are formed at once, 4 MB in fp32


def solve(problem: Problem, init: Tensor | None, settings: SolverSettings, cost_cache: Tensor) -> Result:
    """As :func:`ecgot.kernels.ot.torch_solver.solve`; a ``cost_cache`` [B, N, M] that is not empty gets S."""
    (n, m), dtype = problem.size, problem.dtype
    shape = problem.shape
    count = math.prod(shape)
    clouds = _Clouds(problem)
    f, g = torch.zeros(count, n, dtype=dtype), torch.zeros(count, m, dtype=dtype)
    if init is not None:
        g += clouds.y.compact(init) / problem.eps[:, None]
    g += clouds.y_terms if not problem.pairs else clouds.y_terms.repeat(shape[0], 1)
    error, iterations = torch.zeros(count, dtype=dtype), torch.zeros(count, dtype=torch.int64)
    slack_x, slack_y = (slack.contiguous() for slack in problem.slack())
    start = torch.ones_like(problem.eps)
    if settings.scaling:
        start = start_temperature(problem, with_masks=settings.from_masks)

    def task(begin: int, end: int) -> None:
        for first, last, s, at in clouds.chunks(begin, end, out=cost_cache):
            arguments = (
                clouds.usable[first:last], at["row"], at["rows"], at["column"], at["columns"],
                clouds.x.weights, at["a"], clouds.y.weights, at["b"], clouds.x_terms, clouds.y_terms,
                slack_x[first:last], slack_y[first:last], f, at["f"], g, at["g"], start[first:last],
                settings.scaling, settings.tol, settings.max_iter, error[first:last], iterations[first:last],
            )  # fmt: skip
            run_loop(loops.solve_blocks, last - first, s, arguments)

    _in_threads(len(problem.a), task)
    eps = problem.eps[:, None]
    x_terms, y_terms = clouds.x_terms, clouds.y_terms
    if problem.pairs:
        x_terms = x_terms.repeat_interleave(len(problem.b), 0)
        y_terms = y_terms.repeat(len(problem.a), 1)
    solved = clouds.usable[:, None]
    f = torch.where(solved, (f - x_terms) * eps, 0.0).view(*shape, n)
    g = torch.where(solved, (g - y_terms) * eps, 0.0).view(*shape, m)
    f, g, error = clouds.x.spread(f), clouds.y.spread(g), error.view(shape)
    bad = clouds.x.bad[:, None] | clouds.y.bad if problem.pairs else clouds.x.bad | clouds.y.bad
    bad &= clouds.usable.view(shape)
    if bool(bad.any()):
        each = bad.unsqueeze(-1)
        f, g = torch.where(each, math.nan, f), torch.where(each, math.nan, g)
        error = torch.where(bad, math.nan, error)
        f = torch.where((problem.a < 0)[:, None] if problem.pairs else problem.a < 0, 0.0, f)
        g = torch.where(problem.b < 0, 0.0, g)
    return f, g, error, iterations.to(torch.int32).view(shape)


def cost_vjp(problem: Problem, given: PlanWeights, cost_cache: Tensor) -> tuple[Tensor, Tensor | None]:
    """As :func:`ecgot.kernels.ot.torch_solver.cost_vjp`, of the plan alone (no ``left`` and ``right``)."""
    clouds = _Clouds(problem)
    n, m = problem.size
    f, g = clouds.potentials(given.f, given.g)
    scale = torch.where(clouds.usable, given.scale.reshape(-1), 0.0)
    if problem.cost == "euclidean":
        scale = scale / problem.eps  # the loop divides by a distance in units of eps
    sums_wanted = problem.cost in CENTRED_COSTS
    given_cost = problem.cost == "given"
    x, y = (f, g) if given_cost else (clouds.x.finite_points(), clouds.y.finite_points())
    to_y, row_sums = torch.empty_like(x), x.new_zeros(x.shape[:-1])
    whole = problem.eps.new_empty(problem.x.shape) if given_cost else None

    def task(begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Fills its rows of to_y and row_sums; returns its share of Q^T x and of the column sums."""
        # Single problems each have columns of their own; those of pairs are shared by all tasks.
        own = slice(None) if problem.pairs else slice(begin, end)
        to_x, column_sums = torch.zeros_like(y[own]), y.new_zeros(y[own].shape[:-1])
        for first, last, s, at in clouds.chunks(begin, end, cost_cache=cost_cache):
            # Of single problems the whole block is written, as all of it enters the products below.
            rows, columns = (
                (at["rows"], at["columns"]) if problem.pairs else (at["row"] * 0 + n, at["row"] * 0 + m)
            )
            arguments = (
                at["row"], rows, at["column"], columns, clouds.x.weights, at["a"], clouds.y.weights,
                at["b"], f, at["f"], g, at["g"], scale[first:last], problem.cost == "euclidean",
            )  # fmt: skip
            run_loop(loops.vjp_blocks, last - first, s, arguments)
            if whole is not None:
                whole[first:last] = s.view(last - first, n, m)
            elif problem.pairs:
                some = slice(int(at["row_start"]), int(at["row_start"]) + len(s))
                torch.mm(s, y, out=to_y[some])
                to_x.addmm_(s.T, x[some])
                if sums_wanted:
                    torch.sum(s, 1, out=row_sums[some])
                    column_sums += s.sum(0)
            else:
                q = s.view(last - first, n, m)
                some, mine = slice(first, last), slice(first - begin, last - begin)
                torch.bmm(q, y[some], out=to_y[some])
                torch.bmm(q.mT, x[some], out=to_x[mine])
                if sums_wanted:
                    torch.sum(q, 2, out=row_sums[some])
                    torch.sum(q, 1, out=column_sums[mine])
        return to_x, column_sums

    parts = _in_threads(len(problem.a), task)
    if whole is not None:
        return clouds.spread(whole), None
    assert problem.y is not None
    if problem.pairs:
        to_x, column_sums = (sum(tensors[1:], tensors[0]) for tensors in zip(*parts, strict=True))
    else:
        to_x, column_sums = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return (
        clouds.x.gradient(problem.x, to_y, row_sums),
        clouds.y.gradient(problem.y, to_x, column_sums),
    )


# First and last problem, S [rows, columns], and where blocks and their vectors begin.
Chunk = tuple[int, int, Tensor, dict[str, Any]]


class _Side:
    """One side's clouds, with the points that exist first in each.

    Attributes:
        counts: [B], of those points.
        weights: [B, n], 0 behind them.
        pair_dim: of the other side's clouds in a potential of pairs [B, K, n].
        points: [B, n, D] prepared; packed, [total, D], for pairs.
        bad: [B], a coordinate is NaN or infinite, or too large to square.
    """

    def __init__(
        self, weights: Tensor, points: Tensor | None, centre: Tensor | None, problem: Problem, pair_dim: int
    ) -> None:
        present = weights >= 0
        self.cost, self.pairs, self.pair_dim = problem.cost, problem.pairs, pair_dim
        self.present, self.counts = present, present.sum(1)
        self.order = None
        if bool((present[:, 1:] > present[:, :-1]).any()):  # a point that exists behind one that does not
            self.order = (~present).to(torch.int8).argsort(dim=1, stable=True)
        self.weights = self.compact(weights.clamp_min(0)).contiguous()
        self.offsets = torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])
        if points is None:
            self.bad = torch.zeros(len(weights), dtype=torch.bool)
            return
        clean = prepared(points, weights, centre, problem.cost, problem.dtype)
        self.square = self.compact(torch.linalg.vector_norm(clean, dim=2).square_())
        self.bad = ~self.square.sum(1).isfinite()
        if self.pairs:
            self.packed_from = present.flatten().nonzero().squeeze(1)
            self.points = clean.flatten(0, 1)
            if len(self.packed_from) < len(self.points):
                self.points = self.points.index_select(0, self.packed_from)
        else:
            self.points = (
                clean if self.order is None else clean.gather(1, self.order[:, :, None].expand_as(clean))
            )

    def compact(self, values: Tensor) -> Tensor:
        """Weights [B, n], or potentials [B, n] or [B, K, n], with the points that exist first."""
        if self.order is None:
            return values
        order = self.order.unsqueeze(self.pair_dim) if values.dim() == 3 else self.order
        return values.gather(-1, order.expand_as(values))

    def spread(self, potential: Tensor) -> Tensor:
        """Back to the places where the points stand, 0 where none does."""
        if self.order is None:
            return potential
        order = self.order.unsqueeze(self.pair_dim) if potential.dim() == 3 else self.order
        return torch.zeros_like(potential).scatter(-1, order.expand_as(potential), potential)

    def finite_points(self) -> Tensor:
        """The points, 0 in bad clouds: 0 * NaN would spread NaN to clouds that get no gradient from them."""
        if not bool(self.bad.any()):
            return self.points
        bad = self.bad.repeat_interleave(self.counts)[:, None] if self.pairs else self.bad[:, None, None]
        return torch.where(bad, 0.0, self.points)

    def gradient(self, raw: Tensor, product: Tensor, sums: Tensor) -> Tensor:
        """[B, n, D] of the raw points, from Q (points of the other side) and Q 1."""
        own = self.points
        if self.pairs:
            product, sums, own = product[None], sums[None], own[None]
        inverse = None
        if self.cost == "cosine":
            inverse = inverse_norm(torch.where(self.present[:, :, None], raw.to(product.dtype), 0.0))
            if self.pairs:
                inverse = inverse.flatten(0, 1).index_select(0, self.packed_from)[None]
            elif self.order is not None:
                inverse = inverse.gather(1, self.order[:, :, None])
        grad = chain(self.cost, own, product, sums, inverse)
        if self.pairs:
            if len(self.packed_from) == raw.shape[0] * raw.shape[1]:
                return grad.view(raw.shape)
            whole = grad.new_zeros(raw.shape[0] * raw.shape[1], raw.shape[2])
            return whole.index_copy_(0, self.packed_from, grad[0]).view(raw.shape)
        if self.order is None:
            return grad
        return torch.zeros_like(grad).scatter(1, self.order[:, :, None].expand_as(grad), grad)


class _Clouds:
    """Both sides of a batch, and the pieces of S = -C / eps, but for its row and column terms."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        given = problem.cost == "given"
        self.x = _Side(problem.a, None if given else problem.x, problem.x_centre, problem, 1)
        self.y = _Side(problem.b, problem.y, problem.y_centre, problem, 0)
        if given:
            cost = problem.cost_matrix()
            self.x.bad = (cost.isnan() | (cost == -math.inf)).flatten(1).any(1)
        self.usable = problem.solvable().flatten()
        eps = problem.eps[:1] if problem.pairs else problem.eps
        self.scale = (2 if problem.cost == "sqeuclidean" else 1) / eps
        same = bool((self.scale == self.scale[:1]).all())
        self.common_scale = self.scale[0].item() if same else None
        self.x_terms, self.y_terms = torch.zeros_like(self.x.weights), torch.zeros_like(self.y.weights)
        if problem.cost == "sqeuclidean":
            self.x_terms, self.y_terms = (-side.square / eps[:, None] for side in (self.x, self.y))
        elif problem.cost == "cosine":
            self.x_terms = self.x_terms - 1 / eps[:, None]

    def potentials(self, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """What the loops take, one row a problem: in units of eps, with the terms that S leaves out."""
        eps = self.problem.eps[:, None]
        pairs = len(self.problem.b) if self.problem.pairs else 1
        f, g = (
            partnered(t.reshape(len(eps), t.shape[-1])) / eps for t in (self.x.compact(f), self.y.compact(g))
        )
        f += self.x_terms.repeat_interleave(pairs, 0)
        g += self.y_terms.repeat(len(f) // len(self.y_terms), 1)
        return f, g

    def spread(self, matrix: Tensor) -> Tensor:
        """[B, N, M] with rows and columns back where the points stand, 0 elsewhere."""
        if self.x.order is not None:
            matrix = torch.zeros_like(matrix).scatter(1, self.x.order[:, :, None].expand_as(matrix), matrix)
        if self.y.order is not None:
            matrix = torch.zeros_like(matrix).scatter(2, self.y.order[:, None, :].expand_as(matrix), matrix)
        return matrix

    def chunks(
        self, begin: int, end: int, *, out: Tensor | None = None, cost_cache: Tensor | None = None
    ) -> Iterator[Chunk]:
        """Pieces of the clouds of x from ``begin`` to ``end``.

        Without pairs S goes into ``out`` [B, N, M], or comes from ``cost_cache``, unless these are empty.
        """
        if self.problem.pairs:
            return self._pairs(begin, end)
        buffers = (None if t is None or t.dim() < 3 else t for t in (out, cost_cache))
        return self._one_by_one(begin, end, *buffers)

    def _one_by_one(
        self, begin: int, end: int, out: Tensor | None, cost_cache: Tensor | None
    ) -> Iterator[Chunk]:
        n, m = self.problem.size
        step = max(1, CHUNK_CELLS // (n * m))
        for first in range(begin, end, step):
            last = min(first + step, end)
            number = np.arange(last - first)
            at = {
                "row": number * n,
                "rows": self.x.counts[first:last].numpy(),
                "column": np.zeros_like(number),
                "columns": self.y.counts[first:last].numpy(),
            } | {name: (first + number) * size for name, size in zip("afbg", (n, n, m, m), strict=True)}
            if cost_cache is not None:
                s = cost_cache[first:last].clone()  # the loops write into it
            else:
                s = self._form(first, last, None if out is None else out[first:last])
            yield first, last, s.reshape((last - first) * n, m), at

    def _form(self, first: int, last: int, out: Tensor | None) -> Tensor:
        problem = self.problem
        scale = self.scale[first:last, None, None]
        if problem.cost == "given":
            s = problem.rows(first, last).cost_matrix() * -scale
            if self.x.order is not None:
                s = s.gather(1, self.x.order[first:last, :, None].expand_as(s))
            if self.y.order is not None:
                s = s.gather(2, self.y.order[first:last, None, :].expand_as(s))
            return s
        x, y = self.x.points[first:last], self.y.points[first:last]
        s = x.new_empty(len(x), x.shape[1], y.shape[1]) if out is None else out
        if problem.cost == "euclidean":
            return torch.mul(cost_of(x, y, "euclidean"), -scale, out=s)
        if self.common_scale is not None:
            return torch.baddbmm(s, x, y.mT, beta=0, alpha=self.common_scale, out=s)
        return torch.bmm(x, y.mT, out=s).mul_(scale)

    def _pairs(self, begin: int, end: int) -> Iterator[Chunk]:
        problem, (n, m) = self.problem, self.problem.size
        k = len(problem.b)
        x_at, y_at = self.x.offsets.numpy(), self.y.offsets.numpy()
        step = max(1, CHUNK_CELLS // max(1, n * int(y_at[-1])))
        for first in range(begin, end, step):
            last = min(first + step, end)
            i, j = (
                index.ravel() for index in np.meshgrid(np.arange(first, last), np.arange(k), indexing="ij")
            )
            x = self.x.points[x_at[first] : x_at[last]]
            if problem.cost == "euclidean":
                s = cost_of(x[None], self.y.points[None], "euclidean")[0] * -self.scale
            else:
                s = (x * self.scale) @ self.y.points.T  # x is the small side of a chunk
            yield first * k, last * k, s, {
                "row": x_at[i] - x_at[first],
                "rows": self.x.counts.numpy()[i],
                "column": y_at[j],
                "columns": self.y.counts.numpy()[j],
                "a": i * n,
                "b": j * m,
                "f": (i * k + j) * n,
                "g": (i * k + j) * m,
                "row_start": x_at[first],
            }  # fmt: skip


def run_loop(loop: Callable[..., None], count: int, matrix: Tensor, arguments: tuple[Any, ...]) -> None:
    """loop(matrix, *arguments, 0, count)."""
    s = matrix.numpy()
    real = s.dtype.type  # a Python float would make the loops count in fp64
    arrays = [
        a.numpy().reshape(-1) if isinstance(a, Tensor) else real(a) if isinstance(a, float) else a
        for a in arguments
    ]
    loop(s, *arrays, 0, count)


def _in_threads(count: int, task: Callable[[int, int], Any]) -> list[Any]:
    """task(begin, end) over 0 to ``count``, in as many parts and threads as torch has; at least one part.

    Each thread makes its own matrix products, one at a time: torch's threads wait by spinning, and would take
    the cores from the loops between two products.
    """
    inference = torch.is_inference_mode_enabled()

    def run(begin: int, end: int) -> Any:
        with torch.inference_mode(inference), torch.no_grad():
            return task(begin, end)

    workers = torch.get_num_threads()
    edges = np.linspace(0, count, min(count, workers) + 1).astype(int).tolist()
    if len(edges) == 2:
        return [run(*edges)]
    with _POOL_LOCK:
        pool = _pool(workers, os.getpid())
    return list(pool.map(run, edges[:-1], edges[1:]))


_POOL_LOCK = threading.Lock()


@lru_cache(maxsize=1)
def _pool(workers: int, _process: int) -> ThreadPoolExecutor:
    """Threads of this process (a forked one needs its own) in which torch's operators do not fork further."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ecgot")
    all_there = threading.Barrier(workers)

    def alone(_: int) -> None:
        all_there.wait()
        # Torch sets a thread's number when it is first asked for, which would undo ours: each worker then had
        # an OpenMP team, and where there are more such threads than cores, none waits by spinning any more,
        # which makes every small operation of the process several times as slow.
        torch.get_num_threads()
        torch.set_num_threads(1)

    list(pool.map(alone, range(workers)))
    torch.set_num_threads(before)  # the number is the thread's own, but for what MKL makes of it
    return pool
