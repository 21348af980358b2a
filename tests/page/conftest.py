"""A headless Chromium for the tests of pages; they skip where there is none."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ecgot.errors import EcgotError
from ecgot.page.chromium import find_chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of an installed Chromium."""
    try:
        return find_chromium()
    except EcgotError as error:
        pytest.skip(f"pages are not shown: {error}")


@pytest.fixture(scope="session")
def browser(chromium: str) -> Iterator["Browser"]:
    """An installed Chromium, driven by playwright."""
    api = pytest.importorskip(
        "playwright.sync_api", reason="pages are not shown: playwright is not installed"
    )
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def show(browser: "Browser", tmp_path: Path) -> Iterator[Callable[..., "Page"]]:
    """Opens HTML as a file; at the end nothing may have been said on the console, or asked from elsewhere."""
    wrong: list[str] = []
    contexts = []

    def opened(html: str, **settings: object) -> "Page":
        file = tmp_path / "page.html"
        file.write_text(html, encoding="utf-8")
        context = browser.new_context(**({"viewport": {"width": 1440, "height": 900}} | settings))
        contexts.append(context)
        shown = context.new_page()
        shown.on("console", lambda message: wrong.append(f"console: {message.text}"))
        shown.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        shown.on("request", lambda request: request.url == file.as_uri() or wrong.append(request.url))
        shown.goto(file.as_uri())
        return shown

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []
