"""Losses against row-by-row transcriptions of their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from relayrl_training_server.losses import (
    approximate_kl,
    clip_fraction,
    clipped_surrogate,
    entropy_loss,
    explained_variance,
    reinforce_loss,
    standardise,
    value_loss,
    weighted_mean,
)

Rows = list[tuple[float, float, float, bool]]  # log_prob, behaviour_log_prob, advantage, counts

numbers = st.floats(-2.0, 2.0, width=32)
rows = st.lists(st.tuples(numbers, numbers, numbers, st.booleans()), min_size=1, max_size=8)


def columns(given_rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows as four float32 tensors."""
    table = torch.tensor([[float(x) for x in row] for row in given_rows], dtype=torch.float32)
    return table[:, 0], table[:, 1], table[:, 2], table[:, 3]


@settings(max_examples=80, deadline=None)
@given(rows, st.floats(0.05, 0.5))
def test_the_surrogate_equals_the_papers_formula(given_rows: Rows, clip_ratio: float) -> None:
    """Each row that counts gives min(r A, clip(r) A); the loss is minus their mean."""
    log_prob, behaviour, advantage, weight = columns(given_rows)
    gains = []
    for new, old, a, counts in given_rows:
        r = math.exp(new - old)
        if counts:
            gains.append(min(r * a, min(max(r, 1 - clip_ratio), 1 + clip_ratio) * a))
    expected = -sum(gains) / len(gains) if gains else 0.0

    result = clipped_surrogate(log_prob, behaviour, advantage, clip_ratio, weight)

    assert float(result.loss) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    for r, (new, old, _, _) in zip(result.ratio.tolist(), given_rows, strict=True):
        assert r == pytest.approx(math.exp(new - old), rel=1e-4)


def test_the_surrogate_stops_pushing_past_the_clip() -> None:
    """A ratio beyond the clip in the good direction has no gradient; in the bad direction it has."""
    log_prob = torch.tensor([0.5, 0.5], requires_grad=True)
    loss = clipped_surrogate(log_prob, torch.zeros(2), torch.tensor([1.0, -1.0]), 0.2, None).loss
    (gradient,) = torch.autograd.grad(loss, log_prob)

    assert gradient[0] == 0.0
    assert float(gradient[1]) == pytest.approx(math.exp(0.5) / 2)


@settings(max_examples=50, deadline=None)
@given(rows)
def test_the_kl_estimate_equals_its_formula_and_is_not_negative(given_rows: Rows) -> None:
    """mean((r − 1) − log r) over the rows that count."""
    log_prob, behaviour, _, weight = columns(given_rows)
    terms = [math.exp(a - b) - 1 - (a - b) for a, b, _, counts in given_rows if counts]

    estimate = float(approximate_kl(torch.exp(log_prob - behaviour), weight))

    assert estimate == pytest.approx(sum(terms) / max(len(terms), 1), rel=1e-3, abs=1e-5)
    assert estimate >= -1e-6


@settings(max_examples=50, deadline=None)
@given(rows, st.integers(1, 5))
def test_the_reinforce_loss_sums_over_steps_and_divides_by_episodes(given_rows: Rows, episodes: int) -> None:
    """−(1/N) Σ log π · G: long episodes weigh more than short ones, fallback steps nothing."""
    log_prob, _, gain, weight = columns(given_rows)
    expected = -sum(a * g for a, _, g, counts in given_rows if counts) / episodes

    assert float(reinforce_loss(log_prob, gain, episodes, weight)) == pytest.approx(
        expected, rel=1e-3, abs=1e-4
    )
    if all(counts for *_, counts in given_rows):
        assert float(reinforce_loss(log_prob, gain, episodes, None)) == pytest.approx(
            expected, rel=1e-3, abs=1e-4
        )


def test_the_value_loss_is_the_mean_squared_error() -> None:
    """Without the half: (1 + 4) / 2."""
    assert float(value_loss(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 2.0]))) == 2.5


def test_the_entropy_loss_rewards_entropy() -> None:
    """Minus the mean over the rows that count."""
    assert float(entropy_loss(torch.tensor([1.0, 3.0]), None)) == -2.0
    assert float(entropy_loss(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 1.0]))) == -3.0


def test_the_clip_fraction_counts_ratios_outside() -> None:
    """Two of three rows that count lie outside 1 ± 0.2."""
    ratio, weight = torch.tensor([0.5, 1.1, 1.5, 9.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])

    assert float(clip_fraction(ratio, 0.2, weight)) == pytest.approx(2 / 3)


def test_a_batch_of_fallback_steps_gives_zero_losses() -> None:
    """Where no row counts the policy losses are 0, never NaN."""
    none = torch.zeros(3)
    result = clipped_surrogate(torch.randn(3), torch.randn(3), torch.randn(3), 0.2, none)

    assert float(result.loss) == 0.0
    assert float(weighted_mean(torch.randn(3), none)) == 0.0


def test_explained_variance_of_good_and_useless_values() -> None:
    """1 for perfect values, 0 for constant ones, 0 where there is nothing to explain."""
    target = torch.tensor([1.0, 2.0, 3.0])

    assert float(explained_variance(target, target)) == 1.0
    assert float(explained_variance(torch.full((3,), 7.0), target)) == 0.0
    assert float(explained_variance(target, torch.ones(3))) == 0.0


@settings(max_examples=50, deadline=None)
@given(rows)
def test_standardised_rows_have_mean_zero_and_deviation_one(given_rows: Rows) -> None:
    """Statistics come from the rows that count; fewer than two leave everything as it is."""
    _, _, advantage, weight = columns(given_rows)
    result = standardise(advantage, weight)
    held = result[weight > 0]

    if held.numel() < 2:
        assert torch.equal(result, advantage)
    elif float(advantage[weight > 0].std()) > 1e-3:
        assert float(held.mean()) == pytest.approx(0.0, abs=1e-3)
        assert float(held.std()) == pytest.approx(1.0, abs=1e-3)
