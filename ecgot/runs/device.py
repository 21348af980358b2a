"""The device that a configuration requests."""

import torch

from ecgot.errors import EcgotError
from ecgot.runs.config import Config


def check_cuda_graph(config: Config) -> None:
    """Check that CUDA graphs are requested only on a CUDA device.

    Raises:
        EcgotError: they are requested on another device.
    """
    device = choose_device(config.device)
    if config.cuda_graph and device.type != "cuda":
        raise EcgotError(f"cuda_graph: expected false on device {device.type!r}, got true")


def choose_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is CUDA if available, else the CPU.

    Raises:
        EcgotError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EcgotError(f"device: expected auto or a device of this machine, got {name!r}") from error
    return device
