"""The transport solver against its peers, at equal work: what ``ecgot bench`` and the suite run.

Equal work means equal marginal error (L1, the larger of the two sides, of the worst problem of the batch),
not equal iterations. ecgot runs to the tolerance and pays for its own stopping test. A peer is told, for
nothing, the least number of iterations with which its marginal error is at most the tolerance too. Values and
gradients are then checked against ``ecgot.kernels.ot.reference``, solved in fp64 to a far smaller error; a
provider that is wrong is not timed. Providers take turns, call by call, so that a busy machine slows all.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ecgot.kernels import sinkhorn, sinkhorn_pairwise
from ecgot.kernels.dispatch import HAS_TRITON
from ecgot.kernels.ot import reference

OURS = "ecgot"
ROUNDING = 1.05, 3e-6  # a marginal computed anew may exceed the one that the solver saw: factor, summand
# A marginal error of tol may sit in one point of N, whose gradient then is wrong by N tol of itself.
GRADIENT_TOLERANCE = 0.5
MAX_STEPS = 400
BUDGET_S, MIN_ROUNDS, MAX_ROUNDS = 2.0, 5, 100  # of all providers of a case together

# Values [B] with a graph to the points, and the plan [B, N, M], which only the gate asks for.
Solution = tuple[Tensor, Callable[[], Tensor]]


@dataclass(frozen=True)
class Case:
    """B problems of N x M unit vectors in D dimensions, solved to a marginal error of tol."""

    batch: int
    n: int
    m: int
    d: int
    eps: float = 0.1
    tol: float = 1e-4

    def __str__(self) -> str:
        return f"B={self.batch} N={self.n} M={self.m} D={self.d} eps={self.eps:g} tol={self.tol:g}"


_SHAPES = [(64, 64, 32, 128), (64, 128, 64, 256), (32, 250, 64, 384), (4, 1000, 1000, 64)]
_GPU_SHAPES = [(256, 128, 128, 256), (1024, 32, 32, 256), (256, 250, 64, 384), (1, 10_000, 10_000, 64)]
SHORT = [Case(*_SHAPES[0], 0.05), Case(*_SHAPES[1], 0.05)]
CPU_CASES = [Case(*shape, eps, tol) for shape in _SHAPES for eps in (0.1, 0.05) for tol in (1e-4, 1e-5)]
GPU_CASES = [*CPU_CASES, *(Case(*shape, eps) for shape in _GPU_SHAPES for eps in (0.1, 0.05))]


@dataclass
class Measurement:
    """One provider on one case; ``refused`` says why it was not timed, and then nothing else is known."""

    case: str
    provider: str
    refused: str = ""
    steps: int | None = None
    value_error: float = math.nan
    gradient_error: float = math.nan
    marginal_error: float = math.nan
    rounds: int = 0
    median_ms: float = math.nan
    q20_ms: float = math.nan
    q80_ms: float = math.nan
    peak_mb: float = math.nan


# --- providers: points x [B, N, D], y [B, M, D], the case and a number of steps to a Solution ---------------


def _ecgot(x: Tensor, y: Tensor, case: Case, _steps: int) -> Solution:
    out = sinkhorn(x, y, eps=case.eps, tol=case.tol)
    return out.value, out.plan


def _pot(method: str) -> Callable[[Tensor, Tensor, Case, int], Solution]:
    def solve(x: Tensor, y: Tensor, case: Case, steps: int) -> Solution:
        batch = importlib.import_module("ot.batch")
        out = batch.solve_sample_batch(
            x, y, case.eps, method=method, max_iter=steps, tol=0.0, reg_type="kl", grad="envelope"
        )
        return out.value, lambda: out.plan

    return solve


def _geomloss(x: Tensor, y: Tensor, case: Case, steps: int) -> Solution:
    # geomloss has half the squared distance as its cost and eps = blur**2: half the eps, half the value.
    # It anneals eps from diameter**2 down to blur**2, a factor scaling**2 a step. A descent that hardly moves
    # from blur**2 reaches the tolerance in tens of steps; one from the true diameter would take thousands.
    blur, scaling = math.sqrt(case.eps / 2), 1 - 1e-6
    settings = {"p": 2, "blur": blur, "scaling": scaling, "diameter": blur * scaling ** (0.5 - steps)}
    samples_loss = importlib.import_module("geomloss").SamplesLoss
    value = 2 * samples_loss("sinkhorn", debias=False, backend="tensorized", **settings)(x, y)

    def plan() -> Tensor:
        f, g = samples_loss("sinkhorn", debias=False, backend="tensorized", potentials=True, **settings)(x, y)
        return _plan(-_cost(x, y) / case.eps, 2 * f / case.eps, 2 * g / case.eps)

    return value, plan


def _torch(x: Tensor, y: Tensor, case: Case, steps: int) -> Solution:
    """What one writes without a library; autograd goes through all iterations."""
    exponent = -_cost(x, y) / case.eps
    log_n, log_m = math.log(x.shape[1]), math.log(y.shape[1])
    f, g = torch.zeros_like(x[:, :, 0]), torch.zeros_like(y[:, :, 0])
    for _ in range(steps):
        f = log_m - torch.logsumexp(exponent + g[:, None, :], dim=2)
        g = log_n - torch.logsumexp(exponent + f[:, :, None], dim=1)
    return case.eps * (f.mean(1) + g.mean(1)), lambda: _plan(exponent, f, g)


def _cost(x: Tensor, y: Tensor) -> Tensor:
    return x.square().sum(2)[:, :, None] + y.square().sum(2)[:, None, :] - 2 * x @ y.mT


def _plan(exponent: Tensor, f: Tensor, g: Tensor) -> Tensor:
    """The plan of uniform weights; exponent and potentials in units of eps."""
    return torch.exp(exponent + f[:, :, None] + g[:, None, :]) / (f.shape[1] * g.shape[1])


def _torch_graph(x: Tensor, y: Tensor, case: Case, steps: int) -> Solution:
    """The best that one writes by hand: the same iterations without autograd, compiled, gradients by the
    envelope theorem, and all of it one CUDA graph."""
    solve = _graph(x.shape, y.shape, case, steps, x.device)
    value, plan = _Replay.apply(x, y, solve)
    return value, lambda: plan


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, solve: Callable[..., tuple[Tensor, ...]]) -> Any:
        value, plan, grad_x, grad_y = solve(x, y)
        ctx.save_for_backward(grad_x, grad_y)
        ctx.mark_non_differentiable(plan)
        ctx.set_materialize_grads(False)  # else a backward fills a plan with zeros
        return value.clone(), plan

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        return *(grad[:, None, None] * each for each in ctx.saved_tensors), None


@functools.lru_cache(maxsize=1)  # a graph keeps its memory
def _graph(
    shape_x: torch.Size, shape_y: torch.Size, case: Case, steps: int, device: torch.device
) -> Callable[..., tuple[Tensor, ...]]:
    """x, y to values, plan and gradients, recorded once and replayed; what it gives is overwritten then."""
    x, y = torch.empty(shape_x, device=device), torch.empty(shape_y, device=device)
    torch.compiler.reset()  # a function is compiled for few shapes, and then no more
    half_step = torch.compile(_half_step, dynamic=False)

    def solve() -> tuple[Tensor, ...]:
        return enveloped(x, y, case, steps, half_step)

    x.normal_(), y.normal_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, as recording may not
        solve()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = solve()

    def replay(new_x: Tensor, new_y: Tensor) -> tuple[Tensor, ...]:
        x.copy_(new_x)
        y.copy_(new_y)
        graph.replay()
        return found

    return replay


def _half_step(exponent: Tensor, potential: Tensor, log_count: float, dim: int) -> Tensor:
    return log_count - torch.logsumexp(exponent + potential.unsqueeze(3 - dim), dim=dim)


@torch.no_grad()
def enveloped(
    x: Tensor, y: Tensor, case: Case, steps: int, half_step: Callable[..., Tensor] = _half_step
) -> tuple[Tensor, ...]:
    """Values [B], plan, and the gradients of the values in x and y with the plan held."""
    exponent = -_cost(x, y) / case.eps
    log_n, log_m = math.log(x.shape[1]), math.log(y.shape[1])
    g = torch.zeros_like(y[:, :, 0])
    for _ in range(steps):
        f = half_step(exponent, g, log_m, 2)
        g = half_step(exponent, f, log_n, 1)
    plan = _plan(exponent, f, g)
    grad_x = 2 * (plan.sum(2)[:, :, None] * x - plan @ y)
    grad_y = 2 * (plan.sum(1)[:, :, None] * y - plan.mT @ x)
    return case.eps * (f.mean(1) + g.mean(1)), plan, grad_x, grad_y


MAX_LOOPED = 64  # problems that a Python loop is given


def _flash_sinkhorn(x: Tensor, y: Tensor, case: Case, steps: int) -> Solution:
    if len(x) > MAX_LOOPED:
        raise RuntimeError(f"it loops over problems in Python, which is timed up to {MAX_LOOPED} of them")
    samples_loss = importlib.import_module("flash_sinkhorn").SamplesLoss
    settings = {"backend": "alternating", "use_epsilon_scaling": False, "allow_tf32": False}
    settings |= {"eps": case.eps, "n_iters": steps}

    def plan() -> Tensor:
        f, g = samples_loss(potentials=True, **settings)(x.detach(), y.detach())
        return _plan(-_cost(x, y).detach() / case.eps, f / case.eps, g / case.eps)

    return samples_loss(**settings)(x, y), plan


Solver = Callable[[Tensor, Tensor, Case, int], Solution]
SOLVERS: dict[str, tuple[str, Solver]] = {  # with the package that each needs
    OURS: ("ecgot", _ecgot),
    "torch": ("torch", _torch),
    "pot_log": ("ot", _pot("log_sinkhorn")),
    "pot_scaling": ("ot", _pot("sinkhorn")),
    "geomloss": ("geomloss", _geomloss),
}
GPU_SOLVERS: dict[str, tuple[str, Solver]] = {
    "torch_graph": ("torch", _torch_graph),
    "flash_sinkhorn": ("flash_sinkhorn", _flash_sinkhorn),
}
# Who finds how many iterations are needed, where not the provider: the same iterations, found sooner.
COUNTED_BY = {"torch_graph": _torch, "flash_sinkhorn": _torch}
GRAPHS = ("torch_graph",)  # whose memory is taken once, not in a call


def solvers(device: torch.device) -> dict[str, tuple[str, Solver]]:
    """The providers that run on a device."""
    return SOLVERS | (GPU_SOLVERS if device.type == "cuda" else {})


# --- all pairs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairsCase:
    """All pairs of B and K clouds of N and M unit vectors, so many iterations on the cosine cost."""

    batch: int = 128
    others: int = 128
    n: int = 32
    m: int = 32
    d: int = 128
    eps: float = 0.1
    iterations: int = 10

    def __str__(self) -> str:
        return f"B={self.batch} K={self.others} N={self.n} M={self.m} D={self.d} iterations={self.iterations}"


GPU_PAIRS = PairsCase(512, 512, 64, 32, 128, iterations=20)


def pairs_ecgot(x: Tensor, y: Tensor, case: PairsCase) -> Tensor:
    return sinkhorn_pairwise(x, y, eps=case.eps, cost="cosine", max_iter=case.iterations, tol=0)


def pairs_torch(x: Tensor, y: Tensor, case: PairsCase) -> Tensor:
    """Similarity tensor, scaling by matrix products, autograd through the similarity (envelope theorem)."""
    similarity = torch.einsum("bnd,kmd->bknm", x, y)
    with torch.no_grad():
        kernel = torch.exp((similarity - 1) / case.eps)
        u = torch.ones_like(kernel[..., :1])
        v = torch.ones_like(kernel[..., :1, :]).mT
        for _ in range(case.iterations):
            u = 1 / (kernel @ (v / case.m))
            v = 1 / (kernel.mT @ (u / case.n))
        plan = kernel * u * v.mT
        entropy = case.eps * (plan * plan.clamp_min(1e-30).log()).mean((2, 3))
        plan = plan / (case.n * case.m)
    return (plan * (1 - similarity)).sum((2, 3)) + entropy


PAIRS = {OURS: pairs_ecgot, "torch": pairs_torch}


def compare_pairs(
    case: PairsCase, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[Measurement]:
    """Both providers on one case, each checked against fp64 on a part of the pairs first."""
    x, y = (
        unit_vectors(case.batch, case.n, case.d, device, 0),
        unit_vectors(case.others, case.m, case.d, device, 1),
    )
    x, y = x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()
    some = slice(0, 4)
    exact = torch.stack(
        [
            reference.sinkhorn(
                x[i : i + 1].detach(), y[some][j : j + 1].detach(), eps=case.eps, cost="cosine",
                max_iter=case.iterations, tol=0.0,
            )[0].value
            for i in range(4)
            for j in range(4)
        ]
    ).view(4, 4)  # fmt: skip
    found: list[Measurement] = []
    calls: dict[str, Callable[[], object]] = {}
    for name, solve in PAIRS.items():

        def forward_backward(solve: Callable[..., Tensor] = solve) -> Tensor:
            value = solve(x, y, case)
            torch.autograd.grad(value.sum(), (x, y))
            return value.detach()

        value = forward_backward()[some, some].double()
        # Away from convergence the two objectives differ by the marginals' error times the potentials.
        error = ((value - exact).abs().max() / exact.abs().max()).item()
        tolerance = 2e-2 if dtype == torch.float32 else 5e-2
        refused = "" if error <= tolerance else f"value error {error:.1e} > {tolerance:.0e}"
        found.append(Measurement(str(case), name, refused, case.iterations, error))
        if not refused:
            calls[name] = forward_backward
    return _timed(found, calls, device)


# --- problems, gate and clock -------------------------------------------------------------------------------


def unit_vectors(batch: int, count: int, d: int, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(batch, count, d, generator=generator), dim=2).to(device)


def compare(case: Case, device: torch.device, providers: Iterable[str] | None = None) -> list[Measurement]:
    """Providers, or all of them, on one case: gate, then time in turns."""
    known = solvers(device)
    x = unit_vectors(case.batch, case.n, case.d, device, 0).requires_grad_()
    y = unit_vectors(case.batch, case.m, case.d, device, 1).requires_grad_()
    value, grads = _exact(x.detach(), y.detach(), case)
    found: list[Measurement] = []
    calls: dict[str, Callable[[], object]] = {}
    for name in known if providers is None else providers:
        package, solve = known[name]
        if importlib.util.find_spec(package) is None:
            found.append(Measurement(str(case), name, f"{package} is not installed"))
            continue
        try:
            row, call = _gated(name, solve, x, y, case, value, grads)
        except (RuntimeError, MemoryError) as reason:  # such as tensors on two devices, or out of memory
            if name == OURS:
                raise
            row, call = Measurement(str(case), name, str(reason).partition("\n")[0]), None
        found.append(row)
        if call is not None and not row.refused:
            calls[name] = call
    return _timed(found, calls, device)


def _exact(x: Tensor, y: Tensor, case: Case) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Values [B] and gradients in fp64."""
    values, grads_x, grads_y = [], [], []
    for a, b in zip(x.double(), y.double(), strict=True):
        (solution,) = reference.sinkhorn(a[None], b[None], eps=case.eps, tol=case.tol * 1e-3)
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        cost = (solution.plan * reference.cost_matrix(a, b, "sqeuclidean")).sum()
        grad_a, grad_b = torch.autograd.grad(cost, (a, b))
        values.append(solution.value)
        grads_x.append(grad_a)
        grads_y.append(grad_b)
    return torch.stack(values), (torch.stack(grads_x), torch.stack(grads_y))


def _gated(
    name: str, solve: Solver, x: Tensor, y: Tensor, case: Case, value: Tensor, grads: tuple[Tensor, Tensor]
) -> tuple[Measurement, Callable[[], object]]:
    steps, marginal = _least_steps(name, COUNTED_BY.get(name, solve), x, y, case)
    if name in COUNTED_BY:
        marginal = _marginal_error(solve(x, y, case, steps)[1]())

    def forward_backward() -> tuple[Tensor, tuple[Tensor, ...]]:
        found, _ = solve(x, y, case, steps)
        return found.detach(), torch.autograd.grad(found.sum(), (x, y))

    found, found_grads = forward_backward()
    value_error = _relative_error(found, value)
    gradient_error = max(map(_relative_error, found_grads, grads))
    limits = {
        "marginal": (marginal, ROUNDING[0] * case.tol + ROUNDING[1]),
        "value": (value_error, max(1e-5, case.tol)),  # second order in tol, and a few roundings of fp32
        "gradient": (gradient_error, max(1e-4, GRADIENT_TOLERANCE * max(case.n, case.m) * case.tol)),
    }
    wrong = [
        f"{what} error {error:.1e} > {most:.1e}"
        for what, (error, most) in limits.items()
        if not error <= most
    ]
    shown = None if name == OURS else steps
    row = Measurement(str(case), name, ", ".join(wrong), shown, value_error, gradient_error, marginal)
    return row, forward_backward


@torch.no_grad()
def _least_steps(name: str, solve: Solver, x: Tensor, y: Tensor, case: Case) -> tuple[int, float]:
    """The iterations with which a peer reaches the tolerance, and its error; ecgot finds its own."""
    error = math.nan
    for steps in (0,) if name == OURS else itertools.chain(range(1, 50), range(50, MAX_STEPS + 1, 10)):
        error = _marginal_error(solve(x, y, case, steps)[1]())
        if error <= ROUNDING[0] * case.tol + ROUNDING[1]:
            break
    return steps, error


def _marginal_error(plan: Tensor) -> float:
    plan = plan.double()
    _, n, m = plan.shape
    rows, columns = (plan.sum(2) - 1 / n).abs().sum(1), (plan.sum(1) - 1 / m).abs().sum(1)
    return torch.maximum(rows, columns).max().item()


def _relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def _timed(
    found: list[Measurement], calls: dict[str, Callable[[], object]], device: torch.device
) -> list[Measurement]:
    """Time the calls in turns and fill in their rows."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    once = sum(_milliseconds(call, device) for call in calls.values())  # compiles, tunes, allocates
    once = sum(_milliseconds(call, device) for call in calls.values())
    rounds = int(min(max(1e3 * BUDGET_S / max(once, 1e-3), MIN_ROUNDS), MAX_ROUNDS))
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(_milliseconds(call, device))
    for row in found:
        if row.provider in times:
            ordered = sorted(times[row.provider])
            row.rounds, row.median_ms = rounds, statistics.median(ordered)
            row.q20_ms, row.q80_ms = ordered[rounds // 5], ordered[min(rounds - 1, 4 * rounds // 5)]
            if row.provider not in GRAPHS:
                row.peak_mb = _peak_mb(calls[row.provider], device)
    return found


def _milliseconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _peak_mb(call: Callable[[], object], device: torch.device) -> float:
    """What torch allocates at once during a call, on top of its inputs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes its own notes to stderr
    with torch.profiler.profile(profile_memory=True) as profiler:
        call()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 1e6


# --- where and with what ------------------------------------------------------------------------------------


def origin() -> dict[str, str]:
    """Device and versions, to stamp results with."""
    versions = {
        name: importlib.metadata.version(distribution) if importlib.util.find_spec(module) else "none"
        for name, module, distribution in (
            ("pot", "ot", "POT"),
            ("geomloss", "geomloss", "geomloss"),
            ("flash_sinkhorn", "flash_sinkhorn", "flash-sinkhorn"),
            ("numba", "numba", "numba"),
        )
    }
    triton = importlib.metadata.version("triton") if HAS_TRITON else "none"
    return {"device": device_name(), "torch": torch.__version__, "triton": triton} | versions


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        name = next((value.strip() for key, _, value in fields if key.strip() == "model name"), name)
    return f"{name}, {torch.get_num_threads()} threads"


def as_row(measurement: Measurement) -> dict[str, Any]:
    """Plain values, unknown ones None."""
    values = dataclasses.asdict(measurement)
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}
