"""Action heads: from a network's scores to actions, log-probabilities and entropies, one head an action leaf.

Driven by `policy_module.PolicyModule`, in the acting graph and in the learner alike: a log-probability is
computed by one piece of code, so that behaviour and target policies agree. Everything is pure over tensors
[N, …] and traceable; the noise comes from outside (contracts H2), and zero noise is the greedy action.

The forms are chosen for the exported graph: each operator costs about a microsecond in a call of one row, so
nothing is sliced, reshaped or shifted that need not be.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from relayrl_shared.errors import ConfigError
from relayrl_shared.policy.interface import float_bounds
from relayrl_shared.spaces import LeafSpec
from relayrl_training_server.networks import NetworkSettings, flat, starts

MASKED_LOGIT = -1e9
"""Logit of what is not allowed: finite, so that no gradient or product becomes NaN; its probability is 0."""


def columns(values: Tensor, widths: Sequence[int]) -> list[Tensor]:
    """Split [N, sum of widths] by columns."""
    if len(widths) == 1:
        return [values]
    ends = np.cumsum(widths).tolist()
    return [values[:, end - width : end] for end, width in zip(ends, widths, strict=True)]


def total(parts: Sequence[Tensor]) -> Tensor:
    """Sum of tensors of equal shape."""
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result


class ActionHead(nn.Module):
    """One action leaf: `width` scores in; `parameters_of` them and the mask feeds the other methods."""

    width: int

    def __init__(self, leaf: LeafSpec) -> None:
        super().__init__()
        self.leaf = leaf

    @abstractmethod
    def parameters_of(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Scores [N, width] with the mask [N, *mask_shape] applied: logits, or means."""

    @abstractmethod
    def sample(self, parameters: Tensor, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        """Choose: action [N, *shape] in the leaf's dtype, and for continuous leaves the policy action."""

    @abstractmethod
    def log_prob(self, parameters: Tensor, action: Tensor, policy_action: Tensor | None) -> Tensor:
        """Log-probability float32 [N] of policy_action where there is one, else of action."""

    @abstractmethod
    def entropy(self, parameters: Tensor) -> Tensor:
        """Entropy float32 [N], over what the mask allows."""

    @abstractmethod
    def margin(self, parameters: Tensor, noise: Tensor) -> Tensor:
        """How far float32 [N] the choice is from another; infinite where a small error changes none."""

    def _shaped(self, action: Tensor) -> Tensor:
        shaped = action if self.leaf.shape == action.shape[1:] else action.reshape(-1, *self.leaf.shape)
        return shaped.to(getattr(torch, self.leaf.dtype))


class CategoricalHead(ActionHead):
    """Discrete and multi-discrete leaves: independent categorical parts, sampled by Gumbel-max."""

    def __init__(self, leaf: LeafSpec) -> None:
        super().__init__(leaf)
        self.width = sum(leaf.nvec)
        self.starts = starts(leaf)

    def parameters_of(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Logits [N, sum nvec], those of what is not allowed at the finite minimum."""
        return scores if mask is None else torch.where(mask, scores, MASKED_LOGIT)

    def sample(self, parameters: Tensor, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        """The largest of logits + Gumbel noise [N, sum nvec], a part at a time."""
        choices = [
            self._shift(part.argmax(dim=1, keepdim=True), start)
            for part, start in zip(columns(parameters + noise, self.leaf.nvec), self.starts, strict=True)
        ]
        action = choices[0] if len(choices) == 1 else torch.cat(choices, dim=1)
        return self._shaped(action.squeeze(1) if self.leaf.shape == () else action), None

    @staticmethod
    def _shift(index: Tensor, start: int) -> Tensor:
        return index + start if start else index

    def log_prob(self, parameters: Tensor, action: Tensor, policy_action: Tensor | None) -> Tensor:
        """Sum over the parts of the log-softmax at the chosen value."""
        chosen = columns(flat(self.leaf, action).to(torch.int64), (1,) * self.leaf.size)
        parts = columns(parameters, self.leaf.nvec)
        return total(
            [
                functional.log_softmax(part, dim=1).gather(1, self._shift(index, -start)).squeeze(1)
                for part, index, start in zip(parts, chosen, self.starts, strict=True)
            ]
        )

    def entropy(self, parameters: Tensor) -> Tensor:
        """Sum over the parts of -Σ p log p over the allowed values."""
        sums = []
        for part in columns(parameters, self.leaf.nvec):
            log_probs = functional.log_softmax(part, dim=1)
            terms = torch.where(part > MASKED_LOGIT / 2, log_probs.exp() * log_probs, 0.0)
            sums.append(-terms.sum(dim=1))
        return total(sums)

    def margin(self, parameters: Tensor, noise: Tensor) -> Tensor:
        """Distance of the two largest logits + noise, the smallest of the parts."""
        gaps = [parameters.new_full((len(parameters),), math.inf)]
        for part in columns(parameters + noise, self.leaf.nvec):
            if part.shape[1] > 1:
                best = part.topk(2, dim=1).values
                gaps.append(best[:, 0] - best[:, 1])
        return torch.stack(gaps).amin(dim=0)


class BernoulliHead(ActionHead):
    """Multi-binary leaves: independent bits, on where logit + logistic noise > 0.

    A mask [N, n, 2] says of each bit whether it may be 0 and whether it may be 1.
    """

    def __init__(self, leaf: LeafSpec) -> None:
        super().__init__(leaf)
        self.width = leaf.size

    def parameters_of(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """Logits [N, n], those of forced bits at the finite extremes."""
        if mask is None:
            return scores
        not_one = torch.where(mask[:, :, 1], scores, MASKED_LOGIT)
        return torch.where(mask[:, :, 0], not_one, -MASKED_LOGIT)

    def sample(self, parameters: Tensor, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        """Bits where logit + noise > 0."""
        return self._shaped(parameters + noise > 0), None

    def log_prob(self, parameters: Tensor, action: Tensor, policy_action: Tensor | None) -> Tensor:
        """Sum over the bits of log sigmoid(±logit)."""
        on = flat(self.leaf, action) != 0
        return functional.logsigmoid(torch.where(on, parameters, -parameters)).sum(dim=1)

    def entropy(self, parameters: Tensor) -> Tensor:
        """Sum over the bits that the mask leaves free of -Σ p log p."""
        free = parameters.abs() < -MASKED_LOGIT / 2
        logits = torch.where(free, parameters, 0.0)
        terms = torch.sigmoid(logits) * functional.logsigmoid(logits)
        terms = terms + torch.sigmoid(-logits) * functional.logsigmoid(-logits)
        return -torch.where(free, terms, 0.0).sum(dim=1)

    def margin(self, parameters: Tensor, noise: Tensor) -> Tensor:
        """Distance of the closest logit + noise from 0."""
        return (parameters + noise).abs().amin(dim=1)


class GaussianHead(ActionHead):
    """Box leaves: a diagonal Gaussian whose standard deviation does not depend on the observation.

    The policy action u is the sample. The action is u clipped to the bounds or, with squash tanh,
    low + (tanh u + 1) / 2 · (high - low); then cast (integers rounded) to the leaf's dtype. The
    log-probability is that of u or, with tanh, of the squashed action's density (contracts B1).
    """

    low: Tensor
    high: Tensor
    log_scale: Tensor

    def __init__(self, leaf: LeafSpec, settings: NetworkSettings) -> None:
        super().__init__(leaf)
        self.width = leaf.size
        self.squash = settings.squash == "tanh"
        self.log_std = nn.Parameter(torch.full((leaf.size,), float(settings.initial_log_std)))
        low, high = float_bounds(leaf)
        self._keep("low", low)
        self._keep("high", high)
        if self.squash:
            self._check_finite_bounds()
            self._keep("log_scale", np.log((high.astype(np.float64) - low) / 2).astype(np.float32))

    def _keep(self, name: str, values: NDArray[np.floating]) -> None:
        # Not in the state: bounds belong to the spec, not to the weights.
        self.register_buffer(name, torch.from_numpy(np.array(values)), persistent=False)

    def _check_finite_bounds(self) -> None:
        low, high = self.leaf.bounds()
        if self.leaf.numpy_dtype.kind != "f" or not np.isfinite([low, high]).all() or (low >= high).any():
            raise ConfigError(
                f"{self.leaf.name} cannot be squashed by tanh: its bounds must be finite floats, low below "
                "high; set squash to 'clip'"
            )

    def parameters_of(self, scores: Tensor, mask: Tensor | None) -> Tensor:
        """The means [N, size]: a box has no mask."""
        return scores

    def sample(self, parameters: Tensor, noise: Tensor) -> tuple[Tensor, Tensor | None]:
        """U = mean + std · noise, and the action that comes of it."""
        u = parameters + self.log_std.exp() * noise
        policy_action = u if u.shape[1:] == self.leaf.shape else u.reshape(-1, *self.leaf.shape)
        return self._shaped(self._bounded(u)), policy_action

    def _bounded(self, u: Tensor) -> Tensor:
        wide = u.to(self.low.dtype)
        if self.squash:
            wide = self.low + (torch.tanh(wide) + 1) * 0.5 * (self.high - self.low)
        clipped = torch.maximum(torch.minimum(wide, self.high), self.low)
        return clipped if self.leaf.numpy_dtype.kind == "f" else torch.round(clipped)

    def log_prob(self, parameters: Tensor, action: Tensor, policy_action: Tensor | None) -> Tensor:
        """Sum over the elements of log N(u; mean, std), less the log-derivative of the squashing."""
        if policy_action is None:
            raise ConfigError(f"{self.leaf.name} is continuous: its log-probability needs the policy action")
        u = flat(self.leaf, policy_action).to(torch.float32)
        z = (u - parameters) * (-self.log_std).exp()
        terms = -0.5 * z * z - (self.log_std + 0.5 * math.log(2 * math.pi))
        if self.squash:
            terms = terms - 2 * (math.log(2) - u - functional.softplus(-2 * u)) - self.log_scale
        return terms.sum(dim=1)

    def entropy(self, parameters: Tensor) -> Tensor:
        """Σ log std + ½ log 2πe: of u, also where it is squashed (that of tanh u has no closed form)."""
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(len(parameters))

    def margin(self, parameters: Tensor, noise: Tensor) -> Tensor:
        """Infinite for floats; for integers, distance from where rounding would give another."""
        if self.leaf.numpy_dtype.kind == "f":
            return parameters.new_full((len(parameters),), math.inf)
        u = parameters + self.log_std.exp() * noise
        return (0.5 - (u - torch.round(u)).abs()).amin(dim=1)


def make_head(leaf: LeafSpec, settings: NetworkSettings) -> ActionHead:
    """The head of an action leaf.

    Raises:
        ConfigError: tanh squashing of a box without finite bounds.
    """
    if leaf.kind == "box":
        return GaussianHead(leaf, settings)
    return BernoulliHead(leaf) if leaf.kind == "multi_binary" else CategoricalHead(leaf)
