"""The command line: synth, train, supervise, evaluate, calibrate, report, classify, formats, export, bench.

Commands import what they run when they run it, so that ``ecgot --help`` does not wait for torch.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ecgot.choices import (
    ALL,
    BEAMS,
    EVALUATION_FOLDS,
    FINE_TUNED_EPOCHS,
    FINE_TUNED_GROUP,
    GROUPS,
    PACKAGED,
    RESAMPLES,
    SCORES,
    STAGES,
    SUPERVISED_ENCODER,
    SUPERVISED_EPOCHS,
    SUPERVISED_GROUP,
)
from ecgot.cli.tables import (
    print_benchmark,
    print_evaluation,
    print_formats,
    print_reading,
    print_scores,
    print_supervised,
)
from ecgot.cli.terminal import progress, run_command
from ecgot.errors import EcgotError
from ecgot.inference.display import NOTICE
from ecgot.version import __version__

PATH = click.Path(path_type=Path)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
cache_option = click.option(
    "--cache",
    type=PATH,
    help="Folder of cached signals and embeddings (default: $ECGOT_CACHE or ~/.cache/ecgot).",
)
score_option = click.option(
    "--score",
    type=click.Choice(SCORES),
    help="Score of a class (default: phrase if the run has learned phrases, else cosine).",
)
prompts_option = click.option(
    "--prompts", type=PATH, help="TOML file of prompts to use instead of the built-in ones."
)
num_beams_option = click.option(
    "--num-beams", type=click.IntRange(min=1), default=BEAMS, show_default=True, help="1: greedy."
)
folds_option = click.option(
    "--folds",
    default=",".join(map(str, EVALUATION_FOLDS)),
    show_default=True,
    help="Folds to evaluate, such as 9 or 9,10.",
)
resamples_option = click.option(
    "--resamples",
    type=click.IntRange(min=1),
    default=RESAMPLES,
    show_default=True,
    help="Bootstrap resamples of patients.",
)
start_option = click.option(
    "--start", "start_s", type=click.FloatRange(min=0), default=0.0, help="Read from this second on."
)
window_option = click.option(
    "--window", "window_s", type=float, help="Read this many seconds (default: all)."
)
fs_option = click.option(
    "--fs-hz", type=float, help="Sampling rate, of a file that does not say (.npy, .csv)."
)
leads_option = click.option("--leads", help="Names such as I,II,V1, of a file that does not say (.npy).")
force_option = click.option("--force", is_flag=True, help="Say something even of what is no usable ECG.")
intervals_option = click.option("--intervals", is_flag=True, help="Print 95 % intervals too.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=NOTICE)
@click.version_option(__version__, package_name="ecgot")
def cli() -> None:
    """Teach language models to read electrocardiograms, aligned by optimal transport.

    synth makes a data set, train trains on one, supervise trains a baseline on its labels, evaluate
    measures a trained run, calibrate gives it probabilities, report and classify read ECGs, formats lists the
    files that can be read, export makes a run portable, bench times the transport solver.
    """


@cli.command()
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of torch (default: torch's).")
@json_option
def bench(threads: int | None, as_json: bool) -> None:
    """Time the transport solver against torch, POT and geomloss, where installed, at equal marginal error.

    On a GPU also against a compiled loop in a CUDA graph and flash-sinkhorn.
    Each provider's result is checked against fp64 first. The whole suite is ``pytest benchmarks/``.
    """
    import torch

    from ecgot.bench.apart import compare
    from ecgot.bench.cases import CPU_PAIRS, SHORT
    from ecgot.bench.origin import origin

    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measured_on, rows = origin(), []
    with progress(quiet=as_json) as shown:
        for number, case in enumerate(SHORT):
            shown.bar("bench", number, len(SHORT) + 1)
            rows += compare(case, device)
        shown.bar("bench", len(SHORT), len(SHORT) + 1)
        rows += compare(CPU_PAIRS, device)
        shown.bar("bench", len(SHORT) + 1, len(SHORT) + 1)
    if as_json:
        _print_json({"origin": measured_on, "rows": [row.as_row() for row in rows]})
    else:
        print_benchmark(Console(), rows, measured_on)


@cli.command()
@click.argument("out", type=PATH)
@click.option("--records", type=click.IntRange(min=1), default=1000, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@json_option
def synth(out: Path, records: int, seed: int, as_json: bool) -> None:
    """Write a synthetic data set to OUT: WFDB files in PTB-XL's layout, ten folds."""
    from ecgot.data.synth import write_dataset

    with progress(quiet=as_json) as shown:
        write_dataset(
            out, records=records, seed=seed, progress=lambda done, total: shown.bar("synth", done, total)
        )
    if as_json:
        _print_json({"out": str(out), "records": records, "seed": seed})
    else:
        click.echo(f"{records} synthetic records in {out}")


@cli.command()
@click.option("--data", type=PATH, help="Data set in PTB-XL's layout (sets data.root).")
@click.option(
    "--reports",
    type=PATH,
    help="CSV ecg_id,report of English reports: for records whose report column is empty and, with "
    "data.plain_english=false, for all.",
)
@click.option("--out", type=PATH, required=True, help="Folder of the run.")
@click.option(
    "--from",
    "start",
    metavar="RUN",
    help=f"Go on from the weights of this run, or of the model that comes with the package ({PACKAGED!r}).",
)
@click.option("--config", type=PATH, help="TOML or JSON file with settings, as config.json of a run.")
@click.option(
    "--stage",
    type=click.Choice(["all", *STAGES]),
    default="all",
    show_default=True,
    help="align: stage 1. report: stage 2, after align.",
)
@click.option("--resume", is_flag=True, help="Continue a run that was interrupted.")
@cache_option
@json_option
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
def train(
    data: Path | None,
    reports: Path | None,
    out: Path,
    start: str | None,
    config: Path | None,
    stage: str,
    resume: bool,
    cache: Path | None,
    as_json: bool,
    settings: tuple[str, ...],
) -> None:
    """Train a run: align ECGs with reports (stage 1), then learn to write reports (stage 2).

    KEY=VALUE overrides a setting, such as align.epochs=3 or encoder.name=resnet1d. The resolved
    configuration, metrics.jsonl and safetensors checkpoints go to the run's folder. With --from, both stages
    fine-tune another run in its own settings, with fewer epochs and smaller learning rates. With --resume or
    --stage report, what is not given here is as in the run.
    """
    from ecgot.runs.config import fine_tuning, resolve
    from ecgot.runs.run import Run
    from ecgot.train.stages import train as train_stages

    # Absolute paths, so that the run's configuration means the same from any folder.
    paths = [f"data.root={data.resolve()}"] if data else []
    paths += [f"data.reports_csv={reports.resolve()}"] if reports else []
    begun = (resume or stage == "report") and (out / "config.json").is_file()
    base = Run.open(out).config() if begun else None
    if start is not None:
        origin = Run.named(start)
        paths += [f"start={origin.name}"]
        base = base or fine_tuning(origin.config(), origin.name)
    resolved = resolve(config, (*paths, *settings), base=base)
    if not resolved.data.root:
        raise EcgotError("data: expected the data set's folder by --data, got none")
    with progress(quiet=as_json) as shown:
        trained = train_stages(
            resolved,
            out,
            stages=STAGES if stage == "all" else (stage,),
            resume=resume,
            cache_dir=cache,
            progress=shown,
        )
    if as_json:
        _print_json({"run": str(out), "metrics": trained.metrics()})
    else:
        click.echo(f"trained into {out}")


@cli.command()
@click.option("--data", type=PATH, required=True, help="Data set in PTB-XL's layout.")
@click.option("--out", type=PATH, required=True, help="Folder of the run.")
@click.option("--encoder", help=f"Encoder to train from scratch (default: {SUPERVISED_ENCODER}).")
@click.option(
    "--from",
    "start",
    metavar="RUN",
    help="Fine-tune the aligned encoder of this run, or of the model that comes with the package "
    f"({PACKAGED!r}).",
)
@click.option(
    "--group",
    type=click.Choice([*GROUPS, ALL]),
    help=f"Label group, or all (default: {SUPERVISED_GROUP}; with --from {FINE_TUNED_GROUP}).",
)
@click.option(
    "--labels",
    "labels_csv",
    type=PATH,
    help="CSV of yes/no labels to learn in place of a group: ecg_id (or record, a path), and per label a "
    "column of 1, 0, or nothing where it is unknown.",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    help=f"Default: {SUPERVISED_EPOCHS}; with --from {FINE_TUNED_EPOCHS}, or more where records are few.",
)
@click.option("--seed", type=click.IntRange(min=0), help="Default: 0.")
@folds_option
@resamples_option
@intervals_option
@click.option(
    "--resume",
    is_flag=True,
    help="Continue an interrupted training, or evaluate a finished one, in its own settings.",
)
@cache_option
@json_option
def supervise(
    data: Path,
    out: Path,
    encoder: str | None,
    start: str | None,
    group: str | None,
    labels_csv: Path | None,
    epochs: int | None,
    seed: int | None,
    folds: str,
    resamples: int,
    intervals: bool,
    resume: bool,
    cache: Path | None,
    as_json: bool,
) -> None:
    """Train an encoder on labels, PTB-XL's or your own, and measure it.

    From scratch by the protocol of the PTB-XL benchmark, or from the aligned encoder of a run. The weights
    of the last epoch are measured; evaluation.json goes to the run's folder. Of your own --labels every 1
    and 0 counts; of PTB-XL's, as in the benchmark, only records with a label in the group.
    """
    from ecgot.eval.supervise import supervise as train_supervised
    from ecgot.runs.config import parse_folds
    from ecgot.runs.run import Run

    with progress(quiet=as_json) as shown:
        evaluation = train_supervised(
            data,
            out,
            encoder_name=encoder,
            start=None if start is None else Run.named(start),
            group=group,
            labels_csv=labels_csv,
            epochs=epochs,
            seed=seed,
            folds=parse_folds(folds),
            resamples=resamples,
            resume=resume,
            cache_dir=cache,
            progress=shown,
        )
    result = evaluation.to_dict()
    if as_json:
        _print_json(result | {"notice": NOTICE})
    else:
        print_supervised(Console(), result, intervals=intervals)


@cli.command()
@click.argument("run", type=PATH, required=False)
@click.option("--data", type=PATH, required=True, help="Data set in PTB-XL's layout.")
@folds_option
@click.option("--reports", type=PATH, help="CSV ecg_id,report with the references.")
@score_option
@prompts_option
@num_beams_option
@resamples_option
@intervals_option
@click.option("--examples", type=click.IntRange(min=0), default=0, help="Print this many generated reports.")
@click.option("--grounding", is_flag=True, help="Also whether evidence points at premature beats.")
@click.option("--out", type=PATH, help="Folder for evaluation.json and generated_reports.csv.")
@cache_option
@json_option
def evaluate(
    run: Path | None,
    data: Path,
    folds: str,
    reports: Path | None,
    score: str | None,
    prompts: Path | None,
    num_beams: int,
    resamples: int,
    intervals: bool,
    examples: int,
    grounding: bool,
    out: Path | None,
    cache: Path | None,
    as_json: bool,
) -> None:
    """Measure RUN, or the model that comes with the package, on held-out folds.

    Zero-shot AUROC, a linear probe, retrieval, and reports by text metrics and label F1. Beside reports stand
    shuffled ECGs, the report of the nearest training ECG, the most frequent report, and the typical report
    of the record's SCP codes, and of its codes and recorder.
    evaluation.json and generated_reports.csv go to RUN, or to the folder of --out; without either, nothing
    is written.
    """
    from ecgot.eval.evaluate import evaluate as evaluate_run
    from ecgot.inference.zeroshot import BUILT_IN
    from ecgot.runs.config import parse_folds
    from ecgot.runs.run import PRETRAINED, Run

    with progress(quiet=as_json) as shown:
        evaluation = evaluate_run(
            Run.open(run or PRETRAINED),
            data,
            out=out,
            folds=parse_folds(folds),
            reports_csv=reports,
            score=score,
            prompts=prompts or BUILT_IN,
            num_beams=num_beams,
            resamples=resamples,
            cache_dir=cache,
            progress=shown,
        )
        result = evaluation.to_dict()
        if grounding:
            from ecgot.eval.grounding import grounding as measure_grounding

            result |= measure_grounding(
                Run.open(run or PRETRAINED), data, folds=parse_folds(folds), cache_dir=cache, progress=shown
            )
    result["examples"] = result["examples"][:examples]
    if as_json:
        _print_json(result | {"notice": NOTICE})
    else:
        print_evaluation(Console(), result, intervals=intervals)


@cli.command()
@click.argument("paths", type=PATH, nargs=-1, metavar="[RUN] RECORD|FOLDER")
@num_beams_option
@score_option
@prompts_option
@click.option("--recorder", metavar="NAME", help="Write the report in the wording of this ECG recorder.")
@start_option
@window_option
@fs_option
@leads_option
@force_option
@click.option("--html", type=PATH, help="Write a page with the trace and what is said of it.")
@click.option("--pdf", type=PATH, help="The page as PDF; needs Chromium.")
@click.option("--png", type=PATH, help="The page as picture; needs Chromium.")
@click.option("--out", type=PATH, help="With a FOLDER: FILE.csv, FILE.jsonl or a folder for pages.")
@click.option("--resume", is_flag=True, help="With a FOLDER: go on where an earlier call ended.")
@click.option(
    "--workers", type=click.IntRange(min=1), help="With a FOLDER: processes (default: by its size)."
)
@click.option("--no-report", is_flag=True, help="Findings and measurements alone: faster.")
@click.option("--no-measurements", is_flag=True, help="No rate, intervals and axis: faster.")
@json_option
def report(
    paths: tuple[Path, ...],
    num_beams: int,
    score: str | None,
    prompts: Path | None,
    recorder: str | None,
    start_s: float,
    window_s: float | None,
    fs_hz: float | None,
    leads: str | None,
    force: bool,
    html: Path | None,
    pdf: Path | None,
    png: Path | None,
    out: Path | None,
    resume: bool,
    workers: int | None,
    no_report: bool,
    no_measurements: bool,
    as_json: bool,
) -> None:
    """Read one ECG, or a FOLDER of them: findings, a written report, measurements, quality.

    The model is that of RUN, or the one that comes with the package. Files of any length and format that
    ``ecgot formats`` lists; of a long record the strongest window is shown.
    """
    from ecgot.inference.reader import EcgReader
    from ecgot.inference.zeroshot import BUILT_IN

    run, record = _run_and_record(paths)
    pages = {"html": html, "pdf": pdf, "png": png}
    if record.is_dir() and out is None:
        raise EcgotError(
            f"record: expected a file, or --out with a folder of records, got the folder {record}"
        )
    if out is not None and not record.is_dir():
        raise EcgotError(f"out: expected a folder of records with --out, got {record}")
    if out is not None and (any(pages.values()) or as_json):
        raise EcgotError("out: expected no --html, --pdf, --png or --json with a folder, got one")
    reader = EcgReader.from_pretrained(run, prompts=prompts or BUILT_IN, score=score, num_beams=num_beams)
    settings: dict[str, Any] = {
        "report": not no_report,
        "measurements": not no_measurements,
        "force": force,
        "start_s": start_s,
        "window_s": window_s,
        "fs_hz": fs_hz,
        "leads": _names(leads),
    }
    if out is not None:
        options = reader.options(recorder=recorder, **settings)
        _report_folder(reader, record, out, options, resume=resume, workers=workers)
        return
    reading = reader(record, recorder=recorder, **settings)
    _write_pages(reading, pages)
    if as_json:
        _print_json(reading.to_dict())
    else:
        print_reading(Console(), reading)


def _report_folder(
    reader: Any, folder: Path, out: Path, options: Any, *, resume: bool, workers: int | None
) -> None:
    from ecgot.inference.folder import read_folder

    with progress(quiet=False) as shown:
        count, failed = read_folder(
            reader,
            folder,
            out,
            options,
            resume=resume,
            workers=workers,
            progress=lambda done, total: shown.bar("report", done, total),
            on_error=lambda reason: shown.note(f"not read: {reason}"),
        )
    click.echo(f"{out}: {count - failed} records read, {failed} could not be read")
    click.echo(NOTICE)


def _write_pages(reading: Any, pages: dict[str, Path | None]) -> None:
    """The reading as a page in the asked formats."""
    if not any(pages.values()):
        return
    from ecgot.files import write_text
    from ecgot.page.chromium import write_pdf, write_png

    text = reading.to_html()
    if pages["html"] is not None:
        write_text(pages["html"], text)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        write_text(page, text)
        if pages["pdf"] is not None:
            write_pdf(page, pages["pdf"])
        if pages["png"] is not None:
            write_png(page, pages["png"])


@cli.command()
@json_option
def formats(as_json: bool) -> None:
    """List the file formats that can be read, and what each needs."""
    from ecgot.data.formats import FORMATS

    if as_json:
        keys = ("name", "suffixes", "library", "installed")
        _print_json({"formats": [{key: getattr(each, key) for key in keys} for each in FORMATS]})
    else:
        print_formats(Console(), FORMATS)


@cli.command()
@click.argument("run", type=PATH)
@click.option("--data", type=PATH, required=True, help="Data set in PTB-XL's layout.")
@click.option(
    "--folds", required=True, help="Folds to calibrate on, which the run has not trained on, such as 9."
)
@cache_option
@json_option
def calibrate(run: Path, data: Path, folds: str, cache: Path | None, as_json: bool) -> None:
    """Fit probabilities, thresholds and abstention of RUN on held-out folds, into its calibration.json."""
    from ecgot.eval.calibration import calibrate as calibrate_run
    from ecgot.runs.config import parse_folds
    from ecgot.runs.run import Run

    with progress(quiet=as_json) as shown:
        fitted = calibrate_run(Run.open(run), data, folds=parse_folds(folds), cache_dir=cache, progress=shown)
    if as_json:
        _print_json(
            {
                "run": str(run),
                "records": fitted.records,
                "folds": fitted.folds,
                "trained_on": fitted.trained_on,
            }
        )
    else:
        click.echo(f"calibrated {run} on {fitted.records} records")
        if fitted.trained_on:
            trained = ", ".join(map(str, fitted.trained_on))
            click.echo(f"note: the run was trained on folds {trained}, where it is surer than elsewhere")


@cli.command()
@click.argument("paths", type=PATH, nargs=-1, metavar="[RUN] RECORD")
@click.option("--prompt", "prompts", multiple=True, required=True, help="Text, such as a report's phrase.")
@score_option
@start_option
@window_option
@fs_option
@leads_option
@force_option
@json_option
def classify(
    paths: tuple[Path, ...],
    prompts: tuple[str, ...],
    score: str | None,
    start_s: float,
    window_s: float | None,
    fs_hz: float | None,
    leads: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Score one ECG by texts of your own; needs the text encoder.

    Scores compare records by one text: by default log-odds that a report would say it.
    """
    from ecgot.inference.reader import EcgReader

    run, record = _run_and_record(paths)
    scores = EcgReader.from_pretrained(run, score=score).classify(
        record, prompts, start_s=start_s, window_s=window_s, fs_hz=fs_hz, leads=_names(leads), force=force
    )
    if as_json:
        _print_json({"record": str(record), "scores": scores, "notice": NOTICE})
    else:
        print_scores(Console(), scores)


def _names(text: str | None) -> list[str] | None:
    """The parts of "I,II,V1"."""
    return None if text is None else [part.strip() for part in text.split(",")]


def _run_and_record(paths: tuple[Path, ...]) -> tuple[Path | None, Path]:
    """The arguments "[RUN] RECORD"."""
    if len(paths) not in (1, 2):
        raise EcgotError(f"RECORD: expected one record, after a run or alone, got {len(paths)} paths")
    return (paths[0] if len(paths) == 2 else None), paths[-1]


@cli.command()
@click.argument("run", type=PATH)
@click.argument("out", type=PATH)
@click.option("--trained-on", metavar="TEXT", help="Name, source and licence of the data, for the card.")
def export(run: Path, out: Path, trained_on: str | None) -> None:
    """Write RUN to the new folder OUT as a model that needs no text encoder, with a model card."""
    from ecgot.inference.export import UNKNOWN
    from ecgot.inference.export import export as export_run
    from ecgot.runs.run import Run

    export_run(Run.open(run), out, trained_on=trained_on or UNKNOWN)
    click.echo(f"exported to {out}")


def _print_json(result: dict[str, Any]) -> None:
    click.echo(json.dumps(result))


def main() -> None:
    """The entry point of ``ecgot``: errors are one line on stderr and exit code 2."""
    run_command(cli.main)


if __name__ == "__main__":
    main()
