"""Which calls an actor may take now: what the recorder checks of all rows before it writes the first.

A call out of order, or a reward at the wrong moment, is a typed error that names the actor and the remedy
(contracts A2, A8). B = actors of the call.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from relayrl_client.actors import BUSY, EPISODE, PENDING, STEP, Selection
from relayrl_client.inputs import Rewards
from relayrl_shared.errors import EpisodeError, InvalidReward


def check_begin(
    selection: Selection,
    phases: NDArray[np.uint8],
    step_index: NDArray[np.int64],
    rewards: Rewards | None,
) -> None:
    """Refuse a `request_action` that comes at the wrong moment.

    Args:
        selection: the actors.
        phases: uint8 [B].
        step_index: int64 [B], of their next steps.
        rewards: of their previous steps.

    Raises:
        EpisodeError: another call is at work on one of them.
        InvalidReward: a reward is missing, or there is no step for it.
    """
    _check_free(selection, phases)
    if not selection.recorded:
        return
    given, values = _given(rewards, len(selection)), _values(rewards, len(selection))
    for position, actor_id in enumerate(selection.ids):
        phase, step = int(phases[position]), int(step_index[position])
        value = float(values[position]) if given[position] else None
        problem = _problem(phase, step, value)
        if problem:
            raise InvalidReward(f"actor {actor_id}: {problem}")


def _problem(phase: int, step: int, reward: float | None) -> str:
    """What is wrong with the reward of one actor; empty where nothing is."""
    if reward is None:
        is_due = phase & STEP
        return f"no reward for its step {step - 1}: pass what it received since then" if is_due else ""
    if phase & PENDING and (step > 0 or reward != 0):
        return "its last call failed after the reward was written: pass reward=None"
    if not phase & EPISODE and reward != 0:
        return (
            f"reward {reward:g} on the first call of an episode, which has no step for it: "
            "pass None or 0, and the last reward to end_episode"
        )
    return ""


def check_end(selection: Selection, phases: NDArray[np.uint8], rewards: Rewards | None) -> None:
    """Refuse an `end_episode` that comes at the wrong moment.

    Args:
        selection: the actors.
        phases: uint8 [B].
        rewards: of their last steps.

    Raises:
        EpisodeError: an actor is not in an episode, or another call is at work on it.
        InvalidReward: a reward is missing, or was written before.
    """
    _check_free(selection, phases)
    given = _given(rewards, len(selection))
    for position, actor_id in enumerate(selection.ids):
        phase = int(phases[position])
        if not phase & EPISODE:
            raise EpisodeError(f"actor {actor_id} is not in an episode: request_action begins one")
        if phase & STEP and not given[position]:
            raise InvalidReward(
                f"actor {actor_id}: no reward for its last step: pass the reward received since then"
            )
        if phase & PENDING and given[position]:
            raise InvalidReward(
                f"actor {actor_id}: its last call failed after the reward was written: pass reward=None"
            )


def _check_free(selection: Selection, phases: NDArray[np.uint8]) -> None:
    busy = np.flatnonzero(phases & BUSY)
    if len(busy):
        actor_id = selection.ids[int(busy[0])]
        raise EpisodeError(f"actor {actor_id}: another call is at work on it; one call at a time")


def _given(rewards: Rewards | None, rows: int) -> NDArray[np.bool_]:
    """Which actors have a reward; bool [B]."""
    if rewards is None:
        return np.zeros(rows, np.bool_)
    return np.ones(rows, np.bool_) if rewards.given is None else rewards.given


def _values(rewards: Rewards | None, rows: int) -> NDArray[np.float32]:
    values = 0.0 if rewards is None else rewards.values
    return np.broadcast_to(np.asarray(values, np.float32), (rows,))
