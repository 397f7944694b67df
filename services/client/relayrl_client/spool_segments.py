"""The segment files of one spool as a whole: which one is written, which may be deleted; driven by `spool`.

Not thread-safe: the spool calls under its lock.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from relayrl_client.spool_files import SEGMENT_SUFFIX, SegmentFile, SpoolDirectory
from relayrl_client.spool_records import SEGMENT_MAGIC, Scan

_log = logging.getLogger(__name__)


class SegmentSet:
    """The segment files, oldest first; the active one, if any, is the last.

    Args:
        directory: of the spool.
        segment_bytes: a file that would grow past this is closed and a new one begun.
        save_state: makes the sequences durable; called before a file goes. Raises OSError where it cannot.
    """

    def __init__(self, directory: SpoolDirectory, segment_bytes: int, save_state: Callable[[], None]) -> None:
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._save_state = save_state
        self._segments: dict[Path, SegmentFile] = {}
        self._active: SegmentFile | None = None
        self._next_number = 1

    def __iter__(self) -> Iterator[SegmentFile]:
        return iter(list(self._segments.values()))

    def __len__(self) -> int:
        return len(self._segments)

    @property
    def used_bytes(self) -> int:
        """Bytes of all files."""
        return sum(segment.size_bytes for segment in self._segments.values())

    def recover(self) -> Iterator[tuple[SegmentFile, Scan, set[int]]]:
        """Opens the files that are there: each with what it holds and which offsets were acknowledged."""
        for path in self._directory.segment_paths():
            self._next_number = int(path.stem) + 1
            found = SegmentFile.recover(path)
            self._segments[path] = found[0]
            yield found

    def append(self, buffers: Sequence[bytes]) -> tuple[SegmentFile, int]:
        """Writes a record; the file and the offset where it is.

        Raises:
            OSError: it could not be written, and is nowhere.
        """
        segment = self._file_for(sum(map(len, buffers)))
        return segment, segment.append(buffers)

    def _file_for(self, size: int) -> SegmentFile:
        active = self._active
        if active is not None and not active.broken:
            empty = active.size_bytes == len(SEGMENT_MAGIC)
            if empty or active.size_bytes + size <= self._segment_bytes:
                return active
        created = SegmentFile.create(self._directory.path / f"{self._next_number:012d}{SEGMENT_SUFFIX}")
        self._next_number += 1
        self._segments[created.path] = created
        self._active = created
        if active is not None:
            self.delete_if_done(active)
        return created

    def retire_active(self) -> None:
        """The next record begins a new file."""
        self._active = None

    def delete_if_done(self, segment: SegmentFile) -> bool:
        """Deletes a file without pending records that is not written any more; whether it is gone."""
        if segment.path not in self._segments:
            return True
        if segment.pending or segment is self._active:
            return False
        try:
            self._save_state()
        except OSError:
            return False  # a full disk; it is tried again when room is needed
        del self._segments[segment.path]
        try:
            segment.delete()
        except OSError as exc:
            _log.warning("%s cannot be deleted (%s); the next start sends it again", segment.path, exc)
        return True

    def free_done(self) -> bool:
        """Deletes whatever has no pending records, the active file included; whether bytes came free."""
        before = self.used_bytes
        if self._active is not None and self._active.pending == 0:
            self.retire_active()
        for segment in self:
            self.delete_if_done(segment)
        return self.used_bytes < before

    def close(self) -> None:
        """Deletes what is done and closes the rest."""
        self.free_done()
        for segment in self:
            segment.close()
