"""Rows of what could not be accepted, whole, within bounds (contracts D1, D4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import blake3
import msgspec
from sqlalchemy import Connection, RowMapping, and_, select

from relayrl_shared.store import spools, tables
from relayrl_shared.store.database import Row, insert, upsert
from relayrl_shared.store.interface import Quarantined


@dataclass(frozen=True, slots=True)
class QuarantineLimits:
    """What a run may keep, headers and payloads together in bytes.

    Beyond either limit, rows keep a short header, reason and digest, and lose their payload.
    """

    rows: int = 10_000
    payload_bytes: int = 256 << 20


MAX_HEADER_BYTES = 64 << 10
"""Of a header; what is cut is no msgpack any more, and the detail says so."""

MAX_HEADER_BYTES_BEYOND = 4 << 10
"""Of a header beyond the limits; one that is valid fits."""

MAX_DETAIL_CHARACTERS = 4096


def put(connection: Connection, rows: Sequence[Quarantined], limits: QuarantineLimits, now: float) -> None:
    """Adds the rows; one that names a spool and sequence and is there already is not added again."""
    distinct = {_identity(row, index): (row, _digest(row)) for index, row in enumerate(rows)}
    kept = [(row, digest) for row, digest in distinct.values() if not _is_there(connection, row, digest)]
    for run_id in sorted({row.run_id or "" for row, _ in kept}):
        of_run = [(row, digest) for row, digest in kept if (row.run_id or "") == run_id]
        _put_of_run(connection, run_id, of_run, limits, now)


def settle(connection: Connection, rows: Sequence[Quarantined]) -> None:
    """Settles the sequences that the rows name."""
    named = [
        ((row.run_id, row.spool_id), row.sequence)
        for row in rows
        if row.run_id is not None and row.spool_id is not None and row.sequence is not None
    ]
    rows_by_key = spools.lock(connection, [key for key, _ in named])
    settled = [
        spools.settle(spool, [(sequence, "conflict") for named_key, sequence in named if named_key == key])
        for key, spool in rows_by_key.items()
    ]
    spools.save(connection, settled)


def _identity(row: Quarantined, index: int) -> tuple[object, ...]:
    """Equal for rows that are the same trajectory sent again; what names no sequence is never the same."""
    if row.spool_id is None or row.sequence is None:
        return (index,)
    return (row.run_id, row.spool_id, row.sequence, row.payload)


def _digest(row: Quarantined) -> str:
    return blake3.blake3(row.payload or b"").hexdigest()


def _is_there(connection: Connection, row: Quarantined, digest: str) -> bool:
    table = tables.quarantine
    if row.spool_id is None or row.sequence is None:
        return False
    same = and_(
        table.c.digest == digest,
        table.c.run_id == (row.run_id or ""),
        table.c.spool_id == row.spool_id,
        table.c.sequence == row.sequence,
    )
    return connection.execute(select(table.c.quarantine_id).where(same).limit(1)).first() is not None


def _put_of_run(
    connection: Connection,
    run_id: str,
    rows: Sequence[tuple[Quarantined, str]],
    limits: QuarantineLimits,
    now: float,
) -> None:
    totals = _lock_totals(connection, run_id)
    count, size, dropped = int(totals["rows"]), int(totals["payload_bytes"]), int(totals["payloads_dropped"])
    new: list[Row] = []
    for row, digest in rows:
        kept = _cut(row, MAX_HEADER_BYTES)
        if count >= limits.rows or size + _size(kept) > limits.payload_bytes:
            dropped += kept.payload is not None
            kept = _cut(msgspec.structs.replace(row, payload=None), MAX_HEADER_BYTES_BEYOND)
        count, size = count + 1, size + _size(kept)
        new.append(_row(kept, run_id, digest, now))
    connection.execute(insert(connection, tables.quarantine), [dict(row) for row in new])
    values = {"rows": count, "payload_bytes": size, "payloads_dropped": dropped}
    upsert(connection, tables.quarantine_totals, {"run_id": run_id, **values})


def _size(row: Quarantined) -> int:
    return len(row.header) + len(row.payload or b"")


def _cut(row: Quarantined, header_bytes: int) -> Quarantined:
    """The row with a bounded header and detail."""
    detail = row.detail[:MAX_DETAIL_CHARACTERS]
    if len(row.header) > header_bytes:
        detail += f" (header cut from {len(row.header)} to {header_bytes} bytes)"
    return msgspec.structs.replace(row, header=row.header[:header_bytes], detail=detail)


def _lock_totals(connection: Connection, run_id: str) -> RowMapping:
    totals = tables.quarantine_totals
    empty = {"run_id": run_id, "rows": 0, "payload_bytes": 0, "payloads_dropped": 0}
    connection.execute(insert(connection, totals).values(empty).on_conflict_do_nothing())
    query = select(totals).where(totals.c.run_id == run_id).with_for_update()
    return connection.execute(query).mappings().one()


def _row(row: Quarantined, run_id: str, digest: str, now: float) -> Row:
    return {
        "run_id": run_id,
        "spool_id": row.spool_id,
        "sequence": row.sequence,
        "trajectory_id": row.trajectory_id,
        "reason": row.reason,
        "detail": row.detail,
        "digest": digest,
        "header": row.header,
        "payload": row.payload,
        "received_at": row.received_at or now,
    }


def find(connection: Connection, run_id: str | None, limit: int) -> list[Quarantined]:
    """The newest rows first, of the run or of all."""
    table = tables.quarantine
    query = select(table).order_by(table.c.quarantine_id.desc()).limit(limit)
    if run_id is not None:
        query = query.where(table.c.run_id == run_id)
    return [_quarantined(row) for row in connection.execute(query).mappings()]


def _quarantined(row: RowMapping) -> Quarantined:
    return Quarantined(
        reason=row["reason"],
        detail=row["detail"],
        header=row["header"],
        payload=row["payload"],
        run_id=row["run_id"] or None,
        spool_id=row["spool_id"],
        sequence=row["sequence"],
        trajectory_id=row["trajectory_id"],
        received_at=row["received_at"],
    )


def count(connection: Connection, run_id: str) -> int:
    """Rows of the run, those that lost their payload included."""
    totals = tables.quarantine_totals
    found: int | None = connection.scalar(select(totals.c.rows).where(totals.c.run_id == run_id))
    return found or 0
