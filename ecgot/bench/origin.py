"""Where and with what something was measured."""

import importlib.metadata
import importlib.util
import platform
from pathlib import Path

import torch

from ecgot.kernels.dispatch import HAS_TRITON

_PACKAGES = (  # column, module, distribution
    ("pot", "ot", "POT"),
    ("geomloss", "geomloss", "geomloss"),
    ("flash_sinkhorn", "flash_sinkhorn", "flash-sinkhorn"),
    ("numba", "numba", "numba"),
)


def origin() -> dict[str, str]:
    """Device and versions to stamp results with; a package that is not installed is "none"."""
    versions = {
        name: importlib.metadata.version(distribution) if importlib.util.find_spec(module) else "none"
        for name, module, distribution in _PACKAGES
    }
    triton = importlib.metadata.version("triton") if HAS_TRITON else "none"
    return {"device": device_name(), "torch": torch.__version__, "triton": triton} | versions


def device_name() -> str:
    """The GPU, or else the processor and the number of torch's threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        name = next((value.strip() for key, _, value in fields if key.strip() == "model name"), name)
    return f"{name}, {torch.get_num_threads()} threads"
