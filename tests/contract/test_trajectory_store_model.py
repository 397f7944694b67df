"""Every store against a model of sets and lists, over random histories; each test runs on each store."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from relayrl_shared.messages import SpoolReport
from relayrl_shared.store.interface import IncomingTrajectory, Quarantined, TrajectoryStore
from relayrl_shared.testing.store import make_trajectory

pytestmark = pytest.mark.postgres

_histories = itertools.count(1)

SEQUENCES = st.integers(1, 6)
SPOOLS = st.sampled_from(["a", "b"])


class Model:
    """One run as the contracts describe it, with a set for everything."""

    def __init__(self) -> None:
        self.log: list[
            tuple[str, str, str, int, tuple[str, int]]
        ] = []  # id, digest, spool, sequence, segment
        self.fate: dict[tuple[str, int], str] = {}  # (spool, sequence) → how it was settled first
        self.quarantined: set[tuple[str, int, bytes]] = set()
        self.accepted: dict[str, int] = {}
        self.oldest: dict[str, int | None] = {}

    def send(self, item: IncomingTrajectory) -> str:
        """What must become of the trajectory."""
        metadata = item.metadata
        key, segment = (
            (metadata.spool_id, metadata.sequence),
            (metadata.episode_id, metadata.segment_index),
        )
        outcome = self._outcome(item, key, segment)
        if outcome == "stored":
            self.log.append((metadata.trajectory_id, metadata.body_digest, *key, segment))
        if outcome == "conflict":
            frames = (item.body, item.final_observation or b"")
            self.quarantined.add((*key, msgspec.msgpack.encode(frames)))
        self.fate.setdefault(key, {"known": "repeated", "conflict": "quarantined"}.get(outcome, outcome))
        return outcome

    def _outcome(self, item: IncomingTrajectory, key: tuple[str, int], segment: tuple[str, int]) -> str:
        for trajectory_id, digest, *_ in self.log:
            if trajectory_id == item.metadata.trajectory_id:
                return "known" if digest == item.metadata.body_digest else "conflict"
        if any((spool, sequence) == key for _, _, spool, sequence, _ in self.log):
            return "conflict"
        if key in self.fate:
            return "known"
        return "conflict" if any(row[-1] == segment for row in self.log) else "stored"

    def reject(self, spool: str, sequence: int, payload: bytes) -> None:
        """Ingest found it invalid."""
        self.quarantined.add((spool, sequence, payload))
        self.fate.setdefault((spool, sequence), "quarantined")

    def report(self, spool: str, highest: int, oldest: int | None, dropped: Sequence[int]) -> None:
        """The client says what its spool holds."""
        self.accepted[spool] = max(highest, self.accepted.get(spool, 0))
        self.oldest[spool] = oldest
        for sequence in dropped:
            if sequence <= self.accepted[spool]:
                self.fate.setdefault((spool, sequence), "dropped")

    def identity(self) -> tuple[int, int, int, int, int]:
        """(accepted, stored, quarantined, dropped, in spool)."""
        fates = list(self.fate.values())
        accepted, waiting = -fates.count("repeated"), 0
        for spool in {spool for spool, _ in self.fate} | set(self.accepted):
            seen = [s for (name, s), fate in self.fate.items() if name == spool and fate != "dropped"]
            top = max([self.accepted.get(spool, 0), *seen])
            accepted += top
            if spool in self.accepted:
                reported, oldest = self.accepted[spool], self.oldest[spool]
                first = reported + 1 if oldest is None else oldest
                waiting += sum((spool, s) not in self.fate for s in range(first, top + 1))
        return (accepted, len(self.log), fates.count("quarantined"), fates.count("dropped"), waiting)


class StoreMachine(RuleBasedStateMachine):
    """Does the same to the store and to the model, in a run of its own."""

    under_test: ClassVar[TrajectoryStore]

    def __init__(self) -> None:
        super().__init__()
        self.store, self.model = self.under_test, Model()
        self.run_id = f"history-{next(_histories)}"

    def trajectory(self, spool: str, sequence: int, trick: str) -> IncomingTrajectory:
        """A trajectory, plain or with something wrong about it."""
        name = f"{self.run_id}-{spool}-{sequence}"
        changes: dict[str, Any] = {"trajectory_id": name, "episode_id": name}
        if trick == "other id":
            changes["trajectory_id"] = f"{name}-other"
        if trick == "first segment":
            changes["episode_id"] = f"{self.run_id}-a-1"
        if trick == "first id":
            changes["trajectory_id"] = changes["episode_id"] = f"{self.run_id}-a-1"
        body = b"other" if trick == "other body" else changes["trajectory_id"].encode()
        return make_trajectory(sequence, body=body, run_id=self.run_id, spool_id=spool, **changes)

    tricks = st.sampled_from(["", "", "", "other body", "other id", "first segment", "first id"])

    @rule(picks=st.lists(st.tuples(SPOOLS, SEQUENCES, tricks), max_size=6))
    def commit(self, picks: list[tuple[str, int, str]]) -> None:
        """A batch, with repeats and contradictions."""
        batch = [self.trajectory(*pick) for pick in picks]
        expected = [self.model.send(item) for item in batch]
        assert [result.outcome for result in self.store.commit(batch)] == expected

    @rule(spool=SPOOLS, sequence=SEQUENCES, payload=st.sampled_from([b"x", b"y"]))
    def quarantine(self, spool: str, sequence: int, payload: bytes) -> None:
        """An invalid trajectory."""
        self.model.reject(spool, sequence, payload)
        row = Quarantined(
            reason="nan",
            detail="",
            header=b"",
            payload=payload,
            run_id=self.run_id,
            spool_id=spool,
            sequence=sequence,
        )
        self.store.quarantine([row])

    @rule(
        spool=SPOOLS,
        highest=st.integers(0, 7),
        oldest=st.none() | SEQUENCES,
        dropped=st.lists(SEQUENCES, max_size=2),
    )
    def report(self, spool: str, highest: int, oldest: int | None, dropped: list[int]) -> None:
        """A heartbeat."""
        self.model.report(spool, highest, oldest, dropped)
        said = SpoolReport(
            spool_id=spool,
            run_id=self.run_id,
            highest_accepted=highest,
            oldest_unacknowledged=oldest,
            dropped=tuple((sequence, sequence) for sequence in dropped),
        )
        self.store.touch_client(self.run_id, "client", [said])

    @invariant()
    def the_log_is_the_models(self) -> None:
        """The same trajectories in the same order, at positions without gaps."""
        found = self.store.read(self.run_id, 0, 1000)
        assert [item.metadata.trajectory_id for item in found] == [row[0] for row in self.model.log]
        assert [item.position for item in found] == list(range(1, len(found) + 1))

    @invariant()
    def the_audit_is_the_models(self) -> None:
        """The numbers of the identity."""
        audit = self.store.audit(self.run_id)
        numbers = (audit.accepted, audit.stored, audit.quarantined, audit.dropped, audit.in_spool)
        assert numbers == self.model.identity()

    @invariant()
    def quarantine_is_the_models(self) -> None:
        """One row a sequence and payload."""
        found = [(row.spool_id, row.sequence, row.payload) for row in self.store.quarantined(self.run_id)]
        assert sorted(map(repr, found)) == sorted(map(repr, self.model.quarantined))


def test_every_history_ends_as_the_model_says(store: TrajectoryStore) -> None:
    """Commits, resends, contradictions, quarantine and reports in any order agree with the model."""

    class Machine(StoreMachine):
        under_test = store

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=15,
            phases=[Phase.explicit, Phase.generate],  # shrinking against a database takes minutes
            stateful_step_count=10,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
