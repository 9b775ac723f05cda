"""Many rows in one statement, on SQLite and on PostgreSQL: what SQLAlchemy has no one word for.

Rules enforced here:

* the text of a statement does not depend on the number of rows: databases parse and plan it once;
* names come from the tables' own columns, values are always parameters;
* SQLite: rows to read are named by one JSON text, rows to write are ``executemany``. PostgreSQL, where each statement
  is a round trip: arrays, one a column.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import msgspec
from sqlalchemy import Connection, Dialect, Integer, Row, Table
from sqlalchemy.dialects import postgresql

Names = tuple[str, ...]
Rows = Sequence[tuple[Any, ...]]

_POSTGRESQL: Dialect = postgresql.dialect()  # type: ignore[no-untyped-call]


def read(db: Connection, table: Table, key: Names, values: Rows, columns: Names) -> Sequence[Row[Any]]:
    """The rows whose ``key`` columns are among ``values``."""
    if not values:
        return []
    if db.dialect.name == "sqlite":
        return db.exec_driver_sql(_sqlite_read(table, key, columns), (msgspec.json.encode(values).decode(),)).all()
    return db.exec_driver_sql(_postgresql_read(table, key, columns), _arrays(table, key, values)).all()


def lock(db: Connection, table: Table, key: str, values: Sequence[int]) -> None:
    """Hold rows until the transaction ends, taken one after the other in the order of ``key``.

    SQLite has one writer at a time, who needs no such thing.
    """
    if values and db.dialect.name == "postgresql":
        db.exec_driver_sql(_postgresql_lock(table, key), (_array(values),))


Conflict = Literal["fail", "ignore", "replace", "add"]


def insert(db: Connection, table: Table, columns: Names, rows: Rows, *, conflict: Conflict = "fail") -> None:
    """Insert rows.

    Args:
        conflict: what to do where the row exists: raise, leave it, or replace its columns outside the primary key by
            the new values, or by their sums.
    """
    if not rows:
        return
    if db.dialect.name == "sqlite":
        db.exec_driver_sql(_sqlite_insert(table, columns, conflict), list(rows))
    else:
        db.exec_driver_sql(_postgresql_insert(table, columns, conflict), _arrays(table, columns, rows))


def update(db: Connection, table: Table, key: str, columns: Names, rows: Rows) -> None:
    """Set ``columns`` of existing rows. Each of ``rows`` holds the columns' values and then that of ``key``."""
    if not rows:
        return
    if db.dialect.name == "sqlite":
        db.exec_driver_sql(_sqlite_update(table, key, columns), list(rows))
    else:
        db.exec_driver_sql(_postgresql_update(table, key, columns), _arrays(table, (*columns, key), rows))


def _arrays(table: Table, columns: Names, rows: Rows) -> tuple[Any, ...]:
    """One array a column. Numbers as PostgreSQL writes them: for these the driver's own way takes longer than the rest
    of a batch."""
    return tuple(
        _array(values) if isinstance(table.c[name].type, Integer) else list(values)
        for name, values in zip(columns, zip(*rows, strict=True), strict=True)
    )


def _array(numbers: Sequence[int | None]) -> str:
    return "{" + ",".join(["NULL" if number is None else str(number) for number in numbers]) + "}"


@cache
def _sqlite_read(table: Table, key: Names, columns: Names) -> str:
    same = " AND ".join(f"t.{name} = k.value ->> {i}" for i, name in enumerate(key))
    return f"SELECT {_listed(columns, 't.')} FROM json_each(?) AS k CROSS JOIN {table.name} AS t ON {same}"


@cache
def _postgresql_read(table: Table, key: Names, columns: Names) -> str:
    same = " AND ".join(f"t.{name} = k.{name}" for name in key)
    return f"SELECT {_listed(columns, 't.')} FROM {_unnest(table, key)} JOIN {table.name} AS t ON {same}"


@cache
def _postgresql_lock(table: Table, key: str) -> str:
    return (
        f"SELECT FROM {_unnest(table, (key,))} JOIN {table.name} AS t ON t.{key} = k.{key}"
        f" ORDER BY t.{key} FOR NO KEY UPDATE OF t"
    )


@cache
def _sqlite_insert(table: Table, columns: Names, conflict: Conflict) -> str:
    values = ", ".join("?" * len(columns))
    return f"INSERT INTO {table.name} ({_listed(columns)}) VALUES ({values}){_on_conflict(table, columns, conflict)}"


@cache
def _postgresql_insert(table: Table, columns: Names, conflict: Conflict) -> str:
    rows = f"SELECT {_listed(columns, 'k.')} FROM {_unnest(table, columns)}"
    return f"INSERT INTO {table.name} ({_listed(columns)}) {rows}{_on_conflict(table, columns, conflict)}"


@cache
def _sqlite_update(table: Table, key: str, columns: Names) -> str:
    return f"UPDATE {table.name} SET {', '.join(f'{name} = ?' for name in columns)} WHERE {key} = ?"


@cache
def _postgresql_update(table: Table, key: str, columns: Names) -> str:
    values = ", ".join(f"{name} = k.{name}" for name in columns)
    return f"UPDATE {table.name} AS t SET {values} FROM {_unnest(table, (*columns, key))} WHERE t.{key} = k.{key}"


def _on_conflict(table: Table, columns: Names, conflict: Conflict) -> str:
    if conflict == "fail":
        return ""
    if conflict == "ignore":
        return " ON CONFLICT DO NOTHING"
    key = tuple(column.name for column in table.primary_key)
    before = f"{table.name}.{{0}} + " if conflict == "add" else ""
    values = ", ".join(f"{n} = {before.format(n)}excluded.{n}" for n in columns if n not in key)
    return f" ON CONFLICT ({_listed(key)}) DO UPDATE SET {values}"


def _unnest(table: Table, columns: Names) -> str:
    types = ((isinstance(table.c[name].type, Integer), table.c[name].type.compile(_POSTGRESQL)) for name in columns)
    arrays = ", ".join(f"{'%s' if number else '%b'}::{kind}[]" for number, kind in types)
    return f"unnest({arrays}) AS k({_listed(columns)})"


def _listed(columns: Names, prefix: str = "") -> str:
    return ", ".join(prefix + name for name in columns)
