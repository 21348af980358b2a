"""Zero-shot detection: score each class by prompts, texts that a report of that class would contain."""

import functools
import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ecgot.choices import GROUPS, SCORES, TOKEN_SIMILARITIES
from ecgot.errors import EcgotError, first_line
from ecgot.files import save_tensors
from ecgot.models.alignment import AlignmentModel, Embedding
from ecgot.models.hugging_face import fingerprint
from ecgot.models.scores import Transport, phrase_logits, token_similarity
from ecgot.models.text_encoder import TextEncoder
from ecgot.runs.checkpoints import load_alignment
from ecgot.runs.config import AlignConfig
from ecgot.runs.run import Run

BUILT_IN = Path(__file__).with_name("prompts.toml")

_Value = TypeVar("_Value")
Prompts = Mapping[str, Mapping[str, tuple[str, ...]]]  # group -> class -> texts


@dataclass(frozen=True)
class EmbeddedPrompts:
    """Distinct prompts, each embedded once.

    Attributes:
        embedding: of K prompts, [K, ...].
        rows: group -> class -> indices of its prompts.
        texts: the K prompts.
        phrase_scale: the model's, [], see :func:`ecgot.models.scores.phrase_logits`.
    """

    embedding: Embedding
    rows: dict[str, dict[str, list[int]]]
    texts: tuple[str, ...]
    phrase_scale: Tensor

    def select(self, classes: Mapping[str, tuple[str, ...]]) -> "EmbeddedPrompts":
        """Only the given classes of each group, in the given order.

        Raises:
            EcgotError: a class has no prompt.
        """
        rows = {group: _select(self.rows, group, names) for group, names in classes.items()}
        return replace(self, rows=rows)


def read_prompts(path: Path = BUILT_IN) -> Prompts:
    """Prompts by group and class, from a TOML file like the built-in one.

    Raises:
        EcgotError: the file is missing or has another form.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EcgotError(f"prompts: {path} cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise EcgotError(f"prompts: {path} is not valid TOML ({error})") from error
    prompts: dict[str, dict[str, tuple[str, ...]]] = {}
    for group, table in tables.items():
        if group not in GROUPS or not isinstance(table, dict):
            raise EcgotError(f"prompts: expected tables {', '.join(GROUPS)}, got {group!r} in {path}")
        for name, texts in table.items():
            if not (isinstance(texts, list) and texts and all(isinstance(t, str) and t for t in texts)):
                raise EcgotError(
                    f"prompts: {path}: {group}.{name}: expected a list of one or more texts, got {texts!r}"
                )
        prompts[group] = {name: tuple(texts) for name, texts in table.items()}
    if not any(prompts.values()):
        raise EcgotError(f"prompts: expected tables of classes and their texts, got no class in {path}")
    return prompts


def select_prompts(prompts: Prompts, group: str, classes: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The prompts of the given classes of a group.

    Raises:
        EcgotError: a class has no prompt.
    """
    return _select(prompts, group, classes)


def _select(
    prompts: Mapping[str, Mapping[str, _Value]], group: str, classes: tuple[str, ...]
) -> dict[str, _Value]:
    known = prompts.get(group, {})
    unknown = [name for name in classes if name not in known]
    if unknown:
        raise EcgotError(
            f"prompts: expected one of {', '.join(known) or '(none)'}, got {group} class {unknown[0]!r}, "
            "which has no prompt"
        )
    return {name: known[name] for name in classes}


@torch.no_grad()
def embed_prompts(
    model: AlignmentModel, text: TextEncoder, prompts: Mapping[str, Mapping[str, tuple[str, ...]]]
) -> EmbeddedPrompts:
    """Embed each distinct prompt once."""
    texts = sorted({t for classes in prompts.values() for texts in classes.values() for t in texts})
    number = {t: row for row, t in enumerate(texts)}
    rows = {
        group: {name: [number[t] for t in texts] for name, texts in classes.items()}
        for group, classes in prompts.items()
    }
    embedded = model.embed_text(text.eval()(texts))
    return EmbeddedPrompts(embedded, rows, tuple(texts), model.phrase_scale)


def model_and_prompts(run: Run) -> tuple[AlignmentModel, EmbeddedPrompts]:
    """A run's model, and the built-in prompts as the run keeps them or as its text encoder embeds them."""
    if run.prompts.exists():
        model = load_alignment(run, None)
        return model, load_prompts(run.prompts, next(model.parameters()).device)
    settings = run.config().text
    text = TextEncoder(settings.name, max_tokens=settings.max_tokens)
    model = load_alignment(run, text)
    return model, embed_prompts(model, text, read_prompts())


def save_prompts(prompts: EmbeddedPrompts, path: Path) -> None:
    """Write embedded prompts to one safetensors file; tokens as fp16."""
    embedding = prompts.embedding
    assert embedding.prior is not None
    tensors = {
        "tokens": embedding.tokens.half(),
        "mask": embedding.mask,
        "pooled": embedding.pooled,
        "prior": embedding.prior,
        "phrase_scale": prompts.phrase_scale,
    }
    metadata = {"rows": json.dumps(prompts.rows), "texts": json.dumps(prompts.texts)}
    save_tensors({name: tensor.cpu() for name, tensor in tensors.items()}, path, metadata)


def load_prompts(path: Path, device: torch.device) -> EmbeddedPrompts:
    """Read embedded prompts that :func:`save_prompts` wrote.

    Raises:
        EcgotError: the file is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        rows, texts = json.loads(metadata["rows"]), tuple(json.loads(metadata["texts"]))
        tensors = {name: tensor.to(device) for name, tensor in load_file(path).items()}
        parts = (tensors[name] for name in ("mask", "pooled", "prior"))
        embedding = Embedding(tensors["tokens"].float(), *parts)
        return EmbeddedPrompts(embedding, rows, texts, tensors["phrase_scale"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise EcgotError(f"prompts: {path} is damaged ({first_line(error)})") from error


def check_score(score: str | None, settings: AlignConfig) -> str:
    """The score to use; for None "phrase" if the run has learned phrases, else "cosine".

    Raises:
        EcgotError: the score is unknown, or the run does not support it.
    """
    if score is None:
        return "phrase" if settings.phrase_weight else "cosine"
    if score not in SCORES:
        raise EcgotError(f"score: expected one of {', '.join(SCORES)}, got {score!r}")
    if score == "phrase" and not settings.phrase_weight:
        others = ", ".join(SCORES[1:])
        raise EcgotError(f"score: expected one of {others} with align.phrase_weight=0, got 'phrase'")
    return score


def noisy_or(log_odds: Tensor) -> Tensor:
    """Log-odds [...] that at least one of K independent events happens, of their log-odds [..., K], K >= 1.

    log(expm1(sum softplus(l))), in a form that neither overflows nor cancels: the odds o of either of two
    events are a + b + a b.

    >>> noisy_or(torch.tensor([[0.0, 0.0], [-300.0, -300.0], [300.0, -300.0]]))  # the first: 3 to 1
    tensor([   1.0986, -299.3069,  300.0000])
    """
    return functools.reduce(
        lambda one, other: torch.logaddexp(torch.logaddexp(one, other), one + other), log_odds.unbind(-1)
    )


def scores_fingerprint(model: AlignmentModel, prompts: EmbeddedPrompts) -> str:
    """Hash of all that class scores depend on: a model's weights, and the prompts of each class."""
    rows = prompts.rows.items()
    texts = {g: {name: [prompts.texts[k] for k in each] for name, each in c.items()} for g, c in rows}
    return fingerprint(model, json.dumps(texts, sort_keys=True))


@torch.no_grad()
def class_scores(
    ecg: Embedding, prompts: EmbeddedPrompts, *, score: str = "phrase", transport: Transport | None = None
) -> dict[str, Tensor]:
    """Scores [B, C] of each group's classes.

    Args:
        ecg: B embedded ECGs. Each is scored on its own; nothing is normalised over the batch.
        prompts: of the classes.
        score: "phrase": log-odds that a report would contain at least one of the class's prompts, see
            :func:`noisy_or`. "cosine": similarity of the pooled embeddings, the mean over the prompts. "ot"
            (slower), "best_match", "mean_match": the same with a similarity of tokens, see
            :data:`ecgot.choices.TOKEN_SIMILARITIES`.
        transport: settings of "ot"; the defaults if omitted.
    """
    if score == "phrase":
        texts = prompts.embedding
        assert texts.prior is not None
        logits = phrase_logits(ecg.pooled, texts.pooled, texts.prior, prompts.phrase_scale)
        return _by_class(prompts, lambda rows: noisy_or(logits[:, rows]), ecg)
    if score == "cosine":
        similarity = ecg.pooled @ prompts.embedding.pooled.T
    elif score in TOKEN_SIMILARITIES:
        similarity = token_similarity(score, ecg, prompts.embedding, transport or Transport())
    else:
        raise EcgotError(f"score: expected one of {', '.join(SCORES)}, got {score!r}")
    return _by_class(prompts, lambda rows: similarity[:, rows].mean(1), ecg)


def _by_class(
    prompts: EmbeddedPrompts, score: Callable[[list[int]], Tensor], ecg: Embedding
) -> dict[str, Tensor]:
    """Scores [B, C] of each group; ``score`` maps the rows of a class's prompts to its scores [B]."""
    none = ecg.pooled.new_zeros(len(ecg.pooled), 0)  # for a group without classes
    return {
        group: torch.stack([score(rows) for rows in classes.values()], dim=1) if classes else none
        for group, classes in prompts.rows.items()
    }
