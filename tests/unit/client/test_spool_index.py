"""The index of a spool: sequences, reports and the memory window, without files."""

from __future__ import annotations

from typing import cast

from relayrl_client.spool_files import SegmentFile
from relayrl_client.spool_index import SpooledTrajectory, SpoolEntry, SpoolIndex
from relayrl_client.spool_records import RunState, SpoolState
from relayrl_shared.testing.trajectories import make_metadata


class CountingSegment:
    """All that the index looks at in a segment file."""

    def __init__(self) -> None:
        self.pending = 0


def entry(sequence: int, run_id: str = "run", size_bytes: int = 10) -> SpoolEntry:
    """A written entry with its payload in memory."""
    made = SpoolEntry(run_id, sequence, f"id {sequence}", "actor", size_bytes, segment(), 0)
    made.cached = SpooledTrajectory(make_metadata(1), b"body", None)
    return made


def segment() -> SegmentFile:
    """A segment without a file."""
    return cast(SegmentFile, CountingSegment())


def filled(count: int, memory_bytes: int = 1000) -> tuple[SpoolIndex, list[SpoolEntry]]:
    """An index with accepted entries of one run."""
    index = SpoolIndex(SpoolState(), memory_bytes)
    entries = [entry(number) for number in range(1, count + 1)]
    for each in entries:
        index.add(each)
        index.accept(each)
    return index, entries


def test_sequences_go_on_from_the_state() -> None:
    """A run that the state file knows counts on; a new one begins at 1."""
    index = SpoolIndex(SpoolState(runs={"old": RunState(highest=7, dropped=[(2, 3)])}), 0)

    assert (index.next_sequence("old"), index.next_sequence("new")) == (8, 1)
    assert index.report("spool", "old").highest_accepted == 7
    assert index.report("spool", "old").dropped == ((2, 3),)


def test_written_is_not_accepted() -> None:
    """An entry that is not durable uses its sequence, and is not reported."""
    index = SpoolIndex(SpoolState(), 0)
    index.add(entry(1))

    report = index.report("spool", "run")

    assert index.next_sequence("run") == 2
    assert (report.highest_accepted, report.oldest_unacknowledged) == (0, None)


def test_oldest_unacknowledged_follows_the_removals() -> None:
    """Whatever order acknowledgements come in, the report names the oldest that is left."""
    index, _ = filled(4)
    oldest = []
    for sequence in (2, 1, 4, 3):
        index.remove("run", sequence)
        oldest.append(index.report("spool", "run").oldest_unacknowledged)

    assert oldest == [1, 3, 3, None]
    assert index.remove("run", 3) is None
    assert len(index) == 0


def test_memory_window_keeps_the_first_and_lets_the_rest_go() -> None:
    """Payloads stay up to the limit; acknowledged ones make room for later ones."""
    index, entries = filled(5, memory_bytes=30)
    kept = [each.sequence for each in entries if each.cached is not None]
    index.remove("run", 1)
    later = entry(6)
    index.add(later)
    index.accept(later)

    assert kept == [1, 2, 3]
    assert later.cached is not None


def test_entries_come_in_the_order_of_their_writes() -> None:
    """Runs are mixed as they were written; every entry counts in its file."""
    index = SpoolIndex(SpoolState(), 0)
    entries = [entry(1, "a"), entry(1, "b"), entry(2, "a")]
    for each in entries:
        index.add(each)

    assert list(index) == entries
    assert index.runs() == ["a", "b"]
    assert index.get("b", 1) is entries[1]
    assert [each.segment.pending for each in entries] == [1, 1, 1]


def test_dropped_can_be_taken_back() -> None:
    """A dropped sequence whose acknowledgement comes is not reported as dropped any more."""
    index, _ = filled(3)
    for sequence in (1, 2, 3):
        index.remove("run", sequence)
        index.mark_dropped("run", sequence)

    index.unmark_dropped("run", 2)
    index.unmark_dropped("never seen", 2)

    assert index.report("spool", "run").dropped == ((1, 1), (3, 3))
    assert index.state(ephemeral=True).runs["run"] == RunState(highest=3, dropped=[(1, 1), (3, 3)])
