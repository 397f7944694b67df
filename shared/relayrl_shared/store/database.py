"""What the statements of this package need of a database; `sqlite` and `postgres` provide it.

The modules `runs`, `commits`, `quarantine`, `learner_rows`, … are functions over an open SQLAlchemy
connection inside a transaction; `sql_store` opens the transactions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from sqlalchemy import Connection, Table, func, select
from sqlalchemy.dialects import postgresql, sqlite

Row = Mapping[str, Any]
AnyInsert = postgresql.Insert | sqlite.Insert

_CHUNK = 500  # values of one IN list


class Database(Protocol):
    """One group of tables. Both contexts raise `StoreUnavailable` where the database cannot be reached."""

    def read(self) -> AbstractContextManager[Connection]:
        """A transaction that sees one snapshot a statement or better; nothing is written in it."""
        ...

    def write(self) -> AbstractContextManager[Connection]:
        """A durable transaction: committed at the end of the block, rolled back where it raises."""
        ...

    def now(self, connection: Connection) -> float:
        """Unix seconds of the one clock that all processes of this database share."""
        ...

    def insert_rows(self, connection: Connection, table: Table, rows: Sequence[Row]) -> None:
        """Inserts many rows in the fastest way there is; every row has the same keys."""
        ...

    def close(self) -> None:
        """Gives back all connections."""
        ...


def insert(connection: Connection, table: Table) -> AnyInsert:
    """An insert of the connection's dialect, so that it can say what to do on conflict."""
    return postgresql.insert(table) if connection.dialect.name == "postgresql" else sqlite.insert(table)


def upsert(connection: Connection, table: Table, row: Row) -> None:
    """Inserts the row, or gives the row of the same primary key the other values."""
    key = [column.name for column in table.primary_key]
    values = {name: value for name, value in row.items() if name not in key}
    statement = insert(connection, table).values(row)
    connection.execute(statement.on_conflict_do_update(index_elements=key, set_=values))


def insert_missing(connection: Connection, table: Table, rows: Sequence[Row]) -> None:
    """Inserts the rows whose keys are not there yet."""
    if rows:
        connection.execute(insert(connection, table).on_conflict_do_nothing(), [dict(row) for row in rows])


def lock(connection: Connection, purpose: str, keys: Iterable[str]) -> None:
    """Takes transaction locks in sorted order (Postgres; SQLite has one writer anyway)."""
    if connection.dialect.name != "postgresql":
        return
    for key in sorted(set(keys)):
        digest = hashlib.blake2b(f"{purpose}:{key}".encode(), digest_size=8).digest()
        connection.execute(select(func.pg_advisory_xact_lock(int.from_bytes(digest, "big", signed=True))))


def chunks(values: Iterable[str]) -> Iterable[list[str]]:
    """The distinct values in lists short enough for one IN."""
    distinct = sorted(set(values))
    return (distinct[i : i + _CHUNK] for i in range(0, len(distinct), _CHUNK))
