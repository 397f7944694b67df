"""Figures of a training: rates over the last seconds, means over the last episodes."""

from __future__ import annotations

from relayrl_cli.meters import RateMeter, ReturnsMeter


def test_a_rate_is_over_the_last_seconds() -> None:
    """A slow start does not weigh on what happens now."""
    meter = RateMeter(window_seconds=2)

    assert meter.rate(0, 0) == 0
    assert meter.rate(1, 10) == 10
    assert [meter.rate(now, total) for now, total in ((2, 20), (3, 120), (4, 220))][-1] == 100


def test_samples_at_the_same_moment_give_no_rate() -> None:
    """Rather than a division by zero."""
    meter = RateMeter()
    meter.rate(1, 0)

    assert meter.rate(1, 5) == 0


def test_the_mean_is_of_the_last_episodes() -> None:
    """Older ones drop out, while all are counted."""
    meter = ReturnsMeter(window=3)
    assert meter.mean is None

    meter.add([100, 1])
    assert not meter.is_full
    meter.add([2, 3])

    assert meter.mean == 2
    assert (meter.episodes, meter.is_full) == (4, True)
