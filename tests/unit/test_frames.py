"""Frames: round trips, and what bytes of any kind get."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from relayrl_shared import frames, messages
from relayrl_shared.errors import FrameError, ProtocolVersionError
from relayrl_shared.messages import AnyMessage, LeafHeader

ACK = messages.Ack(spool_id="s", run_id="r", sequence=3, request_id=12)

names = st.text(max_size=20)
counts = st.integers(0, 2**63 - 1)
MESSAGES: st.SearchStrategy[AnyMessage] = st.one_of(
    st.builds(messages.Ack, request_id=counts, spool_id=names, run_id=names, sequence=counts),
    st.builds(
        messages.Nack, spool_id=names, run_id=names, sequence=counts, reason=names, retryable=st.booleans()
    ),
    st.builds(
        messages.ErrorReply, code=names, message=names, retry_after_seconds=st.none() | st.floats(0, 10)
    ),
    st.builds(messages.Intent, intent_id=names, missing=st.lists(names).map(tuple)),
    st.builds(
        messages.Heartbeat, client_id=names, run_id=names, policy_versions=st.dictionaries(names, counts)
    ),
    st.builds(messages.Ok, traceparent=st.none() | names),
)


@given(MESSAGES)
@settings(max_examples=50, deadline=None)
def test_a_message_reads_back_equal(message: AnyMessage) -> None:
    """Whatever a message holds, its frames decode to the same message."""
    assert (message, []) == frames.decode(frames.encode(message))


@given(st.lists(st.binary(max_size=200), max_size=4))
@settings(max_examples=200, deadline=None)
def test_any_bytes_give_a_message_or_a_frame_error(received: list[bytes]) -> None:
    """No bytes make decode raise anything but a FrameError."""
    try:
        frames.decode(received)
    except FrameError:
        return


@given(MESSAGES, st.integers(0, 400), st.integers(0, 255), st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_damaged_message_gives_a_message_or_a_frame_error(
    message: AnyMessage, place: int, byte: int, cut: bool
) -> None:
    """A header with one byte changed or cut short never raises anything but a FrameError."""
    header = bytearray(bytes(frames.encode(message)[0]))
    place %= len(header)
    header[place] = byte
    try:
        frames.decode([header[:place] if cut else header])
    except FrameError:
        return


@pytest.mark.parametrize(
    "value",
    [
        b"\x91" * 5000,  # nested too deep
        b"\xdd\xff\xff\xff\xff",  # an array that claims four billion elements
        b"\xdb\xff\xff\xff\xff",  # a text that claims four billion bytes
        b"\x81\x91\x01\x01",  # a map key that cannot be hashed
        b"\xd7\xff\xff\xff\xff\xff\xff\xff\xff\xff",  # a time stamp out of range
        b"\xa2\xff\xff",  # text that is not UTF-8
        b"\xc1",  # a byte that msgpack never uses
    ],
)
def test_hostile_values_are_frame_errors(value: bytes) -> None:
    """Values made to hurt a decoder end as a FrameError."""
    header = b"\x82\xa4kind\xa5hello\xa3run\x81\xafhyperparameters\x81\xa1a" + value

    with pytest.raises(FrameError):
        frames.decode([header])


def test_another_protocol_version_is_named_with_the_request() -> None:
    """A message of version 2 raises ProtocolVersionError, which carries the request id to answer to."""
    header = msgspec.msgpack.encode({"kind": "greetings", "version": 2, "request_id": 5})

    with pytest.raises(ProtocolVersionError, match="version 2 is not spoken") as caught:
        frames.decode([header])

    assert caught.value.request_id == 5


def test_another_version_of_a_known_kind_is_refused_too() -> None:
    """The version counts even where the header would parse."""
    header = frames.encode(msgspec.structs.replace(ACK, version=2))[0]

    with pytest.raises(ProtocolVersionError) as caught:
        frames.decode([header])

    assert caught.value.request_id == 12


def test_an_unknown_kind_is_named_with_the_request() -> None:
    """A kind that this version does not have is a FrameError that names it and carries the request id."""
    header = msgspec.msgpack.encode({"kind": "greetings", "request_id": 5})

    with pytest.raises(FrameError, match="greetings") as caught:
        frames.decode([header])

    assert caught.value.request_id == 5


def test_a_missing_field_is_named() -> None:
    """The error for a header without a required field says which."""
    with pytest.raises(FrameError, match="spool_id"):
        frames.decode([msgspec.msgpack.encode({"kind": "ack", "run_id": "r", "sequence": 1})])


@pytest.mark.parametrize("payload", [(), (b"a",), (b"a", b"b", b"c")])
def test_a_wrong_number_of_payload_frames_is_refused_on_both_sides(payload: tuple[bytes, ...]) -> None:
    """A schema message has one payload frame; an acknowledgement has none."""
    message: AnyMessage = ACK if payload else messages.PutSchema(digest="d", request_id=12)
    with pytest.raises(FrameError, match="payload frames"):
        frames.encode(message, payload)

    header = msgspec.msgpack.encode(message)
    with pytest.raises(FrameError) as caught:
        frames.decode([header, *payload])

    assert caught.value.request_id == 12


def test_no_frames_and_a_header_over_the_limit_are_refused() -> None:
    """A message has a header, and it is bounded."""
    with pytest.raises(FrameError, match="without a header"):
        frames.decode([])
    with pytest.raises(FrameError, match="the limit"):
        frames.decode([bytes(frames.MAX_HEADER_BYTES + 1)])


def test_the_request_id_of_an_unread_message_is_found_or_zero() -> None:
    """A message that is refused unread can still be answered."""
    assert frames.read_request_id([frames.encode(ACK)[0], b"x"]) == 12
    assert frames.read_request_id([b"\xc1"]) == 0
    assert frames.read_request_id([]) == 0


LEAF_ARRAYS = st.dictionaries(
    names,
    st.sampled_from(sorted(frames.LEAF_DTYPES)).flatmap(
        lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
    ),
    max_size=4,
)


@given(LEAF_ARRAYS)
@settings(max_examples=100, deadline=None)
def test_packed_leaves_read_back_equal(leaves: dict[str, NDArray[Any]]) -> None:
    """Every dtype and shape comes back with the same bits, read-only."""
    unpacked = frames.unpack_leaves(*frames.pack_leaves(leaves))

    assert list(leaves) == list(unpacked)
    for name, array in leaves.items():
        assert (array.dtype, array.shape) == (unpacked[name].dtype, unpacked[name].shape)
        assert array.tobytes() == unpacked[name].tobytes()
        assert not unpacked[name].flags.writeable


def test_a_strided_array_is_packed_in_c_order() -> None:
    """A view that is not contiguous is sent as its values, not as its memory."""
    array = np.arange(12, dtype=np.int32).reshape(3, 4).T[::2]

    unpacked = frames.unpack_leaves(*frames.pack_leaves({"a": array}))

    assert np.array_equal(array, unpacked["a"])


@pytest.mark.parametrize("dtype", ["<U3", "datetime64[s]", "complex64", ">f4"])
def test_dtypes_that_the_wire_does_not_carry_are_refused(dtype: str) -> None:
    """Text, times, complex numbers and foreign byte order never leave the process."""
    with pytest.raises(FrameError, match="dtype"):
        frames.pack_leaves({"a": np.zeros(2, dtype=dtype)})


@pytest.mark.parametrize(
    ("leaf", "size"),
    [
        (LeafHeader("a", "object", (1,)), 8),
        (LeafHeader("a", "float33", (1,)), 8),
        (LeafHeader("a", "float32", (-1,)), 8),
        (LeafHeader("a", "float32", (2**62, 4)), 8),
        (LeafHeader("a", "float32", (0, 2**62)), 0),
        (LeafHeader("a", "float32", (3,)), 12),  # not padded
        (LeafHeader("a", "float32", (1,) * 40), 8),
        (LeafHeader("a", "float32", (2,)), 16),
    ],
)
def test_leaf_headers_that_lie_are_refused(leaf: LeafHeader, size: int) -> None:
    """Sizes, shapes and dtypes are checked before any array is made."""
    with pytest.raises(FrameError):
        frames.unpack_leaves((leaf,), bytes(size))


def test_a_leaf_named_twice_and_too_many_leaves_are_refused() -> None:
    """Names are unique and their number is bounded."""
    twice = (LeafHeader("a", "int64", ()), LeafHeader("a", "int64", ()))
    with pytest.raises(FrameError, match="twice"):
        frames.unpack_leaves(twice, bytes(16))
    many = tuple(LeafHeader(str(i), "int64", (0,)) for i in range(frames.MAX_LEAVES + 1))
    with pytest.raises(FrameError, match="the limit"):
        frames.unpack_leaves(many, b"")


def test_bool_bytes_other_than_0_and_1_are_refused() -> None:
    """A mask byte of 2 is neither allowed nor forbidden."""
    with pytest.raises(FrameError, match="bool"):
        frames.unpack_leaves((LeafHeader("a", "bool", (2,)),), b"\x01\x02\0\0\0\0\0\0")
