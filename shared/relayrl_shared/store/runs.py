"""Rows of runs, their clients and actors, and schemas; written by ingest (contracts C4, K3)."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from sqlalchemy import ColumnElement, Connection, RowMapping, and_, func, select, update

from relayrl_shared.errors import StoreError
from relayrl_shared.messages import ActorInfo
from relayrl_shared.store import tables
from relayrl_shared.store.database import Row, insert, insert_missing, lock, upsert
from relayrl_shared.store.interface import Run, RunState, StoredActor


def create(connection: Connection, run: Run, now: float) -> Run:
    """Stores the run, or returns the one of that name; safe when several do it at once.

    Raises:
        StoreError: the run_id belongs to a run of another name.
    """
    run = run if run.created_at else msgspec.structs.replace(run, created_at=now)
    row = {
        "run_id": run.run_id,
        "name": run.name,
        "definition": msgspec.msgpack.encode(run),
        "state": run.state,
        "state_reason": run.state_reason,
        "created_at": run.created_at,
    }
    insert_missing(connection, tables.runs, [row])
    stored = find(connection, tables.runs.c.name == run.name)
    if not stored:
        raise StoreError(f"run id {run.run_id} belongs to a run of another name than {run.name!r}")
    return stored[0]


def find(connection: Connection, *conditions: ColumnElement[bool]) -> list[Run]:
    """The runs that meet the conditions, oldest first."""
    query = select(tables.runs).where(*conditions).order_by(tables.runs.c.created_at, tables.runs.c.run_id)
    return [_run(row) for row in connection.execute(query).mappings()]


def _run(row: RowMapping) -> Run:
    run = msgspec.msgpack.decode(row["definition"], type=Run)
    return msgspec.structs.replace(run, state=row["state"], state_reason=row["state_reason"])


def set_state(connection: Connection, run_id: str, state: RunState, reason: str) -> None:
    """Notes the state of a run and why."""
    values = {"state": state, "state_reason": reason}
    connection.execute(update(tables.runs).where(tables.runs.c.run_id == run_id).values(values))


def join_client(
    connection: Connection,
    run_id: str,
    client_id: str,
    actors: Sequence[ActorInfo],
    first_rollout_index: int,
    now: float,
) -> int:
    """Registers the client with these actors and no others; returns its index, the same for ever."""
    lock(connection, "clients", [run_id])
    client_index = _client_index(connection, run_id, client_id)
    row = {"run_id": run_id, "client_id": client_id, "client_index": client_index}
    upsert(connection, tables.clients, {**row, "last_seen_at": now, "left_at": None})
    _leave(connection, _actors_of(run_id, client_id), now)
    _put_actors(connection, run_id, client_id, actors, first_rollout_index)
    return client_index


def _client_index(connection: Connection, run_id: str, client_id: str) -> int:
    clients = tables.clients
    of_run = select(clients.c.client_index).where(clients.c.run_id == run_id)
    known: int | None = connection.scalar(of_run.where(clients.c.client_id == client_id))
    if known is not None:
        return known
    highest: int | None = connection.scalar(
        select(func.max(clients.c.client_index)).where(clients.c.run_id == run_id)
    )
    return 0 if highest is None else highest + 1


def change_actors(
    connection: Connection,
    run_id: str,
    client_id: str,
    added: Sequence[ActorInfo],
    removed: Sequence[str],
    first_rollout_index: int,
    now: float,
) -> None:
    """Notes actors that left and that joined."""
    if removed:
        gone = tables.actors.c.actor_id.in_(removed)
        _leave(connection, and_(_actors_of(run_id, client_id), gone), now)
    _put_actors(connection, run_id, client_id, added, first_rollout_index)


def _actors_of(run_id: str, client_id: str) -> ColumnElement[bool]:
    return and_(tables.actors.c.run_id == run_id, tables.actors.c.client_id == client_id)


def _leave(connection: Connection, which: ColumnElement[bool], now: float) -> None:
    live = tables.actors.c.left_at.is_(None)
    connection.execute(update(tables.actors).where(which, live).values(left_at=now))


def _put_actors(
    connection: Connection,
    run_id: str,
    client_id: str,
    actors: Sequence[ActorInfo],
    first_rollout_index: int,
) -> None:
    owner = {"run_id": run_id, "client_id": client_id, "first_rollout_index": first_rollout_index}
    rows: list[Row] = [{**owner, "left_at": None, **msgspec.structs.asdict(actor)} for actor in actors]
    if not rows:
        return
    statement = insert(connection, tables.actors)
    values = {name: statement.excluded[name] for name in rows[0]}
    key = ["run_id", "client_id", "actor_id"]
    connection.execute(
        statement.on_conflict_do_update(index_elements=key, set_=values), [dict(r) for r in rows]
    )


def touch_client(connection: Connection, run_id: str, client_id: str, now: float) -> bool:
    """Notes that the client is there; False if it never joined or has left."""
    clients = tables.clients
    which = and_(clients.c.run_id == run_id, clients.c.client_id == client_id, clients.c.left_at.is_(None))
    return connection.execute(update(clients).where(which).values(last_seen_at=now)).rowcount > 0


def leave_client(connection: Connection, run_id: str, client_id: str, now: float) -> None:
    """Marks the client and its actors as left, and gives back its steps."""
    clients, leases = tables.clients, tables.step_leases
    which = and_(clients.c.run_id == run_id, clients.c.client_id == client_id, clients.c.left_at.is_(None))
    connection.execute(update(clients).where(which).values(left_at=now))
    _leave(connection, _actors_of(run_id, client_id), now)
    lease = and_(leases.c.run_id == run_id, leases.c.client_id == client_id)
    connection.execute(update(leases).where(lease).values(unused_steps=0))


def silent_clients(connection: Connection, silent_since: float) -> list[tuple[str, str]]:
    """(run_id, client_id) of the clients that have not left and were last seen before that time, sorted."""
    clients = tables.clients
    silent = and_(clients.c.left_at.is_(None), clients.c.last_seen_at < silent_since)
    query = select(clients.c.run_id, clients.c.client_id).where(silent)
    query = query.order_by(clients.c.run_id, clients.c.client_id).with_for_update()
    return [(row.run_id, row.client_id) for row in connection.execute(query)]


def live_actors(connection: Connection, run_id: str) -> list[StoredActor]:
    """The actors of the run that have not left, by (client_index, actor_index)."""
    actors, clients = tables.actors, tables.clients
    same = and_(actors.c.run_id == clients.c.run_id, actors.c.client_id == clients.c.client_id)
    query = (
        select(actors, clients.c.client_index, clients.c.last_seen_at)
        .join(clients, same)
        .where(actors.c.run_id == run_id, actors.c.left_at.is_(None))
        .order_by(clients.c.client_index, actors.c.actor_index, actors.c.actor_id)
    )
    return [_stored_actor(row) for row in connection.execute(query).mappings()]


def _stored_actor(row: RowMapping) -> StoredActor:
    info = ActorInfo(
        actor_id=row["actor_id"],
        actor_index=row["actor_index"],
        agent_id=row["agent_id"],
        environment_instance_id=row["environment_instance_id"],
    )
    return StoredActor(
        info=info,
        client_id=row["client_id"],
        client_index=row["client_index"],
        first_rollout_index=row["first_rollout_index"],
        last_seen_at=row["last_seen_at"],
        left_at=row["left_at"],
    )


def put_schema(connection: Connection, digest: str, schema: bytes) -> None:
    """Keeps the bytes behind a schema digest; the first ones stay."""
    insert_missing(connection, tables.schemas, [{"digest": digest, "schema": schema}])


def schema(connection: Connection, digest: str) -> bytes | None:
    """The bytes behind a schema digest."""
    found: bytes | None = connection.scalar(
        select(tables.schemas.c.schema).where(tables.schemas.c.digest == digest)
    )
    return found
