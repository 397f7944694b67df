"""Returns and advantages against slow transcriptions of the papers' formulas."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from relayrl_shared.errors import SpecMismatch
from relayrl_training_server.returns import discounted_returns, gae, vtrace

Floats = NDArray[np.float64]


class Chains(NamedTuple):
    """A random batch: arrays [T, B], bootstrap_value [B], lengths of the chains."""

    rewards: Floats
    values: Floats
    log_rhos: Floats
    bootstrap_value: Floats
    mask: NDArray[np.bool_]
    lengths: list[int]


@st.composite
def chains(draw: st.DrawFn) -> Chains:
    """Chains of random lengths, padded with numbers that must not matter, some of them terminated."""
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (max(lengths) + draw(st.integers(0, 2)), len(lengths))
    mask = np.arange(shape[0])[:, None] < np.array(lengths)[None, :]
    rewards, values, log_rhos = (rng.normal(size=shape) * scale for scale in (2.0, 3.0, 0.7))
    bootstrap_value = (
        rng.normal(size=len(lengths)) * draw(st.lists(st.sampled_from([0.0, 5.0]), min_size=1))[0]
    )
    return Chains(rewards, values, log_rhos, bootstrap_value, mask, lengths)


def values_after(c: Chains, b: int) -> list[float]:
    """V(s_1) … V(s_n) of chain b: the next steps' values and the bootstrap value."""
    return [*c.values[1 : c.lengths[b], b], c.bootstrap_value[b]]


def slow_gae(c: Chains, b: int, t: int, gamma: float, lam: float) -> float:
    """Eq. 16 of Schulman et al., term by term."""
    follows = values_after(c, b)
    total = 0.0
    for k in range(c.lengths[b] - t):
        delta = c.rewards[t + k, b] + gamma * follows[t + k] - c.values[t + k, b]
        total += (gamma * lam) ** k * delta
    return float(total)


def slow_return(c: Chains, b: int, t: int, gamma: float) -> float:
    """The sum of discounted rewards, then the bootstrap value."""
    n = c.lengths[b]
    rewards = sum(gamma ** (k - t) * c.rewards[k, b] for k in range(t, n))
    return float(rewards + gamma ** (n - t) * c.bootstrap_value[b])


def slow_vtrace(c: Chains, b: int, t: int, gamma: float, lam: float) -> float:
    """Eq. 1 of Espeholt et al. with the λ of remark 2, term by term; ρ̄ = c̄ = 1."""
    follows = values_after(c, b)
    total = c.values[t, b]
    for s in range(t, c.lengths[b]):
        product = 1.0
        for i in range(t, s):
            product *= lam * min(1.0, np.exp(c.log_rhos[i, b]))
        delta = c.rewards[s, b] + gamma * follows[s] - c.values[s, b]
        total += gamma ** (s - t) * product * min(1.0, np.exp(c.log_rhos[s, b])) * delta
    return float(total)


def per_step(c: Chains) -> list[tuple[int, int]]:
    """Every (t, b) that holds a step."""
    return [(t, b) for b, n in enumerate(c.lengths) for t in range(n)]


unit = st.floats(0.0, 1.0)


@settings(max_examples=60, deadline=None)
@given(chains(), unit, unit)
def test_gae_equals_the_papers_sum(c: Chains, gamma: float, lam: float) -> None:
    """The recursion gives the sum of eq. 16 for every step, and 0 in the padding."""
    advantages = gae(c.rewards, c.values, c.bootstrap_value, c.mask, gamma, lam)

    assert advantages.dtype == np.float32
    assert not advantages[~c.mask].any()
    for t, b in per_step(c):
        assert advantages[t, b] == pytest.approx(slow_gae(c, b, t, gamma, lam), rel=1e-4, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(chains(), unit)
def test_returns_equal_the_discounted_sum(c: Chains, gamma: float) -> None:
    """Returns to go are the discounted rewards and what follows the last one."""
    returns = discounted_returns(c.rewards, c.bootstrap_value, c.mask, gamma)

    assert not returns[~c.mask].any()
    for t, b in per_step(c):
        assert returns[t, b] == pytest.approx(slow_return(c, b, t, gamma), rel=1e-4, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(chains(), unit, unit)
def test_vtrace_equals_the_papers_sum(c: Chains, gamma: float, lam: float) -> None:
    """Value targets are eq. 1, and the advantage bootstraps from the mixed next target."""
    result = vtrace(c.log_rhos, c.rewards, c.values, c.bootstrap_value, c.mask, gamma, lam)

    assert not result.value_target[~c.mask].any()
    assert not result.advantage[~c.mask].any()
    for t, b in per_step(c):
        last = t + 1 == c.lengths[b]
        target = c.bootstrap_value[b] if last else slow_vtrace(c, b, t + 1, gamma, lam)
        mixed = lam * target + (1 - lam) * values_after(c, b)[t]
        advantage = c.rewards[t, b] + gamma * mixed - c.values[t, b]
        expected = slow_vtrace(c, b, t, gamma, lam)
        assert result.value_target[t, b] == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert result.advantage[t, b] == pytest.approx(advantage, rel=1e-4, abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(chains(), unit, unit)
def test_vtrace_on_policy_is_gae(c: Chains, gamma: float, lam: float) -> None:
    """Where behaviour and target agree, V-trace advantages are GAE and the targets V + GAE."""
    on_policy = vtrace(np.zeros_like(c.log_rhos), c.rewards, c.values, c.bootstrap_value, c.mask, gamma, lam)
    advantages = gae(c.rewards, c.values, c.bootstrap_value, c.mask, gamma, lam)

    np.testing.assert_allclose(on_policy.advantage, advantages, rtol=1e-4, atol=1e-4)
    expected = np.where(c.mask, c.values + advantages, 0.0)
    np.testing.assert_allclose(on_policy.value_target, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(chains(), unit)
def test_gae_with_lambda_one_is_return_minus_value(c: Chains, gamma: float) -> None:
    """λ = 1 telescopes to the return to go minus the value."""
    advantages = gae(c.rewards, c.values, c.bootstrap_value, c.mask, gamma, 1.0)
    returns = discounted_returns(c.rewards, c.bootstrap_value, c.mask, gamma)

    np.testing.assert_allclose(advantages, np.where(c.mask, returns - c.values, 0.0), rtol=1e-3, atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(chains(), st.integers(0, 3))
def test_what_stands_in_the_padding_does_not_matter(c: Chains, extra: int) -> None:
    """More padding, with NaN in it, changes no step."""
    pad = np.full((extra + 1, len(c.lengths)), np.nan)
    rewards, values = (np.concatenate([np.where(c.mask, x, np.nan), pad]) for x in (c.rewards, c.values))
    mask = np.concatenate([c.mask, np.zeros(pad.shape, dtype=bool)])

    padded = gae(rewards, values, c.bootstrap_value, mask, 0.9, 0.8)

    np.testing.assert_array_equal(
        padded[: len(c.mask)], gae(c.rewards, c.values, c.bootstrap_value, c.mask, 0.9, 0.8)
    )
    assert not padded[len(c.mask) :].any()


def test_known_numbers() -> None:
    """A terminated and a truncated chain, worked out by hand: γ = 0.5, λ = 0.5."""
    rewards, values = np.array([[1.0, 1.0], [2.0, 2.0]]), np.array([[4.0, 4.0], [2.0, 2.0]])
    mask = np.ones((2, 2), dtype=bool)

    advantages = gae(rewards, values, np.array([0.0, 8.0]), mask, 0.5, 0.5)

    # terminated: δ = (1 + 1 - 4, 2 + 0 - 2); truncated: δ = (-2, 2 + 4 - 2)
    np.testing.assert_array_equal(advantages, np.array([[-2.0, -1.0], [0.0, 4.0]], dtype=np.float32))


def test_shapes_that_disagree_are_refused_by_name() -> None:
    """The error names the array and both shapes."""
    mask, ones = np.ones((3, 2), dtype=bool), np.ones((3, 2))

    with pytest.raises(SpecMismatch, match=r"values: expected \(3, 2\).*got \(2, 2\)"):
        gae(ones, np.ones((2, 2)), np.ones(2), mask, 0.9, 0.9)
    with pytest.raises(SpecMismatch, match=r"bootstrap_value: expected \(2,\), got \(3,\)"):
        gae(ones, ones, np.ones(3), mask, 0.9, 0.9)
    with pytest.raises(SpecMismatch, match=r"expected bool \[T, B\], got float64"):
        discounted_returns(ones, np.ones(2), ones, 0.9)  # type: ignore[arg-type]


def test_a_chain_with_a_hole_is_refused() -> None:
    """Steps of a chain stand together; a hole would bootstrap from nothing."""
    mask = np.array([[True], [False], [True]])

    with pytest.raises(SpecMismatch, match="hole"):
        discounted_returns(np.ones((3, 1)), np.zeros(1), mask, 0.9)
