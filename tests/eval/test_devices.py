"""Reports in the words of a recorder: what is learned, told, kept and refused."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from ecgot.errors import EcgotError
from ecgot.eval.evaluate import evaluate
from ecgot.eval.export import export
from ecgot.eval.reading import Reader
from ecgot.eval.reports import shuffled
from ecgot.train.config import resolve
from ecgot.train.run import Run
from ecgot.train.stages import train
from tests.conftest import small_settings

DEVICES = ("CS-12", "AT-6")
LEARN = ("report.epochs=12", "report.batch_size=8", "report.learning_rate=5e-3", "report.max_tokens=24")


@pytest.fixture(scope="module")
def recorded(few, tmp_path_factory):
    """The records of ``few`` by two recorders, each of which ends its reports by words of its own, a third
    with too few to be known, and by none."""
    folder = tmp_path_factory.mktemp("recorded") / "data"
    folder.mkdir()
    for source in few.iterdir():
        if source.name != "ptbxl_database.csv":
            (folder / source.name).symlink_to(source)
    table = pd.read_csv(few / "ptbxl_database.csv", dtype=str, keep_default_na=False)
    names = np.array([*DEVICES, ""], dtype=object)[np.arange(len(table)) % 3]
    names[:2] = "rare"
    ending = {"CS-12": "read by the program", "AT-6": "confirmed", "": "", "rare": ""}
    table["device"] = names
    table["report"] = [f"sinus rhythm. {ending[name]}" for name in names]
    table.to_csv(folder / "ptbxl_database.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def run(recorded, tiny_bert, cache_dir, tmp_path_factory) -> Run:
    settings = [*small_settings(recorded, tiny_bert), "align.epochs=1", *LEARN]
    return train(resolve(None, settings), tmp_path_factory.mktemp("devices") / "run", cache_dir=cache_dir)


def test_reports_take_the_words_of_the_device(run, recorded, tmp_path):
    assert json.loads((run.folder / "devices.json").read_text()) == ["AT-6", "CS-12"]  # the rare one is not
    record = next((recorded / "records100").rglob("*.hea")).with_suffix("")
    exported = tmp_path / "exported"
    export(run, exported)
    assert "told one: AT-6, CS-12" in (exported / "README.md").read_text()
    for reader in (Reader(run), Reader(Run.open(exported))):
        assert reader.devices == ("AT-6", "CS-12")
        assert "confirmed" in (reader.read(record, device="AT-6").report or "")
        assert "program" in (reader.read(record, device="CS-12").report or "")
        assert reader.read(record).report == reader.read(record, device=None).report
        with pytest.raises(EcgotError, match=r"device: got 'rare', accepted are 'AT-6', 'CS-12'$"):
            reader.read(record, device="rare")


def test_evaluation_tells_devices_and_does_not(run, recorded, cache_dir):
    found = evaluate(run, recorded, num_beams=1, resamples=5, cache_dir=cache_dir)
    systems = {name: values["rouge_l"]["value"] for name, values in found.reports.items()}
    assert systems["generated"] > 0.9
    assert systems["generated_device_unknown"] < systems["generated"] - 0.05
    # All of a device say the same here.
    assert systems["shuffled"] == pytest.approx(systems["generated"], abs=0.03)
    assert systems["same_codes_and_device"] > systems["same_codes"]
    assert "generated_device_unknown" in found.dialect["devices"]


def test_a_model_without_devices_is_told_none(recorded, tiny_bert, cache_dir, tmp_path):
    settings = [*small_settings(recorded, tiny_bert), "align.epochs=1", "report.by_device=false"]
    run = train(resolve(None, settings), tmp_path / "run", cache_dir=cache_dir)
    assert not (run.folder / "devices.json").exists()
    found = evaluate(run, recorded, num_beams=1, resamples=5, cache_dir=cache_dir)
    assert "generated_device_unknown" not in found.reports
    assert "devices" not in found.dialect
    record = next((recorded / "records100").rglob("*.hea")).with_suffix("")
    with pytest.raises(EcgotError, match="device: got 'AT-6', accepted are none by this model"):
        Reader(run).read(record, device="AT-6")


@pytest.mark.parametrize("text", ["[1]", "{}", "["])
def test_damaged_names_are_one_line(run, tmp_path, text):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    (folder / "devices.json").write_text(text)
    with pytest.raises(EcgotError, match=r"devices\.json") as caught:
        Reader(Run.open(folder))
    assert "\n" not in str(caught.value)


def test_a_shuffled_control_keeps_the_device():
    patients = np.array([1, 1, 2, 3, 4, 5, 6, 7, 8])
    devices = ["a", "a", "a", "a", "b", "b", "", "", "c"]
    rows, other = shuffled(patients, devices)
    assert sorted(rows) == sorted(other) == list(range(8))  # nobody else has device c
    assert (patients[rows] != patients[other]).all()
    assert [devices[row] for row in rows] == [devices[row] for row in other]
    rows, other = shuffled(np.array([1, 1]), ["a", "a"])
    assert len(rows) == len(other) == 0
