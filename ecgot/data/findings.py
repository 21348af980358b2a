"""Findings: how often each is drawn, how it changes the heart, its SCP codes, and its wording in reports."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ecgot.data.heart import Heart, Vector, Wave, times

Change = Callable[[Heart, np.random.Generator], Heart]


@dataclass(frozen=True)
class Finding:
    """How a finding changes the heart, the SCP codes it sets, and its wording in reports."""

    weight: float  # its probability within its group
    codes: tuple[str, ...]
    change: Change
    phrases: tuple[str, ...]


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
    """An infarct: early QRS points away from it; ST points to it while acute, T away from it when old."""

    def change(heart: Heart, rng: np.random.Generator) -> Heart:
        size = rng.uniform(0.75, 1.3)
        heart = heart.adding("qrs", Wave(-0.018, 0.013, times(q, size)))
        if acute:
            return heart.adding("st", Wave(0.12, 0.045, times(injury, size)), Wave(0.2, 0.05, injury))
        return heart.adding("t", Wave(0.265, 0.045, times(injury, -1.3 * size)))

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
    return heart.scaled("t", times((1.0, 1.0, 1.0), rng.uniform(-0.25, 0.2)))


def _low_voltage(heart: Heart, rng: np.random.Generator) -> Heart:
    size = rng.uniform(0.3, 0.42)
    return heart.scaled("qrs", (size, size, size))


# The weights of a group are probabilities; the remainder to 1 is the probability of none.
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


def draw_findings(rng: np.random.Generator) -> list[Finding]:
    """Draw findings, in the order in which they act on the heart; conduction replaces the QRS."""
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


def write_report(findings: Sequence[Finding], codes: Sequence[str], rng: np.random.Generator) -> str:
    """One sentence per finding, with randomly drawn wording, and whether the ECG is otherwise normal."""
    sentences = [str(rng.choice(finding.phrases)) for finding in findings]
    if codes == ("NORM", "SR"):
        sentences.append(
            str(rng.choice(("normal ecg", "no abnormality found, normal ecg", "within normal limits")))
        )
    elif "NORM" in codes:
        sentences.append(str(rng.choice(("otherwise normal ecg", "no other abnormality, normal ecg"))))
    elif len(sentences) > 2 and rng.random() < 0.3:
        sentences.append(sentences.pop(1))  # readers differ in what they mention first
    return ". ".join(sentences) + "."
