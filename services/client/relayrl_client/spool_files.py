"""The files of a spool: segment files with their acknowledgements, the lock and the state; driven by `spool`.

<spool_id>/lock                     held by flock while a process has the spool open
<spool_id>/state.msgpack            highest sequences and dropped ranges, replaced atomically
<spool_id>/schemas/<digest>         msgpack of the record schemas of its trajectories
<spool_id>/<number>.segment         records
<spool_id>/<number>.acknowledged    u64 offsets of acknowledged records of that segment file
<spool_id>/rejected/                what cannot be delivered any more, with the reason
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import msgspec

from relayrl_client.spool_records import SEGMENT_MAGIC, STATE_FORMAT, Scan, SpoolState, scan
from relayrl_shared.errors import SpoolError

LOCK_NAME = "lock"
STATE_NAME = "state.msgpack"
SCHEMAS_NAME = "schemas"
REJECTED_NAME = "rejected"
RESERVE_NAME = "reserve"
SEGMENT_SUFFIX = ".segment"
NOTES_SUFFIX = ".acknowledged"

_OFFSET = struct.Struct("<Q")
_MODE = 0o600
_RESERVE_BYTES = 16 << 10


def fsync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_durably(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, and makes it durable.

    Raises:
        OSError: it could not be written; what was there before still is.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    fsync_directory(path.parent)


def take_lock(directory: Path, *, create: bool) -> int | None:
    """Takes the spool's lock; its descriptor, or None where another process has it or it is gone."""
    path = directory / LOCK_NAME
    try:
        descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0) | os.O_CLOEXEC, _MODE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        still_there = os.fstat(descriptor).st_ino == path.stat().st_ino
    except OSError:
        still_there = False
    if not still_there:
        os.close(descriptor)
        return None
    return descriptor


class SegmentFile:
    """One segment file, open for as long as it has unacknowledged records. Not thread-safe.

    Attributes:
        size_bytes: of the file, up to its last whole record.
        pending: records that are not acknowledged.
        broken: a write failed and could not be taken back; nothing more may be appended.
    """

    def __init__(self, path: Path, descriptor: int, size_bytes: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self.size_bytes = size_bytes
        self.pending = 0
        self.broken = False
        self._notes: int | None = None
        self._notes_failed = False

    @classmethod
    def create(cls, path: Path) -> Self:
        """A new file, its name durable.

        Raises:
            OSError: it could not be made; nothing is left of it.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _MODE)
        try:
            write_all(descriptor, [SEGMENT_MAGIC], 0)
            fsync_directory(path.parent)
        except OSError:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        return cls(path, descriptor, len(SEGMENT_MAGIC))

    @classmethod
    def recover(cls, path: Path) -> tuple[Self, Scan, set[int]]:
        """An existing file, what it holds, and the offsets of records that were acknowledged before."""
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        with path.open("rb") as file:
            found = scan(memoryview(file.read()))
        return cls(path, descriptor, found.end), found, _read_offsets(path.with_suffix(NOTES_SUFFIX))

    def append(self, buffers: Sequence[bytes]) -> int:
        """Writes a record at the end; returns its offset.

        Raises:
            OSError: it could not be written whole; the file is as before, or `broken`.
        """
        offset = self.size_bytes
        try:
            self.size_bytes += write_all(self.descriptor, buffers, offset)
        except OSError:
            self.cut(offset)
            raise
        return offset

    def cut(self, size_bytes: int) -> None:
        """Takes back everything after `size_bytes`; where that fails the file is broken, and says so."""
        self.size_bytes = size_bytes
        try:
            os.ftruncate(self.descriptor, size_bytes)
        except OSError:
            self.broken = True

    def read(self, offset: int, size: int) -> bytes:
        """The bytes of a record.

        Raises:
            SpoolError: they are not there any more, or the disk does not give them.
        """
        try:
            data = os.pread(self.descriptor, size, offset)
        except OSError as exc:
            raise SpoolError(f"{self.path} cannot be read at {offset}: {exc}") from exc
        if len(data) != size:
            raise SpoolError(f"{self.path} lost a record at {offset}; was the file changed from outside?")
        return data

    def acknowledge(self, offset: int) -> None:
        """Notes that a record need not be sent again. A note that cannot be written costs a resend only."""
        self.pending -= 1
        if self._notes_failed:
            return
        try:
            if self._notes is None:
                path = self.path.with_suffix(NOTES_SUFFIX)
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._notes = os.open(path, flags, _MODE)
            self._notes_failed = os.write(self._notes, _OFFSET.pack(offset)) != _OFFSET.size
        except OSError:
            self._notes_failed = True

    def close(self) -> None:
        """Closes the descriptors; the file stays."""
        os.close(self.descriptor)
        if self._notes is not None:
            os.close(self._notes)

    def delete(self) -> None:
        """Removes the file, its records all being acknowledged."""
        self.close()
        self.path.unlink(missing_ok=True)
        self.path.with_suffix(NOTES_SUFFIX).unlink(missing_ok=True)


class SpoolDirectory:
    """The directory of one spool, locked: state, schemas, rejected records. Not thread-safe.

    Args:
        path: the directory; made if it is not there.
        ephemeral: its name was made up; what the state file says comes first.
        lock: the descriptor of its lock, if that is held already.

    Raises:
        SpoolError: another process has it, or it cannot be read or made.
    """

    def __init__(self, path: Path, *, ephemeral: bool, lock: int | None = None) -> None:
        self.path = path
        try:
            (path / SCHEMAS_NAME).mkdir(parents=True, exist_ok=True)
            descriptor = lock if lock is not None else take_lock(path, create=True)
            if descriptor is None:
                raise SpoolError(f"{path} is open in another process; give this one another spool_id")
            self._lock = descriptor
            self._load(ephemeral)
        except OSError as exc:
            raise SpoolError(f"the spool {path} cannot be opened: {exc}") from exc

    def _load(self, ephemeral: bool) -> None:
        try:
            state = self._read_state()
            self.state = state or SpoolState(ephemeral=ephemeral)
            if state is None:
                self.save(self.state)
                fsync_directory(self.path.parent)
            names = [path.name for path in (self.path / SCHEMAS_NAME).iterdir()]
            self._schemas = {name for name in names if not name.startswith(".")}
        except (OSError, SpoolError):
            os.close(self._lock)
            raise

    def _read_state(self) -> SpoolState | None:
        path = self.path / STATE_NAME
        try:
            state = msgspec.msgpack.decode(path.read_bytes(), type=SpoolState)
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as exc:
            raise SpoolError(f"{path} is damaged ({exc}); move the spool aside and start a new one") from exc
        if state.format > STATE_FORMAT:
            raise SpoolError(f"{path} is of format {state.format}, this release reads up to {STATE_FORMAT}")
        return state

    def save(self, state: SpoolState) -> None:
        """Replaces the state file durably, also on a full disk: a reserve is held for it.

        Raises:
            OSError: it could not be written all the same.
        """
        encoded = msgspec.msgpack.encode(state)
        try:
            replace_durably(self.path / STATE_NAME, encoded)
        except OSError:
            (self.path / RESERVE_NAME).unlink(missing_ok=True)
            replace_durably(self.path / STATE_NAME, encoded)
        self.state = state
        self._keep_reserve()

    def _keep_reserve(self) -> None:
        path = self.path / RESERVE_NAME
        if not path.exists():
            try:
                path.write_bytes(bytes(_RESERVE_BYTES))
            except OSError:
                path.unlink(missing_ok=True)

    def segment_paths(self) -> list[Path]:
        """The segment files, oldest first."""
        return sorted(self.path.glob(f"*{SEGMENT_SUFFIX}"))

    def put_schema(self, digest: str, encoded: bytes) -> None:
        """Keeps a record schema, durably. Raises OSError where that fails."""
        if digest not in self._schemas:
            replace_durably(self.path / SCHEMAS_NAME / digest, encoded)
            self._schemas.add(digest)

    def schema(self, digest: str) -> bytes | None:
        """The schema of a digest, if it is here."""
        return (self.path / SCHEMAS_NAME / digest).read_bytes() if digest in self._schemas else None

    def keep_rejected(self, name: str, record: bytes, reason: bytes) -> None:
        """Puts a record and why it is there aside, durably. Raises OSError where that fails."""
        directory = self.path / REJECTED_NAME
        directory.mkdir(exist_ok=True)
        replace_durably(directory / f"{name}.record", SEGMENT_MAGIC + record)
        replace_durably(directory / f"{name}.json", reason)

    def close(self, *, empty: bool) -> None:
        """Gives the lock back; a spool of a made-up name that holds nothing at all is removed first."""
        if empty and self.state.ephemeral and not (self.path / REJECTED_NAME).exists():
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def write_all(
    descriptor: int, buffers: Sequence[bytes], offset: int, write: Callable[..., int] = os.pwritev
) -> int:
    """Writes the buffers at an offset, in as many calls as it takes; returns their bytes.

    Raises:
        OSError: some of it could not be written.
    """
    parts = [memoryview(buffer) for buffer in buffers if buffer]
    total = 0
    while parts:
        written = write(descriptor, parts, offset + total)
        if written == 0:
            raise OSError(errno.ENOSPC, "nothing more could be written")
        total += written
        while parts and written >= len(parts[0]):
            written -= len(parts.pop(0))
        if parts:
            parts[0] = parts[0][written:]
    return total


def _read_offsets(path: Path) -> set[int]:
    """Acknowledged offsets; an incomplete last one is left out."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return set()
    whole = len(data) // _OFFSET.size * _OFFSET.size
    return {offset for (offset,) in _OFFSET.iter_unpack(data[:whole])}
