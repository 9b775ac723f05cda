"""The folder source: order, exactness, and files that are not what they claim."""

from __future__ import annotations

import io
import itertools
import os
import selectors
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edgeguard.agent.sources.base import Item, Refused
from edgeguard.agent.sources.folder import MAX_FILE_BYTES, FolderSource, numpy_format, read_batch
from edgeguard.contract.guard import ModelInput
from edgeguard.errors import ConfigError

SHAPE = (2, 2)
EXPECTED = ModelInput(shape=SHAPE, dtype="uint8", range=(0, 255))
PIXELS = ModelInput(shape=(8, 8, 1), dtype="uint8", range=(0, 255))


def npy(array: object, *, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)  # type: ignore[arg-type]
    return buffer.getvalue()


def batch(n: int = 3, fill: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.full((n, *SHAPE), fill, np.uint8)


GOOD = npy(batch())


@pytest.fixture
def source(tmp_path: Path) -> FolderSource:
    return made(tmp_path)


def made(folder: Path, expected: ModelInput = EXPECTED, *, keep: bool = False) -> FolderSource:
    """A source whose clock goes on by a minute at each look, so that it looks through the folder each time."""
    minutes = itertools.count(0, 60)
    return FolderSource(folder, expected, keep=keep, clock=lambda: float(next(minutes)))


def next_of(source: FolderSource) -> Item | None:
    """The next input, past what is refused."""
    while (taken := source.take()) is Refused.NO_INPUT:
        pass
    assert taken is None or isinstance(taken, Item)
    return taken


def test_batches_come_in_the_order_of_their_names(tmp_path: Path, source: FolderSource) -> None:
    for name in ("b.npy", "c.npy", "a.npy"):
        (tmp_path / name).write_bytes(GOOD)
    taken = [next_of(source) for _ in range(4)]
    assert [b.name if b else None for b in taken] == ["a.npy", "b.npy", "c.npy", None]


def test_a_batch_is_read_as_it_was_written(tmp_path: Path, source: FolderSource) -> None:
    inputs = np.arange(12, dtype=np.uint8).reshape(3, 2, 2)
    (tmp_path / "a.npy").write_bytes(npy(np.asfortranarray(inputs)))
    taken = next_of(source)
    assert taken is not None
    np.testing.assert_array_equal(taken.inputs, inputs)


def test_a_taken_batch_stays_until_it_is_counted(tmp_path: Path, source: FolderSource) -> None:
    (tmp_path / "a.npy").write_bytes(GOOD)
    assert next_of(source) is not None
    assert next_of(source) is None
    assert (tmp_path / "a.npy").exists()
    source.counted(["a.npy"])
    assert not (tmp_path / "a.npy").exists()


def test_a_new_source_finds_what_was_taken_but_not_counted(tmp_path: Path, source: FolderSource) -> None:
    (tmp_path / "a.npy").write_bytes(GOOD)
    next_of(source)
    again = next_of(made(tmp_path))
    assert again is not None and again.name == "a.npy"


def test_counting_what_is_gone_is_fine(source: FolderSource) -> None:
    source.counted(["gone.npy"])


@pytest.mark.parametrize("name", [".hidden.npy", "a.npy.tmp", "a.txt", "a"])
def test_other_names_are_ignored(tmp_path: Path, source: FolderSource, name: str) -> None:
    (tmp_path / name).write_bytes(GOOD)
    assert next_of(source) is None
    assert (tmp_path / name).exists()


def test_the_source_ends_when_the_marker_is_there_and_all_was_taken(tmp_path: Path, source: FolderSource) -> None:
    (tmp_path / "end").touch()
    (tmp_path / "a.npy").write_bytes(GOOD)
    assert next_of(source) is not None
    assert not source.ended
    assert next_of(source) is None
    assert source.ended


def test_without_a_marker_the_source_never_ends(source: FolderSource) -> None:
    assert next_of(source) is None
    assert not source.ended


BAD = {
    "empty": b"",
    "not npy": b"hello world, this is no array at all",
    "cut short": GOOD[:-1],
    "too long": GOOD + b"x",
    "another shape": npy(np.zeros((3, 2, 3), np.uint8)),
    "no batch axis": npy(np.zeros((), np.uint8)),
    "no inputs": npy(batch(0)),
    "another type": npy(np.zeros((3, *SHAPE), np.float32)),
    "another byte order": npy(np.zeros((3, *SHAPE), ">u2")),
    "pickled objects": npy(np.array([[print]], dtype=object), allow_pickle=True),
    "a header that lies": GOOD.replace(b"(3, 2, 2)", b"(9, 2, 2)"),
    "a header of code": GOOD.replace(b"(3, 2, 2)", b"exit(13) "),
    "a future version": GOOD[:6] + b"\x09\x00" + GOOD[8:],
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_a_bad_file_is_set_aside_and_the_next_one_is_taken(
    tmp_path: Path, source: FolderSource, content: bytes
) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    (tmp_path / "b.npy").write_bytes(GOOD)
    taken = next_of(source)
    assert taken is not None and taken.name == "b.npy"
    assert source.dropped == 1
    assert (tmp_path / "rejected" / "a.npy").read_bytes() == content


def test_what_is_no_regular_file_is_set_aside(tmp_path: Path, source: FolderSource) -> None:
    os.mkfifo(tmp_path / "fifo.npy")
    (tmp_path / "folder.npy").mkdir()
    (tmp_path / "elsewhere").write_bytes(GOOD)
    (tmp_path / "link.npy").symlink_to("elsewhere")
    (tmp_path / "sparse.npy").touch()
    os.truncate(tmp_path / "sparse.npy", MAX_FILE_BYTES + 1)
    assert next_of(source) is None
    assert source.dropped == 4


def test_a_file_that_cannot_be_set_aside_is_ignored_from_then_on(tmp_path: Path, source: FolderSource) -> None:
    (tmp_path / "rejected").write_text("in the way")
    (tmp_path / "a.npy").write_bytes(b"bad")
    (tmp_path / "b.npy").write_bytes(GOOD)
    taken = next_of(source)
    assert taken is not None and taken.name == "b.npy"
    assert next_of(source) is None
    assert source.dropped == 1


@given(st.one_of(st.binary(max_size=300), st.binary(max_size=120).map(lambda b: GOOD[:10] + b + GOOD[10 + len(b) :])))
def test_whatever_bytes_are_dropped_in_the_source_goes_on(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    folder = tmp_path_factory.mktemp("source")
    (folder / "a.npy").write_bytes(content)
    (folder / "b.npy").write_bytes(GOOD)
    source = made(folder)
    names = []
    while (taken := next_of(source)) is not None:
        assert taken.inputs.shape[1:] == SHAPE and taken.inputs.dtype == np.uint8
        names.append(taken.name)
    assert names[-1] == "b.npy"
    assert source.dropped == 2 - len(names)


def test_a_missing_folder_is_an_error_of_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        made(tmp_path / "nowhere")


def test_a_lying_header_allocates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "huge.npy"
    header: Any = {"descr": "|u1", "fortran_order": False, "shape": (10**14, *SHAPE)}
    with path.open("wb") as file:
        numpy_format.write_array_header_1_0(file, header)
    with pytest.raises(ValueError, match="0 bytes of data, expected 400000000000000"):
        read_batch(path, shape=SHAPE, dtype=np.dtype("uint8"))


def test_files_to_be_kept_are_moved_once_they_are_counted(tmp_path: Path) -> None:
    source = made(tmp_path, keep=True)
    (tmp_path / "a.npy").write_bytes(GOOD)
    assert next_of(source) is not None
    source.counted(["a.npy", "gone.npy"])
    assert (tmp_path / "done" / "a.npy").read_bytes() == GOOD
    assert next_of(source) is None


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG"])
def test_an_image_is_one_input_of_the_models_shape(tmp_path: Path, suffix: str) -> None:
    image = Image.fromarray(np.full((20, 30), 200, np.uint8))
    image.save(tmp_path / f"a{suffix}", format="PNG" if suffix == ".png" else "JPEG")
    taken = next_of(made(tmp_path, PIXELS))
    assert taken is not None
    assert taken.inputs.shape == (1, 8, 8, 1)
    assert abs(int(taken.inputs.mean()) - 200) <= 2


def test_what_only_claims_to_be_an_image_is_set_aside(tmp_path: Path) -> None:
    source = made(tmp_path, PIXELS)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing more")
    assert next_of(source) is None
    assert source.dropped == 1
    assert (tmp_path / "rejected" / "a.png").exists()


def test_a_file_moved_in_wakes_the_loop_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "inbox"
    folder.mkdir()
    source = FolderSource(folder, EXPECTED)
    with selectors.DefaultSelector() as selector:
        source.open(selector)
        assert next_of(source) is None
        (tmp_path / "a.npy").write_bytes(GOOD)
        assert selector.select(0) == []
        (tmp_path / "a.npy").rename(folder / "a.npy")
        ((key, mask),) = selector.select(5)
        key.data.ready(key, mask)
        taken = next_of(source)
        assert taken is not None and taken.name == "a.npy"
        source.close()


def test_a_folder_that_vanishes_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "inbox"
    folder.mkdir()
    source = made(folder)
    with selectors.DefaultSelector() as selector:
        source.open(selector)
        folder.rmdir()
        assert next_of(source) is None
        folder.mkdir()
        (folder / "a.npy").write_bytes(GOOD)
        taken = next_of(source)
        assert taken is not None and taken.name == "a.npy"
        assert len(selector.get_map()) == 1
        source.close()


def test_a_name_that_is_no_text_is_set_aside(tmp_path: Path, source: FolderSource) -> None:
    (tmp_path / os.fsdecode(b"\xff.npy")).write_bytes(GOOD)
    (tmp_path / "z.npy").write_bytes(GOOD)
    taken = next_of(source)
    assert taken is not None and taken.name == "z.npy"
    assert next_of(source) is None
    assert source.dropped == 1


def test_files_of_a_folder_that_is_not_mounted_now_are_not_let_go_of(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "inbox", tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "a.npy").write_bytes(GOOD)
    source = made(folder)
    assert next_of(source) is not None
    folder.rename(elsewhere)
    folder.mkdir()
    with pytest.raises(ConfigError, match="another folder"):
        source.counted(["a.npy"])
    folder.rmdir()
    elsewhere.rename(folder)
    assert next_of(source) is None, "it would be counted twice"
    source.counted(["a.npy"])
    assert not (folder / "a.npy").exists()
