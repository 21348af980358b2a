"""The warning of a transport problem that was not solved as asked.

Looking at a result waits for a GPU, so only results on a CPU are looked at, and none while tracing.
"""

import sys
import warnings

import torch
from torch import Tensor

from ecgot.kernels.ot.problem import Problem, Solution, can_read_values

# Whose frames a warning does not point at.
LIBRARIES = (__name__.rpartition(".")[0], "ecgot.compat.", "torch.")


class SinkhornWarning(UserWarning):
    """A transport problem did not converge, or its eps is below what its dtype resolves."""


def warn_if_unsolved(problem: Problem, found: Solution, tol: float) -> None:
    """Warn of problems that did not converge; never with ``tol`` 0, which asks for just that."""
    assert found.converged is not None
    assert found.value is not None
    if not tol or not can_read_values(found.converged) or bool(found.converged.all()):
        return
    if bool((found.converged | found.value.isnan()).all()):
        return  # NaN in a problem is the caller's, and shows in its value
    # The texts have no numbers, so that Python's filter shows each once and not at every step of a training.
    finest = torch.finfo(problem.dtype).eps * (_largest(found.f) + _largest(found.g))
    if bool((problem.eps.detach() < finest).any()):
        dtype = str(problem.dtype).removeprefix("torch.")
        _warn(
            f"eps: expected more than {dtype} resolves at these costs, got less: the plan is rounding error"
        )
    else:
        _warn(
            "sinkhorn: expected a marginal error of at most tol, got more in some problems (see converged): "
            "raise max_iter, tol or eps, anneal with scaling, use fp64, or ask for max_iter with tol=0"
        )


def _largest(potential: Tensor) -> float:
    return float(potential.detach().nan_to_num(0.0, 0.0, 0.0).abs().amax()) if potential.numel() else 0.0


def _warn(text: str) -> None:
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(LIBRARIES):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, SinkhornWarning, stacklevel=level)
