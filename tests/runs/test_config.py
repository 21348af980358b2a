"""Settings: defaults, file, overrides, in this order; and every mistake named."""

import json

import pytest

from ecgot.errors import EcgotError
from ecgot.runs.config import Config, differences, from_json, parse_folds, resolve


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text("seed = 5\n[align]\nepochs = 3\ntoken_weight = 0.25\n[data]\ntrain_folds = [1, 2]\n")
    config = resolve(path, ["align.epochs=7", "data.validation_folds=8-9", "text.train=true"])
    assert (config.seed, config.align.epochs, config.align.token_weight) == (5, 7, 0.25)
    assert (config.data.train_folds, config.data.validation_folds) == ((1, 2), (8, 9))
    assert config.text.train is True
    assert config.report == Config().report


def test_a_run_s_config_json_is_a_config_file(tmp_path):
    config = resolve(None, ["align.learning_rate=1e-3", "data.leads=I,II,V1"])
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert resolve(path) == config == from_json(path.read_text())
    assert json.loads(path.read_text())["data"]["leads"] == ["I", "II", "V1"]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("align.epoch=3", ["unknown", "align.epoch", "epochs"]),
        ("nothing.x=3", ["unknown", "nothing", "align"]),
        ("align.epochs", ["KEY=VALUE"]),
        ("align.epochs=2.5", ["align.epochs", "2.5", "int"]),
        ("align.epochs=0", ["align.epochs", "> 0"]),
        ("align.token_weight=-1", ["align.token_weight", ">= 0"]),
        ("align.ot_eps=nan", ["align.ot_eps"]),
        ("align.learning_rate=fast", ["align.learning_rate", "fast"]),
        ("text.train=maybe", ["text.train", "maybe"]),
        ("data.train_folds=1,x", ["data.train_folds"]),
        ("data.train_folds=8-9", ["folds [9]"]),
        ("data.max_bad_share=2", ["data.max_bad_share"]),
        ("align.batch_size=1", ["align.batch_size"]),
        ("report.batch_size=1", ["report.batch_size"]),
        ("report.hidden_size=145", ["report.hidden_size", "145"]),
        ("data.train_folds=", ["data.train_folds"]),
        ("data.leads=[]", ["data.leads"]),
        ("align=3", ["align: expected a section of settings, got '3'"]),
        ("seed.x=1", ["seed"]),
    ],
)
def test_bad_overrides_are_named_in_one_line(override, parts):
    with pytest.raises(EcgotError) as caught:
        resolve(None, [override])
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_a_run_without_any_loss_is_refused():
    with pytest.raises(EcgotError, match="nothing to learn"):
        resolve(None, ["align.token_weight=0", "align.phrase_weight=0", "align.contrastive_weight=0"])


@pytest.mark.parametrize("content", ["seed = ", "\x00", "[align]\nepochs = true"])
def test_bad_files_are_named(tmp_path, content):
    path = tmp_path / "c.toml"
    path.write_text(content)
    with pytest.raises(EcgotError):
        resolve(path)
    with pytest.raises(EcgotError, match="cannot be read"):
        resolve(tmp_path / "absent.toml")


@pytest.mark.parametrize("content", ["[1]", "3", '"align"', "null"])
def test_json_that_is_no_table_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(EcgotError, match="config: expected a table of settings") as caught:
        resolve(tmp_path / "config.json", ["align.epochs=3"])
    assert "\n" not in str(caught.value)


def test_the_average_of_the_weights_must_forget():
    with pytest.raises(EcgotError, match=r"align\.average: expected a number >= 0 below 1, got 1\.0"):
        resolve(None, ["align.average=1"])


def test_folds():
    assert parse_folds("9") == (9,)
    assert parse_folds("1-3,8, 10") == (1, 2, 3, 8, 10)
    with pytest.raises(EcgotError, match="folds"):
        parse_folds("nine")


def test_differences_name_the_settings():
    changed = resolve(None, ["align.width=8", "seed=3", "device=cpu", "cuda_graph=true"])
    assert differences(Config(), changed) == ["seed: 0 against 3", "align.width: 256 against 8"]
    assert differences(changed, changed) == []


def test_a_record_shorter_than_a_sample_is_refused():
    with pytest.raises(EcgotError, match=r"data\.seconds: expected at least one sample's time, got 0\.001"):
        resolve(None, ["data.seconds=0.001"])
