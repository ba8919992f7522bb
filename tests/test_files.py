from __future__ import annotations

import errno
import os
import stat
import time
from pathlib import Path
from threading import Thread

import pytest

from aligndet.files import (
    accepts_strings,
    atomic_write,
    locked,
    plain_name,
    read_json,
    whole_file,
    whole_path,
)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    atomic_write(path, "first")
    with pytest.raises(TypeError):
        atomic_write(path, 3)  # type: ignore[arg-type]
    assert path.read_text() == "first"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def fill_up(path: Path) -> None:
    with whole_file(path) as file:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_name_may_be_as_long_as_the_file_system_lets_it(tmp_path: Path) -> None:
    path = tmp_path / f"{'猫' * 83}.jpg"
    atomic_write(path, "whole")
    assert path.read_text() == "whole"


@pytest.mark.parametrize("name", ["a/b.jpg", "a\\b.jpg", "{}/a/b.jpg", "{}\\a\\b.jpg"])
def test_names_as_tools_write_them(name: str, tmp_path: Path) -> None:
    assert plain_name(name.format(tmp_path), tmp_path) == "a/b.jpg"
    (tmp_path / "a\\b.jpg").touch()  # as some archives are unpacked
    assert plain_name("a\\b.jpg", tmp_path) == "a\\b.jpg"
    assert plain_name("/etc/b.jpg", tmp_path) == "/etc/b.jpg"


def test_a_folder_may_be_spelt_as_one_likes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path / "work")
    for folder in ("../data", "../link", tmp_path / "work" / ".." / "data"):
        assert plain_name(f"{tmp_path}/data/a.jpg", Path(folder)) == "a.jpg"
    assert plain_name(f"{tmp_path}/work/../data/a.jpg", Path("../data")) == "a.jpg"


def test_a_name_on_the_way_is_text(tmp_path: Path) -> None:
    """Libraries write to it that know no other names."""
    with whole_path(tmp_path / f"{'画' * 40}.mp4") as partial:
        str(partial).encode()
        partial.touch()


def test_names_that_are_no_text_are_written(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.jpg")
    atomic_write(path, "whole")
    assert path.read_text() == "whole"


def test_a_disk_that_fills_up_is_named_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    atomic_write(path, "first")
    with pytest.raises(OSError, match=r"No space left.*file\.txt"):
        fill_up(path)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flushed, flush = tmp_path / "file.txt", [], os.fsync

    def watched(descriptor: int) -> None:
        state = os.fstat(descriptor)
        flushed.append((path.exists(), "folder" if stat.S_ISDIR(state.st_mode) else state.st_size))
        flush(descriptor)

    monkeypatch.setattr("aligndet.files.os.fsync", watched)
    atomic_write(path, "whole")
    assert flushed == [(False, 5), (True, "folder")]


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    with whole_file(path) as first:
        first.write(b"first")
        with whole_file(path) as second:
            second.write(b"the second")
        assert path.read_text() == "the second"
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ValueError, match="in use by another process"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass


def test_who_waits_for_a_folder_says_so_and_gets_it_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    order = []

    def wait() -> None:
        with locked(tmp_path, wait=True):
            order.append("second")

    thread = Thread(target=wait)
    with locked(tmp_path):
        thread.start()
        said, end = "", time.monotonic() + 10
        while "waits" not in said and time.monotonic() < end:
            time.sleep(0.01)
            said += capsys.readouterr().out
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    assert said == f"waits for another process in {tmp_path}\n"
    with locked(tmp_path, wait=True):
        assert not capsys.readouterr().out


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("aligndet.files.fcntl.flock", refuse)
    with pytest.raises(OSError, match=f"no locks for the folder.*{tmp_path}"), locked(tmp_path):
        pass


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000, "\xff", '{"a": ' + "9" * 5000 + "}"])
def test_what_is_no_json_object_is_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"broken\.json: (is no JSON|holds no JSON object)"):
        read_json(path)


def test_a_mark_at_the_start_of_json_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + '{"ä": 1}'.encode())
    assert read_json(tmp_path / "a.json") == {"ä": 1}


def test_strings_become_paths_where_paths_are_wanted() -> None:
    @accepts_strings
    def function(folder: Path, name: str, *, other: Path | None = None) -> tuple[object, ...]:
        return folder, name, other

    assert function("a", "b", other="c") == (Path("a"), "b", Path("c"))  # type: ignore[arg-type]
    assert function(Path("a"), "b") == (Path("a"), "b", None)
    assert function(Path("~/a"), "~", other="~b") == (Path.home() / "a", "~", Path("~b"))  # type: ignore[arg-type]
    for other in ("s3://bucket/a", Path("s3://bucket/a")):
        with pytest.raises(ValueError, match=r"other s3:/.*: is an address, where a local file or folder"):
            function("a", "b", other=other)  # type: ignore[arg-type]
