"""What the headline calls and kernels may cost, counted without a GPU.

docs/benchmarks.md says what they do cost. These bounds are goals: a change that breaks one has made a kernel
slower, and says so here before anyone measures it.
"""

import math

import pytest

from ecgot.kernels.dispatch import HAS_TRITON, INTERPRETED
from ecgot.kernels.resources.cases import cases
from ecgot.kernels.resources.launches import count
from ecgot.kernels.resources.outcome import Outcome, check
from ecgot.kernels.resources.workloads import WORKLOADS

pytestmark = pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs Triton's compiler")


@pytest.mark.parametrize(
    ("name", "kernels", "megabytes"),
    [
        ("sinkhorn sqeuclidean bf16 256x128x128x256", 4, 55),
        ("sinkhorn sqeuclidean bf16 256x128x128x256 and gradient", 5, 125),
        ("sinkhorn cosine bf16 256x128x128x256", 4, 55),
        ("sinkhorn cosine bf16 256x128x128x256 and gradient", 5, 125),
        ("xresnet1d101 bf16 256x12x1000 training step", 900, math.inf),
        ("xresnet1d101 fp32 256x12x1000 training step", 900, math.inf),
    ],
)
def test_calls_start_few_kernels_and_move_few_bytes(name, kernels, megabytes):
    launches = count(WORKLOADS[name]())
    assert launches.triton > 0
    assert launches.total <= kernels
    assert launches.megabytes <= megabytes


def compiled(kernel: str, name: str) -> list[Outcome]:
    """Outcomes of the cases of that name: products of one and of three TF32."""
    found = [case for case in set(cases("sm_90", everything=True, kernel=kernel)) if case.name == name]
    assert found
    outcomes = [check(case, "sm_90") for case in found]
    assert [outcome.error for outcome in outcomes] == [None] * len(found)
    if any(outcome.instructions is None for outcome in outcomes):
        pytest.skip("Triton came without cuobjdump")
    return outcomes


@pytest.mark.parametrize(
    "name",
    [
        "128x128 bf16 sqeuclidean centre=2 balanced whole",
        "128x128 fp32 sqeuclidean centre=2 balanced whole",
        "128x128 bf16 cosine balanced whole",
    ],
)
def test_the_solver_iterates_in_few_instructions_and_shares_a_multiprocessor(name):
    for outcome in compiled("_sinkhorn_fwd_kernel", name):
        assert outcome.issued is not None
        assert outcome.issued <= 3000
        assert outcome.spilled_bytes == 0
        assert outcome.programs == 2


def test_pairs_iterate_without_waiting():
    for outcome in compiled("_sinkhorn_fwd_kernel", "64x32 bf16 sqeuclidean centre=1 pairs balanced"):
        assert outcome.issued is not None
        assert outcome.issued <= 310
        assert outcome.barriers == 0
        assert outcome.spilled_bytes == 0


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("_whole_gradient_kernel", "128x128 bf16 sqeuclidean centred plan_parts=2 point_parts=1 step"),
        ("_pair_plan_kernel", "64x32 bf16 sqeuclidean centred plan_parts=2"),
    ],
)
def test_gradients_keep_the_plan_in_registers(kernel, name):
    for outcome in compiled(kernel, name):
        assert outcome.spilled_bytes == 0
