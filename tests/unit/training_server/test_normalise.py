"""Running statistics against the statistics of all rows at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relayrl_shared.errors import SpecMismatch
from relayrl_training_server.normalise import RunningStatistics, forward_returns


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 2**32 - 1), st.floats(-1e6, 1e6))
def test_batches_give_the_statistics_of_all_rows(sizes: list[int], seed: int, offset: float) -> None:
    """However rows are cut into batches, mean and variance are those of all of them, far from 0 too."""
    rng = np.random.default_rng(seed)
    batches = [rng.standard_normal((size, 2, 3)) * 2.0 + offset for size in sizes]
    statistics = RunningStatistics((2, 3))
    for batch in batches:
        statistics.absorb(batch)
    rows = np.concatenate(batches)

    assert statistics.count == len(rows)
    np.testing.assert_allclose(statistics.mean, rows.mean(axis=0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(statistics.variance, rows.var(axis=0), rtol=1e-6, atol=1e-6)


def test_nothing_absorbed_is_the_identity() -> None:
    """Before the first row the mean is 0 and the scale 1."""
    statistics = RunningStatistics((2,))

    assert statistics.mean.tolist() == [0.0, 0.0]
    assert statistics.inv_std.tolist() == [1.0, 1.0]


def test_a_constant_element_does_not_divide_by_zero() -> None:
    """An element that never varies has a large but finite scale."""
    statistics = RunningStatistics((1,))
    statistics.absorb(np.ones((5, 1)))

    assert np.isfinite(statistics.inv_std).all()
    assert statistics.inv_std.dtype == np.float32


def test_rows_that_are_not_finite_are_left_out() -> None:
    """A NaN, which a run may allow, does not spread into the statistics."""
    statistics = RunningStatistics((2,))
    statistics.absorb(np.array([[1.0, 2.0], [np.nan, 3.0], [3.0, np.inf], [3.0, 4.0]]))

    assert statistics.count == 2
    assert statistics.mean.tolist() == [2.0, 3.0]


def test_no_finite_row_changes_nothing() -> None:
    """A batch of NaN alone leaves everything as it was."""
    statistics = RunningStatistics(())
    statistics.absorb(np.array([np.nan]))

    assert statistics.count == 0


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_a_restored_state_continues_to_the_bit(shape: tuple[int, ...]) -> None:
    """Scalars and arrays alike come back with their type."""
    rng = np.random.default_rng(0)
    one, other = RunningStatistics(shape), RunningStatistics(shape)
    one.absorb(rng.standard_normal((7, *shape)))
    other.restore(one.state())
    more = rng.standard_normal((5, *shape))
    one.absorb(more)
    other.absorb(more)

    assert all(isinstance(value, np.ndarray) for value in one.state().values())
    for name, value in one.state().items():
        np.testing.assert_array_equal(value, other.state()[name])


def test_other_shapes_are_refused() -> None:
    """Rows or states of another leaf are an error."""
    statistics = RunningStatistics((3,))
    with pytest.raises(SpecMismatch, match=r"expected rows of \(3,\), got \(2,\)"):
        statistics.absorb(np.zeros((4, 2)))
    with pytest.raises(SpecMismatch, match="checkpoint"):
        statistics.restore(RunningStatistics((2,)).state())


def test_forward_returns_run_from_each_chains_start() -> None:
    """R_t = γ R_{t-1} + r_t, chain by chain, without the padding."""
    rewards = np.array([[1.0, 10.0], [2.0, 99.0], [4.0, 99.0]])
    mask = np.array([[True, True], [True, False], [True, False]])

    assert forward_returns(rewards, mask, 0.5).tolist() == [1.0, 2.5, 5.25, 10.0]
