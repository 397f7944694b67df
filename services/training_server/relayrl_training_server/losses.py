"""Losses and their diagnostics as pure functions over rows of torch tensors; the algorithms drive them.

Rows are steps in any order, [N]; nothing is padded. `weight` is 1 where a step's action came from the policy
and 0 where it did not (a declared fallback, contracts B2): such a step takes no part in a policy loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class SurrogateLoss(NamedTuple):
    """The loss to minimise, a scalar, and the importance ratio of each row [N], detached."""

    loss: Tensor
    ratio: Tensor


def weighted_mean(values: Tensor, weight: Tensor | None) -> Tensor:
    """The mean of the rows that count, a scalar; 0 where none does. None: all rows count."""
    if weight is None:
        return values.mean()
    return (values * weight).sum() / weight.sum().clamp(min=1.0)


def clipped_surrogate(
    log_prob: Tensor, behaviour_log_prob: Tensor, advantage: Tensor, clip_ratio: float, weight: Tensor | None
) -> SurrogateLoss:
    """The clipped surrogate of PPO (Schulman et al., 2017, https://arxiv.org/abs/1707.06347, eq. 7), negated.

    −mean(min(r A, clip(r, 1 − ε, 1 + ε) A)) with r = exp(log_prob − behaviour_log_prob).

    Args:
        log_prob: float32 [N], of the weights that are being learned.
        behaviour_log_prob: float32 [N], of the policy that acted.
        advantage: float32 [N], detached.
        clip_ratio: ε.
        weight: float32 [N] of 0 and 1, or None where all rows count.

    Returns:
        The loss and the ratios.
    """
    ratio = torch.exp(log_prob - behaviour_log_prob)
    clipped = torch.clamp(ratio, 1.0 - clip_ratio, 1.0 + clip_ratio)
    gain = torch.minimum(ratio * advantage, clipped * advantage)
    return SurrogateLoss(-weighted_mean(gain, weight), ratio.detach())


def value_loss(value: Tensor, value_target: Tensor) -> Tensor:
    """Mean squared error of the values, a scalar (without the half).

    Args:
        value: float32 [N].
        value_target: float32 [N], detached.

    Returns:
        mean((value − value_target)²).
    """
    return (value - value_target).square().mean()


def entropy_loss(entropy: Tensor, weight: Tensor | None) -> Tensor:
    """Minus the mean entropy of the rows [N] that count, a scalar."""
    return -weighted_mean(entropy, weight)


def reinforce_loss(log_prob: Tensor, gain: Tensor, episodes: int, weight: Tensor | None) -> Tensor:
    """The policy gradient loss of REINFORCE (Williams, 1992): −(1/N) Σ_episodes Σ_t log π · G_t.

    Args:
        log_prob: float32 [N rows].
        gain: float32 [N rows], returns or advantages, detached.
        episodes: N of the formula, at least 1.
        weight: float32 [N rows] of 0 and 1, or None where all rows count.

    Returns:
        The loss, a scalar.
    """
    terms = log_prob * gain if weight is None else log_prob * gain * weight
    return -terms.sum() / episodes


def approximate_kl(ratio: Tensor, weight: Tensor | None) -> Tensor:
    """An estimate of KL(behaviour ‖ target), low in variance: mean((r − 1) − log r).

    Schulman, 2020, http://joschu.net/blog/kl-approx.html (k3). Never negative.

    Args:
        ratio: float32 [N], importance ratios.
        weight: float32 [N] of 0 and 1, or None where all rows count.

    Returns:
        The estimate, a scalar.
    """
    return weighted_mean((ratio - 1.0) - torch.log(ratio), weight)


def clip_fraction(ratio: Tensor, clip_ratio: float, weight: Tensor | None) -> Tensor:
    """The share of rows whose ratio lies outside 1 ± clip_ratio, a scalar."""
    return weighted_mean(((ratio - 1.0).abs() > clip_ratio).to(torch.float32), weight)


def explained_variance(value: Tensor, value_target: Tensor) -> Tensor:
    """1 − Var(target − value) / Var(target), a scalar; 0 where the targets do not vary."""
    variance = value_target.var(correction=0)
    if float(variance) == 0.0:
        return torch.zeros(())
    return 1.0 - (value_target - value).var(correction=0) / variance


def standardise(values: Tensor, weight: Tensor | None) -> Tensor:
    """Rows [N] shifted and scaled to mean 0 and deviation 1 (unbiased) over the rows that count.

    Fewer than two rows that count come back as they are.
    """
    held = values if weight is None else values[weight > 0]
    if held.numel() < 2:
        return values
    return (values - held.mean()) / (held.std() + 1e-8)
