"""Admission: when a call may act (contracts E and F); driven by the coordinator between the halves of a call.

`FreePacing` never waits. `RolloutPacing` begins rollout r only when the policy in use comes from at least
r - max_policy_lag updates. `LeasePacing` acts on steps that the learner granted. A wait never holds a lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from relayrl_client.actors import ActorDetails, Selection
from relayrl_client.inference import Inference
from relayrl_client.recorder import Recorder
from relayrl_shared.errors import EpisodeError, PacingTimeout

_LEASE_POLL_SECONDS = 0.05
_LEASE_ASK_SECONDS = 0.02  # heartbeats for steps come no faster
_LEASE_CALLS = 64  # how many calls ahead steps are asked for


@dataclass(slots=True)
class PacingCounters:
    """Plain counters. unpaced_rollouts_total: begun without admission (E3, or a loop that must)."""

    waits_total: int = 0
    wait_seconds_total: float = 0.0
    timeouts_total: int = 0
    unpaced_rollouts_total: int = 0


class Admission(Protocol):
    """What the coordinator asks before it acts."""

    every_call: bool
    counters: PacingCounters

    def admit(self, selection: Selection, rollout: int | None, deadline: float) -> None:
        """Return when these actors may act.

        Args:
            selection: the actors.
            rollout: the rollout that begins with this call, or None.
            deadline: on the monotonic clock, in seconds.

        Raises:
            PacingTimeout: admission did not come in time.
            EpisodeError: it never could, the way that the application calls.
        """


class FreePacing:
    """Never waits (contracts E1)."""

    every_call = False

    def __init__(self) -> None:
        self.counters = PacingCounters()

    def admit(self, selection: Selection, rollout: int | None, deadline: float) -> None:
        """Nothing to wait for."""


class RolloutPacing:
    """Rollout r begins when the policy in use comes from at least r - max_policy_lag updates (contracts F1).

    Args:
        inference: knows the policy in use.
        recorder: knows who is behind.
        max_policy_lag: in updates; 0 is lockstep.
        is_stopping: True ends every wait.
        servers_are_up: False lets rollouts begin unpaced where the lag bound is above 0 (contracts E3).
    """

    every_call = False

    def __init__(
        self,
        inference: Inference,
        recorder: Recorder,
        max_policy_lag: int,
        is_stopping: Callable[[], bool],
        servers_are_up: Callable[[], bool] = lambda: True,
    ) -> None:
        self.counters = PacingCounters()
        self.max_policy_lag = max_policy_lag
        self._inference = inference
        self._recorder = recorder
        self._is_stopping = is_stopping
        self._servers_are_up = servers_are_up

    def admit(self, selection: Selection, rollout: int | None, deadline: float) -> None:
        """See `Admission.admit`."""
        if rollout is None or not selection.paced:
            return
        needed = rollout - self.max_policy_lag
        if needed <= 0 or self._inference.admit(needed, time.monotonic(), lambda: True):
            return
        if self._would_block_itself(selection, rollout):
            self.counters.unpaced_rollouts_total += 1
            return
        self._wait(rollout, deadline)

    def _would_block_itself(self, selection: Selection, rollout: int) -> bool:
        """Whether this very thread still has to finish earlier rollouts of other actors.

        Raises:
            EpisodeError: so it is, in lockstep, where going on is no choice.
        """
        thread, called = threading.get_ident(), set(selection.ids)
        behind = self._recorder.behind(rollout)
        mine = [late for late in behind if late.driver == thread or late.actor_id in called]
        if not mine:
            return False
        if self.max_policy_lag == 0:
            raise EpisodeError(_self_block(rollout, mine, called))
        return True

    def _wait(self, rollout: int, deadline: float) -> None:
        needed = rollout - self.max_policy_lag
        began = time.monotonic()
        self.counters.waits_total += 1
        admitted = self._inference.admit(needed, deadline, self._gives_up)
        self.counters.wait_seconds_total += time.monotonic() - began
        if admitted:
            return
        if self.max_policy_lag > 0 and not self._servers_are_up() and not self._is_stopping():
            self.counters.unpaced_rollouts_total += 1
            return
        self.counters.timeouts_total += 1
        late = [detail.actor_id for detail in self._recorder.behind(rollout)]
        why = f"it may wait for actor {late[0]}" if late else "is the learner running?"
        raise PacingTimeout(
            f"this rollout needs a policy of {needed} finished updates, and none came within "
            f"{time.monotonic() - began:.1f} s: {why}; call again with reward=None to wait on"
        )

    def _gives_up(self) -> bool:
        return self._is_stopping() or (self.max_policy_lag > 0 and not self._servers_are_up())


def _self_block(rollout: int, mine: Sequence[ActorDetails], called: Collection[str]) -> str:
    """Why a call would wait for itself, and what to do about it."""
    apart = [late.actor_id for late in mine if late.actor_id in called]
    late = (
        f"rollout {rollout} waits for the learner, which waits for actor {(apart or [mine[0].actor_id])[0]}"
    )
    if apart:
        return (
            f"{late} of this very call, whose environment is still in a rollout before: call these apart "
            f"until they begin rollout {rollout} too (this call took their rewards): {', '.join(apart)}"
        )
    return f"{late} in a rollout before, which this thread drives too: pass all actors in one call"


class LeasePacing:
    """Acts on steps granted by the learner (contracts E2): whole-episode batches under `block`.

    Steps are asked for ahead: a grant is for many calls, and the next is asked for before it is used up. The
    session asks in its heartbeats and calls `grant`; `on_shortage` makes it ask at once.

    Args:
        is_stopping: True ends every wait.
        on_shortage: called when steps run short; must not block.
        servers_are_up: False: calls go on unpaced where the lag bound is above 0.
        max_policy_lag: in updates.
    """

    every_call = True

    def __init__(
        self,
        is_stopping: Callable[[], bool],
        on_shortage: Callable[[], None],
        servers_are_up: Callable[[], bool] = lambda: True,
        max_policy_lag: int = 1,
    ) -> None:
        self.counters = PacingCounters()
        self.max_policy_lag = max_policy_lag
        self._is_stopping = is_stopping
        self._on_shortage = on_shortage
        self._servers_are_up = servers_are_up
        self._changed = threading.Condition()
        self._steps = 0
        self._expires_at = 0.0
        self._most_taken = 0  # in one call
        self._waiting_for = 0  # by all waiting calls
        self._used = 0
        self._asked_at = 0.0

    def grant(self, steps: int, expires_in_seconds: float) -> None:
        """Add granted steps. What was left of an expired grant is gone."""
        with self._changed:
            now = time.monotonic()
            if now >= self._expires_at:
                self._steps = 0
            self._steps += steps
            self._expires_at = now + expires_in_seconds
            self._changed.notify_all()

    def report(self) -> tuple[int, int]:
        """Steps wanted now, and steps used since the last report."""
        with self._changed:
            used, self._used = self._used, 0
            ahead = self._most_taken * _LEASE_CALLS - self._left()
            return max(ahead, self._waiting_for, 0), used

    def admit(self, selection: Selection, rollout: int | None, deadline: float) -> None:
        """See `Admission.admit`; takes one step an actor."""
        if not selection.paced:
            return
        steps = len(selection)
        with self._changed:
            self._most_taken = max(self._most_taken, steps)
            if not self._take(steps):
                self._wait(steps, deadline)
            elif self._left() < self._most_taken * _LEASE_CALLS // 4:
                self._ask()

    def _ask(self) -> None:
        now = time.monotonic()
        if now - self._asked_at >= _LEASE_ASK_SECONDS:
            self._asked_at = now
            self._on_shortage()

    def _left(self) -> int:
        return self._steps if time.monotonic() < self._expires_at else 0

    def _take(self, steps: int) -> bool:
        if self._left() < steps:
            return False
        self._steps -= steps
        self._used += steps
        return True

    def _wait(self, steps: int, deadline: float) -> None:
        began = time.monotonic()
        self.counters.waits_total += 1
        self._waiting_for += steps
        try:
            while not self._take(steps):
                if self._goes_on_unpaced():
                    self.counters.unpaced_rollouts_total += 1
                    return
                remaining = deadline - time.monotonic()
                if remaining <= 0 or self._is_stopping():
                    self.counters.timeouts_total += 1
                    raise PacingTimeout(
                        "the learner granted no steps in time: is it running? Call again with reward=None"
                    )
                self._ask()
                self._changed.wait(min(remaining, _LEASE_POLL_SECONDS))
        finally:
            self._waiting_for -= steps
            self.counters.wait_seconds_total += time.monotonic() - began

    def _goes_on_unpaced(self) -> bool:
        return self.max_policy_lag > 0 and not self._servers_are_up() and not self._is_stopping()
