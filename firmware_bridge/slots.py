"""Model slots and one pointer: a device has a complete, verified model whenever the power fails.

A folder holds ``slot-a.tflite``, ``slot-b.tflite`` and ``slots.json``, which says what lies in each slot and
which one runs. A third slot, c, comes into use where a release takes the place of one that is still on trial. Rules
enforced here:

* a file appears whole or not at all: write beside it, fsync, rename, fsync the folder;
* ``slots.json`` never vouches for bytes that may not be there: the record of a slot is dropped before its
  file is replaced, and written after the new file is safe on disk;
* the slot that runs is never written to; one rename of ``slots.json`` moves the pointer;
* content is handed out only after its SHA-256 was compared with the record: damage is an error, not a model. A disk
  that fails to read is asked twice;
* a staged model must be newer than the active one, by its sequence number, and no older than the newest that was ever
  confirmed; only one that this device re-calibrated itself has the number of the active one, which it was made of;
* while a model is on trial, the one before it is not overwritten: there is always a way back to one that proved itself.
  A newer release may take the place of the one on trial; the way back stays what it was;
* a model that failed its trial is remembered, and not staged again;
* a slot's sidecar lies beside it under its own digest, and so does the one that repairs of it are held against. What no
  record names is removed by ``tidy``;
* nobody signed such a local file. Its record names the released file that it goes back to and is authenticated
  with HMAC-SHA-256 under a key of this device's own, made on first use; without that it is not handed out.

The digests of released files find damage, not forgery: whoever may write to the folder may write their record too.
Signatures are checked before a model is staged. The key makes a local record as good as its secrecy.

Transitions are pure functions on a frozen ``State``; ``Slots`` is the shell that reads and writes it. The
record is read again at each call, so that what is on disk is always what counts.

Example:
    >>> slots = Slots.install(folder, content, sequence=1)  # doctest: +SKIP
    >>> slots.activate(slots.stage(path, sha256=digest, sequence=2))  # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from edgeguard import disk
from edgeguard.errors import ConfigError, TrustError

FOLDER = "slots"
"""Where they lie in an agent's state folder."""
RECORD = "slots.json"
KEY = "local.key"
SIDECAR = ".guard.npz"
FAILED_KEPT = 16
_KEY_BYTES = 32
_BLOCK = 1 << 18
LOG = logging.getLogger(__name__)
T = TypeVar("T")

Name = Literal["a", "b", "c"]
NAMES: tuple[Name, ...] = ("a", "b", "c")


class Local(msgspec.Struct, frozen=True, kw_only=True):
    """What is recorded of a file that this device made itself.

    ``parent``: digest of the released file that it goes back to, over however many re-calibrations; ``guard_digest``:
    of the guard that was fitted here; ``mac``: HMAC-SHA-256 (RFC 2104) over both and the rest of :class:`Content`.
    """

    # Not bound to a pattern: what is damaged here costs this slot only, and not the record of both.
    parent: str
    guard_digest: str
    mac: str = ""


class Content(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a slot is known to hold; ``local`` where this device made it; ``sidecar``: digest of its sidecar.

    ``anchor``: digest of the sidecar that a repair of it is held against: that of the release which it goes back to
    over however many repairs and re-calibrations. None for such a release itself.
    """

    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    sequence: Annotated[int, Meta(ge=0, le=2**53)]
    local: Local | None = None
    sidecar: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")] | None = None
    anchor: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")] | None = None


class State(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """``slots.json``: ``previous``: where ``revert`` goes; ``confirmed``: the active model proved itself.

    ``previous_confirmed``: so had the previous one; ``highest``: sequence of the newest release that was ever
    confirmed; ``failed``: digests of the files that failed their trial last.
    """

    active: Name
    previous: Name | None
    confirmed: bool
    previous_confirmed: bool = True
    a: Content | None = None
    b: Content | None = None
    c: Content | None = None
    highest: Annotated[int, Meta(ge=0, le=2**53)] = 0
    failed: tuple[str, ...] = ()

    def content(self, name: Name) -> Content | None:
        """What slot ``name`` is known to hold, None when nothing is."""
        return {"a": self.a, "b": self.b, "c": self.c}[name]

    @property
    def way_back(self) -> Name | None:
        """The slot that must not be written to: of the model before, while the active one is on trial."""
        return None if self.confirmed else self.previous

    @property
    def inactive(self) -> Name:
        """The slot that may be written to."""
        if self.confirmed and self.previous is not None:
            return self.previous
        return next(name for name in NAMES if name not in (self.active, self.previous))


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One slot whose file was verified against the record.

    ``parent`` as in :class:`Local`, None for a release; ``anchor`` as in :class:`Content`.
    """

    name: Name
    path: Path
    sha256: str
    sequence: int
    parent: str | None = None
    anchor: str | None = None


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be said of one slot.

    ``place``: its model runs, or is the way back, or neither any more; ``proof``: it proved itself, is on trial, failed
    its trial, or was replaced before it could prove itself; ``holds``: the file is what the record says; ``local``: it
    was re-calibrated here.
    """

    name: Name
    sequence: int
    sha256: str
    place: Literal["runs", "way back", "left"]
    proof: Literal["confirmed", "on trial", "failed", "not proved"]
    holds: bool
    local: bool


def emptied(state: State) -> State:
    """The inactive slot is about to be overwritten: nothing but what runs, and its way back, is known any more."""
    return _kept(msgspec.structs.replace(state, previous=state.way_back), state.active, state.way_back)


def staged(state: State, content: Content) -> State:
    """The inactive slot holds ``content``.

    Raises TrustError unless it is newer than the active one, as new as the newest that was confirmed, and never failed.
    """
    active = _known(state, state.active)
    lowest = max(active.sequence + 1, state.highest)
    if content.sequence < lowest:
        raise TrustError(
            "model to stage",
            got=f"sequence {content.sequence}",
            expected=f"at least {lowest}",
            do="release the model again under a new sequence",
        )
    _check_failed(state, content)
    return _filled(state, content)


def recalibrated(state: State, content: Content, *, made_of: str) -> State:
    """The inactive slot holds ``content``, made here of the file with the digest ``made_of``.

    Raises TrustError unless that one still runs, under the same sequence, and the new one never failed; ConfigError
    while that one is on trial: it must prove itself as it was released.
    """
    if state.way_back is not None:
        raise ConfigError("re-calibrated model", got="one of a model on trial", do="wait until that has proved itself")
    _check_failed(state, content)
    active = _known(state, state.active)
    if (active.sha256, active.sequence) != (made_of, content.sequence):
        raise TrustError("re-calibrated model", got="one made of another model than runs now", do="re-calibrate again")
    return _filled(state, content)


def mac_of(content: Content, local: Local, key: bytes) -> str:
    """What authenticates the record of a file that this device made itself, in hex."""
    fields = ("edgeguard local model", content.sha256, content.sequence, local.parent, local.guard_digest)
    return hmac.digest(key, msgspec.json.encode(fields), "sha256").hex()


def activated(state: State, name: Name) -> State:
    """Slot ``name`` runs from now on, and is not confirmed yet.

    The way back is the model that ran; where that was on trial itself, it is the one before that.
    """
    if name == state.active:
        return state
    _known(state, name)
    before, proved = state.way_back, state.previous_confirmed
    if before is None:
        before, proved = state.active, state.confirmed
    return msgspec.structs.replace(state, active=name, previous=before, confirmed=False, previous_confirmed=proved)


def reverted(state: State, *, has_failed: bool) -> State:
    """The previous slot runs again, proved or not as before. The one left behind must be staged anew.

    ``has_failed``: it did not prove itself, so that this way is closed too; one that was damaged here may come again.
    """
    if state.previous is None:
        raise ConfigError("model slots", got="no previous model to go back to", do="release a repaired model")
    _known(state, state.previous)
    failed = state.failed
    if has_failed:
        failed = (*failed, _known(state, state.active).sha256)[-FAILED_KEPT:]
    after = msgspec.structs.replace(
        state,
        active=state.previous,
        previous=None,
        confirmed=state.previous_confirmed,
        previous_confirmed=True,
        failed=failed,
    )
    return _kept(after, state.previous, state.active)


def confirmed(state: State) -> State:
    """The active model proved itself. The previous one stays until the next is staged, and no third."""
    highest = max(state.highest, _known(state, state.active).sequence)
    return _kept(msgspec.structs.replace(state, confirmed=True, highest=highest), state.active, state.previous)


def _kept(state: State, *names: Name | None) -> State:
    """Nothing is known of any other slot than these."""
    unknown: dict[str, None] = dict.fromkeys(set(NAMES).difference(names))
    return msgspec.structs.replace(state, **unknown)


def _filled(state: State, content: Content) -> State:
    """The inactive slot holds this content."""
    return msgspec.structs.replace(emptied(state), **{state.inactive: content})


def _check_failed(state: State, content: Content) -> None:
    if content.sha256 in state.failed:
        raise TrustError("model to stage", got="one that was on trial here and failed", do="release a repaired one")


def _known(state: State, name: Name) -> Content:
    content = state.content(name)
    if content is None:
        raise TrustError(f"model slot {name}", got="no verified model in it", do="stage a model first")
    return content


class Slots:
    """The slots of one device.

    Args:
        folder: where they lie; ``install`` must have filled it.

    Raises:
        ConfigError: nothing is installed there, or the folder cannot be read.
        TrustError: ``slots.json`` is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._state()

    @classmethod
    def install(cls, folder: Path, content: bytes, *, sequence: int, sidecar: str | None = None) -> Slots:
        """Put the first model in place. Where one is installed already, that one stays.

        Args:
            folder: where the slots lie.
            content: the file.
            sequence: its number, 0 for one that was never released.
            sidecar: digest of the sidecar that belongs to it.

        Raises:
            ConfigError: the folder cannot be written.
            TrustError: what is installed is damaged.
        """
        if not (folder / RECORD).exists():
            with _disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                disk.write(_path(folder, "a"), content)
                digest = hashlib.sha256(content).hexdigest()
                first = Content(sha256=digest, sequence=sequence, sidecar=sidecar)
                disk.write(
                    folder / RECORD,
                    msgspec.json.encode(State(active="a", previous=None, confirmed=True, a=first, highest=sequence)),
                )
            LOG.info("installed the first model, sequence %d", sequence)
        return cls(folder)

    @property
    def confirmed(self) -> bool:
        """True once the active model was confirmed, or is the first one."""
        return self._state().confirmed

    @property
    def highest(self) -> int:
        """Sequence of the newest release that ever proved itself here."""
        return self._state().highest

    @property
    def failed(self) -> tuple[str, ...]:
        """SHA-256 of the files that failed their trial last."""
        return self._state().failed

    @property
    def digest(self) -> str:
        """SHA-256 of the model that runs, or shall from the next start on. The file is not looked at."""
        state = self._state()
        return _known(state, state.active).sha256

    def active(self) -> Slot:
        """The slot that runs. Raises TrustError if its file is not what was put there."""
        return self._verified(self._state().active)

    def previous(self) -> Slot | None:
        """The slot that ``revert`` goes back to, if any. Raises TrustError if its file is damaged."""
        name = self._state().previous
        return None if name is None else self._verified(name)

    def survey(self) -> tuple[Held, ...]:
        """What each slot holds, the one that runs first. Every file is read.

        Raises PermissionError where one may not be read.
        """
        state = self._state()
        found = [self._held(state, name, content) for name in NAMES if (content := state.content(name)) is not None]
        return tuple(sorted(found, key=lambda one: ("runs", "way back", "left").index(one.place)))

    def _held(self, state: State, name: Name, content: Content) -> Held:
        place: Literal["runs", "way back", "left"] = "left"
        proof: Literal["confirmed", "on trial", "failed", "not proved"] = "not proved"
        if name == state.active:
            place, proof = "runs", "confirmed" if state.confirmed else "on trial"
        elif name == state.previous:
            place, proof = "way back", "confirmed" if state.previous_confirmed else "not proved"
        elif content.sha256 in state.failed:
            proof = "failed"
        try:
            self._verified(name)
            holds = True
        except TrustError as error:
            if isinstance(error.__cause__, PermissionError):
                raise error.__cause__ from None  # nothing was looked at
            holds = False
        return Held(
            name=name,
            sequence=content.sequence,
            sha256=content.sha256,
            place=place,
            proof=proof,
            holds=holds,
            local=content.local is not None,
        )

    def holding(self, sha256: str) -> Slot:
        """The slot with this file: mostly the active one, but for a rename that the disk did not confirm.

        Raises TrustError if none holds it.
        """
        state = self._state()
        # One file may lie in two: released again, the newer one runs, and the older is the way back.
        for name in dict.fromkeys((state.active, *NAMES)):
            content = state.content(name)
            if content is not None and content.sha256 == sha256:
                return self._verified(name)
        raise TrustError(f"model slots {self._folder}", got="no slot with the model that runs", expected=sha256)

    def load(self) -> bytes:
        """The verified content of the active slot. Raises TrustError if it is damaged."""
        slot = self.active()
        return self.read(slot)

    def read(self, slot: Slot) -> bytes:
        """The content of a slot, compared again. Raises TrustError if it is not what ``slot`` says any more."""
        content = _read(slot.path, Path.read_bytes)
        _check(f"model slot {slot.path}", hashlib.sha256(content).hexdigest(), slot.sha256)
        return content

    def stage(
        self, path: Path, *, sha256: str, sequence: int, sidecar: str | None = None, anchor: str | None = None
    ) -> Slot:
        """Copy a model file into the inactive slot. What runs is not touched.

        Args:
            path: the file; the bytes that are hashed are the bytes that are written.
            sha256: hex digest that its signer vouched for.
            sequence: its number, higher than that of the active model.
            sidecar: digest of its sidecar, which :meth:`keep` put here before; None where it has none.
            anchor: as in :class:`Content`.

        Raises:
            TrustError: another digest, not new enough, or one that failed. The slots stay as they were.
            ConfigError: the file cannot be read or the slot not written, as on a full disk.
        """
        state = self._stageable()
        after = staged(state, Content(sha256=sha256, sequence=sequence, sidecar=sidecar, anchor=anchor))
        # In blocks: the daemon has no room for a second copy of a model.
        with _disk_errors(path), path.open("rb") as source:
            digest = hashlib.sha256()
            return self._put(
                _hashed(source, digest),
                state,
                after,
                check=lambda: _check(f"model to stage {path}", digest.hexdigest(), sha256),
            )

    def stage_local(
        self,
        content: bytes,
        *,
        made_of: Slot,
        guard_digest: str,
        sidecar: str | None = None,
        anchor: str | None = None,
    ) -> Slot:
        """Put a re-calibrated copy of the active model into the inactive slot, under the same sequence.

        Args:
            content: the file; the caller checked that it is the same model with another guard.
            made_of: the active slot, as :meth:`active` returned it when the re-calibration began.
            guard_digest: of the new guard, in hex.
            sidecar: digest of its sidecar, as for :meth:`stage`.
            anchor: as in :class:`Content`.

        Raises:
            TrustError: another model runs by now, or the device's key is damaged. The slots stay as they were.
            ConfigError: the slot or the key cannot be written, or the active model is on trial.
        """
        state = self._stageable()
        digest = hashlib.sha256(content).hexdigest()
        new = Content(sha256=digest, sequence=made_of.sequence, sidecar=sidecar, anchor=anchor)
        local = Local(parent=made_of.parent or made_of.sha256, guard_digest=guard_digest)
        local = msgspec.structs.replace(local, mac=mac_of(new, local, self._made_key()))
        new = msgspec.structs.replace(new, local=local)
        return self._put([content], state, recalibrated(state, new, made_of=made_of.sha256))

    def activate(self, slot: Slot) -> None:
        """Let a staged slot run from now on, by one atomic rename.

        Raises:
            TrustError: the slot's file or record is no longer what ``slot`` says; what runs keeps running.
            ConfigError: the record cannot be written.
        """
        if self._verified(slot.name) != slot:
            raise TrustError(f"model slot {slot.name}", got="another model than was staged", do="stage it again")
        with _disk_errors(self._folder):
            self._write(activated(self._state(), slot.name))

    def revert(self, reason: str, *, has_failed: bool = False) -> Slot:
        """Go back to the previous model, after checking that it is whole.

        Args:
            reason: for the log.
            has_failed: the model that is left failed its trial, and must not come back.

        Raises:
            ConfigError: there is no previous model, or the record cannot be written.
            TrustError: the previous model is damaged; nothing changes.
        """
        after = reverted(self._state(), has_failed=has_failed)
        slot = self._verified(after.active)
        with _disk_errors(self._folder):
            self._write(after)
        LOG.warning("went back to the model of sequence %d: %s", slot.sequence, reason)
        return slot

    def confirm(self) -> None:
        """Remember that the active model proved itself. Raises ConfigError if that cannot be written."""
        state = self._state()
        if not state.confirmed:
            with _disk_errors(self._folder):
                self._write(confirmed(state))

    def sidecar(self, digest: str) -> Path:
        """Where the sidecar of this digest lies, if it does. Its reader verifies it."""
        return self._folder / f"{digest}{SIDECAR}"

    def keep(self, content: bytes) -> str:
        """Put a sidecar here before the model that it belongs to; its digest. Raises ConfigError if it cannot be."""
        digest = hashlib.sha256(content).hexdigest()
        with _disk_errors(self._folder):
            disk.write(self.sidecar(digest), content)
        return digest

    def tidy(self, *, also: Collection[str] = ()) -> None:
        """Remove what no record names: sidecars, files of emptied slots, and what a killed process left unfinished.

        Args:
            also: digests of sidecars that stay, as those of a slot that an earlier version recorded.
        """
        state = self._state()
        stay = {f"{digest}{SIDECAR}" for digest in also}
        for name in NAMES:
            if (content := state.content(name)) is not None:
                stay |= {_path(self._folder, name).name, f"{content.sidecar}{SIDECAR}", f"{content.anchor}{SIDECAR}"}
        with _disk_errors(self._folder):
            for path in self._folder.iterdir():
                is_ours = path.name.endswith((SIDECAR, ".tflite", ".tmp"))
                if is_ours and path.name not in stay:
                    path.unlink(missing_ok=True)

    def _put(
        self, content: Iterable[bytes], state: State, after: State, *, check: Callable[[], None] = lambda: None
    ) -> Slot:
        """Write the inactive slot; ``after`` is what its record says then. ``check`` may refuse what was written."""

        def empty() -> None:
            check()
            self._write(emptied(state))

        with _disk_errors(self._folder):
            disk.write(_path(self._folder, state.inactive), content, before=empty)
            self._write(after)
        return self._verified(state.inactive)

    def _stageable(self) -> State:
        """The record as it is when a model is staged: a damaged way back is none."""
        state = self._state()
        try:
            if state.way_back is not None:
                self._verified(state.way_back)
        except TrustError:
            return msgspec.structs.replace(state, previous=None)
        return state

    def _made_key(self) -> bytes:
        """The device's own key, made where there is none."""
        path = self._folder / KEY
        with _disk_errors(path):
            if not path.exists():
                disk.write(path, secrets.token_bytes(_KEY_BYTES), mode=0o600)
        return _read_key(path)

    def _state(self) -> State:
        path = self._folder / RECORD
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise ConfigError(f"model slots {self._folder}", got="no model installed", do="install one first") from None
        except OSError as error:
            raise ConfigError(f"model slots {path}", got=error.strerror, expected="a readable file") from error
        try:
            return msgspec.json.decode(content, type=State)
        except (msgspec.DecodeError, RecursionError) as error:
            raise TrustError(
                f"model slots {path}",
                got=str(error)[:200],
                expected="the record that this device wrote",
                do="remove the folder to install the first model again",
            ) from error

    def _write(self, state: State) -> None:
        disk.write(self._folder / RECORD, msgspec.json.encode(state))

    def _verified(self, name: Name) -> Slot:
        known = _known(self._state(), name)
        path = _path(self._folder, name)
        _check(f"model slot {path}", _read(path, _digest), known.sha256)
        local = known.local
        if local is not None:
            _check_mac(f"model slot {path}", known, local, _read_key(self._folder / KEY))
        parent = None if local is None else local.parent
        return Slot(
            name=name, path=path, sha256=known.sha256, sequence=known.sequence, parent=parent, anchor=known.anchor
        )


def _path(folder: Path, name: Name) -> Path:
    return folder / f"slot-{name}.tflite"


def _read_key(path: Path) -> bytes:
    try:
        key = path.read_bytes()
    except OSError as error:
        raise TrustError(f"key {path}", got=error.strerror, expected="the key that this device made") from error
    if len(key) != _KEY_BYTES:
        raise TrustError(
            f"key {path}", got=f"{len(key)} bytes", expected=_KEY_BYTES, do="remove it, and calibrate again"
        )
    return key


def _hashed(source: IO[bytes], digest: Any) -> Iterator[bytes]:
    while block := source.read(_BLOCK):
        digest.update(block)
        yield block


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for _ in _hashed(file, digest):
            pass
    return digest.hexdigest()


def _read(path: Path, read: Callable[[Path], T]) -> T:
    """Read a slot's file, twice where the disk refuses: an error that passes must not cost a model its place.

    Raises TrustError where it cannot be read.
    """
    try:
        return read(path)
    except OSError:
        try:
            return read(path)
        except OSError as error:
            raise TrustError(f"model slot {path}", got=error.strerror, expected="the model put there") from error


def _check(what: str, found: str, sha256: str) -> None:
    if found != sha256:
        raise TrustError(what, got=f"SHA-256 {found}", expected=sha256, do="fetch the model again")


def _check_mac(what: str, content: Content, local: Local, key: bytes) -> None:
    if not hmac.compare_digest(mac_of(content, local, key).encode(), local.mac.encode()):
        raise TrustError(
            what, got="a record of a re-calibration that this device did not write", do="re-calibrate again"
        )


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"model slots {path}",
            got=error.strerror or str(error),
            do="check the disk's space and the folder's owner",
        ) from error
