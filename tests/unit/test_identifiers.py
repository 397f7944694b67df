"""Ids: UUIDv7, strictly growing in a process."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator

from relayrl_shared.identifiers import IdentifierSource, new_id, uuid7


def clock(milliseconds: list[int]) -> Iterator[int]:
    """A clock that shows these times, in nanoseconds."""
    return iter([time * 1_000_000 for time in milliseconds])


def test_is_a_uuid_of_version_7() -> None:
    """The standard library reads version, variant and time."""
    times = clock([1_700_000_000_123])
    identifier = uuid.UUID(IdentifierSource(lambda: next(times)).uuid7())

    assert (identifier.version, identifier.variant) == (7, uuid.RFC_4122)
    assert identifier.int >> 80 == 1_700_000_000_123


def test_grows_when_the_clock_stands_or_steps_back() -> None:
    """Ids sort by creation, whatever the clock does."""
    times = clock([5_000, 5_000, 4_000, 1, 5_001, 5_000])
    source = IdentifierSource(lambda: next(times))

    made = [source.uuid7() for _ in range(6)]

    assert made == sorted(made)
    assert len(set(made)) == 6


def test_grows_past_the_end_of_the_random_bits() -> None:
    """When the random part of a millisecond is used up, the next millisecond is taken."""
    source = IdentifierSource(lambda: 7_000_000, lambda size: b"\xff" * size)

    first, second = uuid.UUID(source.uuid7()), uuid.UUID(source.uuid7())

    assert second > first
    assert second.int >> 80 == 8


def test_threads_get_distinct_ids() -> None:
    """Several threads at once make no id twice."""
    made: list[list[str]] = [[] for _ in range(4)]

    def make(into: list[str]) -> None:
        into.extend(uuid7() for _ in range(500))

    threads = [threading.Thread(target=make, args=(into,)) for into in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len({identifier for into in made for identifier in into}) == 2000
    assert all(into == sorted(into) for into in made)


def test_new_id_follows_uuid7() -> None:
    """Both names draw from one sequence."""
    assert uuid7() < new_id() < uuid7()
