"""Flagged inputs, kept in a local folder for their owner to look at. Nothing here is ever sent anywhere.

Rules enforced here:

* the folder is bounded in bytes, in count and in age; the oldest leave first, by the order in which they came;
* an input appears whole or not at all where the process is killed: write beside it, rename. After a power cut the last
  ones may be missing or cut short, which :func:`read` says: a flush to disk would hold up the inference loop;
* only the owner can read them: files have mode 0600, and a folder that others may enter is refused;
* names come from a counter and the clock, never from a message; other files in the folder are left alone;
* what fails after the start, as on a full disk or in a folder that vanished, is counted, and one line in the log per
  row of failures: never an exception in the inference loop. A folder that vanished is not made again: what was mounted
  there may come back;
* a file that is read is hostile: sizes are checked before anything is unpacked, and nothing is unpickled.

Age goes by the wall clock. What is dated ahead of it, as by a board whose clock was set back, stays until its time
comes, within the other two bounds.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import stat
import struct
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from edgeguard.contract.messages import Digest, Label, Milliseconds, Text
from edgeguard.errors import ConfigError, ModelError

Array = npt.NDArray[Any]

MAX_FILE = (64 << 20) + (64 << 10)
"""Bytes of the largest file that is kept or read: the largest input that programs can send, and what goes with it."""

_NAME = re.compile(r"([0-9]{1,18})-([0-9]{1,16})\.npz")
_TEMPORARY = re.compile(rf"\.{_NAME.pattern}\.tmp")
_INPUT, _ABOUT = "input.npy", "about.json"
_INPUT_TYPES = ("uint8", "int8", "int16", "float32")
_END = struct.Struct("<4s4H2LH")  # end of central directory, APPNOTE.TXT 4.3.16
_END_MARK, _ZIP64_MARK, _ZIP64_SIZE = b"PK\x05\x06", b"PK\x06\x07", 20
_MAX_DIRECTORY = 512

# NumPy documents these functions but gives them no types.
_npy: Any = np.lib.format

log = logging.getLogger(__name__)


class About(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a kept input. Scores are each over its threshold; one that is not a number is None."""

    v: Literal[1] = 1
    at_ms: Milliseconds
    predicted: Label | None
    scores: Annotated[dict[Text, float | None], Meta(max_length=64)]
    p_value: Annotated[float, Meta(ge=0, le=1)] | None
    model_digest: Digest
    guard_digest: Digest


@dataclass(frozen=True)
class _Kept:
    size: int
    at_ms: int


class Quarantine:
    """The folder of one agent process. Takes stock of what is there, and deletes what was half written.

    Args:
        folder: made when missing.
        max_bytes: bound on the sum of the files.
        max_count: bound on their number.
        max_age_s: bound on their age.
        clock: seconds since 1970.

    Raises:
        ConfigError: a bound below 1, or a folder that cannot be used or that others may enter.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_bytes: int,
        max_count: int,
        max_age_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not (max_bytes >= 1 and max_count >= 1 and max_age_s >= 1):
            raise ConfigError(
                f"quarantine {folder}",
                got=f"bounds of {max_bytes} bytes, {max_count} inputs, {max_age_s:g} s",
                expected="1 or more each",
            )
        self._folder = folder
        self._max_bytes, self._max_count, self._max_age_s = max_bytes, max_count, max_age_s
        self._clock = clock
        self._failing = False
        self.failures = 0
        """How often something could not be kept or deleted."""
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._require_private()
            self._stock = _stock(folder)
            self.total_bytes = sum(kept.size for kept in self._stock.values())
            """Sum of the files kept."""
            self._make_room(size=0, files=0)
        except OSError as error:
            raise ConfigError(
                f"quarantine {folder}",
                got=error.strerror,
                expected="a folder that can be read and written",
                do="check its path and its owner",
            ) from error
        self._next = 1 + max((_order(name) for name in self._stock), default=0)

    @property
    def count(self) -> int:
        """How many inputs are kept."""
        return len(self._stock)

    def put(self, x: Array, about: About) -> bool:
        """Keep one flagged input, in the owner's own type, no batch axis; False where that failed."""
        content = _encode(x, about)
        most = min(self._max_bytes, MAX_FILE)
        if len(content) > most:
            return self._failed(f"an input takes {len(content)} bytes, at most {most} may be kept")
        try:
            self._make_room(size=len(content), files=1)
            self._write(content)
        except OSError as error:
            return self._failed(error.strerror)
        self._failing = False
        return True

    def tidy(self) -> None:
        """Let go of what is too old; to be called now and then, for when no input comes. Failures are as in put."""
        try:
            self._make_room(size=0, files=0)
        except OSError as error:
            self._failed(error.strerror)

    def _failed(self, reason: str | None) -> Literal[False]:
        self.failures += 1
        if not self._failing:
            log.warning("quarantine %s failed (%d so far): %s", self._folder, self.failures, reason)
        self._failing = True
        return False

    def _make_room(self, *, size: int, files: int) -> None:
        oldest_ms = (self._clock() - self._max_age_s) * 1000
        for name in [name for name, kept in self._stock.items() if kept.at_ms < oldest_ms]:
            self._remove(name)
        while self._stock and (self.count + files > self._max_count or self.total_bytes + size > self._max_bytes):
            self._remove(next(iter(self._stock)))

    def _remove(self, name: str) -> None:
        # The owner may have taken it away.
        (self._folder / name).unlink(missing_ok=True)
        self.total_bytes -= self._stock.pop(name).size

    def _write(self, content: bytes) -> None:
        at_ms = max(0, int(self._clock() * 1000))
        name = f"{self._next:010d}-{at_ms}.npz"
        self._next += 1
        temporary = self._folder / f".{name}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(temporary, flags, 0o600), "wb") as file:
                file.write(content)
            temporary.replace(self._folder / name)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        self._stock[name] = _Kept(len(content), at_ms)
        self.total_bytes += len(content)

    def _require_private(self) -> None:
        mode = stat.S_IMODE(self._folder.stat().st_mode)
        if mode & 0o077:
            raise ConfigError(
                f"quarantine {self._folder}",
                got=f"a folder of mode {mode:04o}",
                expected="0700: nobody else may look at the inputs",
                do="change its mode, or name one that is not there yet",
            )


def read(path: Path) -> tuple[Array, About]:
    """A kept input, in its owner's own type, and what is known of it. The array is read-only.

    Raises:
        ConfigError: the file cannot be read.
        ModelError: it is not one that :meth:`Quarantine.put` wrote, or it was cut short.
    """
    what = f"quarantined input {path}"
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            content = file.read(min(status.st_size, MAX_FILE + 1)) if stat.S_ISREG(status.st_mode) else b""
    except OSError as error:
        raise ConfigError(what, got=error.strerror, expected="a file that can be read") from error
    try:
        return _decode(content)
    except Exception as error:  # hostile bytes make zipfile, NumPy and the JSON parser raise whatever they like
        raise ModelError(
            what,
            got=str(error)[:200] or type(error).__name__,
            expected="an input as the agent kept it",
            do="delete the file",
        ) from error


def _stock(folder: Path) -> dict[str, _Kept]:
    """What a folder holds, in the order in which it came. Half-written files are deleted."""
    found: dict[str, _Kept] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_file(follow_symlinks=False):
                continue
            if _TEMPORARY.fullmatch(entry.name):
                Path(entry.path).unlink()
            elif name := _NAME.fullmatch(entry.name):
                found[entry.name] = _Kept(entry.stat(follow_symlinks=False).st_size, int(name[2]))
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def _order(name: str) -> int:
    return int(name.partition("-")[0])


def _encode(x: Array, about: About) -> bytes:
    array = io.BytesIO()
    little = np.asarray(x, dtype=x.dtype.newbyteorder("<"), order="C")
    _npy.write_array(array, little, version=(1, 0), allow_pickle=False)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_INPUT, array.getvalue())
        archive.writestr(_ABOUT, msgspec.json.encode(about))
    return stream.getvalue()


def _decode(content: bytes) -> tuple[Array, About]:
    """Raises anything on hostile content, but never takes much more memory than its length."""
    if len(content) > MAX_FILE:
        raise ValueError(f"more than {MAX_FILE} bytes")
    end, before = content[-_END.size :], content[-_END.size - _ZIP64_SIZE : -_END.size]
    if len(end) < _END.size or not end.startswith(_END_MARK):
        raise ValueError("no archive, or one cut short")
    # zipfile makes an object for each entry of the directory before anybody can count them.
    if _END.unpack(end)[5] > _MAX_DIRECTORY or before.startswith(_ZIP64_MARK):
        raise ValueError("an archive of other members")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = archive.infolist()
        if sorted(member.filename for member in members) != [_ABOUT, _INPUT]:
            raise ValueError("an archive of other members")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("a compressed member")
        return _array(archive.read(_INPUT)), msgspec.json.decode(archive.read(_ABOUT), type=About)


def _array(raw: bytes) -> Array:
    stream = io.BytesIO(raw)
    if _npy.read_magic(stream) != (1, 0):
        raise ValueError("an array file of another version than 1.0")
    shape, fortran, dtype = _npy.read_array_header_1_0(stream)
    if dtype not in [np.dtype(name).newbyteorder("<") for name in _INPUT_TYPES] or fortran or min(shape, default=1) < 1:
        raise ValueError(f"an array {dtype}{list(shape)}")
    found = np.frombuffer(raw, dtype, offset=stream.tell()).reshape(shape)
    if not np.isfinite(found).all():
        raise ValueError("NaN or infinite values")
    return found
