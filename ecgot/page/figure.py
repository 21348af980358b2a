"""A reading as a matplotlib figure: twelve leads on millimetre paper above, what is said below."""

from typing import Any

import numpy as np

from ecgot.errors import EcgotError
from ecgot.inference.display import NOTICE
from ecgot.page.page import facts, once, percent
from ecgot.page.trace import MM_PER_S, PULSE_MM, Piece, Sheet, lay_out

MM_PER_INCH, DPI = 25.4, 150
MARGIN_MM, TITLE_MM, TEXT_MM, LINE_MM = 6.0, 14.0, 46.0, 5.2
LONGEST = 110  # characters of a record's name
LINES = 6  # of findings, and of the report; what is more is counted
PAPER, FINE, COARSE, INK, MUTED, MARKED = "#fffdfb", "#f8dcd8", "#eeb4ae", "#141922", "#59616e", "#9c1f24"
COLORS = {"derived": "#1f5f99", "estimated": "#6b3fa0", "flat": MUTED, "unusable": MUTED}


def figure(reading: Any) -> Any:
    """The first ten seconds of a :class:`ecgot.inference.reading.Reading` with its findings.

    Returns:
        A :class:`matplotlib.figure.Figure` of the size of the paper: 25 mm/s and 10 mm/mV where it is not
        scaled.

    Raises:
        EcgotError: the reading has no signal, or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EcgotError("plot: expected matplotlib, got none; pip install 'ecgot[plot]'") from error
    record = reading.signal
    if record is None:
        raise EcgotError(f"plot: expected a reading with its signal, got {reading.record} without")
    trace = lay_out(record, reading.quality.unusable_leads)
    sheet = trace.sheets[0]
    width, height = sheet.width + 2 * MARGIN_MM, sheet.height + TITLE_MM + TEXT_MM + MARGIN_MM
    drawn = Figure(figsize=(width / MM_PER_INCH, height / MM_PER_INCH), dpi=DPI, facecolor="white")
    axes = drawn.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-MARGIN_MM, sheet.width + MARGIN_MM), ylim=(sheet.height + TEXT_MM + MARGIN_MM, -TITLE_MM))
    axes.axis("off")
    _draw_paper(axes, sheet, trace.mm_per_mv)
    centred = record.signal_mv - np.median(record.signal_mv, axis=1, keepdims=True)
    for piece in sheet.pieces:
        _draw_piece(axes, piece, centred[piece.row], record.fs_hz, trace.mm_per_mv)
    _draw_title(axes, reading)
    _draw_findings(axes, reading, 0.0, sheet.height + 6.0)
    _draw_report(axes, reading, 0.53 * sheet.width, sheet.height + 6.0)
    axes.text(0, sheet.height + TEXT_MM + 2.0, NOTICE, size=9, color=MARKED, va="center")
    return drawn


def _draw_paper(axes: Any, sheet: Sheet, mm_per_mv: float) -> None:
    width, height = sheet.width, sheet.height
    axes.fill([0, width, width, 0], [0, 0, height, height], color=PAPER, lw=0)
    for step, color, line in ((1.0, FINE, 0.4), (5.0, COARSE, 0.6)):
        axes.vlines(np.arange(0, width + 0.1, step), 0, height, color=color, lw=line)
        axes.hlines(np.arange(0, height + 0.1, step), 0, width, color=color, lw=line)
    for y in sheet.pulses:
        x = 6.9 + np.array([0.0, 0.8, 0.8, 4.4, 4.4, 5.2])
        axes.plot(x, y - mm_per_mv * np.array([0, 0, 1, 1, 0, 0]), color=INK, lw=0.8)
    legend = f"25 mm/s   {mm_per_mv:g} mm/mV"
    axes.text(PULSE_MM, height - 2.5, legend, size=7, color=MUTED, va="center")


def _draw_piece(axes: Any, piece: Piece, signal_mv: np.ndarray, fs_hz: float, mm_per_mv: float) -> None:
    first, last = round(piece.start_s * fs_hz), round(piece.stop_s * fs_hz)
    part = signal_mv[first : last + 1]
    x = piece.from_x + MM_PER_S * np.arange(first, first + len(part)) / fs_hz
    color = COLORS.get(piece.state, INK)
    dashes = "--" if piece.state in ("estimated", "flat", "unusable") else "-"
    axes.plot(x, piece.y - mm_per_mv * part, dashes, color=color, lw=0.8, solid_joinstyle="round")
    if piece.x > PULSE_MM:
        axes.vlines(piece.x, piece.y - 3, piece.y + 3, color=INK, lw=0.6)
    name = f"{piece.lead} {piece.remark}".strip()
    left = piece.x + 1.2 if piece.height > 12 else 0.8
    axes.text(
        left, piece.top + 3, name, size=9 if piece.height > 12 else 7, weight="bold", color=color, va="center"
    )


def _draw_title(axes: Any, reading: Any) -> None:
    name = reading.record if len(reading.record) <= LONGEST else "…" + reading.record[-LONGEST:]
    axes.text(0, -8.5, name, size=11, weight="bold", color=INK, va="center", clip_on=True)
    measured = [f"{fact.name} {fact.value} {fact.unit}" for fact in facts(reading.measurements) if fact.value]
    axes.text(0, -3.0, "   ".join(measured), size=9, color=MUTED, va="center")


def _draw_findings(axes: Any, reading: Any, x: float, top: float) -> None:
    axes.text(x, top, "Findings", size=11, weight="bold", color=INK, va="center")
    if reading.refused:
        said = [remark.text for remark in reading.quality.remarks] or ["the signal was refused"]
        for row, text in enumerate(["Nothing is said about this record:", *said][: LINES + 1]):
            axes.text(x, top + LINE_MM * (row + 1.3), text, size=10, color=MARKED, va="center")
        return
    stated = once(reading.window.stated)
    for row, finding in enumerate(stated[:LINES]):
        y = top + LINE_MM * (row + 1.3)
        axes.text(x + 10, y, percent(finding.probability), size=10, color=INK, va="center", ha="right")
        axes.text(x + 13, y, f"{finding.name} ({finding.code})", size=10, color=INK, va="center")
    _draw_rest(axes, len(stated), x + 13, top)


def _draw_report(axes: Any, reading: Any, x: float, top: float) -> None:
    if not reading.sentences:
        return
    axes.text(
        x, top, "Report, with the probability of its words", size=11, weight="bold", color=INK, va="center"
    )
    for row, sentence in enumerate(reading.sentences[:LINES]):
        y = top + LINE_MM * (row + 1.3)
        doubt = "" if sentence.remark is None else f" – changed: {sentence.remark}"
        sure = "" if sentence.probability is None else percent(sentence.probability)
        axes.text(x + 10, y, sure, size=10, color=MUTED, va="center", ha="right")
        axes.text(x + 13, y, sentence.text + doubt, size=10, color=MARKED if doubt else INK, va="center")
    _draw_rest(axes, len(reading.sentences), x + 13, top)


def _draw_rest(axes: Any, count: int, x: float, top: float) -> None:
    if not count:
        axes.text(x, top + 1.3 * LINE_MM, "nothing is stated", size=10, color=MUTED, va="center")
    elif count > LINES:
        axes.text(
            x, top + LINE_MM * (LINES + 1.3), f"and {count - LINES} more", size=9, color=MUTED, va="center"
        )
