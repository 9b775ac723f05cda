"""How often a model was started that has not proved itself yet: what ends a loop of crashes after an update.

A released model may pass every check and still crash the agent on a real input. Rules enforced here:

* a start is on disk before the model meets its first input, so that a crash cannot take it back;
* a model that was started ``STARTS`` times and never filled a window has failed: it is left, and not taken again;
* an agent that was told to stop takes the count back: only what ended otherwise counts against the model.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from edgeguard.errors import ConfigError

STARTS = 2


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    file_digest: str
    starts: Annotated[int, Meta(ge=0, le=2**53)]


class Trial:
    """The count of one model, in a small file that the next model's count replaces.

    Args:
        path: the file; there is none until a model is on trial.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def failed(self, file_digest: str) -> bool:
        """True once the model of this file was started too often without proving itself."""
        return self._starts(file_digest) >= STARTS

    def begin(self, file_digest: str) -> None:
        """Count one more start. Raises ConfigError if that cannot be written."""
        self._write(_Record(file_digest=file_digest, starts=self._starts(file_digest) + 1))

    def end(self, file_digest: str) -> None:
        """The model proved itself, or the agent stops as told. Raises ConfigError if that cannot be written."""
        if self._starts(file_digest):
            self._write(_Record(file_digest=file_digest, starts=0))

    def _starts(self, file_digest: str) -> int:
        try:
            record = msgspec.json.decode(self._path.read_bytes(), type=_Record)
        except (OSError, msgspec.DecodeError, RecursionError):
            return 0
        return record.starts if record.file_digest == file_digest else 0

    def _write(self, record: _Record) -> None:
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(msgspec.json.encode(record))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
            folder = os.open(self._path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise ConfigError(
                f"count of starts {self._path}",
                got=error.strerror or str(error),
                expected="a file that can be written",
                do="check the disk's space and the folder's owner",
            ) from error
