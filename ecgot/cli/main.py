"""The command line: synth, train, supervise, evaluate, report, classify, export, bench."""

import ctypes
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from ecgot.cli.tables import _auroc_table, _bench_tables, _ranked, _report_table, _supervised_table
from ecgot.errors import EcgotError
from ecgot.inference.display import NOTICE, SURE
from ecgot.version import __version__

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
PATH = click.Path(path_type=Path)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")
cache = click.option(
    "--cache",
    type=PATH,
    help="Folder of cached signals and embeddings (default: $ECGOT_CACHE or ~/.cache/ecgot).",
)
score_option = click.option(
    "--score",
    type=click.Choice(["phrase", "cosine", "ot", "best_match", "mean_match"]),
    help="Score of a class (default: phrase where the run has learned phrases, else cosine).",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]}, epilog=NOTICE)
@click.version_option(__version__, package_name="ecgot")
def cli() -> None:
    """Teach language models to read electrocardiograms, aligned by optimal transport.

    synth makes a data set, train trains on one, supervise trains a baseline on its labels, evaluate
    measures a trained run, report and classify read one record, export makes a run portable, bench times the
    transport solver.
    """


@cli.command()
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of torch (default: torch's).")
@as_json
def bench(threads: int | None, as_json: bool) -> None:
    """Time the transport solver against torch, POT and geomloss, where installed, at equal marginal error.

    On a GPU also against a compiled loop in a CUDA graph and flash-sinkhorn.
    Each provider's result is checked against fp64 first. The whole suite is ``pytest benchmarks/``.
    """
    import torch

    from ecgot import bench as suite

    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    origin, rows = suite.origin(), []
    with _progress(as_json) as (bar, _):
        for number, case in enumerate(suite.SHORT):
            bar("bench", number, len(suite.SHORT) + 1)
            rows += suite.compare(case, device)
        bar("bench", len(suite.SHORT), len(suite.SHORT) + 1)
        rows += suite.compare_pairs(suite.PairsCase(), device)
        bar("bench", len(suite.SHORT) + 1, len(suite.SHORT) + 1)
    if as_json:
        _print({"origin": origin, "rows": [suite.as_row(row) for row in rows]}, True)
        return
    console = Console()
    for table in _bench_tables(rows):
        console.print(table)
    console.print(", ".join(f"{name} {value}" for name, value in origin.items()))


@cli.command()
@click.argument("out", type=PATH)
@click.option("--records", type=click.IntRange(min=1), default=1000, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@as_json
def synth(out: Path, records: int, seed: int, as_json: bool) -> None:
    """Write a synthetic data set to OUT: WFDB files in PTB-XL's layout, ten folds."""
    from ecgot.data.synth import write_dataset

    with _progress(as_json) as (bar, _):
        write_dataset(out, records=records, seed=seed, progress=lambda done, total: bar("synth", done, total))
    _print(
        {"out": str(out), "records": records, "seed": seed}, as_json, f"{records} synthetic records in {out}"
    )


@cli.command()
@click.option("--data", type=PATH, help="Data set in PTB-XL's layout (sets data.root).")
@click.option(
    "--reports",
    type=PATH,
    help="CSV ecg_id,report of English reports: for records whose report column is empty and, with "
    "data.plain_english=false, for all.",
)
@click.option("--out", type=PATH, required=True, help="Folder of the run.")
@click.option("--config", type=PATH, help="TOML or JSON file with settings, as config.json of a run.")
@click.option(
    "--stage",
    type=click.Choice(["all", "align", "report"]),
    default="all",
    show_default=True,
    help="align: stage 1. report: stage 2, after align.",
)
@click.option("--resume", is_flag=True, help="Continue a run that was interrupted.")
@cache
@as_json
@click.argument("settings", nargs=-1, metavar="[KEY=VALUE]...")
def train(
    data: Path | None,
    reports: Path | None,
    out: Path,
    config: Path | None,
    stage: str,
    resume: bool,
    cache: Path | None,
    as_json: bool,
    settings: tuple[str, ...],
) -> None:
    """Train a run: align ECGs with reports (stage 1), then learn to write reports (stage 2).

    KEY=VALUE overrides a setting, such as align.epochs=3 or encoder.name=resnet1d. The resolved
    configuration, metrics.jsonl and safetensors checkpoints go to the run's folder. With --resume or
    --stage report, what is not given here is as in the run.
    """
    from ecgot.runs.config import resolve
    from ecgot.runs.progress import Progress
    from ecgot.runs.run import Run
    from ecgot.train.stages import STAGES
    from ecgot.train.stages import train as train_stages

    # Whole paths, so that the run's configuration means the same from any folder.
    paths = [f"data.root={data.resolve()}"] if data else []
    paths += [f"data.reports_csv={reports.resolve()}"] if reports else []
    begun = (resume or stage == "report") and (out / "config.json").is_file()
    base = Run.open(out).config() if begun else None
    resolved = resolve(config, (*paths, *settings), base=base)
    if not resolved.data.root:
        raise EcgotError("data: name the data set's folder by --data")
    with _progress(as_json) as (bar, note):
        run = train_stages(
            resolved,
            out,
            stages=STAGES if stage == "all" else (stage,),
            resume=resume,
            cache_dir=cache,
            progress=Progress(bar, note),
        )
    _print({"run": str(out), "metrics": run.metrics()}, as_json, f"trained into {out}")


@cli.command()
@click.option("--data", type=PATH, required=True, help="Data set in PTB-XL's layout.")
@click.option("--out", type=PATH, required=True, help="Folder of the run.")
@click.option("--encoder", help="Encoder to train from scratch (default: resnet1d_wang).")
@click.option("--from", "start", type=PATH, metavar="RUN", help="Fine-tune the aligned encoder of this run.")
@click.option("--group", help="Label group, or all (default: superclass; with --from all).")
@click.option("--epochs", type=click.IntRange(min=1), help="Default: 50; with --from 8.")
@click.option("--seed", type=click.IntRange(min=0), help="Default: 0.")
@click.option("--folds", default="9", show_default=True, help="Folds to evaluate, such as 9 or 9,10.")
@click.option("--resamples", type=click.IntRange(min=1), default=1000, show_default=True, help="Bootstrap.")
@click.option(
    "--resume",
    is_flag=True,
    help="Continue an interrupted training, or evaluate a finished one, in its own settings.",
)
@cache
@as_json
def supervise(
    data: Path,
    out: Path,
    encoder: str | None,
    start: Path | None,
    group: str | None,
    epochs: int | None,
    seed: int | None,
    folds: str,
    resamples: int,
    resume: bool,
    cache: Path | None,
    as_json: bool,
) -> None:
    """Train an encoder on the labels, as a baseline for zero-shot scores, and measure it.

    From scratch by the protocol of the PTB-XL benchmark, or from the aligned encoder of a run. The weights
    after the last epoch count; evaluation.json goes to the run's folder.
    """
    from ecgot.eval.supervise import supervise as train_supervised
    from ecgot.runs.config import parse_folds
    from ecgot.runs.progress import Progress
    from ecgot.runs.run import Run

    with _progress(as_json) as (bar, note):
        evaluation = train_supervised(
            data,
            out,
            encoder_name=encoder,
            start=None if start is None else Run.open(start),
            group=group,
            epochs=epochs,
            seed=seed,
            folds=parse_folds(folds),
            resamples=resamples,
            resume=resume,
            cache_dir=cache,
            progress=Progress(bar, note),
        )
    result = evaluation.to_dict()
    if as_json:
        _print(result | {"notice": NOTICE}, True)
        return
    console = Console()
    console.print(_supervised_table(result))
    console.print(f"\n{NOTICE}")


@cli.command()
@click.argument("run", type=PATH, required=False)
@click.option("--data", type=PATH, required=True, help="Data set in PTB-XL's layout.")
@click.option("--folds", default="9", show_default=True, help="Folds to evaluate, such as 9 or 9,10.")
@click.option("--reports", type=PATH, help="CSV ecg_id,report with the references.")
@score_option
@click.option("--prompts", type=PATH, help="TOML file with prompts instead of the built-in ones.")
@click.option("--num-beams", type=click.IntRange(min=1), default=4, show_default=True, help="1: greedy.")
@click.option("--resamples", type=click.IntRange(min=1), default=1000, show_default=True, help="Bootstrap.")
@click.option("--examples", type=click.IntRange(min=0), default=0, help="Print this many generated reports.")
@click.option("--out", type=PATH, help="Folder for evaluation.json and generated_reports.csv.")
@cache
@as_json
def evaluate(
    run: Path | None,
    data: Path,
    folds: str,
    reports: Path | None,
    score: str | None,
    prompts: Path | None,
    num_beams: int,
    resamples: int,
    examples: int,
    out: Path | None,
    cache: Path | None,
    as_json: bool,
) -> None:
    """Measure RUN, or the model that comes with the package, on held-out folds.

    Zero-shot AUROC, a linear probe, retrieval, and reports by text metrics and label F1, beside shuffled
    ECGs, nearest neighbours, the most frequent report and the typical one of the record's SCP codes, and
    of codes and recorder.
    evaluation.json and generated_reports.csv go to RUN, or to the folder of --out; without either nothing is
    written.
    """
    from ecgot.eval.evaluate import evaluate as evaluate_run
    from ecgot.inference.zeroshot import BUILT_IN
    from ecgot.runs.config import parse_folds
    from ecgot.runs.progress import Progress
    from ecgot.runs.run import PRETRAINED, Run

    with _progress(as_json) as (bar, note):
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
            progress=Progress(bar, note),
        )
    result = evaluation.to_dict()
    result["examples"] = result["examples"][:examples]
    if as_json:
        _print(result | {"notice": NOTICE}, True)
        return
    console = Console()
    console.print(_auroc_table(result))
    if result["retrieval"]:
        shown = ", ".join(f"{name} {value:.3f}" for name, value in result["retrieval"].items())
        console.print(f"recall: {shown}", highlight=False)
    if result["reports"]:
        console.print(_report_table(result))
        for name, dialect in result["dialect"].items():
            console.print(f"{name}: {dialect}", highlight=False)
    for example in result["examples"]:
        lines = (f"record {example['ecg_id']}", f"reference: {example['reference']}")
        console.print("\n" + "\n  ".join((*lines, f"generated: {example['generated']}")), markup=False)
    console.print(f"\n{NOTICE}")


@cli.command()
@click.argument("paths", type=PATH, nargs=-1, metavar="[RUN] RECORD")
@click.option("--num-beams", type=click.IntRange(min=1), default=4, show_default=True, help="1: greedy.")
@score_option
@click.option("--prompts", type=PATH, help="TOML file with prompts instead of the built-in ones.")
@click.option("--recorder", metavar="NAME", help="In whose words the report is written; else unknown.")
@as_json
def report(
    paths: tuple[Path, ...],
    num_beams: int,
    score: str | None,
    prompts: Path | None,
    recorder: str | None,
    as_json: bool,
) -> None:
    """Read one WFDB RECORD: class scores and a written report.

    The model is that of RUN, or the one that comes with the package.
    """
    from ecgot.inference.reader import Reader
    from ecgot.inference.zeroshot import BUILT_IN

    run, record = _run_and_record(paths)
    reader = Reader(run, prompts=prompts or BUILT_IN, score=score, num_beams=num_beams)
    reading = reader.read(record, recorder=recorder).to_dict()
    if as_json:
        _print(reading | {"notice": NOTICE}, True)
        return
    console = Console()
    table = Table(title=f"{record}: score of each class, highest first")
    for group in reading["scores"]:
        table.add_column(group)
    columns = [_ranked(scores, 5) for scores in reading["scores"].values()]
    for row in range(max(map(len, columns), default=0)):
        table.add_row(*(column[row] if row < len(column) else "" for column in columns))
    console.print(table)
    for note in reading["notes"]:
        console.print(f"note: {note}", markup=False)
    console.print("Scores compare records by one class; classes differ in how often they are named.")
    written = "(none: stage 2 has not been trained)" if reading["report"] is None else reading["report"]
    words = f" in the words of {reading['recorder']}" if reading["recorder"] else ""
    console.print(f"report{words}: {written or '(empty)'}", markup=False)
    if reading["sentences"]:
        console.print("Probability that the model gives to each of its sentences:")
    for sentence, probability in reading["sentences"]:
        unsure = "" if probability >= SURE else "  (unsure)"
        console.print(f"  {probability:.2f}  {sentence}{unsure}", markup=False, highlight=False)
    console.print(NOTICE)


@cli.command()
@click.argument("paths", type=PATH, nargs=-1, metavar="[RUN] RECORD")
@click.option("--prompt", "prompts", multiple=True, required=True, help="Text, such as a report's phrase.")
@score_option
@as_json
def classify(paths: tuple[Path, ...], prompts: tuple[str, ...], score: str | None, as_json: bool) -> None:
    """Score one WFDB RECORD by texts of your own; needs the text encoder.

    Scores compare records by one text: by default log-odds that a report would say it.
    """
    from ecgot.inference.reader import Reader

    run, record = _run_and_record(paths)
    reading = Reader(run, score=score).classify(record, prompts)
    scores = reading.scores["prompts"]
    if as_json:
        found = {"record": str(record), "scores": scores, "notes": reading.notes, "notice": NOTICE}
        _print(found, True)
        return
    console = Console()
    for text in _ranked(scores, len(scores)):
        console.print(text, markup=False, highlight=False)
    for note in reading.notes:
        console.print(f"note: {note}", markup=False)
    console.print(NOTICE)


def _run_and_record(paths: tuple[Path, ...]) -> tuple[Any, Path]:
    """The run (None: the package's) and the record of "[RUN] RECORD"."""
    from ecgot.runs.run import Run

    if len(paths) not in (1, 2):
        raise EcgotError(f"RECORD: got {len(paths)} paths, accepted is one record, after a run or alone")
    return (Run.open(paths[0]) if len(paths) == 2 else None), paths[-1]


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


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed: on a CPU each step's activations come back to the same pages.

    By default it returns large blocks to the system, and the next step has their pages cleared again, which
    costs a tenth of a training step.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the largest that glibc accepts
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)
    except (OSError, AttributeError):  # another C library
        return


def main() -> None:
    """Run the command line: errors are one line on stderr and exit code 2."""
    _keep_freed_memory()
    try:
        sys.exit(cli.main(standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message())
    except click.exceptions.Abort:
        _fail("interrupted")
    except EcgotError as error:
        _fail(str(error))
    except OSError as error:  # a full disk, a folder without permission
        _fail(f"{error.filename or 'file'}: {error.strerror or error}")


def _fail(message: str) -> None:
    click.echo("ecgot: " + " ".join(message.split()), err=True)
    sys.exit(2)


@contextmanager
def _progress(
    quiet: bool,
) -> Iterator[tuple[Callable[[str, int, int], None], Callable[[str], None]]]:
    """Bars and notes on stderr; with ``quiet`` neither, so that stdout and stderr stay clean for programs."""
    if quiet:
        yield (lambda _task, _done, _total: None), (lambda _line: None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console, tasks = Console(stderr=True), dict[str, TaskID]()
    bars = Bars(*columns, console=console, transient=True)

    def bar(task: str, done: int, total: int) -> None:
        if not console.is_terminal:
            return
        bars.start()  # not before there is something to show: an error then stays one line
        if task not in tasks:
            tasks[task] = bars.add_task(task, total=total)
        bars.update(tasks[task], completed=done, total=total)
        if done >= total:
            bars.remove_task(tasks.pop(task))

    try:
        yield bar, lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True)
    finally:
        if bars.live.is_started:
            bars.stop()


def _print(result: dict[str, Any], as_json: bool, line: str = "") -> None:
    click.echo(json.dumps(result) if as_json else line)


if __name__ == "__main__":
    main()
