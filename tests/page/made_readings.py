"""Readings for the tests of the page: a synthetic signal, with findings as a model would give them."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from ecgot.data.leads import STANDARD_LEADS

FS_HZ, CELLS = 100.0, 32
NORMAL = ("NORM", "SR")
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


def record(**changes: Any) -> SimpleNamespace:
    values = {
        "name": "made",
        "signal_mv": signal(),
        "fs_hz": FS_HZ,
        "leads": STANDARD_LEADS,
        "repaired_samples": {},
        "flat_leads": (),
        "derived_leads": (),
        "estimated_leads": (),
        "start_s": 0.0,
        "source_leads": STANDARD_LEADS,
        "notes": (),
    }
    return SimpleNamespace(**(values | changes))


def finding(*values: Any) -> SimpleNamespace:
    names = ("group", "code", "name", "probability", "low", "high", "threshold", "stated")
    return SimpleNamespace(**dict(zip(names, values, strict=True)))


def remark(code: str, text: str, leads: tuple[str, ...] = ()) -> SimpleNamespace:
    return SimpleNamespace(code=code, text=text, leads=leads)


def window(
    start_s: float = 0.0, verdict: str = "good", remarks: tuple[Any, ...] = (), classes: Any = CLASSES
) -> SimpleNamespace:
    findings = tuple(finding(*each) for each in classes)
    stated = sorted((f for f in findings if f.stated), key=lambda f: (f.code in NORMAL, -f.probability))
    quality = SimpleNamespace(verdict=verdict, remarks=remarks, unusable_leads=())
    return SimpleNamespace(
        start_s=start_s, stop_s=start_s + 10.0, quality=quality, findings=findings, stated=tuple(stated)
    )


def evidence(each: Any, start_s: float = 0.0) -> SimpleNamespace:
    """Of the premature beat where it is, in the chest leads most; of everything else spread over the time."""
    grid = np.random.default_rng(len(each.name)).normal(0.2, 0.1, (12, CELLS))
    if each.code == "PVC":
        grid = np.full((12, CELLS), 0.01)
        grid[:, PREMATURE] = np.linspace(0.2, 1.0, 12)
        grid[:, PREMATURE + 3] = -0.3
    times_s = start_s + np.linspace(0, 10.0, CELLS + 1)
    return SimpleNamespace(
        finding=each, leads=STANDARD_LEADS, times_s=times_s, grid=grid, by_time=grid.sum(0)
    )


def sentence(text: str, probability: float, says: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(text=text, probability=probability, remark=says)


def reading(**changes: Any) -> SimpleNamespace:
    """Left bundle branch block with a premature beat, unless changed."""
    windows = changes.pop("windows", (window(),))
    shown = changes.pop("shown", 0)
    values = {
        "record": "ward 7/made.hea",
        "duration_s": 10.0 * len(windows),
        "windows": windows,
        "shown": shown,
        "window": windows[shown],
        "findings": windows[shown].findings,
        "quality": windows[shown].quality,
        "refused": not windows[shown].findings,
        "report": "",
        "sentences": (
            sentence("sinus rhythm", 0.93),
            sentence("left bundle branch block", 0.71),
            sentence("premature ventricular contractions", 0.64),
            sentence("bradycardia", 0.31, "measured 71/min"),
        ),
        "measurements": SimpleNamespace(
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
        "evidence": lambda each: evidence(each, windows[shown].start_s),
    }
    return SimpleNamespace(**(values | changes))
