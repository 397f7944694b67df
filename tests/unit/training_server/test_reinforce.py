"""REINFORCE: its step against a plain transcription, with and without a baseline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from relayrl_training_server.algorithms.base import to_tensors
from relayrl_training_server.algorithms.build import build_algorithm
from relayrl_training_server.algorithms.reinforce import REINFORCE
from relayrl_training_server.batches import Batch, build_batch
from relayrl_training_server.testing.reference import SlowAdam
from relayrl_training_server.testing.segments import ACTION, OBSERVATION, make_segment


def make(**changes: Any) -> REINFORCE:
    """A small REINFORCE."""
    hyperparameters = {"hidden_sizes": [8], "pi_lr": 1e-2, "vf_lr": 1e-2, "train_vf_iters": 5, **changes}
    algorithm = build_algorithm("REINFORCE", hyperparameters, OBSERVATION, ACTION)
    assert isinstance(algorithm, REINFORCE)
    return algorithm


def batch(**changes: Any) -> Batch:
    """Two episodes: one that terminates, of two segments, and one truncated."""
    return build_batch(
        [
            make_segment(3, position=1, **changes),
            make_segment(2, position=2, segment_index=1, first_step_index=3, terminated=True, seed=5),
            make_segment(4, position=3, actor_index=1, truncated=True),
        ]
    )


def slow_gradients(algorithm: REINFORCE, data: Batch, gain: np.ndarray[Any, Any]) -> list[torch.Tensor]:
    """The gradients of −(1/N) Σ log π · gain, by the policy's parameters, episode by episode."""
    module = algorithm.module
    leaves = (data.observation, data.action_mask, data.action, data.policy_action)
    log_prob = module.evaluate(*map(to_tensors, leaves)).log_prob
    terms = [log_prob[row] * float(gain[row]) for row in range(data.steps)]
    loss = -sum(terms[1:], terms[0]) / 2
    return list(torch.autograd.grad(loss, [*module.pi.parameters(), *module.heads.parameters()]))


def slow_returns(data: Batch, gamma: float) -> np.ndarray[Any, Any]:
    """Discounted rewards to go within each episode, nothing after the last."""
    returns = np.zeros(data.steps)
    for first, last in ((0, 5), (5, 9)):
        for row in range(first, last):
            returns[row] = sum(gamma ** (k - row) * data.reward[k] for k in range(row, last))
    return returns


def test_without_a_baseline_it_takes_standardised_returns() -> None:
    """One Adam step on returns standardised over the batch; a truncated episode has its return so far."""
    ours, theirs = make(), make()
    data = batch()
    metrics = ours.update(data)
    returns = slow_returns(data, theirs.config.gamma)
    gain = (returns - returns.mean()) / (returns.std(ddof=1) + 1e-8)
    parameters = [*theirs.module.pi.parameters(), *theirs.module.heads.parameters()]
    gradients = slow_gradients(theirs, data, gain)
    SlowAdam([(parameters, 1e-2)], theirs.config.adam_eps).step(gradients)

    assert ours.module.vf is None
    assert metrics["episodes_truncated"] == 1.0
    torch.testing.assert_close(
        ours.policy_adam.vector, torch.cat([p.detach().reshape(-1) for p in parameters]), rtol=1e-4, atol=1e-6
    )


def test_the_loss_divides_by_episodes_and_not_by_steps() -> None:
    """The loss of contracts F3: the sum over all steps, over the number of episodes."""
    algorithm = make(normalize_advantage="none")
    data = batch()
    returns = slow_returns(data, algorithm.config.gamma)
    leaves = (data.observation, data.action_mask, data.action, data.policy_action)
    with torch.no_grad():
        log_prob = algorithm.module.evaluate(*map(to_tensors, leaves)).log_prob.numpy()
    expected = -float((log_prob * returns).sum()) / 2

    assert algorithm.update(data)["loss_pi"] == pytest.approx(expected, rel=1e-4)


def test_a_baseline_bootstraps_where_an_episode_was_truncated() -> None:
    """The value of the final observation follows a truncated episode, nothing a terminated one."""
    algorithm = make(with_vf_baseline=True, normalize_advantage="none", lam=1.0)
    data = batch()
    target = algorithm.advantages(data).value_target.numpy()
    returns = slow_returns(data, algorithm.config.gamma)
    with torch.no_grad():
        final = float(algorithm.module.value(to_tensors(data.final_observation)))
    after = algorithm.config.gamma ** np.arange(4, 0, -1) * final

    np.testing.assert_allclose(target[:5], returns[:5], rtol=1e-4)
    np.testing.assert_allclose(target[5:], returns[5:] + after, rtol=1e-4)


def test_the_baseline_is_trained_after_the_policy() -> None:
    """One policy step and train_vf_iters steps of the baseline, whose error falls."""
    once, often = (make(with_vf_baseline=True, train_vf_iters=n) for n in (1, 30))
    losses = [algorithm.update(batch())["loss_v"] for algorithm in (once, often)]

    assert (often.policy_adam.steps, often.value_adam.steps) == (1, 30)
    assert losses[1] < losses[0]


def test_no_baseline_means_no_value() -> None:
    """Without a baseline the graph has no value output, and nothing of it is trained."""
    algorithm = make()
    algorithm.update(batch())

    assert "value" not in algorithm.module.output_names
    assert algorithm.value_adam.steps == 0


def test_fallback_steps_are_not_reinforced() -> None:
    """The action of a fallback step does not matter (contracts B2)."""
    fallback = np.array([False, True, False])
    vectors = []
    for action in (0, 1):
        algorithm = make()
        columns = {"fallback": fallback, "action": {"action": np.array([0, action, 1])}}
        algorithm.update(batch(columns=columns))
        vectors.append(algorithm.policy_adam.vector.clone())

    assert torch.equal(*vectors)


def test_missing_behaviour_log_probs_do_not_matter() -> None:
    """REINFORCE takes data without behaviour_log_prob: it is not among its needs (contracts B2)."""
    vectors = []
    for known in (True, False):
        algorithm = make()
        algorithm.update(batch(columns={"behaviour_log_prob_valid": np.full(3, known)}))
        vectors.append(algorithm.policy_adam.vector.clone())

    assert torch.equal(*vectors)


def test_a_restored_algorithm_continues_to_the_bit() -> None:
    """State and restore hold everything, the baseline's moments included."""
    one, other = (make(with_vf_baseline=True, normalize_obs=True) for _ in "ab")
    one.update(batch())
    other.restore(one.state())
    one.update(batch())
    other.update(batch())

    assert all(torch.equal(t, other.state().tensors[name]) for name, t in one.state().tensors.items())


def test_entropy_is_rewarded_where_told() -> None:
    """A large ent_coef moves a policy towards uniform actions."""
    algorithm = make(ent_coef=50.0, pi_lr=0.05)
    with torch.no_grad():
        for parameter in algorithm.module.pi.parameters():
            parameter.mul_(30.0)
    entropies = [algorithm.update(batch())["entropy"] for _ in range(12)]

    assert entropies[-1] > entropies[0]
