"""The training loop of all stages: AdamW, learning rate schedules, averaged weights, and resuming."""

import copy
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ecgot.errors import EcgotError
from ecgot.runs.progress import Progress
from ecgot.runs.run import Run, shape_error
from ecgot.train.batches import epoch_seed


def warm_up_and_decay(optimizer: Optimizer, total: int) -> LRScheduler:
    """Learning rates scaled by :func:`rate_factor` over ``total`` steps."""
    return LambdaLR(optimizer, lambda step: rate_factor(step, total))


@dataclass(frozen=True)
class Schedule:
    """Length and learning rates of a stage's training.

    Attributes:
        epochs: number of epochs.
        steps: optimizer steps per epoch.
        weight_decay: AdamW's, for parameter groups that do not set their own.
        average: decay per step of an exponential moving average of the weights; 0: no average.
        rates: makes the learning rate schedule from the optimizer and the total number of steps.
        clip: maximum gradient norm.
    """

    epochs: int
    steps: int
    weight_decay: float
    average: float = 0.0
    rates: Callable[[Optimizer, int], LRScheduler] = warm_up_and_decay
    clip: float = 1.0


def train_epochs(
    run: Run,
    stage: str,
    model: nn.Module,
    groups: list[dict[str, Any]],
    schedule: Schedule,
    *,
    epoch: Callable[[int, Callable[[Tensor], None]], dict[str, float]],
    validate: Callable[[nn.Module], dict[str, float]] = lambda _model: {},
    progress: Progress,
) -> None:
    """Train ``model`` with AdamW to the last epoch, resuming after the last epoch saved in ``run``.

    If the schedule averages the weights, their average is what is validated, saved, and finally left in
    ``model``.

    Args:
        groups: parameter groups, each with its peak learning rate "lr".
        epoch: ``epoch(number, step)`` trains one epoch, calls ``step(loss)`` for every batch, and returns its
            metrics.
        validate: returns metrics of the weights after an epoch.
    """
    training = _Training(run, stage, model, groups, schedule)
    first = training.resume()
    if first:
        progress.note(f"{stage}: resuming after epoch {first}")
    for number in range(first, schedule.epochs):
        start = time.perf_counter()
        torch.manual_seed(epoch_seed(run.config().seed, number))
        metrics = epoch(number, training.step) | validate(training.kept)
        metrics["seconds"] = time.perf_counter() - start
        metrics |= _peak_memory()
        run.log(stage, number + 1, metrics)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        progress.note(f"{stage}: epoch {number + 1}/{schedule.epochs}: {shown}")
        # Save the state first: a stage with weights but no state counts as finished.
        training.save_state(number + 1)
        run.save(stage, training.kept)
    if first == schedule.epochs:  # interrupted between the last state and its weights
        run.save(stage, training.kept)
    if schedule.average:
        model.load_state_dict(training.kept.state_dict())
    run.finish(stage)


class _Training:
    """The state that each step updates: weights, their average, optimizer and learning rates.

    Attributes:
        kept: the model with averaged weights, or the model itself if they are not averaged.
    """

    def __init__(
        self, run: Run, stage: str, model: nn.Module, groups: list[dict[str, Any]], schedule: Schedule
    ) -> None:
        self.run, self.stage, self.model, self.schedule = run, stage, model, schedule
        self.optimizer = torch.optim.AdamW(groups, weight_decay=schedule.weight_decay, fused=True)
        self.rates = schedule.rates(self.optimizer, schedule.epochs * schedule.steps)
        self.parameters = [p for group in groups for p in group["params"]]
        self.kept = copy.deepcopy(model).requires_grad_(False) if schedule.average else model
        self.done = 0  # steps

    def step(self, loss: Tensor) -> None:
        """One optimizer step.

        Raises:
            EcgotError: the loss is not finite.
        """
        if not bool(torch.isfinite(loss)):
            # Only the stages of ecgot train have a setting for the learning rate.
            cure = f"; lower {self.stage}.learning_rate" if hasattr(self.run.config(), self.stage) else ""
            raise EcgotError(f"{self.stage}: expected a finite loss, got {loss.item()}{cure}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.schedule.clip)
        self.optimizer.step()
        self.rates.step()
        self.done += 1
        if self.schedule.average:
            # A shorter memory at first, so that the initial weights fade quickly.
            decay = min(self.schedule.average, (1 + self.done) / (10 + self.done))
            update_average(self.kept, self.model, decay)

    def save_state(self, epochs: int) -> None:
        """Save what :meth:`resume` needs after ``epochs`` whole epochs."""
        state = {
            "model": self.model.state_dict(),
            "average": self.kept.state_dict() if self.schedule.average else {},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.rates.state_dict(),
            "epochs": epochs,
        }
        self.run.save_state(self.stage, state)

    def resume(self) -> int:
        """Load the saved state, if any, and return the number of epochs already trained.

        Raises:
            EcgotError: the state is damaged or belongs to another model.
        """
        state = self.run.load_state(self.stage)
        if state is None:
            return 0
        try:
            self.model.load_state_dict(state["model"])
        except RuntimeError as error:  # names or shapes differ
            raise EcgotError(
                f"run: expected a state of stage {self.stage} in {self.run.folder} that fits the configured "
                f"model, got another ({shape_error(error)})"
            ) from error
        if self.schedule.average:
            self.kept.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._check_moments()
        self.rates.load_state_dict(state["schedule"])
        self.done = state["epochs"] * self.schedule.steps
        return state["epochs"]

    def _check_moments(self) -> None:
        """Raise EcgotError if the optimizer's state is of other parameters, which no fused step would see."""
        for parameter, moments in self.optimizer.state.items():
            shapes = {value.shape for value in moments.values() if value.dim()}
            if shapes - {parameter.shape}:
                raise EcgotError(
                    f"run: expected a state of stage {self.stage} in {self.run.folder} that fits the "
                    f"configured model, got an optimizer of other parameters ({tuple(parameter.shape)})"
                )


def parameter_groups(model: nn.Module, rate: Callable[[str], float]) -> list[dict[str, Any]]:
    """Trainable parameters grouped by learning rate, which ``rate`` gives by name.

    Weight decay applies only to matrices and kernels. The order is that of the names: a saved optimizer
    knows its parameters by number alone, and a model built another way may list them in another order.
    """
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, parameter in sorted(model.named_parameters(), key=lambda each: each[0]):
        if parameter.requires_grad:
            groups.setdefault((rate(name), parameter.dim() > 1), []).append(parameter)
    return [
        {"params": parameters, "lr": lr} | ({} if decays else {"weight_decay": 0.0})
        for (lr, decays), parameters in groups.items()
    ]


@torch.no_grad()
def update_average(kept: nn.Module, model: nn.Module, decay: float) -> None:
    """Move ``kept`` towards ``model`` by ``1 - decay``; integer buffers, such as batch counts, are copied."""
    pairs = list(zip(kept.state_dict().values(), model.state_dict().values(), strict=True))
    floats = [(mean, now) for mean, now in pairs if mean.is_floating_point()]
    get_ema_multi_avg_fn(decay)([mean for mean, _ in floats], [now for _, now in floats], None)
    for mean, now in pairs:
        if not mean.is_floating_point():
            mean.copy_(now)


def _peak_memory() -> dict[str, float]:
    """Peak resident memory of the process so far in GB, on systems that report it."""
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}


def rate_factor(step: int, total: int) -> float:
    """Fraction of the peak learning rate: linear warm-up for a fifth of the steps, cosine decay to 0."""
    warm_up = max(1, total // 5)
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, total - warm_up)))) / 2
