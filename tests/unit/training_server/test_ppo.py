"""PPO's update against a plain transcription, and its rules: fallback, divergence, schedules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from relayrl_training_server.algorithms.base import NonFiniteUpdate, to_tensors
from relayrl_training_server.algorithms.build import build_algorithm
from relayrl_training_server.algorithms.ppo import PPO
from relayrl_training_server.batches import Batch, build_batch
from relayrl_training_server.testing.reference import SlowAdam
from relayrl_training_server.testing.segments import (
    ACTION,
    BOX_ACTION,
    OBSERVATION,
    make_segment,
)

PLAIN: dict[str, Any] = {
    "hidden_sizes": [8],
    "minibatch": 6,
    "train_pi_iters": 3,
    "train_vf_iters": 3,
    "pi_lr": 1e-2,
    "vf_lr": 1e-2,
    "target_kl": None,
    "ent_coef": 0.01,
}


def make(changes: dict[str, Any] | None = None, lag: int = 0, **more: Any) -> PPO:
    """A small PPO."""
    specs = {"observation_spec": OBSERVATION, "action_spec": ACTION, **more}
    algorithm = build_algorithm("PPO", {**PLAIN, **(changes or {})}, max_policy_lag=lag, **specs)
    assert isinstance(algorithm, PPO)
    return algorithm


def batch(**changes: Any) -> Batch:
    """Three chains: one that terminates, one truncated, one cut."""
    return build_batch(
        [
            make_segment(7, position=1, actor_index=0, terminated=True, **changes),
            make_segment(5, position=2, actor_index=1, truncated=True),
            make_segment(6, position=3, actor_index=2),
        ]
    )


def continuous_batch() -> Batch:
    """One chain of continuous actions."""
    rng = np.random.default_rng(0)
    policy_action = rng.standard_normal((8, 2)).astype(np.float32)
    columns = {
        "action": {"action": policy_action.clip(-1, 1)},
        "policy_action": {"action": policy_action},
        "behaviour_log_prob": np.full(8, -2.5, dtype=np.float32),
    }
    return build_batch([make_segment(8, columns=columns)])


def weights(algorithm: PPO) -> dict[str, torch.Tensor]:
    """A copy of the module's tensors."""
    return {name: tensor.clone() for name, tensor in algorithm.module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Equality to the bit."""
    return all(torch.equal(one[name], other[name]) for name in one)


def slow_update(algorithm: PPO, data: Batch) -> None:
    """The update as one would write it first: a plain Adam, joint loss, joint norm, loops over steps."""
    config, module = algorithm.config, algorithm.module
    values = module.value(to_tensors(data.observation)).detach().numpy()
    finals = module.value(to_tensors(data.final_observation)).detach().numpy()
    advantage = np.zeros(data.steps, dtype=np.float64)
    start = 0
    for b, length in enumerate(data.lengths):
        where = np.flatnonzero(data.final_chains == b)
        follows, running = (float(finals[where[0]]) if len(where) else 0.0), 0.0
        for row in range(start + length - 1, start - 1, -1):
            delta = data.reward[row] + config.gamma * follows - values[row]
            running = delta + config.gamma * config.lam * running
            advantage[row], follows = running, float(values[row])
        start += length
    advantages = torch.tensor(advantage, dtype=torch.float32)
    targets = advantages + torch.from_numpy(values)
    policy_parameters = [*module.pi.parameters(), *module.heads.parameters()]
    value_parameters = list(module.vf.parameters()) if module.vf else []
    adam = SlowAdam([(policy_parameters, config.pi_lr), (value_parameters, config.vf_lr)], config.adam_eps)
    parameters = policy_parameters + value_parameters
    generator = torch.Generator().manual_seed(1)
    leaves = [to_tensors(x) for x in (data.observation, data.action_mask, data.action, data.policy_action)]
    for _ in range(config.train_pi_iters):
        for index in torch.randperm(data.steps, generator=generator).tensor_split(3):
            seen = module.evaluate(*[{k: v[index] for k, v in part.items()} for part in leaves])
            a = advantages[index]
            a = (a - a.mean()) / (a.std() + 1e-8)
            ratio = torch.exp(seen.log_prob - torch.from_numpy(data.behaviour_log_prob)[index])
            clip = torch.clamp(ratio, 1 - config.clip_ratio, 1 + config.clip_ratio)
            surrogate = -torch.min(ratio * a, clip * a).mean()
            value_error = torch.nn.functional.mse_loss(seen.value, targets[index])
            loss = surrogate + config.vf_coef * value_error - config.ent_coef * seen.entropy.mean()
            gradients = torch.autograd.grad(loss, parameters)
            norm = torch.cat([gradient.reshape(-1) for gradient in gradients]).norm()
            limit = config.max_grad_norm or np.inf
            adam.step([gradient * min(1.0, limit / float(norm)) for gradient in gradients])


@pytest.mark.parametrize("max_grad_norm", [0.5, 0.05, None])
def test_an_update_equals_the_plain_transcription(max_grad_norm: float | None) -> None:
    """GAE, minibatch standardisation, one norm for both networks, torch's Adam: as written down plainly."""
    ours, theirs = make({"max_grad_norm": max_grad_norm}), make({"max_grad_norm": max_grad_norm})
    ours.update(batch())
    slow_update(theirs, batch())

    for name, expected in theirs.module.state_dict().items():
        torch.testing.assert_close(ours.module.state_dict()[name], expected, rtol=1e-4, atol=1e-5)


def test_equal_algorithms_learn_equal_bits() -> None:
    """Seed and data fix the weights to the bit; another seed gives others."""
    one, other, third = make(), make(), make(seed=2)
    for algorithm in (one, other, third):
        algorithm.update(batch())

    assert same(weights(one), weights(other))
    assert not same(weights(one), weights(third))


def test_a_restored_algorithm_continues_to_the_bit() -> None:
    """Everything that the next update depends on is in the state."""
    changes = {"normalize_obs": True, "normalize_returns": True}
    one, other = make(changes), make(changes, seed=99)
    one.update(batch())
    other.restore(one.state())
    one.update(batch())
    other.update(batch())

    assert same(weights(one), weights(other))
    assert same(one.state().tensors, other.state().tensors)
    assert (other.updates, other.steps_learned) == (2, 36)


def test_the_first_minibatch_is_measured_before_any_step() -> None:
    """Where behaviour and policy agree, the first ratio is 1 and nothing is clipped."""
    algorithm, data = make(), batch()
    leaves = (data.observation, data.action_mask, data.action, data.policy_action)
    with torch.no_grad():
        acting = algorithm.module.evaluate(*map(to_tensors, leaves)).log_prob.numpy()
    data.behaviour_log_prob[:] = acting
    metrics = algorithm.update(data)

    assert metrics["first_ratio_deviation"] < 1e-6
    assert metrics["first_clip_fraction"] == 0.0
    assert metrics["ratio_deviation"] > 1e-3


def test_fallback_steps_stay_out_of_the_policy_loss() -> None:
    """What a fallback did is not reinforced, whatever its action (contracts B2)."""
    fallback = np.array([False, True] * 3 + [False])
    known = {"fallback": fallback, "behaviour_log_prob_valid": ~fallback}
    results = []
    for action in (0, 1):
        actions = np.where(fallback, action, np.arange(7) % 2)
        algorithm = make({"ent_coef": 0.0})
        metrics = algorithm.update(batch(columns={**known, "action": {"action": actions}}))
        results.append(weights(algorithm))

    assert same(*results)
    assert metrics["fallback_steps"] == 3.0


def test_fallback_steps_stay_in_the_return_chain() -> None:
    """The reward of a fallback step reaches the steps before it (contracts B2)."""
    fallback = np.array([False] * 6 + [True])
    results = []
    for last_reward in (0.0, 100.0):
        rewards = np.array([0.0] * 6 + [last_reward], dtype=np.float32)
        columns = {"fallback": fallback, "behaviour_log_prob_valid": ~fallback, "reward": rewards}
        results.append(make().advantages(batch(columns=columns)).advantage[:6])

    assert bool((results[1] > results[0]).all())


@pytest.mark.parametrize("broken", [np.nan, np.inf, 1e38])
def test_a_divergence_changes_nothing(broken: float) -> None:
    """A reward that overflows raises a typed error, and everything is as before."""
    algorithm = make({"normalize_obs": True, "normalize_returns": True})
    algorithm.update(batch())
    before = algorithm.state()
    rewards = np.full(7, broken, dtype=np.float32)
    with pytest.raises(NonFiniteUpdate, match="update 2"), np.errstate(all="ignore"):
        algorithm.update(batch(columns={"reward": rewards}))

    assert same(before.tensors, algorithm.state().tensors)
    assert algorithm.state().values == before.values


def test_target_kl_ends_the_policys_epochs_only() -> None:
    """Past 1.5 x target_kl the policy rests while the value network learns on."""
    stopped, free = make({"target_kl": 1e-6}), make()
    metrics = stopped.update(batch())
    free.update(batch())

    assert metrics["policy_epochs"] == 1.0
    assert not same(weights(stopped), weights(free))
    assert stopped.value_adam.steps == free.value_adam.steps == 9
    assert stopped.policy_adam.steps < free.policy_adam.steps


@pytest.mark.parametrize(("pi_iters", "vf_iters"), [(1, 4), (4, 1), (2, 0)])
def test_each_network_has_its_own_epochs(pi_iters: int, vf_iters: int) -> None:
    """train_pi_iters and train_vf_iters count the epochs in which each takes part."""
    algorithm = make({"train_pi_iters": pi_iters, "train_vf_iters": vf_iters})
    algorithm.update(batch())

    assert algorithm.policy_adam.steps == 3 * pi_iters
    assert algorithm.value_adam.steps == 3 * vf_iters


def test_linear_schedules_end_at_zero() -> None:
    """Half way the rate is half, at the end nothing is learned any more."""
    algorithm = make({"lr_schedule": "linear", "clip_schedule": "linear", "total_steps": 36})
    rates = [algorithm.update(batch())["learning_rate"] for _ in range(2)]
    before = weights(algorithm)
    last = algorithm.update(batch())["learning_rate"]

    assert rates == [pytest.approx(5e-3), pytest.approx(0.0)]
    assert algorithm.scheduled(0.2, "linear") == 0.0
    assert (last, same(before, weights(algorithm))) == (0.0, True)


def test_observation_statistics_are_absorbed_after_the_update() -> None:
    """The weights learn with the statistics that acted, and ship with the new ones (contracts H5)."""
    plain, normalised = make(), make({"normalize_obs": True})
    plain.update(batch())
    normalised.update(batch())
    statistics = normalised.observation_statistics["observation"]
    shipped = normalised.module.normaliser("observation")

    assert torch.equal(plain.policy_adam.vector, normalised.policy_adam.vector)
    assert statistics.count == 18
    np.testing.assert_array_equal(shipped.mean.numpy(), statistics.mean.astype(np.float32))
    np.testing.assert_array_equal(shipped.inv_std.numpy(), statistics.inv_std)


def test_normalised_returns_keep_raw_values() -> None:
    """Rewards a thousand times larger give values a thousand times larger in the policy (contracts H5)."""
    changes = {"normalize_returns": True, "train_vf_iters": 10, "train_pi_iters": 1, "minibatch": None}
    small, large = (make({**changes, "vf_lr": 0.05}) for _ in "ab")
    columns = make_segment(7).columns
    for _ in range(4):
        small.update(batch(columns={"reward": np.ones(7, dtype=np.float32)}))
        large.update(batch(columns={"reward": np.full(7, 1000.0, dtype=np.float32)}))
    with torch.no_grad():
        observation = to_tensors(columns.observation)
        values = [float(algorithm.module.value(observation).abs().mean()) for algorithm in (small, large)]

    assert large.value_scale > 100 * small.value_scale
    assert values[1] > 50 * values[0]


def test_values_are_learned_in_units_of_the_returns() -> None:
    """With returns around 500 and a deviation of 100 the policy's value comes near 500, in raw units."""
    changes = {
        "normalize_returns": True,
        "train_vf_iters": 40,
        "train_pi_iters": 1,
        "vf_lr": 0.02,
        "gamma": 0.0,
    }
    algorithm = make({**changes, "minibatch": None, "max_grad_norm": None})
    data = batch()
    data.reward[:] = 500.0 + 100.0 * np.sign(np.arange(18) % 2 - 0.5)
    for _ in range(6):
        algorithm.update(data)
    with torch.no_grad():
        values = algorithm.module.value(to_tensors(data.observation))

    assert algorithm.value_scale == pytest.approx(100.0, rel=1e-3)
    assert abs(float(values.mean()) - 500.0) < 50.0


def test_steps_without_a_log_prob_stay_out_of_the_policy_loss() -> None:
    """Imported data may lack behaviour_log_prob; no ratio can be made of it (contracts B2)."""
    known = np.array([True, False] * 3 + [True])
    results = []
    for action in (0, 1):
        actions = np.where(known, np.arange(7) % 2, action)
        algorithm = make({"ent_coef": 0.0})
        algorithm.update(batch(columns={"behaviour_log_prob_valid": known, "action": {"action": actions}}))
        results.append(weights(algorithm))

    assert same(*results)


def test_a_lag_above_one_takes_vtrace() -> None:
    """Behaviour far from the policy truncates the traces; at lag 1 it does not (contracts F4)."""
    far = np.full(7, 3.0, dtype=np.float32)  # the behaviour was e³ times likelier than it can be
    data = batch(columns={"behaviour_log_prob": far})
    corrected, plain = make(lag=2).advantages(data), make(lag=1).advantages(data)

    assert not torch.allclose(corrected.value_target[:7], plain.value_target[:7])
    values = make().values(data)[0].T.reshape(-1)[:7]
    assert bool(((corrected.value_target[:7].numpy() - values).__abs__() < 1.0).all())


def test_continuous_actions_learn() -> None:
    """A box action leaf is learned from its policy_action, clipped and squashed alike."""
    for squash in (False, True):
        algorithm = make({"squash": squash}, action_spec=BOX_ACTION)
        before = weights(algorithm)
        metrics = algorithm.update(continuous_batch())

        assert np.isfinite(list(metrics.values())).all()
        assert not same(before, weights(algorithm))


@pytest.mark.parametrize("normalise", ["minibatch", "batch", "none"])
def test_advantages_are_normalised_where_told(normalise: str) -> None:
    """Scaling all rewards leaves the policy's step as it is, unless advantages are taken as they are."""
    data = [batch(), batch()]
    data[1].reward[:] *= 100.0
    results = []
    for one in data:
        changes = {"normalize_advantage": normalise, "minibatch": None, "gamma": 0.0, "max_grad_norm": None}
        algorithm = make({**changes, "vf_coef": 0.0, "ent_coef": 0.0})
        with torch.no_grad():
            for parameter in algorithm.module.vf.parameters():  # type: ignore[union-attr]
                parameter.zero_()
        algorithm.update(one)
        results.append(algorithm.policy_adam.mean.clone())

    close = torch.allclose(results[0], results[1], rtol=1e-3, atol=1e-5)
    assert close == (normalise != "none")


def reward_action_one(algorithm: PPO, rng: np.random.Generator) -> Batch:
    """A batch of one-step episodes by the policy: action 1 earns 1."""
    observation = rng.standard_normal((64, 3)).astype(np.float32)
    noise = torch.from_numpy(rng.gumbel(size=(64, 2)).astype(np.float32))
    with torch.no_grad():
        outputs = dict(
            zip(
                algorithm.module.output_names,
                algorithm.module(torch.from_numpy(observation), noise),
                strict=True,
            )
        )
    action = outputs["action"].numpy()
    columns = {
        "observation": {"observation": observation},
        "action": {"action": action},
        "reward": action.astype(np.float32),
        "behaviour_log_prob": outputs["behaviour_log_prob"].numpy(),
    }
    return build_batch([make_segment(64, columns=columns, terminated=True)])


def test_it_learns_what_pays() -> None:
    """Within twenty updates the action that is rewarded is taken almost always."""
    algorithm = make({"minibatch": 64, "gamma": 0.0, "ent_coef": 0.0, "train_pi_iters": 5})
    rng = np.random.default_rng(0)
    shares: list[float] = []
    learned: Callable[[], float] = lambda: float(np.mean(shares[-1]))  # noqa: E731
    for _ in range(20):
        data = reward_action_one(algorithm, rng)
        shares.append(float(data.reward.mean()))
        algorithm.update(data)

    assert shares[0] < 0.75
    assert learned() > 0.9
