"""The bytes of a spool: records, segment files and the state file. Pure functions, driven by `spool`.

A segment file is the magic and records one after the other. A record is

    u32 header bytes | u32 body bytes | u32 final observation bytes | 16 bytes BLAKE3 | header | body | final

(little endian), the header the msgpack of the trajectory's metadata, the BLAKE3 that of the three lengths and
the header. The header's `body_digest` covers body and final observation, so that all of a record is checked.
A crash can leave an incomplete record at the end of the last file: `scan` reports where the good ones end.
After damage in the middle of a file it goes on at the next good record.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from relayrl_shared.arrow_codec import body_digest
from relayrl_shared.trajectory import TrajectoryMetadata

SEGMENT_MAGIC = b"RLSPOOL1"
STATE_FORMAT = 1

_LENGTHS = struct.Struct("<III")
_CHECK_BYTES = 16
_MAX_HEADER_BYTES = 64 << 10
_WINDOW_BYTES = 256 << 10
PREFIX_BYTES = _LENGTHS.size + _CHECK_BYTES

_HEADER_DECODER = msgspec.msgpack.Decoder(TrajectoryMetadata)
_HEADER_ENCODER = msgspec.msgpack.Encoder()


class RunState(msgspec.Struct, kw_only=True):
    """What must outlive the segment files of a run: its highest sequence, and what was dropped by policy."""

    highest: int = 0
    dropped: list[tuple[int, int]] = []  # inclusive, ascending, not touching


class SpoolState(msgspec.Struct, kw_only=True):
    """The state file. `ephemeral`: the spool's name was made up and nobody will come back for it."""

    format: int = STATE_FORMAT
    ephemeral: bool = False
    runs: dict[str, RunState] = {}


@dataclass(frozen=True, slots=True)
class RecordAt:
    """A good record: where it lies in its segment file, and its metadata.

    after_damage: bytes before it were passed over, that held other records.
    """

    offset: int
    size: int
    metadata: TrajectoryMetadata
    after_damage: bool = False


@dataclass(frozen=True, slots=True)
class Scan:
    """What a segment file holds: its good records, where the last of them ends, and what is not good."""

    records: tuple[RecordAt, ...]
    end: int
    torn_bytes: int
    """Bytes after `end`: an incomplete or damaged record, and no good one behind it."""
    corrupt: tuple[TrajectoryMetadata, ...]
    """Records before `end` whose body does not hash to its digest; they are passed over."""


def _check(lengths: bytes, header: bytes) -> bytes:
    return blake3(lengths + header).digest(_CHECK_BYTES)


def encode_record(metadata: TrajectoryMetadata, body: bytes, final_observation: bytes | None) -> list[bytes]:
    """A record as the buffers to write one after the other."""
    header = _HEADER_ENCODER.encode(metadata)
    final = final_observation or b""
    lengths = _LENGTHS.pack(len(header), len(body), len(final))
    return [lengths + _check(lengths, header) + header, body, final]


def decode_record(data: memoryview) -> tuple[TrajectoryMetadata, memoryview, memoryview | None, int] | None:
    """The record at the beginning of `data`.

    Returns:
        Metadata, body, final observation (None without one) and the size of the record in bytes; None where
        there is no whole record with a good header. The payload is not checked against its digest.
    """
    if len(data) < PREFIX_BYTES:
        return None
    header_bytes, body_bytes, final_bytes = _LENGTHS.unpack_from(data)
    size = PREFIX_BYTES + header_bytes + body_bytes + final_bytes
    if size > len(data):
        return None
    header = bytes(data[PREFIX_BYTES : PREFIX_BYTES + header_bytes])
    if _check(bytes(data[: _LENGTHS.size]), header) != data[_LENGTHS.size : PREFIX_BYTES]:
        return None
    try:
        metadata = _HEADER_DECODER.decode(header)
    except msgspec.MsgspecError:
        return None
    body_at = PREFIX_BYTES + header_bytes
    final = data[body_at + body_bytes : size] if final_bytes else None
    return metadata, data[body_at : body_at + body_bytes], final, size


def scan(data: memoryview) -> Scan:
    """The records of a segment file's content, cut off or damaged anywhere."""
    records: list[RecordAt] = []
    corrupt: list[TrajectoryMetadata] = []
    at = len(SEGMENT_MAGIC)
    if data[:at] != SEGMENT_MAGIC:
        return Scan((), 0, len(data), ())
    after_damage = False
    while True:
        decoded = decode_record(data[at:])
        if decoded is None:
            beyond = _next_record(data, at + 1)
            if beyond is None:
                break
            at, after_damage = beyond, True
            continue
        metadata, body, final, size = decoded
        if body_digest(body, final) == metadata.body_digest:
            records.append(RecordAt(at, size, metadata, after_damage))
            after_damage = False
        elif at + size == len(data):
            break  # the last record: torn, as a crash between the pages of one write leaves it
        else:
            corrupt.append(metadata)
        at += size
    return Scan(tuple(records), at, len(data) - at, tuple(corrupt))


def _next_record(data: memoryview, start: int) -> int | None:
    """Where the next record with a good header begins, at `start` or later."""
    raw = np.frombuffer(data, np.uint8)
    for window in range(start, len(raw) - PREFIX_BYTES + 1, _WINDOW_BYTES):
        part = raw[window : window + _WINDOW_BYTES + _LENGTHS.size - 1]
        count = len(part) - _LENGTHS.size + 1
        header, body, final = (_little_endian(part[field : field + count + 3]) for field in (0, 4, 8))
        end = np.arange(window, window + count, dtype=np.uint64) + PREFIX_BYTES + header + body + final
        likely = (header > 0) & (header <= _MAX_HEADER_BYTES) & (end <= len(raw))
        for offset in np.flatnonzero(likely).tolist():
            if decode_record(data[window + offset :]) is not None:
                return int(window + offset)
    return None


def _little_endian(raw: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """The u32 at each offset of n + 3 bytes; uint64 [n]."""
    count = len(raw) - 3
    total = np.zeros(count, np.uint64)
    for byte in range(4):
        total += raw[byte : byte + count].astype(np.uint64) << np.uint64(8 * byte)
    return total


class GapFinder:
    """Finds the sequences whose records were damaged beyond reading; follows the files in their order.

    Args:
        highest: by run, what the state file has: sequences up to it may be gone with files that were deleted.
    """

    def __init__(self, highest: Mapping[str, int]) -> None:
        self._floor = dict(highest)
        self._seen: set[tuple[str, int]] = set()
        self._lost: set[tuple[str, int]] = set()
        self._number: int | None = None
        self._highest: dict[str, int] = {}  # by run, in the files since the last one that is gone
        self._before_damage: dict[str, int] | None = None
        self._told: set[str] = set()  # runs with a record since the damage

    def follow(self, number: int, found: Scan) -> None:
        """Takes what the file of that number holds."""
        if self._number is None or number != self._number + 1:
            self._highest, self._before_damage = {}, None
        self._number = number
        for metadata in found.corrupt:
            self._seen.add((metadata.run_id, metadata.sequence))
        for record in found.records:
            self._take(record)
        if found.torn_bytes:
            self._note_damage()

    def _note_damage(self) -> None:
        self._before_damage, self._told = dict(self._highest), set()

    def _take(self, record: RecordAt) -> None:
        run_id, sequence = record.metadata.run_id, record.metadata.sequence
        if record.after_damage:
            self._note_damage()
        if self._before_damage is not None and run_id not in self._told:
            self._told.add(run_id)
            below = self._before_damage.get(run_id, self._floor.get(run_id, 0))
            self._lost.update((run_id, lost) for lost in range(below + 1, sequence))
        self._seen.add((run_id, sequence))
        self._highest[run_id] = max(sequence, self._highest.get(run_id, 0))

    def missing(self) -> list[tuple[str, int]]:
        """Run and sequence of what is nowhere, ascending."""
        return sorted(self._lost - self._seen)


def add_range(ranges: list[tuple[int, int]], sequence: int) -> list[tuple[int, int]]:
    """The inclusive ranges with one more sequence, ascending and joined where they touch."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted([*ranges, (sequence, sequence)]):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
        else:
            joined.append((low, high))
    return joined


def remove_from_ranges(ranges: list[tuple[int, int]], sequence: int) -> list[tuple[int, int]]:
    """The inclusive ranges without one sequence."""
    return list(_without(ranges, sequence))


def _without(ranges: list[tuple[int, int]], sequence: int) -> Iterator[tuple[int, int]]:
    for low, high in ranges:
        if not low <= sequence <= high:
            yield low, high
            continue
        if low < sequence:
            yield low, sequence - 1
        if sequence < high:
            yield sequence + 1, high
