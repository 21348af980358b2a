"""Reading a folder: every record once, bad files one line, interrupted runs go on."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest

from ecgot.data.ptbxl import read_table
from ecgot.errors import EcgotError
from ecgot.inference import reader as readers
from ecgot.inference.folder import read_folder, records_in
from ecgot.inference.reader import EcgReader, ReadOptions

OPTIONS = ReadOptions(report=False, measurements=False)


@pytest.fixture(scope="module")
def reader() -> EcgReader:
    return EcgReader.from_pretrained(num_beams=1)


@pytest.fixture
def folder(few: Path, tmp_path: Path) -> Path:
    made = tmp_path / "records"
    (made / "deep").mkdir(parents=True)
    for number, path in enumerate(read_table(few).record_paths[:4]):
        for suffix in (".hea", ".dat"):
            source = (few / path).with_suffix(suffix)
            shutil.copy(source, made / ("deep" if number % 2 else "") / source.name)
    (made / "bad.hea").write_text("bad 12 100 1000\n")
    (made / "notes.txt").write_text("no ECG")
    return made


def test_every_record_is_found_once(folder: Path, tmp_path: Path) -> None:
    assert [path.suffix for path in records_in(folder)] == [".hea"] * 5
    (tmp_path / "empty").mkdir()
    with pytest.raises(EcgotError, match="expected ECG files"):
        records_in(tmp_path / "empty")


def test_a_csv_has_a_row_for_each_and_goes_on_after_a_kill(reader, folder, tmp_path, monkeypatch) -> None:
    out, errors = tmp_path / "out.csv", []
    assert read_folder(reader, folder, out, OPTIONS, on_error=errors.append) == (5, 1)
    whole = out.read_text()
    rows = list(csv.DictReader(whole.splitlines()))
    assert [row["record"] for row in rows] == list(map(str, records_in(folder)))
    assert [bool(row["error"]) for row in rows] == ["bad" in row["record"] for row in rows]
    assert len(errors) == 1
    assert 0 <= float(rows[-1]["rhythm:SR"]) <= 1
    with pytest.raises(EcgotError, match="--resume"):
        read_folder(reader, folder, out, OPTIONS)
    other = folder.parent / "other"  # the same folder by another path
    other.symlink_to(folder)
    assert read_folder(reader, other, out, OPTIONS, resume=True) == (0, 0)
    out.write_text(whole[: whole.rindex("\n", 0, -1) - 20])  # killed within a line
    monkeypatch.setattr(readers, "BATCH", 1)
    assert read_folder(reader, folder, out, OPTIONS, resume=True)[0] == 2
    assert [row["record"] for row in csv.DictReader(out.read_text().splitlines())] == [
        row["record"] for row in rows
    ]
    out.write_text("a,b\n1,2\n")
    with pytest.raises(EcgotError, match="got another file"):
        read_folder(reader, folder, out, OPTIONS, resume=True)


def test_odd_names_are_read_once_whatever_the_result_is_written_to(reader, folder, tmp_path) -> None:
    for name in ("two  blanks", 'comma, "quote"', "new\nline", "\u00e9\u2028\u4e2d", "no\udcffutf8", "<b>x"):
        shutil.copy(folder / "bad.hea", folder / f"{name}.hea")
    for name in ("out.csv", "out.jsonl", "pages"):
        out = folder / name  # within what is read, where a CSV looks like a record
        assert read_folder(reader, folder, out, OPTIONS)[0] == 11
        assert read_folder(reader, folder, out, OPTIONS, resume=True) == (0, 0)
        shutil.move(out, tmp_path)


def test_a_csv_from_a_spreadsheet_program_is_continued(reader, folder, tmp_path) -> None:
    out = tmp_path / "out.csv"
    read_folder(reader, folder, out, OPTIONS)
    rows = out.read_text().splitlines()
    out.write_bytes(b"\xef\xbb\xbf" + "".join(f"{row}\r\n" for row in rows[:-1]).encode())
    assert read_folder(reader, folder, out, OPTIONS, resume=True)[0] == 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "one line"),
        ("a.csv", "one line"),
        ("b.jsonl", '[{"record": 1}]\n'),
        ("c.jsonl", "null\n"),
        ("p/readings.jsonl", '{"record": "x"}\n'),
    ],
)
def test_another_file_is_refused_and_stays_as_it_is(reader, folder, tmp_path, name, content) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    out = file.parent if file.parent != tmp_path else file
    with pytest.raises(EcgotError, match="got another file"):
        read_folder(reader, folder, out, OPTIONS, resume=True)
    assert file.read_text() == content


def test_no_page_is_overwritten_after_a_line_was_taken_out(reader, folder, tmp_path) -> None:
    out = tmp_path / "pages"
    read_folder(reader, folder, out, OPTIONS)
    lines = (out / "readings.jsonl").read_text().splitlines(keepends=True)
    pages = {page.name: page.read_text() for page in out.glob("0*.html")}
    assert "page" in json.loads(lines[1])
    (out / "readings.jsonl").write_text("".join([lines[0], *lines[2:]]))
    assert read_folder(reader, folder, out, OPTIONS, resume=True)[0] == 1
    assert {name: (out / name).read_text() for name in pages} == pages
    links = [json.loads(line).get("page") for line in (out / "readings.jsonl").read_text().splitlines()]
    assert len(set(links)) == len(links) == 5


def test_json_lines(reader, folder, tmp_path) -> None:
    out = tmp_path / "out.jsonl"
    read_folder(reader, folder, out, OPTIONS)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert ["error" in line for line in lines] == ["bad" in line["record"] for line in lines]
    out.write_text(out.read_text()[:-50])
    assert read_folder(reader, folder, out, OPTIONS, resume=True)[0] == 1
    assert [json.loads(line)["record"] for line in out.read_text().splitlines()] == [
        line["record"] for line in lines
    ]


def test_pages_have_an_index_that_names_every_record(reader, folder, tmp_path) -> None:
    out = tmp_path / "pages"
    read_folder(reader, folder, out, OPTIONS)
    assert len(list(out.glob("0*.html"))) == 4
    index = (out / "index.html").read_text(encoding="utf-8")
    for path in records_in(folder):
        assert path.stem in index
    assert read_folder(reader, folder, out, OPTIONS, resume=True) == (0, 0)
    with pytest.raises(EcgotError, match=r"\.csv or \.jsonl"):
        read_folder(reader, folder, tmp_path / "out.xlsx", OPTIONS)


def test_two_processes_write_what_one_writes(reader, folder, tmp_path) -> None:
    for name in ("out.csv", "out.jsonl", "pages"):
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        assert read_folder(reader, folder, one, OPTIONS, workers=1) == (5, 1)
        assert read_folder(reader, folder, two, OPTIONS, workers=2) == (5, 1)
        pairs = [(one, two)] if one.is_file() else [(each, two / each.name) for each in one.iterdir()]
        for first, second in pairs:
            assert _numbers_rounded(first) == _numbers_rounded(second)


def _numbers_rounded(path: Path) -> str:
    """A file's text; a batch of another size may change a number's last digits."""
    return re.sub(r"-?\d+\.\d+(?:e-?\d+)?", lambda number: f"{float(number[0]):.2f}", path.read_text("utf-8"))
