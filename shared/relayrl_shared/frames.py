"""Messages to ZMQ frames and back, as pure functions over bytes; driven by `sockets` on every address.

A message is `[header, *payload]`: the header is the msgpack of a struct of `messages`, the payload frames are
raw bytes whose number is fixed by the kind. `decode` raises `FrameError` (or its subclass
`ProtocolVersionError`) for any bytes that are not such a message, and nothing else. The specification for
other languages is docs/wire-protocol.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from relayrl_shared import messages
from relayrl_shared.errors import FrameError, ProtocolVersionError
from relayrl_shared.messages import PROTOCOL_VERSION, AnyMessage, LeafHeader, Message

Buffer = bytes | bytearray | memoryview

MAX_HEADER_BYTES = 16 << 20
MAX_LEAVES = 4096
MAX_DIMENSIONS = 16
LEAF_ALIGNMENT_BYTES = 8
MAX_LEAF_ELEMENTS = 1 << 40  # zero-sized axes left out, so that numpy can hold any shape that passes
LEAF_DTYPES = frozenset(
    {"bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}
    | {"float16", "float32", "float64"}
)

PAYLOAD_FRAMES: Mapping[type[Message], int] = {
    messages.PutTrajectory: 2,
    messages.PutSchema: 1,
    messages.PutBlob: 1,
    messages.Publish: 1,
    messages.ManifestReply: 1,
    messages.BlobChunk: 1,
    messages.RequestActions: 1,
    messages.Actions: 1,
}
"""Payload frames of the kinds that have any; every other kind has none."""

_DECODER: msgspec.msgpack.Decoder[AnyMessage] = msgspec.msgpack.Decoder(cast("Any", AnyMessage))
_ENCODER = msgspec.msgpack.Encoder()
_PADDING = bytes(LEAF_ALIGNMENT_BYTES)
_DTYPES = ", ".join(sorted(LEAF_DTYPES))
_DTYPE_NAMES: Mapping[np.dtype[Any], str] = {np.dtype(name): name for name in LEAF_DTYPES}

# What msgspec raises for bytes that are not the message asked for: its own errors, and what escapes from
# values of type Any (unhashable map keys, dates out of range, nesting too deep, text that is not UTF-8).
_DECODE_ERRORS = (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError)


class _Envelope(msgspec.Struct):
    """What can be told of a message that this code does not speak."""

    kind: str = ""
    version: int = PROTOCOL_VERSION
    request_id: int = 0


def encode(message: AnyMessage, payload: Sequence[Buffer] = ()) -> list[Buffer]:
    """The frames of a message: its header and its payload frames, which are not copied.

    Raises:
        FrameError: the kind takes another number of payload frames.
    """
    _check_payload_count(message, len(payload))
    return [_ENCODER.encode(message), *payload]


def decode(frames: Sequence[Buffer]) -> tuple[AnyMessage, list[memoryview]]:
    """The message and the payload in the frames.

    Raises:
        FrameError: they are no message of ours; `request_id` is set where it could be read.
        ProtocolVersionError: a message of another protocol version.
    """
    if not frames:
        raise FrameError("a message without a header frame")
    header = frames[0]
    if len(header) > MAX_HEADER_BYTES:
        raise FrameError(f"a header of {len(header)} bytes; the limit is {MAX_HEADER_BYTES}")
    try:
        message = _DECODER.decode(header)
    except _DECODE_ERRORS as error:
        raise _explain(header, error) from error
    if message.version != PROTOCOL_VERSION:
        raise _version_error(message.version, message.request_id)
    _check_payload_count(message, len(frames) - 1)
    return message, [memoryview(frame) for frame in frames[1:]]


def read_request_id(frames: Sequence[Buffer]) -> int:
    """The request id of a message that is not decoded further; 0 where it cannot be read."""
    try:
        return msgspec.msgpack.decode(frames[0][:MAX_HEADER_BYTES], type=_Envelope).request_id
    except (*_DECODE_ERRORS, IndexError):
        return 0


def _check_payload_count(message: AnyMessage, count: int) -> None:
    expected = PAYLOAD_FRAMES.get(type(message), 0)
    if count != expected:
        kind = type(message).__struct_config__.tag
        raise _with_request_id(
            FrameError(f"{kind} takes {expected} payload frames, not {count}"), message.request_id
        )


def _explain(header: Buffer, error: Exception) -> FrameError:
    """The error for a header that did not decode: of another version, or garbage."""
    try:
        envelope = msgspec.msgpack.decode(header, type=_Envelope)
    except _DECODE_ERRORS:
        return FrameError(f"the header does not parse: {error}")
    if envelope.version != PROTOCOL_VERSION:
        return _version_error(envelope.version, envelope.request_id)
    described = f"the header of a {envelope.kind[:64]!r} message does not parse: {error}"
    return _with_request_id(FrameError(described), envelope.request_id)


def _version_error(version: int, request_id: int) -> FrameError:
    message = f"protocol version {version} is not spoken here; version {PROTOCOL_VERSION} is"
    return _with_request_id(ProtocolVersionError(message), request_id)


def _with_request_id(error: FrameError, request_id: int) -> FrameError:
    error.request_id = request_id
    return error


# ---- packed leaves ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _LeafPlace:
    """Where one leaf lies in a packed frame."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    elements: int
    offset: int


def pack_leaves(leaves: Mapping[str, NDArray[Any]]) -> tuple[tuple[LeafHeader, ...], bytes]:
    """All leaves in one frame: little-endian, C order, each padded to a multiple of 8 bytes.

    Raises:
        FrameError: a dtype that the wire does not carry.
    """
    headers: list[LeafHeader] = []
    chunks: list[bytes] = []
    for name, array in leaves.items():
        dtype = _DTYPE_NAMES.get(array.dtype)
        if dtype is None:
            raise FrameError(f"leaf {name!r} has dtype {array.dtype.str}; the wire carries native {_DTYPES}")
        headers.append(LeafHeader(name, dtype, array.shape))
        chunks.append(array.tobytes())
        excess = len(chunks[-1]) % LEAF_ALIGNMENT_BYTES
        if excess:
            chunks.append(_PADDING[excess:])
    return tuple(headers), b"".join(chunks)


def unpack_leaves(leaves: tuple[LeafHeader, ...], frame: Buffer) -> dict[str, NDArray[Any]]:
    """The leaves in a packed frame as read-only views of it; nothing is allocated before the sizes agree.

    Raises:
        FrameError: a leaf twice, a dtype or shape that the wire does not carry, or sizes that disagree.
    """
    places, total_bytes = _layout(leaves)
    if len(frame) != total_bytes:
        raise FrameError(f"the leaves take {total_bytes} bytes, the frame has {len(frame)}")
    view = memoryview(frame).toreadonly()
    for place in places:
        if place.dtype.kind == "b" and not _is_bool(view[place.offset : place.offset + place.elements]):
            raise FrameError(f"leaf {place.name[:64]!r} is bool and has bytes other than 0 and 1")
    return {place.name: np.ndarray(place.shape, place.dtype, view, place.offset) for place in places}


def _is_bool(values: memoryview) -> bool:
    return not bytes(values).strip(b"\0\1")


@lru_cache(maxsize=1024)  # peers repeat few layouts, and this is the hot path of the inference server
def _layout(leaves: tuple[LeafHeader, ...]) -> tuple[tuple[_LeafPlace, ...], int]:
    if len(leaves) > MAX_LEAVES:
        raise FrameError(f"{len(leaves)} leaves; the limit is {MAX_LEAVES}")
    places: list[_LeafPlace] = []
    offset = 0
    for leaf in leaves:
        place = _place(leaf, offset)
        places.append(place)
        size = place.elements * place.dtype.itemsize
        offset += -(-size // LEAF_ALIGNMENT_BYTES) * LEAF_ALIGNMENT_BYTES
    if len({place.name for place in places}) != len(places):
        raise FrameError("a leaf is named twice")
    return tuple(places), offset


def _place(leaf: LeafHeader, offset: int) -> _LeafPlace:
    if leaf.dtype not in LEAF_DTYPES:
        raise FrameError(
            f"leaf {leaf.name[:64]!r} has dtype {leaf.dtype[:64]!r}, which the wire does not carry"
        )
    if len(leaf.shape) > MAX_DIMENSIONS or any(size < 0 for size in leaf.shape):
        raise FrameError(f"leaf {leaf.name[:64]!r} has an impossible shape")
    if math.prod(size or 1 for size in leaf.shape) > MAX_LEAF_ELEMENTS:
        raise FrameError(f"leaf {leaf.name[:64]!r} is too large")
    dtype = np.dtype(leaf.dtype).newbyteorder("<")
    return _LeafPlace(leaf.name, dtype, leaf.shape, math.prod(leaf.shape), offset)
