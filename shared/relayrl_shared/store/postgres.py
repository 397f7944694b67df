"""The trajectory store on Postgres: COPY for bodies, any number of ingest processes (contracts D1, D2).

All connections refuse a server that acknowledges before it has synced to disk, unless told otherwise.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from sqlalchemy import (
    BigInteger,
    Boolean,
    Connection,
    Engine,
    Float,
    Integer,
    LargeBinary,
    Table,
    Text,
    create_engine,
    exc,
    text,
)

from relayrl_shared.errors import ConfigError, StoreError, StoreUnavailable
from relayrl_shared.store import commits, runs, schema, tables
from relayrl_shared.store.database import Row, lock
from relayrl_shared.store.gate import Gate
from relayrl_shared.store.interface import CommitResult, IncomingTrajectory, RunState
from relayrl_shared.store.quarantine import QuarantineLimits
from relayrl_shared.store.sql_store import SqlStore, Writer

_CHANNEL = "relayrl_trajectories"
_WAKE_SECONDS = 0.5  # the longest a lost notification delays a reader
_CONTENDED_SECONDS = 0.05  # the same, where another thread of this process waits on the notifications
_ATTEMPTS = 8
_COPY_TYPES = {
    BigInteger: "int8",
    Integer: "int4",
    Boolean: "bool",
    Float: "float8",
    LargeBinary: "bytea",
    Text: "text",
}
_RACES = (
    psycopg.errors.UniqueViolation,
    psycopg.errors.SerializationFailure,
    psycopg.errors.DeadlockDetected,
)
_UNAVAILABLE = (psycopg.OperationalError, psycopg.InterfaceError, psycopg.errors.ReadOnlySqlTransaction)


class PostgresDatabase:
    """All tables of one Postgres database as a `Database`."""

    def __init__(self, url: str, *, deadline_seconds: float, allow_unsafe: bool) -> None:
        self._url, self._deadline_seconds, self._allow_unsafe = url, deadline_seconds, allow_unsafe
        self._gate = Gate()
        self.engine = self._engine()
        self._snapshots = self.engine.execution_options(
            isolation_level="REPEATABLE READ", postgresql_readonly=True
        )

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """One snapshot, read only."""
        with self._gate.enter(), typed_errors(), self._snapshots.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """READ COMMITTED, so that what a lock waited for is seen; durable when the block ends."""
        with self._gate.enter(), typed_errors(), self.engine.begin() as connection:
            yield connection

    def now(self, connection: Connection) -> float:
        """The server's clock."""
        return float(connection.scalar(text("SELECT extract(epoch FROM clock_timestamp())::float8")))

    def insert_rows(self, connection: Connection, table: Table, rows: Sequence[Row]) -> None:
        """One binary COPY."""
        copy(connection, table, table.name, rows)

    def connect(self) -> psycopg.Connection[Any]:
        """A new connection of the driver.

        Raises:
            ConfigError: the server does not sync to disk before it acknowledges.
        """
        milliseconds = int(self._deadline_seconds * 1000)
        settings: dict[str, Any] = {
            "connect_timeout": max(2, min(10, int(self._deadline_seconds))),
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": milliseconds,
            "application_name": "relayrl",
        }
        given = conninfo_to_dict(self._url)
        connection = psycopg.connect(
            self._url, **{name: value for name, value in settings.items() if name not in given}
        )
        try:
            self._prepare(connection, milliseconds)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: psycopg.Connection[Any], milliseconds: int) -> None:
        row = connection.execute(
            "SELECT set_config('statement_timeout', %(t)s, false), set_config('lock_timeout', %(t)s, false), "
            "current_setting('fsync'), current_setting('synchronous_commit')",
            {"t": str(milliseconds)},
        ).fetchone()
        connection.commit()
        _, _, fsync, synchronous_commit = row or ("", "", "", "")
        if "off" in (fsync, synchronous_commit) and not self._allow_unsafe:
            raise ConfigError(
                f"the Postgres server has fsync = {fsync} and synchronous_commit = {synchronous_commit}: it "
                "would acknowledge what a power loss takes away. Set both to on, or open with allow_unsafe"
            )

    def _engine(self) -> Engine:
        return create_engine(
            "postgresql+psycopg://",
            creator=self.connect,
            isolation_level="READ COMMITTED",
            pool_size=4,
            max_overflow=28,
            pool_timeout=self._deadline_seconds,
            pool_pre_ping=True,
        )

    def close(self) -> None:
        """Closes all connections once the calls in progress have ended."""
        self._gate.close(self._deadline_seconds)
        self.engine.dispose()


@contextlib.contextmanager
def typed_errors() -> Iterator[None]:
    """Errors of the driver as errors of the store."""
    try:
        yield
    except exc.TimeoutError as error:
        raise StoreUnavailable(f"no free connection to Postgres: {error}") from error
    except exc.DBAPIError as error:
        raise _typed(error.orig) from error
    except psycopg.Error as error:
        raise _typed(error) from error


def _typed(error: BaseException | None) -> StoreError:
    message = str(error).strip()
    if isinstance(error, _RACES + _UNAVAILABLE):
        return StoreUnavailable(f"Postgres: {message}")
    return StoreError(f"Postgres: {message}")


def lost_race(error: StoreError) -> bool:
    """Whether the transaction met another one's rows and was rolled back: it may succeed when tried again."""
    cause = error.__cause__
    return isinstance(cause.orig if isinstance(cause, exc.DBAPIError) else cause, _RACES)


def copy(connection: Connection, table: Table, target: str, rows: Sequence[Row]) -> None:
    """COPY of rows, which all have the same keys, columns of `table`, into `target`."""
    names = list(rows[0])
    statement = sql.SQL("COPY {} ({}) FROM STDIN (FORMAT BINARY)").format(
        sql.Identifier(target), sql.SQL(", ").join(map(sql.Identifier, names))
    )
    driver: Any = connection.connection.driver_connection
    with driver.cursor() as cursor, cursor.copy(statement) as stream:
        stream.set_types([_COPY_TYPES[type(table.c[name].type)] for name in names])
        for row in rows:
            stream.write_row([row[name] for name in names])


def copy_bodies(connection: Connection, rows: Sequence[Row]) -> set[str]:
    """Writes bodies; fails where one is known."""
    copy(connection, tables.trajectories, tables.trajectories.name, rows)
    return {row["trajectory_id"] for row in rows}


def merge_bodies(connection: Connection, rows: Sequence[Row]) -> set[str]:
    """Writes the bodies whose id is not known, through a temporary table; returns their ids."""
    connection.execute(
        text("CREATE TEMPORARY TABLE incoming (LIKE trajectories INCLUDING STORAGE) ON COMMIT DROP")
    )
    copy(connection, tables.trajectories, "incoming", rows)
    names = ", ".join(f'"{name}"' for name in rows[0])
    merged = connection.execute(
        text(
            f"INSERT INTO trajectories ({names}) SELECT {names} FROM incoming "
            "ON CONFLICT (trajectory_id) DO NOTHING RETURNING trajectory_id"
        )
    )
    return set(merged.scalars())


class Listener:
    """Waits for and sends notifications on connections of its own, shared by the threads of a store."""

    def __init__(self, connect: Callable[[], psycopg.Connection[Any]]) -> None:
        self._connect = connect
        self._using = threading.Lock()
        self._connection: psycopg.Connection[Any] | None = None
        self._sending = threading.Lock()
        self._sender: psycopg.Connection[Any] | None = None
        self._closed = False

    def open(self) -> None:
        """Listens from now on; after that no notification of a later commit is lost."""
        with self._using, typed_errors():
            if self._closed:
                return
            if self._connection is None or self._connection.closed:
                self._connection = self._connect()
                self._connection.autocommit = True
                self._connection.execute(f"LISTEN {_CHANNEL}")

    def wait(self, seconds: float) -> None:
        """Returns after a notification, or after the time, or earlier."""
        if not self._using.acquire(timeout=min(seconds, _CONTENDED_SECONDS)):
            return
        try:
            if self._connection is not None:
                for _ in self._connection.notifies(timeout=seconds, stop_after=1):
                    break
        except psycopg.Error:
            self._drop()  # the caller's next look at the table says what is wrong
        finally:
            self._using.release()

    def notify(self) -> None:
        """Wakes readers, apart from the durable transactions: NOTIFY would make those wait for each other.

        A notification that cannot be sent is lost, which costs a reader one poll interval.
        """
        with self._sending:
            try:
                if self._sender is None and not self._closed:
                    self._sender = self._connect()
                    self._sender.autocommit = True
                if self._sender is not None:
                    self._sender.execute(f"NOTIFY {_CHANNEL}")
            except (psycopg.Error, ConfigError):
                self._drop_sender()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _drop_sender(self) -> None:
        if self._sender is not None:
            self._sender.close()
        self._sender = None

    def close(self) -> None:
        """Closes the connections once nobody uses them, for good."""
        with self._using, self._sending:
            self._closed = True
            self._drop()
            self._drop_sender()


class PostgresStore(SqlStore):
    """See the module. `deadline_seconds` bounds every statement and every wait for a lock or a connection."""

    def __init__(
        self,
        url: str,
        *,
        writer_of: Writer | None,
        limits: QuarantineLimits | None = None,
        deadline_seconds: float = 30.0,
        allow_unsafe: bool = False,
    ) -> None:
        super().__init__(writer_of, limits or QuarantineLimits())
        self._database = PostgresDatabase(url, deadline_seconds=deadline_seconds, allow_unsafe=allow_unsafe)
        self._listener = Listener(self._database.connect)
        try:
            self._prepare_schema()
        except BaseException:
            self._database.close()
            raise

    def _prepare_schema(self) -> None:
        if self._writer_of is not None:
            migrate(self._database)
            return
        with self._database.read() as connection:
            known = [schema.database_schema(connection, group) for group in schema.GROUPS]
        if 0 in known:
            raise StoreUnavailable(
                "this database has no trajectory store yet: start the training server first"
            )

    @property
    def _ingest(self) -> PostgresDatabase:
        return self._database

    def _learner(self, run_id: str) -> PostgresDatabase:
        return self._database

    def set_run_state(self, run_id: str, state: RunState, reason: str = "") -> None:
        """Any writer may note it here, a learner its failure too (decision 0001)."""
        if self._writer_of is None:
            self._check_writer("ingest")
        with self._database.write() as connection:
            runs.set_state(connection, run_id, state, reason)

    def _commit(self, batch: Sequence[IncomingTrajectory]) -> list[CommitResult]:
        """The bodies go by COPY; after a lost race once more, under the runs' locks and past known ids."""
        options = commits.Options(write_bodies=copy_bodies, limits=self._limits)
        for _ in range(_ATTEMPTS):
            try:
                return self._try_commit(batch, options)
            except StoreUnavailable as error:
                if not lost_race(error):
                    raise
                options = commits.Options(merge_bodies, self._limits, lock_runs_first=True)
        raise StoreUnavailable(f"a batch of {len(batch)} lost {_ATTEMPTS} races with other writers")

    def _try_commit(
        self, batch: Sequence[IncomingTrajectory], options: commits.Options
    ) -> list[CommitResult]:
        with self._database.write() as connection:
            results = commits.commit(self._database, connection, batch, options)
        self._listener.notify()
        return results

    def wait(self, run_id: str, after_position: int, timeout_seconds: float) -> bool:
        """See `TrajectoryStore.wait`. False at once when the store is closed."""
        deadline = time.monotonic() + timeout_seconds
        while not self._closed.is_set():
            self._listener.open()
            if self._has_passed(run_id, after_position):
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._listener.wait(min(left, _WAKE_SECONDS))
        return False

    def close(self) -> None:
        """Gives back connections; waits end within half a second."""
        self._closed.set()
        self._listener.close()
        self._database.close()


def migrate(database: PostgresDatabase) -> list[str]:
    """Brings all tables up to this code, under a lock; returns the names of the groups that it changed."""
    with database.write() as connection:
        lock(connection, "migrate", ["relayrl"])
        return [group.name for group in schema.GROUPS if schema.migrate(connection, group)]
