"""Yes/no labels of one's own."""

import numpy as np
import pytest

from ecgot.data.ptbxl import PtbXlTable, read_table
from ecgot.data.yes_no import read_yes_no
from ecgot.errors import EcgotError


@pytest.fixture
def table(few) -> PtbXlTable:
    return read_table(few)


@pytest.fixture
def written(tmp_path):
    def write(text: str):
        path = tmp_path / "labels.csv"
        path.write_text(text)
        return path

    return write


def test_a_cell_is_yes_no_or_unknown(written, table):
    labels = read_yes_no(written("ecg_id,pacemaker,left axis\n3,1,\n1.0,0,1\n999999, ,0.0\n"))
    assert labels.classes == ("pacemaker", "left axis")
    answers = labels.of(table.select([0, 1, 2]))
    np.testing.assert_array_equal(answers, [[0, 1], [-1, -1], [1, -1]])
    assert labels.named(table) == 2


def test_records_can_be_named_by_path_with_or_without_suffix(written, table):
    first, second = table.record_paths[0], table.record_paths[5].replace("/", "\\")
    labels = read_yes_no(written(f"late,record\n1,{first}.hea\n0,{second}\n"))
    assert labels.classes == ("late",)
    answers = labels.of(table)[:, 0]
    assert (answers[0], answers[5]) == (1, 0)
    assert (np.delete(answers, [0, 5]) == -1).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,a\n1,1\n", "expected column ecg_id or record, got id, a"),
        ("ecg_id\n1\n", "expected a column for each label beside ecg_id, got none"),
        ("ecg_id,a\n1,1\n1.0,0\n", "expected each ecg_id once, got 1 twice"),
        ("record,a\nx/y.hea,1\nx/y,0\n", "expected each record once, got x/y twice"),
        ("ecg_id,a,b\n1,1,\n2,0,yes\n", "expected 1, 0 or nothing in column b of ecg_id 2, got 'yes'"),
        ("ecg_id,a\n1,2\n", "expected 1, 0 or nothing in column a of ecg_id 1, got '2'"),
        ("ecg_id,a\nx,1\n", "expected numbers in column ecg_id, got 'x'"),
        ("ecg_id,a\ninf,1\n", "expected numbers in column ecg_id, got 'inf'"),
        ("", "cannot be read as CSV"),
    ],
)
def test_a_bad_file_is_named_in_one_line(written, text, message):
    path = written(text)
    with pytest.raises(EcgotError) as caught:
        read_yes_no(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(EcgotError, match=r"there is no .*absent\.csv"):
        read_yes_no(tmp_path / "absent.csv")
