"""The assignment of samples to prototypes of SwAV, DINOv2 and iBOT: three normalisations, over all processes.

    Q = exp(scores / temperature), its prototypes divided by K times their sums, its samples by B times theirs

The originals overflow in fp32 where a score is above 88 temperatures. Here the first normalisation is done in
the logarithm, and the others scale rows and columns of one matrix. As in the originals there is no gradient.

Sources: Caron et al. 2020, "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments";
Oquab et al. 2023, "DINOv2: Learning Robust Visual Features without Supervision".
"""

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def distributed_sinkhorn(out: Tensor, sinkhorn_iterations: int = 3, epsilon: float = 0.05) -> Tensor:
    """SwAV's assignment [B, K] of scores [B, K] to prototypes: rows sum to 1.

    Where torch.distributed is initialised, each process gives its own samples, and prototypes share those of
    all. SwAV's options ``--epsilon`` and ``--sinkhorn_iterations`` are arguments here.

    >>> scores = torch.tensor([[0.3, 0.0], [0.2, 0.0], [0.1, 0.0], [0.0, 0.0]])
    >>> distributed_sinkhorn(scores, sinkhorn_iterations=50).argmax(1).tolist()  # two samples for each
    [0, 0, 1, 1]
    """
    return _assignment(out, epsilon, sinkhorn_iterations)


@torch.no_grad()
def sinkhorn_knopp_teacher(teacher_output: Tensor, teacher_temp: float, n_iterations: int = 3) -> Tensor:
    """DINOv2's targets [B, K] of the teacher's scores [B, K], divided by ``teacher_temp``: rows sum to 1."""
    return _assignment(teacher_output.float(), teacher_temp, n_iterations)


@torch.no_grad()
def ibot_sinkhorn_knopp_teacher(
    teacher_output: Tensor, teacher_temp: float, n_masked_patches_tensor: Tensor, n_iterations: int = 3
) -> Tensor:
    """The same for DINOv2's masked patches; their number drops out in the last normalisation."""
    return _assignment(teacher_output.float(), teacher_temp, n_iterations)


def _assignment(scores: Tensor, temperature: float, iterations: int) -> Tensor:
    """Rows are samples, columns prototypes; constants that the next normalisation removes are left out."""
    if iterations < 1:
        raise ValueError(f"iterations: expected an integer >= 1, got {iterations!r}")
    log_q = scores / temperature
    q = (log_q - _log_sum(log_q)).softmax(1)
    if iterations == 1:
        return q
    row, column = q.new_ones(len(q)), q.new_ones(q.shape[1])
    for _ in range(iterations - 1):
        column = 1 / _sum_over_processes(row @ q)
        row = 1 / (q @ column)
    return q * row[:, None] * column


def _log_sum(log_q: Tensor) -> Tensor:
    """Logarithms of the sums over the samples of all processes, [K]."""
    top = log_q.amax(0) if len(log_q) else log_q.new_full(log_q.shape[1:], -torch.inf)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(top, dist.ReduceOp.MAX)
    top = torch.where(top.isinf(), 0.0, top)
    return _sum_over_processes(torch.exp(log_q - top).sum(0)).log() + top


def _sum_over_processes(value: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
    return value
