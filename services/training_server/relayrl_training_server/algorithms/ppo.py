"""Proximal policy optimisation (Schulman et al., 2017, arXiv 1707.06347); the learner drives it.

Values come from the weights that the update starts with, the ratio is against the recorded behaviour_log_prob
(contracts F4). With a policy lag above 1 the targets are V-trace's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

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
    weighted_mean,
)
from relayrl_training_server.returns import gae, vtrace

_KL_MARGIN = 1.5  # the original stops at 1.5 x target_kl


class _Seen(NamedTuple):
    """What a minibatch's forward pass gave; metrics are made of the first and the last one only."""

    ratio: Tensor
    weight: Tensor | None
    loss: Tensor
    entropy: Tensor
    value_error: Tensor | None

    def metrics(self, clip_ratio: float) -> Metrics:
        """The figures that people look at."""
        with torch.no_grad():
            return {
                "loss_pi": float(self.loss),
                "loss_v": 0.0 if self.value_error is None else float(self.value_error),
                "kl": float(approximate_kl(self.ratio, self.weight)),
                "clip_fraction": float(clip_fraction(self.ratio, clip_ratio, self.weight)),
                "ratio_deviation": _largest_deviation(self.ratio, self.weight),
                "entropy": float(weighted_mean(self.entropy, self.weight)),
            }


@dataclass
class _Course:
    """How an update goes: whether the policy still learns, and what its minibatches gave."""

    clip_ratio: float
    policy_learns: bool = True
    policy_epochs: int = 0
    first: Metrics = field(default_factory=dict)
    last: _Seen | None = None
    grad_norm: float = 0.0

    def note(self, seen: _Seen) -> None:
        """Keeps the minibatch as the last one, and the figures of the first."""
        self.first = self.first or seen.metrics(self.clip_ratio)
        self.last = seen


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
        course = _Course(clip_ratio=self.scheduled(self.config.clip_ratio, self.config.clip_schedule))
        explained = explained_variance(self._values_of(rows), rows.value_target)
        whole = self._standardised(rows)
        for epoch in range(max(self.config.train_pi_iters, self.config.train_vf_iters)):
            course.policy_learns &= epoch < self.config.train_pi_iters
            with_value = epoch < self.config.train_vf_iters
            if not (course.policy_learns or with_value):
                break
            course.policy_epochs += course.policy_learns
            for index in self.minibatches(batch.steps, self.config.minibatch):
                minibatch = whole if index is None else self._standardised(rows.take(index))
                self._minibatch(minibatch, course, with_value)
        return {
            **({} if course.last is None else course.last.metrics(course.clip_ratio)),
            **{f"first_{name}": value for name, value in course.first.items()},
            "policy_epochs": float(course.policy_epochs),
            "grad_norm": course.grad_norm,
            "explained_variance": float(explained),
        }

    def _standardised(self, rows: Rows) -> Rows:
        """The minibatch with its advantages standardised, where that is how they are normalised."""
        if self.config.normalize_advantage != "minibatch":
            return rows
        return replace(rows, advantage=standardise(rows.advantage, rows.weight))

    def _minibatch(self, rows: Rows, course: _Course, with_value: bool) -> None:
        """One gradient step on the policy loss, the value loss, or both."""
        if course.policy_learns:
            policy_loss, seen = self._forward(rows, course.clip_ratio, with_value)
            course.policy_learns = not self._went_too_far(seen)
            if course.policy_learns:
                course.note(seen)
                course.grad_norm = self.step(policy_loss, self._weighted(seen.value_error))
                return
        if with_value:
            error = value_loss(self.module.value(rows.observation), rows.value_target)
            self.step(None, self._weighted(error))

    def _forward(self, rows: Rows, clip_ratio: float, with_value: bool) -> tuple[Tensor, _Seen]:
        """The policy loss of a minibatch, and what else its forward pass gave."""
        seen = self.module.evaluate(rows.observation, rows.action_mask, rows.action, rows.policy_action)
        loss, ratio = clipped_surrogate(
            seen.log_prob, rows.behaviour_log_prob, rows.advantage, clip_ratio, rows.weight
        )
        total = loss
        if self.config.ent_coef:
            total = loss + self.config.ent_coef * entropy_loss(seen.entropy, rows.weight)
        error = value_loss(seen.value, rows.value_target) if with_value else None
        return total, _Seen(ratio, rows.weight, loss.detach(), seen.entropy.detach(), error)

    def _went_too_far(self, seen: _Seen) -> bool:
        """Whether the policy has moved beyond `target_kl` from the one that acted."""
        if self.config.target_kl is None:
            return False
        return float(approximate_kl(seen.ratio, seen.weight)) > _KL_MARGIN * self.config.target_kl

    def _weighted(self, value_error: Tensor | None) -> Tensor | None:
        return None if value_error is None else self.config.vf_coef * value_error

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
