"""What may be said: nothing of leads that are not there, and sentences that agree with what was measured."""

import functools
import re
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ecgot.data.leads import LIMB_LEADS, STANDARD_LEADS
from ecgot.data.measurements import Measurements
from ecgot.data.quality import Quality
from ecgot.data.record import Record
from ecgot.inference.calibration import Finding
from ecgot.inference.reading import Sentence, Window
from ecgot.inference.verify import Resolved, resolve
from ecgot.page.named import named_findings
from ecgot.text.labels import stated_labels

NEEDED = Path(__file__).with_name("needed_leads.toml")
CHEST_LEADS = STANDARD_LEADS[6:]
NORM = "NORM"
OF_LIMBS = re.compile(r"\b(limb|axis|frontal)\b", re.IGNORECASE)  # no finding, but said of limb leads


@functools.cache
def _needed() -> dict[str, frozenset[str]]:
    """Classes that cannot be judged without chest leads ("chest"), and without two limb leads ("limb")."""
    tables = tomllib.loads(NEEDED.read_text(encoding="utf-8"))
    return {name: frozenset(codes) for name, codes in tables.items()}


def lacking(record: Record, quality: Quality) -> frozenset[str]:
    """ "chest" if too few chest leads were recorded, "limb" if fewer than two limb leads were.

    One chest lead is enough beside the limb leads, from which the others are estimated; without these three.
    """
    gone = {*record.estimated_leads, *record.derived_leads, *record.flat_leads, *quality.unusable_leads}
    recorded = [lead for lead in STANDARD_LEADS if lead not in gone]
    chest, limbs = (sum(lead in leads for lead in recorded) for leads in (CHEST_LEADS, LIMB_LEADS))
    enough = {"chest": chest >= 3 or (chest and limbs >= 2), "limb": limbs >= 2}
    return frozenset(name for name, is_enough in enough.items() if not is_enough)


def without(findings: Sequence[Finding], lacks: frozenset[str]) -> tuple[Finding, ...]:
    """The findings, undecided where a class needs leads that were not recorded."""
    unknown = {code for name in lacks for code in _needed()[name]}
    return tuple(replace(each, stated=None) if each.code in unknown else each for each in findings)


def consistent(findings: Sequence[Finding], quality: Quality) -> tuple[Finding, ...]:
    """The findings, without what their calibration cannot know.

    A normal ECG is undecided beside a superclass that is stated. Where the signal was refused, a calibration
    says nothing: everything is undecided, and its interval is all of [0, 1].
    """
    if quality.verdict == "refused":
        return tuple(replace(each, stated=None, low=0.0, high=1.0) for each in findings)
    abnormal = any(each.stated and each.group == "superclass" and each.code != NORM for each in findings)
    return tuple(replace(each, stated=None) if abnormal and each.code == NORM else each for each in findings)


def agreed(
    written: Sequence[tuple[str, float]],
    window: Window,
    measurements: Measurements | None,
    lacks: frozenset[str],
) -> tuple[tuple[Sentence, ...], tuple[str, ...]]:
    """The sentences that may be said of a window, and a note on each that may not.

    What is contradicted is said anew from what was measured, with a remark, or left out; see
    :func:`ecgot.inference.verify.resolve`. Left out are also findings for which leads are lacking.
    """
    kept = [each for each in written if not (lacks and _needs_leads(each[0], lacks))]
    probabilities: dict[str, dict[str, float]] = {}
    for finding in window.findings:
        probabilities.setdefault(finding.group, {})[finding.code] = finding.probability
    sentences: list[Sentence] = []
    notes = [
        f'left out of the report: "{text}" (leads are lacking)'
        for text, probability in written
        if (text, probability) not in kept
    ]
    resolved = resolve([text for text, _ in kept], measurements, probabilities)
    for (text, probability), each in zip(kept, resolved, strict=True):
        if each.sentence is None:
            notes.append(f'left out of the report: "{text}" ({each.reason})')
        elif any(each.sentence == said.text for said in sentences):
            continue  # some decoders repeat themselves
        else:
            sentences.append(_sentence(text, probability, each, window.findings))
    return tuple(sentences), tuple(notes)


def _sentence(text: str, probability: float, resolved: Resolved, findings: Sequence[Finding]) -> Sentence:
    """A sentence of the model's, or what is said in its place, of which measurements alone are sure."""
    assert resolved.sentence is not None
    if resolved.sentence != text:
        return Sentence(resolved.sentence, None, f'the model wrote "{text}": {resolved.reason}')
    named = named_findings(text, findings)
    return Sentence(text, probability, None, named[0].probability if named else None)


def _needs_leads(sentence: str, lacks: frozenset[str]) -> bool:
    if "limb" in lacks and OF_LIMBS.search(sentence):
        return True
    return bool(stated_labels([sentence], "superclass").any())


def notes_on(record: Record, window: Window, lacks: frozenset[str], seconds: float) -> tuple[str, ...]:
    """What was done to a window's signal, and what is not judged, for a person to read."""
    notes = [
        f"{count} missing samples filled in lead {lead}" for lead, count in record.repaired_samples.items()
    ]
    for verb, leads in (
        ("derived from other leads", record.derived_leads),
        ("estimated from other leads", record.estimated_leads),
    ):
        if leads:
            notes.append(f"{_listed(leads)} {verb}")
    if lacks:
        names = {"chest": "enough chest leads", "limb": "two limb leads"}
        what = " and ".join(names[name] for name in sorted(lacks))
        notes.append(f"not judged without {what}: what shows there")
    if window.stop_s - window.start_s < seconds - 1 / record.fs_hz:
        notes.append(f"{window.stop_s - window.start_s:g} s, shorter than the {seconds:g} s of training")
    return tuple(notes)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
