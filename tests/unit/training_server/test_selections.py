"""The three ways to cut batches: rollouts, the freshest segments, whole episodes."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from relayrl_shared.store.interface import StoredActor
from relayrl_shared.testing.store import make_run
from relayrl_training_server.algorithms.configs import complete_hyperparameters
from relayrl_training_server.batches import Segment
from relayrl_training_server.sampler import Moment, Sampled, Sampler, Selection
from relayrl_training_server.selections import (
    EpisodeSelection,
    FreshestSelection,
    RolloutSelection,
    selection_for,
)
from relayrl_training_server.testing.segments import make_actor, make_segment

ACTORS = [make_actor(0), make_actor(1)]


def part(
    position: int, actor: int, rollout: int, count: int | None = None, episode: int = 0, **more: Any
) -> Segment:
    """A segment of an actor's rollout; `count` marks its last one."""
    return make_segment(
        4,
        position=position,
        actor_index=actor,
        rollout_index=rollout,
        rollout_segments=count,
        episode_index=episode,
        **more,
    )


def ask(
    sampler: Sampler, update: int, now: float = 0.0, actors: list[StoredActor] | None = None
) -> Sampled | None:
    """A batch for that update."""
    return sampler.batch(Moment(update, ACTORS if actors is None else actors, now))


def positions(sampled: Sampled | None) -> list[int]:
    """Where the batch's segments stand in the log."""
    assert sampled is not None
    return sorted(segment.position for segment in sampled.segments)


def outcome_of(sampled: Sampled | None, position: int) -> str:
    """What was decided upon a position."""
    assert sampled is not None
    return {use.position: use.outcome for use in sampled.uses}[position]


# ---- rollouts


def rollouts(lag: int = 0, timeout_seconds: float = 10.0) -> Sampler:
    """A sampler of rollouts."""
    return Sampler(RolloutSelection(lag, timeout_seconds))


def test_a_rollout_is_complete_when_every_actor_has_delivered_it() -> None:
    """All segments of all live actors, and not one before (contracts F1)."""
    sampler = rollouts()
    sampler.add([part(1, 0, 0, count=1), part(2, 1, 0, episode=0, terminated=True)], 0.0)
    before = ask(sampler, 0)
    sampler.add([part(3, 1, 0, count=2, episode=1)], 0.0)

    assert before is None
    assert positions(ask(sampler, 0)) == [1, 2, 3]


def test_segments_may_come_in_any_order() -> None:
    """The last segment of a rollout may arrive before the others; it says how many there are."""
    sampler = rollouts()
    sampler.add([part(1, 1, 0, count=2, episode=1), part(2, 0, 0, count=1)], 0.0)
    early = ask(sampler, 0)
    sampler.add([part(3, 1, 0, episode=0)], 0.0)

    assert early is None
    assert positions(ask(sampler, 0)) == [1, 2, 3]


def test_rollouts_wait_for_their_update() -> None:
    """What is ahead stays in the pool; update r takes rollout r."""
    sampler = rollouts(lag=1)
    sampler.add([part(1, 0, 1, count=1), part(2, 1, 1, count=1)], 0.0)
    sampler.add([part(3, 0, 0, count=1, episode=1), part(4, 1, 0, count=1, episode=1)], 0.0)

    assert positions(ask(sampler, 0)) == [3, 4]
    assert positions(ask(sampler, 1)) == [1, 2]


def test_lag_zero_waits_for_ever_and_names_who_is_missing() -> None:
    """No time is long enough; the message names clients and actors."""
    sampler = rollouts(lag=0, timeout_seconds=0.001)
    sampler.add([part(1, 0, 0, count=1)], 0.0)

    assert [ask(sampler, 0, now=now) for now in (0.0, 1e9)] == [None, None]
    assert sampler.waiting_for == "rollout 0: actor 1 of client 0"


def test_a_silent_actor_is_left_out_above_lag_zero() -> None:
    """Past the timeout the batch goes without it; it is counted, its late data is stale (contracts E2)."""
    sampler = rollouts(lag=1, timeout_seconds=10.0)
    sampler.add([part(1, 0, 0, count=1)], 0.0)
    early = [ask(sampler, 0, now=now) for now in (0.0, 9.0)]
    first = ask(sampler, 0, now=10.5)
    sampler.add([part(2, 1, 0, count=1), part(3, 0, 1, count=1, episode=1)], 11.0)
    sampler.add([part(4, 1, 1, count=1, episode=1)], 11.0)
    second = ask(sampler, 1, now=11.0)

    assert early == [None, None]
    assert positions(first) == [1]
    assert positions(second) == [3, 4]
    assert outcome_of(second, 2) == "stale"
    assert isinstance(sampler.selection, RolloutSelection)
    assert sampler.selection.left_out_total == 1


def test_an_actor_that_delivers_is_not_silent() -> None:
    """The time counts from an actor's last arrival, not from the first question."""
    sampler = rollouts(lag=1, timeout_seconds=10.0)
    sampler.add([part(1, 0, 0, count=1)], 0.0)
    ask(sampler, 0, now=0.0)
    sampler.add([part(2, 1, 0, terminated=True)], 8.0)

    assert ask(sampler, 0, now=15.0) is None
    assert ask(sampler, 0, now=18.5) is not None


def test_when_all_are_silent_it_waits() -> None:
    """While nobody has begun the rollout there is nothing to go on with, however long it takes."""
    sampler = rollouts(lag=1, timeout_seconds=1.0)
    sampler.add([part(1, 0, 0, count=1), part(2, 1, 0, count=1)], 0.0)
    ask(sampler, 0)

    assert [ask(sampler, 1, now=now) for now in (0.0, 100.0)] == [None, None]


@pytest.mark.parametrize("update", [0, 1])
def test_a_segment_that_never_comes_does_not_stop_the_run(update: int) -> None:
    """Every actor's segment may be in quarantine; once all are silent the rest of the rollout is taken."""
    sampler = rollouts(lag=1, timeout_seconds=10.0)
    sampler.add([part(1, 0, 0, count=2, episode=1), part(2, 1, 0), part(3, 0, 1, count=1, episode=2)], 0.0)
    early = [ask(sampler, 0, now=now) for now in (0.0, 10.0)]
    taken = [positions(ask(sampler, 0, now=11.0))]
    if update:
        ask(sampler, 1, now=12.0)
        taken = [positions(ask(sampler, 1, now=23.0))]

    assert early == [None, None]
    assert taken == [[[1, 2], [3]][update]]


def test_a_rollout_of_which_nothing_came_is_empty() -> None:
    """Later data shows that it was played; its update learns from nothing instead of waiting for ever."""
    sampler = rollouts(lag=1, timeout_seconds=10.0)
    sampler.add([part(1, 0, 1, count=1)], 0.0)
    ask(sampler, 0, now=0.0, actors=[make_actor(0)])

    assert positions(ask(sampler, 0, now=11.0, actors=[make_actor(0)])) == []
    assert positions(ask(sampler, 1, now=11.0, actors=[make_actor(0)])) == [1]


def test_a_rollout_of_old_weights_is_stale() -> None:
    """After a time without registry or learner, what acted beyond the lag bound is passed over (E1, E3)."""
    sampler = rollouts(lag=1)
    sampler.add([part(1, 0, 5, count=1, oldest_update=3), part(2, 1, 5, count=1, oldest_update=4)], 0.0)
    sampled = ask(sampler, 5)

    assert positions(sampled) == [2]
    assert outcome_of(sampled, 1) == "stale"


def test_actors_that_joined_later_are_not_waited_for() -> None:
    """An actor counts from its first rollout on."""
    sampler = rollouts()
    sampler.add([part(1, 0, 0, count=1)], 0.0)
    actors = [make_actor(0), make_actor(1, first_rollout_index=1)]

    assert positions(ask(sampler, 0, actors=actors)) == [1]


def test_actors_that_left_are_not_waited_for_but_used() -> None:
    """What a departed actor delivered of the rollout is learned from all the same."""
    sampler = rollouts()
    sampler.add([part(1, 0, 0, count=1), part(2, 1, 0, terminated=True)], 0.0)

    assert positions(ask(sampler, 0, actors=[make_actor(0)])) == [1, 2]


def test_without_actors_nothing_is_decided() -> None:
    """An empty run waits for an actor instead of learning from leftovers."""
    sampler = rollouts()
    sampler.add([part(1, 0, 0, count=1)], 0.0)

    assert ask(sampler, 0, actors=[]) is None
    assert "an actor" in sampler.waiting_for


def test_evaluation_data_counts_as_delivered() -> None:
    """An unusable segment completes the rollout that it belongs to, so that nobody waits for it."""
    sampler = rollouts()
    sampler.add([part(1, 0, 0, count=1, purpose="evaluate"), part(2, 1, 0, count=1)], 0.0)

    assert positions(ask(sampler, 0)) == [2]


def test_open_rollouts_survive_a_restore() -> None:
    """Unusable segments are not read again, and still count as delivered."""
    sampler = rollouts()
    sampler.add([part(1, 0, 0, count=1, purpose="evaluate"), part(2, 1, 0, count=1)], 0.0)
    again = rollouts()
    again.restore(msgspec.json.decode(msgspec.json.encode(sampler.state())))
    again.add([part(2, 1, 0, count=1)], 0.0)

    assert positions(ask(again, 0)) == [2]


def test_many_missing_actors_are_named_in_part() -> None:
    """A readiness message stays short."""
    sampler = rollouts()
    ask(sampler, 0, actors=[make_actor(i) for i in range(20)])

    assert sampler.waiting_for.endswith("actor 7 of client 0 and 12 more")


# ---- the freshest


def test_the_newest_segments_are_taken_first() -> None:
    """Newest usable data first; the rest waits for the next update (contracts E1)."""
    sampler = Sampler(FreshestSelection(5, 1, 8))
    sampler.add([make_segment(4, position=p, episode_index=p) for p in (1, 2, 3, 4)], 0.0)

    assert positions(ask(sampler, 0)) == [3, 4]
    assert positions(ask(sampler, 1)) == [1, 2]


def test_old_segments_are_stale() -> None:
    """Beyond the lag bound a segment is stored, marked and never learned from."""
    sampler = Sampler(FreshestSelection(1, 1, 4))
    sampler.add([make_segment(4, position=1, episode_index=1, oldest_update=0)], 0.0)
    sampler.add([make_segment(4, position=2, episode_index=2, oldest_update=1)], 0.0)
    sampled = ask(sampler, 2)

    assert positions(sampled) == [2]
    assert outcome_of(sampled, 1) == "stale"


@pytest.mark.parametrize(("min_steps", "actors", "target"), [(None, 2, 16), (None, 0, 8), (5, 2, 5)])
def test_a_batch_is_as_large_as_told(min_steps: int | None, actors: int, target: int) -> None:
    """min_steps_per_epoch, or rollout_steps for each live actor, and one at least."""
    sampler = Sampler(FreshestSelection(1, 8, min_steps))
    moment = Moment(0, [make_actor(i) for i in range(actors)], 0.0)
    sampler.batch(moment)

    assert sampler.waiting_for == f"{target} of {target} steps"
    assert sampler.selection.wanted_steps(moment) == target


# ---- whole episodes


def episodes(count: int = 1, lag: int = 5, timeout_seconds: float = 10.0) -> Sampler:
    """A sampler of whole episodes."""
    return Sampler(EpisodeSelection(lag, count, timeout_seconds))


def test_episodes_are_joined_from_their_segments() -> None:
    """Whole means from step 0 to the end without a gap, in whatever order it came (contracts F3)."""
    sampler = episodes()
    sampler.add([make_segment(2, position=1, segment_index=1, first_step_index=4, terminated=True)], 0.0)
    early = ask(sampler, 0)
    sampler.add([make_segment(4, position=2)], 0.0)

    assert early is None
    assert positions(ask(sampler, 0)) == [1, 2]


def test_an_episode_with_a_gap_is_incomplete_past_the_deadline() -> None:
    """Its missing segment is waited for until then; its parts are unused and counted."""
    sampler = episodes(timeout_seconds=10.0)
    sampler.add(
        [
            make_segment(4, position=1),
            make_segment(4, position=2, segment_index=2, first_step_index=8, terminated=True),
        ],
        0.0,
    )
    assert ask(sampler, 0, now=9.0) is None
    sampler.add([make_segment(4, position=3, actor_index=1, truncated=True)], 11.0)
    sampled = ask(sampler, 0, now=11.0)

    assert positions(sampled) == [3]
    assert (outcome_of(sampled, 1), outcome_of(sampled, 2)) == ("incomplete", "incomplete")


def test_the_rest_of_an_episode_that_was_given_up_is_unused() -> None:
    """What comes after the deadline is incomplete too, also after a restore; the next episode is not."""
    sampler = episodes(timeout_seconds=10.0)
    sampler.add([make_segment(4, position=1)], 0.0)
    ask(sampler, 0, now=20.0)
    again = episodes(timeout_seconds=10.0)
    again.restore(msgspec.json.decode(msgspec.json.encode(sampler.state())))
    again.add([make_segment(4, position=2, segment_index=1, first_step_index=4, terminated=True)], 21.0)
    again.add([make_segment(4, position=3, episode_index=1, terminated=True)], 21.0)
    sampled = ask(again, 0, now=21.0)

    assert positions(sampled) == [3]
    assert outcome_of(sampled, 2) == "incomplete"


def test_an_episode_is_as_old_as_its_oldest_step() -> None:
    """One stale segment makes the episode stale, and its later segments unused."""
    sampler = episodes(lag=1)
    sampler.add([make_segment(4, position=1, oldest_update=0)], 0.0)
    sampler.add([make_segment(4, position=2, segment_index=1, first_step_index=4, oldest_update=2)], 0.0)
    ask(sampler, 2)
    late = make_segment(4, position=3, segment_index=2, first_step_index=8, oldest_update=2, terminated=True)
    sampler.add([late, make_segment(4, position=4, actor_index=1, oldest_update=2, truncated=True)], 0.0)
    sampled = ask(sampler, 2)

    assert positions(sampled) == [4]
    assert [outcome_of(sampled, p) for p in (1, 2, 3)] == ["stale", "stale", "incomplete"]


def test_the_newest_episodes_are_taken_first() -> None:
    """As many as a batch has, by when their last segment came."""
    sampler = episodes(count=2)
    sampler.add([make_segment(2, position=p, episode_index=p, terminated=True) for p in (1, 2, 3)], 0.0)

    assert positions(ask(sampler, 0)) == [2, 3]
    assert ask(sampler, 1) is None
    assert sampler.waiting_for == "1 of 2 whole episodes"


def test_an_unusable_part_spoils_the_episode() -> None:
    """An episode with greedy or overlapping steps is not whole for a learner."""
    sampler = episodes()
    sampler.add(
        [
            make_segment(4, position=1),
            make_segment(
                4, position=2, segment_index=1, first_step_index=4, purpose="evaluate", terminated=True
            ),
            make_segment(4, position=3, episode_index=1, terminated=True),
        ],
        0.0,
    )
    sampled = ask(sampler, 0)

    assert positions(sampled) == [3]
    assert (outcome_of(sampled, 1), outcome_of(sampled, 2)) == ("incomplete", "evaluation")


def test_episodes_that_were_only_evaluated_are_forgotten() -> None:
    """A run that evaluates for ever keeps nothing of the episodes that are over."""
    sampler = episodes()
    for p in range(1, 20, 2):
        first = make_segment(4, position=p, episode_index=p, purpose="evaluate")
        rest: dict[str, Any] = {"segment_index": 1, "first_step_index": 4, "terminated": True}
        sampler.add(
            [first, make_segment(4, position=p + 1, episode_index=p, purpose="evaluate", **rest)], 0.0
        )

    assert sampler.selection.state()["given_up"] == []


def test_wanted_steps_follow_the_episodes_seen() -> None:
    """The estimate learns how long episodes are; a full pool wants nothing."""
    sampler = episodes(count=1)
    moment = Moment(0, ACTORS, 0.0)
    before = sampler.selection.wanted_steps(moment)
    for p in range(1, 40):
        sampler.add([make_segment(500, position=p, episode_index=p, terminated=True)], 0.0)
        assert sampler.selection.wanted_steps(moment) == 0
        ask(sampler, 0)

    assert sampler.selection.wanted_steps(moment) > 10 * before


# ---- the choice


@pytest.mark.parametrize(
    ("algorithm", "hyperparameters", "pacing", "expected"),
    [
        ("PPO", {}, "block", RolloutSelection),
        ("PPO", {}, "free", FreshestSelection),
        ("PPO", {"rollout_steps": None}, "block", EpisodeSelection),
        ("PPO", {"rollout_steps": None}, "free", EpisodeSelection),
        ("REINFORCE", {}, "block", EpisodeSelection),
        ("REINFORCE", {}, "free", EpisodeSelection),
    ],
)
def test_pacing_and_needs_choose(
    algorithm: str, hyperparameters: dict[str, Any], pacing: str, expected: type[Selection]
) -> None:
    """Rollouts under block, the freshest under free, whole episodes where they are needed (contracts E2)."""
    complete = complete_hyperparameters(algorithm, hyperparameters)
    run = make_run(algorithm=algorithm, hyperparameters=complete, pacing=pacing)

    assert type(selection_for(run)) is expected
