"""A reading as one self-contained HTML page: no network, no fonts or scripts from elsewhere.

A finding lights up its evidence on the trace, and a stretch of the trace the findings that draw on it. Jinja
writes the page and escapes whatever comes from a file. The page's content security policy lets its own script
run, known by its hash, and nothing else, and lets nothing be fetched.
"""

import base64
import functools
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from ecgot.choices import NORMAL_CODES
from ecgot.errors import EcgotError
from ecgot.inference.display import NOTICE, SURE
from ecgot.page.named import named_findings
from ecgot.page.trace import MM_PER_S, PULSE_MM, STEP_MM, Trace, grid_path, lay_out
from ecgot.version import __version__

if TYPE_CHECKING:
    from jinja2 import Environment

FOLDER = Path(__file__).parent
ALSO = 3  # findings that are not stated, whose evidence is shown too: the most probable ones
FULL = 100  # the strongest share of a finding's evidence, as the page holds it


@dataclass(frozen=True)
class Fact:
    """A measured value: None was not measurable."""

    name: str
    value: str | None
    unit: str = ""


@dataclass(frozen=True)
class Said:
    """A sentence of the report, with the finding it names and whose evidence can be shown (or "")."""

    text: str
    probability: float | None
    remark: str | None
    finding: str


@dataclass(frozen=True)
class Span:
    """Neighbouring windows of a long record of which the same is said."""

    start_s: float
    stop_s: float
    verdict: str
    found: tuple[tuple[str, float], ...]
    shown: bool
    abnormal: bool


def page(reading: Any) -> str:
    """The page of an :class:`ecgot.inference.reading.Reading`, as HTML.

    The evidence of what is stated, of what the report names and of the three most probable other findings is
    computed now.
    """
    record, window = reading.signal, reading.window
    sentences = [(each, named_findings(each.text, reading.findings)) for each in reading.sentences]
    shown = _with_evidence(reading, [name for _, names in sentences for name in names[:1]])
    trace = None if record is None else lay_out(record, window.quality.unusable_leads)
    stated = window.stated
    script = asset("theme.js") + asset("page.js")
    return (
        environment()
        .get_template("page.html")
        .render(
            reading=reading,
            window=window,
            record=record,
            name=PurePath(reading.record).name or reading.record,
            trace=trace,
            grids=[] if trace is None else _grids(trace),
            facts=facts(reading.measurements),
            stated=once(stated),
            undecided=(undecided := once(reading.window.undecided)),
            absent=once(
                _by_probability(
                    each for each in reading.findings if not each.stated and each not in undecided
                )
            ),
            said=[_said(sentence, names, shown) for sentence, names in sentences],
            spans=spans(reading),
            has_evidence=frozenset(shown),
            data=_data(trace, shown, _first(stated, shown)),
            script=script,
            script_hash=script_hash(script),
            style=asset("shared.css") + asset("page.css"),
            r_peaks_s=() if reading.measurements is None else reading.measurements.r_peaks_s,
            unsure=SURE,
            notice=NOTICE,
            version=__version__,
            pulse_mm=PULSE_MM,
            mm_per_s=MM_PER_S,
            step_mm=STEP_MM,
        )
    )


def frame(reading: Any, height_px: int = 960) -> str:
    """The page in a frame of its own, for notebooks: neither's styles and scripts reach the other."""
    from markupsafe import escape

    return (
        f'<iframe title="ECG reading" sandbox="allow-scripts" srcdoc="{escape(page(reading))}" '
        f'style="width:100%;height:{height_px}px;border:0"></iframe>'
    )


def key(finding: Any) -> str:
    """What names a finding within a page: two groups may have classes of the same code."""
    return f"{finding.group}/{finding.code}"


def once(findings: Iterable[Any]) -> list[Any]:
    """The first finding of each name: groups share classes, such as the normal ECG."""
    first: dict[str, Any] = {}
    for finding in findings:
        first.setdefault(finding.name, finding)
    return list(first.values())


def percent(probability: float) -> str:
    """ "87 %"; never 0 or 100 of what is not certain."""
    if 0 < probability < 0.005:
        return "< 1 %"
    return "> 99 %" if 0.995 < probability < 1 else f"{100 * probability:.0f} %"


def clock(seconds: float) -> str:
    """ "7.5 s", "2:05" or "1:02:05"."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def facts(measured: Any) -> list[Fact]:
    """What was measured, as a person reads it; empty if nothing was to be measured."""
    if measured is None:
        return []

    def number(value: float | None) -> str | None:
        return None if value is None or not math.isfinite(value) else f"{value:.0f}"

    both = [number(measured.qt_ms), number(measured.qtc_ms)]
    qt = None if both == [None, None] else " / ".join(each or "–" for each in both)
    axis = number(measured.axis_deg)
    found = [
        Fact("Heart rate", number(measured.heart_rate_bpm), "/min"),
        Fact("PR", number(measured.pr_ms), "ms"),
        Fact("QRS", number(measured.qrs_ms), "ms"),
        Fact("QT / QTc (Fridericia)", qt, "ms"),
        Fact("Axis", None if axis is None else axis.replace("-", "−"), "°"),
    ]
    if measured.pacing_spikes:
        found.append(Fact("Pacing spikes", str(measured.pacing_spikes)))
    return found


def spans(reading: Any) -> list[Span]:
    """A record's windows, neighbours with the same findings as one; empty if there is only one."""
    if len(reading.windows) < 2:
        return []
    found: list[Span] = []
    for number, window in enumerate(reading.windows):
        span = Span(
            window.start_s,
            window.stop_s,
            window.quality.verdict,
            tuple((each.name, each.probability) for each in once(window.stated)),
            number == reading.shown,
            any(each.code not in NORMAL_CODES for each in window.stated),
        )
        if found and not span.shown and not found[-1].shown and _same(found[-1], span):
            strongest = dict(found[-1].found)
            both = tuple((name, max(value, strongest[name])) for name, value in span.found)
            found[-1] = Span(
                found[-1].start_s, span.stop_s, span.verdict, both, shown=False, abnormal=span.abnormal
            )
        else:
            found.append(span)
    return found


@functools.cache
def environment() -> "Environment":
    """Jinja, set up for the templates of this package."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.policies["json.dumps_kwargs"] = {"sort_keys": False, "separators": (",", ":")}
    made.filters |= {"percent": percent, "clock": clock, "key": key}
    return made


def asset(name: str) -> Any:
    """A style or script of this package, marked as safe to stand in a page."""
    from markupsafe import Markup

    return Markup((FOLDER / name).read_text(encoding="utf-8"))


def script_hash(script: str) -> str:
    """What a content security policy calls a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _with_evidence(reading: Any, named: Sequence[Any]) -> dict[str, tuple[Any, Any]]:
    """Key -> finding and its evidence; empty if the reading was made without its model."""
    stated = reading.window.stated
    others = _by_probability(each for each in reading.findings if not each.stated)[:ALSO]
    try:
        return {key(each): (each, reading.evidence(each)) for each in (*stated, *named, *others)}
    except EcgotError:
        return {}


def _first(stated: Sequence[Any], shown: Mapping[str, tuple[Any, Any]]) -> str:
    """What is lit when the page opens: of the abnormal findings, the one that is read most from one place."""

    def concentration(name: str) -> float:
        shares = np.clip(np.asarray(shown[name][1].by_time, float), 0.0, None)
        return float(shares.max() / shares.sum()) if shares.any() else 0.0

    abnormal = [key(each) for each in stated if each.code not in NORMAL_CODES and key(each) in shown]
    return max(abnormal, key=concentration, default="")


def _by_probability(findings: Iterable[Any]) -> list[Any]:
    return sorted(findings, key=lambda each: -each.probability)


def _said(sentence: Any, names: Sequence[Any], shown: Mapping[str, Any]) -> Said:
    keys = [key(each) for each in names if key(each) in shown]
    return Said(sentence.text, sentence.probability, sentence.remark, next(iter(keys), ""))


def _same(one: Span, other: Span) -> bool:
    return (
        one.verdict == other.verdict
        and {name for name, _ in one.found} == {name for name, _ in other.found}
        and abs(one.stop_s - other.start_s) < 1e-6
    )


def _grids(trace: Trace) -> list[tuple[str, str]]:
    """The fine and the coarse lines of each sheet's paper."""
    return [
        (grid_path(sheet.width, sheet.height, 1.0), grid_path(sheet.width, sheet.height, 5.0))
        for sheet in trace.sheets
    ]


def _data(trace: Trace | None, shown: Mapping[str, tuple[Any, Any]], first: str) -> dict[str, Any]:
    """What the page's script works on."""
    findings = {}
    for name, (finding, evidence) in shown.items():
        grid, by_time = np.asarray(evidence.grid, float), np.asarray(evidence.by_time, float)
        edges = np.asarray(evidence.times_s, float)
        findings[name] = {
            "name": finding.name,
            "code": finding.code,
            "edges": np.round(edges, 4).tolist(),
            "peak": int(np.searchsorted(edges, evidence.peak_s, side="right")) - 1,
            "leads": dict(zip(evidence.leads, _shares(grid).tolist(), strict=True)),
            "time": _shares(by_time).tolist(),
        }
    sheets = (
        []
        if trace is None
        else [
            {
                "start": sheet.start_s,
                "stop": sheet.stop_s,
                "lane": sheet.lane,
                "pieces": [
                    [each.lead, each.x, each.top, each.height, each.start_s, each.stop_s]
                    for each in sheet.pieces
                ],
            }
            for sheet in trace.sheets
        ]
    )
    return {"findings": findings, "sheets": sheets, "first": first, "pulse": PULSE_MM, "mmPerS": MM_PER_S}


def _shares(shares: np.ndarray) -> np.ndarray:
    """Whole numbers, the largest of which is ``FULL``."""
    largest = np.abs(shares).max(initial=0.0)
    return np.round(shares * (FULL / largest if largest > 0 else 0.0)).astype(int)
