"""WFDB headers, as header(5) of the WFDB manual describes them.

The wfdb library knows names of ASCII letters, digits, ``_`` and ``-`` alone and drops other letters, so that
it misses files whose names have dots, spaces or umlauts, and refuses the ``NAME.mat`` of the 2020 Challenge's
record lines. Hence this reader; the library unpacks the samples of formats that are not plain integers.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from ecgot.data.formats.source import checked_fs_hz
from ecgot.errors import EcgotError

DEFAULT_FS_HZ = 250.0
DEFAULT_GAIN = 200.0  # ADC units per mV, where a header gives none or 0
_FORMAT = re.compile(r"\s(?P<fmt>\d+)(?:x(?P<spf>\d+))?(?::(?P<skew>\d+))?(?:\+(?P<offset>\d+))?(?=\s|$)")
_GAIN = re.compile(
    r"(?P<gain>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)?(?:\((?P<baseline>-?\d+)\))?(?:/(?P<unit>\S+))?$"
)
_INTEGER = re.compile(r"[-+]?\d+$")


@dataclass(frozen=True)
class WfdbSignal:
    """One signal line: in which file it lies, how, and what its numbers mean.

    Attributes:
        file: name of the signal file, ``~`` if there is none.
        fmt: WFDB's format of the samples, such as "16".
        per_frame: samples of a frame.
        skew: frames by which it lies behind.
        byte_offset: bytes before the first sample.
        gain: ADC units per unit.
        calibrated: False where the header gave no gain.
        baseline: ADC units at 0.
        unit: such as mV.
        first_value: the sample before the first (of difference formats).
        checksum: sum of all samples modulo 65536; None if the header gives none.
        name: its description; empty if the header gives none.
    """

    file: str
    fmt: str
    per_frame: int
    skew: int
    byte_offset: int
    gain: float
    calibrated: bool
    baseline: int
    unit: str
    first_value: int
    checksum: int | None
    name: str


@dataclass(frozen=True)
class WfdbHeader:
    """A header.

    Attributes:
        path: the record's path, without suffix.
        fs_hz: frames per second.
        frames: length; None if the header does not tell.
        signals: of a record of one segment.
        segments: names and frames of the segments of a record of several; else empty.
    """

    path: Path
    fs_hz: float
    frames: int | None
    signals: tuple[WfdbSignal, ...]
    segments: tuple[tuple[str, int], ...]


def read_header(record: Path) -> WfdbHeader:
    """The header ``record``.hea.

    Raises:
        EcgotError: there is none, or it is not what WFDB describes.
    """
    path = record.with_name(f"{record.name}.hea")
    if not path.is_file():
        raise EcgotError(f"record {record}: there is no {path.name}")
    lines = [line.strip() for line in _text(path).splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    line = _record_line(record.name, lines) if lines else None
    if line is None:
        got = repr(lines[0][:60]) if lines else "nothing"
        raise _broken(record, f"expected a line with the record's name and number of signals, got {got}")
    rest = line.rest
    fs_hz = checked_fs_hz(str(record), _frame_rate(record, rest[0]) if rest else DEFAULT_FS_HZ)
    frames = int(rest[1]) if len(rest) > 1 and rest[1].isdecimal() else 0
    if line.segments:
        segments = tuple(_segment(record, each) for each in lines[1:])
        if len(segments) != line.segments:
            raise _broken(record, f"expected {line.segments} segments, got {len(segments)}")
        return WfdbHeader(record, fs_hz, frames or None, (), segments)
    signals = tuple(_signal(record, each) for each in lines[1:])
    if not signals or len(signals) != line.signals:
        raise EcgotError(
            f"record {record}: expected {path.name} to describe one or more signals, "
            f"got {len(signals)} lines for {line.signals} signals"
        )
    return WfdbHeader(record, fs_hz, frames or None, signals, ())


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")  # "µV" of older writers


@dataclass(frozen=True)
class _RecordLine:
    segments: int  # 0: the record has one, without a header of its own
    signals: int
    rest: list[str]


def _record_line(name: str, lines: list[str]) -> _RecordLine | None:
    """The record line: NAME[/SEGMENTS] SIGNALS [RATE [SAMPLES [TIME [DATE]]]].

    A name may have spaces and numbers: of all readings that with the file's name, else the first that fits
    the number of lines after it.
    """
    found = []
    for word in re.finditer(r"\s+(\d+)(?=\s|$)", lines[0]):
        before = lines[0][: word.start()]
        segments = re.search(r"/(\d+)$", before)
        line = _RecordLine(int(segments[1]) if segments else 0, int(word[1]), lines[0][word.end() :].split())
        if before.removesuffix(segments[0] if segments else "") == name:
            return line
        found.append(line)
    fitting = (line for line in found if (line.segments or line.signals) == len(lines) - 1)
    return next(fitting, found[0] if found else None)


def _frame_rate(record: Path, word: str) -> float:
    """Frames per second of ``500``, ``500/1000`` (with a counter's rate) or ``500/1000(0)``."""
    try:
        return float(word.partition("/")[0].partition("(")[0])
    except ValueError:
        raise _broken(record, f"expected a sampling rate, got {word!r}") from None


def _segment(record: Path, line: str) -> tuple[str, int]:
    match = re.match(r"(.*\S)\s+(\d+)$", line)
    if match is None:
        raise _broken(record, f"expected a segment's name and length, got {line[:60]!r}")
    return match[1], int(match[2])


def _signal(record: Path, line: str) -> WfdbSignal:
    """A signal line: FILE FORMAT[xFRAME][:SKEW][+OFFSET] [GAIN[(BASELINE)][/UNIT] [five integers] [NAME]]."""
    matches = list(_FORMAT.finditer(line))
    if not matches:
        raise _broken(record, f"expected a file name and a format, got {line[:60]!r}")
    # A name may have spaces and numbers: the first reading whose file exists, else the first.
    match = next((m for m in matches if (record.parent / line[: m.start()]).is_file()), matches[0])
    words = line[match.end() :].split(maxsplit=1)
    gain = _GAIN.match(words[0] if words else "")
    if gain is None:
        raise _broken(record, f"expected a gain such as 1000(0)/mV, got {words[0]!r}")
    numbers, name = _integers(words[1] if len(words) > 1 else "")
    zero, first, checksum = ([*numbers, *[None] * 5])[1:4]
    given = float(gain["gain"] or 0)
    return WfdbSignal(
        file=line[: match.start()].strip(),
        fmt=match["fmt"],
        per_frame=int(match["spf"] or 1) or 1,
        skew=int(match["skew"] or 0),
        byte_offset=int(match["offset"] or 0),
        gain=given or DEFAULT_GAIN,
        calibrated=bool(given),
        baseline=int(gain["baseline"]) if gain["baseline"] else (zero or 0),
        unit=gain["unit"] or "mV",
        first_value=first or 0,
        checksum=checksum or None,  # 0 is what writers put that do not compute it
        name=name,
    )


def _integers(text: str) -> tuple[list[int], str]:
    """Up to five integers (ADC resolution, ADC zero, first value, checksum, block size) and what follows."""
    numbers: list[int] = []
    while len(numbers) < 5 and text and _INTEGER.match((words := text.split(maxsplit=1))[0]):
        numbers.append(int(words[0]))
        text = words[1] if len(words) > 1 else ""
    return numbers, text


def _broken(record: Path, why: str) -> EcgotError:
    return EcgotError(f"record {record}: {record.name}.hea cannot be parsed ({why})")
