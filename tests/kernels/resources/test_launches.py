"""Kernels and bytes are counted as a GPU would see them, without one."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from ecgot.kernels import dispatch, sinkhorn
from ecgot.kernels.conv.backends import choose
from ecgot.kernels.conv.geometry import Geometry
from ecgot.kernels.resources import __main__ as command
from ecgot.kernels.resources.launches import Launches, as_on_gpu, count
from ecgot.kernels.resources.workloads import WORKLOADS

pytestmark = pytest.mark.skipif(
    not dispatch.HAS_TRITON or dispatch.INTERPRETED, reason="Triton is missing, or interprets"
)

KERNEL = SimpleNamespace(__name__="_some_kernel", arg_names=["x_ptr", "y_ptr", "N"])


def meta(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def found(launches: Launches) -> list[tuple[str, int]]:
    return [(each.name, each.bytes) for each in launches.each]


def test_an_operator_is_a_kernel_that_reads_and_writes() -> None:
    x, y = meta(10, 3), meta(10, 3)
    assert found(count(lambda: x + y)) == [("add", 3 * 120)]
    assert found(count(lambda: x @ y.mT)) == [("mm", 2 * 120 + 400)]
    assert found(count(lambda: x.add_(y))) == [("add_", 2 * 120)]
    assert found(count(lambda: x.to(torch.float16))) == [("_to_copy", 120 + 60)]
    assert found(count(lambda: x.half().float())) == [("_to_copy", 180)] * 2


def test_views_and_memory_without_values_are_none() -> None:
    x = meta(10, 3)

    def views() -> None:
        x.view(3, 10).mT[1:, None].expand(9, 5, 3).detach().split(2)
        x.reshape(30).unbind()
        torch.empty(4, device="cuda")
        torch.empty_like(x).new_empty(3)
        x.contiguous().to(torch.float32)

    assert count(views).total == 0


def test_an_expanded_tensor_has_the_size_of_its_storage() -> None:
    x = meta(10, 1)
    assert found(count(lambda: x.expand(10, 50).contiguous())) == [("clone", 40 + 2000)]


def test_filling_only_writes() -> None:
    x = meta(10, 3)
    assert found(count(lambda: torch.zeros(5, device="cuda"))) == [("zeros", 20)]
    assert found(count(lambda: (torch.ones_like(x), x.new_zeros(2), x.fill_(3)))) == [
        ("ones_like", 120),
        ("new_zeros", 8),
        ("fill_", 120),
    ]


def test_composite_operators_are_their_parts() -> None:
    x, weight, bias = meta(10, 3, grad=True), meta(4, 3), meta(4)
    assert found(count(lambda: nn.functional.linear(x, weight, bias))) == [("addmm", 4 * (30 + 12 + 4 + 40))]
    assert found(count(lambda: nn.functional.pad(x, (0, 1)))) == [("fill_", 160), ("copy_", 240)]
    # The gradient of a slice is zeros and a copy.
    assert [name for name, _ in found(count(lambda: x[2:].backward(meta(8, 3))))] == ["zeros", "copy_"]


@pytest.mark.parametrize("needed", [False, True])
def test_each_gradient_of_a_convolution_is_a_kernel(needed: bool) -> None:
    x, weight = meta(2, 3, 10, grad=True), meta(4, 3, 5, grad=needed)
    launches = count(lambda: nn.functional.conv1d(x, weight).backward(meta(2, 4, 6)))
    assert [name for name, _ in found(launches)] == ["convolution", *["convolution_backward"] * (1 + needed)]


def test_a_registered_operator_runs_as_on_a_gpu() -> None:
    @torch.library.custom_op("ecgot::counted", mutates_args=())
    def counted(x: Tensor) -> Tensor:
        assert x.device.type == "cuda"
        return x.contiguous().to(torch.float16).reshape(-1).clone()  # composite below autograd

    assert found(count(lambda: counted(meta(10, 3)))) == [("_to_copy", 180), ("clone", 120)]


def test_work_on_nothing_is_none() -> None:
    assert count(lambda: meta(0, 3) + 1).total == 0


def test_work_on_the_cpu_is_none() -> None:
    assert count(lambda: torch.ones(3) + 1).total == 0


def test_a_value_that_the_host_reads_is_a_copy_and_true() -> None:
    x, answers = meta(7), []

    def read() -> None:
        answers.append(bool((x > 0).any()))
        answers.append(x[0].item())

    assert [name for name, _ in found(count(read))] == ["gt", "any", "copy to the host", "copy to the host"]
    assert answers == [True, 1.0]


def test_a_triton_launch_is_noted_with_its_arguments() -> None:
    x, y = meta(10, 3), meta(4, dtype=torch.bfloat16)

    def launch() -> None:
        dispatch.launch(KERNEL, (3, 2), x, y, N=30, other_ptr=x, num_warps=4)  # x twice

    launches = count(launch)
    assert found(launches) == [("_some_kernel", 120 + 8)]
    assert (launches.torch, launches.triton, launches.total) == (0, 1, 1)
    assert launches.each[0].grid == (3, 2)
    arguments = launches.each[0].arguments
    assert {name: value for name, value in arguments.items() if not isinstance(value, Tensor)} == {
        "N": 30,
        "num_warps": 4,
    }
    assert arguments["y_ptr"].dtype == torch.bfloat16
    assert arguments["other_ptr"].shape == x.shape


def test_a_noted_tensor_is_not_held() -> None:
    """Or autograd would copy gradients where it takes them over."""
    x = meta(10, grad=True)

    class Launching(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(_ctx: object, grad: Tensor) -> Tensor:
            made = torch.empty_like(grad)
            dispatch.launch(KERNEL, (1,), grad, made, 10)
            return made

    names = [each.name for each in count(lambda: Launching.apply(x).backward(meta(10))).each]
    assert names == ["clone", "_some_kernel"]


def test_parts_of_one_storage_count_each() -> None:
    x = meta(2, 10)
    assert count(lambda: dispatch.launch(KERNEL, (1,), x[0], x[1], 3)).megabytes == 80e-6


def test_kernels_are_listed_by_name() -> None:
    x = meta(10)
    assert count(lambda: (x + 1, x * 2, x + x)).by_name() == [("add", 2, 160e-6), ("mul", 1, 80e-6)]


def test_gpu_branches_are_taken() -> None:
    devices, x, weight = [], meta(2, 8, 64), meta(64, 64, 1)

    def look() -> None:
        devices.append(x.device)
        devices.append(torch.empty(3, device=x.device).device)
        devices.append(torch.ones(1).device)
        assert x.is_cuda
        assert dispatch.use_triton(x)
        assert choose("forward", x, weight, Geometry(1, 0, 1, 1)) == "triton"
        with torch.autocast("cuda", torch.bfloat16):
            assert torch.is_autocast_enabled("cuda")

    count(look)
    assert devices == [torch.device("cuda", 0)] * 2 + [torch.device("cpu")]


def test_all_is_as_it_was_afterwards() -> None:
    x = meta(3)
    with pytest.raises(ZeroDivisionError):
        count(lambda: 1 / 0)
    assert x.device.type == "meta"
    assert not x.is_cuda
    assert not dispatch.use_triton(x)
    launched: list[int] = []
    dispatch.launch({(1,): launched.append}, (1,), 3)  # a kernel is looked up by its grid
    assert launched == [3]


def test_the_operators_of_transport_run_as_on_a_gpu() -> None:
    x, y = meta(2, 20, 3, grad=True), meta(2, 30, 3, grad=True)
    forward = count(lambda: sinkhorn(x, y, eps=0.1))
    assert "_sinkhorn_fwd_kernel" in {each.name for each in forward.each}
    both = count(lambda: sinkhorn(x, y, eps=0.1).value.backward(meta(2)))
    assert both.total > forward.total
    assert both.triton > forward.triton
    assert x.grad is not None


def test_preparations_return_what_they_make() -> None:
    assert as_on_gpu(lambda: meta(3).device).type == "cuda"


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_can_be_counted(name: str) -> None:
    launches = count(WORKLOADS[name]())
    assert launches.triton > 0
    assert launches.megabytes > 30
    assert launches.each == count(WORKLOADS[name]()).each


def test_the_command_prints_a_line_for_each_call(capsys: pytest.CaptureFixture) -> None:
    assert command.main(["--launches", "cosine", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [name for name in WORKLOADS if "cosine" in name]
    assert [line[: line.index(" torch ")].rstrip() for line in lines if line[0] != " "] == names
    listed = [line.split() for line in lines if line.startswith("    ")]
    assert any(words[1] == "_sinkhorn_fwd_kernel" for words in listed)
    assert sum(int(words[0]) for words in listed) == sum(
        int(line.split(" total ")[1].split()[0]) for line in lines if line[0] != " "
    )


def test_a_call_that_is_not_there_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert command.main(["--launches", "nothing"]) == 2
    assert "got 'nothing'" in capsys.readouterr().err


def test_interpreted_kernels_are_not_counted() -> None:
    code = "from ecgot.kernels.resources.launches import count; count(print)"
    environment = {"TRITON_INTERPRET": "1", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "RuntimeError: triton: expected one that compiles, got TRITON_INTERPRET=1" in done.stderr
