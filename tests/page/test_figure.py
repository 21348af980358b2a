"""A reading as a matplotlib figure."""

from pathlib import Path

import made_readings as made
import pytest

from ecgot.errors import EcgotError
from ecgot.page.figure import figure

pytest.importorskip("matplotlib")


def texts(reading: object) -> list[str]:
    (axes,) = figure(reading).axes
    return [text.get_text() for text in axes.texts]


def test_the_figure_has_the_size_of_paper() -> None:
    drawn = figure(made.reading())
    width, height = drawn.get_size_inches() * 25.4
    (axes,) = drawn.axes
    across, down = axes.get_xlim(), axes.get_ylim()
    assert width == pytest.approx(across[1] - across[0])
    assert height == pytest.approx(down[0] - down[1])


def test_leads_lie_on_their_lines() -> None:
    record = made.record()
    (axes,) = figure(made.reading()).axes
    strip = axes.lines[-1]  # lead II over ten seconds
    x, y = strip.get_data()
    assert len(x) == 1000
    assert x[100] - x[0] == pytest.approx(25)
    assert y.max() - y.min() == pytest.approx(10 * (record.signal_mv[1].max() - record.signal_mv[1].min()))


def test_the_figure_says_what_the_reading_says(tmp_path: Path) -> None:
    said = texts(made.reading())
    assert "left bundle branch block (CLBBB)" in said
    assert "bradycardia – changed: measured 71/min" in said
    assert any("not a medical device" in each for each in said)
    figure(made.reading()).savefig(tmp_path / "drawn.png")


def test_a_refused_record_says_why() -> None:
    window = made.window(verdict="refused", remarks=(made.Remark("noise", "no ECG: noise"),), classes=())
    said = texts(made.reading(windows=(window,), sentences=(), measurements=None))
    assert "no ECG: noise" in said
    with pytest.raises(EcgotError, match="with its signal"):
        figure(made.reading(signal=None))
