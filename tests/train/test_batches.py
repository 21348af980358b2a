"""Augmentation of batches."""

import torch

from ecgot.train.batches import augmented


def test_an_augmented_record_is_a_louder_or_quieter_stretch_of_itself():
    torch.manual_seed(0)
    time = torch.arange(1000.0)
    waveform = torch.sin(time / 7)[None, None].repeat(64, 12, 1)
    found, lengths = augmented(waveform, None)
    assert found.shape == (64, 12, 900)
    assert lengths is None
    heard = found.abs().amax(2) > 0
    assert 0.85 < heard.float().mean() < 0.98  # 8 % of leads are silent
    assert (found[~heard] == 0).all()
    # Somewhere in the record the stretch fits, but for amplitude and noise.
    stretches = waveform[0, 0].unfold(0, 900, 1)
    errors = []
    for record, leads in zip(found, heard, strict=True):
        lead = record[leads][0]
        gain = (stretches @ lead) / stretches.square().sum(1)
        errors.append((lead - gain[:, None] * stretches).square().mean(1).sqrt().min())
        assert 0.88 < gain.max() < 1.12
    assert max(errors) < 0.04


def test_lengths_follow_the_stretch():
    torch.manual_seed(0)
    lengths = torch.tensor([100, 60, 3])
    for _ in range(20):
        found, cut = augmented(torch.zeros(3, 2, 100), lengths)
        assert found.shape[2] == 90
        assert cut.tolist()[0] == 90
        assert 50 <= cut.tolist()[1] <= 60
        assert 1 <= cut.tolist()[2] <= 3


def test_the_same_seed_gives_the_same_augmentation():
    waveform = torch.ones(2, 12, 50)
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(augmented(waveform, None)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
