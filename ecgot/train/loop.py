"""The training loop of every stage: AdamW, schedules, averaged weights, and resuming."""

import copy
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ecgot.errors import EcgotError
from ecgot.runs.progress import Progress
from ecgot.runs.run import Run, _shape_error


def warm_up_and_decay(optimizer: Optimizer, total: int) -> LRScheduler:
    """The rates of :func:`rate_factor` over ``total`` steps."""
    return LambdaLR(optimizer, lambda step: rate_factor(step, total))


def train_epochs(
    run: Run,
    stage: str,
    model: nn.Module,
    groups: list[dict[str, Any]],
    *,
    epochs: int,
    steps: int,
    weight_decay: float,
    epoch: Callable[[int, Callable[[Tensor], None]], dict[str, float]],
    progress: Progress,
    average: float = 0.0,
    validate: Callable[[nn.Module], dict[str, float]] = lambda _model: {},
    schedule: Callable[[Optimizer, int], LRScheduler] = warm_up_and_decay,
    clip: float = 1.0,
) -> None:
    """Run ``epoch(number, step)`` to the last epoch, with AdamW, resuming where it stopped.

    ``model`` has the averaged weights in the end, where they are averaged.

    Args:
        groups: parameter groups with their top learning rate "lr".
        steps: optimizer steps of an epoch.
        epoch: trains one epoch, calling ``step(loss)`` for every batch, and returns its metrics.
        average: of an exponential average of the weights over steps, which is what is validated and saved.
        validate: metrics of the weights after an epoch.
        schedule: of the learning rates, given the optimizer and its number of steps.
        clip: the largest norm of a step's gradients.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
    rates = schedule(optimizer, epochs * steps)
    parameters = [p for group in groups for p in group["params"]]
    kept = copy.deepcopy(model).requires_grad_(False) if average else model
    done = 0

    def step(loss: Tensor) -> None:
        if not bool(torch.isfinite(loss)):
            # The stages of ecgot train have a section of settings; other training has a fixed rate.
            cure = f"; lower {stage}.learning_rate" if hasattr(run.config(), stage) else ""
            raise EcgotError(f"{stage}: the loss is {loss.item()}{cure}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        rates.step()
        nonlocal done
        done += 1
        if average:
            _average(
                kept, model, min(average, (1 + done) / (10 + done))
            )  # the first weights soon count little

    first = 0
    state = run.load_state(stage)
    if state is not None:
        try:
            model.load_state_dict(state["model"])
        except RuntimeError as error:  # names or shapes differ
            raise EcgotError(
                f"run: the state of stage {stage} in {run.folder} does not fit the configured model "
                f"({_shape_error(error)})"
            ) from error
        if average:
            kept.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        rates.load_state_dict(state["schedule"])
        first = state["epochs"]
        done = first * steps
        progress.note(f"{stage}: resuming after epoch {first}")
    for number in range(first, epochs):
        start = time.perf_counter()
        torch.manual_seed(run.config().seed * 100_003 + number)  # a resumed run draws what this one draws
        metrics = epoch(number, step) | validate(kept)
        metrics["seconds"] = time.perf_counter() - start
        metrics |= _peak_memory()
        run.log(stage, number + 1, metrics)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        progress.note(f"{stage}: epoch {number + 1}/{epochs}: {shown}")
        # The state first: weights without it would pass for a finished stage, wherever the run is cut off.
        run.save_state(
            stage,
            {
                "model": model.state_dict(),
                "average": kept.state_dict() if average else {},
                "optimizer": optimizer.state_dict(),
                "schedule": rates.state_dict(),
                "epochs": number + 1,
            },
        )
        run.save(stage, kept)
    if first == epochs:  # cut off between the last state and its weights
        run.save(stage, kept)
    if average:
        model.load_state_dict(kept.state_dict())
    run.finish(stage)


def parameter_groups(model: nn.Module, rate: Callable[[str], float]) -> list[dict[str, Any]]:
    """What of ``model`` is trained, each at the rate of its name; matrices and kernels alone decay."""
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((rate(name), parameter.dim() > 1), []).append(parameter)
    return [
        {"params": parameters, "lr": lr} | ({} if decays else {"weight_decay": 0.0})
        for (lr, decays), parameters in groups.items()
    ]


@torch.no_grad()
def _average(kept: nn.Module, model: nn.Module, decay: float) -> None:
    pairs = list(zip(kept.state_dict().values(), model.state_dict().values(), strict=True))
    floats = [(mean, now) for mean, now in pairs if mean.is_floating_point()]
    get_ema_multi_avg_fn(decay)([mean for mean, _ in floats], [now for _, now in floats], None)
    for mean, now in pairs:
        if not mean.is_floating_point():
            mean.copy_(now)


def _peak_memory() -> dict[str, float]:
    """Peak resident memory of the process so far, in GB, where the system tells it."""
    try:
        import resource
    except ImportError:  # Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9}


def rate_factor(step: int, total: int) -> float:
    """Learning rate of a step, as a share of the top rate: up in the first fifth, then down to 0 (cosine)."""
    warm_up = max(1, total // 5)
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return (1 + math.cos(math.pi * min(1.0, (step - warm_up) / max(1, total - warm_up)))) / 2
