"""The serving counters and their sums."""

from __future__ import annotations

from relayrl_inference_server.counters import Histogram, ServingCounters, total


def test_values_are_counted_by_upper_bound() -> None:
    """A value on a bound belongs below it, one above all bounds to the last count."""
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        histogram.observe(value)

    assert histogram.counts == [2, 2, 1]
    assert histogram.total == 14.0


def test_total_adds_threads_and_leaves_them_alone() -> None:
    """Every field is summed into a copy."""
    parts = [ServingCounters(), ServingCounters()]
    for part in parts:
        part.requests_total += 2
        part.rows_total += 3
        part.errors["contract"] += 1
        part.latency.observe(0.002)
        part.inference_seconds += 0.5
    whole = total(parts)

    assert (whole.requests_total, whole.rows_total, whole.inference_seconds) == (4, 6, 1.0)
    assert whole.errors == {"contract": 2}
    assert sum(whole.latency.counts) == 2
    assert (parts[0].requests_total, sum(parts[0].latency.counts)) == (2, 1)
