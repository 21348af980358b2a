"""Data that several tests share: synthetic data sets, real records if there are any, tiny models."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read on import: no test asks a hub, and an unknown name fails at once
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers share the cores; more threads would wait for each other

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

# Fixtures import what they need: the kernels' tests also run where wfdb and transformers are not installed.
if TYPE_CHECKING:
    from ecgot.data.dataset import EcgDataset


@pytest.fixture(scope="session")
def ptbxl() -> Path:
    """Folder with real PTB-XL records."""
    folder = os.environ.get("ECGOT_PTBXL")
    if not folder:
        pytest.skip("ECGOT_PTBXL is not set: no real PTB-XL records")
    return Path(folder)


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic data set of 900 records; do not write into it."""
    from ecgot.data.synth import write_dataset

    folder = tmp_path_factory.mktemp("synthetic") / "data"
    write_dataset(folder, records=900, seed=1)
    return folder


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic data set of 200 records, for runs that only test mechanics; do not write into it."""
    from ecgot.data.synth import write_dataset

    folder = tmp_path_factory.mktemp("few") / "data"
    write_dataset(folder, records=200, seed=2)
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that all tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def dataset(few: Path, cache_dir: Path) -> "EcgDataset":
    """The data set of 200 records, loaded."""
    from ecgot.data.dataset import load_dataset

    return load_dataset(few, cache_dir=cache_dir)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text encoder of two small layers with random weights, saved as Hugging Face does."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["sinus", "rhythm", "normal", "ecg", "left", "bundle", "branch", "block", "st", "wave"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", "-", *words, *letters]
    vocabulary += [f"##{letter}" for letter in letters]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocabulary)))
    tokenizer = BertTokenizerFast.from_pretrained(str(folder))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_settings(data: Path, tiny_bert: Path) -> list[str]:
    """Settings of a run that takes seconds."""
    return [
        f"data.root={data}",
        f"text.name={tiny_bert}",
        "encoder.name=resnet1d_tiny",
        "align.width=32",
        "align.epochs=2",
        "align.phrase_min_count=2",
        "report.hidden_size=48",
        "report.layers=1",
        "report.epochs=1",
    ]
