"""The device that a configuration asks for."""

import torch

from ecgot.errors import EcgotError
from ecgot.runs.config import Config


def check_cuda_graph(config: Config) -> None:
    """That CUDA graphs are asked for on a CUDA device alone.

    Raises:
        EcgotError: they are asked for on another.
    """
    device = choose_device(config.device)
    if config.cuda_graph and device.type != "cuda":
        raise EcgotError(f"cuda_graph: expected false on device {device.type!r}, got true")


def choose_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EcgotError(f"device: expected auto or a device of this machine, got {name!r}") from error
    return device
