"""Opens the trajectory store that a URL names; the one way in for services."""

from __future__ import annotations

from pathlib import Path

from relayrl_shared.errors import ConfigError
from relayrl_shared.store.interface import TrajectoryStore
from relayrl_shared.store.quarantine import QuarantineLimits
from relayrl_shared.store.sql_store import Writer

_SQLITE = "sqlite:///"


def open_store(
    url: str,
    *,
    writer_of: Writer | None = None,
    limits: QuarantineLimits | None = None,
    deadline_seconds: float | None = None,
    allow_unsafe: bool = False,
) -> TrajectoryStore:
    """Opens a store, and creates or migrates its tables where it writes them.

    Args:
        url: `sqlite:///DIR` (a directory; four slashes where absolute) or `postgresql://…`.

        writer_of: the group of methods that this process may call to write: `ingest`, `learner`, `all` (both,
            for one process); None only reads.

        limits: bounds of quarantine a run.

        deadline_seconds: the longest wait for a lock or a connection (default: SQLite 5, Postgres 30).

        allow_unsafe: takes a Postgres server that does not sync to disk before it acknowledges.

    Raises:
        ConfigError: the URL is of no known kind, or the server is unsafe.
        SchemaVersionError: the database needs newer code.
        StoreError: another ingest writes this SQLite directory.
        StoreUnavailable: the database cannot be reached now.
    """
    if url.startswith(_SQLITE):
        from relayrl_shared.store.sqlite import SqliteStore

        directory = Path(url.removeprefix(_SQLITE))
        deadline = 5.0 if deadline_seconds is None else deadline_seconds
        return SqliteStore(directory, writer_of=writer_of, limits=limits, deadline_seconds=deadline)
    if url.startswith(("postgresql://", "postgres://")):
        from relayrl_shared.store.postgres import PostgresStore

        deadline = 30.0 if deadline_seconds is None else deadline_seconds
        return PostgresStore(
            url, writer_of=writer_of, limits=limits, deadline_seconds=deadline, allow_unsafe=allow_unsafe
        )
    raise ConfigError(f"store URL {url!r}: use sqlite:///DIR or postgresql://USER@HOST/DATABASE")
