"""Draw an ECG as on paper, with what the packaged model makes of it.

    python examples/draw_reading.py OUT.png                   # record 25 of `make demo`'s synthetic data
    python examples/draw_reading.py OUT.png --record RECORD   # a WFDB record of your own

Twelve leads of 2.5 s each in three rows of four, lead II once more over the whole 10 s, at 25 mm/s and
10 mm/mV. Needs matplotlib (``pip install 'ecgot[bench]'``). The picture in the README is the first command's.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

import ecgot
from ecgot.data.ptbxl import read_table
from ecgot.data.record import Record
from ecgot.data.synth import write_dataset
from ecgot.inference.display import NOTICE
from ecgot.inference.reader import Reading

DEMO_RECORD = 25  # atrial fibrillation with ischemic ST depression
SECONDS, COLUMNS = 10.0, 4
MM_PER_S, MM_PER_MV = 25.0, 10.0
LAYOUT = (
    ("I", "aVR", "V1", "V4"),
    ("II", "aVL", "V2", "V5"),
    ("III", "aVF", "V3", "V6"),
)
STRIP = "II"
# All in mm, from the lower left corner of the page.
MARGIN, ROW, TEXT = 6.0, 24.0, 54.0
PAPER = (MM_PER_S * SECONDS, ROW * (len(LAYOUT) + 1) + 4.0)
PAGE = (PAPER[0] + 2 * MARGIN, PAPER[1] + TEXT + 2 * MARGIN)
DPI = 150
FINE, COARSE, INK, MUTED, BAR = "#fbe3e1", "#f2b8b4", "#1d2430", "#667080", "#3b6ea8"
SHOWN = 3  # classes of each group


def demo_record(folder: Path) -> tuple[Path, str]:
    """Write the first records of `make demo`'s data set below ``folder``.

    Returns:
        The path of ``DEMO_RECORD`` and a title with the findings that it was made with.
    """
    data = folder / "data"
    write_dataset(data, records=DEMO_RECORD, seed=0)
    row = read_table(data).select([DEMO_RECORD - 1])
    title = f"Synthetic record {DEMO_RECORD} of `make demo`, simulated with: {row.reports[0].rstrip('.')}"
    return data / row.record_paths[0], title


def draw(record: Record, reading: Reading, title: str) -> Figure:
    """The page: ECG above, report and scores below."""
    figure = Figure(figsize=(PAGE[0] / 25.4, PAGE[1] / 25.4), dpi=DPI, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, PAGE[0]), ylim=(0, PAGE[1]))
    axes.axis("off")
    draw_ecg(axes, record, MARGIN, MARGIN + TEXT)
    top = MARGIN + TEXT - 5.0
    draw_report(axes, reading, title, MARGIN, top)
    draw_scores(axes, reading, MARGIN + 0.535 * PAPER[0], top)
    axes.text(MARGIN, 4.5, NOTICE, size=9, color=MUTED, va="center")
    axes.text(PAGE[0] - MARGIN, 4.5, "25 mm/s, 10 mm/mV", size=9, color=MUTED, va="center", ha="right")
    return figure


def draw_ecg(axes: Axes, record: Record, left: float, bottom: float) -> None:
    """Grid and leads, the paper's lower left corner at (left, bottom) mm."""
    width, height = PAPER
    for step, color, line in ((1.0, FINE, 0.5), (5.0, COARSE, 0.7)):
        axes.vlines(left + np.arange(0, width + 0.1, step), bottom, bottom + height, color=color, lw=line)
        axes.hlines(bottom + np.arange(0, height + 0.1, step), left, left + width, color=color, lw=line)
    lead_mv = dict(zip(record.leads, record.signal_mv, strict=True))
    seconds = SECONDS / COLUMNS
    for row, names in enumerate((*LAYOUT, (STRIP,))):
        baseline = bottom + height - 2.0 - ROW * (row + 0.6)
        length = seconds if len(names) > 1 else SECONDS
        for column, name in enumerate(names):
            draw_lead(axes, record, lead_mv[name], column * seconds, length, left, baseline)
            at = left + column * seconds * MM_PER_S
            axes.text(at + 1.5, baseline + 11.0, name, size=10, weight="bold", color=INK, va="center")
            if column:
                axes.vlines(at, baseline - 3, baseline + 3, color=INK, lw=0.7)


def draw_lead(
    axes: Axes, record: Record, signal_mv: np.ndarray, start_s: float, length_s: float, left: float, y: float
) -> None:
    """``length_s`` of one lead from ``start_s`` on, its median on the line y."""
    first, last = (round(at * record.fs_hz) for at in (start_s, start_s + length_s))
    part = signal_mv[first : last + 1]
    time = start_s + np.arange(len(part)) / record.fs_hz
    height = MM_PER_MV * (part - np.median(signal_mv))
    axes.plot(left + MM_PER_S * time, y + height, color=INK, lw=0.9, solid_joinstyle="round")


def draw_report(axes: Axes, reading: Reading, title: str, left: float, top: float) -> None:
    """Each sentence of the report with its probability."""
    axes.text(left, top, title, size=9, color=MUTED, va="top")
    axes.text(left, top - 8, "Report written by the model", size=12, weight="bold", color=INK, va="top")
    axes.text(left + 69, top - 8.6, "probability of its words", size=9, color=MUTED, va="top")
    for row, (sentence, probability) in enumerate(reading.sentences[:6]):
        y = top - 17.5 - 5.4 * row
        axes.text(left + 9, y, f"{probability:.2f}", size=10, color=BAR, va="center", ha="right")
        axes.text(left + 12, y, sentence, size=11, color=INK, va="center")


def draw_scores(axes: Axes, reading: Reading, left: float, top: float) -> None:
    """The highest classes of each group as bars, from log-odds 0 on."""
    axes.text(left, top - 8, "Class scores, zero-shot", size=12, weight="bold", color=INK, va="top")
    axes.text(left + 57, top - 8.6, "log-odds that a report would say it", size=9, color=MUTED, va="top")
    width = 30.0
    for column, (group, scores) in enumerate(reading.scores.items()):
        x = left + column * width
        axes.text(x, top - 17.5, group, size=10, color=MUTED, va="center")
        ranked = sorted(scores.items(), key=lambda item: -item[1])[:SHOWN]
        for row, (name, score) in enumerate(ranked):
            y = top - 24 - 7.4 * row
            color = INK if score > 0 else MUTED
            axes.text(x, y, name, size=10, color=color, va="center")
            axes.text(x + width - 5, y, f"{score:+.1f}", size=10, color=color, va="center", ha="right")
            axes.barh(y - 3.1, (width - 5) * max(0.0, min(score, 5.0)) / 5, height=1.0, left=x, color=BAR)


def save(figure: Figure, out: Path) -> None:
    """As a PNG of 64 colours, which is a third of the size and looks the same."""
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole.png"
        figure.savefig(whole, dpi=DPI)
        with Image.open(whole) as image:
            image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--record", type=Path, help="a WFDB record, with or without its extension")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path, title = options.record, f"record {options.record}"
        if path is None:
            path, title = demo_record(Path(temporary))
        record = ecgot.read_record(path)
        reading = ecgot.load_pretrained().read(path)
    save(draw(record, reading, title), options.out)


if __name__ == "__main__":
    main()
