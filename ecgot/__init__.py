"""ECG encoders aligned with language models by optimal transport.

The public names below load on first use, so that ``import ecgot`` and ``ecgot --help`` do not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ecgot.errors import EcgotError
from ecgot.version import __version__

if TYPE_CHECKING:
    from ecgot.data.dataset import load_dataset
    from ecgot.data.record import read_record
    from ecgot.inference.reader import EcgReader
    from ecgot.kernels.ot.convergence import SinkhornWarning
    from ecgot.kernels.ot.divergence import sinkhorn_divergence
    from ecgot.kernels.ot.loss import SinkhornLoss
    from ecgot.kernels.ot.outputs import SinkhornOutput
    from ecgot.kernels.ot.pairwise import sinkhorn_pairwise
    from ecgot.kernels.ot.sinkhorn import sinkhorn, sinkhorn_from_cost
    from ecgot.kernels.ot.varlen import sinkhorn_varlen
    from ecgot.models.encoders import encoder

__all__ = [
    "EcgReader",
    "EcgotError",
    "SinkhornLoss",
    "SinkhornOutput",
    "SinkhornWarning",
    "__version__",
    "encoder",
    "load_dataset",
    "read_record",
    "sinkhorn",
    "sinkhorn_divergence",
    "sinkhorn_from_cost",
    "sinkhorn_pairwise",
    "sinkhorn_varlen",
]
_HOME = {
    "SinkhornLoss": "ecgot.kernels",
    "SinkhornOutput": "ecgot.kernels",
    "SinkhornWarning": "ecgot.kernels",
    "encoder": "ecgot.models.encoders",
    "kernels": "ecgot.kernels",
    "load_dataset": "ecgot.data.dataset",
    "EcgReader": "ecgot.inference.reader",
    "read_record": "ecgot.data.record",
    "sinkhorn": "ecgot.kernels",
    "sinkhorn_divergence": "ecgot.kernels",
    "sinkhorn_from_cost": "ecgot.kernels",
    "sinkhorn_pairwise": "ecgot.kernels",
    "sinkhorn_varlen": "ecgot.kernels",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ecgot' has no attribute {name!r}")
    module = importlib.import_module(_HOME[name])
    value = module if name == "kernels" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
