"""Admission: who waits for what, and for how long (contracts E, F1)."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from relayrl_client.actors import ActorDetails, EnvironmentHandle, Selection
from relayrl_client.pacing import FreePacing, LeasePacing, RolloutPacing
from relayrl_shared.errors import EpisodeError, PacingTimeout


def selection(actors: int = 1, *, paced: bool = True) -> Selection:
    rows = np.arange(actors)
    return Selection(
        ids=tuple(map(str, range(actors))),
        rows=rows,
        index=rows,
        row=0 if actors == 1 else None,
        environments=rows,
        environment_of=rows,
        environment=None,
        recorded=True,
        paced=paced,
        acting=b"\3" * actors,
    )


def late(driver: int | None) -> ActorDetails:
    return ActorDetails("late", EnvironmentHandle("e", 0, 0), None, "train", True, None, driver=driver)


@dataclass
class Policy:
    """An inference that knows how many updates its version comes from."""

    learner_update: int = 0
    asked: list[int] = field(default_factory=list)

    def admit(self, learner_update: int, deadline: float, give_up: Any) -> bool:
        """Whether it is new enough, at once."""
        self.asked.append(learner_update)
        return self.learner_update >= learner_update


@dataclass
class Others:
    """A recorder that knows who is behind."""

    details: list[ActorDetails] = field(default_factory=list)

    def behind(self, rollout: int) -> list[ActorDetails]:
        """Those that the test set."""
        return self.details


def pacing(
    policy: Policy, lag: int, *details: ActorDetails, up: bool = True, stopping: bool = False
) -> RolloutPacing:
    return RolloutPacing(policy, Others(list(details)), lag, lambda: stopping, lambda: up)  # type: ignore[arg-type]


NOW = time.monotonic


@pytest.mark.parametrize(
    ("update", "lag", "rollout"), [(0, 0, 0), (3, 0, 3), (2, 1, 3), (0, 5, 5), (9, 0, 3)]
)
def test_a_rollout_begins_when_the_policy_is_new_enough(update: int, lag: int, rollout: int) -> None:
    """Rollout r needs r - max_policy_lag finished updates."""
    rule = pacing(Policy(update), lag)
    rule.admit(selection(), rollout, NOW() + 1)
    assert rule.counters.waits_total == 0


@pytest.mark.parametrize(("update", "lag", "rollout"), [(0, 0, 1), (1, 1, 3), (0, 5, 6)])
def test_a_rollout_waits_and_times_out_otherwise(update: int, lag: int, rollout: int) -> None:
    """One update too few, and the wait ends in a typed error that counts."""
    rule = pacing(Policy(update), lag)
    with pytest.raises(PacingTimeout, match=f"{rollout - lag} finished updates"):
        rule.admit(selection(), rollout, NOW())
    assert (rule.counters.waits_total, rule.counters.timeouts_total) == (1, 1)


def test_calls_inside_a_rollout_and_of_evaluation_are_free() -> None:
    """Only the beginning of a rollout of actors that train is admitted."""
    policy = Policy(0)
    rule = pacing(policy, 0)
    rule.admit(selection(), None, NOW())
    rule.admit(selection(paced=False), 7, NOW())
    assert policy.asked == []


def test_in_lockstep_a_thread_that_would_wait_for_itself_is_told_what_to_do() -> None:
    """The actor that is behind is named, and the remedy."""
    rule = pacing(Policy(0), 0, late(threading.get_ident()))
    with pytest.raises(EpisodeError, match=r"actor late .* pass all actors in one call"):
        rule.admit(selection(), 1, NOW() + 1)


def test_above_lag_zero_such_a_thread_goes_on_unpaced() -> None:
    """It waits only in a call that leaves no actor of its own in the middle of a rollout."""
    rule = pacing(Policy(0), 1, late(threading.get_ident()))
    rule.admit(selection(), 2, NOW())
    assert rule.counters.unpaced_rollouts_total == 1


@pytest.mark.parametrize("driver", [None, -1])
def test_an_actor_of_another_thread_is_waited_for_and_named(driver: int | None) -> None:
    """Another thread goes on by itself; when it does not, the error says who is late."""
    rule = pacing(Policy(0), 0, late(driver))
    with pytest.raises(PacingTimeout, match="actor late"):
        rule.admit(selection(), 1, NOW())


def test_without_servers_block_goes_on_above_lag_zero_only() -> None:
    """Servers down: unpaced above lag 0, and waiting at lag 0 (contracts E3)."""
    above = pacing(Policy(0), 1, up=False)
    above.admit(selection(), 2, NOW())
    assert above.counters.unpaced_rollouts_total == 1
    with pytest.raises(PacingTimeout):
        pacing(Policy(0), 0, up=False).admit(selection(), 1, NOW())


def test_shutdown_ends_a_wait() -> None:
    """A client that stops waits for nobody, and does not act on."""
    with pytest.raises(PacingTimeout):
        pacing(Policy(0), 1, up=False, stopping=True).admit(selection(), 2, NOW() + 60)


def test_free_never_asks() -> None:
    """Free returns, whatever the rollout."""
    FreePacing().admit(selection(), 10**6, 0.0)


# -- leases ------------------------------------------------------------------------------------------------


def leases(**options: Any) -> tuple[LeasePacing, list[None]]:
    calls: list[None] = []
    return LeasePacing(lambda: False, lambda: calls.append(None), **options), calls


def test_a_granted_step_is_used_once() -> None:
    """Steps are taken an actor a call, and reported as used once."""
    rule, _ = leases()
    rule.grant(5, 60)
    rule.admit(selection(2), None, NOW())
    rule.admit(selection(2), None, NOW())
    with pytest.raises(PacingTimeout):
        rule.admit(selection(2), None, NOW())
    assert rule.report()[1] == 4
    assert rule.report()[1] == 0


def test_steps_are_asked_for_ahead_of_their_need() -> None:
    """The wish is for many calls, and comes before the last step is taken."""
    rule, calls = leases()
    rule.grant(20, 60)
    rule.admit(selection(2), None, NOW())
    assert calls
    wanted, _ = rule.report()
    assert wanted > 20


def test_nothing_is_wanted_before_anybody_acts() -> None:
    """A client that does not act takes no steps from the others."""
    rule, _ = leases()
    assert rule.report() == (0, 0)


def test_an_expired_grant_is_worth_nothing() -> None:
    """After its time the steps are the pool's again."""
    rule, _ = leases()
    rule.grant(100, 0.0)
    with pytest.raises(PacingTimeout):
        rule.admit(selection(), None, NOW())
    rule.grant(1, 60)
    rule.admit(selection(), None, NOW())
    with pytest.raises(PacingTimeout):
        rule.admit(selection(), None, NOW())


def test_a_waiting_call_goes_on_with_the_grant() -> None:
    """The wait ends when enough steps are there."""
    rule, calls = leases()
    waiter = threading.Thread(target=rule.admit, args=(selection(3), None, NOW() + 10))
    waiter.start()
    while not calls:
        pass
    assert rule.report()[0] >= 3
    rule.grant(2, 60)
    rule.grant(1, 60)
    waiter.join(10)
    assert not waiter.is_alive()
    assert rule.report()[1] == 3


def test_leases_go_unpaced_without_servers_above_lag_zero() -> None:
    """As rollouts do (contracts E3)."""
    rule, _ = leases(servers_are_up=lambda: False)
    rule.admit(selection(), None, NOW())
    assert rule.counters.unpaced_rollouts_total == 1
    strict, _ = leases(servers_are_up=lambda: False, max_policy_lag=0)
    with pytest.raises(PacingTimeout):
        strict.admit(selection(), None, NOW())


def test_evaluation_takes_no_leases() -> None:
    """Only what the learner waits for is paced."""
    rule, _ = leases()
    rule.admit(selection(paced=False), None, NOW())
    assert rule.report() == (0, 0)
