"""Pages as PDF and PNG, by an installed Chromium."""

import re
import struct
from pathlib import Path

import made_readings as made
import pytest

from ecgot.errors import EcgotError
from ecgot.page.chromium import find_chromium, write_pdf, write_png
from ecgot.page.page import page


@pytest.fixture
def html(tmp_path: Path) -> Path:
    file = tmp_path / "the page #1.html"
    file.write_text(page(made.reading()), encoding="utf-8")
    return file


def test_a_page_as_pdf_is_one_a4_in_landscape(chromium: str, html: Path) -> None:
    out = html.with_suffix(".pdf")
    write_pdf(html, out)
    written = out.read_bytes()
    assert written.startswith(b"%PDF")
    (box,) = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", written)
    assert [float(each) / 72 * 25.4 for each in box] == pytest.approx([297, 210], abs=0.5)
    assert sorted(html.parent.iterdir()) == [html, out]


def test_a_page_as_png_is_whole(chromium: str, html: Path) -> None:
    out = html.with_suffix(".png")
    write_png(html, out)
    written = out.read_bytes()
    assert written.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", written[16:24])
    assert width == 2 * 1440
    assert 1600 < height < 2600
    assert sorted(html.parent.iterdir()) == [html, out]


def test_without_chromium_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("ECGOT_CHROMIUM", raising=False)
    with pytest.raises(EcgotError, match=r"^chromium: expected Chromium or Chrome on PATH, .* got none$"):
        find_chromium()
    monkeypatch.setenv("ECGOT_CHROMIUM", "/nowhere/chrome")
    with pytest.raises(EcgotError, match=r"got ECGOT_CHROMIUM=/nowhere/chrome$"):
        write_pdf(tmp_path / "page.html", tmp_path / "page.pdf")
    assert list(tmp_path.iterdir()) == []


def test_a_program_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "chromium"
    program.write_text("#!/bin/sh\necho no display >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("ECGOT_CHROMIUM", str(program))
    with pytest.raises(EcgotError, match=r"^chromium: expected .* to show page.html, got no display$"):
        write_pdf(tmp_path / "page.html", tmp_path / "page.pdf")
    assert list(tmp_path.iterdir()) == [program]
