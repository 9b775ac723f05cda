"""Databases for tests: SQLite files of the present schema, made once and copied, since migrations take their time."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

from edgeguard.hub.store import Store

FLEET = "test"


def sqlite(folder: Path) -> str:
    """The URL of a new, empty database in a folder."""
    path = folder / "hub.db"
    path.write_bytes(_empty())
    return f"sqlite:///{path}"


@cache
def _empty() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hub.db"
        Store(f"sqlite:///{path}", fleet=FLEET).close()
        return path.read_bytes()
