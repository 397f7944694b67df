"""The registry's store over SQLAlchemy Core: a SQLite file or a Postgres database, by URL.

SQLite writes are BEGIN IMMEDIATE in WAL mode with synchronous=FULL: what was committed survives a power loss.
On Postgres the rows of the run and of the policy are locked instead, always in that order.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert as postgres_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from relayrl_model_registry.store import tables
from relayrl_model_registry.store.interface import (
    AliasMove,
    PolicySummary,
    PolicyVersion,
    PublicationKey,
    ReadUnit,
    WriteUnit,
)
from relayrl_model_registry.store.migrate import migrate
from relayrl_shared.errors import ConfigError, StorageFull, StoreError, StoreUnavailable

BUSY_TIMEOUT_SECONDS = 10.0
_WRITE = "relayrl_write"
_VERSION_FIELDS = tuple(field.name for field in msgspec.structs.fields(PolicyVersion))


class SqlRegistryStore:
    """A `RegistryStore`; safe to use from several threads."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._writer = engine.execution_options(**{_WRITE: True})

    @contextmanager
    def read(self) -> Iterator[ReadUnit]:
        """One consistent view."""
        with _domain_errors(), self._engine.connect() as connection, connection.begin():
            yield SqlUnit(connection)

    @contextmanager
    def write(self) -> Iterator[WriteUnit]:
        """One durable transaction, rolled back if the block raises."""
        with _domain_errors(), self._writer.connect() as connection, connection.begin():
            yield SqlUnit(connection)

    def ping(self) -> None:
        """Raises `StoreUnavailable` unless the database answers."""
        with self.read() as unit:
            unit.intent("")

    def close(self) -> None:
        """Closes all connections."""
        self._engine.dispose()


class SqlUnit:
    """A `WriteUnit` over one connection in a transaction."""

    def __init__(self, connection: sa.Connection) -> None:
        self._connection = connection
        self._insert = sqlite_insert if connection.dialect.name == "sqlite" else postgres_insert

    # -- queries

    def policies(self) -> list[PolicySummary]:
        """All policies by name."""
        return self._summaries(sa.select(tables.policies).order_by(tables.policies.c.policy))

    def policy(self, policy: str) -> PolicySummary | None:
        """The policy, None if nothing was published under the name."""
        found = self._summaries(sa.select(tables.policies).where(tables.policies.c.policy == policy))
        return found[0] if found else None

    def _summaries(self, query: sa.Select[*tuple[Any, ...]]) -> list[PolicySummary]:
        rows = self._connection.execute(query).all()
        named = tables.aliases.c.policy.in_([row.policy for row in rows])
        aliases: dict[str, dict[str, int]] = {row.policy: {} for row in rows}
        for row in self._connection.execute(sa.select(tables.aliases).where(named)):
            aliases[row.policy][row.alias] = row.policy_version
        return [
            PolicySummary(
                policy=row.policy,
                created_at=row.created_at,
                newest_version=row.newest_version,
                aliases=aliases[row.policy],
            )
            for row in rows
            if row.newest_version > 0
        ]

    def version(self, policy: str, policy_version: int) -> PolicyVersion | None:
        """The version, None if there is none of that number."""
        table = tables.versions.c
        return self._one_version((table.policy == policy) & (table.policy_version == policy_version))

    def versions(self, policy: str, before_version: int | None, limit: int) -> list[PolicyVersion]:
        """Newest first, from below `before_version`."""
        table = tables.versions.c
        query = sa.select(tables.versions).where(table.policy == policy)
        if before_version is not None:
            query = query.where(table.policy_version < before_version)
        rows = self._connection.execute(query.order_by(table.policy_version.desc()).limit(limit))
        return [_version(row) for row in rows]

    def version_by_key(self, key: PublicationKey) -> PolicyVersion | None:
        """The version that a publication of this key made."""
        table = tables.versions.c
        return self._one_version(
            (table.run_id == key.run_id)
            & (table.lineage_id == key.lineage_id)
            & (table.policy == key.policy)
            & (table.learner_update == key.learner_update)
        )

    def _one_version(self, condition: sa.ColumnElement[bool]) -> PolicyVersion | None:
        row = self._connection.execute(sa.select(tables.versions).where(condition)).one_or_none()
        return None if row is None else _version(row)

    def alias(self, policy: str, alias: str) -> AliasMove | None:
        """The move that put the alias where it is."""
        history = self.alias_history(policy, alias, 1)
        return history[0] if history else None

    def alias_history(self, policy: str, alias: str, limit: int) -> list[AliasMove]:
        """Newest first."""
        table = tables.alias_moves.c
        query = sa.select(tables.alias_moves).where((table.policy == policy) & (table.alias == alias))
        rows = self._connection.execute(query.order_by(table.position.desc()).limit(limit))
        return [_move(row) for row in rows]

    def intent(self, intent_id: str) -> tuple[str, tuple[str, ...]] | None:
        """(policy, digests) of an open intent."""
        table = tables.intents.c
        policy = self._connection.execute(
            sa.select(table.policy).where(table.intent_id == intent_id)
        ).scalar()
        if policy is None:
            return None
        named = tables.intent_digests.c
        digests = self._connection.execute(sa.select(named.digest).where(named.intent_id == intent_id))
        return policy, tuple(sorted(digests.scalars()))

    def needed_digests(self, keep_unaliased: int) -> set[str]:
        """Files that collection must leave (contracts L)."""
        needed = set(self._connection.execute(sa.select(tables.intent_digests.c.digest)).scalars())
        for query in (_aliased(), _newest_of_runs(), _newest_unaliased(keep_unaliased)):
            for row in self._connection.execute(query):
                needed.update(row)
        return needed

    # -- changes

    def lock_run(self, run_id: str) -> int:
        """Locks the run against other publications; the newest fencing token seen, 0 if none."""
        created = self._insert(tables.runs).values(run_id=run_id, newest_fencing_token=0)
        self._connection.execute(created.on_conflict_do_nothing())
        table = tables.runs.c
        query = sa.select(table.newest_fencing_token).where(table.run_id == run_id).with_for_update()
        return int(self._connection.execute(query).scalar_one())

    def set_fencing_token(self, run_id: str, fencing_token: int) -> None:
        """Notes the newest token of a locked run."""
        change = sa.update(tables.runs).where(tables.runs.c.run_id == run_id)
        self._connection.execute(change.values(newest_fencing_token=fencing_token))

    def lock_policy(self, policy: str) -> None:
        """Creates the policy if it is absent and locks it."""
        created = self._insert(tables.policies).values(
            policy=policy, created_at=time.time(), newest_version=0
        )
        self._connection.execute(created.on_conflict_do_nothing())
        table = tables.policies.c
        self._connection.execute(
            sa.select(table.policy).where(table.policy == policy).with_for_update()
        ).one()

    def next_version(self, policy: str) -> int:
        """Takes the next number of a locked policy."""
        table = tables.policies.c
        change = sa.update(tables.policies).where(table.policy == policy)
        taken = change.values(newest_version=table.newest_version + 1).returning(table.newest_version)
        return int(self._connection.execute(taken).scalar_one())

    def insert_version(self, version: PolicyVersion) -> None:
        """Adds a version."""
        self._connection.execute(sa.insert(tables.versions).values(**msgspec.structs.asdict(version)))

    def move_alias(self, move: AliasMove) -> None:
        """Points the alias to another version and writes the move to its history."""
        self._connection.execute(sa.insert(tables.alias_moves).values(**msgspec.structs.asdict(move)))
        place = self._insert(tables.aliases).values(
            policy=move.policy, alias=move.alias, policy_version=move.to_version
        )
        self._connection.execute(
            place.on_conflict_do_update(
                index_elements=["policy", "alias"], set_={"policy_version": move.to_version}
            )
        )

    def open_intent(self, intent_id: str, policy: str, digests: Sequence[str]) -> None:
        """Notes that a publication will need these files."""
        values = {"intent_id": intent_id, "policy": policy, "opened_at": time.time()}
        self._connection.execute(sa.insert(tables.intents).values(**values))
        rows = [{"intent_id": intent_id, "digest": digest} for digest in set(digests)]
        self._connection.execute(sa.insert(tables.intent_digests), rows)

    def close_intent(self, intent_id: str) -> None:
        """Forgets an intent."""
        self._connection.execute(sa.delete(tables.intents).where(tables.intents.c.intent_id == intent_id))

    def expire_intents(self, opened_before: float) -> int:
        """Forgets intents opened before; how many."""
        old = tables.intents.c.opened_at < opened_before
        return int(self._connection.execute(sa.delete(tables.intents).where(old)).rowcount)

    def mark_collected(self, keep: set[str]) -> int:
        """Marks the versions that have a file outside `keep` as collected; how many are new."""
        table = tables.versions.c
        columns = (table.policy, table.policy_version, *_digest_columns())
        rows = self._connection.execute(sa.select(*columns).where(table.collected_at.is_(None))).all()
        lost = [row for row in rows if not keep.issuperset(row[2:])]
        for row in lost:
            one = (table.policy == row.policy) & (table.policy_version == row.policy_version)
            change = sa.update(tables.versions).where(one)
            self._connection.execute(change.values(collected_at=time.time()))
        return len(lost)


def open_store(url: str) -> SqlRegistryStore:
    """Opens and migrates the database at `sqlite:///PATH` or `postgresql://…`.

    Raises:
        ConfigError: the URL names no database that we serve.
        StoreUnavailable: the database cannot be reached.
        SchemaVersionError: the database needs newer code.
    """
    engine = _engine(url)
    try:
        writer = engine.execution_options(**{_WRITE: True})
        with _domain_errors(), writer.connect() as connection, connection.begin():
            migrate(connection)
    except Exception:
        engine.dispose()
        raise
    return SqlRegistryStore(engine)


def _engine(url: str) -> sa.Engine:
    scheme, separator, rest = url.partition("://")
    if separator and scheme == "sqlite" and len(rest) > 1:
        return _sqlite_engine(Path(rest[1:]))
    if separator and scheme in ("postgresql", "postgres", "postgresql+psycopg"):
        return sa.create_engine(f"postgresql+psycopg://{rest}", pool_pre_ping=True, pool_size=4)
    raise ConfigError(
        f"the registry's database URL begins with {scheme!r}; use sqlite:///PATH or postgresql://USER@HOST/DATABASE"
    )


def _sqlite_engine(path: Path) -> sa.Engine:
    path.parent.mkdir(parents=True, exist_ok=True)
    url = sa.URL.create("sqlite", database=str(path))
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_SECONDS})
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver begins nothing; `_begin_sqlite` does
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    write = connection.get_execution_options().get(_WRITE, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


@contextmanager
def _domain_errors() -> Iterator[None]:
    try:
        yield
    except sa.exc.DBAPIError as error:
        raise _domain_error(error) from error
    except sa.exc.TimeoutError as error:
        raise StoreUnavailable(f"no free connection to the registry's database: {error}") from error


def _domain_error(error: sa.exc.DBAPIError) -> Exception:
    text = str(error.orig)
    if "disk is full" in text or getattr(error.orig, "sqlstate", None) == "53100":
        return StorageFull(f"the disk of the registry's database is full: {text}")
    if isinstance(error, sa.exc.OperationalError | sa.exc.InterfaceError) or error.connection_invalidated:
        return StoreUnavailable(f"the registry's database cannot be used now: {text}")
    return StoreError(f"the registry's database refused: {text}")


def _version(row: sa.Row[Any]) -> PolicyVersion:
    return PolicyVersion(**{name: getattr(row, name) for name in _VERSION_FIELDS})


def _move(row: sa.Row[Any]) -> AliasMove:
    return AliasMove(**{field: getattr(row, field) for field in AliasMove.__struct_fields__})


def _digest_columns() -> tuple[sa.ColumnElement[str], ...]:
    table = tables.versions.c
    return (table.graph_digest, table.weights_digest, table.golden_digest)


def _is_aliased() -> sa.ColumnElement[bool]:
    alias, version = tables.aliases.c, tables.versions.c
    same = (alias.policy == version.policy) & (alias.policy_version == version.policy_version)
    return sa.exists(sa.select(1).where(same))


def _aliased() -> sa.Select[*tuple[Any, ...]]:
    return sa.select(*_digest_columns()).where(_is_aliased())


def _newest_of_runs() -> sa.Select[*tuple[Any, ...]]:
    table = tables.versions.c
    newest = sa.select(table.policy, sa.func.max(table.policy_version)).group_by(table.policy, table.run_id)
    return sa.select(*_digest_columns()).where(sa.tuple_(table.policy, table.policy_version).in_(newest))


def _newest_unaliased(keep: int) -> sa.Select[*tuple[Any, ...]]:
    table = tables.versions.c
    rank = sa.func.row_number().over(partition_by=table.policy, order_by=table.policy_version.desc())
    ranked = sa.select(*_digest_columns(), rank.label("rank")).where(~_is_aliased()).subquery()
    return sa.select(ranked.c.graph_digest, ranked.c.weights_digest, ranked.c.golden_digest).where(
        ranked.c.rank <= keep
    )
