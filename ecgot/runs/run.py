"""A run's folder: configuration, metrics, checkpoints, and the state from which training resumes.

config.json             the resolved configuration
metrics.jsonl           one line per epoch
align.safetensors       stage 1: encoder, projections, and the text encoder if it was trained
prompts.safetensors     the built-in prompts, embedded; only in folders made by ``ecgot export``
calibration.json        probabilities of findings, learned by ``ecgot calibrate``
report.safetensors      stage 2: projector, recorders and language model
language_model/         stage 2: its configuration and tokenizer
recorders.json          stage 2: the recorders it can condition on, if any
STAGE.resume.pt         optimizer and schedule after the last whole epoch; removed when the stage is done
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

from ecgot.choices import PACKAGED, STAGES
from ecgot.errors import EcgotError, first_line
from ecgot.files import save_tensors, write_atomically, write_text
from ecgot.runs.config import Config, differences, from_json

PRETRAINED = Path(__file__).resolve().parents[1] / "pretrained"  # the run that comes with the package


class Run:
    """The folder of one training run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def create(cls, folder: Path, config: Config, *, resume: bool) -> "Run":
        """Make the folder and write the configuration, or reopen it to resume.

        Settings of stage 2 may change until its training begins.

        Raises:
            EcgotError: the folder holds a run and ``resume`` is off, or the run has another configuration.
        """
        run, path = cls(folder), folder / "config.json"
        if path.exists():
            if not resume:
                raise EcgotError(
                    f"out: expected a new folder, got {folder}, which holds a run; --resume continues it"
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
        """Open an existing run.

        Raises:
            EcgotError: the folder holds no run.
        """
        if not (folder / "config.json").is_file():
            raise EcgotError(
                f"run: expected a folder that ecgot train made, got {folder}, which has no config.json"
            )
        return cls(folder)

    @classmethod
    def named(cls, name: str | Path) -> "Run":
        """The run "packaged", which comes with the package, or that of a folder.

        Raises:
            EcgotError: the folder holds no run.
        """
        return cls.open(PRETRAINED if str(name) == PACKAGED else Path(name))

    @property
    def name(self) -> str:
        """What :meth:`named` takes, from any working folder."""
        return PACKAGED if self.folder.resolve() == PRETRAINED else str(self.folder.resolve())

    @property
    def prompts(self) -> Path:
        """Path of the embedded prompts. If the file exists, using them needs no text encoder."""
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
        """The recorders that the stage-2 model can condition on.

        Raises:
            EcgotError: recorders.json is not a valid list of names.
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
        """Write recorders.json, or remove it if there are no names."""
        if not names:
            self._recorders.unlink(missing_ok=True)
        else:
            write_text(self._recorders, json.dumps(list(names), indent=2) + "\n")

    @property
    def _recorders(self) -> Path:
        return self.folder / "recorders.json"

    def log(self, stage: str, epoch: int, metrics: dict[str, float]) -> None:
        """Add one line to metrics.jsonl, replacing that of an interrupted run for the same epoch."""
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
        """Whether the stage has saved weights or a state to resume from."""
        return self._weights(stage).exists() or self._resume(stage).exists()

    def done(self, stage: str) -> bool:
        """Whether the stage has finished training."""
        return self._weights(stage).exists() and not self._resume(stage).exists()

    def save(self, stage: str, model: nn.Module) -> None:
        """Write the stage's weights, with the settings that they depend on."""
        shaping = json.dumps(_shaping(self.config(), stage))
        save_tensors(_distinct(model.state_dict()), self._weights(stage), {"ecgot": shaping})

    def load(self, stage: str, model: nn.Module) -> None:
        """Load the stage's weights into ``model``.

        Raises:
            EcgotError: there is no finished checkpoint, or it is damaged or of another configuration.
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
                f"run: expected weights of the configured model in {path}, got others ({shape_error(error)})"
            ) from error
        missing = [name for name in missing if name in _distinct(model.state_dict())]
        if missing or unexpected:
            name = [*missing, *unexpected][0]
            raise EcgotError(f"run: expected weights of the configured model in {path}, got others ({name})")

    def shape(self, stage: str, name: str) -> tuple[int, ...]:
        """The shape of a tensor in a stage's checkpoint.

        Raises:
            EcgotError: there is no finished checkpoint, or it is damaged.
        """
        path = self._trained(stage)
        with _named_if_damaged(path), safe_open(path, "pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def _trained(self, stage: str) -> Path:
        """The checkpoint of a stage that has finished training."""
        path = self._weights(stage)
        cure = f"train with --stage {stage}" if stage in STAGES else "train with ecgot supervise"
        if not path.exists():
            raise EcgotError(f"run: expected {path.name} in {self.folder}, got none; {cure} first")
        if not self.done(stage):
            raise EcgotError(
                f"run: expected stage {stage} of {self.folder} to be done, got an "
                "interrupted one; finish it with --resume first"
            )
        return path

    def save_state(self, stage: str, state: dict[str, Any]) -> None:
        """Save the state from which the stage resumes."""
        write_atomically(self._resume(stage), lambda temporary: torch.save(state, temporary))

    def load_state(self, stage: str) -> dict[str, Any] | None:
        """The state that was saved last; None if there is nothing to resume.

        Raises:
            EcgotError: the state is damaged.
        """
        path = self._resume(stage)
        if not path.exists():
            return None
        try:
            return torch.load(path, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            both = f"{path.name} and {self._weights(stage).name}"
            raise EcgotError(f"run: {path} is damaged; delete {both} to train the stage again") from error

    def finish(self, stage: str) -> None:
        """Mark the stage as done by removing its saved state."""
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
    """The settings that a checkpoint depends on."""
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
    """The state dict without repeated tensors (tied embeddings), which safetensors refuses."""
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    kept = {}
    for name, tensor in state.items():
        identity = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() == 0 or identity not in seen:
            kept[name] = tensor.contiguous()  # safetensors refuses other layouts, such as channels-last
            seen.add(identity)
    return kept


def shape_error(error: RuntimeError) -> str:
    """The last line of torch's error on loading a state dict, which names a mismatch."""
    return str(error).strip().splitlines()[-1].strip()
