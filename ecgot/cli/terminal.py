"""How commands run in a terminal: progress bars, errors of one line, and memory."""

import ctypes
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from ecgot.errors import EcgotError
from ecgot.runs.progress import Progress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # from glibc's malloc.h


def run_command(command: Callable[..., Any]) -> None:
    """Run a command of click and exit; an error is one line on stderr and exit code 2."""
    _keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):  # file names hold any bytes, a terminal not any character
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.exit(command(standalone_mode=False))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        sys.exit(2)
    except click.ClickException as error:
        _fail(error.format_message())
    except click.exceptions.Abort:
        _fail("interrupted")
    except EcgotError as error:
        _fail(str(error))
    except OSError as error:  # a full disk, a folder without permission
        _fail(f"{error.filename or 'file'}: {error.strerror or error}")


def _fail(message: str) -> None:
    click.echo("ecgot: " + " ".join(message.split()), err=True)
    sys.exit(2)


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory, so that each training step on a CPU reuses the same pages.

    By default it returns large blocks to the system, which clears their pages again for the next step. That
    costs a tenth of a training step.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the largest that glibc accepts
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)
    except (OSError, AttributeError):  # another C library
        return


@contextmanager
def progress(*, quiet: bool) -> Iterator[Progress]:
    """Bars and notes on stderr; none if ``quiet``, so that programs find both streams clean."""
    if quiet:
        yield Progress()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console, tasks = Console(stderr=True), dict[str, TaskID]()
    bars = Bars(*columns, console=console, transient=True)

    def bar(task: str, done: int, total: int) -> None:
        if not console.is_terminal:
            return
        bars.start()  # not before there is something to show, so that an early error stays one line
        if task not in tasks:
            tasks[task] = bars.add_task(task, total=total)
        bars.update(tasks[task], completed=done, total=total)
        if done >= total:
            bars.remove_task(tasks.pop(task))

    try:
        yield Progress(bar, lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True))
    finally:
        if bars.live.is_started:
            bars.stop()
