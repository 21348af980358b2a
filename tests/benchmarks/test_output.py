"""A result's commit: from git, from the file that stands in for it, or a digest of the sources alone."""

import subprocess

import pytest

from benchmarks.output import commit, digest


@pytest.fixture
def sources(tmp_path, monkeypatch):
    monkeypatch.delenv("ECGOT_COMMIT", raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "ecgot").mkdir()
    (tmp_path / "ecgot" / "made.py").write_text("a = 1\n")
    return tmp_path


def git(root, *arguments):
    settings = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(["git", "-C", str(root), *settings, *arguments], check=True, capture_output=True)


def test_sources_that_differ_from_the_commit_have_a_digest(sources):
    git(sources, "init")
    git(sources, "add", ".")
    git(sources, "commit", "-m", "first")
    head = commit(sources)
    assert len(head) >= 7
    assert "+" not in head
    (sources / "notes.txt").write_text("no source")
    assert commit(sources) == head
    (sources / "ecgot" / "made.py").write_text("a = 2\n")
    assert commit(sources) == f"{head}+dirty.{digest(sources)}"


def test_without_git_the_commit_stands_in_a_file(sources):
    assert commit(sources) == f"unknown.{digest(sources)}"
    (sources / "COMMIT").write_text("abc1234\n")
    assert commit(sources) == "abc1234"
    (sources / "COMMIT").write_text(f"abc1234 {digest(sources)}\n")
    assert commit(sources) == "abc1234"
    (sources / "ecgot" / "made.py").write_text("a = 2\n")  # sent anew, and the file was not written again
    assert commit(sources) == f"abc1234+dirty.{digest(sources)}"


def test_one_process_may_say_it_for_all(sources, monkeypatch):
    monkeypatch.setenv("ECGOT_COMMIT", "abc1234")
    assert commit(sources) == "abc1234"
