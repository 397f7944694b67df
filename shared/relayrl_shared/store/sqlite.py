"""The trajectory store on SQLite: a directory with one file an owner (contracts D3).

`trajectories.sqlite` is written by the one ingest process of the directory, `learner-<run_id>.sqlite` by that
run's learner; each reads the others' files. A file that is not there yet reads as empty. Local disks only.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from sqlalchemy import Connection, Engine, Table, create_engine, event, exc
from sqlalchemy.pool import QueuePool

from relayrl_shared.errors import ContractError, StoreError, StoreUnavailable
from relayrl_shared.store import commits, schema, tables
from relayrl_shared.store.database import Row
from relayrl_shared.store.gate import Gate
from relayrl_shared.store.interface import CommitResult, IncomingTrajectory
from relayrl_shared.store.quarantine import QuarantineLimits
from relayrl_shared.store.schema import Group
from relayrl_shared.store.sql_store import SqlStore, Writer

_PAGE_BYTES = 16_384
_CHECKPOINT_PAGES = 2_048  # 32 MiB of log between checkpoints
_RETRYABLE = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOMEM,
}
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


class SqliteFile:
    """One file of tables as a `Database`. Only its owner opens it with `writable`."""

    def __init__(self, path: Path, group: Group, *, writable: bool, deadline_seconds: float) -> None:
        self._path, self._group = path, group
        self._deadline_seconds = deadline_seconds
        self._gate = Gate()
        self._writing = threading.Lock()
        self._opening = threading.Lock()
        self._reader: Engine | None = None
        self._writer: Engine | None = None
        self._empty: Engine | None = None
        if writable:
            self._writer = self._engine(read_only=False)
            with self.write() as connection:
                schema.migrate(connection, group)
            self._reader = self._engine(read_only=True)

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """One snapshot of the file; an empty database while there is none."""
        with self._gate.enter(), _typed_errors(self._path), self._readable().begin() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """BEGIN IMMEDIATE … COMMIT with synchronous=FULL: durable when the block has ended."""
        if self._writer is None:
            raise StoreError(f"{self._path} is open for reading only")
        if not self._writing.acquire(timeout=self._deadline_seconds):
            raise StoreUnavailable(f"{self._path}: another thread writes for {self._deadline_seconds:g} s")
        try:
            with self._gate.enter(), _typed_errors(self._path), self._writer.begin() as connection:
                yield connection
        finally:
            self._writing.release()

    def now(self, connection: Connection) -> float:
        """The clock of the one host."""
        return time.time()

    def insert_rows(self, connection: Connection, table: Table, rows: Sequence[Row]) -> None:
        """One prepared statement for all rows."""
        connection.execute(table.insert(), [dict(row) for row in rows])

    def close(self) -> None:
        """Closes all connections once the calls in progress have ended."""
        self._gate.close(self._deadline_seconds)
        for engine in (self._reader, self._writer, self._empty):
            if engine is not None:
                engine.dispose()

    def _readable(self) -> Engine:
        if self._reader is None:
            with self._opening:
                self._reader = self._reader or self._open_existing()
        return self._reader or self._nothing()

    def _open_existing(self) -> Engine | None:
        """Opens the file once its owner has created the tables."""
        if not self._path.exists():
            return None
        engine = self._engine(read_only=True)
        try:
            with _typed_errors(self._path), engine.begin() as connection:
                if schema.database_schema(connection, self._group) > 0:
                    return engine
        except BaseException:
            engine.dispose()
            raise
        engine.dispose()
        return None

    def _nothing(self) -> Engine:
        with self._opening:
            if self._empty is None:
                # One database in memory, a connection a thread: one that threads share at once can crash.
                name = f"file:relayrl-empty-{id(self)}?mode=memory&cache=shared"
                engine = create_engine(
                    "sqlite://",
                    creator=lambda: sqlite3.connect(name, uri=True, check_same_thread=False),
                    poolclass=QueuePool,
                    max_overflow=60,
                )
                self._group.metadata.create_all(engine)
                self._empty = engine
            return self._empty

    def _engine(self, *, read_only: bool) -> Engine:
        engine = create_engine(
            "sqlite://",
            creator=lambda: self._connect(read_only=read_only),
            poolclass=QueuePool,
            pool_size=4,
            max_overflow=60,
            pool_timeout=self._deadline_seconds,
        )
        statement = "BEGIN" if read_only else "BEGIN IMMEDIATE"
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(statement))
        return engine

    def _connect(self, *, read_only: bool) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{self._path.absolute().as_uri()}?mode={'ro' if read_only else 'rwc'}",
            uri=True,
            timeout=self._deadline_seconds,
            isolation_level=None,
            check_same_thread=False,
        )
        try:
            for pragma in _pragmas(read_only):
                connection.execute(f"PRAGMA {pragma}")
        except BaseException:
            connection.close()
            raise
        return connection


def _pragmas(read_only: bool) -> list[str]:
    if read_only:
        return ["query_only = ON", "cache_size = -8192"]
    return [
        f"page_size = {_PAGE_BYTES}",
        "journal_mode = WAL",
        "synchronous = FULL",
        f"wal_autocheckpoint = {_CHECKPOINT_PAGES}",
        "journal_size_limit = 134217728",
        "cache_size = -16384",
    ]


@contextlib.contextmanager
def _typed_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except exc.DBAPIError as error:
        raise _typed(path, error.orig) from error
    except sqlite3.Error as error:
        raise _typed(path, error) from error
    except exc.TimeoutError as error:
        raise StoreUnavailable(f"{path}: no free connection: {error}") from error
    except OverflowError as error:
        raise StoreError(f"{path}: a number is out of range: {error}") from error


def _typed(path: Path, error: object) -> StoreError:
    code: Any = getattr(error, "sqlite_errorcode", None)
    if isinstance(code, int) and code & 0xFF in _RETRYABLE:
        return StoreUnavailable(f"{path}: {error}")
    return StoreError(f"{path}: {error}")


class SqliteStore(SqlStore):
    """See the module. `deadline_seconds` bounds every wait for a lock or a connection."""

    def __init__(
        self,
        directory: Path,
        *,
        writer_of: Writer | None,
        limits: QuarantineLimits | None = None,
        deadline_seconds: float = 5.0,
    ) -> None:
        super().__init__(writer_of, limits or QuarantineLimits())
        self._directory, self._deadline_seconds = directory, deadline_seconds
        self._learners: dict[str, SqliteFile] = {}
        self._opening = threading.Lock()
        self._lock: IO[str] | None = None
        if writer_of is not None:
            directory.mkdir(parents=True, exist_ok=True)
        ingests = writer_of in ("ingest", "all")
        if ingests:
            self._lock = _lock_for_ingest(directory / "trajectories.lock")
        try:
            self._trajectories = self._file("trajectories.sqlite", schema.TRAJECTORIES, writable=ingests)
        except BaseException:
            self._unlock()
            raise

    @property
    def _ingest(self) -> SqliteFile:
        return self._trajectories

    def _learner(self, run_id: str) -> SqliteFile:
        with self._opening:
            if run_id not in self._learners:
                if not _SAFE_NAME.fullmatch(run_id):
                    raise ContractError(f"run id {run_id!r} cannot name a file: use letters, digits, '_.-'")
                writable = self._writer_of in ("learner", "all")
                name = f"learner-{run_id}.sqlite"
                self._learners[run_id] = self._file(name, schema.LEARNER, writable=writable)
            return self._learners[run_id]

    def _file(self, name: str, group: Group, *, writable: bool) -> SqliteFile:
        path = self._directory / name
        return SqliteFile(path, group, writable=writable, deadline_seconds=self._deadline_seconds)

    def _commit(self, batch: Sequence[IncomingTrajectory]) -> list[CommitResult]:
        options = commits.Options(write_bodies=self._write_bodies, limits=self._limits)
        with self._trajectories.write() as connection:
            return commits.commit(self._trajectories, connection, batch, options)

    def _write_bodies(self, connection: Connection, rows: Sequence[Row]) -> set[str]:
        self._trajectories.insert_rows(connection, tables.trajectories, rows)
        return {row["trajectory_id"] for row in rows}

    def close(self) -> None:
        """Gives back connections and the lock of the ingest writer; waits end."""
        self._closed.set()
        for file in (self._trajectories, *self._learners.values()):
            file.close()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()


def _lock_for_ingest(path: Path) -> IO[str]:
    """Holds the directory for one ingest until the file is closed, or the process is gone."""
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise StoreError(
            f"{path.parent}: the ingest process {holder} writes here already; a SQLite store has one ingest, "
            "use Postgres to run several"
        ) from error
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
