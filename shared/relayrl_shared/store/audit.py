"""The audit of a run: what became of everything that clients accepted (contracts C2, G1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, and_, case, func, or_, select

from relayrl_shared.store import learner_rows, spools, tables
from relayrl_shared.store.interface import Audit

_log, _updates, _uses = tables.trajectory_log, tables.updates, tables.uses


@dataclass(frozen=True, slots=True)
class Delivery:
    """The half that ingest's tables tell."""

    accepted: int
    stored: int
    quarantined: int
    dropped: int
    in_spool: int
    stored_twice: int

    @property
    def missing(self) -> int:
        """What the identity leaves unexplained."""
        return self.accepted - self.stored - self.quarantined - self.dropped - self.in_spool


@dataclass(frozen=True, slots=True)
class Consumption:
    """The half that the learner's tables tell, along the surviving lineage. Counts of trajectories."""

    used: int
    used_twice: int
    unused: Mapping[str, int]
    decided: int


@dataclass(frozen=True, slots=True)
class Branch:
    """The updates of one lineage: (first, last) by policy, and the lineage that it came from."""

    parent: str | None
    updates: Mapping[str, tuple[int, int]]


def delivery(connection: Connection, run_id: str) -> Delivery:
    """Counts the run's log and spools. A trajectory that two sequences carry counts as accepted once."""
    rows = spools.of_run(connection, run_id)
    distinct = (func.count(_log.c.trajectory_id.distinct()), func.count())
    ids, stored = connection.execute(select(*distinct).where(_log.c.run_id == run_id)).one()
    return Delivery(
        accepted=sum(spool.accepted - spool.repeated for spool in rows),
        stored=stored,
        quarantined=sum(spool.quarantined for spool in rows),
        dropped=sum(spool.dropped for spool in rows),
        in_spool=sum(spool.waiting for spool in rows),
        stored_twice=stored - ids,
    )


def consumption(connection: Connection, run_id: str) -> Consumption:
    """Counts the run's uses along the surviving lineage; a trajectory used and passed over counts as used."""
    surviving = survivors(_branches(connection, run_id), learner_rows.newest_lineage(connection, run_id))
    if not surviving:
        return Consumption(0, 0, {}, 0)
    used = func.sum(case((_uses.c.outcome == "used", 1), else_=0))
    times = (
        select(
            _uses.c.policy,
            _uses.c.trajectory_id,
            used.label("used"),
            func.min(_uses.c.outcome).label("outcome"),
        )
        .where(_uses.c.run_id == run_id, or_(*(_within(*part) for part in surviving)))
        .group_by(_uses.c.policy, _uses.c.trajectory_id)
        .subquery()
    )
    outcome = case((times.c.used > 0, "used"), else_=times.c.outcome).label("outcome")
    query = select(
        outcome, func.count().label("number"), func.sum(case((times.c.used > 1, 1), else_=0)).label("twice")
    )
    rows = connection.execute(query.group_by(outcome)).all()
    numbers = {row.outcome: int(row.number) for row in rows}
    unused = {name: number for name, number in sorted(numbers.items()) if name != "used"}
    return Consumption(numbers.get("used", 0), sum(int(r.twice) for r in rows), unused, sum(numbers.values()))


def _within(lineage_id: str, policy: str, last: int) -> ColumnElement[bool]:
    mine = and_(_uses.c.lineage_id == lineage_id, _uses.c.policy == policy)
    return and_(mine, _uses.c.learner_update <= last)


def _branches(connection: Connection, run_id: str) -> dict[str, Branch]:
    query = (
        select(
            _updates.c.lineage_id,
            _updates.c.policy,
            func.min(_updates.c.learner_update).label("first"),
            func.max(_updates.c.learner_update).label("last"),
            func.max(_updates.c.parent_lineage_id).label("parent"),
        )
        .where(_updates.c.run_id == run_id)
        .group_by(_updates.c.lineage_id, _updates.c.policy)
    )
    branches: dict[str, Branch] = {}
    for row in connection.execute(query):
        before = branches.get(row.lineage_id, Branch(None, {}))
        updates = {**before.updates, row.policy: (row.first, row.last)}
        branches[row.lineage_id] = Branch(before.parent or row.parent, updates)
    return branches


def survivors(branches: Mapping[str, Branch], newest: str | None) -> list[tuple[str, str, int]]:
    """(lineage_id, policy, last surviving update), from the newest lineage back through its parents.

    An ancestor survives up to the update before the one where its descendants began.
    """
    found: list[tuple[str, str, int]] = []
    began: dict[str, int] = {}
    visited: set[str] = set()
    while newest is not None and newest in branches and newest not in visited:
        visited.add(newest)
        branch = branches[newest]
        earliest = min(began.values(), default=None)
        for policy, (first, last) in branch.updates.items():
            limit = began.get(policy, earliest)
            found.append((newest, policy, last if limit is None else min(last, limit - 1)))
            began[policy] = min(first, began.get(policy, first))
        newest = branch.parent
    return found


def combine(run_id: str, delivered: Delivery, consumed: Consumption) -> Audit:
    """Both halves as one."""
    return Audit(
        run_id=run_id,
        accepted=delivered.accepted,
        stored=delivered.stored,
        quarantined=delivered.quarantined,
        dropped=delivered.dropped,
        in_spool=delivered.in_spool,
        missing=delivered.missing,
        stored_twice=delivered.stored_twice,
        used=consumed.used,
        used_twice=consumed.used_twice,
        unused=dict(consumed.unused),
        unread=max(0, delivered.stored - consumed.decided),
    )
