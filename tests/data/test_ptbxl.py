"""PTB-XL's tables: labels, folds, reports, and what is said of bad ones."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ecgot.data.ptbxl import available_folds, check_patient_split, fold_of, read_table
from ecgot.errors import EcgotError

STATEMENTS = """,description,diagnostic,form,rhythm,diagnostic_class,diagnostic_subclass
NDT,non-diagnostic T abnormalities,1.0,1.0,,STTC,STTC
NORM,normal ECG,1.0,,,NORM,NORM
IMI,inferior myocardial infarction,1.0,,,MI,IMI
ASMI,anteroseptal myocardial infarction,1.0,,,MI,AMI
SR,sinus rhythm,,,1.0,,
"""
ROWS = [
    (1, "15709.0", 1, "{'NORM': 100.0, 'SR': 0.0}", "sinusrhythmus normales ekg", "records100/1_lr", ""),
    (2, "2.0", 2, "{'IMI': 0.0, 'ASMI': 35.0}", "infarkt", "records100/2_lr", "records500/2_hr"),
    (3, "2.0", 2, "{'NDT': 100.0}", "trace only requested.", "records100/3_lr", ""),
    (7, "9", 9, "{}", "", "records100/7_lr", ""),
]
COLUMNS = ["ecg_id", "patient_id", "strat_fold", "scp_codes", "report", "filename_lr", "filename_hr"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "scp_statements.csv").write_text(STATEMENTS)
    pd.DataFrame(ROWS, columns=COLUMNS).to_csv(tmp_path / "ptbxl_database.csv", index=False)
    return tmp_path


def rewrite(root: Path, change) -> None:
    path = root / "ptbxl_database.csv"
    change(pd.read_csv(path, dtype=str, keep_default_na=False)).to_csv(path, index=False)


def test_labels_count_whatever_their_likelihood(root):
    table = read_table(root)
    labels = table.labels("superclass")
    assert labels.classes == ("NORM", "MI", "STTC", "CD", "HYP")
    assert labels.matrix.astype(int).tolist() == [
        [1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    assert table.labels("subclass").classes == ("STTC", "NORM", "IMI", "AMI")
    assert table.labels("subclass").matrix[1].tolist() == [False, False, True, True]
    assert table.labels("form").classes == ("NDT",)  # NDT is a diagnosis and a form
    assert table.labels("rhythm").matrix[:, 0].tolist() == [True, False, False, False]


def test_a_recorder_is_its_name_with_single_spaces(root):
    assert read_table(root).recorders == ("",) * 4  # no column
    rewrite(root, lambda table: table.assign(device=["CS-12   E ", "AT-6 C 5.5", "", "x"]))
    assert read_table(root).select([1, 0, 2]).recorders == ("AT-6 C 5.5", "CS-12 E", "")


def test_rows_are_read(root):
    table = read_table(root)
    assert table.ecg_id.tolist() == [1, 2, 3, 7]
    assert table.patient_id.tolist() == [15709, 2, 2, 9]
    assert table.reports == ("sinusrhythmus normales ekg", "infarkt", "", "")
    assert available_folds(root) == (1, 2, 9)


def test_folds_and_selection_keep_rows_together(root):
    table = read_table(root, folds=[2, 9])
    assert table.ecg_id.tolist() == [2, 3, 7]
    picked = table.select(np.array([2, 0]))
    assert picked.ecg_id.tolist() == [7, 2]
    assert picked.reports == ("", "infarkt")
    assert picked.labels("superclass").matrix[1].tolist() == [False, True, False, False, False]


def test_a_csv_takes_the_place_of_the_report_column(root):
    path = root / "english.csv"
    path.write_text("ecg_id,report,source\n2,inferior infarct,x\n3,trace only requested.,x\n")
    assert read_table(root, reports_csv=path).reports == ("", "inferior infarct", "", "")


def test_the_sampling_rate_chooses_the_file_and_falls_back(root):
    assert read_table(root, fs_hz=100).record_paths[1] == "records100/2_lr"
    assert read_table(root, fs_hz=500).record_paths[1] == "records500/2_hr"
    (root / "records100").mkdir()
    (root / "records100" / "2_lr.hea").touch()
    assert read_table(root, fs_hz=500).record_paths[1] == "records100/2_lr"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda t: t.drop(columns="ecg_id"), "expected column ecg_id"),
        (lambda t: t.drop(columns=["filename_lr", "filename_hr"]), "filename_lr"),
        (lambda t: t.iloc[:0], "expected records"),
        (lambda t: pd.concat([t, t]), "twice"),
        (lambda t: t.assign(patient_id="x"), "patient_id"),
        (lambda t: t.assign(scp_codes="{'NORM'"), "ecg_id 1"),
        (lambda t: t.assign(filename_lr="", filename_hr=""), "expected a file in filename_lr"),
    ],
)
def test_a_bad_table_is_named_in_one_line(root, change, part):
    rewrite(root, change)
    with pytest.raises(EcgotError, match=part) as caught:
        read_table(root)
    assert "\n" not in str(caught.value)
    assert "ptbxl_database.csv" in str(caught.value)


def test_a_table_without_patients_folds_and_codes_is_read(root):
    (root / "scp_statements.csv").unlink()
    with pytest.raises(EcgotError, match=r"there is no .*scp_statements\.csv"):
        read_table(root)  # codes without their meaning
    rewrite(root, lambda table: table.drop(columns=["scp_codes", "strat_fold"]))
    table = read_table(root)
    assert table.lacking == {"scp_codes", "strat_fold"}
    assert table.fold.tolist() == [fold_of(patient) for patient in (15709, 2, 2, 9)]
    assert available_folds(root) == tuple(sorted(set(table.fold.tolist())))
    assert not table.labels("superclass").matrix.any()
    assert table.labels("rhythm").matrix.shape == (4, 0)
    some = read_table(root, folds=[fold_of(2)])
    assert {2, 3} <= set(some.ecg_id.tolist())
    rewrite(root, lambda table: table.drop(columns="patient_id"))
    assert read_table(root).patient_id.tolist() == [1, 2, 3, 7]
    assert read_table(root).fold.tolist() == [fold_of(number) for number in (1, 2, 3, 7)]


def test_patients_are_dealt_to_ten_folds_evenly_and_always_to_the_same():
    folds = np.array([fold_of(patient) for patient in range(5000)])
    counts = np.bincount(folds, minlength=11)
    assert counts[0] == 0
    assert counts[1:].min() > 400
    assert counts[1:].max() < 600
    assert [fold_of(patient) for patient in (1, 2, 15709)] == [1, 1, 8]  # on every machine


def test_missing_files_and_columns_are_named(root):
    with pytest.raises(EcgotError, match=r"no .*absent"):
        read_table(root / "absent")
    with pytest.raises(EcgotError, match="english"):
        read_table(root, reports_csv=root / "english.csv")
    (root / "english.csv").write_text("id,text\n1,a\n")
    with pytest.raises(EcgotError, match="expected column ecg_id, report"):
        read_table(root, reports_csv=root / "english.csv")
    with pytest.raises(EcgotError, match="expected some of 1, 2, 9"):
        read_table(root, folds=[10])
    with pytest.raises(EcgotError, match="expected one of superclass"):
        read_table(root).labels("colour")
    (root / "scp_statements.csv").unlink()
    with pytest.raises(EcgotError, match="scp_statements"):
        read_table(root)


def test_a_table_of_labels_alone_has_no_reports(root):
    rewrite(root, lambda table: table.drop(columns="report"))
    table = read_table(root)
    assert table.reports == table.originals == ("", "", "", "")
    assert table.labels("superclass").matrix.any()


def test_a_patient_on_both_sides_is_an_error(root):
    table = read_table(root)
    check_patient_split(table.select([0, 1]), table.select([3]))
    with pytest.raises(EcgotError, match="patient 2"):
        check_patient_split(table.select([0, 1]), table.select([2, 3]))


def test_real_labels_agree_with_an_independent_count(ptbxl):
    table = read_table(ptbxl)
    database = pd.read_csv(ptbxl / "ptbxl_database.csv", index_col="ecg_id")
    statements = pd.read_csv(ptbxl / "scp_statements.csv", index_col=0)
    diagnoses = statements[statements.diagnostic == 1].diagnostic_class
    labels = table.labels("superclass")
    for number, name in enumerate(labels.classes):
        codes = [f"'{code}'" for code in diagnoses[diagnoses == name].index]
        expected = database.scp_codes.map(lambda text, codes=codes: any(code in text for code in codes))
        assert labels.matrix[:, number].tolist() == expected.tolist()
    folds = pd.Series(table.fold).groupby(table.patient_id).nunique()
    assert folds.max() == 1
