"""Small links: downloads that go on where they broke off, packed and slow; sidecars; the clock; what is not fetched."""

from __future__ import annotations

import fnmatch
import gzip
import random
import shutil
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from edgeguard.errors import ConfigError
from edgeguard.release.client import EARLIEST_S, FLOOR, check_clock, sidecar_path, spawn_fetch, time_floor
from edgeguard.release.download import Downloader
from edgeguard.release.fetch import STAGED_SIDECAR
from tests.release.test_fetch import GUARD, MODEL, NEW, NEWER, NEXT_MODEL, OLD, World, now

SIDECAR = b"clean inputs" * 500
REPAIR = "repaired/digits-2.tflite"


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    one = World(tmp_path / "world")
    yield one
    one.site.stop()


def partials(world: World) -> list[Path]:
    return sorted((world.device / "staging").glob("partial-*"))


# --- resumed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("packs", [False, True])
def test_a_download_that_broke_off_goes_on_where_it_did(world: World, packs: bool) -> None:
    content = random.Random(1).randbytes(200_000)
    world.repository.add(content, name="noise", model_digest=NEWER, guard_digest=GUARD, replaces=OLD)
    request = world.request(target="noise-2.tflite", sequence=2, compress=packs)
    world.site.packs, world.site.breaks_after = packs, 60_000
    received = []
    for _ in range(4):
        result = world.fetch(request)
        received.append(result.received)
        if result.state == "fetched":
            break
    whole = len(gzip.compress(content, mtime=0)) if packs else len(content)
    assert received == [60_000, 60_000, 60_000, whole - 180_000]
    assert world.staged.read_bytes() == content
    assert partials(world) == []


def test_of_a_server_that_gives_no_parts_only_what_was_not_there_counts(world: World) -> None:
    world.site.gives_parts, world.site.breaks_after = False, 4000
    received = [world.fetch().received for _ in range(3)]
    world.site.breaks_after = 5000
    received.append(world.fetch().received)
    world.site.breaks_after = None
    result = world.fetch()
    assert (result.state, received, result.received) == ("fetched", [4000, 0, 0, 1000], len(MODEL) - 5000)
    assert world.staged.read_bytes() == MODEL


def test_where_a_server_gives_no_parts_of_what_it_packs_it_is_asked_for_the_plain_file(world: World) -> None:
    content = random.Random(1).randbytes(200_000)
    world.repository.add(content, name="noise", model_digest=NEWER, guard_digest=GUARD, replaces=OLD)
    request = world.request(target="noise-2.tflite", sequence=2, compress=True)
    world.site.packs, world.site.gives_packed_parts, world.site.breaks_after = True, False, 60_000
    received = []
    for _ in range(5):
        result = world.fetch(request)
        received.append(result.received)
    assert (result.state, received) == ("fetched", [60_000, 60_000, 60_000, 60_000, 20_000])
    assert world.staged.read_bytes() == content


@pytest.mark.parametrize("packs", [False, True])
def test_a_part_that_a_power_cut_damaged_costs_a_download_and_accuses_nobody(world: World, packs: bool) -> None:
    world.site.packs, world.site.breaks_after = packs, 40
    request = world.request(compress=packs)
    assert world.fetch(request).state == "failed"
    (partial,) = partials(world)
    partial.write_bytes(bytes(40))
    world.site.breaks_after = None
    assert world.fetch(request).state == "fetched"
    assert world.staged.read_bytes() == MODEL


@pytest.mark.parametrize("length", [len(MODEL), len(MODEL) + 5])
def test_a_part_that_is_as_long_as_the_whole_is_no_dead_end(world: World, length: int) -> None:
    world.site.breaks_after = 40
    world.fetch()
    (partial,) = partials(world)
    partial.write_bytes(MODEL if length == len(MODEL) else bytes(length))
    world.site.breaks_after = None
    assert world.fetch().state == "fetched"


def test_a_wrong_model_that_came_in_parts_is_refused_and_leaves_nothing(world: World) -> None:
    path = f"/targets/{world.first.file_digest}.digits-1.tflite"
    world.site.instead[path], world.site.breaks_after = bytes(len(MODEL)), 4000
    assert world.fetch().state == "failed"
    world.site.breaks_after = None
    result = world.fetch()
    assert (result.state, partials(world), world.staged.exists()) == ("refused", [], False)
    world.site.instead.clear()
    assert world.fetch().state == "fetched"


def test_parts_of_another_release_are_removed(world: World) -> None:
    world.site.breaks_after = 4000
    world.fetch()
    (old,) = partials(world)
    world.release_next()
    world.fetch(world.next_request())
    assert len(partials(world)) == 1
    assert not old.exists()


def lying(header: str, value: str, status: int = 206) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header(header, value)
        handler.end_headers()
        handler.wfile.write(MODEL)

    return answer


@pytest.mark.parametrize(
    "answer",
    [lying("Content-Range", "bytes 7-8999/9000"), lying("Content-Range", "x"), lying("Content-Encoding", "br", 200)],
    ids=["another part", "no part", "another coding"],
)
def test_an_answer_that_was_not_asked_for_has_failed(world: World, answer: Any) -> None:
    world.site.breaks_after = 4000
    world.fetch()
    world.site.instead[f"/targets/{world.first.file_digest}.digits-1.tflite"] = answer
    assert world.fetch().state == "failed"


# --- packed ---------------------------------------------------------------------------------------


def test_a_packed_model_takes_less_of_the_link(world: World) -> None:
    world.site.packs = True
    result = world.fetch(world.request(compress=True))
    assert result.state == "fetched"
    assert result.received < len(MODEL) / 10
    assert world.staged.read_bytes() == MODEL


def test_what_unpacks_to_more_than_was_signed_is_refused_before_it_fills_the_disk(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = gzip.compress(bytes(50_000_000))[:9000]
    largest = 0
    remove = Path.unlink

    def watched(path: Path, **options: Any) -> None:
        nonlocal largest
        if path.exists() and fnmatch.fnmatch(path.name, "partial-*"):
            largest = max(largest, path.stat().st_size)
        remove(path, **options)

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Encoding", "gzip")
        handler.end_headers()
        handler.wfile.write(bomb)

    monkeypatch.setattr(Path, "unlink", watched)
    world.site.instead[f"/targets/{world.first.file_digest}.digits-1.tflite"] = answer
    assert world.fetch(world.request(compress=True)).state == "refused"
    assert 0 < largest < len(MODEL) + 20_000


# --- slow -----------------------------------------------------------------------------------------


def test_a_download_takes_as_long_as_its_bound_says(world: World) -> None:
    waited: list[float] = []
    clock = [0.0]

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        clock[0] += seconds

    folder = world.device / "staging"
    folder.mkdir()
    url = f"{world.site.url}/targets/"
    downloader = Downloader(targets_url=url, folder=folder, bytes_per_s=1000, clock=lambda: clock[0], sleep=sleep)
    with downloader.download_file(f"{url}{world.first.file_digest}.digits-1.tflite", len(MODEL)) as file:
        assert file.read() == MODEL
    assert sum(waited) == pytest.approx(len(MODEL) / 1000, abs=1.0)


# --- sidecars -------------------------------------------------------------------------------------


def with_sidecar(world: World) -> None:
    world.repository.add_repair(
        NEXT_MODEL, name="digits", model_digest=NEWER, guard_digest=GUARD, replaces=NEW, sidecar=SIDECAR
    )


def repair(world: World) -> Any:
    return msgspec.structs.replace(world.next_request(), target=REPAIR)


def test_a_repair_brings_its_sidecar(world: World) -> None:
    with_sidecar(world)
    result = world.fetch(repair(world))
    assert (result.state, result.sidecar_digest) == ("fetched", sha256(SIDECAR).hexdigest())
    assert (world.device / "staging" / STAGED_SIDECAR).read_bytes() == SIDECAR
    assert world.staged.read_bytes() == NEXT_MODEL


def test_a_tampered_sidecar_is_refused_and_with_it_its_model(world: World) -> None:
    with_sidecar(world)
    path = f"/targets/{sidecar_path(REPAIR, sha256(SIDECAR).hexdigest())}"
    world.site.instead[path] = SIDECAR[:-1] + b"x"
    result = world.fetch(repair(world))
    assert result.state == "refused"
    assert not world.staged.exists()
    assert not (world.device / "staging" / STAGED_SIDECAR).exists()


# --- what is not fetched --------------------------------------------------------------------------


class Case(NamedTuple):
    changes: dict[str, Any]
    reason: str


NOT_FETCHED = {
    "failed here before": Case({"failed": (sha256(MODEL).hexdigest(),)}, "on trial here and failed"),
    "older than what proved itself": Case({"highest_sequence": 2}, "2, which ran, or newer"),
}


@pytest.mark.parametrize("case", NOT_FETCHED.values(), ids=NOT_FETCHED.keys())
def test_a_release_that_this_device_must_not_take_costs_no_download(world: World, case: Case) -> None:
    result = world.fetch(world.request(**case.changes))
    assert result.state == "refused"
    assert case.reason in result.reason
    assert not [path for path in world.site.asked if path.startswith("/targets/")]


@pytest.mark.parametrize(
    ("boards", "runtimes", "state"),
    [
        (("Raspberry Pi*",), (), "fetched"),
        (("*jetson*", "raspberry*"), ("litert",), "fetched"),
        (("*Jetson*",), (), "refused"),
        ((), ("tflite-runtime",), "refused"),
    ],
)
def test_a_release_for_other_boards_or_runtimes_is_refused(
    world: World, boards: tuple[str, ...], runtimes: tuple[str, ...], state: str
) -> None:
    world.repository.add(
        NEXT_MODEL,
        name="digits",
        model_digest=NEWER,
        guard_digest=GUARD,
        replaces=NEW,
        boards=boards,
        runtimes=runtimes,
    )
    request = msgspec.structs.replace(world.next_request(), board="Raspberry Pi 5 Model B", runtime="litert")
    assert world.fetch(request).state == state


def test_a_full_disk_is_said_before_anything_is_fetched(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(world.device)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * len(MODEL)))
    result = world.fetch()
    assert (result.state, result.received) == ("failed", 0)
    assert "MiB free" in result.reason


# --- the clock ------------------------------------------------------------------------------------


def test_valid_metadata_raises_the_floor_and_invalid_does_not(world: World) -> None:
    metadata = world.device / "metadata"
    assert time_floor(metadata) == EARLIEST_S
    world.fetch()
    floor = time_floor(metadata)
    assert abs(floor - now().timestamp()) < 60
    (metadata / FLOOR).unlink()
    world.site.instead["/metadata/timestamp.json"] = b"{}"
    assert world.fetch().state == "refused"
    assert time_floor(metadata) == EARLIEST_S


def test_with_a_clock_below_the_floor_no_fetch_is_started(world: World) -> None:
    world.fetch()
    floor = time_floor(world.device / "metadata")
    for clock in (0.0, floor - 1.0):
        with pytest.raises(ConfigError, match="clock of this device"):
            spawn_fetch(world.request(), clock=lambda clock=clock: clock)  # type: ignore[misc]


def test_a_child_whose_clock_fell_meanwhile_asks_nobody(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.fetch()
    asked = len(world.site.asked)
    monkeypatch.setattr(time, "time", lambda: 1_767_225_601.0)
    result = world.fetch()
    assert result.state == "failed"
    assert "clock of this device" in result.reason
    assert len(world.site.asked) == asked


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"-5", b'"x"', b"1e400", b"253402300800", b"9" * 400])
def test_a_damaged_floor_is_that_of_this_program(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FLOOR).write_bytes(content)
    assert time_floor(tmp_path) == EARLIEST_S


@pytest.mark.parametrize("now_s", [-1e9, 0.0, EARLIEST_S - 1])
def test_a_clock_before_this_program_was_written_is_wrong(now_s: float) -> None:
    with pytest.raises(ConfigError, match=r"got 19\d\d|got 20\d\d"):
        check_clock(now_s, EARLIEST_S)


def test_a_sidecar_lies_beside_its_model() -> None:
    assert sidecar_path("repaired/m-3.tflite", "ab") == "repaired/ab.m-3.guard.npz"
    assert sidecar_path("m-3.tflite", "ab") == "ab.m-3.guard.npz"
