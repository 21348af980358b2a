"""What the steps of an evaluation share: the request, the model and its prompts, and the encoded records."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ecgot.data.dataset import EcgDataset
from ecgot.runs.config import Config
from ecgot.runs.progress import Progress
from ecgot.runs.run import Run


@dataclass(frozen=True)
class EvaluationRequest:
    """What to evaluate, and how; see :func:`ecgot.eval.evaluate.evaluate` for the settings.

    Attributes:
        config: the run's own.
        root: folder of the data set.
        references: path of a CSV of reference reports; "" takes the report column.
        score: a resolved one, never None.
    """

    run: Run
    config: Config
    root: Path
    folds: tuple[int, ...]
    references: str
    score: str
    prompts: Path
    num_beams: int
    resamples: int
    cache_dir: Path
    progress: Progress


@dataclass(frozen=True)
class TrainSet:
    """Records of the training folds: n of them, with their pooled tokens [n, D]."""

    data: EcgDataset
    pooled: np.ndarray


@dataclass(frozen=True)
class EvalSet:
    """Records to evaluate: n of them, with tokens [n, N, D], mask [n, N] and pooled tokens [n, D]."""

    data: EcgDataset
    tokens: Tensor
    mask: Tensor
    pooled: np.ndarray


def rows_with_text(reports: Sequence[str]) -> Tensor:
    """Indices of the reports that are not empty."""
    return torch.tensor([row for row, report in enumerate(reports) if report], dtype=torch.long)
