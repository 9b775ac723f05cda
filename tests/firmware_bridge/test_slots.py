"""Model slots: a complete, verified model at every instant, and no way for a damaged or older one to run."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec
import pytest

from edgeguard.errors import ConfigError, TrustError
from firmware_bridge.slots import (
    FAILED_KEPT,
    KEY,
    RECORD,
    SIDECAR,
    Content,
    Slot,
    Slots,
    State,
    activated,
    emptied,
    recalibrated,
    reverted,
    staged,
)

ONE, TWO, THREE = (bytes([number]) * 10_000 for number in (1, 2, 3))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def stage(slots: Slots, content: bytes, sequence: int, *, proved: bool = True) -> Slot:
    """Stage ``content`` from a file beside the slots, as a fetched model lies there; what runs is ``proved`` or not."""
    if proved:
        slots.confirm()
    path = slots._folder.parent / "fetched.tflite"
    path.write_bytes(content)
    return slots.stage(path, sha256=sha256(content), sequence=sequence)


def update(slots: Slots, content: bytes, sequence: int, *, proved: bool = True) -> Slot:
    """Stage and activate ``content``."""
    slot = stage(slots, content, sequence, proved=proved)
    slots.activate(slot)
    return slot


def recalibrate(slots: Slots, content: bytes) -> Slot:
    """Stage and activate ``content`` as a re-calibrated copy of what runs, once that proved itself."""
    slots.confirm()
    slot = slots.stage_local(content, made_of=slots.active(), guard_digest=sha256(b"guard" + content))
    slots.activate(slot)
    return slot


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    return Slots.install(tmp_path / "slots", ONE, sequence=1)


def test_the_first_model_is_active_and_confirmed(slots: Slots) -> None:
    assert slots.load() == ONE
    assert slots.active().sequence == 1
    assert slots.active().sha256 == sha256(ONE)
    assert slots.confirmed
    assert slots.previous() is None


def test_installing_again_keeps_what_is_installed(slots: Slots, tmp_path: Path) -> None:
    update(slots, TWO, 2)
    assert Slots.install(tmp_path / "slots", ONE, sequence=1).load() == TWO


def test_a_staged_model_does_not_run_yet(slots: Slots) -> None:
    stage(slots, TWO, 2)
    assert slots.load() == ONE


def test_an_activated_model_runs_unconfirmed_after_a_restart_too(slots: Slots, tmp_path: Path) -> None:
    update(slots, TWO, 2)
    again = Slots(tmp_path / "slots")
    assert again.load() == TWO
    assert not again.confirmed
    again.confirm()
    assert Slots(tmp_path / "slots").confirmed


def test_revert_goes_back_once(slots: Slots) -> None:
    update(slots, TWO, 2)
    assert slots.revert("it crashed").sequence == 1
    assert slots.load() == ONE
    assert slots.confirmed
    with pytest.raises(ConfigError, match="no previous model"):
        slots.revert("again")


def test_a_confirmed_model_can_still_be_reverted_until_the_next_is_staged(slots: Slots) -> None:
    update(slots, TWO, 2)
    slots.confirm()
    previous = slots.previous()
    assert previous is not None
    assert previous.sequence == 1
    stage(slots, THREE, 3)
    assert slots.previous() is None


def test_a_newer_release_takes_the_place_of_one_on_trial_and_never_that_of_the_one_before(slots: Slots) -> None:
    update(slots, TWO, 2)
    update(slots, THREE, 3, proved=False)
    assert (slots.load(), slots.confirmed) == (THREE, False)
    before = slots.previous()
    assert before is not None
    assert slots.read(before) == ONE
    assert slots.revert("failed", has_failed=True).sequence == 1
    assert (slots.load(), slots.confirmed, slots.failed) == (ONE, True, (sha256(THREE),))


def test_what_was_replaced_on_trial_stays_until_the_newer_one_is_confirmed(slots: Slots, tmp_path: Path) -> None:
    # While a disk did not confirm the rename, it is what runs.
    update(slots, TWO, 2)
    update(slots, THREE, 3, proved=False)
    assert slots.holding(sha256(TWO)).sequence == 2
    slots.confirm()
    slots.tidy()
    left = {path.read_bytes() for path in (tmp_path / "slots").glob("*.tflite")}
    assert left == {ONE, THREE}
    with pytest.raises(TrustError, match="no slot"):
        slots.holding(sha256(TWO))


def test_however_many_releases_follow_each_other_on_trial_there_are_three_files(slots: Slots, tmp_path: Path) -> None:
    for number in range(2, 9):
        update(slots, bytes([number]), number, proved=False)
        slots.tidy()
        files = [path.read_bytes() for path in (tmp_path / "slots").glob("*.tflite")]
        assert len(files) <= 3
        assert ONE in files
    slots.confirm()
    slots.tidy()
    assert len(list((tmp_path / "slots").glob("*.tflite"))) == 2
    update(slots, TWO, 9)
    slots.tidy()
    assert len(list((tmp_path / "slots").glob("*.tflite"))) == 2


def test_of_two_slots_with_one_file_the_one_that_runs_counts(slots: Slots) -> None:
    update(slots, TWO, 2)
    update(slots, ONE, 3, proved=False)
    assert (slots.holding(sha256(ONE)).name, slots.holding(sha256(ONE)).sequence) == (slots.active().name, 3)


def test_a_model_on_trial_is_not_re_calibrated(slots: Slots) -> None:
    update(slots, TWO, 2)
    with pytest.raises(ConfigError, match="on trial"):
        slots.stage_local(THREE, made_of=slots.active(), guard_digest=sha256(b"guard"))
    assert slots.load() == TWO


def test_a_model_on_trial_without_a_whole_one_before_it_is_replaced_and_comes_back_on_trial(
    slots: Slots, tmp_path: Path
) -> None:
    update(slots, TWO, 2)
    (tmp_path / "slots" / "slot-a.tflite").write_bytes(b"damaged")
    newer = tmp_path / "newer"
    newer.write_bytes(THREE)
    slots.activate(slots.stage(newer, sha256=sha256(THREE), sequence=3))
    assert slots.revert("failed", has_failed=True).sequence == 2
    assert not slots.confirmed
    slots.confirm()
    assert slots.highest == 2


def test_the_slot_of_a_model_is_found_though_another_one_is_active(slots: Slots) -> None:
    update(slots, TWO, 2)
    assert slots.holding(sha256(ONE)) == slots.previous()
    assert slots.holding(sha256(TWO)) == slots.active()
    with pytest.raises(TrustError, match="no slot"):
        slots.holding(sha256(THREE))


def test_updates_take_turns_between_the_two_slots(slots: Slots, tmp_path: Path) -> None:
    update(slots, TWO, 2)
    update(slots, THREE, 3)
    assert slots.load() == THREE
    assert sorted(path.name for path in (tmp_path / "slots").iterdir()) == [
        "slot-a.tflite",
        "slot-b.tflite",
        "slots.json",
    ]


@pytest.mark.parametrize("sequence", [0, 4, 5])
def test_a_model_that_is_not_newer_is_not_staged(slots: Slots, sequence: int) -> None:
    update(slots, TWO, 5)
    with pytest.raises(TrustError, match="expected at least 6"):
        stage(slots, THREE, sequence)
    previous = slots.previous()
    assert previous is not None
    assert previous.sequence == 1


def test_a_file_with_another_digest_is_not_staged_and_the_way_back_stays(slots: Slots, tmp_path: Path) -> None:
    update(slots, TWO, 2)
    slots.confirm()
    tampered = tmp_path / "tampered"
    tampered.write_bytes(THREE[:-1] + b"x")
    with pytest.raises(TrustError, match="SHA-256"):
        slots.stage(tampered, sha256=sha256(THREE), sequence=3)
    assert slots.load() == TWO
    assert slots.revert("still possible").sequence == 1


def test_a_missing_file_is_one_clear_line(slots: Slots, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file") as error:
        slots.stage(tmp_path / "missing", sha256=sha256(TWO), sequence=2)
    assert "\n" not in str(error.value)
    assert slots.load() == ONE


@pytest.mark.parametrize(
    "damage",
    [lambda path: path.write_bytes(ONE[:-1]), lambda path: path.write_bytes(b""), lambda path: path.unlink()],
    ids=["truncated", "emptied", "removed"],
)
def test_a_damaged_active_model_is_an_error_and_never_content(slots: Slots, damage: Callable[[Path], object]) -> None:
    damage(slots.active().path)
    with pytest.raises(TrustError):
        slots.active()
    with pytest.raises(TrustError):
        slots.load()


def test_a_damaged_active_model_can_be_left_for_the_previous_one(slots: Slots) -> None:
    update(slots, TWO, 2)
    slots.active().path.write_bytes(b"damaged")
    assert slots.revert("damaged").sequence == 1
    assert slots.load() == ONE


def test_a_damaged_previous_model_is_not_gone_back_to(slots: Slots, tmp_path: Path) -> None:
    update(slots, TWO, 2)
    (tmp_path / "slots" / "slot-a.tflite").write_bytes(b"damaged")
    with pytest.raises(TrustError):
        slots.revert("try")
    assert slots.load() == TWO


def test_a_staged_model_that_changed_on_disk_is_not_activated(slots: Slots) -> None:
    slot = stage(slots, TWO, 2)
    slot.path.write_bytes(THREE)
    with pytest.raises(TrustError):
        slots.activate(slot)
    assert slots.load() == ONE


def test_a_slot_that_was_staged_over_is_not_activated(slots: Slots) -> None:
    old = stage(slots, TWO, 2)
    stage(slots, THREE, 3)
    with pytest.raises(TrustError, match="another model than was staged"):
        slots.activate(old)
    assert slots.load() == ONE


def test_nothing_installed_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model installed"):
        Slots(tmp_path)


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"active":"d","previous":null,"confirmed":true}',
        b'{"active":"a","previous":null,"confirmed":true,"a":{"sha256":"../x","sequence":1}}',
        b'{"active":"a","previous":null,"confirmed":true,"a":{"sha256":"%s","sequence":-1}}' % (b"0" * 64),
    ],
)
def test_a_damaged_record_is_refused(slots: Slots, tmp_path: Path, record: bytes) -> None:
    (tmp_path / "slots" / RECORD).write_bytes(record)
    with pytest.raises(TrustError):
        Slots(tmp_path / "slots")
    with pytest.raises(TrustError):
        slots.active()


def test_a_record_that_points_at_an_empty_slot_is_refused(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_bytes(msgspec.json.encode(State(active="a", previous=None, confirmed=True)))
    with pytest.raises(TrustError, match="no verified model"):
        Slots(tmp_path).active()


@pytest.mark.parametrize("active", ["a", "b"])
def test_transitions_never_touch_the_active_slot(active: str) -> None:
    content = Content(sha256="0" * 64, sequence=7)
    state = msgspec.convert({"active": active, "previous": None, "confirmed": True, "a": content, "b": content}, State)
    newer = Content(sha256="1" * 64, sequence=8)
    for after in (emptied(state), staged(state, newer), recalibrated(state, content, made_of="0" * 64)):
        assert after.active == state.active
        assert after.content(state.active) == content
    there = activated(staged(state, newer), state.inactive)
    assert there.content(there.active) == newer
    assert reverted(there, has_failed=True).active == state.active


def test_a_model_that_failed_its_trial_is_not_staged_again_but_a_damaged_one_is(slots: Slots) -> None:
    update(slots, TWO, 2)
    slots.revert("damaged")
    update(slots, TWO, 2)
    slots.revert("it could not be scored", has_failed=True)
    assert slots.failed == (sha256(TWO),)
    with pytest.raises(TrustError, match="on trial here and failed"):
        stage(slots, TWO, 3)
    update(slots, THREE, 3)


def test_only_the_last_failures_are_remembered(slots: Slots) -> None:
    for number in range(2, FAILED_KEPT + 4):
        update(slots, bytes([number]), number)
        slots.revert("again", has_failed=True)
    assert len(slots.failed) == FAILED_KEPT
    assert slots.failed[-1] == sha256(bytes([FAILED_KEPT + 3]))


def test_nothing_older_than_what_was_ever_confirmed_is_staged_even_where_an_older_model_runs_again(
    slots: Slots,
) -> None:
    update(slots, TWO, 5)
    slots.confirm()
    slots.revert("damaged")
    assert (slots.active().sequence, slots.highest) == (1, 5)
    with pytest.raises(TrustError, match="expected at least 5"):
        stage(slots, THREE, 4)
    update(slots, TWO, 5)


def test_a_record_of_an_earlier_version_is_read(slots: Slots, tmp_path: Path) -> None:
    first = {"sha256": sha256(ONE), "sequence": 1}
    record = {"active": "a", "previous": None, "confirmed": True, "a": first}
    (tmp_path / "slots" / RECORD).write_bytes(msgspec.json.encode(record))
    again = Slots(tmp_path / "slots")
    assert (again.load(), again.highest, again.failed) == (ONE, 0, ())


# --- sidecars and clean-up ------------------------------------------------------------------------


def names(slots: Slots) -> set[str]:
    return {path.name for path in slots._folder.iterdir()}


def test_the_sidecars_of_both_slots_stay_and_those_of_earlier_models_go(slots: Slots) -> None:
    for number, content in ((2, TWO), (3, THREE), (4, TWO)):
        path = slots._folder.parent / "fetched.tflite"
        path.write_bytes(content)
        kept = slots.keep(bytes([number]))
        slots.confirm()
        slots.activate(slots.stage(path, sha256=sha256(content), sequence=number, sidecar=kept))
    assert len([name for name in names(slots) if name.endswith(SIDECAR)]) == 3
    slots.tidy()
    stay = {f"{sha256(bytes([number]))}{SIDECAR}" for number in (3, 4)}
    assert names(slots) == {"slot-a.tflite", "slot-b.tflite", RECORD} | stay


def test_what_repairs_are_held_against_stays_however_many_follow_each_other(slots: Slots) -> None:
    anchor = slots.keep(b"anchor")
    for number, content in ((2, TWO), (3, THREE), (4, TWO)):
        path = slots._folder.parent / "fetched.tflite"
        path.write_bytes(content)
        slots.confirm()
        slot = slots.stage(path, sha256=sha256(content), sequence=number, sidecar=slots.keep(content), anchor=anchor)
        slots.activate(slot)
        slots.tidy()
    assert slots.active().anchor == anchor
    assert slots.sidecar(anchor).read_bytes() == b"anchor"
    slots.confirm()
    local = slots.stage_local(ONE, made_of=slots.active(), guard_digest=sha256(b"guard"), anchor=anchor)
    assert local.anchor == anchor


def test_what_a_killed_process_left_is_removed_and_what_is_not_ours_stays(slots: Slots, tmp_path: Path) -> None:
    folder = tmp_path / "slots"
    for name in (".slot-b.tflite.tmp", "slot-b.tflite", "trial.json", f"{sha256(ONE)}{SIDECAR}", KEY):
        (folder / name).write_bytes(b"x")
    slots.tidy(also=[sha256(ONE)])
    assert names(slots) == {"slot-a.tflite", RECORD, "trial.json", f"{sha256(ONE)}{SIDECAR}", KEY}


def test_staging_needs_no_second_copy_of_a_model_in_memory(slots: Slots, tmp_path: Path) -> None:
    path, size = tmp_path / "large", 20 << 20
    path.write_bytes(bytes(size))
    tracemalloc.start()
    slot = slots.stage(path, sha256=sha256(bytes(size)), sequence=2)
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    slots.activate(slot)
    slots.confirm()
    slots.stage(path, sha256=slot.sha256, sequence=3)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert peak < 2 << 20


# --- files that the device re-calibrated itself ---------------------------------------------------


def test_a_recalibrated_model_runs_unconfirmed_under_the_sequence_of_its_release(slots: Slots, tmp_path: Path) -> None:
    update(slots, TWO, 2)
    slots.confirm()
    recalibrate(slots, THREE)
    again = Slots(tmp_path / "slots")
    assert again.load() == THREE
    assert (again.active().sequence, again.active().parent) == (2, sha256(TWO))
    assert not again.confirmed
    assert again.revert("it crashed").parent is None
    assert again.load() == TWO


def test_a_model_that_was_recalibrated_again_goes_back_to_the_same_release(slots: Slots) -> None:
    recalibrate(slots, TWO)
    recalibrate(slots, THREE)
    previous = slots.previous()
    assert previous is not None
    assert slots.active().parent == previous.parent == sha256(ONE)


def test_a_release_replaces_a_recalibrated_model(slots: Slots) -> None:
    recalibrate(slots, TWO)
    with pytest.raises(TrustError, match="expected at least 2"):
        stage(slots, THREE, 1)
    update(slots, THREE, 2)
    assert (slots.load(), slots.active().parent) == (THREE, None)


def test_a_recalibration_that_an_update_overtook_is_not_staged(slots: Slots) -> None:
    before = slots.active()
    update(slots, TWO, 2)
    slots.confirm()
    with pytest.raises(TrustError, match="another model than runs now"):
        slots.stage_local(THREE, made_of=before, guard_digest=sha256(b"guard"))
    assert slots.load() == TWO
    assert slots.revert("still possible").sequence == 1


def test_the_devices_key_is_made_once_is_its_own_and_is_for_nobody_else(slots: Slots, tmp_path: Path) -> None:
    key = tmp_path / "slots" / KEY
    assert not key.exists()
    recalibrate(slots, TWO)
    first = key.read_bytes()
    recalibrate(slots, THREE)
    assert key.read_bytes() == first
    assert key.stat().st_mode & 0o777 == 0o600
    recalibrate(Slots.install(tmp_path / "other", ONE, sequence=1), TWO)
    assert (tmp_path / "other" / KEY).read_bytes() != first


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (sha256(ONE), sha256(THREE)),
        (sha256(b"guard" + TWO), sha256(b"guard")),
        ('"mac":"', '"mac":"0'),
        ('"mac":"', '"mac":"\u00e9'),
        ('"mac":', '"was":'),
        ('"sequence":1,"local"', '"sequence":9,"local"'),
        (sha256(TWO), sha256(THREE)),
    ],
    ids=["parent", "guard", "mac", "no hex", "no mac", "sequence", "file"],
)
def test_a_forged_record_of_a_recalibration_falls_back_to_the_release(
    slots: Slots, tmp_path: Path, old: str, new: str
) -> None:
    slot = recalibrate(slots, TWO)
    record = tmp_path / "slots" / RECORD
    before, mark, local = record.read_text().partition('"b":')
    assert old in local
    record.write_text(before + mark + local.replace(old, new))
    if new == sha256(THREE):
        slot.path.write_bytes(THREE)
    with pytest.raises(TrustError):
        slots.load()
    assert slots.revert("forged").sequence == 1
    assert slots.load() == ONE


@pytest.mark.parametrize("key", [None, b"", bytes(32)], ids=["removed", "emptied", "another"])
def test_a_recalibrated_model_without_the_key_that_vouches_for_it_falls_back_to_the_release(
    slots: Slots, tmp_path: Path, key: bytes | None
) -> None:
    recalibrate(slots, TWO)
    path = tmp_path / "slots" / KEY
    path.unlink() if key is None else path.write_bytes(key)
    with pytest.raises(TrustError):
        slots.load()
    slots.revert("no key")
    assert slots.load() == ONE


# --- power cuts -----------------------------------------------------------------------------------


class PowerCutError(OSError):
    """The power went; nothing after this reaches the disk."""


Renames = Literal["none", "last", "all"]


class Disk:
    """Watches what reaches the disk below a folder, cuts the power at one step, and shows what is left.

    A step is an fsync or a rename. A file's content is durable as of its last fsync, otherwise torn (half
    of it). A rename is durable once the folder was fsynced; before that it may survive the cut or not, and a
    later one may survive an earlier one.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.steps = 0
        self._cut_at: int | None = None
        self._content: dict[int, bytes] = {}
        self._folder: dict[str, int] = {}
        self._kept_open: list[int] = []
        self._last = ""
        self._real_fsync, self._real_replace, self._real_unlink = os.fsync, os.replace, os.unlink
        for path in folder.iterdir() if folder.exists() else ():
            self._keep(path)
            self._content[path.stat().st_ino] = path.read_bytes()
            self._folder[path.name] = path.stat().st_ino
        monkeypatch.setattr(os, "fsync", self._fsync)
        monkeypatch.setattr(os, "replace", self._replace)
        monkeypatch.setattr(os, "unlink", self._unlink)

    def cut_at(self, step: int) -> None:
        """Let the power fail just before ``step``, counted from 0."""
        self._cut_at = step

    def restart(self, survive: Renames) -> None:
        """The power is back: what survived is on disk; of the late renames, those in ``survive``."""
        names = {path.name: path.stat().st_ino for path in self.folder.iterdir()}
        torn = {path.stat().st_ino: path.read_bytes() for path in self.folder.iterdir()}
        survivors = names if survive == "all" else dict(self._folder)
        if survive == "last" and self._last in names:
            survivors[self._last] = names[self._last]
        contents = {
            name: self._content.get(inode, torn.get(inode, b"")[: len(torn.get(inode, b"")) // 2])
            for name, inode in survivors.items()
        }
        for path in list(self.folder.iterdir()):
            self._real_unlink(path)
        for name, content in contents.items():
            (self.folder / name).write_bytes(content)
        for descriptor in self._kept_open:
            os.close(descriptor)

    def _step(self) -> None:
        if self._cut_at is not None and self.steps >= self._cut_at:
            raise PowerCutError("the power is gone")
        self.steps += 1

    def _keep(self, path: Path) -> None:
        self._kept_open.append(os.open(path, os.O_RDONLY))  # so that its inode number is not given out again

    def _fsync(self, descriptor: int) -> None:
        self._step()
        self._real_fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path == self.folder:
            self._folder = {entry.name: entry.stat().st_ino for entry in self.folder.iterdir()}
        else:
            self._content[path.stat().st_ino] = path.read_bytes()

    def _replace(self, source: Path, target: Path) -> None:
        self._step()
        if Path(target).exists():
            self._keep(Path(target))
        self._real_replace(source, target)
        self._last = Path(target).name

    def _unlink(self, path: Path, *, dir_fd: int | None = None) -> None:
        if self._cut_at is not None and self.steps >= self._cut_at:
            raise PowerCutError("the power is gone")
        self._real_unlink(path)


ACTIONS: dict[str, tuple[Callable[[Slots], object], list[bytes]]] = {
    "stage": (lambda slots: stage(slots, THREE, 3), [TWO]),
    "stage and activate": (lambda slots: update(slots, THREE, 3), [TWO, THREE]),
    "re-calibrate": (lambda slots: recalibrate(slots, THREE), [TWO, THREE]),
    "revert": (lambda slots: slots.revert("a reason"), [TWO, ONE]),
    "confirm": (lambda slots: slots.confirm(), [TWO]),
    "two updates": (lambda slots: [update(slots, *new) for new in ((THREE, 3), (ONE, 4))], [TWO, THREE, ONE]),
}
"""What is done to slots that run TWO and came from ONE, and what may run after a cut; the last when done."""
MOST_STEPS = 60
SURVIVE = pytest.mark.parametrize("survive", ["none", "last", "all"])


@SURVIVE
@pytest.mark.parametrize("name", ACTIONS)
def test_a_power_cut_at_any_step_leaves_a_complete_verified_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, survive: Renames
) -> None:
    action, allowed = ACTIONS[name]
    for step in range(MOST_STEPS):
        folder = tmp_path / str(step) / "slots"
        slots = Slots.install(folder, ONE, sequence=1)
        update(slots, TWO, 2)
        done = run_until_cut(folder, monkeypatch, step, survive, partial(action, slots))
        again = Slots(folder)
        assert again.load() in (allowed[-1:] if done else allowed)
        if (previous := again.previous()) is not None:
            assert sha256(previous.path.read_bytes()) == previous.sha256
        update(again, THREE * 2, 99)  # and life goes on
        assert Slots(folder).load() == THREE * 2
        if done:
            assert step > 0
            return
    pytest.fail(f"{name} takes more than {MOST_STEPS} steps")


@SURVIVE
def test_a_power_cut_while_installing_leaves_nothing_or_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survive: Renames
) -> None:
    for step in range(MOST_STEPS):
        folder = tmp_path / str(step)
        folder.mkdir()
        done = run_until_cut(folder, monkeypatch, step, survive, partial(Slots.install, folder, ONE, sequence=1))
        if done or (folder / RECORD).exists():
            assert Slots(folder).load() == ONE
        assert Slots.install(folder, ONE, sequence=1).load() == ONE
        if done:
            assert step > 0
            return
    pytest.fail(f"installing takes more than {MOST_STEPS} steps")


def run_until_cut(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    survive: Renames,
    action: Callable[[], object],
) -> bool:
    """Do ``action``, cut the power at ``step``, bring it back. True when the action was done before."""
    with monkeypatch.context() as patch:
        disk = Disk(folder, patch)
        disk.cut_at(step)
        try:
            action()
        except ConfigError as error:
            assert isinstance(error.__cause__, PowerCutError)
            return False
        else:
            return True
        finally:
            disk.restart(survive)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_clear_line_and_keeps_the_model_and_the_way_back(slots: Slots, tmp_path: Path) -> None:
    update(slots, TWO, 2)
    (tmp_path / "slots" / ".slot-a.tflite.tmp").symlink_to("/dev/full")
    with pytest.raises(ConfigError, match="No space left") as error:
        stage(slots, THREE, 3)
    assert "\n" not in str(error.value)
    assert slots.load() == TWO
    assert slots.revert("the way back").sequence == 1
    assert not (tmp_path / "slots" / ".slot-a.tflite.tmp").exists()


def test_the_module_imports_nothing_of_ours_but_errors_and_writing() -> None:
    code = (
        "import sys, firmware_bridge.slots;"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in"
        " {'edgeguard', 'converters', 'firmware_bridge', 'tuf', 'numpy'}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(
        ["edgeguard", "edgeguard.disk", "edgeguard.errors", "firmware_bridge", "firmware_bridge.slots"]
    )
