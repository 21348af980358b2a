"""Who runs a convolution: this package's kernels, or torch (on a GPU, the vendor's library).

The vendor's wide matrix products are hard to beat; fusion pays off where memory bandwidth is the limit.
``backends.csv`` holds the measurements of ``python -m benchmarks.conv1d_backends``, one line per GPU, pass,
layer, dtype and length; the nearest measured length decides. A layer that was not measured on this GPU
follows the rule of :func:`modelled`.
"""

import csv
import functools
from importlib import resources

import torch
from torch import Tensor

from ecgot.kernels.conv.geometry import Geometry
from ecgot.kernels.dispatch import use_triton

BACKENDS = ("auto", "triton", "torch")
PASSES = ("forward", "input_gradient", "weight_gradient")
WIDE = 256  # channels from which most kernel sizes are compute-bound, not memory-bound

Layer = tuple[str, int, int, int, int, int, int, str]


def choose(what: str, x: Tensor, weight: Tensor, geometry: Geometry, backend: str = "auto") -> str:
    """ "triton" or "torch" for one pass of a convolution of x with a weight."""
    if x.dtype == torch.float64 or not use_triton(x):
        return "torch"
    if backend != "auto":
        return backend
    if x.device.type == "cpu":  # the interpreter exists to run the kernels
        return "triton"
    return _choose(_layer(what, weight, geometry, x.dtype), x.shape[1], gpu_name(x.device))


def gpu_name(device: torch.device) -> str:
    """By which the table knows a device's measurements; "cpu" where there is no GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return "cpu"
    return str(torch.cuda.get_device_properties(device).name)


def conv1d_backends(
    weight: Tensor | tuple[int, int, int],
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    length: int = 1000,
) -> dict[str, str]:
    """What ``backend="auto"`` means on this GPU for each pass of a layer: "triton" or "torch".

    Where the forward of :func:`ecgot.kernels.conv1d` is torch's, so is its backward; the passes of
    :func:`ecgot.kernels.conv1d_norm` are chosen one by one.

    Args:
        weight: [C_out, C_in / groups, K], or that shape.
        stride, dilation, groups: as in :func:`ecgot.kernels.conv1d`.
        dtype: of the activations.
        length: samples of the input; the nearest that was measured decides.

    >>> conv1d_backends((48, 48, 5), stride=2, dtype=torch.bfloat16)  # in no published encoder: by the rule
    {'forward': 'triton', 'input_gradient': 'torch', 'weight_gradient': 'triton'}
    >>> conv1d_backends((64, 64, 5), dtype=torch.float64)  # the kernels have no fp64
    {'forward': 'torch', 'input_gradient': 'torch', 'weight_gradient': 'torch'}
    """
    shape = torch.empty(tuple(weight.shape) if isinstance(weight, Tensor) else weight, device="meta")
    geometry = Geometry(stride, 0, dilation, groups)
    gpu = gpu_name(torch.device("cuda"))
    return {what: _choose(_layer(what, shape, geometry, dtype), length, gpu) for what in PASSES}


def modelled(what: str, c_in: int, c_out: int, k: int, stride: int, groups: int) -> str:
    """The rule for layers that are not in the table; c_in and c_out count the channels of all groups.

    A layer with C channels moves 2 C values and does C^2 k products per sample. From 256 channels on,
    most layers are compute-bound, where the vendor's library wins; its strided gradients in x are fast at any
    width.
    """
    if groups > 1:
        return "triton"
    if what == "input_gradient" and stride > 1:
        return "torch"
    return "torch" if min(c_in, c_out) >= WIDE and k > 1 else "triton"


def _layer(what: str, weight: Tensor, geometry: Geometry, dtype: torch.dtype) -> Layer:
    c_out, c_in, k = weight.shape
    name = str(dtype).removeprefix("torch.")
    return what, c_in * geometry.groups, c_out, k, geometry.stride, geometry.dilation, geometry.groups, name


def _choose(layer: Layer, length: int, gpu: str) -> str:
    what, c_in, c_out, k, stride, _dilation, groups, dtype = layer
    if dtype == "float64":
        return "torch"
    found = _measured().get((gpu, layer))
    if found is None:
        return modelled(what, c_in, c_out, k, stride, groups)
    _, nearest = min(found.items(), key=lambda row: max(row[0], length) / min(row[0], length))
    return nearest


@functools.cache
def _measured() -> dict[tuple[str, Layer], dict[int, str]]:
    """The backend by GPU and layer, and there by length; empty until it has been measured on a GPU."""
    path = resources.files("ecgot.kernels.conv") / "backends.csv"
    if not path.is_file():
        return {}
    columns = ("c_in", "c_out", "k", "stride", "dilation", "groups")
    rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
    found: dict[tuple[str, Layer], dict[int, str]] = {}
    for row in rows:
        c_in, c_out, k, stride, dilation, groups = (int(row[name]) for name in columns)
        layer = row["pass"], c_in, c_out, k, stride, dilation, groups, row["dtype"]
        found.setdefault((row["gpu"], layer), {})[int(row["length"])] = row["backend"]
    return found
