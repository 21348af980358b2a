"""A launch reaches its kernel on the device of its tensors, or the recorder that asks for it."""

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from ecgot.kernels import dispatch


class Kernel:
    """A kernel that notes its launches, and what was the current device."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **named: self.launches.append(
            (grid, arguments, named, torch.cuda.current_device())
        )


class OnGpu(torch.Tensor):
    """Claims to be on a GPU, by number."""

    number = 1
    is_cuda = True

    def get_device(self) -> int:
        return self.number


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The devices made current, in a process with two GPUs whose device 0 is current."""
    current, entered = [0], []

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        entered.append(index)
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    return entered


def on_gpu(index: int) -> torch.Tensor:
    tensor = torch.zeros(2).as_subclass(OnGpu)
    tensor.number = index
    return tensor


def test_a_kernel_is_launched_on_the_device_of_its_tensors(entered: list[int]) -> None:
    kernel, x = Kernel(), on_gpu(1)
    dispatch.launch(kernel, (3, 2), 5, x_ptr=x, BLOCK=16)
    ((grid, arguments, named, current),) = kernel.launches
    assert (grid, arguments, set(named)) == ((3, 2), (5,), {"x_ptr", "BLOCK"})
    assert named["x_ptr"] is x
    assert current == 1
    assert entered == [1]
    assert torch.cuda.current_device() == 0


def test_positional_tensors_count_too(entered: list[int]) -> None:
    kernel = Kernel()
    dispatch.launch(kernel, (1,), on_gpu(1), 5)
    assert kernel.launches[0][-1] == 1


def test_the_current_device_is_not_set_again(entered: list[int]) -> None:
    kernel = Kernel()
    dispatch.launch(kernel, (1,), x_ptr=on_gpu(0))
    assert len(kernel.launches) == 1
    assert entered == []


def test_a_failed_launch_in_a_recorder_ends_the_recording(entered: list[int]) -> None:
    def refuse(*_arguments: object, **_named: object) -> None:
        raise ValueError("no")

    kernel = Kernel()
    with pytest.raises(ValueError, match="no"), dispatch.recording(refuse):
        dispatch.launch(kernel, (1,), 1)
    dispatch.launch(kernel, (1,), 1)
    assert len(kernel.launches) == 1


def test_a_recorder_stands_in_for_the_kernels_of_its_thread(entered: list[int]) -> None:
    kernel, recorded = Kernel(), []
    with dispatch.recording(lambda *given, **named: recorded.append((given, named))):
        dispatch.launch(kernel, (4,), 7, N=3)
        other = threading.Thread(target=dispatch.launch, args=(kernel, (5,)))
        other.start()
        other.join()
    assert recorded == [((kernel, (4,), 7), {"N": 3})]
    assert [grid for grid, *_ in kernel.launches] == [(5,)]
