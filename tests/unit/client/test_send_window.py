"""The window decides order, bounds and pauses, without sockets or clocks."""

from __future__ import annotations

from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relayrl_client.send_window import Parcel, SendWindow
from relayrl_client.spool import Spool
from relayrl_client.spool_files import SegmentFile
from relayrl_client.spool_index import SpoolEntry


class NamedSpool:
    """All that the window looks at in a spool."""

    spool_id = "spool"


SPOOL = cast(Spool, NamedSpool())


def entry(sequence: int, size_bytes: int = 10) -> SpoolEntry:
    """An accepted entry."""
    segment = cast(SegmentFile, None)
    return SpoolEntry("run", sequence, f"id {sequence}", "actor", size_bytes, segment, 0, accepted=True)


def window(max_in_flight: int = 2, max_in_flight_bytes: int = 1000, jitter: float = 1.0) -> SendWindow:
    """A window without chance."""
    return SendWindow(max_in_flight, max_in_flight_bytes, lambda: jitter)


def take_all(sending: SendWindow, now: float = 0.0) -> list[Parcel]:
    """Everything that may go now."""
    taken = []
    while (parcel := sending.take(now)) is not None:
        taken.append(parcel)
    return taken


def numbers(parcels: list[Parcel]) -> list[int]:
    """Their sequences."""
    return [parcel.entry.sequence for parcel in parcels]


def test_in_order_and_at_most_the_limit() -> None:
    """Parcels go in the order of their offer; the next goes when one is done."""
    sending = window(max_in_flight=2)
    sending.offer(SPOOL, [entry(1), entry(2), entry(3)])

    first = take_all(sending)
    sending.done(first[0])

    assert numbers(first) == [1, 2]
    assert numbers(take_all(sending)) == [3]


def test_bytes_are_bounded_but_a_large_one_goes_alone() -> None:
    """The sum stays below the limit; a parcel above it goes when nothing else is in flight."""
    sending = window(max_in_flight=9, max_in_flight_bytes=100)
    sending.offer(SPOOL, [entry(1, 60), entry(2, 60), entry(3, 500)])

    waves = []
    while wave := take_all(sending):
        waves.append(numbers(wave))
        for parcel in wave:
            sending.done(parcel)

    assert waves == [[1], [2], [3]]


def test_the_same_entry_is_taken_once() -> None:
    """An entry offered twice, also while it is in flight, goes once; after it is done it could come again."""
    sending = window()
    sending.offer(SPOOL, [entry(1), entry(1)])
    (parcel,) = take_all(sending)
    sending.offer(SPOOL, [entry(1)])

    assert take_all(sending) == []
    sending.done(parcel)
    assert (sending.in_flight, sending.waiting) == (0, 0)


def test_what_comes_back_goes_first() -> None:
    """A parcel that is sent again goes before those that were never sent."""
    sending = window(max_in_flight=1)
    sending.offer(SPOOL, [entry(1), entry(2)])
    (parcel,) = take_all(sending)

    sending.retry(parcel, now=0.0)

    assert numbers(take_all(sending, now=100.0)) == [1]


def test_pauses_double_and_end_with_a_success() -> None:
    """Failures in a row wait longer each time, up to five seconds; a success starts over."""
    sending, now, pauses = window(), 0.0, []
    sending.offer(SPOOL, [entry(1)])
    for _ in range(10):
        (parcel,) = take_all(sending, now)
        sending.retry(parcel, now)
        pauses.append(round(sending.seconds_until_ready(now) or 0.0, 3))
        now += pauses[-1] + 0.001
    sending.succeeded()
    (parcel,) = take_all(sending, now)
    sending.retry(parcel, now)

    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
    assert sending.seconds_until_ready(now) == pytest.approx(0.05)


def test_many_failures_at_once_count_as_one() -> None:
    """A lost connection fails everything in flight and doubles the pause once."""
    sending = window(max_in_flight=50)
    sending.offer(SPOOL, [entry(number) for number in range(50)])
    for parcel in take_all(sending):
        sending.retry(parcel, 0.0)

    assert sending.seconds_until_ready(0.0) == pytest.approx(0.05)


@given(st.floats(0, 0.999))
def test_jitter_takes_at_most_half(jitter: float) -> None:
    """Pauses spread between half and all of the back-off."""
    sending = window(jitter=jitter)
    sending.offer(SPOOL, [entry(1)])
    (parcel,) = take_all(sending)
    sending.retry(parcel, 0.0)

    assert 0.025 <= (sending.seconds_until_ready(0.0) or 0.0) <= 0.05


def test_the_servers_time_is_respected() -> None:
    """retry_after lasts as long as the server says, also when shorter pauses follow."""
    sending = window(max_in_flight=2)
    sending.offer(SPOOL, [entry(1), entry(2)])
    first, second = take_all(sending)

    sending.retry(first, 0.0, retry_after_seconds=3.0)
    sending.retry(second, 0.0)

    assert take_all(sending, 2.9) == []
    assert numbers(take_all(sending, 3.0)) == [1, 2]


def test_held_parcels_wait_for_their_schema() -> None:
    """All that need a schema are held, the first is told so, and they go in their old order."""
    sending = window(max_in_flight=3)
    sending.offer(SPOOL, [entry(1), entry(2), entry(3)])
    first, second, _ = take_all(sending)

    firsts = [sending.hold(second, "digest"), sending.hold(first, "digest")]

    assert firsts == [True, False]
    assert sending.is_held("digest")
    assert (sending.in_flight, sending.waiting) == (1, 2)
    sending.release("digest")
    assert numbers(take_all(sending)) == [1, 2]
