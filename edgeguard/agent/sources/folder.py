"""Inputs from a folder: batches in ``*.npy`` files and images, each taken once, in the order of their names.

Rules enforced here:

* a file is dropped in by renaming and its name is never used again; hidden and other names are ignored;
* a file stays in the folder until :meth:`FolderSource.counted`, which the agent calls only after the report
  that counts it is on disk: a killed agent finds it again. Then it is deleted, or moved to ``done/``;
* a file that is not a batch of this model's inputs, or no image, goes to ``rejected/`` with one line in the log; a
  batch's header is checked before its content is read, and nothing in it is ever unpickled;
* the folder is watched with inotify(7) and looked through now and then, in case it was exchanged; one that vanishes is
  waited for.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import math
import os
import selectors
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from edgeguard import disk
from edgeguard.agent.sources.base import Answer, Item, Refused
from edgeguard.contract.guard import ModelInput
from edgeguard.detection import images
from edgeguard.errors import ConfigError

NAME = "folder"
END_MARKER = "end"
REJECTED = "rejected"
DONE = "done"
IMAGES = (".jpg", ".jpeg", ".png")
MAX_FILE_BYTES = 256 << 20
RESCAN_S = 1.0
"""How often the folder is looked through although nothing was said to have come."""
UNCOUNTED = 4096
"""Files that may wait for their report; beyond this no more are taken."""

_MOVED_TO, _CLOSE_WRITE = 0x80, 0x08  # inotify(7)

# NumPy documents these functions but gives them no types.
numpy_format: Any = np.lib.format
_READ_HEADER = {(1, 0): numpy_format.read_array_header_1_0, (2, 0): numpy_format.read_array_header_2_0}

log = logging.getLogger(__name__)


class FolderSource:
    """Takes inputs out of a folder.

    Args:
        folder: it must exist and be writable.
        expected: what the model takes; batches of another shape or type are rejected, images are brought to it.
        keep: files are moved to ``done/`` once they are counted, not deleted.
        clock: seconds of any steady clock.

    Raises:
        ConfigError: the folder is missing or not writable.
    """

    name = NAME

    def __init__(
        self, folder: Path, expected: ModelInput, *, keep: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(
                f"source folder {folder}",
                got="no writable folder",
                expected="a folder of .npy files or images",
                do="create it",
            )
        self._folder = folder
        self._expected = expected
        self._dtype = np.dtype(expected.dtype)
        self._keep = keep
        self._clock = clock
        self._place = _place(folder)
        self._taken: set[str] = set()
        self._stuck: set[str] = set()
        """Refused files that cannot be moved away."""
        self._listed: Iterator[str] = iter(())
        self._look_at = -math.inf
        self._missing = False
        self._watch: Watch | None = None
        self._selector: selectors.BaseSelector | None = None
        self.dropped = 0
        self.ended = False
        """True once the end marker is there and every file was taken."""

    def open(self, selector: selectors.BaseSelector) -> None:
        """See :class:`edgeguard.agent.sources.base.Source`. Without inotify the folder is looked through instead."""
        self._selector = selector
        with contextlib.suppress(OSError):
            self._watch = Watch(self._folder)
            selector.register(self._watch.descriptor, selectors.EVENT_READ, self)

    def ready(self, key: selectors.SelectorKey, mask: int) -> None:
        """See :class:`edgeguard.agent.sources.base.Source`."""
        if self._watch is not None:
            self._watch.drain()
        self._look_at = -math.inf

    def take(self) -> Item | Refused | None:
        """See :class:`edgeguard.agent.sources.base.Source`."""
        if len(self._taken) >= UNCOUNTED:
            return None
        while True:
            for name in self._listed:
                item = self._open(name)
                if item:
                    return item
            now = self._clock()
            if now < self._look_at:
                return None
            # The marker is looked at first: what was dropped in before it is in the listing.
            marked = os.path.exists(self._folder / END_MARKER)  # noqa: PTH110  (Path.exists raises on a stale mount)
            names = self._list()
            self._listed = iter(names)
            if not names:
                self.ended = marked
                self._look_at = now + RESCAN_S
                return None

    def answer(self, answer: Answer) -> None:
        """Nobody waits: results of a folder stand in ``[results]``."""

    def counted(self, names: Iterable[str]) -> None:
        """Delete or move files that were counted; a missing one is fine. Returns when that is on disk.

        Raises:
            ConfigError: the folder refuses it.
        """
        names = list(names)
        try:
            self._require_place()
            if self._keep:
                (self._folder / DONE).mkdir(exist_ok=True)
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    if self._keep:
                        (self._folder / name).replace(self._folder / DONE / name)
                    else:
                        (self._folder / name).unlink()
            disk.sync(self._folder)
            self._taken.difference_update(names)
        except OSError as error:
            raise ConfigError(
                f"source folder {self._folder}", got=error.strerror, expected="a folder to delete from"
            ) from error

    def _require_place(self) -> None:
        """Raise OSError where this is an empty mount point: its files would be counted again once it is mounted."""
        if _place(self._folder) != self._place:
            raise OSError(errno.ESTALE, "another folder than the one that its files were taken from")

    def close(self) -> None:
        """See :class:`edgeguard.agent.sources.base.Source`."""
        if self._watch is not None:
            if self._selector is not None:
                self._selector.unregister(self._watch.descriptor)
            self._watch.close()
            self._watch = None

    def _list(self) -> list[str]:
        try:
            with os.scandir(self._folder) as entries:
                names = [e.name for e in entries if _is_input(e.name)]
        except OSError as error:
            if not self._missing:
                log.warning("source folder %s: %s; waiting for it", self._folder, error.strerror)
            self._missing = True
            return []
        if self._missing:
            self._missing = False
            log.info("source folder %s is there again", self._folder)
            self._rewatch()
        return sorted(name for name in names if name not in self._taken and name not in self._stuck)

    def _rewatch(self) -> None:
        """The folder is another one now: watch that."""
        if self._selector is not None:
            selector = self._selector
            self.close()
            self.open(selector)

    def _open(self, name: str) -> Item | Refused | None:
        try:
            name.encode()  # a name that is no text cannot be told to anybody
            path = self._folder / name
            if name.lower().endswith(IMAGES):
                inputs = images.decode(read_file(path), self._expected)[np.newaxis]
            else:
                inputs = read_batch(path, shape=self._expected.shape, dtype=self._dtype)
        except FileNotFoundError:
            return None
        except Exception as error:
            # NumPy's header parser raises whatever a hostile header provokes; no file may stop the agent.
            self._reject(name, " ".join(str(error).split())[:300])
            return Refused.NO_INPUT
        self._taken.add(name)
        return Item(source=NAME, name=name, inputs=inputs)

    def _reject(self, name: str, reason: str) -> None:
        self.dropped += 1
        log.warning("input file %r rejected (%d so far): %s", name, self.dropped, reason)
        try:
            (self._folder / REJECTED).mkdir(exist_ok=True)
            (self._folder / name).replace(self._folder / REJECTED / name)
        except OSError as error:
            self._stuck.add(name)
            log.warning("input file %r cannot be moved to %s/, ignored: %s", name, REJECTED, error.strerror)


class Watch:
    """Tells when a file was moved into a folder, or one in it was written and closed: inotify(7), by ``ctypes``.

    Raises:
        OSError: there is no inotify, or too many watches.
    """

    def __init__(self, folder: Path) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        try:
            start, add = libc.inotify_init1, libc.inotify_add_watch
        except AttributeError as error:
            raise OSError(errno.ENOSYS, "no inotify") from error
        self.descriptor = int(start(os.O_NONBLOCK | os.O_CLOEXEC))
        if self.descriptor < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        if add(self.descriptor, os.fsencode(folder), _MOVED_TO | _CLOSE_WRITE) < 0:
            number = ctypes.get_errno()
            self.close()
            raise OSError(number, os.strerror(number))

    def drain(self) -> None:
        """Forget what was told."""
        with contextlib.suppress(BlockingIOError):
            while os.read(self.descriptor, 64 << 10):
                pass

    def close(self) -> None:
        """Stop watching."""
        os.close(self.descriptor)


def _place(folder: Path) -> tuple[int, int]:
    """Which folder this is, whatever is mounted there."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_input(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith((".npy", *IMAGES))


def read_file(path: Path) -> bytes:
    """The content of a regular file of bounded size.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a regular file, or too large.
    """
    with _opened(path) as (file, _):
        return file.read()


def read_batch(path: Path, *, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Read one batch ``[n, *shape]``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a regular .npy file, too large, cut short, empty, or of another shape or type.
    """
    with _opened(path) as (file, length):
        version = numpy_format.read_magic(file)
        if version not in _READ_HEADER:
            raise ValueError(f".npy version {version}, expected 1.0 or 2.0")
        found, _, found_dtype = _READ_HEADER[version](file)
        if found_dtype != dtype or found[1:] != shape or not found or found[0] < 1:
            expected = ", ".join(["n", *map(str, shape)])
            raise ValueError(f"{found_dtype}{list(found)}, expected {dtype}[{expected}]")
        size = math.prod(found) * dtype.itemsize
        if length - file.tell() != size:
            raise ValueError(f"{length - file.tell()} bytes of data, expected {size}")
        file.seek(0)
        return np.asarray(np.load(file, allow_pickle=False))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], int]]:
    """A regular file of bounded size, and its length."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise ValueError(f"{status.st_size} bytes, at most {MAX_FILE_BYTES} are read")
        yield file, status.st_size
