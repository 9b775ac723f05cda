"""Writes a file so that it is there in full or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from edgeguard.errors import ConfigError


def write(content: bytes, path: Path) -> None:
    """Write a file in full, or leave what was there.

    Raises:
        ConfigError: the folder does not exist, is not writable, or the disk is full.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise ConfigError(f"output file {path}", got=error.strerror or str(error), do="choose another place") from error
