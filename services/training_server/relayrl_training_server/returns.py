"""Returns and advantages as pure functions over time-major arrays; the algorithms drive them.

Arrays are numpy, [T, B]: T steps, B chains. A chain is an unbroken run of steps of one episode, from the
first to the last one in the batch; shorter chains are padded at their end, and `mask` is True where
there is a step. A chain ends by termination (its `bootstrap_value` is 0) or by truncation or a cut (it
is the value of the final observation). Sums run in float64, results are float32 and 0 where there is no
step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from relayrl_shared.errors import SpecMismatch

Floats = NDArray[np.floating]
Result = NDArray[np.float32]

_LARGEST_LOG_RATIO = 80.0  # far above any bound, and finite


class VTraceReturns(NamedTuple):
    """V-trace value targets and the advantages that go with them, float32 [T, B] each."""

    value_target: Result
    advantage: Result


def gae(
    rewards: Floats,
    values: Floats,
    bootstrap_value: Floats,
    mask: NDArray[np.bool_],
    gamma: float,
    lam: float,
) -> Result:
    """Generalised advantage estimates (Schulman et al., 2016, https://arxiv.org/abs/1506.02438, eq. 16).

    δ_t = r_t + γ V(s_{t+1}) − V(s_t);  A_t = Σ_k (γλ)^k δ_{t+k}, within a chain.

    Args:
        rewards: floats [T, B].
        values: floats [T, B], V of the observation that step t acted on.
        bootstrap_value: floats [B], V of the final observation, 0 where terminated.
        mask: bool [T, B], True where there is a step.
        gamma: the discount a step.
        lam: λ of the estimate.

    Returns:
        Advantages, float32 [T, B].

    Raises:
        SpecMismatch: the arrays disagree in T or B, or a chain has a hole.
    """
    _check(bootstrap_value, mask, rewards=rewards, values=values)
    next_values = _next(values, bootstrap_value, mask)
    deltas = np.where(mask, rewards + gamma * next_values - values, 0.0)
    return _backward_sum(deltas, np.where(mask, gamma * lam, 0.0))


def discounted_returns(
    rewards: Floats, bootstrap_value: Floats, mask: NDArray[np.bool_], gamma: float
) -> Result:
    """Discounted returns to go (Sutton and Barto, 2018, eq. 3.8): G_t = r_t + γ G_{t+1}.

    Args:
        rewards: floats [T, B].
        bootstrap_value: floats [B], what follows the chain's last step; 0 where nothing does.
        mask: bool [T, B], True where there is a step.
        gamma: the discount a step.

    Returns:
        Returns, float32 [T, B].

    Raises:
        SpecMismatch: the arrays disagree in T or B, or a chain has a hole.
    """
    _check(bootstrap_value, mask, rewards=rewards)
    follows = _next(np.zeros_like(rewards, dtype=np.float64), bootstrap_value, mask)
    return _backward_sum(np.where(mask, rewards + gamma * follows, 0.0), np.where(mask, gamma, 0.0))


def vtrace(
    log_rhos: Floats,
    rewards: Floats,
    values: Floats,
    bootstrap_value: Floats,
    mask: NDArray[np.bool_],
    gamma: float,
    lam: float = 1.0,
    rho_bar: float = 1.0,
    c_bar: float = 1.0,
) -> VTraceReturns:
    """V-trace targets (Espeholt et al., 2018, https://arxiv.org/abs/1802.01561, eq. 1 and remark 2).

    v_t = V(s_t) + Σ_k γ^k (Π_{i<k} c_{t+i}) ρ_{t+k} δ_{t+k} with ρ = min(ρ̄, w), c = λ min(c̄, w) and
    the importance ratio w = exp(log_rhos). The advantage is r_t + γ (λ v_{t+1} + (1 − λ) V(s_{t+1})) −
    V(s_t), without ρ_t: the surrogate that takes it multiplies by its own ratio. Where w = 1 both equal
    GAE(λ).

    Args:
        log_rhos: floats [T, B], target_log_prob − behaviour_log_prob.
        rewards: floats [T, B].
        values: floats [T, B].
        bootstrap_value: floats [B], 0 where terminated.
        mask: bool [T, B], True where there is a step.
        gamma: the discount a step.
        lam: λ of remark 2.
        rho_bar: the bound of ρ.
        c_bar: the bound of c.

    Returns:
        Value targets and advantages, float32 [T, B] each.

    Raises:
        SpecMismatch: the arrays disagree in T or B, or a chain has a hole.
    """
    _check(bootstrap_value, mask, log_rhos=log_rhos, rewards=rewards, values=values)
    ratio = np.exp(np.minimum(np.asarray(log_rhos, dtype=np.float64), _LARGEST_LOG_RATIO))
    next_values = _next(values, bootstrap_value, mask)
    deltas = np.where(mask, np.minimum(rho_bar, ratio) * (rewards + gamma * next_values - values), 0.0)
    correction = _backward_sum64(deltas, np.where(mask, gamma * lam * np.minimum(c_bar, ratio), 0.0))
    targets = np.where(mask, values + correction, 0.0)
    next_targets = _next(targets, bootstrap_value, mask)
    mixed = lam * next_targets + (1.0 - lam) * next_values
    advantage = np.where(mask, rewards + gamma * mixed - values, 0.0)
    return VTraceReturns(targets.astype(np.float32), advantage.astype(np.float32))


def _next(values: Floats, bootstrap_value: Floats, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """What follows each step, float64 [T, B]: the next step's value, the bootstrap value after the last."""
    shifted = np.zeros(mask.shape, dtype=np.float64)
    shifted[:-1] = values[1:]
    lengths = mask.sum(axis=0)
    held = np.flatnonzero(lengths)
    shifted[lengths[held] - 1, held] = bootstrap_value[held]
    return shifted


def _backward_sum64(terms: NDArray[np.float64], decay: NDArray[np.float64]) -> NDArray[np.float64]:
    """x_t = terms_t + decay_t · x_{t+1} from the end, [T, B]."""
    sums = np.zeros_like(terms)
    running = np.zeros(terms.shape[1], dtype=np.float64)
    for t in range(terms.shape[0] - 1, -1, -1):
        running = terms[t] + decay[t] * running
        sums[t] = running
    return sums


def _backward_sum(terms: NDArray[np.float64], decay: NDArray[np.float64]) -> Result:
    return _backward_sum64(terms, decay).astype(np.float32)


def _check(bootstrap_value: Floats, mask: NDArray[np.bool_], **arrays: Floats) -> None:
    """Raises SpecMismatch unless all are [T, B], the bootstrap values [B] and the chains without holes."""
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise SpecMismatch(f"mask: expected bool [T, B], got {mask.dtype} {mask.shape}")
    for name, array in arrays.items():
        if array.shape != mask.shape:
            raise SpecMismatch(f"{name}: expected {mask.shape} like the mask, got {array.shape}")
    if bootstrap_value.shape != mask.shape[1:]:
        raise SpecMismatch(f"bootstrap_value: expected {mask.shape[1:]}, got {bootstrap_value.shape}")
    if np.any(mask[1:] & ~mask[:-1]):
        raise SpecMismatch("mask: a chain has a hole; its steps must stand together from its first row")
