"""A path is looked up in the current folder, then in $LMTRAIN_DATA."""

import os
from pathlib import Path

import pytest

from data.files import find_file, find_files


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "with space [1]"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir()
    monkeypatch.setenv("LMTRAIN_DATA", str(folder))
    return folder


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def found(path: str, below: Path) -> list[str]:
    return [file.relative_to(below).as_posix() for file in find_files(path, "data.path")]


def test_the_current_folder_comes_first(here: Path, shared: Path) -> None:
    write(shared, "a.txt", "b.txt")
    write(here, "a.txt")
    assert find_files("a.txt", "data.path") == [here / "a.txt"]
    assert find_files("b.txt", "data.path") == [shared / "b.txt"]
    assert find_file(["none", "b.txt"]) == shared / "b.txt"
    assert find_file(["none"]) is None


def test_a_folder_means_all_files_below_it_but_the_hidden(here: Path) -> None:
    write(here, "books/b/2.txt", "books/a.txt", "books/b/1.txt.gz", "books/.git/config", "books/b/.hidden")
    (here / "books/empty folder").mkdir()
    assert found("books", here) == ["books/a.txt", "books/b/1.txt.gz", "books/b/2.txt"]


def test_patterns(here: Path) -> None:
    write(here, "b/2.txt", "a.txt", "b/1.md", "b/c/3.txt")
    assert found("*.txt", here) == ["a.txt"]
    assert found("**/*.txt", here) == ["a.txt", "b/2.txt", "b/c/3.txt"]
    assert find_files(f"{here.parent}/with*/a.txt", "data.path") == [here / "a.txt"]


def test_a_name_is_taken_literally_before_it_is_a_pattern(here: Path) -> None:
    write(here, "book[1].txt", "book1.txt")
    assert found("book[1].txt", here) == ["book[1].txt"]


def test_a_file_reached_twice_counts_once(here: Path) -> None:
    write(here, "d/a.txt", "d/b.txt")
    os.symlink(here / "d/a.txt", here / "d/z-link.txt")
    os.link(here / "d/b.txt", here / "d/y-link.txt")
    os.symlink(here / "nowhere", here / "d/dangling.txt")
    os.mkfifo(here / "d/pipe.txt")
    assert found("d", here) == ["d/a.txt", "d/b.txt"]


def test_home_is_understood(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    write(here, "a.txt")
    assert find_files("~/a.txt", "data.path") == [here / "a.txt"]


def test_the_message_says_what_was_looked_for_where(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"data\.path: no file 'x\.txt' in .*with space \[1\] \(\$LMTRAIN_DATA is not"):
        find_files("x.txt", "data.path")
    monkeypatch.setenv("LMTRAIN_DATA", "/some/where")
    with pytest.raises(ValueError, match=r"data\.validation: no file 'x\.txt' in .* or /some/where$"):
        find_files("x.txt", "data.validation")
    with pytest.raises(ValueError, match=r"no file '/x\.txt'$"):
        find_files("/x.txt", "data.path")
