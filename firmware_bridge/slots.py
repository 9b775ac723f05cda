"""Two model slots and one pointer: a device has a complete, verified model whenever the power fails.

A folder holds ``slot-a.tflite``, ``slot-b.tflite`` and ``slots.json``, which says what lies in each slot and
which one runs. Rules enforced here:

* a file appears whole or not at all: write beside it, fsync, rename, fsync the folder;
* ``slots.json`` never vouches for bytes that may not be there: the record of a slot is dropped before its
  file is replaced, and written after the new file is safe on disk;
* the slot that runs is never written to; one rename of ``slots.json`` moves the pointer;
* content is handed out only after its SHA-256 was compared with the record: damage is an error, not a model;
* a staged model must be newer than the active one, by its sequence number; only one that this device
  re-calibrated itself has the number of the active one, which it was made of;
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
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgeguard.errors import ConfigError, TrustError

RECORD = "slots.json"
KEY = "local.key"
_KEY_BYTES = 32
LOG = logging.getLogger(__name__)

Name = Literal["a", "b"]


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
    """What a slot is known to hold; ``local`` where this device made it."""

    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    sequence: Annotated[int, Meta(ge=0, le=2**53)]
    local: Local | None = None


class State(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``slots.json``: ``previous``: where ``revert`` goes; ``confirmed``: the active model proved itself."""

    active: Name
    previous: Name | None
    confirmed: bool
    a: Content | None = None
    b: Content | None = None

    def content(self, name: Name) -> Content | None:
        """What slot ``name`` is known to hold, None when nothing is."""
        return self.a if name == "a" else self.b

    @property
    def inactive(self) -> Name:
        """The slot that may be written to."""
        return "b" if self.active == "a" else "a"


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One slot whose file was verified against the record. ``parent`` as in :class:`Local`, None for a release."""

    name: Name
    path: Path
    sha256: str
    sequence: int
    parent: str | None = None


def emptied(state: State) -> State:
    """The inactive slot is about to be overwritten: nothing is known of it, and no way leads back to it."""
    return _with(state, state.inactive, None, previous=None)


def staged(state: State, content: Content) -> State:
    """The inactive slot holds ``content``. Raises TrustError unless it is newer than the active one."""
    active = _known(state, state.active)
    if content.sequence <= active.sequence:
        raise TrustError(
            "model to stage",
            got=f"sequence {content.sequence}",
            expected=f"more than {active.sequence}, which runs",
            do="release the model again under a new sequence",
        )
    return _with(state, state.inactive, content, previous=None)


def recalibrated(state: State, content: Content, *, made_of: str) -> State:
    """The inactive slot holds ``content``, made here of the file with the digest ``made_of``.

    Raises TrustError unless that one still runs, and under the same sequence.
    """
    active = _known(state, state.active)
    if (active.sha256, active.sequence) != (made_of, content.sequence):
        raise TrustError("re-calibrated model", got="one made of another model than runs now", do="re-calibrate again")
    return _with(state, state.inactive, content, previous=None)


def mac_of(content: Content, local: Local, key: bytes) -> str:
    """What authenticates the record of a file that this device made itself, in hex."""
    fields = ("edgeguard local model", content.sha256, content.sequence, local.parent, local.guard_digest)
    return hmac.digest(key, msgspec.json.encode(fields), "sha256").hex()


def activated(state: State, name: Name) -> State:
    """Slot ``name`` runs from now on, and is not confirmed yet."""
    if name == state.active:
        return state
    _known(state, name)
    return msgspec.structs.replace(state, active=name, previous=state.active, confirmed=False)


def reverted(state: State) -> State:
    """The previous slot runs again. There is no way forward to the one left behind but to stage it anew."""
    if state.previous is None:
        raise ConfigError("model slots", got="no previous model to go back to", do="release a repaired model")
    _known(state, state.previous)
    return msgspec.structs.replace(state, active=state.previous, previous=None, confirmed=True)


def confirmed(state: State) -> State:
    """The active model proved itself. The previous one stays until the next is staged."""
    return msgspec.structs.replace(state, confirmed=True)


def _with(state: State, name: Name, content: Content | None, *, previous: Name | None) -> State:
    if name == "a":
        return msgspec.structs.replace(state, a=content, previous=previous)
    return msgspec.structs.replace(state, b=content, previous=previous)


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
    def install(cls, folder: Path, content: bytes, *, sequence: int) -> Slots:
        """Put the first model in place. Where one is installed already, that one stays.

        Raises:
            ConfigError: the folder cannot be written.
            TrustError: what is installed is damaged.
        """
        if not (folder / RECORD).exists():
            with _disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(_path(folder, "a"), content)
                first = Content(sha256=hashlib.sha256(content).hexdigest(), sequence=sequence)
                write_whole(
                    folder / RECORD,
                    msgspec.json.encode(State(active="a", previous=None, confirmed=True, a=first)),
                )
            LOG.info("installed the first model, sequence %d", sequence)
        return cls(folder)

    @property
    def confirmed(self) -> bool:
        """True once the active model was confirmed, or is the first one."""
        return self._state().confirmed

    def active(self) -> Slot:
        """The slot that runs. Raises TrustError if its file is not what was put there."""
        return self._verified(self._state().active)[0]

    def previous(self) -> Slot | None:
        """The slot that ``revert`` goes back to, if any. Raises TrustError if its file is damaged."""
        name = self._state().previous
        return None if name is None else self._verified(name)[0]

    def load(self) -> bytes:
        """The verified content of the active slot. Raises TrustError if it is damaged."""
        return self._verified(self._state().active)[1]

    def stage(self, path: Path, *, sha256: str, sequence: int) -> Slot:
        """Copy a model file into the inactive slot. What runs is not touched.

        Args:
            path: the file; the bytes that are hashed are the bytes that are written.
            sha256: hex digest that its signer vouched for.
            sequence: its number, higher than that of the active model.

        Raises:
            TrustError: another digest, or not newer than the active model. The slots stay as they were.
            ConfigError: the file cannot be read or the slot not written, as on a full disk.
        """
        state = self._state()
        after = staged(state, Content(sha256=sha256, sequence=sequence))
        with _disk_errors(path):
            content = path.read_bytes()
        _check(f"model to stage {path}", content, sha256)
        return self._put(content, state, after)

    def stage_local(self, content: bytes, *, made_of: Slot, guard_digest: str) -> Slot:
        """Put a re-calibrated copy of the active model into the inactive slot, under the same sequence.

        Args:
            content: the file; the caller checked that it is the same model with another guard.
            made_of: the active slot, as :meth:`active` returned it when the re-calibration began.
            guard_digest: of the new guard, in hex.

        Raises:
            TrustError: another model runs by now, or the device's key is damaged. The slots stay as they were.
            ConfigError: the slot or the key cannot be written.
        """
        state = self._state()
        new = Content(sha256=hashlib.sha256(content).hexdigest(), sequence=made_of.sequence)
        local = Local(parent=made_of.parent or made_of.sha256, guard_digest=guard_digest)
        local = msgspec.structs.replace(local, mac=mac_of(new, local, self._made_key()))
        new = msgspec.structs.replace(new, local=local)
        return self._put(content, state, recalibrated(state, new, made_of=made_of.sha256))

    def activate(self, slot: Slot) -> None:
        """Let a staged slot run from now on, by one atomic rename.

        Raises:
            TrustError: the slot's file or record is no longer what ``slot`` says; what runs keeps running.
            ConfigError: the record cannot be written.
        """
        if self._verified(slot.name)[0] != slot:
            raise TrustError(f"model slot {slot.name}", got="another model than was staged", do="stage it again")
        with _disk_errors(self._folder):
            self._write(activated(self._state(), slot.name))

    def revert(self, reason: str) -> Slot:
        """Go back to the previous model, after checking that it is whole.

        Raises:
            ConfigError: there is no previous model, or the record cannot be written.
            TrustError: the previous model is damaged; nothing changes.
        """
        after = reverted(self._state())
        slot = self._verified(after.active)[0]
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

    def _put(self, content: bytes, state: State, after: State) -> Slot:
        """Write the inactive slot; ``after`` is what its record says then."""
        with _disk_errors(self._folder):
            target = _path(self._folder, state.inactive)
            write_whole(target, content, before=lambda: self._write(emptied(state)))
            self._write(after)
        return self._verified(state.inactive)[0]

    def _made_key(self) -> bytes:
        """The device's own key, made where there is none."""
        path = self._folder / KEY
        with _disk_errors(path):
            if not path.exists():
                write_whole(path, secrets.token_bytes(_KEY_BYTES), mode=0o600)
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
        write_whole(self._folder / RECORD, msgspec.json.encode(state))

    def _verified(self, name: Name) -> tuple[Slot, bytes]:
        known = _known(self._state(), name)
        path = _path(self._folder, name)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise TrustError(f"model slot {path}", got=error.strerror, expected="the model put there") from error
        _check(f"model slot {path}", content, known.sha256)
        local = known.local
        if local is not None:
            _check_mac(f"model slot {path}", known, local, _read_key(self._folder / KEY))
        parent = None if local is None else local.parent
        return Slot(name=name, path=path, sha256=known.sha256, sequence=known.sequence, parent=parent), content


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


def _check(what: str, content: bytes, sha256: str) -> None:
    found = hashlib.sha256(content).hexdigest()
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


def write_whole(path: Path, content: bytes, *, before: Callable[[], None] = lambda: None, mode: int = 0o666) -> None:
    """Write ``content`` beside ``path``; once it is safe on disk call ``before``, then rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        before()
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
