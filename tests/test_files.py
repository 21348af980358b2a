"""Files and folders that are written whole or not at all."""

from pathlib import Path

import pytest

from ecgot.files import atomic_folder, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as made:
        (made / "file").write_text("x")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["file"]


def test_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as made:
        (made / "file").write_text("x")
    assert names(tmp_path / "out") == ["file"]


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_folder(tmp_path / "out") as made:
            (made / "file").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == []


@pytest.mark.parametrize("first_wins", [True, False])
def test_a_folder_that_another_process_made_meanwhile_stays(tmp_path: Path, first_wins: bool) -> None:
    def write() -> None:
        with atomic_folder(tmp_path / "out", first_wins=first_wins) as made:
            (made / "file").write_text("second")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "file").write_text("first")

    if first_wins:
        write()
    else:
        with pytest.raises(OSError, match="out"):
            write()
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "first"


def test_a_file_that_cannot_be_finished_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_text(path, "old\n")

    def full(*_arguments: object, **_settings: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="no space"):
            write_text(path, "new\n")
    assert path.read_text() == "old\n"
    assert names(tmp_path) == ["file"]
