"""Checks of the solvers' arguments: one line that names the argument, what came and what is accepted."""

import math
import numbers
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

COSTS = ("sqeuclidean", "euclidean", "cosine", "dot")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PRECISIONS = ("fp32", "tf32")
MAX_SCALING = 0.999  # in fp32 a factor nearer to 1 may be 1, and annealing would not end
ABSENT = -1.0  # stands in the solvers' weights for a point that does not exist


def solver_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp16 and bf16 are solved in fp32, fp64 in fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_points(x: Tensor, y: Tensor, *, dims: int = 3, same_batch: bool = True) -> tuple[Tensor, Tensor]:
    """x and y of one dtype; their last dimensions agree, and their first where ``same_batch``."""
    for name, points in (("x", x), ("y", y)):
        check_floating(name, points, dims, "[B, points, D]" if dims == 3 else "[points, D]")
    if x.shape[-1] != y.shape[-1] or (same_batch and dims == 3 and x.shape[0] != y.shape[0]):
        accepted = "[B, N, D] and [B, M, D]" if same_batch else "[B, N, D] and [K, M, D]"
        raise ValueError(
            f"x and y: got shapes {tuple(x.shape)} and {tuple(y.shape)}, accepted are "
            f"{accepted if dims == 3 else '[points, D] and [points, D]'}"
        )
    if x.device != y.device:
        raise ValueError(f"y: got device {y.device}, accepted is that of x, {x.device}")
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def check_floating(name: str, points: Any, dims: int, accepted: str) -> None:
    if not isinstance(points, Tensor):
        raise TypeError(f"{name}: got {type(points).__name__}, accepted is a torch.Tensor")
    if not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(points):
        raise RuntimeError(f"{name}: got a tensor under torch.vmap, accepted are batches in dimension 0")
    if points.dim() != dims:
        raise ValueError(f"{name}: got shape {tuple(points.shape)}, accepted is {accepted}")
    if points.dtype not in DTYPES or points.layout != torch.strided:
        kind = points.dtype if points.layout == torch.strided else points.layout
        raise TypeError(f"{name}: got {kind}, accepted are dense fp16, bf16, fp32 and fp64 tensors")
    if _has_tangent(points):
        raise RuntimeError(f"{name}: got a dual tensor, but sinkhorn has no forward-mode derivative")


def _has_tangent(points: Tensor) -> bool:
    # The first look into a dual tensor is slow, so there is none outside forward mode.
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(points).tangent is not None


def check_cost(cost: str) -> None:
    if cost not in COSTS:
        raise ValueError(f"cost: got {cost!r}, accepted are {', '.join(map(repr, COSTS))}")


def check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, accepted are {' and '.join(map(repr, PRECISIONS))}")


def check_eps(eps: Any, points: Tensor, problems: int) -> Tensor:
    """eps [problems] in the solver's dtype, of a number or a tensor [problems]."""
    dtype = solver_dtype(points.dtype)
    if isinstance(eps, Tensor):
        if eps.dim() == 0:
            eps = eps.expand(problems)
        if eps.shape != (problems,) or not eps.is_floating_point() or eps.device != points.device:
            raise ValueError(
                f"eps: got {eps.dtype} {tuple(eps.shape)} on {eps.device}, accepted is a number or floating "
                f"point [{problems}] on {points.device}"
            )
        if eps.requires_grad:
            raise ValueError("eps: got a tensor that requires a gradient, accepted is one without")
        if can_read_values(eps) and not bool(((eps >= 1e-30) & (eps <= 1e30)).all()):
            raise ValueError("eps: got a tensor with an entry outside, accepted are 1e-30 to 1e30")
        return eps.to(dtype)
    if not (is_real(eps) and 1e-30 <= eps <= 1e30):
        raise ValueError(f"eps: got {eps!r}, accepted is a number > 0, from 1e-30 to 1e30")
    return torch.full((problems,), float(eps), dtype=dtype, device=points.device)


def check_iterations(max_iter: Any, tol: Any, scaling: Any) -> tuple[int, float, float]:
    """The settings as plain numbers: numpy's are welcome. No scaling is 0."""
    if not isinstance(max_iter, (int, numbers.Integral)) or max_iter < 1:
        raise ValueError(f"max_iter: got {max_iter!r}, accepted is an integer >= 1")
    if not (is_real(tol) and 0 <= tol < math.inf):
        raise ValueError(f"tol: got {tol!r}, accepted is a number >= 0")
    if scaling is not None and not (is_real(scaling) and 0 < scaling <= MAX_SCALING):
        raise ValueError(f"scaling: got {scaling!r}, accepted is None or a number > 0, up to {MAX_SCALING}")
    return int(max_iter), float(tol), 0.0 if scaling is None else float(scaling)


def check_rho(rho: Any, rho_x: Any, rho_y: Any) -> tuple[float, float]:
    """The weights of the marginals' penalties; infinity where a marginal is kept."""
    for name, value in (("rho", rho), ("rho_x", rho_x), ("rho_y", rho_y)):
        if value is not None and not (is_real(value) and value > 0):
            raise ValueError(f"{name}: got {value!r}, accepted is None or a number > 0")
    if rho is not None and (rho_x is not None or rho_y is not None):
        raise ValueError("rho: got it beside rho_x or rho_y, accepted is rho for both or each of its own")
    both = math.inf if rho is None else float(rho)
    return (both if rho_x is None else float(rho_x)), (both if rho_y is None else float(rho_y))


def is_real(value: Any) -> bool:
    return isinstance(value, (int, float, numbers.Real))


def can_read_values(tensor: Tensor) -> bool:
    """Whether looking at values is free: a check on a GPU would wait for it."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_mask(name: str, mask: Tensor | None, shape: torch.Size, device: torch.device) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: got {type(mask).__name__}, accepted is a torch.Tensor")
    if mask.dtype != torch.bool or mask.shape != shape or mask.device != device:
        raise ValueError(
            f"{name}: got {mask.dtype} {tuple(mask.shape)} on {mask.device}, accepted is "
            f"torch.bool {tuple(shape)} on {device}"
        )


def check_weights(
    name: str,
    weights: Tensor | None,
    points: Tensor,
    mask: Tensor | None,
    *,
    any_mass: bool,
    shape: torch.Size | None = None,
) -> Tensor:
    """Weights [B, points] in the solver's dtype, ``ABSENT`` at masked points; uniform where none are given.

    Args:
        any_mass: the sum is free (unbalanced transport); else it is 1, checked on the CPU, and its rounding
            is mended.
    """
    shape = points.shape[:2] if shape is None else shape
    dtype, device = solver_dtype(points.dtype), points.device
    check_mask(f"{'x' if name == 'a' else 'y'}_mask", mask, shape, device)
    if weights is None:
        return _uniform(shape, mask, dtype, device)
    if not isinstance(weights, Tensor):
        raise TypeError(f"{name}: got {type(weights).__name__}, accepted is a torch.Tensor")
    if weights.shape != shape or not weights.is_floating_point() or weights.device != device:
        raise ValueError(
            f"{name}: got {weights.dtype} {tuple(weights.shape)} on {weights.device}, accepted is floating "
            f"point {tuple(shape)} on {device}"
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
        # Their rounding would keep the marginal error above tol for ever. The gradient stays the potential.
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
        raise ValueError(f"{name}: got a negative or NaN weight, accepted are weights >= 0")
    mass = weights.sum(1)
    if not bool(mass.isfinite().all()):
        raise ValueError(f"{name}: got an infinite weight, accepted are finite weights")
    # A problem that is masked out whole has mass 0 by right; it is answered with value 0.
    empty = torch.full_like(mass, weights.shape[1] == 0, dtype=torch.bool) if mask is None else ~mask.any(1)
    wrong = ((mass - 1).abs() > tolerance) & ~empty
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: got weights of problem {index} that sum to {mass[index].item():.6g}, "
            "accepted is a sum of 1"
        )


def check_potential(potential: Any, shape: torch.Size, points: Tensor) -> Tensor:
    """A potential [B, M] to start from, detached, in the solver's dtype."""
    if not isinstance(potential, Tensor):
        raise TypeError(f"init: got {type(potential).__name__}, accepted is a torch.Tensor")
    if potential.shape != shape or not potential.is_floating_point() or potential.device != points.device:
        raise ValueError(
            f"init: got {potential.dtype} {tuple(potential.shape)} on {potential.device}, accepted is the "
            f"potential g of an earlier solution, floating point {tuple(shape)} on {points.device}"
        )
    return potential.detach().to(solver_dtype(points.dtype))


def check_cu_seqlens(name: str, offsets: Any, points: Tensor, longest: int | None) -> tuple[Tensor, int]:
    """Offsets [B + 1] of packed sequences as int64, and the length of the longest."""
    if not isinstance(offsets, Tensor):
        raise TypeError(f"{name}: got {type(offsets).__name__}, accepted is a torch.Tensor")
    if (
        offsets.dim() != 1
        or len(offsets) < 1
        or offsets.dtype not in (torch.int32, torch.int64)
        or offsets.device != points.device
    ):
        raise ValueError(
            f"{name}: got {offsets.dtype} {tuple(offsets.shape)} on {offsets.device}, accepted is int32 "
            f"[B + 1] on {points.device}"
        )
    offsets = offsets.long()
    if can_read_values(offsets):
        bad = bool((offsets.diff() < 0).any()) or int(offsets[0]) != 0 or int(offsets[-1]) != len(points)
        if bad:
            raise ValueError(
                f"{name}: got {offsets.tolist()[:8]}, accepted are offsets from 0 to {len(points)}"
            )
    found = int(offsets.diff().max()) if longest is None and len(offsets) > 1 else int(longest or 0)
    if can_read_values(offsets) and len(offsets) > 1 and int(offsets.diff().max()) > found:
        raise ValueError(f"max_seqlen: got {found}, accepted is the longest of {name} or more")
    return offsets, found
