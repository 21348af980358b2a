"""Readings for the tests of the page: a synthetic signal, with findings as a model would give them."""

from typing import Any

import numpy as np

from ecgot.data.leads import STANDARD_LEADS
from ecgot.data.measurements import Measurements
from ecgot.data.quality import Quality, Remark, Verdict
from ecgot.data.record import Record
from ecgot.inference.calibration import Finding
from ecgot.inference.evidence import Evidence
from ecgot.inference.reading import Reading, Sentence, Window

FS_HZ, CELLS = 100.0, 32
PREMATURE = 13  # the cell in which the premature beat lies
# group, code, name, probability, low, high, threshold, stated
CLASSES = (
    ("superclass", "NORM", "normal ECG", 0.06, 0.04, 0.09, 0.43, False),
    ("superclass", "CD", "conduction disturbance", 0.91, 0.86, 0.94, 0.35, True),
    ("superclass", "MI", "myocardial infarction", 0.41, 0.33, 0.5, 0.38, None),
    ("superclass", "HYP", "hypertrophy or enlargement", 0.12, 0.08, 0.17, 0.3, False),
    ("subclass", "CLBBB", "left bundle branch block", 0.87, 0.79, 0.93, 0.4, True),
    ("subclass", "CRBBB", "right bundle branch block", 0.004, 0.001, 0.01, 0.4, False),
    ("subclass", "IMI", "inferior myocardial infarction", 0.22, 0.14, 0.31, 0.3, None),
    ("form", "PVC", "premature ventricular beats", 0.78, 0.69, 0.85, 0.45, True),
    ("form", "LVOLT", "low QRS voltages", 0.02, 0.01, 0.05, 0.3, False),
    ("rhythm", "SR", "sinus rhythm", 0.93, 0.9, 0.95, 0.6, True),
    ("rhythm", "AFIB", "atrial fibrillation", 0.05, 0.03, 0.08, 0.4, False),
)


def signal(seconds: float = 10.0, fs_hz: float = FS_HZ) -> np.ndarray:
    """[12, T] in mV: regular beats, one premature and wide at 4.2 s."""
    time = np.arange(round(seconds * fs_hz)) / fs_hz
    beats = np.arange(0.4, seconds, 0.85)
    size = np.array([0.7, 1.1, 0.4, -0.9, 0.3, 0.7, -0.8, -1.1, 0.5, 1.4, 1.5, 1.2])[:, None]
    made = np.zeros((12, len(time)))
    for beat in beats:
        for after, width, height in (
            (-0.17, 0.025, 0.12),
            (0.0, 0.012, 1.0),
            (0.03, 0.015, -0.25),
            (0.27, 0.05, 0.25),
        ):
            made += size * height * np.exp(-(((time - beat - after) / width) ** 2) / 2)
    made -= 1.6 * size * np.exp(-(((time - 4.2) / 0.05) ** 2) / 2)
    return made.astype(np.float32)


def record(**changes: Any) -> Record:
    values = {
        "name": "made",
        "signal_mv": signal(),
        "fs_hz": FS_HZ,
        "leads": STANDARD_LEADS,
        "repaired_samples": {},
        "flat_leads": (),
    }
    return Record(**(values | changes))


def window(
    start_s: float = 0.0,
    verdict: Verdict = "good",
    remarks: tuple[Remark, ...] = (),
    classes: Any = CLASSES,
    unusable: tuple[str, ...] = (),
) -> Window:
    findings = tuple(Finding(code, name, group, *rest) for group, code, name, *rest in classes)
    return Window(start_s, start_s + 10.0, Quality(verdict, remarks, unusable), findings)


def evidence(finding: Finding) -> Evidence:
    """Of the premature beat where it is, in the chest leads most; of everything else spread over the time."""
    grid = np.random.default_rng(len(finding.name)).normal(0.2, 0.1, (12, CELLS))
    if finding.code == "PVC":
        grid = np.full((12, CELLS), 0.01)
        grid[:, PREMATURE] = np.linspace(0.2, 1.0, 12)
        grid[:, PREMATURE + 3] = -0.3
    return Evidence(finding, STANDARD_LEADS, np.linspace(0, 10.0, CELLS + 1), grid, grid.sum(0))


def reading(**changes: Any) -> Reading:
    """Left bundle branch block with a premature beat, unless changed."""
    windows = changes.get("windows", (window(),))
    values: dict[str, Any] = {
        "record": "ward 7/made.hea",
        "duration_s": 10.0 * len(windows),
        "windows": windows,
        "shown": 0,
        "report": "",
        "written": "",
        "sentences": (
            Sentence("sinus rhythm", 0.93),
            Sentence("left bundle branch block", 0.71),
            Sentence("premature ventricular contractions", 0.64),
            Sentence("bradycardia", 0.31, "measured 71/min"),
        ),
        "measurements": Measurements(
            r_peaks_s=(0.4, 1.25, 2.1, 2.95, 3.8),
            heart_rate_bpm=71.0,
            rr_variation=0.12,
            pr_ms=None,
            qrs_ms=142.0,
            qt_ms=404.0,
            qtc_ms=428.0,
            axis_deg=-31.0,
            pacing_spikes=0,
        ),
        "notes": ("baseline removed below 0.3 Hz",),
        "recorder": "CS-12",
        "calibrated": True,
        "signal": record(),
        "explain": evidence,
    }
    return Reading(**(values | changes))
