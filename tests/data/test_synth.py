"""The synthetic ECGs show what their labels and reports say."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from scipy.signal import find_peaks

from ecgot.data.findings import STATEMENTS
from ecgot.data.leads import STANDARD_LEADS
from ecgot.data.synth import simulate, write_dataset
from ecgot.errors import EcgotError

LEAD = {name: row for row, name in enumerate(STANDARD_LEADS)}


@pytest.fixture(scope="module")
def ecgs():
    return [simulate(np.random.default_rng(seed), fs_hz=250) for seed in range(400)]


def having(ecgs, *codes, without=()):
    found = [e for e in ecgs if set(codes) <= set(e.codes) and not set(without) & set(e.codes)]
    assert len(found) >= 5, codes
    return found


def peaks(ecg):
    """R peaks by the total force of the heart, in samples."""
    force = np.linalg.norm(np.diff(ecg.signal_mv, axis=1), axis=0)
    return find_peaks(force, height=0.4 * force.max(), distance=int(0.25 * ecg.fs_hz))[0]


def rate_bpm(ecg):
    return 60 * ecg.fs_hz / np.median(np.diff(peaks(ecg)))


def beat(ecg, lead, start_s, stop_s):
    """The median beat of a lead from ``start_s`` to ``stop_s`` about the R peak, baseline removed."""
    window = np.arange(round(start_s * ecg.fs_hz), round(stop_s * ecg.fs_hz))
    signal = ecg.signal_mv[LEAD[lead]]
    rows = [
        signal[p + window] - np.median(signal)
        for p in peaks(ecg)
        if p + window[0] >= 0 and p + window[-1] < len(signal)
    ]
    return np.median(rows, axis=0)


def test_limb_leads_obey_einthoven_and_goldberger(ecgs):
    ecg = simulate(np.random.default_rng(0))
    assert ecg.signal_mv.shape == (12, 1000)
    i, ii, iii, avr, avl, avf = (ecg.signal_mv[LEAD[n]] for n in ("I", "II", "III", "aVR", "aVL", "aVF"))
    # Each lead has noise of its own, so the laws hold up to it.
    for left, right in ((iii, ii - i), (avr, -(i + ii) / 2), (avl, i - ii / 2), (avf, ii - i / 2)):
        assert np.std(left - right) < 0.15


@pytest.mark.parametrize(("code", "low", "high"), [("SBRAD", 30, 58), ("STACH", 100, 155), ("SR", 58, 100)])
def test_rates_are_as_labelled(ecgs, code, low, high):
    rates = [rate_bpm(e) for e in having(ecgs, code, without=("PVC", "CLBBB", "CRBBB"))]
    assert np.mean([low <= rate <= high for rate in rates]) > 0.9


def test_atrial_fibrillation_is_irregular_and_sinus_rhythm_is_not(ecgs):
    def spread(code):
        found = having(ecgs, code, without=("PVC", "CLBBB", "CRBBB"))
        return np.median([np.std(np.diff(peaks(e))) / np.mean(np.diff(peaks(e))) for e in found])

    assert spread("AFIB") > 0.1
    assert spread("SR") < 0.05


def test_atrial_fibrillation_has_no_p_wave(ecgs):
    def p_height(code):
        found = having(ecgs, code, without=("PVC", "1AVB", "CLBBB", "STACH"))
        return np.median(
            [beat(e, "II", -0.20, -0.12).max() - beat(e, "II", -0.28, -0.24).max() for e in found]
        )

    assert p_height("SR") > 0.05 > p_height("AFIB")


def test_bundle_branch_blocks_widen_the_qrs_and_turn_v1(ecgs):
    def found(code):
        return having(ecgs, code, without=("PVC", "ASMI", "IMI", "LMI", "LVOLT", "LVH"))

    def width_s(code):
        """How long V1, V6 and aVF together exceed 30 % of their peak around the R wave."""
        spans = []
        for ecg in found(code):
            force = sum(beat(ecg, lead, -0.15, 0.15) ** 2 for lead in ("V1", "V6", "aVF")) ** 0.5
            spans.append(np.mean(force > 0.3 * force.max()) * 0.3)
        return np.median(spans)

    def v1(code, start, stop):
        return np.median([beat(e, "V1", start, stop).mean() for e in found(code)])

    assert width_s("CLBBB") > 1.5 * width_s("NORM")
    assert width_s("CRBBB") > 1.5 * width_s("NORM")
    assert v1("CLBBB", -0.05, 0.05) < -0.3
    assert v1("CRBBB", 0.03, 0.10) > 0.2


@pytest.mark.parametrize(("code", "lead"), [("IMI", "aVF"), ("ASMI", "V2")])
def test_acute_infarcts_raise_st_in_their_territory(ecgs, code, lead):
    def st(found):
        return np.median([beat(e, lead, 0.08, 0.12).mean() for e in found])

    blocks = ("PVC", "CLBBB", "CRBBB")
    acute = having(ecgs, code, "STE_", without=blocks)
    assert st(acute) > st(having(ecgs, "NORM", without=blocks)) + 0.08


@pytest.mark.parametrize(("code", "lead"), [("IMI", "aVF"), ("ASMI", "V2"), ("LMI", "V6")])
def test_infarcts_leave_q_waves_in_their_territory_alone(ecgs, code, lead):
    def q_wave(found, lead):
        return np.median([beat(e, lead, -0.06, 0.0).min() for e in found])

    blocks = ("PVC", "CLBBB", "CRBBB")
    others = [c for c in ("IMI", "ASMI", "LMI") if c != code]
    infarcts = having(ecgs, code, without=(*blocks, *others))
    normal = having(ecgs, "NORM", without=blocks)
    assert q_wave(infarcts, lead) < q_wave(normal, lead) - 0.3
    for elsewhere in {"aVF", "V2", "V6"} - {lead}:
        assert abs(q_wave(infarcts, elsewhere) - q_wave(normal, elsewhere)) < 0.25


def test_a_first_degree_block_delays_the_qrs_after_the_p_wave(ecgs):
    def p_peak_s(code):
        found = having(ecgs, code, without=("PVC", "CLBBB", "CRBBB", "AFIB", "STACH", "SBRAD"))
        return np.median([-0.36 + np.argmax(beat(e, "II", -0.36, -0.07)) / e.fs_hz for e in found])

    assert p_peak_s("1AVB") < -0.22 < p_peak_s("NORM") < -0.12


def test_premature_beats_come_early_and_sinus_beats_do_not(ecgs):
    def shortest(found):
        """The shortest interval between beats as a share of the median one."""
        return np.median([np.diff(peaks(e)).min() / np.median(np.diff(peaks(e))) for e in found])

    assert shortest(having(ecgs, "PVC", without=("AFIB",))) < 0.8
    assert shortest(having(ecgs, "NORM", without=("PVC", "AFIB"))) > 0.9


def test_hypertrophy_raises_voltage_and_low_voltage_lowers_it(ecgs):
    def sokolow(code):
        """S in V1 plus R in V5, in mV."""
        found = having(ecgs, code, without=("PVC", "CLBBB", "CRBBB", "ASMI", "LMI"))
        return np.median([beat(e, "V5", -0.05, 0.05).max() - beat(e, "V1", -0.05, 0.05).min() for e in found])

    assert sokolow("LVH") > 3.5 > sokolow("NORM") > 2 * sokolow("LVOLT")


def test_reports_follow_from_the_codes(ecgs):
    words = {
        "SBRAD": "bradycardia",
        "STACH": "tachycardia",
        "AFIB": "atrial fibrillation",
        "CLBBB": "left bundle branch block",
        "IMI": "inferior",
        "LVH": "left ventricular hypertrophy",
        "NORM": "normal",
    }
    for ecg in ecgs:
        for code, word in words.items():
            if code in ecg.codes and code != "NORM":
                assert word in ecg.report
            if code not in ecg.codes and code != "NORM":
                assert word not in ecg.report
        assert set(ecg.codes) <= set(STATEMENTS)
    assert len({e.report for e in ecgs}) > 150


def digest(folder: Path) -> str:
    content = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return content.hexdigest()


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_dataset(tmp_path / name, records=25, seed=seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")


def test_patients_keep_to_one_fold(dataset):
    table = dataset.table
    folds = {}
    for patient, fold in zip(table.patient_id.tolist(), table.fold.tolist(), strict=True):
        assert folds.setdefault(patient, fold) == fold
    assert set(folds.values()) == set(range(1, 11))
    assert len(folds) < len(table)  # some patients have two records


def test_nothing_is_overwritten_or_left_half_written(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    with pytest.raises(EcgotError, match="new or empty folder"):
        write_dataset(tmp_path / "full", records=3)
    with pytest.raises(EcgotError, match="records"):
        write_dataset(tmp_path / "none", records=0)

    def fail(done, _total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "interrupted", records=3, progress=fail)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]
    (tmp_path / "empty").mkdir()
    write_dataset(tmp_path / "empty", records=2)
    assert (tmp_path / "empty" / "ptbxl_database.csv").exists()
