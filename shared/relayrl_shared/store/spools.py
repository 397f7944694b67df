"""Rows of spools: which sequences are settled, and what their clients report (contracts C2, D1).

`commits` and `quarantine` settle sequences; reports settle the dropped ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sqlalchemy import Connection, RowMapping, and_, bindparam, select, tuple_, update

from relayrl_shared.messages import SpoolReport
from relayrl_shared.store import sequences, tables
from relayrl_shared.store.database import insert_missing
from relayrl_shared.store.sequences import SequenceSet

Key = tuple[str, str]  # (run_id, spool_id)
Fate = Literal["stored", "conflict", "known"]  # as of `CommitResult`; what quarantine takes is a conflict


_NOTHING = SequenceSet()
_COUNTERS = {"highest_seen": 0, "quarantined": 0, "dropped": 0, "repeated": 0}
_EMPTY_ROW = {"known": sequences.encode(_NOTHING), **_COUNTERS}
_CHUNK = 200  # keys of one statement


@dataclass(frozen=True, slots=True)
class Spool:
    """The row of one spool of one run. The counters count sequences."""

    run_id: str
    spool_id: str
    known: SequenceSet = _NOTHING
    highest_seen: int = 0
    quarantined: int = 0
    dropped: int = 0
    repeated: int = 0
    highest_accepted: int | None = None
    oldest_unacknowledged: int | None = None

    @property
    def accepted(self) -> int:
        """Sequences that the client accepted, as far as this store knows."""
        return max(self.highest_accepted or 0, self.highest_seen)

    @property
    def waiting(self) -> int:
        """Sequences that the client still has: unsettled, and reported so or accepted after the report."""
        if self.highest_accepted is None:
            return 0
        later = self.highest_accepted + 1
        first = later if self.oldest_unacknowledged is None else self.oldest_unacknowledged
        return max(0, self.accepted - first + 1) - self.known.count(first, self.accepted)


def lock(connection: Connection, keys: Iterable[Key]) -> dict[Key, Spool]:
    """Locks the rows, made where they are missing, in sorted order; returns them (contracts D2)."""
    ordered = sorted(set(keys))
    found = _select(connection, ordered)
    missing = [key for key in ordered if key not in found]
    if missing:
        rows = [{"run_id": run_id, "spool_id": spool_id, **_EMPTY_ROW} for run_id, spool_id in missing]
        insert_missing(connection, tables.spools, rows)
        found |= _select(connection, missing)
    return found


def _select(connection: Connection, keys: Sequence[Key]) -> dict[Key, Spool]:
    columns, found = tables.spools.c, dict[Key, Spool]()
    for start in range(0, len(keys), _CHUNK):
        which = tuple_(columns.run_id, columns.spool_id).in_(keys[start : start + _CHUNK])
        query = select(tables.spools).where(which).order_by(columns.run_id, columns.spool_id)
        for row in connection.execute(query.with_for_update()).mappings():
            found[row["run_id"], row["spool_id"]] = _spool(row)
    return found


def _spool(row: RowMapping) -> Spool:
    return Spool(**{**row, "known": sequences.decode(row["known"])})


def save(connection: Connection, spools: Iterable[Spool]) -> None:
    """Writes the rows back."""
    columns = tables.spools.c
    which = and_(columns.run_id == bindparam("key_run"), columns.spool_id == bindparam("key_spool"))
    rows = [
        {
            "key_run": spool.run_id,
            "key_spool": spool.spool_id,
            "known": sequences.encode(spool.known),
            "highest_seen": spool.highest_seen,
            "quarantined": spool.quarantined,
            "dropped": spool.dropped,
            "repeated": spool.repeated,
            "highest_accepted": spool.highest_accepted,
            "oldest_unacknowledged": spool.oldest_unacknowledged,
        }
        for spool in spools
    ]
    if rows:
        connection.execute(update(tables.spools).where(which), rows)


def settle(spool: Spool, fates: Iterable[tuple[int, Fate]]) -> Spool:
    """The row after these sequences were settled, in order; each counts once, as what settled it first."""
    first: dict[int, Fate] = {}
    for sequence, fate in fates:
        if sequence not in spool.known:
            first.setdefault(sequence, fate)
    counted = Counter(first.values())
    return replace(
        spool,
        known=spool.known.add_sequences(first),
        highest_seen=max([spool.highest_seen, *first]),
        quarantined=spool.quarantined + counted["conflict"],
        repeated=spool.repeated + counted["known"],
    )


def report(connection: Connection, reports: Sequence[SpoolReport]) -> None:
    """Notes what clients say about their spools; ranges dropped by policy are settled."""
    rows = lock(connection, [(item.run_id, item.spool_id) for item in reports])
    for item in reports:
        spool = rows[item.run_id, item.spool_id]
        highest = max(item.highest_accepted, spool.highest_accepted or 0)
        known = spool.known.add((first, min(last, highest)) for first, last in item.dropped)
        spool = replace(
            spool,
            known=known,
            dropped=spool.dropped + len(known) - len(spool.known),
            highest_accepted=highest,
            oldest_unacknowledged=item.oldest_unacknowledged,
        )
        rows[item.run_id, item.spool_id] = spool
    save(connection, rows.values())


def of_run(connection: Connection, run_id: str) -> list[Spool]:
    """The spools of a run."""
    query = select(tables.spools).where(tables.spools.c.run_id == run_id)
    return [_spool(row) for row in connection.execute(query).mappings()]
