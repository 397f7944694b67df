"""Rows of spools: which sequences are settled, and what their clients report (contracts C2, D1).

`commits` and `quarantine` settle sequences; reports settle the dropped ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from sqlalchemy import Connection, and_, select, update

from relayrl_shared.messages import SpoolReport
from relayrl_shared.store import sequences, tables
from relayrl_shared.store.database import insert_missing
from relayrl_shared.store.sequences import SequenceSet

Key = tuple[str, str]  # (run_id, spool_id)


_NOTHING = SequenceSet()


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
    empty = sequences.encode(SequenceSet())
    counters = {"known": empty, "highest_seen": 0, "quarantined": 0, "dropped": 0, "repeated": 0}
    found: dict[Key, Spool] = {}
    for run_id, spool_id in ordered:
        spool = _select(connection, run_id, spool_id)
        if spool is None:
            insert_missing(connection, tables.spools, [{"run_id": run_id, "spool_id": spool_id, **counters}])
            spool = _select(connection, run_id, spool_id)
        found[run_id, spool_id] = spool or Spool(run_id, spool_id)
    return found


def _select(connection: Connection, run_id: str, spool_id: str) -> Spool | None:
    spools = tables.spools
    which = and_(spools.c.run_id == run_id, spools.c.spool_id == spool_id)
    row = connection.execute(select(spools).where(which).with_for_update()).mappings().first()
    return None if row is None else Spool(**{**row, "known": sequences.decode(row["known"])})


def save(connection: Connection, spool: Spool) -> None:
    """Writes the row back."""
    spools = tables.spools
    which = and_(spools.c.run_id == spool.run_id, spools.c.spool_id == spool.spool_id)
    values = {
        "known": sequences.encode(spool.known),
        "highest_seen": spool.highest_seen,
        "quarantined": spool.quarantined,
        "dropped": spool.dropped,
        "repeated": spool.repeated,
        "highest_accepted": spool.highest_accepted,
        "oldest_unacknowledged": spool.oldest_unacknowledged,
    }
    connection.execute(update(spools).where(which).values(values))


def settle(
    spool: Spool, stored: Sequence[int], quarantined: Sequence[int] = (), repeated: Sequence[int] = ()
) -> Spool:
    """The row after these sequences were settled; each counts once, in the first way that settled it."""
    new = SequenceSet().add_sequences(s for s in stored if s not in spool.known)
    bad = {s for s in quarantined if s not in spool.known and s not in new}
    again = {s for s in repeated if s not in spool.known and s not in new} - bad
    everything = [*stored, *quarantined, *repeated]
    return replace(
        spool,
        known=spool.known.add_sequences(everything),
        highest_seen=max([spool.highest_seen, *everything]),
        quarantined=spool.quarantined + len(bad),
        repeated=spool.repeated + len(again),
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
    for spool in rows.values():
        save(connection, spool)


def of_run(connection: Connection, run_id: str) -> list[Spool]:
    """The spools of a run."""
    query = select(tables.spools).where(tables.spools.c.run_id == run_id)
    return [
        Spool(**{**row, "known": sequences.decode(row["known"])})
        for row in connection.execute(query).mappings()
    ]
