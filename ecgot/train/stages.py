"""A full training run: data, stage 1, stage 2."""

from collections.abc import Sequence
from pathlib import Path

from ecgot.choices import STAGES
from ecgot.data.ptbxl import check_patient_split
from ecgot.errors import EcgotError
from ecgot.files import default_cache_dir
from ecgot.models.encoders import encoder
from ecgot.models.language_models import check_language_model
from ecgot.models.text_encoder import TextEncoder
from ecgot.runs.checkpoints import load_alignment
from ecgot.runs.config import Config, check_start
from ecgot.runs.device import check_cuda_graph
from ecgot.runs.progress import Progress
from ecgot.runs.records import load_folds
from ecgot.runs.run import Run
from ecgot.train.align import report_phrases, train_alignment
from ecgot.train.batches import with_reports
from ecgot.train.report import train_reporter


def train(
    config: Config,
    out: Path,
    *,
    stages: Sequence[str] = STAGES,
    resume: bool = False,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Run:
    """Train into the folder ``out``.

    Args:
        config: all settings of the run.
        stages: "align", "report", or both; "report" alone needs an earlier "align" in ``out``.
        resume: continue an interrupted run or add a stage to it; otherwise ``out`` must be new.
        cache_dir: for signals and text embeddings; by default :func:`ecgot.files.default_cache_dir`.

    Raises:
        EcgotError: the configuration, data or folder cannot be used. Nothing in ``out`` is overwritten.
    """
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise EcgotError(f"stage: expected one of {', '.join(STAGES)}, got {unknown[0]!r}")
    cache_dir, progress = cache_dir or default_cache_dir(), progress or Progress()
    # Check everything that can be checked before making the run's folder.
    if "align" not in stages:
        Run.open(out)
    if config.start and not Run(out).begun("align"):
        _check_start(config)
    check_cuda_graph(config)
    encoder(config.encoder.name, leads=len(config.data.leads))
    if "report" in stages:
        check_language_model(config.report.language_model, lora_rank=config.report.lora_rank)
    text = TextEncoder(config.text.name, max_tokens=config.text.max_tokens)
    train_set = load_folds(config, config.data.train_folds, cache_dir, progress)
    validation_set = load_folds(config, config.data.validation_folds, cache_dir, progress)
    check_patient_split(train_set.table, validation_set.table)
    if config.data.reports_csv and config.data.plain_english:
        own = sum(map(bool, train_set.table.originals))
        progress.note(
            f"data: {own} training records learn from their report column, made plain English, and not "
            "from the CSV of --reports (data.plain_english=false changes that)"
        )
    sets = [
        with_reports(each.in_plain_english() if config.data.plain_english else each)
        for each in (train_set, validation_set)
    ]
    phrases = report_phrases(sets[0].reports, config.align) if "align" in stages else None
    if phrases is not None:
        progress.note(f"align: {len(phrases.texts)} phrases in {len(sets[0])} reports")

    run = Run.create(out, config, resume=resume or "align" not in stages)
    if "align" in stages and not run.done("align"):
        model = train_alignment(run, text, *sets, phrases=phrases, cache_dir=cache_dir, progress=progress)
    else:
        model = load_alignment(run, text)
    if "report" in stages and not run.done("report"):
        train_reporter(run, model, *sets, progress=progress)
    return run


def _check_start(config: Config) -> None:
    """Check that the run which training starts from is trained, and that the configuration fits it.

    Raises:
        EcgotError: it is not, or does not.
    """
    start = Run.named(config.start)
    if not start.done("align"):
        raise EcgotError(
            f"start: expected a run with a trained stage align, got {start.folder}, where it is not trained"
        )
    check_start(config, start.config())
