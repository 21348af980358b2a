"""Sentences of a report against measured facts, class probabilities and each other.

A contradiction is not proof that the sentence is wrong: the measurement or the probability may be. The rules
are the tables below. Limits leave room for errors of measurement; `python -m benchmarks.quality` counts how
often PTB-XL's own reports break them.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ecgot.data.measurements import Measurements
from ecgot.text.labels import label_groups, stated_labels

Probabilities = Mapping[str, Mapping[str, float]]  # group -> class

BRADYCARDIA_BPM, TACHYCARDIA_BPM = 60.0, 100.0
UNLIKELY = 0.05  # a sentence whose class is less probable is contradicted
LIKELY = 0.5  # a class that is more probable contradicts
SPIKES_MIN = 3  # pacing spikes


@dataclass(frozen=True)
class Contradiction:
    """A sentence of a report, and why it cannot be so."""

    sentence: str
    reason: str


@dataclass(frozen=True)
class Resolved:
    """What became of one sentence.

    Attributes:
        sentence: what to say; None where nothing takes the place of what was said.
        said: what was said.
        reason: why it was changed; None if it was not.
    """

    sentence: str | None
    said: str
    reason: str | None


@dataclass(frozen=True)
class Limit:
    """A statement that holds only while a measurement lies within limits.

    Attributes:
        pattern: regular expression of the statement, in plain English.
        says: the same in words.
        measure: attribute of Measurements.
        low, high: limits; below and above, the statement is contradicted.
        unit: and number format, of the measurement.
    """

    pattern: str
    says: str
    measure: str
    low: float = float("-inf")
    high: float = float("inf")
    unit: str = "{:.0f}/min"


BPM, MS, DEGREES, SHARE = "{:.0f}/min", "{:.0f} ms", "{:.0f}°", "RR varies by {:.0%}"
_NORMAL = r"(?<!otherwise )(?<!not )(?<!not a )\bnormal ecg\b"
_SINUS_ALONE = r"^(?!.*(?:bradycardia|tachycardia)).*\bsinus rhythm\b"
LIMITS = (
    Limit(r"\bbradycardia\b", "bradycardia", "heart_rate_bpm", high=BRADYCARDIA_BPM + 3),
    Limit(r"(?<!supraventricular )\btachycardia\b", "tachycardia", "heart_rate_bpm", low=TACHYCARDIA_BPM - 3),
    Limit(r"rapid ventricular response", "rapid ventricular response", "heart_rate_bpm", low=90),
    Limit(r"slow ventricular response", "slow ventricular response", "heart_rate_bpm", high=70),
    Limit(_SINUS_ALONE, "sinus rhythm, neither slow nor fast", "heart_rate_bpm", 60, 100),
    Limit(r"first degree av block|prolonged pr\b", "long PR", "pr_ms", low=190, unit=MS),
    Limit(r"short pr\b", "short PR", "pr_ms", high=135, unit=MS),
    Limit(r"prolonged qt", "prolonged QT", "qtc_ms", low=410, unit="QTc {:.0f} ms"),
    Limit(
        r"(?<!incomplete )(?:left|right) bundle branch block",
        "bundle branch block",
        "qrs_ms",
        low=95,
        unit="QRS {:.0f} ms",
    ),
    Limit(
        r"intraventricular (?:conduction )?(?:block|delay)",
        "slow conduction",
        "qrs_ms",
        low=80,
        unit="QRS {:.0f} ms",
    ),
    Limit(r"\bnormal axis\b", "normal axis", "axis_deg", -20, 110, DEGREES),
    Limit(r"\bleft axis\b(?! deviation)", "left axis", "axis_deg", -70, 40, DEGREES),
    Limit(r"\bleft axis deviation\b", "left axis deviation", "axis_deg", high=-10, unit=DEGREES),
    Limit(
        r"left anterior fascicular block",
        "left anterior fascicular block",
        "axis_deg",
        high=-15,
        unit=DEGREES,
    ),
    Limit(r"\bright axis\b", "right axis", "axis_deg", low=75, unit=DEGREES),
    Limit(r"atrial fibrillation", "atrial fibrillation", "rr_variation", low=0.06, unit=SHARE),
    Limit(r"sinus arrhythmia", "sinus arrhythmia", "rr_variation", low=0.03, unit=SHARE),
    Limit(_NORMAL, "normal ECG", "heart_rate_bpm", 48, 115),
    Limit(_NORMAL, "normal ECG", "pr_ms", high=260, unit="PR {:.0f} ms"),
    Limit(_NORMAL, "normal ECG", "qrs_ms", high=130, unit="QRS {:.0f} ms"),
    Limit(_NORMAL, "normal ECG", "qtc_ms", high=480, unit="QTc {:.0f} ms"),
)
# What a statement cannot stand beside: group and class that are probable, or that another sentence states.
EXCLUDED: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    (_NORMAL, "normal ECG", "superclass", ("MI", "STTC", "CD", "HYP")),
    (
        r"\bsinus (?:rhythm|bradycardia|tachycardia|arrhythmia)",
        "sinus rhythm",
        "rhythm",
        ("AFIB", "AFLT", "PACE"),
    ),
    (r"first degree av block|prolonged pr\b", "long PR", "rhythm", ("AFIB", "AFLT")),
)
NAMES = {
    "NORM": "a normal ECG",
    "MI": "myocardial infarction",
    "STTC": "ST or T changes",
    "CD": "a conduction disturbance",
    "HYP": "hypertrophy",
    "SR": "sinus rhythm",
    "AFIB": "atrial fibrillation",
    "STACH": "sinus tachycardia",
    "SARRH": "sinus arrhythmia",
    "SBRAD": "sinus bradycardia",
    "PACE": "a pacemaker",
    "BIGU": "bigeminy",
    "TRIGU": "trigeminy",
    "AFLT": "atrial flutter",
    "SVTAC": "supraventricular tachycardia",
    "SVARR": "supraventricular arrhythmia",
}
# What follows from measured RR intervals is not asked of a probability.
MEASURED = frozenset({"SBRAD", "STACH", "SARRH"})
_RHYTHM = re.compile(r"\bsinus (?:rhythm|bradycardia|tachycardia)|atrial (?:fibrillation|flutter)")
_AXIS = re.compile(r"\b(?:normal axis|left axis|right axis)\b")


def contradictions(
    sentences: Sequence[str],
    measurements: Measurements | None,
    probabilities: Probabilities,
) -> tuple[Contradiction, ...]:
    """Sentences that something contradicts, each once, with the first reason.

    Args:
        sentences: of one report, in plain English (:func:`ecgot.text.glossary.plain_english`).
        measurements: None where nothing was measured.
        probabilities: calibrated, by group and class; those that are missing contradict nothing. A
            sentence is contradicted where its class is below ``UNLIKELY``, and where a class that excludes it
            is ``LIKELY``.
    """
    found = []
    for row, sentence in enumerate(sentences):
        others = [text for number, text in enumerate(sentences) if number != row]
        reason = next(_reasons(sentence, others, measurements, probabilities), None)
        if reason is not None:
            found.append(Contradiction(sentence, reason))
    return tuple(found)


def resolve(
    sentences: Sequence[str],
    measurements: Measurements | None,
    probabilities: Probabilities,
) -> tuple[Resolved, ...]:
    """A report without its contradictions: rhythm and axis are said anew, from what was measured and what is
    probable; other sentences are left out.

    Args: as of :func:`contradictions`.
    """
    resolved: list[Resolved] = []
    for row, said in enumerate(sentences):
        # What was left out before no longer contradicts what follows.
        before = [each.sentence for each in resolved if each.sentence is not None]
        others = [*before, *sentences[row + 1 :]]
        reason = next(_reasons(said, others, measurements, probabilities), None)
        text: str | None = said
        if reason is not None:
            text = _instead(said, measurements, probabilities)
        if text is not None and reason is not None:
            again = next(_reasons(text, before, measurements, probabilities), None)
            text = None if again is not None or text in before else text
        resolved.append(Resolved(text, said, reason))
    return tuple(resolved)


def _reasons(
    sentence: str,
    others: Sequence[str],
    measurements: Measurements | None,
    probabilities: Probabilities,
) -> Iterator[str]:
    if measurements is not None:
        yield from _against_measurements(sentence, measurements)
    yield from _against_probabilities(sentence, probabilities)
    yield from _against_others(sentence, others)


def _against_measurements(sentence: str, measurements: Measurements) -> Iterator[str]:
    for limit in LIMITS:
        value = getattr(measurements, limit.measure)
        if value is None or limit.low <= value <= limit.high or not re.search(limit.pattern, sentence):
            continue
        yield f"says {limit.says}; measured {limit.unit.format(value)}"
    if re.search("atrial fibrillation", sentence) and measurements.pr_ms is not None:
        yield f"says atrial fibrillation; P waves precede the beats by {measurements.pr_ms:.0f} ms"
    if re.search(r"\bsinus ", sentence) and measurements.pacing_spikes >= SPIKES_MIN:
        yield f"says sinus rhythm; {measurements.pacing_spikes} pacing spikes"


def _against_probabilities(sentence: str, probabilities: Probabilities) -> Iterator[str]:
    for group, name in _stated(sentence):
        probability = probabilities.get(group, {}).get(name)
        if name in MEASURED or probability is None:
            continue
        if probability < UNLIKELY:
            yield f"says {NAMES[name]}; its probability is {probability:.0%}"
    for pattern, says, group, names in EXCLUDED:
        if not re.search(pattern, sentence):
            continue
        for name in names:
            if _likely(probabilities, group, name):
                yield f"says {says}; {NAMES[name]} has a probability of {probabilities[group][name]:.0%}"


def _against_others(sentence: str, others: Sequence[str]) -> Iterator[str]:
    for pattern, says, group, names in EXCLUDED:
        if not re.search(pattern, sentence):
            continue
        for other in others:
            if any(stated == (group, name) for stated in _stated(other) for name in names):
                yield f'says {says} beside "{other}"'


def _stated(sentence: str) -> list[tuple[str, str]]:
    """Group and class of what a sentence states."""
    return [
        (group, name)
        for group, names in label_groups().items()
        for name, stated in zip(names, stated_labels([sentence], group)[0], strict=True)
        if stated
    ]


def _likely(probabilities: Probabilities, group: str, name: str) -> bool:
    probability = probabilities.get(group, {}).get(name)
    return probability is not None and probability >= LIKELY


def _instead(sentence: str, measurements: Measurements | None, probabilities: Probabilities) -> str | None:
    """What to say where ``sentence`` is contradicted; None: nothing."""
    if _RHYTHM.search(sentence):
        return _rhythm(measurements, probabilities)
    if _AXIS.search(sentence) and measurements is not None and measurements.axis_deg is not None:
        return _axis(measurements.axis_deg)
    return None


def _rhythm(measurements: Measurements | None, probabilities: Probabilities) -> str | None:
    paced = measurements is not None and measurements.pacing_spikes >= SPIKES_MIN
    if paced or _likely(probabilities, "rhythm", "PACE"):
        return "pacemaker rhythm"
    for name, words in (("AFIB", "atrial fibrillation"), ("AFLT", "atrial flutter")):
        if _likely(probabilities, "rhythm", name):
            return words
    rate = None if measurements is None else measurements.heart_rate_bpm
    if rate is not None and rate < BRADYCARDIA_BPM:
        return "sinus bradycardia"
    if rate is not None and rate > TACHYCARDIA_BPM:
        return "sinus tachycardia"
    return "sinus rhythm"


def _axis(degrees: float) -> str:
    """In the words of the reports: a left axis lies from -30 to 0 degrees."""
    if degrees >= 90 or degrees < -90:
        return "right axis deviation" if degrees >= 90 else "extreme axis deviation"
    if degrees >= 0:
        return "normal axis"
    return "left axis" if degrees >= -30 else "left axis deviation"
