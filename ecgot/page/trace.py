"""Where the leads of an ECG lie on millimetre paper: 25 mm/s, 10 mm/mV. All lengths in mm."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MM_PER_S, MM_PER_MV = 25.0, 10.0
STEP_MM = 0.05  # that paths are rounded to: 2 ms and 5 uV, finer than a printed line is wide
PAPER_S = 10.0  # on one sheet
COLUMNS = (("I", "II", "III"), ("aVR", "aVL", "aVF"), ("V1", "V2", "V3"), ("V4", "V5", "V6"))
RHYTHM = "II"
PULSE_MM = 13.0  # left of the leads, for the calibration pulse
ROW_MM, LEAD_ROW_MM = 25.0, 12.0
FOOT_MM = 10.0  # below the last row
SMALLER = (10.0, 5.0, 2.5, 1.0)  # mm/mV; what is smaller than 10 is for signals that would leave the paper


@dataclass(frozen=True)
class Piece:
    """A stretch of one lead on a sheet.

    Attributes:
        lead: its name.
        row: of the record's signal.
        state: how it is drawn: "", "derived", "estimated", "flat" or "unusable".
        remark: what stands beside its name, such as "flat, estimated".
        x, y: its left end, and its line of 0 mV.
        top, height: of the band that belongs to it.
        start_s, stop_s: in the window.
    """

    lead: str
    row: int
    state: str
    remark: str
    x: float
    y: float
    top: float
    height: float
    start_s: float
    stop_s: float

    @property
    def width(self) -> float:
        """In mm."""
        return MM_PER_S * (self.stop_s - self.start_s)

    @property
    def from_x(self) -> float:
        """Where the lead's path begins, so that ``start_s`` lies at ``x``."""
        return self.x - MM_PER_S * self.start_s


@dataclass(frozen=True)
class Sheet:
    """At most ten seconds of the leads on paper.

    Attributes:
        view: "paper", three rows of four and a rhythm strip, or "leads", each lead over the whole time.
        width, height: of the paper.
        pieces: what is drawn, from top to bottom.
        start_s, stop_s: of the window.
        lane: top of the lane that shows evidence of all leads together.
    """

    view: str
    width: float
    height: float
    pieces: tuple[Piece, ...]
    start_s: float
    stop_s: float
    lane: float

    @property
    def pulses(self) -> tuple[float, ...]:
        """Baselines beside which a calibration pulse stands: of each row of the paper, of the last lead."""
        rows = tuple(dict.fromkeys(piece.y for piece in self.pieces))
        return rows if self.view == "paper" else rows[-1:]


@dataclass(frozen=True)
class Trace:
    """The drawing of a window.

    Attributes:
        paths: an SVG path for each row of the signal, in steps of ``STEP_MM``.
        sheets: by view, in order of time.
        mm_per_mv: 10, or less where the signal would leave the paper.
        duration_s: of the window.
    """

    paths: tuple[str, ...]
    sheets: tuple[Sheet, ...]
    mm_per_mv: float
    duration_s: float


def lay_out(record: Any, unusable: Collection[str] = ()) -> Trace:
    """The drawing of a :class:`ecgot.data.record.Record`, of which ``unusable`` leads are marked."""
    duration_s = record.signal_mv.shape[1] / record.fs_hz
    centred = record.signal_mv - np.median(record.signal_mv, axis=1, keepdims=True)
    reach = np.quantile(np.abs(centred), 0.999, axis=1).max()
    scale = next((each for each in SMALLER if reach * each <= 1.4 * ROW_MM), SMALLER[-1])
    states = [_states(lead, record, unusable) for lead in record.leads]
    sheets = tuple(
        sheet
        for view in (_paper, _leads)
        for start_s, stop_s in _parts(duration_s)
        if (sheet := view(record.leads, states, start_s, stop_s)) is not None
    )
    return Trace(tuple(svg_path(row, record.fs_hz, scale) for row in centred), sheets, scale, duration_s)


def svg_path(signal_mv: np.ndarray, fs_hz: float, mm_per_mv: float = MM_PER_MV) -> str:
    """signal [T] as the d of an SVG path, from the first sample on, in steps of ``STEP_MM``.

    >>> svg_path(np.array([0.0, 0.0, 1.0]), fs_hz=100)
    'M0 0l5 0 5-200'
    """
    x = np.round(np.arange(len(signal_mv)) * (MM_PER_S / fs_hz / STEP_MM)).astype(int)
    y = np.round(-signal_mv * (mm_per_mv / STEP_MM)).astype(int)
    steps = "".join(
        f"{'' if number == 0 else ' '}{dx}{'' if dy < 0 else ' '}{dy}"
        for number, (dx, dy) in enumerate(zip(np.diff(x), np.diff(y), strict=True))
    )
    return f"M{x[0]} {y[0]}" + (f"l{steps}" if steps else "")


def grid_path(width: float, height: float, step: float) -> str:
    """Vertical and horizontal lines every ``step`` mm, as the d of an SVG path."""
    across = "".join(f"M{x:g} 0V{height:g}" for x in np.arange(0, width + 1e-6, step))
    return across + "".join(f"M0 {y:g}H{width:g}" for y in np.arange(0, height + 1e-6, step))


def _states(lead: str, record: Any, unusable: Collection[str]) -> tuple[str, ...]:
    """What to know of a lead. The last is what its drawing shows: a flat lead may be estimated."""
    known = (
        ("flat", record.flat_leads),
        ("unusable", () if lead in record.flat_leads else unusable),
        ("estimated", record.estimated_leads),
        ("derived", record.derived_leads),
    )
    return tuple(state for state, leads in known if lead in leads)


def _drawn(states: tuple[str, ...]) -> tuple[str, str]:
    """State and remark of a piece."""
    return (states[-1] if states else ""), ", ".join(states)


def _parts(duration_s: float) -> Iterator[tuple[float, float]]:
    """Equal parts of at most ``PAPER_S``."""
    count = max(1, math.ceil(duration_s / PAPER_S - 1e-6))
    for number in range(count):
        yield number * duration_s / count, (number + 1) * duration_s / count


def _paper(
    leads: Sequence[str], states: Sequence[tuple[str, ...]], start_s: float, stop_s: float
) -> Sheet | None:
    """Three rows of four leads, a quarter of the time each, and a rhythm strip; None without such leads."""
    if not any(lead in column for column in COLUMNS for lead in leads):
        return None
    quarter_s = (stop_s - start_s) / len(COLUMNS)

    def piece(lead: str, line: int, from_s: float, to_s: float) -> Piece:
        row = leads.index(lead)
        top, x = ROW_MM * line, PULSE_MM + MM_PER_S * (from_s - start_s)
        return Piece(lead, row, *_drawn(states[row]), x, top + 0.56 * ROW_MM, top, ROW_MM, from_s, to_s)

    pieces = [
        piece(column[line], line, start_s + number * quarter_s, start_s + (number + 1) * quarter_s)
        for line in range(len(COLUMNS[0]))
        for number, column in enumerate(COLUMNS)
        if column[line] in leads
    ]
    strip = RHYTHM if RHYTHM in leads else leads[0]
    pieces.append(piece(strip, len(COLUMNS[0]), start_s, stop_s))
    return _sheet("paper", pieces, ROW_MM * (len(COLUMNS[0]) + 1), start_s, stop_s)


def _leads(leads: Sequence[str], states: Sequence[tuple[str, ...]], start_s: float, stop_s: float) -> Sheet:
    """Every lead over the whole time."""
    pieces = [
        Piece(
            lead,
            row,
            *_drawn(states[row]),
            PULSE_MM,
            LEAD_ROW_MM * (row + 0.56) + 3.0,
            LEAD_ROW_MM * row + 3.0,
            LEAD_ROW_MM,
            start_s,
            stop_s,
        )
        for row, lead in enumerate(leads)
    ]
    return _sheet("leads", pieces, LEAD_ROW_MM * len(leads) + 3.0, start_s, stop_s)


def _sheet(view: str, pieces: Sequence[Piece], bottom: float, start_s: float, stop_s: float) -> Sheet:
    width = 5.0 * math.ceil((PULSE_MM + MM_PER_S * (stop_s - start_s) + 2.0) / 5.0)
    height = 5.0 * math.ceil((bottom + FOOT_MM) / 5.0)
    return Sheet(view, width, height, tuple(pieces), start_s, stop_s, bottom + 1.5)
