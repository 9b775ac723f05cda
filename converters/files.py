"""Writes files so that they are there in full or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from edgeguard.errors import ConfigError


def write(content: bytes, path: Path) -> None:
    """Write a file in full, or leave what was there. Raises like :func:`write_all`."""
    write_all({path: content})


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Write files that belong together: all are on the disk before the first takes its name.

    Raises:
        ConfigError: a folder does not exist, is not writable, or the disk is full.
    """
    partials = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in contents}
    path = next(iter(contents), Path())
    try:
        for path, content in contents.items():
            with partials[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path, partial in partials.items():
            partial.replace(path)
    except OSError as error:
        for partial in partials.values():
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        raise ConfigError(f"output file {path}", got=error.strerror or str(error), do="choose another place") from error
