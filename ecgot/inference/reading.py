"""What the model says about one record, and what it says it from. Light: it imports no torch."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ecgot.choices import NORMAL_CODES
from ecgot.data.measurements import Measurements
from ecgot.data.quality import Quality
from ecgot.data.record import Record
from ecgot.errors import EcgotError
from ecgot.inference.calibration import Finding
from ecgot.inference.display import NOTICE

if TYPE_CHECKING:
    from ecgot.inference.evidence import Evidence

WORTH_NAMING = 0.05  # the least probability of an undecided finding that is listed


@dataclass(frozen=True)
class Sentence:
    """A sentence of a report.

    Attributes:
        text: without its full stop.
        probability: that the model gives to these very words; None where they are not the model's.
        remark: what the model wrote in their place, and what speaks against that; None if nothing does.
        finding_probability: the calibrated probability of the finding that the sentence names; None if it
            names none of the classes.
    """

    text: str
    probability: float | None
    remark: str | None = None
    finding_probability: float | None = None


@dataclass(frozen=True)
class Window:
    """A stretch of a record, as long as the model reads at once.

    Attributes:
        start_s, stop_s: in the record.
        quality: whether it is an ECG that can be read.
        findings: of every class; empty where the stretch was not read.
        scores: group -> class -> score, see :func:`ecgot.inference.zeroshot.class_scores`.
    """

    start_s: float
    stop_s: float
    quality: Quality
    findings: tuple[Finding, ...] = ()
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict, repr=False)

    @property
    def stated(self) -> tuple[Finding, ...]:
        """What is found, abnormal findings first, then the surest first; once, if in several groups."""
        found = [finding for finding in self.findings if finding.stated]
        found.sort(key=lambda each: (each.code in NORMAL_CODES, -each.probability))
        return _once(found)

    @property
    def undecided(self) -> tuple[Finding, ...]:
        """What is neither found nor excluded, from ``WORTH_NAMING`` on, the most probable first; once."""
        open_ones = [
            each for each in self.findings if each.stated is None and each.probability >= WORTH_NAMING
        ]
        return _once(sorted(open_ones, key=lambda each: -each.probability))

    @property
    def weight(self) -> float:
        """How far its strongest abnormal finding is above its threshold; -1 if there is none."""
        above = (each.probability - each.threshold for each in self.stated if each.code not in NORMAL_CODES)
        return max(above, default=-1.0)


def _once(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    first: dict[str, Finding] = {}
    for each in findings:
        first.setdefault(each.name, each)
    return tuple(first.values())


@dataclass(frozen=True)
class Reading:
    """What the model says about one record.

    Of a record that is longer than the model reads at once, each window is read; report, measurements and
    :attr:`findings` are those of the window with the strongest abnormal finding.

    Attributes:
        record: what was read: a path, or a name.
        duration_s: of the whole record.
        windows: the stretches that were read, in order.
        shown: which of them report, measurements and signal are of.
        report: the text; None where nothing was to be said or no decoder has been trained.
        sentences: of the report.
        written: what the decoder wrote, with the sentences that were left out or mended.
        measurements: None if they were not asked for or nothing was to be said.
        notes: what was done to the signal, and what a reader should know.
        recorder: the recorder whose wording the report follows; None if unknown.
        calibrated: whether probabilities were calibrated; :attr:`notes` says if on records of the training.
        signal: the window as the model saw it.
    """

    record: str
    duration_s: float
    windows: tuple[Window, ...]
    shown: int
    report: str | None
    sentences: tuple[Sentence, ...]
    written: str | None
    measurements: Measurements | None
    notes: tuple[str, ...]
    recorder: str | None
    calibrated: bool
    signal: Record | None = field(default=None, repr=False, compare=False)
    explain: "Callable[[Finding], Evidence] | None" = field(default=None, repr=False, compare=False)

    @property
    def window(self) -> Window:
        """The window with the strongest abnormal finding."""
        return self.windows[self.shown]

    @property
    def quality(self) -> Quality:
        """Whether the window is an ECG that can be read."""
        return self.window.quality

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Every class of the window, see :attr:`Window.stated` for what is found."""
        return self.window.findings

    @property
    def scores(self) -> Mapping[str, Mapping[str, float]]:
        """Group -> class -> score."""
        return self.window.scores

    @property
    def refused(self) -> bool:
        """Whether nothing is said, as no window can be read."""
        return not self.findings

    def finding(self, name: str) -> Finding:
        """The finding with this code, such as "CLBBB", or name, such as "left bundle branch block".

        Raises:
            EcgotError: there is none.
        """
        wanted = name.casefold()
        for finding in self.findings:
            if wanted in (finding.code.casefold(), finding.name.casefold()):
                return finding
        known = ", ".join(finding.code for finding in self.findings)
        raise EcgotError(f"finding: expected one of {known or '(nothing was read)'}, got {name!r}")

    def evidence(self, finding: Finding | str) -> "Evidence":
        """Where in time and in which leads a finding's score comes from.

        Raises:
            EcgotError: there is no such finding, or the reading was made without its model.
        """
        wanted = self.finding(finding) if isinstance(finding, str) else finding
        if self.explain is None:
            raise EcgotError("evidence: expected a reading as its reader returned it, got a copy from a file")
        return self.explain(wanted)

    def to_dict(self) -> dict[str, Any]:
        """The reading as plain values for JSON."""
        window = self.window
        return {
            "record": self.record,
            "duration_s": self.duration_s,
            "start_s": window.start_s,
            "stop_s": window.stop_s,
            "verdict": window.quality.verdict,
            "remarks": [dataclasses.asdict(remark) for remark in window.quality.remarks],
            "findings": [dataclasses.asdict(finding) for finding in window.findings],
            "calibrated": self.calibrated,
            "scores": {group: dict(scores) for group, scores in window.scores.items()},
            "report": self.report,
            "sentences": [dataclasses.asdict(sentence) for sentence in self.sentences],
            "written": self.written,
            "measurements": None if self.measurements is None else dataclasses.asdict(self.measurements),
            "notes": list(self.notes),
            "recorder": self.recorder,
            "windows": [_summary(each) for each in self.windows],
            "notice": NOTICE,
        }

    def to_html(self) -> str:
        """The reading as one self-contained page."""
        from ecgot.page.page import page

        return page(self)

    def plot(self, path: str | Path | None = None) -> Any:
        """The trace with the findings, as a matplotlib figure; written to ``path`` if given."""
        from ecgot.page.figure import figure

        drawn = figure(self)
        if path is not None:
            drawn.savefig(path)
        return drawn

    def _repr_html_(self) -> str:
        from ecgot.page.page import frame

        return frame(self)

    def __repr__(self) -> str:
        if self.refused:
            said = "; ".join(remark.text for remark in self.quality.remarks)
            return f"Reading({self.record!r}: not read: {said})"
        found = ", ".join(f"{each.name} {each.probability:.0%}" for each in self.window.stated)
        at = f" at {self.window.start_s:g} s" if len(self.windows) > 1 else ""
        return f"Reading({self.record!r}{at}: {found or 'nothing found'})"


@dataclass(frozen=True)
class ReadingError:
    """A record of a list that could not be read, and why."""

    record: str
    reason: str


def _summary(window: Window) -> dict[str, Any]:
    return {
        "start_s": window.start_s,
        "stop_s": window.stop_s,
        "verdict": window.quality.verdict,
        "found": {each.code: round(each.probability, 4) for each in window.stated},
    }
