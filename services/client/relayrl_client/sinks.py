"""Where finished segments go: memory, files, the server. Routers drive them, each from its thread.

`TransportSink`, the way through the spool to the server, is in `transport`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Protocol

import msgspec
import pyarrow as pa

from relayrl_client.segments import ClosedSegment
from relayrl_client.spool_files import fsync_directory
from relayrl_client.transport import TransportSink
from relayrl_shared.arrow_codec import from_table, schema_digest, to_table
from relayrl_shared.errors import InvalidTrajectory, SpoolError
from relayrl_shared.trajectory import RecordSchema, Trajectory

__all__ = ["FileSink", "MemorySink", "Sink", "TransportSink", "read_trajectories"]

FILE_SUFFIX = ".arrow"
_FLUSH_AFTER_FILES = 1024


class Sink(Protocol):
    """Takes segments. Several routers may call at once; those of one actor come in order, from one thread."""

    def write(self, segment: ClosedSegment) -> None:
        """Takes a segment for good.

        Raises:
            SpoolError: it has no room now; the same call may succeed later, and the router repeats it.
            RelayRLError: it will never take this segment.
        """
        ...

    def flush(self, timeout_seconds: float) -> bool:
        """Waits until what was written survives the process; False if that takes longer."""
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...


class MemorySink:
    """Keeps the last trajectories of every actor in memory. Thread-safe.

    Args:
        max_trajectories: kept an actor; older ones are let go, and counted.
    """

    def __init__(self, max_trajectories: int = 16) -> None:
        self._max_trajectories = max_trajectories
        self._lock = threading.Lock()
        self._by_actor: dict[str, deque[Trajectory]] = {}
        self.evicted_total = 0

    def write(self, segment: ClosedSegment) -> None:
        """Keeps a segment; its arrays are shared, not copied."""
        trajectory = segment.trajectory()
        with self._lock:
            kept = self._by_actor.get(segment.metadata.actor_id)
            if kept is None:
                kept = self._by_actor[segment.metadata.actor_id] = deque(maxlen=self._max_trajectories)
            self.evicted_total += len(kept) == self._max_trajectories
            kept.append(trajectory)

    def trajectories(
        self, actor_ids: Collection[str] | None = None, *, drain: bool = False
    ) -> dict[str, list[Trajectory]]:
        """Actor id → its trajectories, oldest first.

        Args:
            actor_ids: of these actors only; None: of all that have any.
            drain: take them out.
        """
        with self._lock:
            wanted = list(self._by_actor) if actor_ids is None else actor_ids
            found = {actor: list(self._by_actor[actor]) for actor in wanted if actor in self._by_actor}
            if drain:
                for actor in found:
                    del self._by_actor[actor]
        return found

    def snapshot(self) -> dict[str, list[Trajectory]]:
        """All that it holds; it stays."""
        return self.trajectories()

    def drain(self) -> dict[str, list[Trajectory]]:
        """All that it holds; it is empty afterwards."""
        return self.trajectories(drain=True)

    def forget(self, actor_id: str) -> None:
        """Lets the trajectories of a removed actor go."""
        with self._lock:
            self._by_actor.pop(actor_id, None)

    def flush(self, timeout_seconds: float) -> bool:
        """Nothing in memory survives the process."""
        return True

    def close(self) -> None:
        """Lets everything go."""
        with self._lock:
            self._by_actor.clear()


class FileSink:
    """Writes every trajectory to an Arrow IPC file of its own, whole or not at all.

    The name is the trajectory_id, so names sort by creation. pandas, polars and DuckDB open the files;
    `read_trajectories` gives back every bit, metadata and final observation included.

    Args:
        schema: of the segments.
        directory: made if it is not there.

    Raises:
        SpoolError: the directory cannot be made.
    """

    def __init__(self, schema: RecordSchema, directory: Path | str) -> None:
        self._schema = schema
        self._digest = schema_digest(schema)
        self.directory = Path(directory)
        self._lock = threading.Lock()
        self._unsynced: deque[Path] = deque()
        self.written_total = 0
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise SpoolError(f"{self.directory} cannot be made: {exc}") from exc

    def write(self, segment: ClosedSegment) -> None:
        """Writes a file.

        Raises:
            SpoolError: the disk does not take it now; nothing is left of the attempt.
            InvalidTrajectory: the columns do not fit the schema.
        """
        trajectory = segment.trajectory()
        trajectory.metadata = msgspec.structs.replace(segment.metadata, schema_digest=self._digest)
        table = to_table(self._schema, trajectory)
        path = self.directory / f"{segment.metadata.trajectory_id}{FILE_SUFFIX}"
        temporary = path.with_suffix(".new")
        try:
            with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
            temporary.replace(path)
        except OSError as exc:
            temporary.unlink(missing_ok=True)
            raise SpoolError(f"{path} cannot be written: {exc}") from exc
        with self._lock:
            self._unsynced.append(path)
            self.written_total += 1
        if len(self._unsynced) >= _FLUSH_AFTER_FILES:
            self.flush(0.0)

    def flush(self, timeout_seconds: float) -> bool:
        """Makes the files durable. Files that were taken away meanwhile are their taker's.

        Raises:
            SpoolError: the disk refuses; it is tried again at the next flush.
        """
        with self._lock:
            while self._unsynced:
                path = self._unsynced[0]
                try:
                    _fsync_file(path)
                except OSError as exc:
                    raise SpoolError(f"{path} cannot be made durable: {exc}") from exc
                self._unsynced.popleft()
        return True

    def close(self) -> None:
        """Makes the files durable."""
        self.flush(0.0)


def _fsync_file(path: Path) -> None:
    """Makes a file and its name durable; nothing where it was taken away."""
    with contextlib.suppress(FileNotFoundError):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        fsync_directory(path.parent)


def read_trajectories(path: Path | str) -> Iterator[Trajectory]:
    """The trajectories of one file, or of all files of a directory in the order of their names.

    Raises:
        InvalidTrajectory: a file is none of ours, or damaged.
    """
    for file in _files(Path(path)):
        try:
            with pa.memory_map(str(file)) as source:
                table = pa.ipc.open_file(source).read_all()
        except (pa.ArrowInvalid, OSError) as exc:
            raise InvalidTrajectory(f"{file} is no Arrow file: {exc}", "file") from exc
        yield from_table(table)[1]


def _files(path: Path) -> list[Path]:
    return sorted(path.glob(f"*{FILE_SUFFIX}")) if path.is_dir() else [path]
