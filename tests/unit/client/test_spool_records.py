"""The bytes of a spool: records read back, and what is cut off or damaged is found."""

from __future__ import annotations

import itertools
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relayrl_client.spool_records import (
    PREFIX_BYTES,
    SEGMENT_MAGIC,
    GapFinder,
    RecordAt,
    Scan,
    add_range,
    decode_record,
    encode_record,
    remove_from_ranges,
    scan,
)
from relayrl_shared.arrow_codec import body_digest
from relayrl_shared.testing.trajectories import make_metadata
from relayrl_shared.trajectory import TrajectoryMetadata

Payload = tuple[TrajectoryMetadata, bytes, bytes | None]
Decoded = tuple[TrajectoryMetadata, memoryview, memoryview | None, int]


def payload(sequence: int, body: bytes, final: bytes | None) -> Payload:
    """A record's content, its digest right."""
    return make_metadata(1, sequence=sequence, body_digest=body_digest(body, final)), body, final


def segment(payloads: list[Payload]) -> bytes:
    """A whole segment file."""
    return SEGMENT_MAGIC + b"".join(b"".join(encode_record(*each)) for each in payloads)


def as_bytes(decoded: Decoded) -> tuple[bytes, bytes | None]:
    """Body and final observation of a decoded record."""
    return bytes(decoded[1]), None if decoded[2] is None else bytes(decoded[2])


finals = st.one_of(st.none(), st.binary(min_size=1, max_size=20))
contents = st.lists(st.tuples(st.binary(max_size=60), finals), max_size=5).map(
    lambda bodies: [payload(number, *each) for number, each in enumerate(bodies, 1)]
)


@settings(max_examples=40, deadline=None)
@given(st.binary(max_size=300), finals)
def test_record_reads_back(body: bytes, final: bytes | None) -> None:
    """Metadata, body and final observation come back, and the size is that of the bytes."""
    metadata, _, _ = payload(7, body, final)
    encoded = b"".join(encode_record(metadata, body, final))

    decoded = decode_record(memoryview(encoded + b"what follows"))

    assert decoded is not None
    assert decoded[0] == metadata
    assert as_bytes(decoded) == (body, final)
    assert decoded[3] == len(encoded)


@settings(max_examples=60, deadline=None)
@given(contents, st.data())
def test_cut_anywhere_keeps_exactly_what_was_whole_before(
    payloads: list[Payload], data: st.DataObject
) -> None:
    """After a cut at any byte, the records that end before it are found, and nothing else."""
    whole = segment(payloads)
    cut = data.draw(st.integers(0, len(whole)))
    ends = [len(segment(payloads[:count])) for count in range(len(payloads) + 1)]

    found = scan(memoryview(whole[:cut]))

    expected = [each[0] for each, end in zip(payloads, ends[1:], strict=True) if end <= cut]
    assert [record.metadata for record in found.records] == expected
    assert found.end + found.torn_bytes == cut
    assert found.end == max((end for end in ends if end <= cut), default=0)


@settings(max_examples=60, deadline=None)
@given(contents.filter(bool), st.data())
def test_flipped_bit_never_yields_a_changed_record(payloads: list[Payload], data: st.DataObject) -> None:
    """Whatever bit is wrong, every record that is found is one that was written."""
    damaged = bytearray(segment(payloads))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))

    found = scan(memoryview(bytes(damaged)))

    for record in found.records:
        decoded = decode_record(memoryview(damaged)[record.offset :])
        assert decoded is not None
        assert (decoded[0], *as_bytes(decoded)) in payloads


def test_damaged_body_in_the_middle_is_passed_over() -> None:
    """A record whose body rotted is named; those after it are still found."""
    payloads = [payload(number, bytes([number] * 50), None) for number in (1, 2, 3)]
    damaged = bytearray(segment(payloads))
    damaged[len(segment(payloads[:2])) - 1] ^= 1

    found = scan(memoryview(bytes(damaged)))

    assert [record.metadata.sequence for record in found.records] == [1, 3]
    assert [metadata.sequence for metadata in found.corrupt] == [2]
    assert found.torn_bytes == 0


def test_damage_that_is_far_from_the_next_record_is_passed_over() -> None:
    """Whatever window of the search the next record begins in, it is found."""
    first, second = payload(1, b"a" * 300_000, None), payload(2, b"b", None)
    for size in (300_000, 262_144, 262_133):
        first = payload(1, b"a" * size, None)
        data = bytearray(segment([first, second]))
        data[len(SEGMENT_MAGIC) + 20] ^= 0xFF

        found = scan(memoryview(bytes(data)))

        assert [(record.metadata, record.after_damage) for record in found.records] == [(second[0], True)]
        assert found.torn_bytes == 0


def found_in(*sequences: int, damage_before: int | None = None, torn: bool = False) -> Scan:
    """What a file holds."""
    records = tuple(
        RecordAt(sequence, 1, make_metadata(1, run_id="r", sequence=sequence), sequence == damage_before)
        for sequence in sequences
    )
    return Scan(records, 0, int(torn), ())


def test_what_was_acknowledged_and_deleted_is_not_called_damaged() -> None:
    """Only what must have been where the damage is counts as lost, and not what is there a second time."""
    gaps = GapFinder({"r": 3})
    gaps.follow(2, found_in(5, 8, damage_before=5))
    gaps.follow(3, found_in(9, 12, damage_before=12))
    gaps.follow(5, found_in(20, 21, 10))
    gaps.follow(6, found_in(22, torn=True))
    gaps.follow(7, found_in(24))

    assert gaps.missing() == [("r", 4), ("r", 11), ("r", 23)]


@pytest.mark.parametrize("garbage", [b"", b"x", os.urandom(PREFIX_BYTES), b"\xff" * 200, b"\0" * 200])
def test_garbage_after_the_last_record_is_torn(garbage: bytes) -> None:
    """Lengths of garbage, of ones and of zeros are not followed."""
    good = segment([payload(1, b"body", None)])

    found = scan(memoryview(good + garbage))

    assert (len(found.records), found.end, found.torn_bytes) == (1, len(good), len(garbage))


@given(st.lists(st.integers(1, 30), unique=True), st.integers(1, 30))
def test_ranges_are_sets_written_shortly(sequences: list[int], gone: int) -> None:
    """Adding in any order and removing gives inclusive, ascending ranges that do not touch."""
    ranges: list[tuple[int, int]] = []
    for sequence in sequences:
        ranges = add_range(ranges, sequence)
    ranges = remove_from_ranges(ranges, gone)

    held = [number for low, high in ranges for number in range(low, high + 1)]
    assert held == sorted(set(sequences) - {gone})
    assert all(earlier[1] + 1 < later[0] for earlier, later in itertools.pairwise(ranges))
