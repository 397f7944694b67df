"""The queue of the inference server, with the time passed in."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relayrl_inference_server.batcher import MAX_RETRY_SECONDS, Batch, Batcher, BatchLimits


def offer(
    batcher: Batcher[str],
    item: str,
    *,
    key: str = "policy",
    rows: int = 1,
    now: float = 0.0,
    deadline: float = 100.0,
    priority: int = 0,
) -> bool:
    """Offers with defaults."""
    return batcher.offer(key, item, rows, deadline=deadline, now=now, priority=priority)


def drain(batcher: Batcher[str], now: float = 0.0) -> list[Batch[str]]:
    """Takes until nothing is left."""
    batches = []
    while (batch := batcher.take(now)) is not None:
        batches.append(batch)
    return batches


def test_single_request_is_dispatched_at_once() -> None:
    """Nothing is held back to fill a batch."""
    batcher: Batcher[str] = Batcher(BatchLimits(max_batch_rows=100, max_delay_seconds=10.0))
    offer(batcher, "a", rows=3, now=5.0)
    batch = batcher.take(5.0)

    assert batch is not None
    assert (batch.key, batch.items, batch.rows, batch.oldest_at) == ("policy", ["a"], 3, 5.0)
    assert batcher.take(5.0) is None


def test_what_queued_meanwhile_goes_together_in_order() -> None:
    """Everything of one key shares a batch, first come first."""
    batcher: Batcher[str] = Batcher(BatchLimits())
    for item in "abcd":
        offer(batcher, item)

    assert [batch.items for batch in drain(batcher)] == [["a", "b", "c", "d"]]
    assert (batcher.queued_requests, batcher.queued_rows) == (0, 0)


def test_rows_of_a_batch_are_bounded() -> None:
    """A batch ends before the request that would go over the limit; order is kept."""
    batcher: Batcher[str] = Batcher(BatchLimits(max_batch_rows=10))
    for item, rows in (("a", 4), ("b", 4), ("c", 4), ("d", 6), ("e", 5)):
        offer(batcher, item, rows=rows)

    batches = drain(batcher)
    assert [(batch.items, batch.rows) for batch in batches] == [
        (["a", "b"], 8),
        (["c", "d"], 10),
        (["e"], 5),
    ]


def test_request_larger_than_a_batch_goes_alone() -> None:
    """It is not stuck, and nobody shares its batch."""
    batcher: Batcher[str] = Batcher(BatchLimits(max_batch_rows=10))
    offer(batcher, "large", rows=25)
    offer(batcher, "small")

    assert [batch.items for batch in drain(batcher)] == [["large"], ["small"]]


def test_keys_never_share_a_batch_and_the_fullest_goes_first() -> None:
    """Policies and versions have their own batches."""
    batcher: Batcher[str] = Batcher(BatchLimits(max_delay_seconds=1.0))
    offer(batcher, "a", key="x")
    offer(batcher, "b", key="y", rows=5)
    offer(batcher, "c", key="x")

    assert [(batch.key, batch.items) for batch in drain(batcher)] == [("y", ["b"]), ("x", ["a", "c"])]


def test_request_that_waited_for_the_maximum_delay_is_not_overtaken() -> None:
    """A rarely asked policy is not starved by a popular one."""
    batcher: Batcher[str] = Batcher(BatchLimits(max_delay_seconds=1.0))
    offer(batcher, "rare", key="x", now=0.0)
    offer(batcher, "popular", key="y", rows=50, now=0.5)

    early = batcher.take(0.9)
    offer(batcher, "popular again", key="y", rows=50, now=1.0)
    late = batcher.take(1.0)

    assert early is not None
    assert early.items == ["popular"]
    assert late is not None
    assert late.items == ["rare"]


def test_longest_waiting_goes_first_among_those_that_wait_too_long() -> None:
    """Age decides, not size."""
    batcher: Batcher[str] = Batcher(BatchLimits(max_delay_seconds=1.0))
    offer(batcher, "younger", key="x", rows=50, now=0.2)
    offer(batcher, "older", key="y", now=0.1)

    assert [batch.items for batch in drain(batcher, 5.0)] == [["older"], ["younger"]]


def test_higher_priority_goes_first_within_and_between_keys() -> None:
    """Priority beats order of arrival, size and age."""
    batcher: Batcher[str] = Batcher(BatchLimits(max_batch_rows=2, max_delay_seconds=0.0))
    offer(batcher, "a", rows=2)
    offer(batcher, "b", rows=2, priority=1)
    offer(batcher, "c", key="other", priority=2)

    assert [batch.items for batch in drain(batcher)] == [["c"], ["b"], ["a"]]


def test_expired_requests_are_handed_out_apart() -> None:
    """What is past its deadline is never among the items, and takes no room in a batch."""
    batcher: Batcher[str] = Batcher(BatchLimits(max_batch_rows=2))
    offer(batcher, "late", rows=2, deadline=1.0)
    offer(batcher, "a", rows=2, deadline=2.0)
    batch = batcher.take(1.0)

    assert batch is not None
    assert (batch.items, batch.expired, batch.rows) == (["a"], ["late"], 2)


def test_batch_may_hold_expired_requests_only() -> None:
    """They are still handed out, so that somebody answers them."""
    batcher: Batcher[str] = Batcher(BatchLimits())
    offer(batcher, "late", deadline=1.0)
    batch = batcher.take(5.0)

    assert batch is not None
    assert (batch.items, batch.expired) == ([], ["late"])
    assert (batcher.take(5.0), batcher.queued_rows) == (None, 0)


@pytest.mark.parametrize("limits", [BatchLimits(max_queued_requests=2), BatchLimits(max_queued_rows=7)])
def test_request_over_the_limit_is_not_taken(limits: BatchLimits) -> None:
    """The queue is bounded in requests and in rows; taking a batch makes room."""
    batcher: Batcher[str] = Batcher(limits)
    assert offer(batcher, "a", rows=3)
    assert offer(batcher, "b", rows=3)
    assert not offer(batcher, "c", rows=3)

    assert [batch.items for batch in drain(batcher)] == [["a", "b"]]
    assert offer(batcher, "c", rows=3)


def test_request_above_the_row_limit_is_taken_when_nothing_waits() -> None:
    """Otherwise it could never be served."""
    batcher: Batcher[str] = Batcher(BatchLimits(max_queued_rows=7))

    assert offer(batcher, "a", rows=100)
    assert not offer(batcher, "b", rows=1)


def test_retry_after_follows_the_measured_rate() -> None:
    """The time that the queue will take, within bounds."""
    batcher: Batcher[str] = Batcher(BatchLimits())
    assert batcher.retry_after_seconds() == pytest.approx(0.01)
    for _ in range(50):
        batcher.served(100, 0.1)
    offer(batcher, "a", rows=500)
    assert batcher.retry_after_seconds() == pytest.approx(0.5)
    offer(batcher, "b", rows=60_000)
    assert batcher.retry_after_seconds() == MAX_RETRY_SECONDS


REQUESTS = st.lists(
    st.tuples(
        st.sampled_from("xyz"), st.integers(1, 9), st.floats(0, 10), st.floats(0, 10), st.integers(0, 2)
    ),
    max_size=30,
)


@settings(max_examples=30)
@given(REQUESTS, st.floats(0, 10))
def test_everything_taken_is_handed_out_once(
    requests: list[tuple[str, int, float, float, int]], now: float
) -> None:
    """Every request comes out exactly once: as an item in time, or expired; batches keep their bound."""
    batcher: Batcher[str] = Batcher(BatchLimits(max_batch_rows=8, max_delay_seconds=0.5))
    for index, (key, rows, arrived, deadline, priority) in enumerate(requests):
        offer(batcher, str(index), key=key, rows=rows, now=arrived, deadline=deadline, priority=priority)
    batches = drain(batcher, now)

    items = [int(item) for batch in batches for item in batch.items]
    expired = [int(item) for batch in batches for item in batch.expired]
    assert sorted(items + expired) == list(range(len(requests)))
    assert all(requests[index][3] > now for index in items)
    assert all(requests[index][3] <= now for index in expired)
    assert all(batch.rows <= 8 or len(batch.items) == 1 for batch in batches)
    assert all(requests[int(item)][0] == batch.key for batch in batches for item in batch.items)
    assert (batcher.queued_requests, batcher.queued_rows) == (0, 0)
