"""What appears whole or not at all: whichever operation fails, is killed, or loses its power."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgeguard import disk
from tests.simulators import disk as failing


@pytest.mark.parametrize("content", [b"new", [b"ne", b"w"]])
def test_a_file_takes_the_place_of_another(tmp_path: Path, content: bytes | list[bytes]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    disk.write(path, content)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_whatever_fails_a_file_is_the_old_one_or_the_new_one_and_stays_the_new_one_once_written(tmp_path: Path) -> None:
    def fresh(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "file").write_bytes(b"old")
        return folder

    def program(folder: Path) -> Callable[[], str]:
        def run() -> str:
            try:
                disk.write(folder / "file", b"new")
            except OSError:
                return "refused"
            (folder / "after").write_bytes(b"")
            return "written"

        return run

    points = failing.run(program(fresh("whole")), tmp_path / "whole").points
    after, told = points.index("open to write after"), {"killed": 0, "refused": 0}
    for number, fault in enumerate(failing.faults(points)):
        if fault.at > after or (fault.at == after and fault.how == "error"):
            continue
        folder = fresh(str(number))
        said = failing.run(program(folder), folder, fault).said
        found = (folder / "file").read_bytes()
        assert found in (b"old", b"new"), fault
        if said is None and fault.at == after:
            assert found == b"new", fault
        told["killed" if said is None else "refused"] += 1
    assert told["killed"] > told["refused"] > 0


def test_where_the_content_ends_in_an_error_nothing_has_changed(tmp_path: Path) -> None:
    def content() -> Iterator[bytes]:
        yield b"new"
        raise ValueError

    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(ValueError):
        disk.write(tmp_path / "file", content())
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_a_folder_appears_when_it_is_filled(tmp_path: Path) -> None:
    with disk.new_folder(tmp_path / "above" / "folder", mode=0o750) as folder:
        (folder / "file").write_bytes(b"new")
        assert not (tmp_path / "above" / "folder").exists()
    made = tmp_path / "above" / "folder"
    assert (made / "file").read_bytes() == b"new"
    assert made.stat().st_mode & 0o777 == 0o750
    assert list(made.parent.iterdir()) == [made]


def test_a_folder_that_could_not_be_filled_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError), disk.new_folder(tmp_path / "folder"):
        raise ValueError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"old")
    with pytest.raises(OSError), disk.new_folder(tmp_path / "folder"):
        pass
    assert (tmp_path / "folder" / "file").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1
