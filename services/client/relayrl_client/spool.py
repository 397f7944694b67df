"""The spool: trajectories on disk from the moment they are finished until the server has them (contracts C).

`TransportSink` appends to it and sends what it holds; `adopt_orphans` opens what crashed processes left.
`append` writes and returns; a thread fsyncs whatever has gathered and then declares it *accepted*. Segment
files are deleted whole, once all their records are acknowledged. docs of the bytes: `spool_records`, of the
files: `spool_files`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import msgspec

from relayrl_client.spool_files import SegmentFile, SpoolDirectory, take_lock
from relayrl_client.spool_index import SpooledTrajectory, SpoolEntry, SpoolIndex
from relayrl_client.spool_records import GapFinder, Scan, decode_record, encode_record
from relayrl_client.spool_segments import SegmentSet
from relayrl_shared.arrow_codec import body_digest
from relayrl_shared.errors import MessageTooLarge, SpoolError
from relayrl_shared.identifiers import new_id
from relayrl_shared.messages import SpoolReport
from relayrl_shared.trajectory import TrajectoryMetadata

AtLimit = Literal["block", "refuse", "drop_oldest"]
OnAccepted = Callable[[Sequence[SpoolEntry]], None]

DEFAULT_LIMIT_BYTES = 4 << 30
DEFAULT_SEGMENT_BYTES = 16 << 20
DEFAULT_MEMORY_BYTES = 64 << 20
_RETRY_SECONDS = 0.25

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class SpoolStatistics:
    """Counters of a spool since it was opened, and what it holds now."""

    appended_total: int = 0
    accepted_total: int = 0
    """Appended and made durable by this process."""
    acknowledged_total: int = 0
    dropped_total: int = 0
    """Dropped by `drop_oldest`, damaged on disk, or rejected in a run that lives; their ids are logged."""
    rejected_total: int = 0
    recovered_total: int = 0
    """Unacknowledged entries that were there when it was opened."""
    torn_bytes: int = 0
    """Cut off the ends of segment files when it was opened."""
    fsyncs_total: int = 0
    write_errors_total: int = 0
    pending_entries: int = 0
    size_bytes: int = 0


class Spool:
    """One spool directory, open. Thread-safe.

    Args:
        directory: holds one sub-directory a spool; local disk.
        spool_id: names the spool, and must be the same after a restart; None makes a name up.
        limit_bytes: of all segment files.
        at_limit: `block`: append waits; `refuse`: append raises; `drop_oldest`: the oldest segment file goes.
        segment_bytes: a segment file that has grown past this is closed.
        memory_bytes: accepted entries kept in memory for sending; the others are read back from disk.
        fsync: makes a descriptor's data durable.
        lock: the descriptor of its lock, if that is held already.

    Raises:
        SpoolError: another process has it open, or it cannot be read or made.
    """

    def __init__(
        self,
        directory: Path | str,
        spool_id: str | None = None,
        *,
        limit_bytes: int = DEFAULT_LIMIT_BYTES,
        at_limit: AtLimit = "block",
        segment_bytes: int = DEFAULT_SEGMENT_BYTES,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        fsync: Callable[[int], None] = os.fdatasync,
        lock: int | None = None,
    ) -> None:
        self.spool_id = spool_id or new_id()
        self.path = Path(directory) / self.spool_id
        self._limit_bytes = limit_bytes
        self._at_limit = at_limit
        self._fsync = fsync
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._count = SpoolStatistics()
        self._listeners: tuple[OnAccepted, ...] = ()
        self._unsynced: list[SpoolEntry] = []
        self._unsynced_bytes = 0
        self._memory_bytes = memory_bytes
        self._failure: str | None = None
        self._closing = False
        self._directory = SpoolDirectory(self.path, ephemeral=spool_id is None, lock=lock)
        self._index = SpoolIndex(self._directory.state, memory_bytes)
        file_bytes = max(1, min(segment_bytes, limit_bytes // 4))
        self._segments = SegmentSet(self._directory, file_bytes, self._save_state)
        try:
            with self._lock:
                self._recover()
        except OSError as exc:
            self._directory.close(empty=False)
            raise SpoolError(f"the spool {self.path} cannot be opened: {exc}") from exc
        self._thread = threading.Thread(target=self._sync_loop, name=f"spool {self.spool_id}", daemon=True)
        self._thread.start()

    # ---- opening ------------------------------------------------------------------------------------------

    def _recover(self) -> None:
        gaps = GapFinder({run: state.highest for run, state in self._directory.state.runs.items()})
        for segment, found, acknowledged in self._segments.recover():
            gaps.follow(int(segment.path.stem), found)
            self._recover_segment(segment, found, acknowledged)
        missing = gaps.missing()
        for run_id, sequence in missing:
            self._count_drop(run_id, sequence, "of unknown id", "its record is damaged on disk")
        if missing:
            self._save_state()
        self._count.recovered_total = len(self._index)

    def _recover_segment(self, segment: SegmentFile, found: Scan, acknowledged: set[int]) -> None:
        for metadata in found.corrupt:
            self._index.note_written(metadata.run_id, metadata.sequence)
            self._count_drop(metadata.run_id, metadata.sequence, metadata.trajectory_id, "damaged on disk")
        if found.torn_bytes:
            _log.warning("cut %d bytes of an incomplete record off %s", found.torn_bytes, segment.path)
            self._count.torn_bytes += found.torn_bytes
            segment.cut(found.end)
        self._fsync(segment.descriptor)
        for record in found.records:
            metadata = record.metadata
            self._forget_earlier_copy(metadata)
            if record.offset in acknowledged:
                self._index.note_written(metadata.run_id, metadata.sequence)
            else:
                entry = self._entry(metadata, segment, record.offset, record.size)
                self._index.add(entry)
                self._index.accept(entry)
        self._segments.delete_if_done(segment)

    def _forget_earlier_copy(self, metadata: TrajectoryMetadata) -> None:
        """An entry that was written again after a failed fsync counts once, where it was written last."""
        earlier = self._index.remove(metadata.run_id, metadata.sequence)
        if earlier is not None:
            earlier.segment.acknowledge(earlier.offset)

    def _entry(
        self, metadata: TrajectoryMetadata, segment: SegmentFile, offset: int, size: int
    ) -> SpoolEntry:
        return SpoolEntry(
            run_id=metadata.run_id,
            sequence=metadata.sequence,
            trajectory_id=metadata.trajectory_id,
            actor_id=metadata.actor_id,
            size_bytes=size,
            segment=segment,
            offset=offset,
        )

    # ---- writing ------------------------------------------------------------------------------------------

    def put_schema(self, digest: str, encoded: bytes) -> None:
        """Keeps the msgpack of a record schema beside the trajectories that need it; durable on return.

        Raises:
            SpoolError: it could not be written.
        """
        with self._lock:
            try:
                self._directory.put_schema(digest, encoded)
            except OSError as exc:
                raise self._write_error(exc) from exc

    def schema(self, digest: str) -> bytes | None:
        """The schema of a digest, if it is here."""
        with self._lock:
            return self._directory.schema(digest)

    def append(
        self,
        metadata: TrajectoryMetadata,
        body: bytes,
        final_observation: bytes | None = None,
        *,
        timeout_seconds: float | None = None,
    ) -> SpoolEntry:
        """Writes a trajectory to the current segment file, under the next sequence of its run.

        Args:
            metadata: spool_id and sequence are filled in here, and body_digest where it is empty.
            body: the encoded columns.
            final_observation: the encoded final observation.
            timeout_seconds: how long `block` waits at the limit; None: as long as it takes.

        Returns:
            The entry. It survives the death of the process now, and power loss once it is accepted.

        Raises:
            SpoolError: at the limit, disk full, or closed. Nothing was written and no sequence is used.
            MessageTooLarge: above the limit by itself; it will never fit.
        """
        digest = metadata.body_digest or body_digest(body, final_observation)
        size = len(body) + len(final_observation or b"") + 1024
        with self._lock:
            self._make_room(size, timeout_seconds)
            numbered = msgspec.structs.replace(
                metadata,
                spool_id=self.spool_id,
                sequence=self._index.next_sequence(metadata.run_id),
                body_digest=digest,
            )
            entry = self._write(SpooledTrajectory(numbered, body, final_observation))
            self._index.add(entry)
            self._unsynced.append(entry)
            self._unsynced_bytes += entry.size_bytes
            self._count.appended_total += 1
            self._changed.notify_all()
        return entry

    def _write(self, trajectory: SpooledTrajectory) -> SpoolEntry:
        metadata = trajectory.metadata
        buffers = encode_record(metadata, bytes(trajectory.body), _as_bytes(trajectory.final_observation))
        try:
            segment, offset = self._segments.append(buffers)
        except OSError as exc:
            raise self._write_error(exc) from exc
        entry = self._entry(metadata, segment, offset, sum(map(len, buffers)))
        entry.cached = trajectory
        return entry

    def _write_error(self, exc: OSError) -> SpoolError:
        self._count.write_errors_total += 1
        return SpoolError(f"the spool {self.path} cannot be written: {exc}; free space on its disk")

    def _make_room(self, size: int, timeout_seconds: float | None) -> None:
        if size > self._limit_bytes:
            raise MessageTooLarge(f"a trajectory of {size} bytes; limit_bytes is {self._limit_bytes}")
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        while True:
            if self._closing:
                raise SpoolError(f"the spool {self.path} is closed")
            if self._failure is not None:
                raise SpoolError(self._failure)
            if self._unsynced_bytes > self._memory_bytes:
                self._wait(deadline, "waits for its disk")
            elif self._segments.used_bytes + size <= self._limit_bytes:
                return
            elif not self._free_some():
                self._wait_for_room(deadline)

    def _wait_for_room(self, deadline: float | None) -> None:
        held = f"holds {self._segments.used_bytes} of {self._limit_bytes} bytes"
        full = f"{held}; is the training server reachable?"
        if self._at_limit == "refuse":
            raise SpoolError(f"the spool {self.path} {full}")
        self._wait(deadline, full)

    def _wait(self, deadline: float | None, why: str) -> None:
        remaining = None if deadline is None else deadline - time.monotonic()
        if remaining is not None and remaining <= 0:
            raise SpoolError(f"the spool {self.path} {why}; the time to wait is over")
        self._changed.wait(remaining)

    def _free_some(self) -> bool:
        """Deletes files that need not, or by policy will not, be kept; whether bytes came free."""
        if self._segments.free_done():
            return True
        return self._at_limit == "drop_oldest" and self._drop_oldest_segment()

    def _drop_oldest_segment(self) -> bool:
        for segment in self._segments:
            entries = [entry for entry in self._index if entry.segment is segment]
            if not all(entry.accepted for entry in entries):
                continue  # its fsync may be under way
            for entry in entries:
                self._index.remove(*entry.key)
                segment.acknowledge(entry.offset)
                self._count_drop(*entry.key, entry.trajectory_id, "the spool is at its limit")
            return self._segments.free_done()
        return False

    def _count_drop(self, run_id: str, sequence: int, trajectory_id: str, why: str) -> None:
        self._count.dropped_total += 1
        self._index.mark_dropped(run_id, sequence)
        _log.warning("dropped trajectory %s (run %s, sequence %d): %s", trajectory_id, run_id, sequence, why)

    # ---- durability ---------------------------------------------------------------------------------------

    def _sync_loop(self) -> None:
        while True:
            with self._lock:
                while not self._unsynced and not self._closing:
                    self._changed.wait()
                entries, self._unsynced = self._unsynced, []
            if not entries:
                return
            if self._make_durable(entries):
                self._announce(entries)

    def _make_durable(self, entries: list[SpoolEntry]) -> bool:
        """Fsyncs the files of these entries; where that fails, writes them again until it does not."""
        while True:
            try:
                for segment in {id(entry.segment): entry.segment for entry in entries}.values():
                    self._fsync(segment.descriptor)
                    self._count.fsyncs_total += 1
                break
            except OSError as exc:
                _log.error("fsync of the spool %s failed: %s; its records are written again", self.path, exc)
                if not self._write_again(entries, exc):
                    return False
        with self._lock:
            self._failure = None
            for entry in entries:
                self._index.accept(entry)
                self._unsynced_bytes -= entry.size_bytes
            self._count.accepted_total += len(entries)
            self._changed.notify_all()
        return True

    def _write_again(self, entries: list[SpoolEntry], cause: OSError) -> bool:
        """Copies entries whose fsync failed into a new file; pages that failed once are not to be trusted.

        What was appended meanwhile is copied with them. False if the spool was closed before it succeeded.
        """
        with self._lock:
            self._count.write_errors_total += 1
            self._failure = f"the spool {self.path} cannot be made durable: {cause}; free space on its disk"
            self._segments.retire_active()
            entries.extend(self._unsynced)
            self._unsynced = []
            for entry in entries:
                while not self._copy(entry):
                    if self._closing:
                        return False
                    self._changed.wait(_RETRY_SECONDS)
        return True

    def _copy(self, entry: SpoolEntry) -> bool:
        if entry.cached is None:
            return True
        try:
            copy = self._write(entry.cached)
        except SpoolError:
            return False
        entry.segment.pending -= 1
        self._segments.delete_if_done(entry.segment)
        entry.segment, entry.offset = copy.segment, copy.offset
        entry.segment.pending += 1
        return True

    def _announce(self, entries: list[SpoolEntry]) -> None:
        for listener in self._listeners:
            try:
                listener(entries)
            except Exception:  # noqa: BLE001  # a listener's fault must not end the fsyncs
                _log.exception("a listener of the spool %s failed", self.path)

    def listen(self, on_accepted: OnAccepted) -> list[SpoolEntry]:
        """Calls back with every batch of entries that becomes accepted, from the fsync thread.

        Returns:
            The accepted entries that are here already, in order. An entry may come in both.
        """
        with self._lock:
            self._listeners += (on_accepted,)
            return [entry for entry in self._index if entry.accepted]

    def flush(self, timeout_seconds: float | None = None) -> bool:
        """Waits until everything appended so far is accepted; False if that takes longer."""
        with self._lock:
            target = self._count.appended_total
            return self._changed.wait_for(
                lambda: self._count.accepted_total >= target or self._closing, timeout_seconds
            ) and (self._count.accepted_total >= target)

    # ---- reading and letting go ---------------------------------------------------------------------------

    def read(self, entry: SpoolEntry) -> SpooledTrajectory | None:
        """The trajectory of an entry; None if it was acknowledged, dropped or rejected meanwhile.

        Raises:
            SpoolError: the disk does not give back what was written.
        """
        with self._lock:
            if self._index.get(*entry.key) is not entry:
                return None
            if entry.cached is not None:
                return entry.cached
            data = entry.segment.read(entry.offset, entry.size_bytes)
        decoded = decode_record(memoryview(data))
        if decoded is None:
            raise SpoolError(f"{entry.segment.path} is damaged at {entry.offset}")
        metadata, body, final, _ = decoded
        return SpooledTrajectory(metadata, body, final)

    def unacknowledged(self) -> Iterator[SpooledTrajectory]:
        """What is here, in the order in which it was appended; one at a time in memory."""
        with self._lock:
            entries = list(self._index)
        for entry in entries:
            trajectory = self.read(entry)
            if trajectory is not None:
                yield trajectory

    def acknowledge(self, run_id: str, sequence: int) -> bool:
        """Lets an entry go: the server has it. False if it was not here (any more)."""
        with self._lock:
            entry = self._index.remove(run_id, sequence)
            if entry is None:
                self._index.unmark_dropped(run_id, sequence)
                return False
            self._count.acknowledged_total += 1
            self._release(entry)
            return True

    def reject(self, entry: SpoolEntry, reason: str, *, run_is_gone: bool = False) -> None:
        """Moves an entry that nobody will ever take to `rejected/`, with the reason.

        In a run that lives it counts as dropped, so that the audit of the run explains it (contracts C2).

        Raises:
            SpoolError: it could not be written there; it stays in the spool.
        """
        trajectory = self.read(entry)
        if trajectory is None:
            return
        final = _as_bytes(trajectory.final_observation)
        record = b"".join(encode_record(trajectory.metadata, bytes(trajectory.body), final))
        why = msgspec.json.encode({"reason": reason, "metadata": trajectory.metadata})
        with self._lock:
            try:
                self._directory.keep_rejected(entry.trajectory_id, record, why)
            except OSError as exc:
                raise self._write_error(exc) from exc
            if self._index.remove(*entry.key) is not None:
                self._count.rejected_total += 1
                if not run_is_gone:
                    self._drop_for_good(entry, reason)
                self._release(entry)
        _log.error("trajectory %s cannot be delivered (%s): moved to rejected/", entry.trajectory_id, reason)

    def _drop_for_good(self, entry: SpoolEntry, why: str) -> None:
        """Counts a drop and writes that down before the entry's file may forget it."""
        self._count_drop(*entry.key, entry.trajectory_id, why)
        try:
            self._save_state()
        except OSError as exc:
            _log.error("the drop is not written down yet, the spool %s says: %s", self.path, exc)

    def give_up(self, entry: SpoolEntry, why: str) -> None:
        """Drops an entry that the disk does not give back; counted and logged."""
        with self._lock:
            if self._index.remove(*entry.key) is not None:
                self._drop_for_good(entry, why)
                self._release(entry)

    def _release(self, entry: SpoolEntry) -> None:
        entry.segment.acknowledge(entry.offset)
        self._segments.delete_if_done(entry.segment)
        self._changed.notify_all()

    def _save_state(self) -> None:
        try:
            self._directory.save(self._index.state(self._directory.state.ephemeral))
        except OSError:
            self._count.write_errors_total += 1
            raise

    # ---- knowing ------------------------------------------------------------------------------------------

    def report(self, run_id: str) -> SpoolReport:
        """What the server is told of a run (contracts C2)."""
        with self._lock:
            return self._index.report(self.spool_id, run_id)

    def runs(self) -> list[str]:
        """Runs that this spool has held something of."""
        with self._lock:
            return self._index.runs()

    def pending_count(self) -> int:
        """Entries that are not acknowledged."""
        return len(self._index)

    def statistics(self) -> SpoolStatistics:
        """The counters now."""
        with self._lock:
            self._count.pending_entries = len(self._index)
            self._count.size_bytes = self._segments.used_bytes
            return replace(self._count)

    # ---- closing ------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Makes what is here durable and gives the lock back. Safe to call twice.

        A spool whose name was made up is removed if it is empty; a named one keeps its sequences.
        """
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        with self._lock:
            self._segments.close()
            self._directory.close(empty=not self._segments)

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _as_bytes(data: bytes | memoryview | None) -> bytes | None:
    return None if data is None else bytes(data)


def adopt_orphans(directory: Path | str, *, memory_bytes: int = DEFAULT_MEMORY_BYTES) -> list[Spool]:
    """Opens the spools below `directory` that no process has open and that hold something.

    Empty ones with made-up names are removed on the way. One that cannot be read is left alone and logged.
    """
    adopted = []
    for path in sorted(Path(directory).iterdir()) if Path(directory).is_dir() else []:
        lock = take_lock(path, create=False)
        if lock is None:
            continue
        try:
            spool = Spool(directory, path.name, memory_bytes=memory_bytes, lock=lock)
        except SpoolError as exc:
            _log.error("the orphan spool %s was not adopted: %s", path, exc)
            continue
        if spool.pending_count():
            adopted.append(spool)
        else:
            spool.close()
    return adopted
