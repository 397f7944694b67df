"""Proximal policy optimisation (Schulman et al., 2017, arXiv 1707.06347); the learner drives it.

Values come from the weights that the update starts with, the ratio is against the recorded behaviour_log_prob
(contracts F4). With a policy lag above 1 the targets are V-trace's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from relayrl_training_server.algorithms.base import Advantages, Algorithm, Metrics, Rows, to_tensors
from relayrl_training_server.algorithms.configs import PPOConfig
from relayrl_training_server.batches import Batch
from relayrl_training_server.losses import (
    approximate_kl,
    clip_fraction,
    clipped_surrogate,
    entropy_loss,
    explained_variance,
    standardise,
    value_loss,
)
from relayrl_training_server.returns import gae, vtrace

_KL_MARGIN = 1.5  # the original stops at 1.5 x target_kl


@dataclass
class _Course:
    """How an update goes: whether the policy still learns, and what was measured."""

    policy_learns: bool = True
    policy_epochs: int = 0
    first: Metrics = field(default_factory=dict)
    last: Metrics = field(default_factory=dict)
    grad_norm: float = 0.0


class PPO(Algorithm[PPOConfig]):
    """PPO with a clipped surrogate, for one policy."""

    def weight(self, batch: Batch) -> NDArray[np.float32]:
        """Fallback steps and those without behaviour_log_prob take no part in the surrogate."""
        return batch.policy_weight

    def advantages(self, batch: Batch) -> Advantages:
        """GAE, or V-trace where the run allows a policy lag above 1."""
        values, bootstrap_value = self.values(batch)
        rewards, gamma, lam = batch.to_chains(batch.reward), self.config.gamma, self.config.lam
        if self.max_policy_lag > 1:
            log_rhos = batch.to_chains(self._log_rhos(batch))
            result = vtrace(log_rhos, rewards, values, bootstrap_value, batch.mask, gamma, lam)
            advantage, target = result.advantage, result.value_target
        else:
            advantage = gae(rewards, values, bootstrap_value, batch.mask, gamma, lam)
            target = advantage + values
        rows = torch.from_numpy(batch.to_rows(advantage)), torch.from_numpy(batch.to_rows(target))
        if self.config.normalize_advantage == "batch":
            return Advantages(standardise(rows[0], torch.from_numpy(batch.policy_weight)), rows[1])
        return Advantages(*rows)

    def learn(self, rows: Rows, batch: Batch) -> Metrics:
        """Epochs over the batch; the policy's part may end early by `target_kl`."""
        course = _Course()
        explained = explained_variance(self._values_of(rows), rows.value_target)
        for epoch in range(max(self.config.train_pi_iters, self.config.train_vf_iters)):
            course.policy_learns &= epoch < self.config.train_pi_iters
            with_value = epoch < self.config.train_vf_iters
            if not (course.policy_learns or with_value):
                break
            course.policy_epochs += course.policy_learns
            for index in self.minibatches(batch.steps, self.config.minibatch):
                self._minibatch(rows.take(index), course, with_value)
        return {
            **course.last,
            **{f"first_{name}": value for name, value in course.first.items()},
            "policy_epochs": float(course.policy_epochs),
            "grad_norm": course.grad_norm,
            "explained_variance": float(explained),
        }

    def _minibatch(self, rows: Rows, course: _Course, with_value: bool) -> None:
        """One gradient step on the policy loss, the value loss, or their sum."""
        if not course.policy_learns:
            if with_value:
                self._value_step(rows)
            return
        seen = self.module.evaluate(rows.observation, rows.action_mask, rows.action, rows.policy_action)
        surrogate, measured = self._policy_loss(rows, seen.log_prob, seen.entropy)
        course.first = course.first or measured
        if self.config.target_kl is not None and measured["kl"] > _KL_MARGIN * self.config.target_kl:
            course.policy_learns = False
            self._minibatch(rows, course, with_value)
            return
        loss, parameters = surrogate, self.policy_parameters
        if with_value:
            error = value_loss(seen.value, rows.value_target)
            measured["loss_v"] = float(error)
            loss, parameters = loss + self.config.vf_coef * error, parameters + self.value_parameters
        course.grad_norm = self.step(loss, parameters)
        course.last = {**course.last, **measured}

    def _policy_loss(self, rows: Rows, log_prob: Tensor, entropy: Tensor) -> tuple[Tensor, Metrics]:
        advantage = rows.advantage
        if self.config.normalize_advantage == "minibatch":
            advantage = standardise(advantage, rows.weight)
        clip = self.scheduled(self.config.clip_ratio, self.config.clip_schedule)
        surrogate = clipped_surrogate(log_prob, rows.behaviour_log_prob, advantage, clip, rows.weight)
        uncertainty = entropy_loss(entropy, rows.weight)
        with torch.no_grad():
            measured = {
                "loss_pi": float(surrogate.loss),
                "kl": float(approximate_kl(surrogate.ratio, rows.weight)),
                "clip_fraction": float(clip_fraction(surrogate.ratio, clip, rows.weight)),
                "ratio_deviation": _largest_deviation(surrogate.ratio, rows.weight),
                "entropy": -float(uncertainty),
            }
        return surrogate.loss + self.config.ent_coef * uncertainty, measured

    def _value_step(self, rows: Rows) -> None:
        error = value_loss(self.module.value(rows.observation), rows.value_target)
        self.step(self.config.vf_coef * error, self.value_parameters)

    def _values_of(self, rows: Rows) -> Tensor:
        with torch.no_grad():
            return self.module.value(rows.observation)

    def _log_rhos(self, batch: Batch) -> NDArray[np.float32]:
        """target_log_prob − behaviour_log_prob by the weights at the start; 0 where there is none."""
        with torch.no_grad():
            seen = self.module.evaluate(
                to_tensors(batch.observation),
                to_tensors(batch.action_mask),
                to_tensors(batch.action),
                to_tensors(batch.policy_action),
            )
        log_rhos: NDArray[np.float32] = (
            seen.log_prob.numpy() - batch.behaviour_log_prob
        ) * batch.policy_weight
        return log_rhos


def _largest_deviation(ratio: Tensor, weight: Tensor | None) -> float:
    """The largest |ratio − 1| over the rows that count."""
    deviation = (ratio - 1.0).abs()
    return float((deviation if weight is None else deviation * weight).max())
