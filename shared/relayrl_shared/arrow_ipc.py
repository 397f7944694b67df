"""Reads one serialised Arrow record batch of a known layout, driven by `arrow_codec`.

Pure functions over bytes. The bytes come from the network: every offset is checked before it is followed,
compression is refused, nothing is allocated that the bytes themselves do not pay for (eight bytes a bit of a
bitmap at most). Format: https://arrow.apache.org/docs/format/Columnar.html (encapsulated messages, little
endian), of which a batch of fixed-width columns needs the small part that is here.
"""

from __future__ import annotations

import struct
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from relayrl_shared.errors import InvalidTrajectory

Bytes: TypeAlias = "bytes | bytearray | memoryview"

_CONTINUATION = 0xFFFFFFFF
_RECORD_BATCH = 3  # MessageHeader.RecordBatch
_PREFIX_BYTES = 8
_NODE_BYTES = 16
_BUFFER_BYTES = 16

# Slots of the tables in Message.fbs.
_MESSAGE_HEADER_TYPE, _MESSAGE_HEADER, _MESSAGE_BODY_LENGTH = 1, 2, 3
_BATCH_LENGTH, _BATCH_NODES, _BATCH_BUFFERS, _BATCH_COMPRESSION, _BATCH_VARIADIC = 0, 1, 2, 3, 4


def _bad(what: str) -> InvalidTrajectory:
    return InvalidTrajectory(f"the body is no record batch of this schema: {what}", "body")


class _Flatbuffer:
    """Bounds-checked reads of the metadata of a message."""

    def __init__(self, data: memoryview) -> None:
        self._data = data

    def number(self, layout: str, at: int) -> int:
        """One little-endian integer."""
        if at < 0:
            raise _bad("an offset points before the metadata")
        try:
            value: int = struct.unpack_from(layout, self._data, at)[0]
        except struct.error as exc:
            raise _bad("an offset points past the metadata") from exc
        return value

    def slot(self, table: int, index: int) -> int | None:
        """Where a field of a table lies; None if it is absent."""
        vtable = table - self.number("<i", table)
        if 4 + 2 * index + 2 > self.number("<H", vtable):
            return None
        offset = self.number("<H", vtable + 4 + 2 * index)
        return table + offset if offset else None

    def follow(self, at: int | None) -> int:
        """The target of an offset field that must be there."""
        if at is None:
            raise _bad("a field of the metadata is missing")
        return at + self.number("<I", at)

    def pairs(self, at: int | None) -> list[tuple[int, int]]:
        """A vector of structs of two int64s."""
        start = self.follow(at)
        count = self.number("<I", start)
        if start + 4 + count * _NODE_BYTES > len(self._data):
            raise _bad("a vector is longer than the metadata")
        flat = struct.unpack_from(f"<{2 * count}q", self._data, start + 4)
        return list(zip(flat[::2], flat[1::2], strict=True))


class BatchReader:
    """Takes the columns of a serialised batch one after the other.

    Args:
        body: the encapsulated message: prefix, metadata, buffers.
        rows: rows that the batch must have, at least 1.

    Raises:
        InvalidTrajectory: (here and from every method) the bytes are not what was asked for.
    """

    def __init__(self, body: Bytes, rows: int) -> None:
        data = memoryview(body).cast("B")
        if rows < 1:
            raise InvalidTrajectory("a trajectory has at least one step", "no_steps")
        if len(data) < _PREFIX_BYTES:
            raise _bad("it is shorter than its prefix")
        continuation, metadata_bytes = struct.unpack_from("<Ii", data, 0)
        if continuation != _CONTINUATION or not 0 < metadata_bytes <= len(data) - _PREFIX_BYTES:
            raise _bad("it does not begin with the prefix of a message")
        self._rows = rows
        self._body = data[_PREFIX_BYTES + metadata_bytes :]
        self._read_metadata(_Flatbuffer(data[_PREFIX_BYTES : _PREFIX_BYTES + metadata_bytes]))
        self._next_node = 0
        self._next_buffer = 0

    def _read_metadata(self, metadata: _Flatbuffer) -> None:
        message = metadata.number("<I", 0)
        kind = metadata.slot(message, _MESSAGE_HEADER_TYPE)
        if kind is None or metadata.number("<B", kind) != _RECORD_BATCH:
            raise _bad("the message is of another kind")
        body_length = metadata.slot(message, _MESSAGE_BODY_LENGTH)
        if (metadata.number("<q", body_length) if body_length else 0) != len(self._body):
            raise _bad("its length differs from what it says")
        batch = metadata.follow(metadata.slot(message, _MESSAGE_HEADER))
        length = metadata.slot(batch, _BATCH_LENGTH)
        rows = metadata.number("<q", length) if length else 0
        if rows != self._rows:
            raise InvalidTrajectory(f"the body has {rows} rows, expected {self._rows}", "steps_mismatch")
        for unwanted in (_BATCH_COMPRESSION, _BATCH_VARIADIC):
            if metadata.slot(batch, unwanted) is not None:
                raise _bad("it is compressed or has columns of variable layout")
        self._nodes = metadata.pairs(metadata.slot(batch, _BATCH_NODES))
        self._buffers = metadata.pairs(metadata.slot(batch, _BATCH_BUFFERS))

    def column(
        self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]
    ) -> tuple[NDArray[np.bool_] | None, NDArray[Any]]:
        """The next column.

        Returns:
            Which rows are not null (bool [rows]; None: all of them), and the values, [rows, *shape].
        """
        nulls = self._node(name, self._rows)
        valid = self._validity(name, nulls)
        elements = self._rows
        for axis in shape:
            elements *= axis
        if shape:
            if self._node(name, elements):
                raise _bad(f"{name} has nulls inside a row")
            self._validity(name, 0)
        return valid, self._values(name, dtype, elements).reshape(self._rows, *shape)

    def finish(self) -> None:
        """Checks that no columns are left over."""
        if self._next_node != len(self._nodes) or self._next_buffer != len(self._buffers):
            raise _bad("it has more columns")

    def _node(self, name: str, length: int) -> int:
        """Null count of the next field node, whose length must be as given."""
        if self._next_node >= len(self._nodes):
            raise _bad(f"{name} is missing")
        found, nulls = self._nodes[self._next_node]
        self._next_node += 1
        if found != length or not 0 <= nulls <= length:
            raise _bad(f"{name} has {found} elements and {nulls} nulls, expected {length} elements")
        return nulls

    def _take(self, name: str) -> memoryview:
        """The next buffer."""
        if self._next_buffer >= len(self._buffers):
            raise _bad(f"{name} is missing")
        offset, length = self._buffers[self._next_buffer]
        self._next_buffer += 1
        if offset < 0 or length < 0 or offset + length > len(self._body):
            raise _bad(f"{name} points outside of the body")
        return self._body[offset : offset + length]

    def _validity(self, name: str, nulls: int) -> NDArray[np.bool_] | None:
        bitmap = self._take(name)
        if nulls == 0:
            return None
        valid = self._bits(name, bitmap, self._rows)
        if self._rows - int(np.count_nonzero(valid)) != nulls:
            raise _bad(f"the nulls of {name} are not as many as it says")
        return valid

    def _values(self, name: str, dtype: np.dtype[Any], elements: int) -> NDArray[Any]:
        data = self._take(name)
        if dtype == np.bool_:
            return self._bits(name, data, elements)
        needed = elements * dtype.itemsize
        if len(data) < needed:
            raise _bad(f"{name} has {len(data)} bytes, expected {needed}")
        array = np.frombuffer(data[:needed], dtype)
        array.flags.writeable = False
        return array

    def _bits(self, name: str, data: memoryview, count: int) -> NDArray[np.bool_]:
        if len(data) < (count + 7) // 8:
            raise _bad(f"{name} has {len(data)} bytes of bits, expected {(count + 7) // 8}")
        bits = np.unpackbits(np.frombuffer(data, np.uint8), count=count, bitorder="little")
        return bits.view(np.bool_)
