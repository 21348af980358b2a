"""The problems that solvers are compared on, and what is measured of a solver on one of them."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Case:
    """B problems of N x M unit vectors in D dimensions, solved to a marginal error of tol.

    ``threads`` of a CPU; None for as many as torch has.
    """

    batch: int
    n: int
    m: int
    d: int
    eps: float = 0.1
    tol: float = 1e-4
    threads: int | None = None

    def __str__(self) -> str:
        threads = "" if self.threads is None else f" threads={self.threads}"
        return f"B={self.batch} N={self.n} M={self.m} D={self.d} eps={self.eps:g} tol={self.tol:g}{threads}"


_SHAPES = [(64, 64, 32, 128), (64, 128, 64, 256), (32, 250, 64, 384), (4, 1000, 1000, 64)]
_SMALL_SHAPES = [(1, 8, 8, 16), (1, 64, 64, 32), (16, 16, 16, 32), (16, 64, 64, 64)]
_GPU_SHAPES = [(256, 128, 128, 256), (1024, 32, 32, 256), (256, 250, 64, 384), (1, 10_000, 10_000, 64)]
SHORT = [Case(*_SHAPES[0], 0.05), Case(*_SHAPES[1], 0.05)]  # what ``ecgot bench`` runs
CPU_CASES = [Case(*shape, eps, tol) for shape in _SHAPES for eps in (0.1, 0.05) for tol in (1e-4, 1e-5)]
# Where the overhead of a call counts, and where costs are not stored.
SMALL_CASES = [Case(*shape, eps, threads=1) for shape in _SMALL_SHAPES for eps in (0.5, 0.1)]
LARGE_CASES = [Case(1, 4096, 4096, 64), Case(1, 4097, 4097, 64)]
GPU_CASES = [*CPU_CASES, *(Case(*shape, eps) for shape in _GPU_SHAPES for eps in (0.1, 0.05))]


@dataclass(frozen=True)
class PairsCase:
    """All pairs of B and K clouds of N and M unit vectors: a fixed number of iterations, cosine cost."""

    batch: int = 128
    others: int = 128
    n: int = 32
    m: int = 32
    d: int = 128
    eps: float = 0.1
    iterations: int = 10
    dtype: torch.dtype = torch.float32
    threads: int | None = None

    def __str__(self) -> str:
        return f"B={self.batch} K={self.others} N={self.n} M={self.m} D={self.d} iterations={self.iterations}"


CPU_PAIRS = PairsCase()
GPU_PAIRS = PairsCase(512, 512, 64, 32, 128, iterations=20, dtype=torch.bfloat16)


@dataclass
class Measurement:
    """One provider on one case. ``refused`` says why it was not timed; what was not measured is NaN."""

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

    def as_row(self) -> dict[str, Any]:
        """Plain values for JSON and CSV; unknown numbers are None."""
        values = dataclasses.asdict(self)
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


def unit_vectors(batch: int, count: int, d: int, device: torch.device, seed: int) -> Tensor:
    """Random directions [B, count, D], the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(batch, count, d, generator=generator), dim=2).to(device)


def points(case: Case | PairsCase, device: torch.device) -> tuple[Tensor, Tensor]:
    """The clouds of a case: x [B, N, D] and y [B, M, D] ([K, M, D] for pairs), which require gradients."""
    others, dtype = (case.others, case.dtype) if isinstance(case, PairsCase) else (case.batch, torch.float32)
    x, y = (
        unit_vectors(case.batch, case.n, case.d, device, 0),
        unit_vectors(others, case.m, case.d, device, 1),
    )
    return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()
