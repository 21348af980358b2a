"""Loading trained models from a run's folder."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ecgot.choices import SCRATCH
from ecgot.errors import EcgotError
from ecgot.models.alignment import AlignmentModel
from ecgot.models.classifier import Classifier
from ecgot.models.decoder_writer import DecoderWriter
from ecgot.models.encoders import Encoder, encoder
from ecgot.models.scores import Transport
from ecgot.models.text_encoder import TextEncoder
from ecgot.models.writer import Writer
from ecgot.runs.config import AlignConfig, Config, ReportConfig
from ecgot.runs.device import choose_device
from ecgot.runs.run import Run
from ecgot.runs.supervised import STAGE, SupervisedConfig

if TYPE_CHECKING:
    from ecgot.models.reporter import Reporter


def build_model(config: Config, text_width: int) -> AlignmentModel:
    """The alignment model of a configuration, with random weights."""
    ecg_encoder = encoder(config.encoder.name, leads=len(config.data.leads))
    return AlignmentModel(ecg_encoder, text_width, config.align.width)


def transport(settings: AlignConfig) -> Transport:
    """The configured transport settings."""
    return Transport(settings.ot_eps, settings.ot_max_iter, settings.ot_tol)


def load_alignment(run: Run, text: TextEncoder | None) -> AlignmentModel:
    """The stage-1 model of a run, in eval mode.

    Args:
        text: the run's text encoder. It is moved to the model's device and, if the run trained it, gets the
            trained weights. None: the model can embed ECGs and use embedded prompts, but cannot embed text.
    """
    config, device = run.config(), choose_device(run.config().device)
    if text is None:
        model = build_model(config, run.shape("align", "project_text.0.weight")[1])
        run.load("align", model)
        return model.to(device).eval()
    model = build_model(config, text.width)
    if config.text.train:
        model.text = text
    run.load("align", model)
    if not config.text.train and not torch.equal(model.text_fingerprint, text_fingerprint(text)):
        raise EcgotError(
            f"run: expected the text encoder that {run.folder} was trained with, got another under text.name "
            f"{config.text.name!r}"
        )
    text.to(device).eval()
    return model.to(device).eval()


def build_classifier(
    config: Config, settings: SupervisedConfig, trained: Encoder | None = None
) -> Classifier:
    """The classifier of a supervised training, with random weights.

    Args:
        trained: the encoder to take in place of one with random weights.
    """
    crop, stride = settings.crop_samples(config.data.fs_hz)
    return Classifier(
        trained or encoder(config.encoder.name, leads=len(config.data.leads)),
        settings.classes,
        benchmark=not settings.start,
        crop=crop,
        stride=stride,
    )


def load_classifier(run: Run) -> Classifier:
    """The classifier of a run of ``ecgot supervise``, in eval mode.

    Its input is what the run's ``data`` settings make of a record, see
    :meth:`ecgot.models.classifier.Classifier.class_logits`.

    Raises:
        EcgotError: the run holds none, or has not finished.
    """
    config = run.config()
    made = build_classifier(config, SupervisedConfig.of(run))
    run.load(STAGE, made)
    return made.to(choose_device(config.device)).eval()


def text_fingerprint(text: TextEncoder) -> Tensor:
    """Hash [16] uint8 of a text encoder's weights and settings."""
    return torch.tensor(list(bytes.fromhex(text.fingerprint())), dtype=torch.uint8)


def load_reporter(run: Run, ecg_width: int) -> Writer:
    """What writes reports with the stage-2 model of a run, in eval mode.

    A language model from scratch runs in plain torch, which is fast and needs no transformers; any other as
    a :class:`ecgot.models.reporter.Reporter`, and with adapters it is loaded by name.
    """
    config = run.config()
    settings, folder = config.report, run.folder / "language_model"
    writer: Writer
    if settings.lora_rank:
        writer = new_reporter(settings, ecg_width, (), run.recorders)
    elif settings.language_model == SCRATCH:
        writer = DecoderWriter(folder, ecg_width, max_tokens=settings.max_tokens, recorders=run.recorders)
    else:
        from ecgot.models.language_models import empty_reporter  # imports transformers

        writer = empty_reporter(folder, ecg_width, max_tokens=settings.max_tokens, recorders=run.recorders)
    run.load("report", writer)
    return writer.to(choose_device(config.device)).eval()


def new_reporter(
    settings: ReportConfig, ecg_width: int, reports: tuple[str, ...], recorders: tuple[str, ...]
) -> "Reporter":
    """The reporter at the start of stage 2, with adapters if they are configured.

    Args:
        ecg_width: D, width of the ECG tokens.
        reports: the training reports, on which a tokenizer from scratch is fitted.
        recorders: see :class:`ecgot.models.reporter.Reporter`.
    """
    from ecgot.models.language_models import add_lora, build_reporter  # imports transformers

    reporter = build_reporter(
        settings.language_model,
        ecg_width,
        reports=reports,
        max_tokens=settings.max_tokens,
        hidden_size=settings.hidden_size,
        layers=settings.layers,
        recorders=recorders,
    )
    if settings.lora_rank:
        add_lora(reporter, settings.lora_rank)
    return reporter
