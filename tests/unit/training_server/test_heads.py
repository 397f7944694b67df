"""Action heads against torch.distributions: the same probabilities, without its cost and with masks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Bernoulli,
    Categorical,
    Normal,
    TanhTransform,
    TransformedDistribution,
)

from relayrl_shared.errors import ConfigError
from relayrl_shared.spaces import ActionSpec, LeafSpec
from relayrl_training_server.heads import (
    ActionHead,
    BernoulliHead,
    CategoricalHead,
    GaussianHead,
    columns,
    make_head,
    total,
)
from relayrl_training_server.networks import NetworkSettings

CLIP = NetworkSettings()
TANH = NetworkSettings(squash="tanh")
ROWS = 64


def leaf_of(space: spaces.Space[Any]) -> LeafSpec:
    return ActionSpec.from_gymnasium(space).leaves[0]


def random_scores(head: ActionHead, rows: int = ROWS, scale: float = 1.0) -> Tensor:
    return torch.randn(rows, head.width, generator=torch.Generator().manual_seed(1)) * scale


def gumbel(*shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(2).gumbel(size=shape).astype(np.float32))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def gaussian(space: spaces.Box, settings: NetworkSettings = CLIP) -> GaussianHead:
    head = make_head(leaf_of(space), settings)
    assert isinstance(head, GaussianHead)
    with torch.no_grad():
        head.log_std.copy_(torch.linspace(-1, 0.5, head.width))
    return head


# -- categorical --------------------------------------------------------------------------------------------


def test_categorical_log_prob_is_log_softmax_at_the_action() -> None:
    """A discrete leaf's log-prob equals torch.distributions', offsets included."""
    head = make_head(leaf_of(spaces.Discrete(5, start=-2)), CLIP)
    scores = random_scores(head)
    action = torch.arange(ROWS) % 5 - 2
    torch.testing.assert_close(
        head.log_prob(scores, action, None), Categorical(logits=scores).log_prob(action + 2)
    )


def test_multi_discrete_log_prob_is_the_sum_of_its_parts() -> None:
    """A multi-discrete leaf is a product of independent categoricals in C order."""
    space = spaces.MultiDiscrete(np.array([[2, 3], [4, 2]]), start=np.array([[0, 1], [-1, 5]]))
    head = make_head(leaf_of(space), CLIP)
    scores = random_scores(head)
    action, _ = head.sample(scores, gumbel(ROWS, 11))
    index = (action - torch.tensor([[0, 1], [-1, 5]])).reshape(ROWS, 4)
    expected = sum(
        Categorical(logits=part).log_prob(index[:, i])
        for i, part in enumerate(scores.split([2, 3, 4, 2], dim=1))
    )
    torch.testing.assert_close(head.log_prob(scores, action, None), expected)
    assert all(space.contains(row.detach().numpy()) for row in action)


def test_gumbel_max_samples_the_softmax() -> None:
    """Frequencies of the sampled actions are the probabilities of the logits."""
    head = make_head(leaf_of(spaces.Discrete(4)), CLIP)
    scores = torch.tensor([[0.0, 1.0, -1.0, 2.0]]).expand(40_000, -1)
    action, policy_action = head.sample(scores, gumbel(40_000, 4))
    frequency = torch.bincount(action, minlength=4) / 40_000
    torch.testing.assert_close(frequency, scores[0].softmax(0), atol=0.01, rtol=0)
    assert policy_action is None


def test_zero_noise_is_the_greedy_action() -> None:
    """Without noise the most likely value is taken, of every kind of leaf."""
    categorical = make_head(leaf_of(spaces.Discrete(4)), CLIP)
    scores = random_scores(categorical)
    assert torch.equal(
        categorical.sample(scores, torch.zeros_like(scores))[0], Categorical(logits=scores).mode
    )
    bits = make_head(leaf_of(spaces.MultiBinary(3)), CLIP)
    scores = random_scores(bits)
    assert torch.equal(bits.sample(scores, torch.zeros_like(scores))[0] == 1, scores > 0)
    box = gaussian(spaces.Box(-1, 1, (2,)))
    scores = random_scores(box)
    policy_action = box.sample(scores, torch.zeros_like(scores))[1]
    assert policy_action is not None
    assert torch.equal(policy_action, scores)


def test_masked_values_have_no_probability_and_no_gradient() -> None:
    """A mask renormalises over what is allowed; what is not gets neither samples nor gradients."""
    head = make_head(leaf_of(spaces.Discrete(4)), CLIP)
    scores = random_scores(head).requires_grad_()
    mask = torch.tensor([True, False, True, False]).expand(ROWS, -1)
    parameters = head.parameters_of(scores, mask)
    action, _ = head.sample(parameters, gumbel(ROWS, 4) * 10)
    assert set(action.tolist()) == {0, 2}
    allowed = Categorical(logits=scores[:, [0, 2]])
    torch.testing.assert_close(head.log_prob(parameters, action, None), allowed.log_prob(action // 2))
    torch.testing.assert_close(head.entropy(parameters), allowed.entropy())
    (head.log_prob(parameters, action, None) + head.entropy(parameters)).sum().backward()
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()
    assert not scores.grad[:, [1, 3]].any()
    assert scores.grad[:, [0, 2]].all()


def test_single_allowed_value_is_certain() -> None:
    """Where one value is allowed, its log-prob and the entropy are 0, whatever its logit."""
    head = make_head(leaf_of(spaces.Discrete(3)), CLIP)
    scores = torch.tensor([[50.0, -50.0, 0.0]])
    parameters = head.parameters_of(scores, torch.tensor([[False, True, False]]))
    action, _ = head.sample(parameters, torch.tensor([[9.0, -9.0, 9.0]]))
    assert action.tolist() == [1]
    assert head.log_prob(parameters, action, None).item() == 0
    assert head.entropy(parameters).item() == 0


def test_multi_discrete_entropy_is_the_sum_of_its_parts() -> None:
    """Independent parts add their entropies."""
    head = make_head(leaf_of(spaces.MultiDiscrete([2, 5])), CLIP)
    scores = random_scores(head)
    expected = sum(Categorical(logits=part).entropy() for part in scores.split([2, 5], dim=1))
    torch.testing.assert_close(head.entropy(scores), expected)


# -- bits ---------------------------------------------------------------------------------------------------


def test_bits_have_the_probabilities_of_their_logits() -> None:
    """Log-prob and entropy of multi-binary leaves equal torch.distributions', summed over the bits."""
    head = make_head(leaf_of(spaces.MultiBinary((2, 3))), CLIP)
    scores = random_scores(head, scale=5)
    action = (random_scores(head).flip(0) > 0).to(torch.int8).reshape(ROWS, 2, 3)
    expected = Bernoulli(logits=scores)
    torch.testing.assert_close(
        head.log_prob(scores, action, None), expected.log_prob(action.reshape(ROWS, 6).float()).sum(1)
    )
    torch.testing.assert_close(head.entropy(scores), expected.entropy().sum(1))


def test_logistic_noise_samples_the_bits() -> None:
    """Frequencies of sampled bits are the sigmoid of their logits."""
    head = make_head(leaf_of(spaces.MultiBinary(3)), CLIP)
    scores = torch.tensor([[0.0, 1.0, -2.0]]).expand(40_000, -1)
    noise = torch.from_numpy(np.random.default_rng(0).logistic(size=(40_000, 3)).astype(np.float32))
    action, _ = head.sample(scores, noise)
    assert action.dtype == torch.int8
    torch.testing.assert_close(action.float().mean(0), scores[0].sigmoid(), atol=0.01, rtol=0)


def test_masks_force_bits() -> None:
    """A bit that may only be 0 or only be 1 is so, with log-prob and entropy 0; free bits stay free."""
    head = make_head(leaf_of(spaces.MultiBinary(3)), CLIP)
    scores = torch.tensor([[40.0, -40.0, 0.3]], requires_grad=True)
    mask = torch.tensor([[[True, False], [False, True], [True, True]]])
    parameters = head.parameters_of(scores, mask)
    action, _ = head.sample(parameters, torch.tensor([[9.0, -9.0, 9.0]]))
    assert action.tolist() == [[0, 1, 1]]
    free = Bernoulli(logits=scores[:, 2])
    torch.testing.assert_close(head.log_prob(parameters, action, None), free.log_prob(torch.ones(1)))
    torch.testing.assert_close(head.entropy(parameters), free.entropy())
    (head.log_prob(parameters, action, None) + head.entropy(parameters)).sum().backward()
    assert scores.grad is not None
    assert scores.grad[0, :2].tolist() == [0, 0]
    assert torch.isfinite(scores.grad).all()


# -- continuous ---------------------------------------------------------------------------------------------


def test_gaussian_log_prob_is_that_of_the_unclipped_sample() -> None:
    """The log-prob belongs to the policy action; clipping for the environment does not change it."""
    head = gaussian(spaces.Box(-0.1, 0.1, (3,)))
    scores = random_scores(head)
    action, u = head.sample(scores, normal(ROWS, 3))
    assert u is not None
    expected = Normal(scores, head.log_std.exp()).log_prob(u).sum(1)
    torch.testing.assert_close(head.log_prob(scores, action, u), expected)
    assert (action != u).any()
    assert torch.equal(action, u.clamp(-0.1, 0.1))


def test_gaussian_entropy_has_the_closed_form() -> None:
    """Entropy is that of the Gaussian, a number a row, with a gradient to log_std only."""
    head = gaussian(spaces.Box(-1, 1, (3,)))
    scores = random_scores(head)
    entropy = head.entropy(scores)
    torch.testing.assert_close(entropy, Normal(scores, head.log_std.exp()).entropy().sum(1))
    entropy.sum().backward()
    torch.testing.assert_close(head.log_std.grad, torch.full((3,), float(ROWS)))


def test_tanh_log_prob_is_the_density_of_the_squashed_action() -> None:
    """With squash tanh the log-prob equals that of a transformed distribution (contracts B1)."""
    space = spaces.Box(np.array([-2, 0, 1], np.float32), np.array([2, 10, 1.5], np.float32))
    head = gaussian(space, TANH)
    scores = random_scores(head)
    action, u = head.sample(scores, normal(ROWS, 3))
    low, high = torch.from_numpy(space.low).double(), torch.from_numpy(space.high).double()
    transforms = [TanhTransform(), AffineTransform(loc=(low + high) / 2, scale=(high - low) / 2)]
    squashed = TransformedDistribution(Normal(scores.double(), head.log_std.double().exp()), transforms)
    assert u is not None
    squashed_u = (low + high) / 2 + torch.tanh(u.double()) * (high - low) / 2
    torch.testing.assert_close(
        head.log_prob(scores, action, u).double(),
        squashed.log_prob(squashed_u).sum(1),
        atol=1e-4,
        rtol=1e-4,
    )
    torch.testing.assert_close(action.double(), squashed_u, atol=1e-5, rtol=1e-5)


def test_tanh_stays_finite_and_inside_the_bounds_when_saturated() -> None:
    """Far outside, the squashed action is at its bound and the log-prob finite."""
    head = gaussian(spaces.Box(-0.3, 0.7, (1,)), TANH)
    scores = torch.tensor([[1000.0], [-1000.0]])
    action, u = head.sample(scores, torch.zeros(2, 1))
    low, high = head.leaf.bounds()
    assert action[:, 0].tolist() == [high.item(), low.item()]
    assert torch.isfinite(head.log_prob(scores, action, u)).all()


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1, 1, (2, 3), np.float32),
        spaces.Box(-0.1, 0.1, (2,), np.float64),
        spaces.Box(-0.1, 0.1, (2,), np.float16),
        spaces.Box(0, 255, (2, 2), np.uint8),
        spaces.Box(-(2**63), 2**63 - 1, (1,), np.int64),
        spaces.Box(-(2**31), 2**31 - 1, (1,), np.int32),
        spaces.Box(-np.inf, np.inf, (2,), np.float32),
        spaces.Box(-np.inf, np.inf, (2,), np.float16),
        spaces.Box(-np.inf, 0.3, (), np.float64),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e6, 1e30])
def test_box_actions_are_inside_the_space_to_the_last_bit(space: spaces.Box, scale: float) -> None:
    """Clipping then casting never leaves the space, whatever its dtype and the sample."""
    head = gaussian(space)
    scores = random_scores(head, scale=scale)
    action, u = head.sample(scores, normal(ROWS, head.width))
    assert all(space.contains(row.detach().numpy()) for row in action)
    assert action.dtype == getattr(torch, space.dtype.name)
    assert u is not None
    assert u.shape == action.shape
    assert u.dtype == torch.float32


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64, np.uint64, np.int8])
def test_extreme_samples_become_the_finite_extremes_of_their_side(dtype: Any) -> None:
    """A huge sample is not infinite, and does not wrap around to the other end."""
    floats = np.dtype(dtype).kind == "f"
    low, high = (-np.inf, np.inf) if floats else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    head = gaussian(spaces.Box(low, high, (1,), dtype=dtype))
    action, _ = head.sample(torch.tensor([[1e30], [-1e30]]), torch.zeros(2, 1))
    largest, smallest = action.detach().numpy()[:, 0]
    assert np.isfinite([largest, smallest]).all()
    assert float(largest) > 100
    assert float(smallest) == 0 if dtype is np.uint64 else float(smallest) < -100


def test_integer_boxes_are_rounded() -> None:
    """Integers get the nearest value, so that the greedy action is the mode."""
    head = gaussian(spaces.Box(-5, 5, (4,), np.int32))
    action, _ = head.sample(torch.tensor([[0.6, -0.6, 1.4, 7.0]]), torch.zeros(1, 4))
    assert action.tolist() == [[1, -1, 1, 5]]


def test_continuous_log_prob_without_policy_action_is_refused() -> None:
    """The clipped action is no stand-in for the sample."""
    head = gaussian(spaces.Box(-1, 1, (2,)))
    with pytest.raises(ConfigError, match="policy action"):
        head.log_prob(torch.zeros(1, 2), torch.zeros(1, 2), None)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-np.inf, np.inf, (2,)),
        spaces.Box(-1, np.inf, (2,)),
        spaces.Box(0, 9, (2,), np.int32),
        spaces.Box(np.zeros(2, np.float32), np.array([1, 0], np.float32)),
    ],
)
def test_tanh_without_finite_float_bounds_is_refused(space: spaces.Box) -> None:
    """Squashing needs bounds to scale to; the message names the leaf and the remedy."""
    with pytest.raises(ConfigError, match=r"action cannot be squashed.*'clip'"):
        make_head(leaf_of(space), TANH)


# -- margins and helpers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(4),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary(3),
        spaces.Box(-9, 9, (2,), np.int8),
    ],
)
def test_errors_below_half_the_margin_change_no_choice(space: spaces.Space[Any]) -> None:
    """A row's margin says how much the scores may be off without another action."""
    head = make_head(leaf_of(space), CLIP)
    scores = random_scores(head)
    noise = normal(ROWS, head.width)
    error = (head.margin(scores, noise) * 0.49).unsqueeze(1) * normal(ROWS, head.width).sign()
    assert torch.equal(head.sample(scores, noise)[0], head.sample(scores + error, noise)[0])


def test_margins_are_infinite_where_nothing_can_change() -> None:
    """Floats have no other choice, and neither has a categorical of one value."""
    for space in (spaces.Box(-1, 1, (2,)), spaces.Discrete(1)):
        head = make_head(leaf_of(space), CLIP)
        assert head.margin(random_scores(head), random_scores(head)).tolist() == [math.inf] * ROWS


def test_margin_of_a_tie_is_zero() -> None:
    """Two equal logits have no margin."""
    head = make_head(leaf_of(spaces.Discrete(3)), CLIP)
    assert head.margin(torch.tensor([[1.0, 1.0, 0.0]]), torch.zeros(1, 3)).item() == 0


def test_each_kind_of_leaf_has_its_head() -> None:
    """Box is Gaussian, multi-binary Bernoulli, the discrete kinds categorical."""
    kinds = {
        GaussianHead: spaces.Box(-1, 1, (2,)),
        BernoulliHead: spaces.MultiBinary(2),
        CategoricalHead: spaces.MultiDiscrete([2, 2]),
    }
    for kind, space in kinds.items():
        assert type(make_head(leaf_of(space), CLIP)) is kind


def test_columns_split_by_width_and_total_adds() -> None:
    """The two helpers of all heads do what torch.split and sum do."""
    values = torch.arange(12.0).reshape(2, 6)
    for ours, theirs in zip(columns(values, [1, 3, 2]), values.split([1, 3, 2], dim=1), strict=True):
        assert torch.equal(ours, theirs)
    assert columns(values, [6])[0] is values
    assert torch.equal(total([values, values, values]), 3 * values)
