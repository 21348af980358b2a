"""The page and the index in headless Chromium: what is pointed at lights up, by mouse, touch and keyboard."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import made_readings as made
import pytest

from ecgot.page.index import Entry, index
from ecgot.page.page import frame, page

if TYPE_CHECKING:
    from playwright.sync_api import Page

Show = Callable[..., "Page"]
CELL_S = 10.0 / made.CELLS
AT_S = CELL_S * made.PREMATURE  # where the premature beat begins
PVC, SINUS = "button.finding[data-finding='form/PVC']", "button.finding[data-finding='rhythm/SR']"


def violations(shown: "Page") -> list[str]:
    """What axe-core finds against WCAG and good practice."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    return [
        f"{each['id']}: {each['nodes'][0]['html']}" for each in axe.Axe().run(shown).response["violations"]
    ]


def lit(shown: "Page", kind: str = "for") -> list[dict[str, float]]:
    """What is lit on the visible sheets, in mm; strongest first."""
    rects = shown.eval_on_selector_all(
        f"svg.sheet:not([hidden]) .light rect.{kind}",
        "rects => rects.map(r => Object.fromEntries("
        "['x', 'y', 'width', 'height', 'opacity'].map(n => [n, Number(r.getAttribute(n))])))",
    )
    return sorted(rects, key=lambda each: -each["opacity"])


def classes(shown: "Page", name: str) -> set[str]:
    """Findings and sentences that carry a class."""
    found = shown.eval_on_selector_all(
        f"button.{name}", "all => all.map(b => b.querySelector('.name').innerText)"
    )
    return {re.sub(r"\s*\b[A-Z_]{2,}$", "", each) for each in found}


def place(shown: "Page", x_mm: float, y_mm: float) -> tuple[float, float]:
    """On the screen, of a point of the sheet."""
    box = shown.locator("svg.sheet:not([hidden])").bounding_box()
    assert box is not None
    return box["x"] + box["width"] * x_mm / 265, box["y"] + box["width"] * y_mm / 265


def beat(shown: "Page") -> tuple[float, float]:
    """The premature beat in aVF, third row."""
    return place(shown, 13 + 25 * (AT_S + CELL_S / 2), 62)


def readout(shown: "Page") -> str:
    return shown.locator(".readout").inner_text()


REFUSED = made.window(verdict="refused", remarks=(made.Remark("noise", "no ECG: noise"),), classes=())
DOUBTFUL = made.window(verdict="doubtful", remarks=(made.Remark("flat", "V6 is flat", ("V6",)),))
STATES = made.record(derived_leads=("III", "aVR"), estimated_leads=("V3",), flat_leads=("V6",))
READINGS: dict[str, Callable[[], Any]] = {
    "plain": made.reading,
    "doubtful": lambda: made.reading(windows=(DOUBTFUL,), signal=STATES, calibrated=False),
    "refused": lambda: made.reading(windows=(REFUSED,), sentences=(), measurements=None),
    "refused, no trace": lambda: made.reading(
        windows=(REFUSED,), sentences=(), measurements=None, signal=None
    ),
    "long": lambda: made.reading(windows=tuple(made.window(10.0 * n) for n in range(9)), shown=4),
    "20 s": lambda: made.reading(signal=made.record(signal_mv=made.signal(20.0))),
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", READINGS)
def test_axe_finds_nothing(show: Show, kind: str, scheme: str) -> None:
    shown = show(page(READINGS[kind]()), color_scheme=scheme)
    for details in shown.locator("details:not([open]) > summary").all():
        details.click()
    assert violations(shown) == []
    if kind == "doubtful":
        shown.click("button[data-view=leads]")
        shown.hover(PVC)
        assert violations(shown) == []


def test_a_finding_lights_its_evidence(show: Show) -> None:
    shown = show(page(made.reading()))
    shown.keyboard.press("Escape")
    assert lit(shown) == []
    shown.hover(PVC)
    found = [each for each in lit(shown) if each["height"] > 2]  # without the lane of all leads
    assert {round(each["x"], 2) for each in found} == {round(13 + 25 * AT_S, 2)}
    assert {round(each["y"], 1) for each in found} == {0.6, 25.6, 50.6, 75.6}  # aVR, aVL, aVF, II
    opacity = {round(each["y"]): each["opacity"] for each in found}
    assert opacity[51] > opacity[26] > opacity[1]  # as strong as the shares of aVF, aVL, aVR
    assert lit(shown, "against")
    assert classes(shown, "lit") == {"Premature ventricular beats", "Premature ventricular contractions"}
    assert readout(shown).startswith(
        "Premature ventricular beats (PVC): read most from 4.1 to 4.4 s and from V6, V5, V4."
    )
    assert "V6 at this time is on “All leads”" in readout(shown)
    assert "Blue speaks against it." in readout(shown)
    shown.mouse.move(5, 5)
    assert lit(shown) == []


def test_all_leads_show_evidence_wherever_it_is(show: Show) -> None:
    shown = show(page(made.reading()))
    shown.click("button[data-view=leads]")
    shown.hover(PVC)
    found = [each for each in lit(shown) if each["height"] > 2]
    assert len(found) == 12
    assert found[0]["y"] == pytest.approx(3 + 12 * 11 + 0.6)  # V6
    assert "All leads" not in readout(shown)


def test_a_sentence_lights_the_finding_it_names(show: Show) -> None:
    shown = show(page(made.reading()))
    shown.hover("text=premature ventricular contractions")
    by_sentence = lit(shown)
    shown.hover(SINUS)
    assert lit(shown) != by_sentence
    shown.hover(PVC)
    assert lit(shown) == by_sentence


def test_a_stretch_lights_the_findings_that_draw_on_it(show: Show) -> None:
    shown = show(page(made.reading()))
    shown.mouse.move(*beat(shown))
    assert "Premature ventricular beats" in classes(shown, "draws")
    assert "Premature ventricular contractions" in classes(shown, "draws")
    assert readout(shown).startswith("aVF, 4.1 to 4.4 s:")
    assert len(lit(shown, "cursor")) == 1
    shown.mouse.move(*place(shown, 20, 62))  # III at the beginning
    assert readout(shown).startswith("III, 0.0 to 0.3 s:")
    assert "Premature ventricular beats" not in classes(shown, "draws")
    shown.mouse.move(5, 5)
    assert classes(shown, "draws") == set()


def test_the_keyboard_reaches_everything(show: Show) -> None:
    shown = show(page(made.reading()))
    shown.keyboard.press("Escape")
    shown.locator("button.theme").focus()
    shown.keyboard.press("Tab")
    trace = shown.get_by_role("application", name="ECG of 12 leads")
    assert trace.evaluate("trace => trace === document.activeElement")
    assert readout(shown).startswith("I, 0.0 to 0.3 s:")
    for _ in range(made.PREMATURE):
        shown.keyboard.press("ArrowRight")
    assert readout(shown).startswith("aVR, 4.1 to 4.4 s:")
    shown.keyboard.press("ArrowDown")
    shown.keyboard.press("ArrowDown")
    assert readout(shown).startswith("aVF, 4.1 to 4.4 s:")
    assert "Premature ventricular beats" in classes(shown, "draws")
    shown.keyboard.press("ArrowDown")
    assert readout(shown).startswith("II, 4.1 to 4.4 s:")
    shown.keyboard.press("ArrowDown")  # there is nothing below
    assert readout(shown).startswith("II, 4.1 to 4.4 s:")
    for _ in range(made.PREMATURE + 3):
        shown.keyboard.press("ArrowLeft")
    assert readout(shown).startswith("II, 0.0 to 0.3 s:")
    shown.keyboard.press("Tab")
    assert classes(shown, "lit") == {"Conduction disturbance"}
    shown.keyboard.press("ArrowDown")
    shown.keyboard.press("ArrowDown")
    assert "Premature ventricular beats" in classes(shown, "lit")
    shown.keyboard.press("Enter")
    assert shown.get_attribute(PVC, "aria-pressed") == "true"
    shown.keyboard.press("Tab")
    shown.keyboard.press("Shift+Tab")
    shown.evaluate("document.activeElement.blur()")
    assert "Premature ventricular beats" in classes(shown, "lit"), "what was pressed stays lit"
    shown.keyboard.press("Escape")
    assert lit(shown) == []
    assert shown.get_attribute(PVC, "aria-pressed") == "false"


def test_enter_on_the_trace_keeps_what_draws_most_on_it(show: Show) -> None:
    shown = show(page(made.reading()))
    shown.keyboard.press("Escape")
    shown.click("button[data-view=leads]")
    shown.locator(".sheets").focus()
    shown.keyboard.press("ArrowUp")  # begins
    for _ in range(11):
        shown.keyboard.press("ArrowDown")
    for _ in range(made.PREMATURE):
        shown.keyboard.press("ArrowRight")
    assert readout(shown).startswith("V6, 4.1 to 4.4 s: premature ventricular beats")
    shown.keyboard.press("Enter")
    assert shown.get_attribute(PVC, "aria-pressed") == "true"


def test_touch_lights_both_ways(show: Show) -> None:
    shown = show(page(made.reading()), has_touch=True)
    shown.tap(SINUS)
    assert "Sinus rhythm" in classes(shown, "lit")
    shown.touchscreen.tap(*beat(shown))
    assert "Premature ventricular beats" in classes(shown, "draws")
    assert readout(shown).startswith("aVF, 4.1 to 4.4 s:")


def test_what_is_read_from_one_place_is_lit_at_first(show: Show) -> None:
    shown = show(page(made.reading()))
    assert shown.get_attribute(PVC, "aria-pressed") == "true"
    assert lit(shown)


def test_print_is_true_to_the_millimetre(show: Show) -> None:
    shown = show(page(made.reading()), viewport={"width": 1002, "height": 700})  # 265 mm: A4 without margins
    shown.emulate_media(media="print")
    box = shown.locator("svg.sheet:not([hidden])").bounding_box()
    assert box is not None
    assert box["width"] / 96 * 25.4 == pytest.approx(265, abs=0.2)
    # Were something wider than the page, Chromium would reduce the whole of it.
    assert shown.evaluate("document.documentElement.scrollWidth") <= 1002
    assert not shown.locator(".reduced-print").is_visible()
    assert shown.locator(".notice").is_visible()
    shown.set_viewport_size({"width": 700, "height": 1000})
    assert shown.locator(".reduced-print").is_visible()


def test_dark_follows_the_system_and_the_button(show: Show) -> None:
    def ground() -> str:
        return shown.evaluate("getComputedStyle(document.body).backgroundColor")

    shown = show(page(made.reading()), color_scheme="light")
    light = ground()
    shown.click("button.theme")
    dark = ground()
    assert dark != light
    shown.emulate_media(media="print")
    assert ground() == "rgb(255, 255, 255)"
    assert shown.locator(".theme").is_hidden()
    shown = show(page(made.reading()), color_scheme="dark")
    assert ground() == dark


def test_a_phone_shows_everything(show: Show) -> None:
    shown = show(page(made.reading()), viewport={"width": 400, "height": 800})
    assert shown.evaluate("document.documentElement.scrollWidth") <= 400
    assert violations(shown) == []


def test_a_notebook_shows_the_page_in_a_frame(show: Show) -> None:
    shown = show(f"<!DOCTYPE html><title>notebook</title><p>{frame(made.reading())}")
    inner = shown.frame_locator("iframe")
    inner.locator(SINUS).hover()
    assert "lit" in (inner.locator(SINUS).get_attribute("class") or "")


def entries() -> list[Entry]:
    block, beats = ("left bundle branch block", "CLBBB"), ("premature ventricular beats", "PVC")
    sinus = ("sinus rhythm", "SR", 0.95)
    return [
        Entry("rec10", "rec10.html", "good", ((*block, 0.8), sinus), 61.0),
        Entry("rec9", "rec9.html", "doubtful", ((*beats, 0.9), (*block, 0.7), sinus), 102.0),
        Entry("rec2", "a b#c.html", "good", (sinus,), None),
        Entry("noise", None, "refused", problem="no ECG: noise"),
        Entry("bad<b>", problem="record bad: expected 24000 bytes, got <i>"),
    ]


def names(shown: "Page") -> list[str]:
    return shown.locator("tbody tr:visible th").all_inner_texts()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_in_the_index(show: Show, scheme: str) -> None:
    shown = show(index(entries()), color_scheme=scheme)
    assert violations(shown) == []
    assert violations(show(index([]), color_scheme=scheme)) == []


def test_the_index_sorts(show: Show) -> None:
    shown = show(index(entries()))
    assert names(shown) == ["rec10", "rec9", "rec2", "noise", "bad<b>"]
    record, rate = (
        shown.locator("thead button", has_text="Record"),
        shown.locator("thead button", has_text="Heart"),
    )
    record.click()
    assert names(shown) == ["bad<b>", "noise", "rec2", "rec9", "rec10"]
    record.press("Enter")
    assert names(shown) == ["rec10", "rec9", "rec2", "noise", "bad<b>"]
    rate.click()
    assert names(shown)[:2] == ["rec9", "rec10"]
    assert shown.locator("th[aria-sort=descending]").inner_text().startswith("Heart rate")
    assert shown.locator("th[aria-sort=none]").count() == 4
    rate.click()
    assert names(shown)[:2] == ["rec10", "rec9"]  # what was not measurable stays last
    shown.locator("thead button", has_text="Probability").click()
    assert names(shown)[:2] == ["rec9", "rec10"]


def test_the_index_filters(show: Show) -> None:
    shown = show(index(entries()))
    count = shown.locator("#count")
    assert count.inner_text() == "5 shown"
    shown.fill("#text", "BUNDLE rec")
    assert names(shown) == ["rec10", "rec9"]
    assert count.inner_text() == "2 of 5 shown"
    shown.fill("#text", "")
    shown.select_option("#finding", "left bundle branch block")
    assert names(shown) == ["rec10", "rec9"]
    assert shown.locator("tbody tr:visible td:nth-child(4)").all_inner_texts() == ["80 %", "70 %"]
    shown.locator("thead button", has_text="Probability").click()
    assert names(shown) == ["rec10", "rec9"]
    shown.select_option("#finding", "")
    assert names(shown)[0] == "rec9"
    assert shown.locator("tbody tr:visible td:nth-child(4)").all_inner_texts()[0] == "90 %"
    shown.select_option("#verdict", "-")
    assert names(shown) == ["bad<b>"]
    assert shown.locator(".problem:visible").inner_text() == "record bad: expected 24000 bytes, got <i>"


def test_links_of_the_index_lead_to_pages(show: Show) -> None:
    shown = show(index(entries()))
    assert shown.get_attribute("text=rec9", "href") == "rec9.html"
    assert shown.get_attribute("text=rec2", "href") == "a%20b%23c.html"
