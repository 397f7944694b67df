"""Exactly once: dedupe, conflicts, quarantine and the audit identity; each test runs on each store."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from sqlalchemy import delete

from relayrl_shared.errors import StoreError
from relayrl_shared.messages import PutTrajectory, SpoolReport
from relayrl_shared.store import tables
from relayrl_shared.store.interface import Quarantined, TrajectoryStore
from relayrl_shared.store.quarantine import QuarantineLimits
from relayrl_shared.store.sql_store import SqlStore
from relayrl_shared.testing.store import RUN_ID, OpenStore, make_trajectory, read_all

pytestmark = pytest.mark.postgres


def outcomes(store: TrajectoryStore, *items: Any) -> list[str]:
    """The outcomes of one commit."""
    return [result.outcome for result in store.commit(items)]


def report(highest: int, oldest: int | None = None, *dropped: tuple[int, int]) -> SpoolReport:
    """What spool-1 says."""
    return SpoolReport(
        spool_id="spool-1",
        run_id=RUN_ID,
        highest_accepted=highest,
        oldest_unacknowledged=oldest,
        dropped=dropped,
    )


def invalid(sequence: int, payload: bytes | None = b"payload", **changes: Any) -> Quarantined:
    """A trajectory that failed validation."""
    fields: dict[str, Any] = {
        "reason": "nan",
        "detail": "observation holds NaN",
        "header": b"header",
        "payload": payload,
        "run_id": RUN_ID,
        "spool_id": "spool-1",
        "sequence": sequence,
        "trajectory_id": f"bad-{sequence}",
        "received_at": 5.0,
    }
    return Quarantined(**{**fields, **changes})


def prune(store: TrajectoryStore) -> None:
    """Forgets all trajectories and their log, as retention may; the counters and spools stay."""
    assert isinstance(store, SqlStore)
    with store._ingest.write() as connection:
        connection.execute(delete(tables.trajectories))
        connection.execute(delete(tables.trajectory_log))


class TestExactlyOnce:
    """However often and in whatever order trajectories are sent, each is stored once."""

    def test_results_come_in_the_order_of_the_batch(self, store: TrajectoryStore) -> None:
        """Each element of a batch has its own result at its own place."""
        store.commit([make_trajectory(2)])
        results = store.commit([make_trajectory(1), make_trajectory(2), make_trajectory(3)])
        assert [(result.outcome, result.position) for result in results] == [
            ("stored", 2),
            ("known", None),
            ("stored", 3),
        ]

    def test_an_empty_batch_is_nothing(self, store: TrajectoryStore) -> None:
        """No trajectories, no results."""
        assert store.commit([]) == []

    def test_a_resend_is_known(self, store: TrajectoryStore) -> None:
        """The same trajectory in a later batch is acknowledged and not stored again."""
        assert outcomes(store, make_trajectory(1)) == ["stored"]
        assert outcomes(store, make_trajectory(1)) == ["known"]
        assert store.counts(RUN_ID)["trajectories"] == 1

    def test_a_resend_within_a_batch_is_known(self, store: TrajectoryStore) -> None:
        """The same trajectory twice in one batch is stored once."""
        assert outcomes(store, make_trajectory(1), make_trajectory(1)) == ["stored", "known"]
        assert len(read_all(store)) == 1

    def test_shuffled_overlapping_batches(self, store: TrajectoryStore) -> None:
        """Batches of any order and overlap leave every trajectory once, at positions without gaps."""
        chance = random.Random(3)
        everything = [
            make_trajectory(i, spool_id=spool, trajectory_id=f"{spool}-{i}")
            for spool in ("a", "b", "c")
            for i in range(1, 21)
        ]
        for _ in range(12):
            store.commit(chance.sample(everything, 25))
        store.commit(chance.sample(everything, len(everything)))

        found = store.read(RUN_ID, 0, 1000)
        assert sorted(item.metadata.trajectory_id for item in found) == sorted(
            item.metadata.trajectory_id for item in everything
        )
        assert [item.position for item in found] == list(range(1, 61))

    def test_known_outlives_the_rows(self, store: TrajectoryStore) -> None:
        """After the rows were pruned, resends are still known, below the watermark and above it."""
        store.commit([make_trajectory(i) for i in (1, 2, 3, 7)])
        prune(store)

        assert outcomes(store, *(make_trajectory(i) for i in (1, 3, 7, 5))) == ["known"] * 3 + ["stored"]
        (found,) = store.read(RUN_ID, 0, 10)
        assert (found.metadata.sequence, found.position) == (5, 5)

    def test_positions_go_on_after_pruning(self, store: TrajectoryStore) -> None:
        """A pruned position is never given again."""
        store.commit([make_trajectory(1), make_trajectory(2)])
        prune(store)
        (result,) = store.commit([make_trajectory(3)])
        assert result.position == 3

    def test_the_same_sequence_of_another_spool_or_run_is_another(self, store: TrajectoryStore) -> None:
        """Sequences count per spool and run."""
        items = [
            make_trajectory(1),
            make_trajectory(1, spool_id="spool-2"),
            make_trajectory(1, run_id="run-2", trajectory_id="t", episode_id="e"),
        ]
        assert outcomes(store, *items) == ["stored"] * 3
        assert store.counts("run-2")["last_position"] == 1

    def test_another_store_knows_it_too(self, open_stores: OpenStore) -> None:
        """What one process stored is known to the process that comes after it."""
        first = open_stores(writer_of="ingest")
        first.commit([make_trajectory(1)])
        first.close()
        assert outcomes(open_stores(writer_of="ingest"), make_trajectory(1)) == ["known"]


class TestConflicts:
    """What contradicts a stored trajectory goes to quarantine, whole, and never replaces it."""

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"sequence": 1, "body": b"other"}, "body digest"),
            ({"sequence": 9, "body": b"other", "trajectory_id": "spool-1-trajectory-00000001"}, "digest"),
            ({"sequence": 9, "episode_id": "spool-1-episode-00000001"}, "segment 0 of episode"),
            ({"sequence": 1, "trajectory_id": "new", "episode_id": "new"}, "sequence 1 of spool"),
        ],
        ids=["digest", "digest of a new sequence", "segment", "sequence"],
    )
    @pytest.mark.parametrize("together", [False, True])
    def test_a_contradiction_is_a_conflict(
        self, store: TrajectoryStore, changes: dict[str, Any], says: str, together: bool
    ) -> None:
        """It is named, kept in quarantine and the first one stays, also when both come in one batch."""
        first, second = make_trajectory(1), make_trajectory(**changes)
        batches = [[first, second]] if together else [[first], [second]]
        *_, result = [result for batch in batches for result in store.commit(batch)]

        assert (result.outcome, result.position) == ("conflict", None)
        assert says in result.detail
        (row,) = store.quarantined(RUN_ID)
        assert (row.reason, row.detail) == ("conflict", result.detail)
        assert msgspec.msgpack.decode(row.payload or b"") == [second.body, second.final_observation or b""]
        assert row.trajectory_id == second.metadata.trajectory_id
        (kept,) = store.read(RUN_ID, 0, 10)
        assert kept.body == first.body

    def test_a_conflict_sent_again_is_not_kept_twice(self, store: TrajectoryStore) -> None:
        """A resent conflict is answered and leaves one row."""
        store.commit([make_trajectory(1)])
        for _ in range(2):
            (result,) = store.commit([make_trajectory(1, body=b"other")])
            assert result.outcome == "conflict"
        assert len(store.quarantined(RUN_ID)) == 1
        assert store.counts(RUN_ID)["quarantined"] == 1

    def test_a_segment_conflict_sent_again_is_known(self, store: TrajectoryStore) -> None:
        """Once a sequence ended in quarantine, its resend is acknowledged."""
        store.commit([make_trajectory(1)])
        second = make_trajectory(2, episode_id="spool-1-episode-00000001")
        assert outcomes(store, second) == ["conflict"]
        assert outcomes(store, second) == ["known"]

    def test_a_batch_settles_sequences_in_its_order(self, store: TrajectoryStore) -> None:
        """Once a conflict took a sequence, another trajectory of it in the same batch is not stored."""
        store.commit([make_trajectory(1)])
        conflict = make_trajectory(2, episode_id="spool-1-episode-00000001")
        late = make_trajectory(2, trajectory_id="late", episode_id="late")
        assert outcomes(store, conflict, late) == ["conflict", "known"]
        assert store.audit(RUN_ID).missing == 0

    @pytest.mark.parametrize(
        "changes",
        [{"actor_id": "a\0b"}, {"spool_id": "s\0"}, {"first_step_index": 1 << 63}, {"steps": 1 << 31}],
        ids=["NUL", "NUL in the spool", "63 bits", "31 bits"],
    )
    def test_what_no_row_can_hold_spares_the_batch(
        self, store: TrajectoryStore, changes: dict[str, Any]
    ) -> None:
        """A trajectory that no database can hold is quarantined; its neighbours are stored."""
        odd = make_trajectory(2, **changes)
        results = store.commit([make_trajectory(1), odd, make_trajectory(3)])
        assert [result.outcome for result in results] == ["stored", "conflict", "stored"]
        (row,) = store.quarantined()
        assert row.reason == "unstorable"
        assert msgspec.msgpack.decode(row.payload or b"") == [odd.body, odd.final_observation or b""]
        assert msgspec.msgpack.decode(row.header, type=PutTrajectory).trajectory == odd.metadata

    def test_an_impossible_sequence_is_quarantined(self, store: TrajectoryStore) -> None:
        """Sequences start at 1 and fit 63 bits."""
        assert outcomes(store, make_trajectory(0), make_trajectory(1 << 63)) == ["conflict"] * 2
        assert len(store.quarantined()) == 2


class TestQuarantine:
    """What cannot be accepted is kept, whole, within bounds, and settles its sequence."""

    def test_rows_read_back_newest_first(self, store: TrajectoryStore) -> None:
        """A row reads back as it was given; rows of no run are listed with all."""
        garbage = Quarantined(reason="frame", detail="", header=b"\x00", payload=b"\xff", received_at=6.0)
        store.quarantine([invalid(1)])
        store.quarantine([garbage])
        assert store.quarantined() == [garbage, invalid(1)]
        assert store.quarantined(RUN_ID) == [invalid(1)]
        assert store.quarantined(limit=1) == [garbage]

    def test_the_time_is_filled_in(self, store: TrajectoryStore) -> None:
        """A row without a time gets the store's."""
        store.quarantine([invalid(1, received_at=0.0)])
        assert store.quarantined(RUN_ID)[0].received_at > 1e9

    def test_a_quarantined_sequence_is_settled(self, store: TrajectoryStore) -> None:
        """What was quarantined is known when it is sent again, and the watermark passes it."""
        store.quarantine([invalid(1)])
        assert outcomes(store, make_trajectory(1), make_trajectory(2)) == ["known", "stored"]

    def test_the_same_again_adds_no_row(self, store: TrajectoryStore) -> None:
        """A quarantined trajectory that is sent again, also in one call, leaves one row; garbage adds up."""
        store.quarantine([invalid(1), invalid(1)])
        store.quarantine([invalid(1)])
        store.quarantine([Quarantined(reason="frame", detail="", header=b"", payload=b"")] * 2)
        assert store.counts(RUN_ID)["quarantined"] == 1
        assert len(store.quarantined()) == 3

    def test_no_rows_are_nothing(self, store: TrajectoryStore) -> None:
        """An empty call does nothing."""
        store.quarantine([])
        assert store.quarantined() == []

    def test_beyond_the_rows_payloads_are_dropped(self, open_stores: OpenStore) -> None:
        """At the limit of rows the header, reason and digest stay, the payload goes, and it is counted."""
        store = open_stores(writer_of="ingest", limits=QuarantineLimits(rows=2, payload_bytes=1 << 20))
        for i in range(1, 5):
            store.quarantine([invalid(i)])
        assert [row.payload for row in store.quarantined(RUN_ID)] == [None, None, b"payload", b"payload"]
        assert store.quarantined(RUN_ID)[0].header == b"header"
        assert store.counts(RUN_ID)["quarantined"] == 4

    def test_beyond_the_bytes_payloads_are_dropped(self, open_stores: OpenStore) -> None:
        """At the limit of bytes a payload that does not fit goes, a smaller one fits; runs are apart."""
        store = open_stores(writer_of="ingest", limits=QuarantineLimits(rows=100, payload_bytes=10))
        store.quarantine([invalid(i, b"12345678"[:n], header=b"") for i, n in ((1, 8), (2, 3), (3, 2))])
        store.quarantine([invalid(1, b"123", run_id="run-2", header=b"")])
        assert [row.payload for row in store.quarantined(RUN_ID)] == [b"12", None, b"12345678"]
        assert store.quarantined("run-2")[0].payload == b"123"

    def test_headers_count_and_are_cut(self, open_stores: OpenStore) -> None:
        """A header takes its part of the bytes; a long one is cut, and shorter beyond the limits."""
        limits = QuarantineLimits(rows=100, payload_bytes=70_000)
        store = open_stores(writer_of="ingest", limits=limits)
        long = bytes(1 << 20)
        store.quarantine([invalid(1, b"p", header=long), invalid(2, bytes(5000)), invalid(3, header=long)])
        third, second, first = store.quarantined(RUN_ID)
        assert (len(first.header), first.payload) == (64 << 10, b"p")
        assert first.detail.endswith("(header cut from 1048576 to 65536 bytes)")
        assert (second.header, second.payload) == (b"header", None)
        assert (len(third.header), third.payload) == (4 << 10, None)

    def test_a_dropped_payload_sent_again_adds_no_row(self, open_stores: OpenStore) -> None:
        """The digest of a dropped payload still recognises it."""
        store = open_stores(writer_of="ingest", limits=QuarantineLimits(rows=0))
        store.quarantine([invalid(1)])
        store.quarantine([invalid(1)])
        assert len(store.quarantined(RUN_ID)) == 1


class TestAudit:
    """Accepted = stored + quarantined + dropped + still spooled; anything else is missing."""

    def identity(self, store: TrajectoryStore) -> tuple[int, int, int, int, int, int]:
        """The numbers of the identity."""
        audit = store.audit(RUN_ID)
        total = audit.stored + audit.quarantined + audit.dropped + audit.in_spool
        assert audit.missing == audit.accepted - total
        assert audit.stored_twice == 0
        return (audit.accepted, audit.stored, audit.quarantined, audit.dropped, audit.in_spool, audit.missing)

    def test_nothing_is_nothing(self, store: TrajectoryStore) -> None:
        """A run without a trajectory balances at 0."""
        assert self.identity(store) == (0, 0, 0, 0, 0, 0)

    def test_every_fate_is_counted(self, store: TrajectoryStore) -> None:
        """Stored, quarantined, dropped and spooled sequences add up to the accepted ones."""
        store.commit([make_trajectory(i) for i in (1, 2, 5)])
        store.quarantine([invalid(3)])
        store.touch_client(RUN_ID, "client-1", [report(9, 6, (4, 4), (7, 7))])
        assert self.identity(store) == (9, 3, 1, 2, 3, 0)

    def test_without_a_report_gaps_are_missing(self, store: TrajectoryStore) -> None:
        """Without any report the highest sequence counts as accepted, and a gap is missing."""
        store.commit([make_trajectory(i) for i in (1, 2, 5)])
        assert self.identity(store) == (5, 3, 0, 0, 0, 2)

    def test_what_the_spool_no_longer_has_is_missing(self, store: TrajectoryStore) -> None:
        """An unsettled sequence that the spool says it no longer has is missing."""
        store.commit([make_trajectory(1), make_trajectory(3)])
        store.touch_client(RUN_ID, "client-1", [report(4, 4)])
        assert self.identity(store) == (4, 2, 0, 0, 1, 1)
        store.touch_client(RUN_ID, "client-1", [report(4, None)])
        assert self.identity(store) == (4, 2, 0, 0, 0, 2)

    def test_a_stale_report_does_not_unbalance(self, store: TrajectoryStore) -> None:
        """Rows that came after the report count as accepted; the gaps among them are still spooled."""
        store.touch_client(RUN_ID, "client-1", [report(2, 1)])
        store.commit([make_trajectory(i) for i in (1, 2, 3, 6)])
        assert self.identity(store) == (6, 4, 0, 0, 2, 0)

    def test_spools_add_up(self, store: TrajectoryStore) -> None:
        """The identity sums over the spools of the run, and other runs do not count."""
        store.commit([make_trajectory(1), make_trajectory(1, spool_id="spool-2")])
        store.commit([make_trajectory(1, run_id="run-2", trajectory_id="t", episode_id="e")])
        assert self.identity(store) == (2, 2, 0, 0, 0, 0)

    def test_a_dropped_sequence_that_was_stored_counts_as_stored(self, store: TrajectoryStore) -> None:
        """Each sequence has one fate, the first, however often reports name it."""
        store.commit([make_trajectory(1)])
        for _ in range(2):
            store.touch_client(RUN_ID, "client-1", [report(3, None, (1, 3))])
        assert self.identity(store) == (3, 1, 0, 2, 0, 0)
        assert outcomes(store, make_trajectory(2)) == ["known"]

    def test_a_trajectory_under_two_sequences_is_one(self, store: TrajectoryStore) -> None:
        """A trajectory that a spool holds twice was accepted once."""
        again = make_trajectory(2, **{n: getattr(make_trajectory(1).metadata, n) for n in ("trajectory_id",)})
        assert outcomes(store, make_trajectory(1), again) == ["stored", "known"]
        assert self.identity(store) == (1, 1, 0, 0, 0, 0)

    def test_conflicts_count_as_quarantined(self, store: TrajectoryStore) -> None:
        """A sequence that ended as a conflict is quarantined; one that was stored before stays stored."""
        segment = make_trajectory(2, episode_id="spool-1-episode-00000001")
        store.commit([make_trajectory(1), segment, make_trajectory(1, body=b"other")])
        assert self.identity(store) == (2, 1, 1, 0, 0, 0)

    def test_an_absurd_report_is_refused_or_bounded(self, store: TrajectoryStore) -> None:
        """A dropped range beyond the accepted ones is cut; numbers beyond 63 bits are a typed error."""
        store.touch_client(RUN_ID, "client-1", [report(3, None, (2, 1 << 60))])
        assert self.identity(store) == (3, 0, 0, 2, 0, 1)
        with pytest.raises(StoreError):
            store.touch_client(RUN_ID, "client-1", [report(1 << 64)])
        assert self.identity(store)[0] == 3

    def test_lost_rows_are_missing(self, store: TrajectoryStore) -> None:
        """If rows vanish the audit says so."""
        store.commit([make_trajectory(1), make_trajectory(2)])
        prune(store)
        assert self.identity(store) == (2, 0, 0, 0, 0, 2)
