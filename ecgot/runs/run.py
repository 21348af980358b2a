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

import json
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ecgot.errors import EcgotError, first_line
from ecgot.files import save_tensors, write_atomically, write_text
from ecgot.runs.config import Config, differences, from_json

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
                raise EcgotError(
                    f"out: expected a new folder, got {folder}, which holds a run; --resume goes on with it"
                )
            changed = differences(run.config(), config)
            fixed = [line for line in changed if run.begun("report") or not line.startswith("report.")]
            if fixed:
                raise EcgotError(f"out: expected the configuration of {folder}, got another ({fixed[0]})")
            if changed:
                write_text(path, config.to_json())
            return run
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise EcgotError(f"out: expected a new or empty folder, got {folder}")
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
                f"run: expected a folder that ecgot train made, got {folder}, which has no config.json"
            )
        return cls(folder)

    @property
    def prompts(self) -> Path:
        """Of the embedded prompts, where there are any: then no text encoder is needed to use them."""
        return self.folder / "prompts.safetensors"

    def config(self) -> Config:
        """The configuration in config.json.

        Raises:
            EcgotError: it is not valid.
        """
        path = self.folder / "config.json"
        try:
            return from_json(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise EcgotError(f"run: expected valid JSON in {path}, got something else ({error})") from error

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
            raise EcgotError(
                f"run: expected valid JSON in {path}, got something else ({first_line(error)})"
            ) from error
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise EcgotError(f"run: expected a list of names in {path}, got {str(names)[:40]!r}")
        if len(set(names)) < len(names) or any(not name or name != " ".join(name.split()) for name in names):
            raise EcgotError(
                f"run: expected different names with single spaces in {path}, got {str(names)[:40]!r}"
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
        """Write the stage's weights, with the settings that they belong to."""
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
                    f"run: expected {path} to be of this configuration, got another configuration "
                    f"({name}: {saved.get(name)} against {value})"
                )
        try:
            missing, unexpected = model.load_state_dict(weights, strict=False)
        except RuntimeError as error:  # shapes differ
            raise EcgotError(
                f"run: {path} does not fit the configured model ({shape_error(error)})"
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
            raise EcgotError(
                f"run: expected {path.name} in {self.folder}, got none; train with --stage {stage} first"
            )
        if not self.done(stage):
            raise EcgotError(
                f"run: expected stage {stage} of {self.folder} to be done, got an "
                "interrupted one; go on with --resume first"
            )
        return path

    def save_state(self, stage: str, state: dict[str, Any]) -> None:
        """Write what the stage resumes from."""
        write_atomically(self._resume(stage), lambda temporary: torch.save(state, temporary))

    def load_state(self, stage: str) -> dict[str, Any] | None:
        """What :meth:`save_state` wrote last; None if there is nothing to resume.

        Raises:
            EcgotError: it is damaged.
        """
        path = self._resume(stage)
        if not path.exists():
            return None
        try:
            return torch.load(path, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            both = f"{path.name} and {self._weights(stage).name}"
            raise EcgotError(f"run: {path} is damaged; delete {both} to train the stage anew") from error

    def finish(self, stage: str) -> None:
        """Mark the stage as done: there is nothing left to resume."""
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


def shape_error(error: RuntimeError) -> str:
    """The line of torch's error on loading a state dict that names the first mismatch."""
    return str(error).strip().splitlines()[-1].strip()
