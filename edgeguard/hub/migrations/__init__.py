"""Brings a database to the schema of this version, one revision after the other, with Alembic.

Rules enforced here:

* a revision is a file ``versions/NNNN_what.py``; it names its predecessor and says with plain ``op`` calls what
  changes. It imports none of the hub's tables: those move on, a revision never does;
* all missing revisions run in the one transaction that the caller opened: a hub killed meanwhile leaves the old schema;
* a database that is newer than this version knows is refused, not guessed at.
"""

from __future__ import annotations

import logging
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

from edgeguard.errors import ConfigError

FIRST = "0001"
# Alembic tells each step at INFO: nothing that an operator has to know.
logging.getLogger("alembic").setLevel(logging.WARNING)
_LOCK = 0x6564_6765_6775_6172
"""Of PostgreSQL's advisory locks, the one that a hub holds while it changes the schema."""


def version(db: Connection) -> str | None:
    """The revision of a database, None for one that is empty.

    Databases from before there were revisions have a table ``schema_version``, which says 1: the first revision.
    """
    found = MigrationContext.configure(db).get_current_revision()
    if found is None and inspect(db).has_table("schema_version"):
        number = db.scalar(text("SELECT max(version) FROM schema_version"))
        found = None if number is None else f"{number:04d}"
    return found


def head() -> str:
    """The revision of this version's schema."""
    found = ScriptDirectory.from_config(_config()).get_current_head()
    assert found is not None
    return found


def upgrade(db: Connection) -> None:
    """Run what is missing, inside the open transaction of ``db``. Hubs that come at the same time wait.

    Raises:
        ConfigError: the database is of a version that this one does not know.
    """
    if db.dialect.name == "postgresql":
        db.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    config = _config()
    config.attributes["connection"] = db
    found = version(db)
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise ConfigError(
            "database", got=f"version {found.lstrip('0')}", expected=f"version {head().lstrip('0')} or an older one",
            do="run the version of edgeguard that wrote it, or a later one",
        )  # fmt: skip
    if found == FIRST:
        command.stamp(config, FIRST)
    command.upgrade(config, "head")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config
