"""A synthetic 12-lead ECG data set in PTB-XL's layout, from a moving heart dipole.

Each wave of a beat (P, the parts of QRS, ST, T) is a Gaussian in time times a dipole vector in the Frank
frame (x to the left, y to the feet, z to the back). Findings change waves, intervals or the rhythm; SCP codes
and report sentences follow from the same findings. The dipole reaches the leads through Dower's matrix.

Sources: McSharry et al. 2003, "A dynamical model for generating synthetic electrocardiogram signals"
(Gaussian waves); Sameni et al. 2007, "Multichannel ECG and noise modeling" (the dipole form); Dower et al.
1980, "On deriving the electrocardiogram from vectorcardiographic leads" (the matrix from Frank's leads).
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import wfdb

from ecgot.data.record import STANDARD_LEADS
from ecgot.errors import EcgotError

# Rows V1-V6, I, II; columns x, y, z. The other four leads follow from I and II.
DOWER = np.array(
    [
        [-0.515, 0.157, -0.917],
        [0.044, 0.164, -1.387],
        [0.882, 0.098, -1.277],
        [1.213, 0.127, -0.601],
        [1.125, 0.127, -0.086],
        [0.831, 0.076, 0.230],
        [0.632, -0.235, 0.059],
        [0.235, 1.066, -0.132],
    ]
)
SECONDS = 10.0
ADC_PER_MV = 1000.0
Vector = tuple[float, float, float]  # x, y, z


@dataclass(frozen=True)
class Wave:
    """A Gaussian of standard deviation ``width_s``, ``time_s`` after the R peak, along ``dipole`` (mV)."""

    time_s: float
    width_s: float
    dipole: Vector


@dataclass(frozen=True)
class Heart:
    """Waves of one beat and how beats follow each other."""

    p: tuple[Wave, ...] = (Wave(-0.170, 0.022, (0.05, 0.09, -0.03)), Wave(-0.145, 0.022, (0.06, 0.07, 0.04)))
    qrs: tuple[Wave, ...] = (
        Wave(-0.026, 0.008, (-0.12, -0.05, -0.28)),  # septum: right and forward
        Wave(0.000, 0.012, (1.10, 0.80, 0.25)),  # free walls: left, down
        Wave(0.028, 0.010, (-0.10, -0.22, 0.50)),  # base: back and up
    )
    st: tuple[Wave, ...] = ()
    t: tuple[Wave, ...] = (Wave(0.230, 0.050, (0.16, 0.12, -0.08)), Wave(0.285, 0.032, (0.18, 0.14, -0.08)))
    rate_bpm: float = 72.0
    irregularity: float = 0.02  # standard deviation of RR over its mean, beat by beat
    breathing: float = 0.02  # relative swing of RR with respiration
    fibrillates: bool = False
    ectopic_share: float = 0.0  # share of beats followed by a premature ventricular one

    def scaled(self, part: str, factors: Vector) -> "Heart":
        """The waves of one part with their dipoles scaled by axis."""
        x, y, z = factors
        waves: dict[str, Any] = {
            part: tuple(
                replace(w, dipole=(w.dipole[0] * x, w.dipole[1] * y, w.dipole[2] * z))
                for w in getattr(self, part)
            )
        }
        return replace(self, **waves)

    def adding(self, part: str, *waves: Wave) -> "Heart":
        """The part with more waves."""
        return replace(self, **{part: getattr(self, part) + waves})


Change = Callable[[Heart, np.random.Generator], Heart]


@dataclass(frozen=True)
class Finding:
    """What a finding does to the heart, the SCP codes it sets, and how reports put it."""

    weight: float  # how often it is drawn, of its group
    codes: tuple[str, ...]
    change: Change
    phrases: tuple[str, ...]


@dataclass(frozen=True)
class SyntheticEcg:
    """signal_mv [12, T] in the order of STANDARD_LEADS, SCP codes and the report that go with it."""

    signal_mv: np.ndarray
    fs_hz: float
    codes: tuple[str, ...]
    report: str


def simulate(
    rng: np.random.Generator, *, fs_hz: float = 100.0, orientation: np.ndarray | None = None
) -> SyntheticEcg:
    """Draw the findings of one ECG, its signal and its report.

    Args:
        rng: source of everything random.
        orientation: [3, 3], how the heart lies in this patient's chest; drawn where omitted.
    """
    findings = _draw_findings(rng)
    heart = Heart()
    for finding in findings:
        heart = finding.change(heart, rng)
    if orientation is None:
        orientation = draw_orientation(rng)
    dipole = _dipole(heart, rng, fs_hz) @ orientation.T
    signal = _leads(dipole) + _noise(rng, dipole.shape[0], fs_hz)
    codes = tuple(dict.fromkeys(code for finding in findings for code in finding.codes))
    if not any(code in DIAGNOSTIC for code in codes):
        codes = ("NORM", *codes)
    return SyntheticEcg(signal.astype(np.float32), fs_hz, codes, _report(findings, codes, rng))


def draw_orientation(rng: np.random.Generator) -> np.ndarray:
    """A patient's heart: turned by some degrees about each axis, and somewhat larger or smaller; [3, 3]."""
    matrix = np.eye(3) * np.exp(rng.normal(0.0, 0.12))
    for first, second in ((0, 1), (0, 2), (1, 2)):
        angle = np.radians(rng.normal(0.0, 9.0))
        turn = np.eye(3)
        turn[[first, second], [first, second]] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


# --- findings -----------------------------------------------------------------------------------------------


def _rhythm(low: float, high: float, breathing: float = 0.02) -> Change:
    return lambda heart, rng: replace(heart, rate_bpm=rng.uniform(low, high), breathing=breathing)


def _fibrillation(heart: Heart, rng: np.random.Generator) -> Heart:
    return replace(
        heart, p=(), fibrillates=True, rate_bpm=rng.uniform(60, 125), irregularity=rng.uniform(0.17, 0.28)
    )


def _premature_beats(heart: Heart, rng: np.random.Generator) -> Heart:
    return replace(heart, ectopic_share=rng.uniform(0.15, 0.3))


def _av_block(heart: Heart, rng: np.random.Generator) -> Heart:
    delay = rng.uniform(0.08, 0.15)
    return replace(heart, p=tuple(replace(w, time_s=w.time_s - delay) for w in heart.p))


def _left_bundle_block(heart: Heart, rng: np.random.Generator) -> Heart:
    size = rng.uniform(0.8, 1.2)
    waves = (
        Wave(-0.020, 0.018, (0.50, 0.30, 0.45)),
        Wave(0.020, 0.022, (0.75, 0.30, 0.80)),
        Wave(0.062, 0.018, (0.80, 0.10, 0.60)),
    )
    heart = replace(heart, qrs=waves, t=tuple(replace(w, time_s=w.time_s + 0.04) for w in heart.t))
    heart = heart.scaled("qrs", (size, size, size)).scaled("t", (-0.9, -0.3, 3.0))
    return heart.adding("st", Wave(0.14, 0.040, (-0.10, -0.03, -0.22)))


def _right_bundle_block(heart: Heart, rng: np.random.Generator) -> Heart:
    size = rng.uniform(0.8, 1.2)
    heart = heart.adding("qrs", Wave(0.062, 0.020, (-0.50 * size, 0.05, -0.65 * size)))
    return heart.adding("t", Wave(0.25, 0.045, (0.05, 0.0, 0.28)))


def _left_anterior_block(heart: Heart, rng: np.random.Generator) -> Heart:
    waves = (Wave(-0.024, 0.009, (-0.05, 0.30, -0.20)), Wave(0.004, 0.014, (0.95, -0.75, 0.25)))
    return replace(heart, qrs=(*waves, Wave(0.032, 0.011, (-0.05, -0.35, 0.45))))


def _infarct(q: Vector, injury: Vector, *, acute: bool) -> Change:
    """A dead region: early QRS forces point away from it; ST points to it while fresh, T away when old."""

    def change(heart: Heart, rng: np.random.Generator) -> Heart:
        size = rng.uniform(0.75, 1.3)
        heart = heart.adding("qrs", Wave(-0.018, 0.013, _times(q, size)))
        if acute:
            return heart.adding("st", Wave(0.12, 0.045, _times(injury, size)), Wave(0.2, 0.05, injury))
        return heart.adding("t", Wave(0.265, 0.045, _times(injury, -1.3 * size)))

    return change


def _hypertrophy(strain: bool) -> Change:
    def change(heart: Heart, rng: np.random.Generator) -> Heart:
        size = rng.uniform(1.7, 2.2)
        heart = heart.scaled("qrs", (size, 1.1, size * 1.3))
        if not strain:
            return heart
        heart = heart.scaled("t", (-0.6, 0.3, -0.5))
        return heart.adding("st", Wave(0.13, 0.045, (-0.13, -0.04, 0.06)))

    return change


def _st_depression(heart: Heart, rng: np.random.Generator) -> Heart:
    size = rng.uniform(0.8, 1.4)
    heart = heart.scaled("t", (0.5, 0.5, 0.7))
    return heart.adding(
        "st",
        Wave(0.09, 0.03, (-0.10 * size, -0.11 * size, 0.04)),
        Wave(0.15, 0.04, (-0.12 * size, -0.1, 0.04)),
    )


def _flat_t(heart: Heart, rng: np.random.Generator) -> Heart:
    return heart.scaled("t", _times((1.0, 1.0, 1.0), rng.uniform(-0.25, 0.2)))


def _low_voltage(heart: Heart, rng: np.random.Generator) -> Heart:
    size = rng.uniform(0.3, 0.42)
    return heart.scaled("qrs", (size, size, size))


def _times(vector: Vector, factor: float) -> Vector:
    return vector[0] * factor, vector[1] * factor, vector[2] * factor


# The weights of a group are probabilities; what they leave of 1 is "none of them".
RHYTHMS = (
    Finding(
        0.50, ("SR",), _rhythm(62, 96), ("sinus rhythm", "regular sinus rhythm", "sinus rhythm, regular")
    ),
    Finding(0.13, ("SBRAD",), _rhythm(38, 54), ("sinus bradycardia", "sinus rhythm with bradycardia")),
    Finding(0.13, ("STACH",), _rhythm(106, 148), ("sinus tachycardia", "tachycardia, sinus rhythm")),
    Finding(
        0.08,
        ("SARRH",),
        _rhythm(55, 80, breathing=0.22),
        ("sinus arrhythmia", "sinus rhythm with respiratory arrhythmia"),
    ),
    Finding(
        0.16,
        ("AFIB",),
        _fibrillation,
        ("atrial fibrillation", "atrial fibrillation, irregular ventricular response"),
    ),
)
PREMATURE = (
    Finding(
        0.12,
        ("PVC",),
        _premature_beats,
        (
            "premature ventricular contractions",
            "ventricular extrasystoles",
            "ventricular premature complexes",
        ),
    ),
)
CONDUCTION = (
    Finding(
        0.10,
        ("CLBBB",),
        _left_bundle_block,
        ("left bundle branch block", "complete left bundle branch block"),
    ),
    Finding(
        0.10,
        ("CRBBB",),
        _right_bundle_block,
        ("right bundle branch block", "complete right bundle branch block"),
    ),
    Finding(
        0.10,
        ("1AVB",),
        _av_block,
        ("first degree av block", "prolonged pr interval, av block first degree"),
    ),
    Finding(
        0.08,
        ("LAFB",),
        _left_anterior_block,
        ("left anterior fascicular block", "left axis deviation, left anterior hemiblock"),
    ),
)
_INFERIOR: tuple[Vector, Vector] = ((0.0, -0.85, 0.0), (-0.02, 0.24, 0.02))
_ANTEROSEPTAL: tuple[Vector, Vector] = ((0.0, 0.0, 0.90), (0.06, 0.0, -0.28))
_LATERAL: tuple[Vector, Vector] = ((-0.95, 0.10, 0.0), (0.22, -0.05, 0.06))
INFARCT = (
    Finding(
        0.07,
        ("IMI",),
        _infarct(*_INFERIOR, acute=False),
        ("old inferior myocardial infarction", "q waves in ii, iii, avf, inferior infarct age undetermined"),
    ),
    Finding(
        0.06,
        ("IMI", "STE_"),
        _infarct(*_INFERIOR, acute=True),
        (
            "acute inferior myocardial infarction with st elevation",
            "st elevation in ii, iii, avf, inferior infarction",
        ),
    ),
    Finding(
        0.07,
        ("ASMI",),
        _infarct(*_ANTEROSEPTAL, acute=False),
        (
            "old anteroseptal myocardial infarction",
            "q waves in v1 to v3, anteroseptal infarct age undetermined",
        ),
    ),
    Finding(
        0.06,
        ("ASMI", "STE_"),
        _infarct(*_ANTEROSEPTAL, acute=True),
        (
            "acute anteroseptal myocardial infarction with st elevation",
            "st elevation in v1 to v4, anterior infarction",
        ),
    ),
    Finding(
        0.08,
        ("LMI",),
        _infarct(*_LATERAL, acute=False),
        ("lateral myocardial infarction", "q waves in i, avl, v5, v6, lateral infarct"),
    ),
)
VOLTAGE = (
    Finding(
        0.07,
        ("LVH", "VCLVH"),
        _hypertrophy(strain=False),
        ("left ventricular hypertrophy", "high voltages, left ventricular hypertrophy"),
    ),
    Finding(
        0.07,
        ("LVH", "VCLVH"),
        _hypertrophy(strain=True),
        ("left ventricular hypertrophy with strain", "left ventricular hypertrophy and st-t changes"),
    ),
    Finding(
        0.06,
        ("LVOLT",),
        _low_voltage,
        ("low qrs voltages", "low voltage in the frontal and horizontal leads"),
    ),
)
REPOLARISATION = (
    Finding(
        0.11,
        ("ISC_", "STD_"),
        _st_depression,
        ("st depression, myocardial ischemia", "ischemic st depression"),
    ),
    Finding(
        0.11,
        ("NDT",),
        _flat_t,
        (
            "non-specific t wave changes, t waves flat",
            "t wave abnormality, flat or slightly inverted t waves",
        ),
    ),
)

# code: (description, diagnostic, form, rhythm, class, subclass), as PTB-XL's scp_statements.csv has them.
STATEMENTS: dict[str, tuple[str, str, str, str, str, str]] = {
    "NDT": ("non-diagnostic T abnormalities", "1.0", "1.0", "", "STTC", "STTC"),
    "NORM": ("normal ECG", "1.0", "", "", "NORM", "NORM"),
    "IMI": ("inferior myocardial infarction", "1.0", "", "", "MI", "IMI"),
    "ASMI": ("anteroseptal myocardial infarction", "1.0", "", "", "MI", "AMI"),
    "LVH": ("left ventricular hypertrophy", "1.0", "", "", "HYP", "LVH"),
    "LAFB": ("left anterior fascicular block", "1.0", "", "", "CD", "LAFB/LPFB"),
    "ISC_": ("non-specific ischemic", "1.0", "", "", "STTC", "ISC_"),
    "1AVB": ("first degree AV block", "1.0", "", "", "CD", "_AVB"),
    "CRBBB": ("complete right bundle branch block", "1.0", "", "", "CD", "CRBBB"),
    "CLBBB": ("complete left bundle branch block", "1.0", "", "", "CD", "CLBBB"),
    "LMI": ("lateral myocardial infarction", "1.0", "", "", "MI", "LMI"),
    "PVC": ("ventricular premature complex", "", "1.0", "", "", ""),
    "STD_": ("non-specific ST depression", "", "1.0", "", "", ""),
    "VCLVH": ("voltage criteria (QRS) for left ventricular hypertrophy", "", "1.0", "", "", ""),
    "LVOLT": ("low QRS voltages in the frontal and horizontal leads", "", "1.0", "", "", ""),
    "STE_": ("non-specific ST elevation", "", "1.0", "", "", ""),
    "SR": ("sinus rhythm", "", "", "1.0", "", ""),
    "AFIB": ("atrial fibrillation", "", "", "1.0", "", ""),
    "STACH": ("sinus tachycardia", "", "", "1.0", "", ""),
    "SARRH": ("sinus arrhythmia", "", "", "1.0", "", ""),
    "SBRAD": ("sinus bradycardia", "", "", "1.0", "", ""),
}
DIAGNOSTIC = frozenset(code for code, row in STATEMENTS.items() if row[1])


def _draw_findings(rng: np.random.Generator) -> list[Finding]:
    """Findings in the order in which they act on the heart: conduction first, as it replaces the QRS."""
    rhythm, premature, conduction = (_choose(group, rng) for group in (RHYTHMS, PREMATURE, CONDUCTION))
    infarct, voltage, repolarisation = (_choose(group, rng) for group in (INFARCT, VOLTAGE, REPOLARISATION))
    if _has(rhythm, "AFIB") and _has(conduction, "1AVB"):
        conduction = None  # without P waves there is no PR interval
    if _has(conduction, "CLBBB"):
        infarct = voltage = repolarisation = None  # a left bundle branch block hides all of these
    if infarct is not None or _has(voltage, "LVH"):
        repolarisation = None  # these bring their own ST and T changes
    found = (rhythm, premature, conduction, infarct, voltage, repolarisation)
    return [finding for finding in found if finding is not None]


def _choose(group: Sequence[Finding], rng: np.random.Generator) -> Finding | None:
    draw = rng.random()
    for finding in group:
        draw -= finding.weight
        if draw < 0:
            return finding
    return None


def _has(finding: Finding | None, code: str) -> bool:
    return finding is not None and code in finding.codes


def _report(findings: Sequence[Finding], codes: Sequence[str], rng: np.random.Generator) -> str:
    sentences = [str(rng.choice(finding.phrases)) for finding in findings]
    if codes == ("NORM", "SR"):
        sentences.append(
            str(rng.choice(("normal ecg", "no abnormality found, normal ecg", "within normal limits")))
        )
    elif "NORM" in codes:
        sentences.append(str(rng.choice(("otherwise normal ecg", "no other abnormality, normal ecg"))))
    elif len(sentences) > 2 and rng.random() < 0.3:
        sentences.append(sentences.pop(1))  # readers differ in what they name first
    return ". ".join(sentences) + "."


# --- signal -------------------------------------------------------------------------------------------------


def _dipole(heart: Heart, rng: np.random.Generator, fs_hz: float) -> np.ndarray:
    """The heart's dipole [T, 3] in mV over SECONDS."""
    time = np.arange(round(SECONDS * fs_hz)) / fs_hz
    ectopic_waves = _ectopic_waves(rng)
    centers, widths, dipoles = [], [], []
    for peak, rr, ectopic in _beats(heart, rng):
        # QT follows the square root of RR (Bazett); P and QRS keep their timing.
        stretch = np.sqrt(rr)
        gain = np.exp(rng.normal(0.0, 0.03))
        early = ectopic_waves if ectopic else heart.p + heart.qrs
        late = () if ectopic else heart.st + heart.t
        for wave, factor in [(w, 1.0) for w in early] + [(w, stretch) for w in late]:
            centers.append(peak + wave.time_s * factor)
            widths.append(wave.width_s * factor)
            dipoles.append(_times(wave.dipole, gain))
    offsets = (time[:, None] - np.array(centers)) / np.array(widths)
    return np.exp(-0.5 * offsets**2) @ np.array(dipoles) + _flutter(heart, rng, time)


def _beats(heart: Heart, rng: np.random.Generator) -> list[tuple[float, float, bool]]:
    """(R peak, RR before it, whether it is a premature ventricular one), from before 0 s to after SECONDS."""
    mean = 60.0 / heart.rate_bpm
    breath_hz, phase = rng.uniform(0.2, 0.3), rng.uniform(0, 2 * np.pi)
    peak = -rng.uniform(0.2, 1.0) * mean - 0.5
    beats: list[tuple[float, float, bool]] = []
    # An ECG that is said to have extra beats shows at least one.
    due = heart.ectopic_share > 0
    while peak < SECONDS + 0.5:
        swing = 1 + heart.breathing * np.sin(2 * np.pi * breath_hz * peak + phase)
        rr = max(0.3, mean * swing * (1 + rng.normal(0.0, heart.irregularity)))
        peak += rr
        beats.append((peak, rr, False))
        sure = due and peak > 3.0
        if heart.ectopic_share and 0.3 < peak < SECONDS - 1 and (sure or rng.random() < heart.ectopic_share):
            due = False
            early = rng.uniform(0.55, 0.7) * rr
            beats.append((peak + early, early, True))
            peak += rr  # the sinus beat under the extra one is blocked: a full compensatory pause
    return beats


def _ectopic_waves(rng: np.random.Generator) -> tuple[Wave, ...]:
    """A wide beat from one ventricle, its T wave opposite to it."""
    direction = rng.normal(size=3)
    x, y, z = 1.5 * direction / np.linalg.norm(direction)
    return (
        Wave(-0.03, 0.025, (0.5 * x, 0.5 * y, 0.5 * z)),
        Wave(0.025, 0.030, (x, y, z)),
        Wave(0.27, 0.060, (-0.35 * x, -0.35 * y, -0.35 * z)),
    )


def _flutter(heart: Heart, rng: np.random.Generator, time: np.ndarray) -> np.ndarray:
    """Fibrillatory waves [T, 3]: 4-9 Hz with a wandering frequency, largest towards V1."""
    if not heart.fibrillates:
        return np.zeros((len(time), 3))
    frequency = rng.uniform(4.5, 8.5) + np.cumsum(rng.normal(0, 0.05, len(time)))
    angle = 2 * np.pi * np.cumsum(np.clip(frequency, 4, 9)) * (time[1] - time[0])
    size = rng.uniform(0.04, 0.1) * (1 + 0.3 * np.sin(2 * np.pi * rng.uniform(0.2, 0.6) * time))
    return (size * np.sin(angle))[:, None] * np.array([-0.3, 0.4, -1.0])


def _leads(dipole: np.ndarray) -> np.ndarray:
    """dipole [T, 3] to the 12 leads [12, T] in the order of STANDARD_LEADS."""
    v1_to_v6_i_ii = DOWER @ dipole.T
    chest, first, second = v1_to_v6_i_ii[:6], v1_to_v6_i_ii[6], v1_to_v6_i_ii[7]
    limb = [
        first,
        second,
        second - first,
        -(first + second) / 2,
        first - second / 2,
        second - first / 2,
    ]
    return np.concatenate([np.stack(limb), chest])


def _noise(rng: np.random.Generator, samples: int, fs_hz: float) -> np.ndarray:
    """Baseline wander and muscle noise [12, T] in mV; each electrode has its own."""
    time = np.arange(samples) / fs_hz
    wander = np.zeros((12, samples))
    for _ in range(2):
        frequency, phase = rng.uniform(0.1, 0.45), rng.uniform(0, 2 * np.pi, (12, 1))
        wander += rng.normal(0, 0.025, (12, 1)) * np.sin(2 * np.pi * frequency * time + phase)
    return wander + rng.normal(0.0, rng.uniform(0.005, 0.02), (12, samples))


# --- files --------------------------------------------------------------------------------------------------


def write_dataset(
    out: Path, *, records: int, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> None:
    """Write ``records`` synthetic ECGs at 100 Hz in PTB-XL's layout, with ten patient-wise folds.

    The same ``records`` and ``seed`` write the same bytes. A patient has one or two records.

    Raises:
        EcgotError: ``records`` is not positive, or ``out`` exists and is not an empty folder.
    """
    if records < 1:
        raise EcgotError(f"records: got {records}, accepted is a number >= 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise EcgotError(f"out: {out} exists and is not an empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        _write_records(temporary, records, seed, progress)
        _write_statements(temporary / "scp_statements.csv")
        temporary.chmod(0o755)
        if out.exists():
            out.rmdir()
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
                # As PTB-XL: a likelihood for diagnoses, 0 (unknown) for form and rhythm.
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
