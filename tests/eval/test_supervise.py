"""Supervised baselines: crops, losses, resuming, what they leave behind and what they refuse."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from ecgot.choices import GROUPS
from ecgot.cli.main import cli
from ecgot.data.baseline import HIGHPASS_HZ
from ecgot.data.dataset import load_dataset
from ecgot.data.ptbxl import SUPERCLASSES, Labels
from ecgot.data.yes_no import read_yes_no
from ecgot.errors import EcgotError
from ecgot.eval.auroc import macro_auroc
from ecgot.eval.supervise import supervise
from ecgot.models.classifier import Classifier, crop_starts
from ecgot.models.encoders import encoder
from ecgot.runs.checkpoints import load_classifier
from ecgot.runs.config import resolve
from ecgot.runs.progress import Progress
from ecgot.runs.run import Run
from ecgot.train import supervised
from ecgot.train.stages import train
from ecgot.train.supervised import (
    Targets,
    class_loss,
    class_probabilities,
    initialise,
    labelled,
    one_cycle,
    random_crops,
    standard_scale,
)
from tests.conftest import small_settings

QUICK = {"encoder_name": "resnet1d_tiny", "epochs": 2, "resamples": 20}


class Stopped(Exception):
    pass


def stop_at(text: str) -> Progress:
    """Progress that interrupts the training at the first step after a note with ``text``."""
    heard: list[str] = []

    def bar(task: str, _done: int, _total: int) -> None:
        if heard and "epoch" in task:
            raise Stopped

    return Progress(bar, lambda line: heard.append(line) if text in line else None)


@pytest.fixture(scope="module")
def records(few, cache_dir):
    return load_dataset(few, highpass_hz=HIGHPASS_HZ, cache_dir=cache_dir)


@pytest.fixture(scope="module")
def aligned(few, tiny_bert, cache_dir, tmp_path_factory):
    """A run with a barely trained encoder."""
    config = resolve(None, [*small_settings(few, tiny_bert), "align.epochs=1"])
    return train(config, tmp_path_factory.mktemp("aligned") / "run", stages=["align"], cache_dir=cache_dir)


@pytest.fixture
def classifier() -> Classifier:
    """Random weights, and norms that have seen some data."""
    torch.manual_seed(0)
    made = Classifier(
        encoder("resnet1d_tiny"), {"superclass": SUPERCLASSES}, benchmark=True, crop=250, stride=125
    )
    initialise(made, "resnet1d_wang")
    made.mean.fill_(0.02)
    made.deviation.fill_(0.3)
    made.train()(torch.randn(32, 12, 250))
    return made.eval()


def with_length(dataset, row: int, length: int):
    """The data set with a record cut to ``length`` samples."""
    lengths, signals = dataset.all_lengths.copy(), np.array(dataset.signals_uv)
    lengths[dataset.index[row]] = length
    signals[dataset.index[row], :, length:] = 0
    return replace(dataset, all_lengths=lengths, signals_uv=signals)


def test_scores_are_the_largest_over_crops_at_each_stride(records, classifier):
    picked = records.select(range(5))
    starts = crop_starts(1000, 250, 125)
    assert starts == [0, 125, 250, 375, 500, 625, 750]
    scores = class_probabilities(classifier, picked, starts, 250, progress=Progress())
    signal = torch.from_numpy(picked.waveforms_mv(range(5)))
    with torch.no_grad():
        crops = torch.stack([classifier(signal[:, :, at : at + 250]).sigmoid() for at in starts])
    np.testing.assert_allclose(scores, crops.amax(0).numpy(), atol=1e-5)
    assert len(set(crops.argmax(0).flatten().tolist())) > 1  # no crop is the largest everywhere


@pytest.mark.parametrize(
    ("samples", "crop", "stride", "starts"),
    [(1000, 1000, 125, [0]), (600, 250, 125, [0, 125, 250]), (100, 250, 125, [0]), (500, 250, 250, [0, 250])],
)
def test_only_whole_crops_count_except_for_the_first(samples, crop, stride, starts):
    assert crop_starts(samples, crop, stride) == starts


@pytest.mark.parametrize(("length", "starts"), [(1000, 7), (630, 4), (249, 1), (100, 1)])
def test_a_records_score_does_not_depend_on_the_others(records, classifier, length, starts):
    mixed = with_length(records.select(range(9)), 3, length)
    every = crop_starts(1000, 250, 125)
    scores = class_probabilities(classifier, mixed, every, 250, progress=Progress())
    alone = class_probabilities(classifier, mixed.select([3]), every[:starts], 250, progress=Progress())
    np.testing.assert_allclose(scores[3], alone[0], atol=1e-5)
    cut = torch.from_numpy(mixed.waveforms_mv([3]))[:, :, :length]
    with torch.no_grad():
        crops = torch.stack([classifier(cut[:, :, at : at + 250]).sigmoid() for at in every[:starts]])
    np.testing.assert_allclose(scores[3], crops.amax(0)[0].numpy(), atol=1e-5)


def test_random_crops_are_stretches_of_each_record_within_its_length():
    counted = torch.arange(400).repeat(64, 1, 1) + 1000 * torch.arange(64)[:, None, None]
    lengths = torch.full((64,), 400)
    lengths[:8], lengths[8] = 130, 60
    torch.manual_seed(0)
    crops, left = random_crops(counted, lengths, 100)
    assert crops.shape == (64, 1, 100)
    start = crops[:, 0, 0] - 1000 * torch.arange(64)
    assert torch.equal(crops[:, 0], counted[:, 0, :100] + start[:, None])
    assert left.tolist() == [100] * 8 + [60] + [100] * 55
    assert start[8] == 0
    assert start[:8].max() <= 30
    assert start[9:].max() > 200
    assert len(start.unique()) > 30
    every = torch.cat([random_crops(counted[:, :, :102], None, 100)[0][:, 0, 0] for _ in range(9)])
    assert (every % 1000).unique().tolist() == [0, 1, 2]  # the last start too


def test_a_head_sees_only_tokens_that_cover_signal(classifier):
    signal = torch.randn(2, 12, 250)
    padded = torch.cat([signal, torch.full((2, 12, 150), 7.0)], 2)
    with torch.no_grad():
        expected, found = classifier(signal), classifier(padded, torch.tensor([250, 250]))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(classifier(padded), expected, atol=1e-2)


def test_the_benchmarks_head_reads_the_mean_and_the_maximum(classifier):
    signal = torch.randn(3, 12, 250)
    with torch.no_grad():
        tokens = classifier.encoder((signal - 0.02) / 0.3).tokens
        pooled = torch.cat([tokens.mean(1), tokens.amax(1)], 1)
        torch.testing.assert_close(classifier(signal), classifier.head(pooled))
    kinds = [type(layer).__name__ for layer in classifier.head]
    assert kinds == ["BatchNorm1d", "Dropout", "Linear", "ReLU", "BatchNorm1d", "Dropout", "Linear"]
    assert [classifier.head[1].p, classifier.head[5].p] == [0.25, 0.5]


def test_labels_of_unlabelled_records_carry_no_gradient():
    torch.manual_seed(0)
    logits = torch.randn(4, 3, requires_grad=True)
    truth = torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 1]])
    counted = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 1, 1]]).bool()
    loss = class_loss(logits, truth, counted)
    loss.backward()
    assert torch.equal(logits.grad != 0, counted)
    by_hand = [
        math.log1p(math.exp(-value if label else value))
        for value, label in zip(logits[counted].tolist(), truth[counted].tolist(), strict=True)
    ]
    assert loss.item() == pytest.approx(sum(by_hand) / 6)
    assert class_loss(logits, truth, torch.zeros_like(counted)).item() == 0


def test_targets_lay_groups_side_by_side_and_count_labelled_records(records):
    targets = Targets.of(records, GROUPS)
    column = 0
    for group in GROUPS:
        matrix = records.labels(group).matrix
        part = slice(column, column + matrix.shape[1])
        np.testing.assert_array_equal(targets.matrix[:, part], matrix)
        np.testing.assert_array_equal(targets.counted[:, part].all(1), matrix.any(1))
        np.testing.assert_array_equal(targets.counted[:, part].any(1), matrix.any(1))
        column = part.stop
    assert targets.matrix.shape[1] == column
    assert not targets.counted.all()


def test_records_without_a_label_in_the_group_take_no_part(records):
    matrix = records.labels("form").matrix
    kept, targets = labelled(records, Targets.of(records, ("form",)))
    assert 0 < len(kept) < len(records)
    np.testing.assert_array_equal(kept.table.ecg_id, records.table.ecg_id[matrix.any(1)])
    np.testing.assert_array_equal(targets.matrix, matrix[matrix.any(1)])
    bare = replace(records, table=replace(records.table, codes=(frozenset(),) * len(records)))
    with pytest.raises(EcgotError, match=r"data: .*got 0"):
        labelled(bare, Targets.of(bare, ("form", "rhythm")))


def test_the_scale_is_that_of_all_samples_of_all_leads(records):
    picked = with_length(records.select(range(150)), 2, 400)
    kept = [picked.waveforms_mv([row])[0, :, :length] for row, length in enumerate(picked.lengths)]
    flat = np.concatenate([signal.ravel() for signal in kept]).astype(np.float64)
    assert standard_scale(picked) == pytest.approx((flat.mean(), flat.std()), rel=1e-6)


def test_the_defaults_are_the_benchmark_s_protocol():
    """Strodthoff et al. 2021: 50 epochs of batches of 128, crops of 2.5 s, one cycle up to a rate of 0.01."""
    settings = supervised.benchmark_config()
    assert (settings.epochs, settings.batch_size, settings.crop_seconds) == (50, 128, 2.5)
    assert settings.learning_rate == settings.encoder_learning_rate == settings.weight_decay == 1e-2
    assert settings.groups == ("superclass",)


def test_a_last_batch_that_is_not_full_is_left_out_unless_it_is_the_only():
    settings = supervised.benchmark_config()
    assert [len(rows) for rows in supervised._batches(300, settings, 0, 0)] == [128, 128]
    assert [len(rows) for rows in supervised._batches(100, settings, 0, 0)] == [100]


def test_fine_tuning_has_two_rates_and_decays_matrices_alone(aligned, classifier):
    settings = supervised.fine_tuning_config(aligned)
    groups = supervised._parameter_groups(classifier, settings)
    by_id = {id(p): group for group in groups for p in group["params"]}
    assert len(by_id) == len(list(classifier.parameters()))
    for name, parameter in classifier.named_parameters():
        group = by_id[id(parameter)]
        assert group["lr"] == (1e-3 if name.startswith("head.") else 3e-4), name
        assert ("weight_decay" in group) == (parameter.dim() == 1), name
    every = supervised._parameter_groups(classifier, supervised.benchmark_config())
    assert sum(len(group["params"]) for group in every) == len(by_id)
    assert all(group["betas"][1] == 0.99 and "weight_decay" not in group for group in every)


def test_the_benchmarks_encoders_begin_with_its_weights_and_others_with_their_own():
    torch.manual_seed(0)
    made = Classifier(encoder("xresnet1d101"), {"superclass": SUPERCLASSES}, benchmark=True)
    zeros = [m for m in made.encoder.modules() if hasattr(m, "running_mean") and not m.weight.any()]
    assert zeros  # the encoder's own
    initialise(made, "xresnet1d101")
    assert all(bool((norm.weight == 1).all()) for norm in zeros)
    last = made.head[-1]
    assert last.weight.std().item() == pytest.approx((2 / 128) ** 0.5, rel=0.1)
    assert not last.bias.any()
    own = Classifier(encoder("resnet1d_tiny"), {"superclass": SUPERCLASSES}, benchmark=True)
    before = own.encoder.conv1.weight.clone()
    initialise(own, "resnet1d_tiny")
    assert torch.equal(own.encoder.conv1.weight, before)
    assert not own.head[-1].bias.any()


def test_one_cycle_raises_the_rate_as_the_momentum_falls():
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([{"params": [weight], "lr": 1e-2, "betas": (0.95, 0.99)}])
    schedule = one_cycle(optimizer, 1000)
    rates, betas = [], []
    for _ in range(1000):
        rates.append(optimizer.param_groups[0]["lr"])
        betas.append(optimizer.param_groups[0]["betas"])
        optimizer.step()
        schedule.step()
    top = rates.index(max(rates))
    assert top == pytest.approx(300, abs=1)
    assert (rates[0], rates[top], rates[-1]) == pytest.approx((1e-2 / 25, 1e-2, 1e-2 / 25e4))
    assert betas[0] == pytest.approx((0.95, 0.99))
    assert betas[top] == pytest.approx((0.85, 0.99))
    assert betas[-1] == pytest.approx((0.95, 0.99))
    assert rates[650] == pytest.approx(1e-2 / 2, rel=0.01)  # half-way down


def test_a_baseline_leaves_an_evaluation_that_its_weights_give(few, records, tmp_path, cache_dir):
    out = tmp_path / "run"
    found = supervise(few, out, seed=3, folds=(9, 10), cache_dir=cache_dir, **QUICK)
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "evaluation.json",
        "metrics.jsonl",
        "supervised.json",
        "supervised.safetensors",
    ]
    saved = json.loads((out / "evaluation.json").read_text())
    assert saved == json.loads(json.dumps(found.to_dict()))
    told = {name: saved[name] for name in ("kind", "encoder", "from", "group", "seed", "epochs", "folds")}
    assert told == {
        "kind": "supervised",
        "encoder": "resnet1d_tiny",
        "from": None,
        "group": "superclass",
        "seed": 3,
        "epochs": 2,
        "folds": [9, 10],
    }
    lines = Run(out).metrics()
    assert saved["seconds"] == pytest.approx(sum(line["seconds"] for line in lines))
    assert [line["epoch"] for line in lines] == [1, 2]
    assert all(0 <= line["validation_auroc_superclass"] <= 1 for line in lines)
    held_out = records.folds((9, 10))
    assert saved["records"] == len(held_out)
    loaded = load_classifier(Run.open(out))
    training = records.folds(range(1, 9))
    training, _ = labelled(training, Targets.of(training, ("superclass",)))
    assert (loaded.mean.item(), loaded.deviation.item()) == pytest.approx(standard_scale(training))
    scores = class_probabilities(loaded, held_out, crop_starts(1000, 250, 125), 250, progress=Progress())
    again = macro_auroc(scores, held_out.labels("superclass"), held_out.table.patient_id, resamples=20)
    assert saved["ranking"].keys() == {"superclass"}
    assert saved["ranking"]["superclass"]["macro"] == pytest.approx(again.macro)
    assert saved["ranking"]["superclass"]["auroc"] == pytest.approx(again.auroc)


@pytest.mark.parametrize("fine_tuned", [False, True])
def test_an_interrupted_training_resumes_to_the_same_weights(
    few, aligned, tmp_path, cache_dir, fine_tuned, monkeypatch
):
    options = {"epochs": 2, "resamples": 20, "cache_dir": cache_dir}
    options |= {"start": aligned} if fine_tuned else {"encoder_name": "resnet1d_tiny"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = supervise(few, whole, **options)
    with pytest.raises(Stopped):
        supervise(few, cut, progress=stop_at("epoch 1/2"), **options)
    assert not (cut / "evaluation.json").exists()
    with monkeypatch.context() as patch:  # in its own settings, the run that it started from may be gone
        patch.setattr(supervised, "load_alignment", None)
        found = supervise(few, cut, resume=True, resamples=20, cache_dir=cache_dir)
    assert found.results == expected.results
    first, second = (load_file(out / "supervised.safetensors") for out in (whole, cut))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=0, rtol=0, msg=name)
    other = supervise(few, tmp_path / "other", seed=1, **options)
    assert other.results != expected.results


def test_an_aligned_encoder_is_fine_tuned_on_every_group(few, aligned, tmp_path, cache_dir):
    out = tmp_path / "run"
    found = supervise(few, out, start=aligned, epochs=1, resamples=20, cache_dir=cache_dir)
    assert tuple(found.results) == GROUPS
    saved = json.loads((out / "evaluation.json").read_text())
    assert (saved["from"], saved["group"]) == (str(aligned.folder.resolve()), "all")
    assert saved["encoder"] == aligned.config().encoder.name
    before = load_file(aligned.folder / "align.safetensors")
    after = load_file(out / "supervised.safetensors")
    assert after["head.weight"].shape[0] == sum(len(r.classes) for r in _labels(few, cache_dir))
    moved = (after["encoder.conv1.weight"] - before["encoder.conv1.weight"]).abs().max()
    assert 0 < moved < 0.05  # begins there, and goes on


def _labels(root, cache_dir):
    dataset = load_dataset(root, cache_dir=cache_dir)
    return [dataset.labels(group) for group in GROUPS]


def test_a_finished_training_is_evaluated_on_other_folds_without_training(
    few, tmp_path, cache_dir, monkeypatch
):
    out = tmp_path / "run"
    first = supervise(few, out, cache_dir=cache_dir, **QUICK)
    monkeypatch.setattr(supervised, "train_epochs", None)
    again = supervise(few, out, resume=True, cache_dir=cache_dir, **QUICK)
    other = supervise(few, out, resume=True, folds=(10,), cache_dir=cache_dir, **QUICK)
    assert again == first
    assert other.folds == (10,)
    assert json.loads((out / "evaluation.json").read_text())["folds"] == [10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": (9, 8)}, "folds: expected held-out folds, got fold 8"),
        ({"group": "shape"}, "group: expected one of superclass, subclass, form, rhythm, all, got 'shape'"),
        ({"encoder_name": "vgg"}, r"encoder\.name: .*'vgg'"),
        ({"epochs": 0}, "epochs: expected an integer >= 1, got 0"),
        ({"seed": -1}, "seed: expected an integer >= 0, got -1"),
    ],
)
def test_what_cannot_be_used_is_refused_and_leaves_no_folder(few, tmp_path, cache_dir, options, message):
    with pytest.raises(EcgotError, match=message):
        supervise(few, tmp_path / "run", cache_dir=cache_dir, **QUICK | options)
    assert not (tmp_path / "run").exists()


def test_another_training_in_the_folder_is_refused(few, aligned, tmp_path, cache_dir):
    out = tmp_path / "run"
    with pytest.raises(EcgotError, match=r"encoder: expected .* got 'resnet1d' and a run"):
        supervise(few, out, encoder_name="resnet1d", start=aligned, cache_dir=cache_dir)
    supervise(few, out, cache_dir=cache_dir, **QUICK)
    with pytest.raises(EcgotError, match="already holds a run"):
        supervise(few, out, cache_dir=cache_dir, **QUICK)
    with pytest.raises(EcgotError, match=r"another configuration \(epochs: 2 against 3\)"):
        supervise(few, out, cache_dir=cache_dir, resume=True, **QUICK | {"epochs": 3})
    with pytest.raises(EcgotError, match=r"another configuration \(seed: 0 against 1\)"):
        supervise(few, out, cache_dir=cache_dir, resume=True, seed=1, **QUICK)
    (out / "supervised.json").unlink()
    with pytest.raises(EcgotError, match=r"holds no supervised\.json: nothing was trained"):
        supervise(few, out, cache_dir=cache_dir, resume=True)
    with pytest.raises(EcgotError, match=r"holds a run of ecgot train"):
        supervise(few, aligned.folder, start=aligned, resume=True, cache_dir=cache_dir)


def test_the_command_line_prints_the_score_and_what_this_is_not(few, tmp_path, cache_dir):
    arguments = ["supervise", "--data", str(few), "--out", str(tmp_path / "run"), "--epochs", "1"]
    arguments += ["--encoder", "resnet1d_tiny", "--group", "rhythm", "--cache", str(cache_dir)]
    result = CliRunner().invoke(cli, [*arguments, "--resamples", "20"], catch_exceptions=False)
    assert result.exit_code == 0
    saved = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert f"{saved['ranking']['rhythm']['macro']:.3f}" in result.output
    assert "not a medical device" in result.output
    result = CliRunner().invoke(cli, [*arguments, "--resume", "--json", "--resamples", "20"])
    assert json.loads(result.stdout)["ranking"] == saved["ranking"]


def test_a_run_that_is_not_aligned_is_refused_before_anything_is_made(few, tmp_path):
    start = Run.create(tmp_path / "start", resolve(None, [f"data.root={few}"]), resume=False)
    with pytest.raises(EcgotError, match=r"from: expected a run with a trained stage align, got .*start"):
        supervise(few, tmp_path / "out", start=start)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def own(few, records, tmp_path) -> Path:
    """Labels of two codes: every fifth cell of the second is unknown, and three records are not named."""
    table = records.table
    codes = [code for code in ("CLBBB", "AFIB", "NORM") if sum(code in each for each in table.codes) > 9][:2]
    lines = [f"ecg_id,{','.join(codes)}"]
    for row, (ecg_id, stated) in enumerate(zip(table.ecg_id, table.codes, strict=True)):
        if row >= 3:
            cells = [str(int(code in stated)) for code in codes]
            lines.append(f"{ecg_id},{cells[0]},{'' if row % 5 == 0 else cells[1]}")
    path = tmp_path / "labels.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_own_labels_are_learned_from_yes_and_no_alike(few, records, aligned, own, tmp_path, cache_dir):
    out, notes = tmp_path / "run", []
    progress = Progress(note=notes.append)
    options = {"start": aligned, "labels_csv": own, "epochs": 1, "resamples": 20, "cache_dir": cache_dir}
    found = supervise(few, out, progress=progress, **options)
    labels = read_yes_no(own)
    held_out = records.folds((9,))
    answers = labels.of(held_out.table)
    result = found.results["labels"]
    assert found.group == "labels"
    assert result.records == int((answers >= 0).any(1).sum())
    for column, name in enumerate(labels.classes):
        assert result.positives[name] == int((answers[:, column] == 1).sum())
        assert result.negatives[name] == int((answers[:, column] == 0).sum())
        assert result.intervals[name][0] <= result.auroc[name] <= result.intervals[name][1]
    classifier = load_classifier(Run.open(out))
    assert classifier.classes == {"labels": labels.classes}
    signal = torch.from_numpy(held_out.waveforms_mv(range(len(held_out))))
    logits = classifier.class_logits(signal)["labels"].numpy()
    again = macro_auroc(
        logits,
        Labels(labels.classes, answers == 1),
        held_out.table.patient_id,
        known=answers >= 0,
        resamples=20,
    )
    assert result.auroc == pytest.approx(again.auroc)
    training = records.folds(range(1, 9))
    left_out = int((labels.of(training.table) < 0).all(1).sum())
    assert any(f"{left_out} of {len(training)} training records" in line for line in notes)
    again = supervise(few, out, labels_csv=own, resume=True, resamples=20, cache_dir=cache_dir)
    assert again.results == found.results


def test_a_no_counts_and_what_is_unknown_does_not(records, own):
    labels = read_yes_no(own)
    kept, targets = labelled(records, Targets.of_own(records, labels))
    assert len(kept) == len(records) - 3
    answers = labels.of(kept.table)
    np.testing.assert_array_equal(targets.counted, answers != -1)
    np.testing.assert_array_equal(targets.matrix, answers == 1)
    assert (~targets.matrix.any(1)).sum() > 20  # records with nothing but no


def test_labels_that_cannot_be_learned_are_refused(few, records, own, tmp_path, cache_dir):
    options = QUICK | {"cache_dir": cache_dir}
    with pytest.raises(EcgotError, match="group: expected a group or a CSV of labels"):
        supervise(few, tmp_path / "run", group="form", labels_csv=own, **options)
    ids = records.table.ecg_id
    always = tmp_path / "always.csv"
    always.write_text("ecg_id,there\n" + "".join(f"{number},1\n" for number in ids))
    with pytest.raises(
        EcgotError, match=r"labels: expected a 1 and a 0 .* got \d+ times 1 and 0 times 0 of 'there'"
    ):
        supervise(few, tmp_path / "run", labels_csv=always, **options)
    other = tmp_path / "other.csv"
    other.write_text("ecg_id,there\n900001,1\n900002,0\n")
    with pytest.raises(EcgotError, match="2 or more training records labelled in labels, got 0"):
        supervise(few, tmp_path / "run", labels_csv=other, **options)
    assert not (tmp_path / "run").exists()
    supervise(few, tmp_path / "run", labels_csv=own, **options)
    with pytest.raises(EcgotError, match="another configuration"):
        supervise(few, tmp_path / "run", labels_csv=always, resume=True, **options)
    own.write_text(own.read_text().replace(",", ",new ", 1))
    with pytest.raises(EcgotError, match=r"out: expected the classes that .* was trained on"):
        supervise(few, tmp_path / "run", labels_csv=own, resume=True, **options)


def test_records_that_a_group_leaves_out_are_counted_aloud(few, records, tmp_path, cache_dir):
    notes: list[str] = []
    supervise(
        few,
        tmp_path / "run",
        group="form",
        cache_dir=cache_dir,
        progress=Progress(note=notes.append),
        **QUICK,
    )
    training = records.folds(range(1, 9))
    without = int((~training.labels("form").matrix.any(1)).sum())
    assert without > 0
    said = [line for line in notes if "have no label in form and are left out" in line]
    assert len(said) == 1
    assert f"data: {without} of {len(training)} training records" in said[0]


@pytest.mark.parametrize("length", [1000, 630, 100])
def test_logits_to_read_with_are_those_of_the_evaluation(records, classifier, length):
    mixed = with_length(records.select(range(6)), 3, length)
    crop, starts = classifier.crops(1000)
    assert (crop, starts) == (250, [0, 125, 250, 375, 500, 625, 750])
    expected = class_probabilities(classifier, mixed, starts, crop, progress=Progress())
    signal, lengths = torch.from_numpy(mixed.waveforms_mv(range(6))), torch.from_numpy(mixed.lengths)
    for reading in (classifier, classifier.fused()):
        found = reading.class_logits(signal, lengths)
        assert found.keys() == {"superclass"}
        np.testing.assert_allclose(found["superclass"].sigmoid().numpy(), expected, atol=1e-5)


def test_logits_are_given_by_group():
    torch.manual_seed(0)
    made = Classifier(encoder("resnet1d_tiny"), {"a": ("x", "y"), "b": ("z",)}, benchmark=False).eval()
    signal = torch.randn(2, 12, 300)
    found = made.class_logits(signal)
    whole = made(signal).detach()
    torch.testing.assert_close(found["a"], whole[:, :2])
    torch.testing.assert_close(found["b"], whole[:, 2:])


def test_few_records_are_seen_more_often_until_the_head_has_learned(aligned):
    settings = supervised.fine_tuning_config(aligned)
    assert supervised.for_few(settings, 17_000) == settings
    few = supervised.for_few(settings, 40)
    assert (few.batch_size, few.epochs) == (16, 200)
    some = supervised.for_few(settings, 1000)
    assert (some.batch_size, some.epochs) == (62, 25)


def test_settings_that_are_damaged_or_absent_are_named(few, aligned, tmp_path, cache_dir):
    with pytest.raises(
        EcgotError, match=r"run: expected a folder of ecgot supervise, got .*supervised\.json"
    ):
        load_classifier(aligned)
    out = tmp_path / "run"
    supervise(few, out, cache_dir=cache_dir, **QUICK)
    for text in ("{", "[]", '{"classes": 3}', '{"classes": {}, "colour": 1}'):
        (out / "supervised.json").write_text(text)
        with pytest.raises(EcgotError, match="run: expected the settings of a supervised run") as caught:
            load_classifier(Run.open(out))
        assert "\n" not in str(caught.value)
