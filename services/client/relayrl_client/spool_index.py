"""What a spool holds, in memory: entries by run and sequence; driven by `spool`, under its lock. No I/O."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from relayrl_client.spool_files import SegmentFile
from relayrl_client.spool_records import RunState, SpoolState, add_range, remove_from_ranges
from relayrl_shared.messages import SpoolReport
from relayrl_shared.trajectory import TrajectoryMetadata


@dataclass(frozen=True, slots=True)
class SpooledTrajectory:
    """A trajectory as it is sent: metadata with its place in the spool, and the payload frames."""

    metadata: TrajectoryMetadata
    body: bytes | memoryview
    final_observation: bytes | memoryview | None


@dataclass(slots=True, eq=False)
class SpoolEntry:
    """A trajectory in the spool. Read it with `Spool.read`; location and cache are the spool's own."""

    run_id: str
    sequence: int
    trajectory_id: str
    actor_id: str
    size_bytes: int
    segment: SegmentFile = field(repr=False)
    offset: int = field(repr=False)
    accepted: bool = False
    cached: SpooledTrajectory | None = field(default=None, repr=False)

    @property
    def key(self) -> tuple[str, int]:
        """Run and sequence."""
        return self.run_id, self.sequence


@dataclass(slots=True)
class _Run:
    highest_written: int
    highest_accepted: int
    dropped: list[tuple[int, int]]
    pending: dict[int, SpoolEntry] = field(default_factory=dict)  # by sequence, ascending


class SpoolIndex:
    """Entries that are not acknowledged, in the order in which they were appended.

    Args:
        state: the state file's content.
        memory_bytes: entries are kept in memory up to so many bytes; the rest is read back from disk.
    """

    def __init__(self, state: SpoolState, memory_bytes: int) -> None:
        self._runs = {
            run_id: _Run(run.highest, run.highest, run.dropped) for run_id, run in state.runs.items()
        }
        self._entries: dict[tuple[str, int], SpoolEntry] = {}
        self._memory_bytes = memory_bytes
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[SpoolEntry]:
        return iter(list(self._entries.values()))

    def get(self, run_id: str, sequence: int) -> SpoolEntry | None:
        """The pending entry of that key."""
        return self._entries.get((run_id, sequence))

    def next_sequence(self, run_id: str) -> int:
        """The sequence that the next entry of the run gets."""
        run = self._runs.get(run_id)
        return 1 if run is None else run.highest_written + 1

    def add(self, entry: SpoolEntry) -> None:
        """Takes a written entry; its sequence is now used."""
        run = self._run(entry.run_id)
        run.highest_written = max(run.highest_written, entry.sequence)
        run.pending[entry.sequence] = entry
        self._entries[entry.key] = entry
        entry.segment.pending += 1

    def note_written(self, run_id: str, sequence: int) -> None:
        """Remembers a sequence of an entry that is gone already."""
        run = self._run(run_id)
        run.highest_written = max(run.highest_written, sequence)
        run.highest_accepted = max(run.highest_accepted, sequence)

    def accept(self, entry: SpoolEntry) -> None:
        """Marks an entry as durable; what the memory window has no room for is let go."""
        run = self._run(entry.run_id)
        run.highest_accepted = max(run.highest_accepted, entry.sequence)
        entry.accepted = True
        if entry.cached is None:
            return
        if self._cached_bytes + entry.size_bytes > self._memory_bytes:
            entry.cached = None
        else:
            self._cached_bytes += entry.size_bytes

    def remove(self, run_id: str, sequence: int) -> SpoolEntry | None:
        """Takes an entry out for good; None if it is not there (any more)."""
        run = self._runs.get(run_id)
        entry = self._entries.pop((run_id, sequence), None)
        if run is None or entry is None:
            return None
        del run.pending[sequence]
        if entry.accepted and entry.cached is not None:
            self._cached_bytes -= entry.size_bytes
        entry.cached = None
        return entry

    def mark_dropped(self, run_id: str, sequence: int) -> None:
        """Counts a sequence as dropped by policy."""
        run = self._run(run_id)
        run.dropped = add_range(run.dropped, sequence)

    def unmark_dropped(self, run_id: str, sequence: int) -> None:
        """A dropped entry was on its way and has been stored after all."""
        run = self._runs.get(run_id)
        if run is not None:
            run.dropped = remove_from_ranges(run.dropped, sequence)

    def runs(self) -> list[str]:
        """Runs that this spool has ever held something of."""
        return list(self._runs)

    def report(self, spool_id: str, run_id: str) -> SpoolReport:
        """What contracts C2 wants to know of a run."""
        run = self._runs.get(run_id) or _Run(0, 0, [])
        oldest = next((sequence for sequence, entry in run.pending.items() if entry.accepted), None)
        return SpoolReport(
            spool_id=spool_id,
            run_id=run_id,
            highest_accepted=run.highest_accepted,
            oldest_unacknowledged=oldest,
            dropped=tuple(run.dropped),
        )

    def state(self, ephemeral: bool) -> SpoolState:
        """What the state file should say."""
        runs = {
            run_id: RunState(highest=run.highest_accepted, dropped=run.dropped)
            for run_id, run in self._runs.items()
        }
        return SpoolState(ephemeral=ephemeral, runs=runs)

    def _run(self, run_id: str) -> _Run:
        return self._runs.setdefault(run_id, _Run(0, 0, []))
