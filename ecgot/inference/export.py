"""Export a run as one folder that needs no text encoder, to publish or to hand on."""

import json
import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file

from ecgot.choices import GROUPS
from ecgot.errors import EcgotError
from ecgot.files import atomic_folder, save_tensors, write_text
from ecgot.inference.calibration import FILE as CALIBRATION
from ecgot.inference.display import auroc_text, metric_text
from ecgot.inference.zeroshot import model_and_prompts, save_prompts
from ecgot.runs.checkpoints import load_reporter
from ecgot.runs.config import DataConfig
from ecgot.runs.run import Run
from ecgot.version import __version__

CARD = Path(__file__).with_name("model_card.md")
UNKNOWN = "A data set in PTB-XL's layout"
PLAIN = " Both stages learned from the original reports{others}, put into plain English by a glossary."
OTHERS = " or, for records without one, from the texts of {name}"


def export(run: Run, out: Path, *, trained_on: str = UNKNOWN) -> None:
    """Write the run's configuration, weights, embedded built-in prompts and a model card to a new folder.

    Args:
        run: stage 1 trained, stage 2 optionally.
        out: must not exist yet.
        trained_on: name, source and licence of the data, for the card.

    Raises:
        EcgotError: the run is not trained, it trained its own text encoder, its language model has adapters,
            or ``out`` exists.
    """
    config = run.config()
    if config.text.train:
        raise EcgotError(
            "run: expected one with a frozen text encoder, got one that trained its own (text.train=true)"
        )
    if config.report.lora_rank and run.done("report"):
        raise EcgotError(
            "run: expected one with all its weights, got one with adapters alone, without their language "
            f"model {config.report.language_model!r} (report.lora_rank={config.report.lora_rank})"
        )
    if out.exists():
        raise EcgotError(f"out: expected a new folder, got {out}, which exists")
    model, prompts = model_and_prompts(run)
    if run.done("report"):
        load_reporter(run, model.ecg_width)  # fails here if it is damaged
    with atomic_folder(out) as folder:
        made = Run(folder)
        write_text(made.folder / "config.json", _without_paths(run))
        for stage in ("align", "report"):
            if run.done(stage):
                _copy_weights(run.folder / f"{stage}.safetensors", made.folder / f"{stage}.safetensors")
        if run.done("report"):
            shutil.copytree(run.folder / "language_model", made.folder / "language_model")
            made.save_recorders(run.recorders)
        save_prompts(prompts, made.prompts)
        if (run.folder / CALIBRATION).exists():  # it holds for the same weights and prompts
            shutil.copy(run.folder / CALIBRATION, made.folder / CALIBRATION)
        write_text(made.folder / "README.md", model_card(run, trained_on))


def model_card(run: Run, trained_on: str = UNKNOWN) -> str:
    """The model card of a run in Markdown, with the metrics of its ``evaluation.json``."""
    config = run.config()
    path = run.folder / "evaluation.json"
    return CARD.read_text(encoding="utf-8").format(
        version=__version__,
        seconds=config.data.seconds,
        fs_hz=config.data.fs_hz,
        leads=", ".join(config.data.leads),
        groups=", ".join(GROUPS),
        trained_on=trained_on,
        statements=_texts(config.data),
        no_report=_recorders(run.recorders) if run.done("report") else " (not in this model)",
        train_folds=_folds(config.data.train_folds),
        validation_folds=_folds(config.data.validation_folds),
        encoder=config.encoder.name,
        text=config.text.name,
        metrics=_metrics(path) if path.exists() else "Not yet.",
    )


def _texts(data: DataConfig) -> str:
    """Which reports the model learned from, if they were put into plain English."""
    if not data.plain_english:
        return ""
    return PLAIN.format(others=OTHERS.format(name=Path(data.reports_csv).name) if data.reports_csv else "")


def _recorders(recorders: tuple[str, ...]) -> str:
    if not recorders:
        return ""
    return (
        f" (in the wording of a given ECG recorder, which is style and not evidence: {', '.join(recorders)})"
    )


def _folds(folds: tuple[int, ...]) -> str:
    return ", ".join(map(str, folds))


def _metrics(path: Path) -> str:
    """Tables of an ``evaluation.json``.

    Raises:
        EcgotError: the file is damaged or was written by another version.
    """
    try:
        return _tables(json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise EcgotError(
            f"run: {path} cannot be read ({error!r}); write it again by ecgot evaluate"
        ) from error


def _tables(evaluation: dict) -> str:
    settings = evaluation["settings"]
    same = settings["data"] == settings["config"]["data"]["root"]
    of_these = "" if same else " of a data set that the model was not trained on"
    lines = [
        f"Fold {_folds(tuple(evaluation['folds']))}{of_these}, {evaluation['records']} records; "
        f"zero-shot by the {evaluation['score']} score; reports by a search of {settings['num_beams']} "
        f"beams, against the references of {Path(settings['references']).name}; brackets are 95 % "
        "intervals (bootstrap over patients).",
        "",
        "| macro AUROC | zero-shot | linear probe |",
        "| --- | --- | --- |",
    ]
    for group, result in evaluation["zero_shot"].items():
        probe = evaluation["probe"].get(group)
        lines.append(f"| {group} | {auroc_text(result)} | {auroc_text(probe)} |")
    if evaluation["reports"]:
        names = list(next(iter(evaluation["reports"].values())))
        lines += ["", "| reports | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
        for system, values in evaluation["reports"].items():
            lines.append(f"| {system} | " + " | ".join(metric_text(values[name]) for name in names) + " |")
    return "\n".join(lines)


def _without_paths(run: Run) -> str:
    """The configuration without paths and devices of the machine that trained it."""
    values = json.loads(run.config().to_json())
    values["data"] |= {"root": "", "reports_csv": ""}
    return json.dumps(values | {"start": "", "device": "auto", "cuda_graph": False}, indent=2) + "\n"


def _copy_weights(source: Path, target: Path) -> None:
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    save_tensors(load_file(source), target, metadata)
