"""Inputs from a folder: batches in ``*.npy`` files, each taken once, in the order of their names.

Rules enforced here:

* a file is dropped in by renaming and its name is never used again; hidden and other names are ignored;
* a file stays in the folder until :meth:`FolderSource.discard`, which the agent calls only after the report
  that counts it is on disk: a killed agent finds it again;
* a file that is not a batch of this model's inputs goes to ``rejected/`` with one line in the log; its header
  is checked before its content is read, and nothing in it is ever unpickled.
"""

from __future__ import annotations

import logging
import math
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeguard.errors import ConfigError

END_MARKER = "end"
REJECTED = "rejected"
MAX_FILE_BYTES = 256 << 20

# NumPy documents these functions but gives them no types.
numpy_format: Any = np.lib.format
_READ_HEADER = {(1, 0): numpy_format.read_array_header_1_0, (2, 0): numpy_format.read_array_header_2_0}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Inputs ``[n, ...]`` of one file, n >= 1."""

    name: str
    inputs: npt.NDArray[Any]


class FolderSource:
    """Takes batches out of a folder.

    Args:
        folder: it must exist and be writable.
        shape: shape of one input, without the batch axis.
        dtype: type of the inputs; there is no conversion.

    Raises:
        ConfigError: the folder is missing or not writable.
    """

    def __init__(self, folder: Path, *, shape: tuple[int, ...], dtype: str) -> None:
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(
                f"source folder {folder}",
                got="no writable folder",
                expected="a folder of .npy files",
                do="create it",
            )
        self._folder = folder
        self._shape = shape
        self._dtype = np.dtype(dtype)
        self._taken: set[str] = set()
        self._listed: Iterator[str] = iter(())
        self.rejected = 0
        self.ended = False
        """True once the end marker is there and every file was taken."""

    def take(self) -> Batch | None:
        """The next batch, or None when none waits now."""
        while True:
            for name in self._listed:
                batch = self._open(name)
                if batch:
                    return batch
            # The marker is looked at first: what was dropped in before it is in the listing.
            marked = (self._folder / END_MARKER).exists()
            names = self._list()
            self._listed = iter(names)
            if not names:
                self.ended = marked
                return None

    def discard(self, names: Iterable[str]) -> None:
        """Delete files that were counted; a missing one is fine. Returns when that is on disk.

        Raises:
            ConfigError: the folder refuses it.
        """
        try:
            for name in names:
                (self._folder / name).unlink(missing_ok=True)
                self._taken.discard(name)
            _sync_folder(self._folder)
        except OSError as error:
            raise ConfigError(
                f"source folder {self._folder}", got=error.strerror, expected="a folder to delete from"
            ) from error

    def _list(self) -> list[str]:
        try:
            with os.scandir(self._folder) as entries:
                names = [e.name for e in entries if e.name.endswith(".npy") and not e.name.startswith(".")]
        except OSError as error:
            raise ConfigError(f"source folder {self._folder}", got=error.strerror, expected="a folder") from error
        return sorted(name for name in names if name not in self._taken)

    def _open(self, name: str) -> Batch | None:
        try:
            inputs = read_batch(self._folder / name, shape=self._shape, dtype=self._dtype)
        except FileNotFoundError:
            return None
        except Exception as error:
            # NumPy's header parser raises whatever a hostile header provokes; no file may stop the agent.
            self._reject(name, " ".join(str(error).split())[:300])
            return None
        self._taken.add(name)
        return Batch(name, inputs)

    def _reject(self, name: str, reason: str) -> None:
        self.rejected += 1
        log.warning("input file %r rejected (%d so far): %s", name, self.rejected, reason)
        try:
            (self._folder / REJECTED).mkdir(exist_ok=True)
            (self._folder / name).replace(self._folder / REJECTED / name)
        except OSError as error:
            self._taken.add(name)
            log.warning("input file %r cannot be moved to %s/, ignored: %s", name, REJECTED, error.strerror)


def read_batch(path: Path, *, shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Read one batch ``[n, *shape]``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a regular .npy file, too large, cut short, empty, or of another shape or type.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise ValueError(f"{status.st_size} bytes, at most {MAX_FILE_BYTES} are read")
        version = numpy_format.read_magic(file)
        if version not in _READ_HEADER:
            raise ValueError(f".npy version {version}, expected 1.0 or 2.0")
        found, _, found_dtype = _READ_HEADER[version](file)
        if found_dtype != dtype or found[1:] != shape or not found or found[0] < 1:
            expected = ", ".join(["n", *map(str, shape)])
            raise ValueError(f"{found_dtype}{list(found)}, expected {dtype}[{expected}]")
        size = math.prod(found) * dtype.itemsize
        if status.st_size - file.tell() != size:
            raise ValueError(f"{status.st_size - file.tell()} bytes of data, expected {size}")
        file.seek(0)
        return np.asarray(np.load(file, allow_pickle=False))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
