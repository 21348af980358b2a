"""POT's entropic solvers under their own names: ``import ecgot.compat.pot as ot``.

Arrays of NumPy give arrays of NumPy, tensors of torch give tensors, with gradients. What POT has and this
does not, exact transport for one, is an AttributeError that says so.
"""

from ecgot.compat.pot import batch, bregman, unbalanced, utils
from ecgot.compat.pot.batch import dist_batch, solve_batch, solve_sample_batch
from ecgot.compat.pot.bregman import sinkhorn, sinkhorn2
from ecgot.compat.pot.missing import refuse_others
from ecgot.compat.pot.solvers import solve, solve_sample
from ecgot.compat.pot.unbalanced import sinkhorn_unbalanced, sinkhorn_unbalanced2
from ecgot.compat.pot.utils import dist, unif

__all__ = [
    "batch",
    "bregman",
    "dist",
    "dist_batch",
    "sinkhorn",
    "sinkhorn2",
    "sinkhorn_unbalanced",
    "sinkhorn_unbalanced2",
    "solve",
    "solve_batch",
    "solve_sample",
    "solve_sample_batch",
    "unbalanced",
    "unif",
    "utils",
]

__getattr__ = refuse_others(__name__, __all__)
