"""A page as PDF or PNG, by a Chromium that is installed."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from ecgot.errors import EcgotError, first_line
from ecgot.files import write_atomically

VARIABLE = "ECGOT_CHROMIUM"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-quic",
    "--disable-sync",
    "--hide-scrollbars",
)
WIDTH_PX = 1440
TIMEOUT_S = 120


def find_chromium() -> str:
    """The program that ``ECGOT_CHROMIUM`` names, else a Chromium or Chrome on PATH.

    Raises:
        EcgotError: there is none.
    """
    wanted = os.environ.get(VARIABLE)
    names = (wanted,) if wanted else NAMES
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise EcgotError(
            f"chromium: expected Chromium or Chrome on PATH, or its path in {VARIABLE}, got "
            + (f"{VARIABLE}={wanted}" if wanted else "none")
        )
    return found


def write_pdf(html: Path, out: Path) -> None:
    """Print the page at ``html`` to ``out``, A4 in landscape, one millimetre of paper being one millimetre.

    Raises:
        EcgotError: there is no Chromium, or it fails.
    """
    write_atomically(
        out, lambda path: _run(html, f"--print-to-pdf={path}", "--no-pdf-header-footer", made=path)
    )


def write_png(html: Path, out: Path) -> None:
    """A picture of the whole page at ``html``, twice as fine as on screen.

    Raises:
        EcgotError: there is no Chromium, or it fails.
    """
    shown = _run(html, "--dump-dom", f"--window-size={WIDTH_PX},1000")
    height = re.search(r'<html[^>]* data-height="(\d+)"', shown)
    if height is None:
        raise EcgotError(f"png: expected a page that ecgot wrote in {html}, got another")
    size = f"--window-size={WIDTH_PX},{height[1]}"

    def picture(path: Path) -> None:
        # Chromium takes the format from the suffix, which a temporary file lacks.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / "page.png"
            _run(html, f"--screenshot={made}", size, "--force-device-scale-factor=2", made=made)
            os.replace(made, path)

    write_atomically(out, picture)


def _run(html: Path, *flags: str, made: Path | None = None) -> str:
    """What Chromium prints; it is to leave something in ``made``."""
    program = find_chromium()
    with tempfile.TemporaryDirectory(prefix="ecgot-chromium-") as profile:
        # Chromium's sandbox does not work for root, who is who runs in most containers.
        root = ("--no-sandbox",) if hasattr(os, "geteuid") and os.geteuid() == 0 else ()
        command = [program, *FLAGS, *root, f"--user-data-dir={profile}", *flags, html.resolve().as_uri()]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise EcgotError(f"chromium: expected {program} to run, got {first_line(error)}") from error
    if done.returncode or (made is not None and not (made.exists() and made.stat().st_size)):
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise EcgotError(f"chromium: expected {program} to show {html.name}, got {last[0]}")
    return done.stdout
