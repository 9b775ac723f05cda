"""The kill table of a fetch: whatever goes wrong at whatever file-system operation, the release is fetched next time.

As ``tests/agent/test_update_power.py`` for what comes after. What must hold:

* what is called fetched is what was signed; a disk that fails is a failure, never an attack;
* the next fetch, on a disk that works, gets the release;
* once a fetch ended well, the power may fail: older metadata is refused, and the clock's floor stands.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from edgeguard.release.client import EARLIEST_S, FetchRequest, FetchResult, time_floor
from edgeguard.release.fetch import STAGED_SIDECAR, fetch
from tests.release.test_fetch import GUARD, NEW, NEWER, NEXT_MODEL, World
from tests.simulators import disk
from tests.simulators.disk import Fault

SIDECAR = b"clean inputs" * 100


@pytest.fixture
def world() -> Iterator[World]:
    """A device that fetched one release, and a repair with its sidecar that waits for it."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as name:
        one = World(Path(name) / "world")
        assert one.fetch().state == "fetched"
        one.old = one.metadata("timestamp.json").read_bytes()  # type: ignore[attr-defined]
        one.repository.add_repair(
            NEXT_MODEL, name="digits", model_digest=NEWER, guard_digest=GUARD, replaces=NEW, sidecar=SIDECAR
        )
        yield one
        one.site.stop()


def request(world: World, device: Path) -> FetchRequest:
    return msgspec.structs.replace(
        world.next_request(),
        target="repaired/digits-2.tflite",
        metadata_dir=str(device / "metadata"),
        root=str(device / "root.json"),
        staging_dir=str(device / "staging"),
    )


def copied(world: World) -> Path:
    victim = world.folder / "victim"
    shutil.rmtree(victim, ignore_errors=True)
    shutil.copytree(world.device, victim, symlinks=True)
    return victim


def run(world: World, victim: Path, fault: Fault | None = None) -> disk.Outcome:
    wanted = request(world, victim)
    return disk.run(lambda: msgspec.json.encode(fetch(wanted)).decode(), victim, fault)


def staged(device: Path) -> tuple[bytes, bytes]:
    folder = device / "staging"
    return (folder / "incoming.tflite").read_bytes(), (folder / STAGED_SIDECAR).read_bytes()


def test_whatever_fails_wherever_a_fetch_is_not_lost(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    passed = run(world, copied(world)).points
    row = Counter[str]()
    for fault in disk.faults(passed):
        where = f"{fault} {passed[fault.at]}"
        victim = copied(world)
        said = run(world, victim, fault).said
        row[fault.how] += 1
        if said is not None:
            result = msgspec.json.decode(said, type=FetchResult)
            assert result.state in ("fetched", "failed"), f"{where}: {result.reason}"
            assert result.state == "failed" or staged(victim) == (NEXT_MODEL, SIDECAR), where
        assert fetch(request(world, victim)).state == "fetched", where
        assert staged(victim) == (NEXT_MODEL, SIDECAR), where
    with capsys.disabled():
        print(f"\nfetch: {len(passed)} operations; {', '.join(f'{how} in {count}' for how, count in row.items())}")
    assert len(passed) > 40


def test_what_a_finished_fetch_knows_outlives_a_power_cut(world: World) -> None:
    victim = copied(world)
    wanted = request(world, victim)

    def program() -> str:
        state = fetch(wanted).state
        (victim / "after").write_bytes(b"")
        return state

    points = disk.run(program, victim).points
    copied(world)
    disk.run(program, victim, Fault(points.index("open to write after"), "power"))
    assert staged(victim) == (NEXT_MODEL, SIDECAR)
    assert time_floor(victim / "metadata") > EARLIEST_S
    world.site.instead["/metadata/timestamp.json"] = world.old  # type: ignore[attr-defined]
    result = fetch(wanted)
    assert result.state == "refused"
    assert "older than what this device has seen" in result.reason
