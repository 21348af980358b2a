"""Zero-shot detection: how near an ECG lies to each class's report-like prompts."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ecgot.data.ptbxl import GROUPS
from ecgot.errors import EcgotError
from ecgot.models.alignment import AlignmentModel, Embedding, transport_similarity
from ecgot.models.text import TextEncoder
from ecgot.train.config import AlignConfig

BUILT_IN = Path(__file__).with_name("prompts.toml")
SCORES = ("cosine", "ot")

Prompts = Mapping[str, Mapping[str, tuple[str, ...]]]  # group -> class -> texts


@dataclass(frozen=True)
class EmbeddedPrompts:
    """Every distinct prompt's embedding [K, ...], and the rows of each class's prompts by group."""

    embedding: Embedding
    rows: dict[str, dict[str, list[int]]]


def read_prompts(path: Path = BUILT_IN) -> Prompts:
    """Prompts by group and class from a TOML file like the built-in one.

    Raises:
        EcgotError: the file is missing or is not of this form.
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
            raise EcgotError(f"prompts: {path} holds {group!r}, accepted are tables {', '.join(GROUPS)}")
        for name, texts in table.items():
            if not (isinstance(texts, list) and texts and all(isinstance(t, str) and t for t in texts)):
                raise EcgotError(f"prompts: {group}.{name} of {path} is not a list of one or more texts")
        prompts[group] = {name: tuple(texts) for name, texts in table.items()}
    return prompts


def select_prompts(prompts: Prompts, group: str, classes: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The prompts of the given classes.

    Raises:
        EcgotError: a class has none.
    """
    known = prompts.get(group, {})
    unknown = [name for name in classes if name not in known]
    if unknown:
        raise EcgotError(
            f"prompts: no prompt for {group} class {unknown[0]!r}, there are {', '.join(known) or 'none'}"
        )
    return {name: known[name] for name in classes}


@torch.no_grad()
def embed_prompts(
    model: AlignmentModel, text: TextEncoder, prompts: Mapping[str, Mapping[str, tuple[str, ...]]]
) -> EmbeddedPrompts:
    """Embed every distinct prompt once."""
    texts = sorted({t for classes in prompts.values() for texts in classes.values() for t in texts})
    number = {t: row for row, t in enumerate(texts)}
    rows = {
        group: {name: [number[t] for t in texts] for name, texts in classes.items()}
        for group, classes in prompts.items()
    }
    return EmbeddedPrompts(model.embed_text(text.eval()(texts)), rows)


@torch.no_grad()
def class_scores(
    ecg: Embedding, prompts: EmbeddedPrompts, *, score: str = "cosine", transport: AlignConfig | None = None
) -> dict[str, Tensor]:
    """Scores [B, C] of each group: the mean over a class's prompts of the similarity to the ECG.

    Args:
        ecg: B embedded ECGs. Each is scored alone: nothing is normalised over the batch.
        score: "cosine" of the pooled embeddings, or "ot", minus the transport cost between the ECG's tokens
            and the prompt's (slower).
        transport: the run's transport settings; the defaults where omitted.
    """
    if score == "cosine":
        similarity = ecg.pooled @ prompts.embedding.pooled.T
    elif score == "ot":
        settings = transport or AlignConfig()
        similarity = transport_similarity(
            ecg,
            prompts.embedding,
            eps=settings.ot_eps,
            max_iter=settings.ot_max_iter,
            tol=settings.ot_tol,
        )
    else:
        raise EcgotError(f"score: got {score!r}, accepted are {' and '.join(SCORES)}")
    return {
        group: torch.stack([similarity[:, rows].mean(1) for rows in classes.values()], dim=1)
        for group, classes in prompts.rows.items()
    }
