"""Augmentation of batches."""

import numpy as np
import pytest
import torch

from ecgot.data.baseline import remove_baseline
from ecgot.runs.config import DataConfig
from ecgot.train import batches
from ecgot.train.batches import augmented

TWO_LEADS = DataConfig(leads=("I", "II"))


@pytest.fixture
def steady(monkeypatch) -> None:
    """No wander, no offset, and all leads are there."""
    for name in ("OFFSET_MV", "WANDERING", "FEWER_LEADS"):
        monkeypatch.setattr(batches, name, 0.0)


def limb_errors(signal: torch.Tensor) -> torch.Tensor:
    """[B]: how far signal [B, 12, T] is from Einthoven's and Goldberger's laws, in mV."""
    one, two, three, avr, avl, avf = signal[:, :6].unbind(1)
    laws = torch.stack(
        [three - (two - one), avr + (one + two) / 2, avl - (one - two / 2), avf - (two - one / 2)]
    )
    return laws.abs().amax((0, 2))


@pytest.mark.usefixtures("steady")
def test_an_augmented_record_is_a_louder_or_quieter_stretch_of_itself():
    torch.manual_seed(0)
    time = torch.arange(1000.0)
    waveform = torch.sin(time / 7)[None, None].repeat(64, 12, 1)
    found, lengths = augmented(waveform, None)
    assert found.shape == (64, 12, 900)
    assert lengths is None
    heard = found.abs().amax(2) > 0
    # Somewhere in the record the stretch fits, but for amplitude and noise.
    stretches = waveform[0, 0].unfold(0, 900, 1)
    errors = []
    for record, leads in zip(found, heard, strict=True):
        lead = record[leads][0]
        gain = (stretches @ lead) / stretches.square().sum(1)
        errors.append((lead - gain[:, None] * stretches).square().mean(1).sqrt().min())
        assert 0.88 < gain.max() < 1.12
    assert max(errors) < 0.04


def test_a_silenced_lead_stays_zero_under_noise_wander_and_estimation():
    torch.manual_seed(0)
    found, _ = augmented(torch.randn(256, 12, 200), None)
    silent = (found == 0).all(2)
    assert 0.06 < silent.float().mean() < 0.10  # 8 % of leads
    assert (silent | (found != 0).all(2)).all()  # a lead is silent throughout or not at all


def test_lengths_follow_the_stretch():
    torch.manual_seed(0)
    lengths = torch.tensor([100, 60, 3])
    for _ in range(20):
        found, cut = augmented(torch.zeros(3, 2, 100), lengths, TWO_LEADS)
        assert found.shape[2] == 90
        assert cut.tolist()[0] == 90
        assert 50 <= cut.tolist()[1] <= 60
        assert 1 <= cut.tolist()[2] <= 3


def test_the_same_seed_gives_the_same_augmentation():
    waveform = torch.ones(32, 12, 50)  # so many that some wander and some have fewer leads
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(augmented(waveform, None)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("frequency", [0.05, 0.1, 0.3, 0.6])
def test_of_wander_the_part_is_added_that_the_high_pass_filter_leaves(monkeypatch, frequency):
    monkeypatch.setattr(batches, "WANDER_HZ", (frequency, frequency))
    monkeypatch.setattr(batches, "WANDERING", 1.0)
    monkeypatch.setattr(batches, "OFFSET_MV", 0.0)
    drawn = []
    for highpass_hz in (0.0, 0.3):
        torch.manual_seed(1)
        drawn.append(batches._wander(4, 3, 20_000, DataConfig(highpass_hz=highpass_hz)))
    added, left = drawn
    filtered = remove_baseline(added.double().numpy(), 100.0, 0.3)
    middle = slice(8000, 12_000)  # far from the ends, where the filter swings
    np.testing.assert_allclose(left.numpy()[..., middle], filtered[..., middle], atol=5e-3)
    assert added.abs().max() <= batches.WANDER_MV
    if frequency == 0.3:  # the cut-off
        torch.testing.assert_close(left.abs().max(), added.abs().max() / 2, atol=0, rtol=0.01)


def test_half_of_the_records_wander_and_every_lead_has_its_offset():
    torch.manual_seed(0)
    drawn = batches._wander(400, 12, 2000, DataConfig(highpass_hz=0.0))
    wanders = drawn.std(2).amax(1) > 1e-4
    assert 0.4 < wanders.float().mean() < 0.6
    still = drawn[~wanders][:, :, 0]
    assert still.std().item() == pytest.approx(batches.OFFSET_MV, rel=0.1)


def test_three_records_in_ten_have_leads_that_follow_from_fewer(monkeypatch):
    monkeypatch.setattr(batches, "SILENT_LEADS", 0.0)
    torch.manual_seed(0)
    waveform = torch.randn(400, 12, 50)  # obeys no law
    found, _ = augmented(waveform, None)
    follows = limb_errors(found) < 1e-4
    assert 0.22 < follows.float().mean() < 0.38
    assert limb_errors(found[~follows]).min() > 0.1


def test_leads_that_are_there_stay_as_they_are_and_chest_leads_are_estimated(monkeypatch):
    monkeypatch.setattr(batches, "FEWER_LEADS", 1.0)
    torch.manual_seed(0)
    waveform = torch.randn(300, 12, 50)
    found = batches._with_fewer_leads(waveform)
    assert limb_errors(found).max() < 1e-4
    same = (found - waveform).abs().amax(2) < 1e-4
    assert same[:, :2].any(1).all()  # lead I or II is always there
    both = same[:, :2].all(1)
    assert 0.4 < both.float().mean() < 0.6
    assert not same[:, 2:6].any()
    chest = same[:, 6:].sum(1)
    assert 0.45 < (chest == 0).float().mean() < 0.57  # half have no chest lead
    rank = torch.linalg.matrix_rank(found, atol=1e-3)
    torch.testing.assert_close(rank, same.sum(1))  # all else follows from those


def test_other_leads_than_the_standard_ones_are_not_estimated(monkeypatch):
    monkeypatch.setattr(batches, "FEWER_LEADS", 1.0)
    monkeypatch.setattr(batches, "SILENT_LEADS", 0.0)
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(augmented(torch.randn(8, 2, 50), None, TWO_LEADS)[0])
        monkeypatch.setattr(batches, "FEWER_LEADS", 0.0)
    assert torch.equal(*found)
