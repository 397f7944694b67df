"""REINFORCE (Williams, 1992), with and without a value baseline; the learner drives it.

A batch is whole episodes. The loss is −(1/N) Σ_episodes Σ_t log π · G_t (contracts F3).
"""

from __future__ import annotations

import numpy as np
import torch

from relayrl_training_server.algorithms.base import Advantages, Algorithm, Metrics, Rows
from relayrl_training_server.algorithms.configs import REINFORCEConfig
from relayrl_training_server.batches import Batch
from relayrl_training_server.losses import (
    approximate_kl,
    entropy_loss,
    explained_variance,
    reinforce_loss,
    standardise,
    value_loss,
)
from relayrl_training_server.returns import discounted_returns, gae


class REINFORCE(Algorithm[REINFORCEConfig]):
    """One policy step a batch, then `train_vf_iters` steps of the baseline where there is one."""

    def advantages(self, batch: Batch) -> Advantages:
        """Returns to go, or GAE against the baseline with a bootstrap at truncation.

        Without a baseline a truncated episode has its return so far: there is nothing to bootstrap from.
        """
        rewards, gamma = batch.to_chains(batch.reward), self.config.gamma
        if self.config.with_vf_baseline:
            values, bootstrap_value = self.values(batch)
            gain = gae(rewards, values, bootstrap_value, batch.mask, gamma, self.config.lam)
        else:
            bootstrap_value = np.zeros(batch.chains, dtype=np.float32)
            gain = discounted_returns(rewards, bootstrap_value, batch.mask, gamma)
        target = discounted_returns(rewards, bootstrap_value, batch.mask, gamma)
        advantage = torch.from_numpy(batch.to_rows(gain))
        if self.config.normalize_advantage == "batch":
            advantage = standardise(advantage, torch.from_numpy(self.weight(batch)))
        return Advantages(advantage, torch.from_numpy(batch.to_rows(target)))

    def learn(self, rows: Rows, batch: Batch) -> Metrics:
        """The policy's step, then the baseline's."""
        metrics = self._policy_step(rows, episodes=batch.chains)
        metrics["episodes_truncated"] = float(batch.truncated.sum())
        if self.config.with_vf_baseline:
            metrics |= self._baseline_steps(rows)
        return metrics

    def _policy_step(self, rows: Rows, episodes: int) -> Metrics:
        seen = self.module.evaluate(rows.observation, rows.action_mask, rows.action, rows.policy_action)
        policy_loss = reinforce_loss(seen.log_prob, rows.advantage, episodes, rows.weight)
        uncertainty = entropy_loss(seen.entropy, rows.weight)
        steps_an_episode = len(rows.advantage) / episodes
        loss = policy_loss + self.config.ent_coef * steps_an_episode * uncertainty
        before = seen.log_prob.detach()
        norm = self.step(loss, None)
        return {
            "loss_pi": float(policy_loss.detach()),
            "entropy": -float(uncertainty.detach()),
            "kl": self._kl_since(rows, before),
            "grad_norm": norm,
        }

    def _kl_since(self, rows: Rows, log_prob: torch.Tensor) -> float:
        """How far the step moved the policy."""
        with torch.no_grad():
            seen = self.module.evaluate(rows.observation, rows.action_mask, rows.action, rows.policy_action)
            return float(approximate_kl(torch.exp(seen.log_prob - log_prob), rows.weight))

    def _baseline_steps(self, rows: Rows) -> Metrics:
        with torch.no_grad():
            explained = explained_variance(self.module.value(rows.observation), rows.value_target)
        error = torch.zeros(())
        for _ in range(self.config.train_vf_iters):
            error = value_loss(self.module.value(rows.observation), rows.value_target)
            self.step(None, error)
        return {"loss_v": float(error.detach()), "explained_variance": float(explained)}
