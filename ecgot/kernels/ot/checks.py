"""Checks of the public functions' arguments; errors are one line, "NAME: expected X, got Y"."""

import math
import numbers
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ecgot.kernels.ot.problem import ABSENT, SolverSettings, can_read_values

COSTS = ("sqeuclidean", "euclidean", "cosine", "dot")
CENTRED_COSTS = ("sqeuclidean", "euclidean")  # of differences: the points may be moved, see centring.py
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PRECISIONS = ("fp32", "tf32")
MIN_EPS, MAX_EPS = 1e-30, 1e30
MAX_SCALING = 0.999  # in fp32 a factor nearer to 1 may be 1, and annealing would not end


def solver_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 points, fp32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_points(x: Tensor, y: Tensor, *, dims: int = 3, same_batch: bool = True) -> tuple[Tensor, Tensor]:
    """x and y, promoted to one dtype.

    Args:
        x, y: [B, N, D] and [B, M, D]; [N, D] and [M, D] where ``dims`` is 2.
        same_batch: whether B must agree.
    """
    for name, points in (("x", x), ("y", y)):
        check_floating(name, points, dims, "[B, points, D]" if dims == 3 else "[points, D]")
    if x.shape[-1] != y.shape[-1] or (same_batch and dims == 3 and x.shape[0] != y.shape[0]):
        expected = "[B, N, D] and [B, M, D]" if same_batch else "[B, N, D] and [K, M, D]"
        raise ValueError(
            f"x and y: expected {expected if dims == 3 else '[N, D] and [M, D]'}, "
            f"got shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if x.device != y.device:
        raise ValueError(f"y: expected the device of x, {x.device}, got {y.device}")
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def check_floating(name: str, points: Any, dims: int, shape: str) -> None:
    """A dense floating-point tensor of ``dims`` dimensions; ``shape`` is how an error describes them."""
    check_tensor(name, points)
    if points.dim() != dims:
        raise ValueError(f"{name}: expected {shape}, got shape {tuple(points.shape)}")
    if points.dtype not in DTYPES or points.layout != torch.strided:
        kind = points.dtype if points.layout == torch.strided else points.layout
        raise TypeError(f"{name}: expected a dense fp16, bf16, fp32 or fp64 tensor, got {kind}")
    if _has_tangent(points):
        raise RuntimeError(f"{name}: expected no tangent, as derivatives are reverse-mode, got a dual tensor")


def check_tensor(name: str, value: Any) -> None:
    """A tensor of any kind."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def _has_tangent(points: Tensor) -> bool:
    # The first look into a dual tensor is slow, so there is none outside forward mode.
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(points).tangent is not None


def batch_of(*given: Any) -> int:
    """The number of problems, from the first of these that is a tensor with dimensions; 1 if none is."""
    return next((each.shape[0] for each in given if isinstance(each, Tensor) and each.dim()), 1)


def check_cost(cost: str) -> None:
    """One of ``COSTS``."""
    if cost not in COSTS:
        raise ValueError(f"cost: expected one of {', '.join(map(repr, COSTS))}, got {cost!r}")


def check_precision(precision: str) -> None:
    """One of ``PRECISIONS``."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected {' or '.join(map(repr, PRECISIONS))}, got {precision!r}")


def check_eps(eps: Any, points: Tensor, problems: int) -> Tensor:
    """eps [problems] in the solver's dtype, from a number or a tensor [problems]."""
    dtype = solver_dtype(points.dtype)
    if isinstance(eps, Tensor):
        if eps.dim() == 0:
            eps = eps.expand(problems)
        if eps.shape != (problems,) or not eps.is_floating_point() or eps.device != points.device:
            raise ValueError(
                f"eps: expected a number or floating point [{problems}] on {points.device}, "
                f"got {eps.dtype} {tuple(eps.shape)} on {eps.device}"
            )
        if can_read_values(eps) and not bool(((eps >= MIN_EPS) & (eps <= MAX_EPS)).all()):
            raise ValueError(f"eps: expected {MIN_EPS:g} to {MAX_EPS:g}, got a tensor with an entry outside")
        return eps.to(dtype, copy=True)  # the caller may change it in place before plan() reads it
    if not (is_real(eps) and MIN_EPS <= eps <= MAX_EPS):
        raise ValueError(f"eps: expected a number from {MIN_EPS:g} to {MAX_EPS:g}, got {eps!r}")
    return torch.full((problems,), float(eps), dtype=dtype, device=points.device)


def check_settings(max_iter: Any, tol: Any, scaling: Any) -> SolverSettings:
    """The solver's settings as plain numbers; NumPy's are welcome. No scaling becomes 0."""
    if not isinstance(max_iter, (int, numbers.Integral)) or max_iter < 1:
        raise ValueError(f"max_iter: expected an integer >= 1, got {max_iter!r}")
    if not (is_real(tol) and 0 <= tol < math.inf):
        raise ValueError(f"tol: expected a number >= 0, got {tol!r}")
    if scaling is not None and not (is_real(scaling) and 0 < scaling <= MAX_SCALING):
        raise ValueError(f"scaling: expected None or a number > 0 and <= {MAX_SCALING}, got {scaling!r}")
    return SolverSettings(int(max_iter), float(tol), 0.0 if scaling is None else float(scaling))


def check_rho(rho: Any, rho_x: Any, rho_y: Any, eps: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The penalties [problems] of both marginals; None where a marginal is kept in all of them."""
    if rho is not None and (rho_x is not None or rho_y is not None):
        raise ValueError("rho: expected it alone, or rho_x and rho_y in its place, got both")
    if rho is not None:
        return (_penalty("rho", rho, eps),) * 2
    return _penalty("rho_x", rho_x, eps), _penalty("rho_y", rho_y, eps)


def _penalty(name: str, rho: Any, eps: Tensor) -> Tensor | None:
    if rho is None:
        return None
    if not isinstance(rho, Tensor):
        if not (is_real(rho) and rho > 0):
            raise ValueError(f"{name}: expected None or a number > 0, got {rho!r}")
        return None if rho == math.inf else torch.full_like(eps, float(rho))
    rho = rho.expand(eps.shape[0]) if rho.dim() == 0 else rho
    if rho.shape != eps.shape or not rho.is_floating_point() or rho.device != eps.device:
        raise ValueError(
            f"{name}: expected a number or floating point [{eps.shape[0]}] on {eps.device}, "
            f"got {rho.dtype} {tuple(rho.shape)} on {rho.device}"
        )
    if rho.requires_grad:
        raise ValueError(f"{name}: expected a tensor without gradient, got one that requires it")
    if can_read_values(rho) and not bool((rho > 0).all()):
        raise ValueError(f"{name}: expected entries > 0, got a tensor with another")
    return rho.to(eps.dtype, copy=True)  # as eps


def is_real(value: Any) -> bool:
    """Whether a value is a real number, Python's or NumPy's."""
    return isinstance(value, (int, float, numbers.Real))


def check_mask(name: str, mask: Tensor | None, shape: torch.Size, device: torch.device) -> None:
    """A boolean mask of that shape on that device, or None."""
    if mask is None:
        return
    check_tensor(name, mask)
    if mask.dtype != torch.bool or mask.shape != shape or mask.device != device:
        raise ValueError(
            f"{name}: expected torch.bool {tuple(shape)} on {device}, "
            f"got {mask.dtype} {tuple(mask.shape)} on {mask.device}"
        )


def check_weights(
    name: str, weights: Tensor | None, points: Tensor, mask: Tensor | None, *, any_mass: bool
) -> Tensor:
    """Weights [B, points] in the solver's dtype, ``ABSENT`` at masked points; uniform if None.

    Args:
        any_mass: the sum is free (unbalanced transport). Otherwise it must be 1, which is checked on the CPU,
            and the weights are divided by it to mend its rounding.
    """
    shape, dtype, device = points.shape[:2], solver_dtype(points.dtype), points.device
    check_mask(f"{'x' if name == 'a' else 'y'}_mask", mask, shape, device)
    if weights is None:
        return _uniform(shape, mask, dtype, device)
    check_tensor(name, weights)
    if weights.shape != shape or not weights.is_floating_point() or weights.device != device:
        raise ValueError(
            f"{name}: expected floating point {tuple(shape)} on {device}, "
            f"got {weights.dtype} {tuple(weights.shape)} on {weights.device}"
        )
    half = weights.dtype in (torch.float16, torch.bfloat16)
    weights = weights.to(dtype)
    if mask is not None:
        weights = weights.masked_fill(~mask, 0.0)
    if can_read_values(weights):
        _check_mass(name, weights.detach(), mask, math.inf if any_mass else 2e-2 if half else 1e-3)
    # The reciprocal of a subnormal weight is infinite; the point counts as one without weight.
    # Subtracted and not masked: the gradient at a point without weight is its potential, not 0.
    fixed = weights.detach()
    weights = weights - torch.where(fixed.abs() < torch.finfo(dtype).tiny, fixed, 0.0)
    if not any_mass:
        # Rounding in the sum would keep the marginal error above tol. The gradient stays the potential.
        mass = weights.detach().sum(1, keepdim=True)
        weights = weights / torch.where(mass > 0, mass, 1.0)
    return weights if mask is None else weights.masked_fill(~mask, ABSENT)


def _uniform(shape: torch.Size, mask: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    if mask is None:
        return torch.full(shape, 1 / max(shape[1], 1), dtype=dtype, device=device)
    share = 1 / mask.sum(1, keepdim=True).clamp_min(1).to(dtype)
    return torch.where(mask, share, ABSENT)


def _check_mass(name: str, weights: Tensor, mask: Tensor | None, tolerance: float) -> None:
    if not bool(torch.all(weights >= 0)):  # also False for NaN
        raise ValueError(f"{name}: expected weights >= 0, got a negative or NaN weight")
    mass = weights.sum(1)
    if not bool(mass.isfinite().all()):
        raise ValueError(f"{name}: expected finite weights, got an infinite weight")
    # A problem whose points are all masked rightly has mass 0; its value is 0.
    empty = torch.full_like(mass, weights.shape[1] == 0, dtype=torch.bool) if mask is None else ~mask.any(1)
    wrong = ((mass - 1).abs() > tolerance) & ~empty
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: expected weights that sum to 1, got {mass[index].item():.6g} in problem {index}"
        )


def check_potential(potential: Any, shape: torch.Size, points: Tensor) -> Tensor:
    """A potential g [B, M] to start from, detached, in the solver's dtype."""
    check_tensor("init", potential)
    if potential.shape != shape or not potential.is_floating_point() or potential.device != points.device:
        raise ValueError(
            f"init: expected the potential g of an earlier solution, floating point {tuple(shape)} on "
            f"{points.device}, got {potential.dtype} {tuple(potential.shape)} on {potential.device}"
        )
    return potential.detach().to(solver_dtype(points.dtype))


def check_cu_seqlens(name: str, offsets: Any, points: Tensor, longest: int | None) -> tuple[Tensor, int]:
    """Offsets [B + 1] of packed sequences as int64, and the length of the longest."""
    check_tensor(name, offsets)
    if (
        offsets.dim() != 1
        or len(offsets) < 1
        or offsets.dtype not in (torch.int32, torch.int64)
        or offsets.device != points.device
    ):
        raise ValueError(
            f"{name}: expected int32 or int64 [B + 1] on {points.device}, "
            f"got {offsets.dtype} {tuple(offsets.shape)} on {offsets.device}"
        )
    offsets = offsets.long()
    if can_read_values(offsets):
        bad = bool((offsets.diff() < 0).any()) or int(offsets[0]) != 0 or int(offsets[-1]) != len(points)
        if bad:
            raise ValueError(
                f"{name}: expected offsets that rise from 0 to {len(points)}, got {offsets.tolist()[:8]}"
            )
    found = int(offsets.diff().max()) if longest is None and len(offsets) > 1 else int(longest or 0)
    if can_read_values(offsets) and len(offsets) > 1 and int(offsets.diff().max()) > found:
        raise ValueError(f"max_seqlen: expected the longest of {name} or more, got {found}")
    return offsets, found
