"""Stage 1: align the ECG encoder with report text. Labels are never read."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from ecgot.data.dataset import EcgDataset
from ecgot.models.alignment import AlignmentModel, rank_of_match
from ecgot.models.encoders import CapturedTraining, to_channels_last
from ecgot.models.losses import AlignmentLoss, SaidPhrases
from ecgot.models.text_encoder import TextEncoder, TextTokens
from ecgot.models.token_store import TokenStore, embed_texts
from ecgot.runs.checkpoints import build_model, load_alignment, text_fingerprint, transport
from ecgot.runs.config import AlignConfig, Config
from ecgot.runs.device import choose_device
from ecgot.runs.progress import Progress
from ecgot.runs.records import BATCH, waveforms
from ecgot.runs.run import Run
from ecgot.text.phrases import Phrases, find_phrases
from ecgot.train.batches import augmented, epoch_order
from ecgot.train.loop import Schedule, parameter_groups, train_epochs


class PhraseSource:
    """The phrases of the training reports, with their text embeddings."""

    def __init__(self, phrases: Phrases, pooled: Tensor, device: torch.device) -> None:
        self.phrases, self.pooled, self.weight = phrases, pooled.to(device), phrases.weight.to(device)

    def batch(self, rows: Tensor) -> SaidPhrases:
        """The phrases, and which of them the reports of ``rows`` [b] contain."""
        said = torch.from_numpy(self.phrases.said[rows.numpy()].toarray())
        return SaidPhrases(self.pooled, self.weight, said.to(self.pooled.device))


class ReportSource:
    """Text tokens of a data set's reports: looked up if the text encoder is frozen, else computed."""

    def __init__(self, reports: tuple[str, ...], encoder: TextEncoder, store: TokenStore | None) -> None:
        distinct = {text: number for number, text in enumerate(dict.fromkeys(reports))}
        self.reports, self.encoder, self.store = reports, encoder, store
        self.text_id = torch.tensor([distinct[text] for text in reports], dtype=torch.long)
        if store is not None:
            self._number = torch.tensor([store.index[text] for text in reports], dtype=torch.long)

    def batch(
        self, rows: Tensor, device: torch.device, encoder: TextEncoder | None = None
    ) -> tuple[TextTokens, Tensor]:
        """The reports of ``rows`` [b] as tokens, and their text ids [b], which are equal for equal texts.

        Args:
            encoder: computes tokens in place of the trained encoder; unused if tokens are looked up.
        """
        ids = self.text_id[rows].to(device)
        if self.store is None:
            return (encoder or self.encoder)([self.reports[row] for row in rows.tolist()]), ids
        text = self.store.batch(self._number[rows])
        return TextTokens(text.tokens.to(device), text.mask.to(device), text.pooled.to(device)), ids


def train_alignment(
    run: Run,
    text: TextEncoder,
    train: EcgDataset,
    validation: EcgDataset,
    *,
    phrases: Phrases | None = None,
    cache_dir: Path,
    progress: Progress,
) -> AlignmentModel:
    """Train stage 1 into ``run`` and return the model, on its device and in eval mode.

    Args:
        text: the configured text encoder.
        train, validation: records that all have report text, see :func:`ecgot.train.batches.with_reports`.
        phrases: those of the training reports, see :func:`report_phrases`; None to learn none.
        cache_dir: where token embeddings of a frozen text encoder are cached.
    """
    config = run.config()
    settings, device = config.align, choose_device(config.device)
    reports = {*train.reports, *validation.reports}
    store = None if config.text.train else _token_store(text, reports, cache_dir, progress)
    model = _first_model(run, text, phrases).to(device)
    loss = _loss(settings)
    source = ReportSource(train.reports, text, store)
    validation_source = ReportSource(validation.reports, text, store)
    phrase_source = None if phrases is None else _phrase_source(model, text, phrases, store, cache_dir)
    encode = CapturedTraining(model.encoder) if config.cuda_graph else model.encoder

    def epoch(number: int, step: Callable[[Tensor], None]) -> dict[str, float]:
        if phrase_source is not None and config.text.train:
            phrase_source.pooled = _pooled(text, phrase_source.phrases.texts)
        model.train()
        sums: dict[str, float] = {}
        batches = epoch_order(len(train), settings.batch_size, config.seed, number)
        for done, rows in enumerate(batches):
            signal = waveforms(train, rows, device)
            signal = augmented(*signal, config.data) if settings.augment else signal
            ecg = model.project_tokens(encode(*signal))
            tokens, ids = source.batch(rows, device)
            said = None if phrase_source is None else phrase_source.batch(rows)
            terms = loss(ecg, model.embed_text(tokens), ids, model, said)
            step(terms["loss"])
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value.item() / len(batches)
            progress.bar(f"align, epoch {number + 1}/{settings.epochs}", done + 1, len(batches))
        return sums

    train_epochs(
        run,
        "align",
        model,
        parameter_groups(model, functools.partial(_learning_rate, settings)),
        Schedule(
            epochs=settings.epochs,
            steps=len(epoch_order(len(train), settings.batch_size, 0, 0)),
            weight_decay=settings.weight_decay,
            average=settings.average,
        ),
        epoch=epoch,
        validate=lambda kept: validate(cast(AlignmentModel, kept), validation, validation_source, device),
        progress=progress,
    )
    return model.eval()


@torch.no_grad()
def _first_model(run: Run, text: TextEncoder, phrases: Phrases | None) -> AlignmentModel:
    """The model at the start of training, or one to load its state into.

    Where it has not learned phrases yet, its prior is their mean log-odds.
    """
    config = run.config()
    start = Run.named(config.start) if config.start and not run.begun("align") else None
    model = _new_model(config, text) if start is None else load_alignment(start, text)
    if choose_device(config.device).type == "cpu":
        to_channels_last(model.encoder)
    if phrases is not None and (start is None or not start.config().align.phrase_weight):
        model.phrase_prior[-1].bias.fill_(phrases.log_odds)  # type: ignore[operator]
    return model


def _new_model(config: Config, text: TextEncoder) -> AlignmentModel:
    """The model at the start of training, initialised from the seed.

    It contains the text encoder if that is trained, else its fingerprint.
    """
    device = choose_device(config.device)
    torch.manual_seed(config.seed)
    model = build_model(config, text.width)
    if config.text.train:
        model.text = text.to(device)
    else:
        model.text_fingerprint.copy_(text_fingerprint(text))
    return model


def _token_store(text: TextEncoder, reports: set[str], cache_dir: Path, progress: Progress) -> TokenStore:
    """The tokens of a frozen text encoder, of each report once."""
    return embed_texts(
        text,
        sorted(reports),
        cache_dir=cache_dir,
        progress=lambda done, total: progress.bar("texts", done, total),
    )


def _loss(settings: AlignConfig) -> AlignmentLoss:
    """The configured loss."""
    return AlignmentLoss(
        contrastive_weight=settings.contrastive_weight,
        token_weight=settings.token_weight,
        token_loss=settings.token_loss,
        phrase_weight=settings.phrase_weight,
        transport=transport(settings),
    )


def _learning_rate(settings: AlignConfig, name: str) -> float:
    """Learning rate of a parameter; a trained text encoder has its own."""
    return settings.text_learning_rate if name.startswith("text.") else settings.learning_rate


def report_phrases(reports: tuple[str, ...], settings: AlignConfig) -> Phrases | None:
    """The phrases to learn from training reports; None if the phrase weight is 0.

    Raises:
        EcgotError: no phrase is frequent enough.
    """
    if not settings.phrase_weight:
        return None
    return find_phrases(reports, min_count=settings.phrase_min_count, max_words=settings.phrase_max_words)


def _phrase_source(
    model: AlignmentModel, text: TextEncoder, phrases: Phrases, store: TokenStore | None, cache_dir: Path
) -> PhraseSource:
    """The phrases with their embeddings.

    Without a ``store`` of frozen embeddings, each epoch embeds the phrases again, so that phrases are learned
    with the same encoder that later embeds prompts.
    """
    frozen = store is not None
    pooled = embed_texts(text, phrases.texts, cache_dir=cache_dir).pooled if frozen else torch.empty(0)
    return PhraseSource(phrases, pooled, next(model.parameters()).device)


@torch.no_grad()
def _pooled(text: TextEncoder, texts: Sequence[str]) -> Tensor:
    """Pooled embeddings [K, D] of K texts with the text encoder's current weights."""
    text.eval()
    parts = [text(texts[start : start + BATCH]).pooled for start in range(0, len(texts), BATCH)]
    return torch.cat(parts)


@torch.no_grad()
def validate(
    model: AlignmentModel, dataset: EcgDataset, source: ReportSource, device: torch.device
) -> dict[str, float]:
    """Recall of each record's report among all distinct reports of ``dataset``; needs no labels."""
    model.eval()
    trained_text = cast(TextEncoder | None, getattr(model, "text", None))
    ecg, text = [], []
    for rows in torch.arange(len(dataset)).split(BATCH):
        ecg.append(model.embed_ecg(*waveforms(dataset, rows, device)).pooled)
        tokens, _ = source.batch(rows, device, trained_text)
        text.append(model.embed_text(tokens).pooled)
    ids = source.text_id.to(device)
    distinct, first = _first_rows(ids)
    rank = rank_of_match(torch.cat(ecg) @ torch.cat(text)[first].T, ids[:, None] == distinct)
    return {f"validation_recall@{k}": (rank < k).float().mean().item() for k in (1, 10)}


def _first_rows(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct ids, sorted, and the first row of each."""
    distinct, inverse = torch.unique(ids, return_inverse=True)
    first = torch.full_like(distinct, len(ids))
    rows = torch.arange(len(ids), device=ids.device)
    return distinct, first.scatter_reduce(0, inverse, rows, reduce="amin")
