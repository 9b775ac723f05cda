"""The quarantine: what is kept, what leaves, what a failing disk does, and what a hostile file cannot."""

from __future__ import annotations

import io
import logging
import os
import resource
import shutil
import stat
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeguard.agent.quarantine import MAX_FILE, About, Quarantine, read
from edgeguard.errors import ConfigError, ModelError

ABOUT = About(
    at_ms=1_700_000_000_123,
    predicted=7,
    scores={"linf": 1.5, "l1": 0.25},
    p_value=0.001,
    model_digest="a" * 64,
    guard_digest="b" * 64,
)
X = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
LARGE = 1 << 30


class Clock:
    """Seconds since 1970, as a test sets them."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "quarantine"


def opened(folder: Path, clock: Callable[[], float] | None = None, **bounds: Any) -> Quarantine:
    """A quarantine whose bounds are wide, but those given."""
    wide: dict[str, Any] = {"max_bytes": LARGE, "max_count": 1000, "max_age_s": 1e9}
    return Quarantine(folder, **{**wide, **bounds}, clock=clock or Clock())


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def marked(number: int) -> About:
    return msgspec.structs.replace(ABOUT, predicted=number)


def held(folder: Path) -> list[int | None]:
    """The marks of what lies in the folder, oldest first."""
    return [read(path)[1].predicted for path in files(folder)]


# What is kept


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "float32", ">i2"])
@pytest.mark.parametrize("shape", [(8, 8, 3), (5,), ()])
def test_an_input_is_read_as_it_was_kept_in_its_own_type(folder: Path, dtype: str, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(1).integers(0, 100, shape).astype(dtype)
    assert opened(folder).put(x, ABOUT)
    (path,) = files(folder)
    found, about = read(path)
    assert found.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(found, x)
    assert found.shape == x.shape
    assert about == ABOUT


@pytest.mark.parametrize("x", [X[::2, ::-1], X.T])
def test_an_input_that_lies_otherwise_in_memory_is_kept_as_it_is(folder: Path, x: np.ndarray) -> None:
    assert opened(folder).put(x, ABOUT)
    np.testing.assert_array_equal(read(files(folder)[0])[0], x)


def test_what_is_unknown_stays_unknown(folder: Path) -> None:
    unknown = msgspec.structs.replace(ABOUT, predicted=None, p_value=None, scores={"linf": float("nan"), "l1": None})
    assert opened(folder).put(X, unknown)
    found = read(files(folder)[0])[1]
    assert (found.predicted, found.p_value, found.scores) == (None, None, {"linf": None, "l1": None})


def test_a_kept_file_is_an_ordinary_npz_stored_and_not_pickled(folder: Path) -> None:
    opened(folder).put(X, ABOUT)
    (path,) = files(folder)
    assert path.suffix == ".npz"
    with np.load(path, allow_pickle=False) as archive:
        assert np.array_equal(archive["input"], X)
    with zipfile.ZipFile(path) as archive:
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}


def test_only_the_owner_may_read_whatever_the_umask_says(folder: Path) -> None:
    before = os.umask(0)
    try:
        opened(folder).put(X, ABOUT)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(files(folder)[0].stat().st_mode) == 0o600


def test_a_name_says_when_an_input_came_and_nothing_of_it(folder: Path) -> None:
    quarantine = opened(folder)
    for _ in range(2):
        quarantine.put(X, msgspec.structs.replace(ABOUT, scores={"../../evil": 2.0}, at_ms=-5))
    assert [path.name for path in files(folder)] == [f"000000000{n}-1700000000000.npz" for n in (1, 2)]


# What leaves


def test_the_oldest_leave_first_when_there_are_too_many(folder: Path) -> None:
    quarantine = opened(folder, max_count=3)
    for number in range(12):
        assert quarantine.put(X, marked(number))
    assert held(folder) == [9, 10, 11]
    assert quarantine.count == 3


def test_the_oldest_leave_first_when_they_take_too_much(folder: Path, tmp_path: Path) -> None:
    opened(tmp_path / "one").put(X, ABOUT)
    size = files(tmp_path / "one")[0].stat().st_size
    quarantine = opened(folder, max_bytes=3 * size + 10)
    for number in range(5):
        assert quarantine.put(X, marked(number))
    assert held(folder) == [2, 3, 4]


def test_what_is_too_old_leaves_at_the_next_input_or_tidying(folder: Path) -> None:
    clock = Clock()
    quarantine = opened(folder, clock, max_age_s=100)
    quarantine.put(X, marked(1))
    clock.now += 60
    quarantine.put(X, marked(2))
    clock.now += 60
    quarantine.put(X, marked(3))
    assert held(folder) == [2, 3]
    clock.now += 101
    quarantine.tidy()
    assert held(folder) == []
    assert (quarantine.count, quarantine.total_bytes, quarantine.failures) == (0, 0, 0)


def test_a_clock_that_was_set_back_holds_up_only_what_is_dated_ahead_of_it(folder: Path) -> None:
    clock = Clock()
    quarantine = opened(folder, clock, max_age_s=100)
    quarantine.put(X, marked(1))
    clock.now -= 1000
    quarantine.put(X, marked(2))
    clock.now += 101
    quarantine.tidy()
    assert held(folder) == [1]


def test_an_input_that_is_larger_than_the_whole_quarantine_is_a_failure_and_costs_no_other(folder: Path) -> None:
    quarantine = opened(folder, max_bytes=3000)
    quarantine.put(X, ABOUT)
    assert not quarantine.put(np.zeros(3000, np.uint8), ABOUT)
    assert (quarantine.failures, quarantine.count) == (1, 1)


def test_what_the_owner_took_away_is_no_failure(folder: Path) -> None:
    quarantine = opened(folder, max_count=2)
    for number in range(2):
        quarantine.put(X, marked(number))
    files(folder)[0].unlink()
    assert quarantine.put(X, marked(2))
    assert (held(folder), quarantine.failures) == ([1, 2], 0)


@settings(max_examples=40, deadline=None)
@given(
    puts=st.lists(st.tuples(st.integers(1, 4000), st.integers(0, 60), st.booleans()), max_size=25),
    max_bytes=st.integers(1000, 8000),
    max_count=st.integers(1, 6),
)
def test_the_bounds_hold_on_disk_after_each_input_over_restarts(
    tmp_path_factory: pytest.TempPathFactory, puts: list[tuple[int, int, bool]], max_bytes: int, max_count: int
) -> None:
    folder, clock = tmp_path_factory.mktemp("bounds") / "q", Clock()
    bounds: dict[str, Any] = {"max_bytes": max_bytes, "max_count": max_count, "max_age_s": 100}
    quarantine = opened(folder, clock, **bounds)
    for number, (size, seconds, restart) in enumerate(puts):
        clock.now += seconds
        if restart:
            quarantine = opened(folder, clock, **bounds)
        kept = quarantine.put(np.zeros(size, np.uint8), marked(number))
        there = files(folder)
        sizes = [path.stat().st_size for path in there]
        assert sum(sizes) == quarantine.total_bytes <= max_bytes
        assert len(there) == quarantine.count <= max_count
        assert held(folder) == sorted(held(folder), key=lambda mark: mark or 0)
        assert (held(folder)[-1:] == [number]) is kept


# The start


def test_a_start_takes_stock_and_lets_go_by_new_bounds(folder: Path) -> None:
    first = opened(folder)
    for number in range(5):
        first.put(X, marked(number))
    second = opened(folder, max_count=3)
    assert (second.count, held(folder)) == (3, [2, 3, 4])
    assert second.total_bytes == sum(path.stat().st_size for path in files(folder))
    second.put(X, marked(5))
    assert held(folder) == [3, 4, 5]


def test_a_start_deletes_what_was_half_written_and_touches_nothing_else(folder: Path, tmp_path: Path) -> None:
    opened(folder).put(X, ABOUT)
    kept = files(folder)[0].name
    (folder / ".0000000002-17.npz.tmp").write_bytes(b"PK")
    outside = tmp_path / "outside"
    outside.write_bytes(b"not ours")
    (folder / "0000000003-17.npz").symlink_to(outside)
    (folder / "0000000004-17.npz").mkdir()
    for name in ("notes.txt", ".other.tmp", "photo.npz"):
        (folder / name).write_bytes(b"not ours")
    quarantine = opened(folder, max_count=1)
    quarantine.put(X, ABOUT)
    left = {path.name for path in files(folder)}
    assert quarantine.count == 1
    assert kept not in left
    assert ".0000000002-17.npz.tmp" not in left
    assert {"0000000003-17.npz", "0000000004-17.npz", "notes.txt", ".other.tmp", "photo.npz"} < left
    assert outside.read_bytes() == b"not ours"


@pytest.mark.parametrize("mode", [0o755, 0o710, 0o704])
def test_a_folder_that_others_may_enter_is_refused_and_left_as_it_is(folder: Path, mode: int) -> None:
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(ConfigError, match=f"{mode:04o}"):
        opened(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == mode


def test_what_is_no_folder_is_refused(folder: Path) -> None:
    folder.write_bytes(b"")
    with pytest.raises(ConfigError, match="quarantine"):
        opened(folder)


@pytest.mark.parametrize("bound", ["max_bytes", "max_count", "max_age_s"])
def test_a_bound_that_keeps_nothing_is_refused(folder: Path, bound: str) -> None:
    bounds: dict[str, Any] = {bound: 0}
    with pytest.raises(ConfigError, match="1 or more"):
        opened(folder, **bounds)


# Failures


@contextmanager
def full_disk() -> Iterator[None]:
    """Files of this process may not grow beyond 100 bytes: a write fails in its midst, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_a_counted_failure_that_leaves_nothing_half_written(folder: Path) -> None:
    quarantine = opened(folder)
    quarantine.put(X, marked(1))
    with full_disk():
        assert not quarantine.put(X, marked(2))
    assert (quarantine.failures, quarantine.count, held(folder)) == (1, 1, [1])
    assert quarantine.put(X, marked(3))
    assert held(folder) == [1, 3]


def test_a_folder_that_vanished_is_counted_logged_once_and_not_made_again(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quarantine = opened(folder)
    quarantine.put(X, marked(1))
    folder.rename(tmp_path / "away")
    with caplog.at_level(logging.WARNING):
        assert [quarantine.put(X, marked(n)) for n in (2, 3, 4)] == [False] * 3
    assert quarantine.failures == 3
    assert [record.getMessage() for record in caplog.records] == [
        f"quarantine {folder} failed (1 so far): No such file or directory"
    ]
    assert not folder.exists()
    (tmp_path / "away").rename(folder)
    assert quarantine.put(X, marked(5))
    assert held(folder) == [1, 5]
    shutil.rmtree(folder)
    quarantine.put(X, marked(6))
    assert len(caplog.records) == 2


def test_what_cannot_be_deleted_still_counts_and_nothing_is_added_beyond_the_bound(folder: Path) -> None:
    quarantine = opened(folder, max_count=1)
    quarantine.put(X, ABOUT)
    (path,) = files(folder)
    path.unlink()
    path.mkdir()  # a folder cannot be deleted as a file, not even by root
    assert not quarantine.put(X, ABOUT)
    quarantine.tidy()
    assert (quarantine.count, quarantine.failures, files(folder)) == (1, 1, [path])


def test_tidying_in_vain_is_a_counted_failure(folder: Path) -> None:
    clock = Clock()
    quarantine = opened(folder, clock, max_age_s=100)
    quarantine.put(X, ABOUT)
    (path,) = files(folder)
    path.unlink()
    path.mkdir()
    clock.now += 101
    quarantine.tidy()
    assert quarantine.failures == 1


# Hostile files


def content_of(x: np.ndarray, about: About = ABOUT) -> bytes:
    """A sound file, made by hand."""
    return packed({"input.npy": npy(x), "about.json": msgspec.json.encode(about)})


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def packed(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return stream.getvalue()


SMALL = X[:2, :2]
SOUND = content_of(SMALL)
ABOUT_JSON = msgspec.json.encode(ABOUT)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "a.npz"


def reading(scratch: Path, content: bytes) -> tuple[np.ndarray, About]:
    scratch.write_bytes(content)
    return read(scratch)


def test_a_file_made_by_hand_is_read(scratch: Path) -> None:
    found, about = reading(scratch, SOUND)
    assert np.array_equal(found, SMALL)
    assert about == ABOUT


@given(content=st.binary(max_size=300))
def test_random_bytes_are_no_kept_input(scratch: Path, content: bytes) -> None:
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 2, 2, len(content), 0, 0)
    for hostile in (content, b"PK\x03\x04" + content, content + end):
        with pytest.raises(ModelError, match="quarantined input"):
            reading(scratch, hostile)


@given(cut=st.integers(0, len(SOUND) - 1))
def test_a_file_that_was_cut_short_is_refused(scratch: Path, cut: int) -> None:
    with pytest.raises(ModelError):
        reading(scratch, SOUND[:cut])


@settings(max_examples=100)
@given(flips=st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 7)), min_size=1, max_size=6))
def test_flipped_bits_are_refused_or_change_nothing(scratch: Path, flips: list[tuple[int, int]]) -> None:
    damaged = bytearray(SOUND)
    for position, bit in flips:
        damaged[position] ^= 1 << bit
    try:
        found, about = reading(scratch, bytes(damaged))
    except ModelError:
        return
    assert np.array_equal(found, SMALL)
    assert about == ABOUT


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")  # NumPy parses what was rewritten
@settings(max_examples=100)
@given(
    name=st.sampled_from(["input.npy", "about.json"]),
    position=st.integers(0, 140),
    value=st.binary(min_size=1, max_size=12),
)
def test_a_member_that_was_rewritten_is_refused_or_sound(scratch: Path, name: str, position: int, value: bytes) -> None:
    members = {"input.npy": npy(SMALL), "about.json": ABOUT_JSON}
    member = members[name]
    members[name] = member[:position] + value + member[position + len(value) :]
    try:
        found, about = reading(scratch, packed(members))
    except ModelError:
        return
    again, same = reading(scratch, content_of(found, about))
    assert np.array_equal(again, found)
    assert same == about


@pytest.mark.parametrize(
    "array",
    [
        npy(np.array([{}])),
        npy(np.zeros(3, np.float64)),
        npy(np.zeros((0, 3), np.uint8)),
        npy(np.array([np.nan], np.float32)),
        npy(np.array([np.inf], np.float32)),
        npy(np.asfortranarray(np.zeros((2, 3), np.uint8))),
        npy(SMALL).replace(b"NUMPY\x01", b"NUMPY\x02"),
        npy(SMALL)[:-1],
        npy(SMALL) + b"\0",
        npy(SMALL).replace(b"(2, 2, 3)", b"(-2, -2, 3)").replace(b"  \n", b"\n"),
        npy(SMALL).replace(b"(2, 2, 3), ", b"(9**9, 2,)"),
        b"",
    ],
)
def test_an_array_that_no_model_takes_is_refused(scratch: Path, array: bytes) -> None:
    with pytest.raises(ModelError):
        reading(scratch, packed({"input.npy": array, "about.json": ABOUT_JSON}))


@pytest.mark.parametrize(
    "about",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        ABOUT_JSON.replace(b'"v":1', b'"v":2'),
        ABOUT_JSON.replace(b'"at_ms":1', b'"at_ms":-1'),
        ABOUT_JSON.replace(b'"p_value":0.001', b'"p_value":1.5'),
        ABOUT_JSON.replace(b"aaaa", b"/../", 1),
    ],
)
def test_a_description_that_is_none_is_refused(scratch: Path, about: bytes) -> None:
    with pytest.raises(ModelError):
        reading(scratch, packed({"input.npy": npy(SMALL), "about.json": about}))


@pytest.mark.parametrize("change", ["missing", "further", "twice"])
def test_an_archive_of_other_members_is_refused(scratch: Path, change: str) -> None:
    members = {"input.npy": npy(SMALL), "about.json": ABOUT_JSON}
    if change == "missing":
        del members["about.json"]
    if change == "further":
        members["../evil"] = b""
    hostile = packed(members)
    if change == "twice":
        hostile = packed({"input.npy": npy(SMALL), "input.npx": npy(SMALL)}).replace(b"input.npx", b"input.npy")
    with pytest.raises(ModelError, match="members"):
        reading(scratch, hostile)


def test_a_compressed_member_is_refused_however_small(scratch: Path) -> None:
    members = {"input.npy": npy(SMALL), "about.json": ABOUT_JSON}
    with pytest.raises(ModelError, match="compressed"):
        reading(scratch, packed(members, zipfile.ZIP_DEFLATED))


def compressed_bomb() -> bytes:
    return packed({"input.npy": npy(np.zeros(16 << 20, np.uint8)), "about.json": ABOUT_JSON}, zipfile.ZIP_DEFLATED)


def directory_bomb(*, zip64: bool) -> bytes:
    """Too many members, under an end record that admits to two."""
    content = packed({str(number): b"" for number in range(10_000)})
    _, _, _, _, count, size, offset, _ = struct.unpack("<4s4H2LH", content[-22:])
    content = content[:-22]
    if zip64:
        end = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, offset)
        content += end + struct.pack("<4sLQL", b"PK\x06\x07", 0, len(content), 1)
        size = 100
    return content + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 2, 2, size, offset, 0)


@pytest.mark.parametrize(
    "bomb",
    [
        compressed_bomb,
        lambda: directory_bomb(zip64=False),
        lambda: directory_bomb(zip64=True),
        lambda: packed({"input.npy": npy(SMALL).replace(b"(2, 2, 3), ", b"(%d,), " % 2**40), "about.json": ABOUT_JSON}),
    ],
    ids=["compressed", "directory", "zip64 directory", "array shape"],
)
def test_a_bomb_is_refused_before_it_takes_memory(scratch: Path, bomb: Callable[[], bytes]) -> None:
    content = bomb()
    scratch.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError):
            read(scratch)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(content) + (1 << 20)
    finally:
        tracemalloc.stop()


def test_no_more_of_a_file_is_read_than_one_may_have(tmp_path: Path) -> None:
    with (tmp_path / "a.npz").open("wb") as file:
        file.truncate(1 << 40)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match="more than"):
            read(tmp_path / "a.npz")
        assert tracemalloc.get_traced_memory()[1] < 2 * MAX_FILE
    finally:
        tracemalloc.stop()


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelError):
        read(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("link", "missing"):
        with pytest.raises(ConfigError, match=name):
            read(tmp_path / name)
