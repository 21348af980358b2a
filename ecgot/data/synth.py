"""A synthetic 12-lead ECG data set in PTB-XL's layout.

The findings of an ECG are drawn first (:mod:`ecgot.data.findings`). They change the waves, intervals or
rhythm of a simulated heart (:mod:`ecgot.data.heart`), and its SCP codes and report follow from them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import wfdb

from ecgot.data.findings import DIAGNOSTIC, STATEMENTS, draw_findings, write_report
from ecgot.data.heart import Beat, Heart, draw_orientation, leads_mv, moving_dipole, noise_mv
from ecgot.data.leads import STANDARD_LEADS
from ecgot.errors import EcgotError
from ecgot.files import atomic_folder

ADC_PER_MV = 1000.0


@dataclass(frozen=True)
class SyntheticEcg:
    """signal_mv [12, T] with leads in the order of STANDARD_LEADS, its SCP codes, report and beats."""

    signal_mv: np.ndarray
    fs_hz: float
    codes: tuple[str, ...]
    report: str
    beats: tuple[Beat, ...]


def simulate(
    rng: np.random.Generator, *, fs_hz: float = 100.0, orientation: np.ndarray | None = None
) -> SyntheticEcg:
    """Draw the findings of one ECG, its signal and its report.

    Args:
        rng: source of all randomness.
        orientation: [3, 3], of the heart in this patient's chest; drawn if omitted.
    """
    findings = draw_findings(rng)
    heart = Heart()
    for finding in findings:
        heart = finding.change(heart, rng)
    if orientation is None:
        orientation = draw_orientation(rng)
    signal, beats = signal_of(heart, rng, fs_hz, orientation)
    codes = tuple(dict.fromkeys(code for finding in findings for code in finding.codes))
    if not any(code in DIAGNOSTIC for code in codes):
        codes = ("NORM", *codes)
    return SyntheticEcg(signal, fs_hz, codes, write_report(findings, codes, rng), beats)


def signal_of(
    heart: Heart, rng: np.random.Generator, fs_hz: float, orientation: np.ndarray
) -> tuple[np.ndarray, tuple[Beat, ...]]:
    """The signal [12, T] float32 in mV of a heart in a chest, with noise, and the heart's beats."""
    dipole, beats = moving_dipole(heart, rng, fs_hz)
    signal = leads_mv(dipole @ orientation.T) + noise_mv(rng, len(dipole), fs_hz)
    return signal.astype(np.float32), beats


def write_dataset(
    out: Path, *, records: int, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write ``records`` synthetic ECGs at 100 Hz in PTB-XL's layout, with ten patient-wise folds.

    The same ``records`` and ``seed`` write the same bytes. A patient has one or two records.

    Raises:
        EcgotError: ``records`` is not positive, or ``out`` exists and is not an empty folder.
    """
    if records < 1:
        raise EcgotError(f"records: expected a number >= 1, got {records}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise EcgotError(f"out: expected a new or empty folder, got {out}")
    with atomic_folder(out) as made:
        _write_records(made, records, seed, progress)
        _write_statements(made / "scp_statements.csv")


def _write_records(root: Path, records: int, seed: int, progress: Callable[[int, int], None] | None) -> None:
    rows: list[dict[str, object]] = []
    patient = 0
    orientation = np.eye(3)
    for ecg_id in range(1, records + 1):
        rng = np.random.default_rng([seed, ecg_id])
        if not rows or rng.random() > 0.2 or rows[-1]["repeat"]:
            patient, orientation, repeat = patient + 1, draw_orientation(rng), False
        else:
            repeat = True
        ecg = simulate(rng, orientation=orientation)
        path = f"records100/{ecg_id // 1000 * 1000:05d}/{ecg_id:05d}_lr"
        _write_signal(root / path, ecg)
        rows.append(
            {
                "ecg_id": ecg_id,
                "patient_id": float(patient),
                "age": float(rng.integers(20, 90)),
                "sex": int(rng.integers(0, 2)),
                "report": ecg.report,
                # As in PTB-XL: a likelihood for diagnoses, 0 (unknown) for form and rhythm.
                "scp_codes": str({code: 100.0 if code in DIAGNOSTIC else 0.0 for code in ecg.codes}),
                "strat_fold": (patient - 1) % 10 + 1,
                "filename_lr": path,
                "filename_hr": "",
                "repeat": repeat,
            }
        )
        if progress is not None:
            progress(ecg_id, records)
    pd.DataFrame(rows).drop(columns="repeat").to_csv(root / "ptbxl_database.csv", index=False)


def _write_signal(path: Path, ecg: SyntheticEcg) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    wfdb.wrsamp(
        path.name,
        fs=ecg.fs_hz,
        units=["mV"] * 12,
        sig_name=list(STANDARD_LEADS),
        d_signal=np.rint(ecg.signal_mv.T * ADC_PER_MV).astype(np.int64),
        fmt=["16"] * 12,
        adc_gain=[ADC_PER_MV] * 12,
        baseline=[0] * 12,
        write_dir=str(path.parent),
    )


def _write_statements(path: Path) -> None:
    columns = ["description", "diagnostic", "form", "rhythm", "diagnostic_class", "diagnostic_subclass"]
    table = pd.DataFrame.from_dict(STATEMENTS, orient="index", columns=columns)
    table.to_csv(path, index_label="")
