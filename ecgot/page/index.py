"""The index of a folder of readings: one row a record, which sorts and filters."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from ecgot.choices import NORMAL_CODES
from ecgot.inference.display import NOTICE
from ecgot.page.page import asset, environment, script_hash
from ecgot.version import __version__


@dataclass(frozen=True)
class Entry:
    """A row of the index.

    Attributes:
        record: its name.
        link: of its page, relative to the index; None if it has none.
        verdict: on its signal: "good", "doubtful" or "refused"; "" if it could not be read.
        found: name, code and probability of what is stated, abnormal findings and then the surest first.
        heart_rate_bpm: None if it was not measurable.
        problem: why nothing is said; "" if something is.
    """

    record: str
    link: str | None = None
    verdict: str = ""
    found: tuple[tuple[str, str, float], ...] = ()
    heart_rate_bpm: float | None = None
    problem: str = ""

    @classmethod
    def of(cls, reading: Any, link: str | None = None) -> "Entry":
        """The row of a :class:`ecgot.inference.reading.Reading`, or of a ``ReadingError``."""
        if hasattr(reading, "reason"):
            return cls(reading.record, problem=reading.reason)
        return cls.from_dict(reading.to_dict(), link)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], link: str | None = None) -> "Entry":
        """The row of a reading's ``to_dict``."""
        stated = [each for each in values["findings"] if each["stated"]]
        stated.sort(key=lambda each: (each["code"] in NORMAL_CODES, -each["probability"]))
        found: dict[str, tuple[str, str, float]] = {}  # by name: groups share classes
        for each in stated:
            found.setdefault(each["name"], (each["name"], each["code"], each["probability"]))
        said = "; ".join(remark["text"] for remark in values["remarks"])
        return cls(
            values["record"],
            link,
            values["verdict"],
            tuple(found.values()),
            (values["measurements"] or {}).get("heart_rate_bpm"),
            "" if values["findings"] else said or "the signal was refused",
        )

    @property
    def probability(self) -> float | None:
        """Of the strongest abnormal finding; None if there is none."""
        return next((probability for _, code, probability in self.found if code not in NORMAL_CODES), None)


def index(entries: Iterable[Entry]) -> str:
    """The index page, as HTML."""
    rows = list(entries)
    folder = _common_folder(rows)
    script = asset("theme.js") + asset("index.js")
    return (
        environment()
        .get_template("index.html")
        .render(
            rows=rows,
            folder=folder,
            names=[row.record.removeprefix(folder + os.sep) if folder else row.record for row in rows],
            kinds=_kinds(rows),
            failed=sum(not row.verdict for row in rows),
            notice=NOTICE,
            version=__version__,
            script=script,
            script_hash=script_hash(script),
            style=asset("shared.css") + asset("index.css"),
            normal=NORMAL_CODES,
        )
    )


def _common_folder(rows: Sequence[Entry]) -> str:
    """The folder that all records lie in, "" if there is none."""
    try:
        common = os.path.commonpath([PurePath(row.record).parent for row in rows])
    except ValueError:  # no record, or absolute paths beside names
        return ""
    return "" if common == os.sep else common


def _kinds(rows: Sequence[Entry]) -> list[tuple[str, int]]:
    """Name of each finding, and how many records have it; the most frequent first."""
    counts: dict[str, int] = {}
    for row in rows:
        for name in {name for name, _, _ in row.found}:
            counts[name] = counts.get(name, 0) + 1
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))
