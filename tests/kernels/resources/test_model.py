"""A call's time is predicted from what its kernels issue, multiply and move."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ecgot.kernels import dispatch
from ecgot.kernels.resources import model, predictions
from ecgot.kernels.resources.launches import Launch, Launches, count
from ecgot.kernels.resources.machine_code import Instruction, parse_sass, regions
from ecgot.kernels.resources.model import Code, Estimate, Passes, estimates
from ecgot.kernels.resources.workloads import WORKLOADS

pytestmark = pytest.mark.skipif(
    not dispatch.HAS_TRITON or dispatch.INTERPRETED, reason="Triton is missing, or interprets"
)

# A loop around two others: one with a matrix product, one with multiply-adds; and one that only waits.
SASS = """
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0030*/              @!P0 BRA 0x20 ;
        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R3 ;
        /*0050*/              @!P1 BRA 0x40 ;
        /*0060*/                   FFMA R4, R4, R5, R6 ;
        /*0070*/                   FMUL R4, R4, R5 ;
        /*0080*/              @!P2 BRA 0x60 ;
        /*0090*/              @!P3 BRA 0x10 ;
        /*00a0*/                   STG.E [R2.64], R4 ;
        /*00b0*/                   EXIT ;
"""


def code(**given: int) -> Code:
    parts = dict.fromkeys(("once", "between", "main", "forming", "others"), 0)
    products = dict.fromkeys(parts, 0.0)
    return Code(128, 4, 2, parts | given, products)


def test_regions_of_machine_code() -> None:
    found = regions(parse_sass(SASS))
    assert [each.opcode for each in found.once] == ["MOV", "STG.E", "EXIT"]
    assert [each.opcode.split(".")[0] for each in found.between] == ["IADD3", "SYNCS", "BRA", "BRA"]
    assert [each.opcode for each in found.main] == ["FFMA", "FMUL", "BRA"]
    assert [each.opcode for each in found.forming] == ["HMMA.16816.F32.BF16", "BRA"]
    assert found.others == []


@pytest.mark.parametrize(
    ("opcode", "multiply_adds", "rate"),
    [
        ("HMMA.16816.F32.BF16", 16 * 8 * 16, 512 * 0.62),
        ("HMMA.1688.F32.TF32", 16 * 8 * 8, 256 * 0.62),
        ("HGMMA.64x128x16.F32", 64 * 128 * 16 / 4, 512 * 0.85),
        ("FFMA", 0, 1),
    ],
)
def test_a_product_keeps_a_scheduler_busy(opcode: str, multiply_adds: float, rate: float) -> None:
    assert model.product_cycles(Instruction(opcode, "")) == pytest.approx(multiply_adds / rate)


def test_cycles_are_those_of_instructions_or_of_products() -> None:
    passes = Passes(main=100, between=10, forming=2, others=3)
    many = code(once=5, between=7, main=1000, forming=4, others=11)
    issued = 4 * (5 + 70 + 100_000 + 8 + 33)
    # Two programs of four warps: two warps for each of four schedulers, which then issue 0.65 a cycle.
    assert many.cycles(passes, 3) == (pytest.approx(3 * issued / (4 * 0.65)), "instructions")
    assert many.cycles(passes, 1) == (pytest.approx(issued / (4 * 0.33)), "instructions")
    products = Code(128, 4, 2, many.instructions, many.products | {"main": 2000.0})
    assert products.cycles(passes, 3) == (pytest.approx(3 * 100 * 2000.0), "products")
    alone = Code(255, 4, 1, many.instructions, many.products)
    assert alone.cycles(passes, 3) == (pytest.approx(3 * issued / (4 * 0.33)), "instructions")


def test_a_kernel_takes_as_long_as_what_limits_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model.PASSES, "kernel", lambda given: Passes(main=given.N))
    monkeypatch.setattr(model, "case_of", lambda launch: launch.name)
    monkeypatch.setattr(model, "code_of", lambda _: code(main=260))
    work = Launch("kernel", 3_000_000, kernel="a kernel", grid=(133,), arguments={"N": 1000})
    moving = Launch("kernel", 3_000_000_000, kernel="a kernel", grid=(1,), arguments={"N": 1000})
    launches = Launches((work, moving, Launch("add", 3_000_000), Launch("mm", 6, 4_000_000_000, half=False)))
    with ThreadPoolExecutor(1) as pool:
        kernel, torch_kernels = estimates(launches, pool)
    cycles = 2 * 4 * 260 * 1000 / (4 * 0.65)  # of two programs on the busiest of 132 multiprocessors
    seconds = pytest.approx(cycles / 1.755e9 + 1e-3)
    assert kernel == Estimate("kernel", 2, 3003.0, seconds, "bytes", code(main=260))
    assert torch_kernels == Estimate("torch", 2, 3.000006, pytest.approx(1e-6 + 1e-4), "products", None)


def test_a_launch_is_compiled_as_it_is_made() -> None:
    from ecgot.kernels.ot.triton_gradient import _whole_gradient_kernel as kernel

    points = torch.empty(4, dtype=torch.bfloat16, device="meta")
    arguments = {name: points for name in kernel.arg_names if name.endswith("_ptr")}
    arguments |= dict.fromkeys((p.name for p in kernel.params if p.is_constexpr), 3)
    arguments |= {name: 7 for name in kernel.arg_names if name not in arguments}
    arguments |= {"N": 32, "M": 1, "D": 2**31, "COST": None, "num_warps": 4}
    case = model.case_of(Launch("_whole_gradient_kernel", 0, kernel=kernel, grid=(1,), arguments=arguments))
    signature, constants = dict(case.signature), dict(case.constants)
    assert list(signature) == kernel.arg_names
    assert case.module == kernel.__module__
    assert case.options == (("num_warps", 4),)
    types = [signature[name] for name in ("x_ptr", "N", "M", "D")]
    assert types == ["*bf16", "i32", "constexpr", "i64"]
    assert (constants["M"], constants["COST"], constants["BLOCK_N"]) == (1, None, 3)
    assert {"x_ptr", "N", "D"} <= set(case.divisible)
    assert not {"M", "stride_xb"} & set(case.divisible)


def test_every_kernel_of_the_calls_has_its_passes() -> None:
    """A new kernel, or one with another loop, wants a line in PASSES."""
    for name, make in WORKLOADS.items():
        for launch in count(make()).each:
            if launch.kernel is not None:
                assert launch.name in model.PASSES, name
                passes = model.PASSES[launch.name](model.SimpleNamespace(**launch.arguments, PROGRAMS=1))
                assert all(number > 0 and math.isfinite(number) for number in vars(passes).values()), name


def test_a_call_is_predicted_from_its_compiled_kernels() -> None:
    launches = count(WORKLOADS["sinkhorn cosine bf16 256x128x128x256"]())
    with ThreadPoolExecutor(1) as pool:
        found = {each.name: each for each in estimates(launches, pool)}
    assert sum(each.launches for each in found.values()) == launches.total
    assert sum(each.megabytes for each in found.values()) == pytest.approx(launches.megabytes)
    solver = found["_sinkhorn_fwd_kernel"]
    assert solver.limit == "instructions"
    assert solver.code is not None
    # A hundred iterations, two problems on the busiest multiprocessor: all else is a part of that.
    iterations = 2 * 100 * solver.code.issued / (4 * 0.65) / 1.755e9
    assert iterations < solver.seconds < 2 * iterations


def test_a_call_has_a_row_and_so_have_its_long_kernels() -> None:
    found = [
        Estimate("_long_kernel", 1, 30.0, 90e-6, "instructions", code(main=250)),
        Estimate("torch", 9, 10.0, 10e-6, "bytes", None),
        Estimate("_short_kernel", 1, 0.1, 1e-6, "bytes", code()),
    ]
    assert list(predictions.rows("pairwise call", found)) == [
        "| pairwise call | 11 | 40 |  |  | 112 (123) |  | not measured (`transport`) |",
        "| - _long_kernel | 1 | 30 | 250 x 4 | 2 | 90 | instructions |  |",
        "| - torch | 9 | 10 | - | - | 10 | bytes |  |",
    ]
    assert {name.split()[0] for name in WORKLOADS} == set(predictions.STEPS)
    width = predictions.HEAD[0].count("|")
    assert {row.count("|") for row in (*predictions.HEAD, *predictions.rows("pairwise call", found))} == {
        width
    }
