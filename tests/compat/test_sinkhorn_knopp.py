"""Assignments of SwAV and DINOv2 beside their published iterations, in one process and in two."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ecgot.compat.sinkhorn_knopp import (
    distributed_sinkhorn,
    ibot_sinkhorn_knopp_teacher,
    sinkhorn_knopp_teacher,
)

ROOT = Path(__file__).parents[2]


def published(scores: Tensor, temperature: float, iterations: int) -> Tensor:
    """Algorithm 1 of SwAV's appendix: Q [K, B] sums to 1, its rows become 1 / K, its columns 1 / B."""
    q = torch.exp(scores / temperature).T
    k, b = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / k
        q = q / q.sum(0, keepdim=True) / b
    return (q * b).T


def scores_of(b: int, k: int, dtype: torch.dtype = torch.float64) -> Tensor:
    scores = torch.rand(b, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return (2 * scores - 1).to(dtype)  # cosines


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
@pytest.mark.parametrize("shape", [(12, 5), (5, 12)], ids=str)
def test_swav(shape: tuple[int, int], iterations: int, dtype: torch.dtype, atol: float) -> None:
    scores = scores_of(*shape, dtype)
    found = distributed_sinkhorn(scores, iterations, 0.05)
    assert found.dtype == dtype
    torch.testing.assert_close(found, published(scores, 0.05, iterations), rtol=0, atol=atol)
    torch.testing.assert_close(found.sum(1), torch.ones_like(found[:, 0]))


def test_the_defaults_are_those_of_the_papers() -> None:
    scores = scores_of(12, 5)
    torch.testing.assert_close(distributed_sinkhorn(scores), published(scores, 0.05, 3))
    wanted = published(scores.float(), 0.07, 3)
    torch.testing.assert_close(
        sinkhorn_knopp_teacher(scores.half().double(), 0.07), wanted, rtol=0, atol=5e-3
    )
    torch.testing.assert_close(sinkhorn_knopp_teacher(scores, 0.07), wanted, rtol=0, atol=1e-5)
    patches = ibot_sinkhorn_knopp_teacher(scores, 0.07, torch.tensor(12))
    torch.testing.assert_close(patches, wanted, rtol=0, atol=1e-5)


def test_no_gradient() -> None:
    scores = scores_of(12, 5).requires_grad_()
    assert not distributed_sinkhorn(scores).requires_grad


def test_scores_that_overflow_the_original() -> None:
    scores = 10 * scores_of(12, 5, torch.float32)  # exp(200) is no number in fp32
    assert not published(scores, 0.05, 3).isfinite().all()
    wanted = published(scores.double(), 0.05, 3)
    torch.testing.assert_close(distributed_sinkhorn(scores).double(), wanted, rtol=0, atol=1e-4)


def test_no_iterations_are_refused() -> None:
    with pytest.raises(ValueError, match="iterations: expected an integer >= 1, got 0"):
        distributed_sinkhorn(scores_of(3, 3), 0)


WORKER = """
import sys
import torch
import torch.distributed as dist
from ecgot.compat.sinkhorn_knopp import distributed_sinkhorn
from tests.compat.test_sinkhorn_knopp import published, scores_of

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
scores = scores_of(12, 5)
mine = slice(0, 5) if rank == 0 else slice(5, 12)  # not the same number in both
found = distributed_sinkhorn(scores[mine])
torch.testing.assert_close(found, published(scores, 0.05, 3)[mine], rtol=0, atol=1e-12)
dist.destroy_process_group()
"""


def test_two_processes_share_the_prototypes(tmp_path: Path) -> None:
    commands = [[sys.executable, "-c", WORKER, str(rank), str(tmp_path / "store")] for rank in range(2)]
    workers = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) for command in commands]
    errors = [worker.communicate(timeout=120)[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
