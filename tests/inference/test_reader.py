"""Which encoder reads a record, and what is read of a short one."""

from pathlib import Path

import numpy as np
import pytest
import torch
import wfdb

import ecgot
from ecgot.data.ptbxl import read_table
from ecgot.data.record import read_record
from ecgot.inference.reader import Reader
from ecgot.inference.zeroshot import class_scores


@pytest.fixture(scope="module")
def reader() -> Reader:
    return ecgot.load_pretrained(num_beams=1)


def test_the_fused_copy_reads_and_not_the_model_s_encoder(reader, few: Path, monkeypatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise AssertionError("the encoder whose norms are not fused was asked")

    monkeypatch.setattr(reader.model.encoder, "forward", refuse)
    assert reader.read(few / read_table(few).record_paths[0]).report


def test_a_short_record_is_read_without_its_padding(reader, few: Path, tmp_path: Path) -> None:
    signal = read_record(few / read_table(few).record_paths[0]).signal_mv[:, :600]
    wfdb.wrsamp(
        "short",
        fs=100,
        units=["mV"] * 12,
        sig_name=list(reader.config.data.leads),
        d_signal=np.rint(signal.T * 1000).astype(np.int64),
        fmt=["16"] * 12,
        adc_gain=[1000] * 12,
        baseline=[0] * 12,
        write_dir=str(tmp_path),
    )
    reading = reader.read(tmp_path / "short")
    assert any("6 s, shorter than the 10 s" in note for note in reading.notes)
    with torch.no_grad():
        alone = reader.model.embed_ecg(torch.from_numpy(read_record(tmp_path / "short").signal_mv)[None])
        expected = class_scores(alone, reader.prompts, score=reader.score)
    for group, scores in reading.scores.items():
        np.testing.assert_allclose(list(scores.values()), expected[group][0].numpy(), atol=1e-3)
