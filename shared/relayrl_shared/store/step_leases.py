"""Steps granted to clients out of the learner's demand (contracts E2); rows written by ingest."""

from __future__ import annotations

from sqlalchemy import Connection, and_, func, select

from relayrl_shared.store import reading, tables
from relayrl_shared.store.database import lock, upsert

_leases = tables.step_leases


def grant(
    connection: Connection,
    run_id: str,
    client_id: str,
    *,
    demanded: int,
    wanted: int,
    used: int,
    now: float,
    ttl_seconds: float,
) -> int:
    """Steps granted now; renews what the client holds. Expired grants are in the pool again.

    demanded: cumulative steps of the learner. used: granted steps that became data since the last call.
    """
    lock(connection, "steps", [run_id])
    held = max(0, _unused(connection, run_id, now, client_id) - used)
    others = _unused(connection, run_id, now) - _unused(connection, run_id, now, client_id)
    pool = demanded - reading.stored_steps(connection, run_id) - others - held
    granted = max(0, min(wanted, pool))
    row = {"run_id": run_id, "client_id": client_id}
    upsert(connection, _leases, {**row, "unused_steps": held + granted, "expires_at": now + ttl_seconds})
    return granted


def _unused(connection: Connection, run_id: str, now: float, client_id: str | None = None) -> int:
    live = and_(_leases.c.run_id == run_id, _leases.c.expires_at > now)
    query = select(func.coalesce(func.sum(_leases.c.unused_steps), 0)).where(live)
    if client_id is not None:
        query = query.where(_leases.c.client_id == client_id)
    return int(connection.scalar(query) or 0)
