"""What every algorithm is: a policy module, an optimiser and statistics that learn from one batch at a time.

The learner drives it: `update` takes a batch and returns metrics, `state` and `restore` are the checkpoint.
An algorithm is one subclass with the same five names: `advantages`, `learn`, `update`, `state`, `restore`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from relayrl_shared.errors import RelayRLError
from relayrl_training_server.adam import FlatAdam, gradients_of
from relayrl_training_server.algorithms.configs import AlgorithmConfig, Schedule
from relayrl_training_server.batches import Batch, Leaves
from relayrl_training_server.normalise import RunningStatistics, forward_returns
from relayrl_training_server.policy_module import PolicyModule

Metrics = dict[str, float]
Tensors = dict[str, Tensor]
C = TypeVar("C", bound=AlgorithmConfig)


class NonFiniteUpdate(RelayRLError):
    """A loss or gradient was not finite; the weights are those before the update."""

    code = "non_finite_update"


@dataclass(frozen=True)
class AlgorithmState:
    """Everything that an algorithm resumes from, to the bit."""

    tensors: Tensors
    values: dict[str, Any]


class Advantages(NamedTuple):
    """What a batch's steps were worth: float32 [N] each, by rows, detached."""

    advantage: Tensor
    value_target: Tensor


@dataclass(frozen=True)
class Rows:
    """The rows of a batch, or of a minibatch of it, as tensors."""

    observation: Tensors
    action: Tensors
    policy_action: Tensors
    action_mask: Tensors
    behaviour_log_prob: Tensor
    weight: Tensor | None
    advantage: Tensor
    value_target: Tensor

    def take(self, index: Tensor | None) -> Rows:
        """The rows of that index int64 [n]; all of them for None."""
        if index is None:
            return self

        def part(leaves: Tensors) -> Tensors:
            return {name: tensor[index] for name, tensor in leaves.items()}

        return Rows(
            observation=part(self.observation),
            action=part(self.action),
            policy_action=part(self.policy_action),
            action_mask=part(self.action_mask),
            behaviour_log_prob=self.behaviour_log_prob[index],
            weight=None if self.weight is None else self.weight[index],
            advantage=self.advantage[index],
            value_target=self.value_target[index],
        )


class Algorithm(ABC, Generic[C]):
    """One learner state: the policy that acts and what it learned from.

    Args:
        config: the hyperparameters.
        module: the policy; its parameters are learned in place.
        seed: seeds the minibatch permutations.
        max_policy_lag: of the run, in learner updates.
    """

    def __init__(self, config: C, module: PolicyModule, seed: int, max_policy_lag: int) -> None:
        self.config = config
        self.module = module
        self.max_policy_lag = max_policy_lag
        self.updates = 0
        self.steps_learned = 0
        self.generator = torch.Generator().manual_seed(seed)
        policy_parameters = [*module.pi.parameters(), *module.heads.parameters()]
        self.policy_adam = FlatAdam(policy_parameters, config.adam_eps)
        self.value_adam = FlatAdam([] if module.vf is None else list(module.vf.parameters()), config.adam_eps)
        shapes = {leaf.name: leaf.shape for leaf in module.observation_spec.leaves}
        self.observation_statistics = {
            name: RunningStatistics(shapes[name]) for name in module.normalised_leaves
        }
        self.return_statistics = RunningStatistics(())

    @abstractmethod
    def advantages(self, batch: Batch) -> Advantages:
        """What each step of the batch was worth, by the weights that the update starts with."""

    @abstractmethod
    def learn(self, rows: Rows, batch: Batch) -> Metrics:
        """Takes the gradient steps of one update; values and targets are in units of `value_scale`.

        Raises:
            NonFiniteUpdate: a loss or gradient is not finite.
        """

    def update(self, batch: Batch) -> Metrics:
        """Learns from a batch; observation statistics are absorbed after the last epoch (contracts H5).

        Raises:
            NonFiniteUpdate: a loss or gradient is not finite; everything is as before the call.
        """
        before = self.state()
        try:
            self._absorb_returns(batch)
            worth = self.advantages(batch)
            self._scale_values(1.0 / self.value_scale)
            metrics = self.learn(self._rows(batch, worth), batch)
            self._scale_values(self.value_scale)
        except NonFiniteUpdate:
            self.restore(before)
            raise
        self._absorb_observations(batch)
        self.updates += 1
        self.steps_learned += batch.steps
        return {**metrics, **self._describe(batch, worth)}

    def skip(self) -> None:
        """An update without data: nothing is learned, the count goes on."""
        self.updates += 1

    def state(self) -> AlgorithmState:
        """A copy of everything that `restore` needs."""
        tensors = {f"module/{name}": tensor.clone() for name, tensor in self.module.state_dict().items()}
        for name, adam in self._adams().items():
            tensors |= {f"{name}/{slot}": value for slot, value in adam.state().items()}
        tensors["generator"] = self.generator.get_state()
        for name, statistics in self._statistics().items():
            tensors |= {f"{name}/{key}": torch.from_numpy(v) for key, v in statistics.state().items()}
        return AlgorithmState(tensors, {"updates": self.updates, "steps_learned": self.steps_learned})

    def restore(self, state: AlgorithmState) -> None:
        """Goes back to what `state` gave."""
        self.module.load_state_dict(_below("module", state.tensors))
        for name, adam in self._adams().items():
            adam.restore(_below(name, state.tensors))
        self.generator.set_state(state.tensors["generator"])
        for name, statistics in self._statistics().items():
            statistics.restore({key: v.numpy() for key, v in _below(name, state.tensors).items()})
        self.updates = int(state.values["updates"])
        self.steps_learned = int(state.values["steps_learned"])

    @property
    def value_scale(self) -> float:
        """The unit of the values while they are learned: the deviation of the returns, or 1."""
        if not self.config.normalize_returns:
            return 1.0
        return 1.0 / float(self.return_statistics.inv_std)

    def scheduled(self, value: float, schedule: Schedule) -> float:
        """A hyperparameter at this update: as it is, or on its linear way to 0 over `total_steps`."""
        if schedule == "constant" or self.config.total_steps is None:
            return value
        return value * max(0.0, 1.0 - self.steps_learned / self.config.total_steps)

    def minibatches(self, rows: int, size: int | None) -> Iterator[Tensor | None]:
        """Indices of one epoch's minibatches, equal in size and near `size`; None: the whole batch."""
        count = 1 if size is None else max(1, round(rows / size))
        if count == 1:
            yield None
            return
        yield from torch.randperm(rows, generator=self.generator).tensor_split(count)

    def values(self, batch: Batch) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """V of the steps' observations, float32 [T, B], and of what follows each chain, [B]."""
        with torch.no_grad():
            values = self.module.value(to_tensors(batch.observation)).numpy()
            finals = np.zeros(0, dtype=np.float32)
            if len(batch.final_chains):
                finals = self.module.value(to_tensors(batch.final_observation)).numpy()
        return batch.to_chains(values), batch.bootstrap(finals)

    def step(self, policy_loss: Tensor | None, value_loss: Tensor | None) -> float:
        """One gradient step on one loss or on both; returns the norm of the gradient before clipping.

        The two networks share no parameters, so that each loss reaches its own alone; the norm is of both.

        Raises:
            NonFiniteUpdate: the gradient is not finite; no step was taken.
        """
        taking = [
            (adam, loss, rate)
            for adam, loss, rate in (
                (self.policy_adam, policy_loss, self.config.pi_lr),
                (self.value_adam, value_loss, self.config.vf_lr),
            )
            if loss is not None
        ]
        gradients = gradients_of([(adam, loss) for adam, loss, _ in taking])
        norm = math.hypot(*(float(torch.linalg.vector_norm(gradient)) for gradient in gradients))
        if not math.isfinite(norm):
            raise NonFiniteUpdate(f"update {self.updates + 1}: the norm of the gradient is {norm}")
        limit = self.config.max_grad_norm
        for (adam, _, rate), gradient in zip(taking, gradients, strict=True):
            if limit is not None and norm > limit:
                gradient.mul_(limit / (norm + 1e-6))
            adam.step(gradient, self.scheduled(rate, self.config.lr_schedule))
        return norm

    def _rows(self, batch: Batch, worth: Advantages) -> Rows:
        weight = torch.from_numpy(self.weight(batch))
        return Rows(
            observation=to_tensors(batch.observation),
            action=to_tensors(batch.action),
            policy_action=to_tensors(batch.policy_action),
            action_mask=to_tensors(batch.action_mask),
            behaviour_log_prob=torch.from_numpy(batch.behaviour_log_prob),
            weight=None if bool((weight > 0).all()) else weight,
            advantage=worth.advantage,
            value_target=worth.value_target / self.value_scale,
        )

    def weight(self, batch: Batch) -> NDArray[np.float32]:
        """Which rows count in the policy loss, float32 [N] of 0 and 1."""
        return batch.from_policy

    def _absorb_observations(self, batch: Batch) -> None:
        """Takes the batch into the running statistics and ships them with the module."""
        if self.config.normalize_obs:
            for name, statistics in self.observation_statistics.items():
                statistics.absorb(batch.observation[name])
                mean = torch.from_numpy(np.asarray(statistics.mean, dtype=np.float32))
                self.module.set_normaliser(name, mean, torch.from_numpy(np.asarray(statistics.inv_std)))

    def _absorb_returns(self, batch: Batch) -> None:
        """Takes the batch's returns in before it is learned from.

        A first batch in raw units would leave Adam's moments far too large for what follows. Nobody acts with
        this scale, so that it need not be frozen.
        """
        if self.config.normalize_returns:
            rewards = batch.to_chains(batch.reward)
            self.return_statistics.absorb(forward_returns(rewards, batch.mask, self.config.gamma))

    def _scale_values(self, factor: float) -> None:
        """Multiplies what the value network says, by its last layer.

        The policy that is published speaks raw reward units, the one that learns those of `value_scale`
        (PopArt, van Hasselt et al., 2016).
        """
        if factor == 1.0 or self.module.vf is None:
            return
        last = self.module.vf[-1]
        with torch.no_grad():
            for parameter in last.parameters():
                parameter.mul_(factor)

    def _statistics(self) -> dict[str, RunningStatistics]:
        named = {f"normaliser/{name}": s for name, s in self.observation_statistics.items()}
        return {**named, "returns": self.return_statistics}

    def _adams(self) -> dict[str, FlatAdam]:
        return {"policy_adam": self.policy_adam, "value_adam": self.value_adam}

    def _describe(self, batch: Batch, worth: Advantages) -> Metrics:
        return {
            "batch_steps": float(batch.steps),
            "batch_chains": float(batch.chains),
            "fallback_steps": float(batch.steps - batch.from_policy.sum()),
            "advantage_mean": float(worth.advantage.mean()),
            "advantage_std": float(worth.advantage.std(correction=0)),
            "value_target_mean": float(worth.value_target.mean()),
            "learning_rate": self.scheduled(self.config.pi_lr, self.config.lr_schedule),
        }


def to_tensors(leaves: Leaves) -> Tensors:
    """Numpy leaves as tensors, without a copy where that is safe."""
    return {name: torch.from_numpy(np.require(array, requirements="W")) for name, array in leaves.items()}


def _below(prefix: str, tensors: Tensors) -> Tensors:
    start = prefix + "/"
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
