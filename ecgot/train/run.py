"""A run's folder: configuration, metrics, checkpoints, and the state from which training resumes.

config.json             the resolved configuration
metrics.jsonl           one line an epoch
align.safetensors       stage 1: encoder, projections, and the text encoder where it was trained
prompts.safetensors     the built-in prompts, embedded; only where ``ecgot export`` made the folder
report.safetensors      stage 2: projector, recorders and language model
language_model/         stage 2: its configuration and tokenizer
recorders.json          stage 2: the recorders that it can be told, where there are any
STAGE.resume.pt         optimizer and schedule after the last whole epoch; gone when the stage is done
"""

import copy
import json
import math
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ecgot.errors import EcgotError, first_line
from ecgot.files import save_tensors, write_atomically, write_text
from ecgot.train.config import Config, differences, from_json


@dataclass
class Progress:
    """How training reports itself; the command line draws it, a library user may ignore it."""

    bar: Callable[[str, int, int], None] = lambda _task, _done, _total: None
    note: Callable[[str], None] = lambda _line: None


PRETRAINED = Path(__file__).parents[1] / "pretrained"  # the run that comes with the package


class Run:
    """The folder of one training run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, folder: Path, config: Config, *, resume: bool) -> "Run":
        """Make the folder and write the configuration, or open it again to resume.

        A stage that has not begun may get other settings: those of stage 2 may change until it is trained.

        Raises:
            EcgotError: it already holds a run and ``resume`` is off, or the run has another configuration.
        """
        run, path = cls(folder), folder / "config.json"
        if path.exists():
            if not resume:
                raise EcgotError(f"out: {folder} already holds a run; name another folder, or add --resume")
            changed = differences(run.config(), config)
            fixed = [line for line in changed if run.begun("report") or not line.startswith("report.")]
            if fixed:
                raise EcgotError(f"out: {folder} was trained with another configuration ({fixed[0]})")
            if changed:
                write_text(path, config.to_json())
            return run
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise EcgotError(f"out: {folder} exists and is not an empty folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, config.to_json())
        return run

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """An existing run.

        Raises:
            EcgotError: the folder holds none.
        """
        if not (folder / "config.json").is_file():
            raise EcgotError(
                f"run: {folder} holds no config.json, accepted is a folder that ecgot train made"
            )
        return cls(folder)

    @property
    def prompts(self) -> Path:
        """Of the embedded prompts, where there are any: then no text encoder is needed to use them."""
        return self.folder / "prompts.safetensors"

    def config(self) -> Config:
        path = self.folder / "config.json"
        try:
            return from_json(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise EcgotError(f"run: {path} is not valid JSON ({error})") from error

    @property
    def recorders(self) -> tuple[str, ...]:
        """The recorders that the stage-2 model can be told.

        Raises:
            EcgotError: recorders.json does not hold names.
        """
        path = self._recorders
        try:
            names = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        except (ValueError, RecursionError) as error:
            raise EcgotError(f"run: {path} is not valid JSON ({first_line(error)})") from error
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise EcgotError(f"run: {path} holds {str(names)[:40]!r}, accepted is a list of names")
        if len(set(names)) < len(names) or any(not name or name != " ".join(name.split()) for name in names):
            raise EcgotError(
                f"run: {path} holds {str(names)[:40]!r}, accepted are different names with single spaces"
            )
        return tuple(names)

    def save_recorders(self, names: Sequence[str]) -> None:
        """Write recorders.json; for no names there is none."""
        if not names:
            self._recorders.unlink(missing_ok=True)
        else:
            write_text(self._recorders, json.dumps(list(names), indent=2) + "\n")

    @property
    def _recorders(self) -> Path:
        return self.folder / "recorders.json"

    def log(self, stage: str, epoch: int, metrics: dict[str, float]) -> None:
        """Add one line to metrics.jsonl, in place of what a cut-off run may have said of the same epoch."""
        line = {"stage": stage, "epoch": epoch} | {key: round(value, 6) for key, value in metrics.items()}
        kept = [old for old in self.metrics() if (old["stage"], old["epoch"]) != (stage, epoch)]
        text = "".join(json.dumps(each) + "\n" for each in (*kept, line))
        write_text(self.folder / "metrics.jsonl", text)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def begun(self, stage: str) -> bool:
        """Whether the stage has left weights or a state."""
        return self._weights(stage).exists() or self._resume(stage).exists()

    def done(self, stage: str) -> bool:
        """Whether the stage has been trained to its end."""
        return self._weights(stage).exists() and not self._resume(stage).exists()

    def save(self, stage: str, model: nn.Module) -> None:
        shaping = json.dumps(_shaping(self.config(), stage))
        save_tensors(_distinct(model.state_dict()), self._weights(stage), {"ecgot": shaping})

    def load(self, stage: str, model: nn.Module) -> None:
        """Fill ``model`` with the stage's weights.

        Raises:
            EcgotError: there is no checkpoint, it is damaged, or belongs to another configuration.
        """
        path = self._trained(stage)
        with _named_if_damaged(path):
            with safe_open(path, "pt") as file:
                saved = json.loads((file.metadata() or {}).get("ecgot", "{}"))
            weights = load_file(path)
        for name, value in _shaping(self.config(), stage).items():
            if saved.get(name) != value:
                raise EcgotError(
                    f"run: {path} is a checkpoint of another configuration "
                    f"({name}: {saved.get(name)} against {value})"
                )
        try:
            missing, unexpected = model.load_state_dict(weights, strict=False)
        except RuntimeError as error:  # shapes differ
            raise EcgotError(
                f"run: {path} does not fit the configured model ({_shape_error(error)})"
            ) from error
        missing = [name for name in missing if name in _distinct(model.state_dict())]
        if missing or unexpected:
            raise EcgotError(f"run: {path} does not fit the configured model ({[*missing, *unexpected][0]})")

    def shape(self, stage: str, name: str) -> tuple[int, ...]:
        """Of a tensor of a stage's checkpoint.

        Raises:
            EcgotError: there is no checkpoint, or it is damaged.
        """
        path = self._trained(stage)
        with _named_if_damaged(path), safe_open(path, "pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def _trained(self, stage: str) -> Path:
        """The checkpoint of a stage that has been trained to its end."""
        path = self._weights(stage)
        if not path.exists():
            raise EcgotError(f"run: {self.folder} holds no {path.name}; train with --stage {stage} first")
        if not self.done(stage):
            raise EcgotError(
                f"run: stage {stage} of {self.folder} was interrupted; go on with --resume first"
            )
        return path

    def save_state(self, stage: str, state: dict[str, Any]) -> None:
        write_atomically(self._resume(stage), lambda temporary: torch.save(state, temporary))

    def load_state(self, stage: str) -> dict[str, Any] | None:
        path = self._resume(stage)
        if not path.exists():
            return None
        try:
            return torch.load(path, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            both = f"{path.name} and {self._weights(stage).name}"
            raise EcgotError(f"run: {path} is damaged; delete {both} to train the stage anew") from error

    def finish(self, stage: str) -> None:
        self._resume(stage).unlink(missing_ok=True)

    def _weights(self, stage: str) -> Path:
        return self.folder / f"{stage}.safetensors"

    def _resume(self, stage: str) -> Path:
        return self.folder / f"{stage}.resume.pt"


@contextmanager
def _named_if_damaged(path: Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise EcgotError(f"run: {path} is damaged ({first_line(error)})") from error


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


def check_cuda_graph(config: Config) -> None:
    """That CUDA graphs are asked for on a CUDA device alone.

    Raises:
        EcgotError: they are asked for on another.
    """
    device = choose_device(config.device)
    if config.cuda_graph and device.type != "cuda":
        raise EcgotError(f"cuda_graph: got true on device {device.type!r}, accepted is false there")


def choose_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EcgotError(f"device: got {name!r}, which this machine cannot use") from error
    return device


def _shaping(config: Config, stage: str) -> dict[str, Any]:
    """The settings that a checkpoint was made for and must be used with."""
    flat = {
        f"{section}.{key}": value
        for section, values in asdict(config).items()
        if isinstance(values, dict)
        for key, value in values.items()
    }
    names = ["encoder.name", "data.leads", "data.fs_hz", "data.seconds"]
    names += {
        "align": ["text.name", "text.train", "text.max_tokens", "align.width"],
        "report": ["report.language_model"],
        "supervised": [],
    }[stage]
    return {name: list(flat[name]) if isinstance(flat[name], tuple) else flat[name] for name in names}


def _distinct(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without second names of one tensor (tied embeddings), which safetensors refuses."""
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    kept = {}
    for name, tensor in state.items():
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or identity not in seen:
            kept[name] = tensor.contiguous()  # safetensors refuses others, such as channels-last weights
            seen.add(identity)
    return kept


def _shape_error(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[-1].strip()
