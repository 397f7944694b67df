"""Rows that the learner of a run writes: lease, demand, updates and uses (contracts E2, G1, G2)."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, RowMapping, and_, func, select, update

from relayrl_shared.errors import LeaseLost, StoreError
from relayrl_shared.store import tables
from relayrl_shared.store.database import Database, Row, insert, lock, upsert
from relayrl_shared.store.interface import Use

_leases, _updates, _uses = tables.learner_leases, tables.updates, tables.uses


def acquire_lease(connection: Connection, run_id: str, holder: str, now: float, ttl_seconds: float) -> int:
    """A token greater than all before it.

    Raises:
        LeaseLost: another holder has the lease and it has not expired.
    """
    lock(connection, "lease", [run_id])
    held = _lease(connection, run_id)
    if held is not None and held["expires_at"] > now and held["holder"] != holder:
        left = held["expires_at"] - now
        raise LeaseLost(f"run {run_id}: {held['holder']} holds the lease for another {left:.1f} s")
    token = 1 if held is None else int(held["token"]) + 1
    row = {"run_id": run_id, "token": token, "holder": holder, "expires_at": now + ttl_seconds}
    upsert(connection, _leases, row)
    return token


def _lease(connection: Connection, run_id: str) -> RowMapping | None:
    query = select(_leases).where(_leases.c.run_id == run_id).with_for_update()
    return connection.execute(query).mappings().first()


def extend_lease(connection: Connection, run_id: str, token: int, expires_at: float) -> None:
    """Moves the end of the lease; 0 releases it, and the token stays spent.

    Raises:
        LeaseLost: a newer token was given, or this one was released.
    """
    mine = and_(_leases.c.run_id == run_id, _leases.c.token == token, _leases.c.expires_at > 0)
    if connection.execute(update(_leases).where(mine).values(expires_at=expires_at)).rowcount == 0:
        raise LeaseLost(f"run {run_id}: the lease with token {token} was given up or taken over")


def check_token(connection: Connection, run_id: str, token: int) -> None:
    """Locks the lease row against a takeover until the transaction ends.

    Raises:
        LeaseLost: a newer token was given.
    """
    held = _lease(connection, run_id)
    if held is not None and held["token"] > token:
        raise LeaseLost(f"run {run_id}: token {token} is older than {held['token']} of {held['holder']}")


def record_update(database: Database, connection: Connection, row: Row, uses: Sequence[Use]) -> None:
    """Writes an update and its uses; the same again changes nothing but a policy_version that was null.

    row: the key (run_id, lineage_id, policy, learner_update), parent_lineage_id, policy_version and
    fencing_token.

    Raises:
        LeaseLost: the fencing token is older than the run's.
        StoreError: the key is there with other uses.
    """
    check_token(connection, row["run_id"], row["fencing_token"])
    key = {name: row[name] for name in ("run_id", "lineage_id", "policy", "learner_update")}
    ordinal = _next_ordinal(connection, row["run_id"])
    new = {**row, "ordinal": ordinal, "recorded_at": database.now(connection)}
    statement = insert(connection, _updates).values(new).on_conflict_do_nothing(index_elements=list(key))
    if connection.execute(statement.returning(_updates.c.ordinal)).first() is None:
        _repeat(connection, key, row["policy_version"], uses)
    elif uses:
        database.insert_rows(connection, _uses, [_use_row(key, use) for use in _distinct(uses)])


def _distinct(uses: Sequence[Use]) -> list[Use]:
    by_id = {use.trajectory_id: use for use in uses}
    if len(by_id) < len(set(uses)):
        raise StoreError("one update names a trajectory twice, with different positions or outcomes")
    return list(by_id.values())


def _next_ordinal(connection: Connection, run_id: str) -> int:
    lock(connection, "ordinal", [run_id])
    last: int | None = connection.scalar(
        select(func.max(_updates.c.ordinal)).where(_updates.c.run_id == run_id)
    )
    return 1 if last is None else last + 1


def _use_row(key: Row, use: Use) -> Row:
    return {**key, "trajectory_id": use.trajectory_id, "position": use.position, "outcome": use.outcome}


def _repeat(connection: Connection, key: Row, policy_version: int | None, uses: Sequence[Use]) -> None:
    same = and_(*(_uses.c[name] == value for name, value in key.items()))
    query = select(_uses.c.trajectory_id, _uses.c.position, _uses.c.outcome).where(same)
    known = {
        Use(trajectory_id=r.trajectory_id, position=r.position, outcome=r.outcome)
        for r in connection.execute(query)
    }
    if known != set(uses):
        raise StoreError(
            f"update {key['learner_update']} of lineage {key['lineage_id']} is there with other uses"
        )
    if policy_version is not None:
        which = and_(
            *(_updates.c[name] == value for name, value in key.items()), _updates.c.policy_version.is_(None)
        )
        connection.execute(update(_updates).where(which).values(policy_version=policy_version))


def newest_lineage(connection: Connection, run_id: str) -> str | None:
    """The lineage that recorded last; None before the first update."""
    query = select(_updates.c.lineage_id).where(_updates.c.run_id == run_id)
    found: str | None = connection.scalar(query.order_by(_updates.c.ordinal.desc()).limit(1))
    return found


def learner_update(connection: Connection, run_id: str) -> int:
    """Finished updates along the newest lineage; 0 before the first."""
    lineage_id = newest_lineage(connection, run_id)
    mine = and_(_updates.c.run_id == run_id, _updates.c.lineage_id == lineage_id)
    found: int | None = connection.scalar(select(func.max(_updates.c.learner_update)).where(mine))
    return found or 0


def demand(connection: Connection, run_id: str) -> tuple[int, int] | None:
    """(learner_update, cumulative steps wanted)."""
    demands = tables.demands
    row = connection.execute(select(demands).where(demands.c.run_id == run_id)).mappings().first()
    return None if row is None else (row["learner_update"], row["steps"])
