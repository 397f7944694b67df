"""The sampler: what it refuses, what it counts, its cursor, and that it continues from its state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from relayrl_training_server.batches import Segment
from relayrl_training_server.sampler import Moment, OverlapGuard, Pool, Sampled, Sampler
from relayrl_training_server.selections import EpisodeSelection, FreshestSelection, RolloutSelection
from relayrl_training_server.testing.segments import make_actor, make_segment


def freshest(steps: int = 4) -> Sampler:
    """A sampler of any segments, `steps` a batch, lag bound 1."""
    return Sampler(FreshestSelection(1, 1, steps))


def sample(sampler: Sampler, update: int = 0) -> Sampled | None:
    """A batch for that update, with one live actor."""
    return sampler.batch(Moment(update, [make_actor(0)], 0.0))


def outcomes(sampled: Sampled | None) -> dict[int, str]:
    """Position → outcome."""
    assert sampled is not None
    return {use.position: use.outcome for use in sampled.uses}


def one_step_episodes(positions: Iterable[int]) -> list[Segment]:
    """An episode of 4 steps at each position."""
    return [make_segment(4, position=p, episode_index=p, terminated=True) for p in positions]


def test_evaluation_and_greedy_data_are_never_sampled() -> None:
    """They are decided upon as what they are, and nothing is learned from them (contracts B5)."""
    sampler = freshest()
    sampler.add(
        [
            make_segment(4, position=1, episode_index=1, purpose="evaluate"),
            make_segment(4, position=2, episode_index=2, columns={"greedy": np.array([False] * 3 + [True])}),
            make_segment(4, position=3, episode_index=3),
        ],
        now=0.0,
    )

    assert outcomes(sample(sampler)) == {1: "evaluation", 2: "greedy", 3: "used"}


def test_an_algorithm_that_declares_it_learns_from_evaluation() -> None:
    """Then such data is as good as any (contracts B5)."""
    sampler = Sampler(FreshestSelection(1, 1, 8), evaluation=True)
    sampler.add(
        [
            make_segment(4, position=1, episode_index=1, purpose="evaluate"),
            make_segment(4, position=2, episode_index=2, columns={"greedy": np.ones(4, dtype=np.bool_)}),
        ],
        now=0.0,
    )

    assert outcomes(sample(sampler)) == {1: "used", 2: "used"}


def test_held_bytes_follow_what_is_undecided() -> None:
    """What is passed over or learned from makes room for more."""
    sampler = freshest()
    held = [replace(segment, stored_bytes=100) for segment in one_step_episodes([1, 2, 3])]
    sampler.add([held[0], replace(held[1], oldest_update=4), replace(held[2], oldest_update=5)], now=0.0)
    before = sampler.pool.held_bytes
    sampler.drop(Moment(5, [], 0.0))
    dropped = sampler.pool.held_bytes
    sample(sampler, 5)

    assert (before, dropped, sampler.pool.held_bytes) == (300, 200, 100)
    sampler.restore(sampler.state())
    assert sampler.pool.held_bytes == 0


def test_overlapping_steps_are_found() -> None:
    """A segment with steps that its episode has already is not learned from (contracts B4)."""
    sampler = freshest(8)
    sampler.add(
        [
            make_segment(4, position=1),
            make_segment(4, position=2, segment_index=1, first_step_index=3, trajectory_id="overlaps"),
            make_segment(4, position=3, segment_index=2, first_step_index=4),
            make_segment(4, position=4, episode_index=1),
        ],
        now=0.0,
    )
    sampled = sample(sampler)

    assert outcomes(sampled)[2] == "overlap"
    assert sampled is not None
    assert 2 not in [segment.position for segment in sampled.segments]


def test_uses_are_told_once() -> None:
    """Every decision since the last batch comes with the next one, by position, and never again."""
    sampler = freshest()
    sampler.add(one_step_episodes([1]), now=0.0)
    first = sample(sampler)
    sampler.add([make_segment(4, position=2, episode_index=2, purpose="evaluate")], now=0.0)
    sampler.add(one_step_episodes([3]), now=0.0)
    second = sample(sampler)

    assert (outcomes(first), outcomes(second)) == ({1: "used"}, {2: "evaluation", 3: "used"})
    assert second is not None
    assert [metadata.episode_index for metadata in second.decided] == [2, 3]


def test_the_cursor_stops_before_what_is_open() -> None:
    """Everything up to the cursor is decided upon; what was decided above it is known."""
    sampler = freshest(4)
    sampler.add(one_step_episodes([1, 2, 3]), now=0.0)
    sample(sampler)  # takes the newest: 3

    assert sampler.pool.cursor == 0
    assert sampler.state()["pool"]["decided"] == [3]
    sample(sampler)
    sample(sampler)
    assert sampler.pool.cursor == 3
    assert sampler.state()["pool"]["decided"] == []


def test_known_positions_are_not_taken_twice() -> None:
    """Reading the same rows again, as after a resume, changes nothing."""
    sampler = freshest()
    sampler.add(one_step_episodes([1, 2]), now=0.0)
    sample(sampler)
    sampler.add(one_step_episodes([1, 2]), now=0.0)

    assert sorted(sampler.pool.undecided) == [1]
    assert sampler.steps_read == 8


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=10),
    st.integers(0, 10),
    st.sampled_from(["freshest", "episodes"]),
)
def test_a_sampler_restored_anywhere_gives_the_same_batches(counts: list[int], cut: int, kind: str) -> None:
    """State, a JSON round trip and reading again from the cursor change no batch and no decision."""

    def make() -> Sampler:
        return Sampler(FreshestSelection(2, 1, 5) if kind == "freshest" else EpisodeSelection(2, 2, 1e9))

    segments = one_step_episodes(range(1, sum(counts) + 1))
    through, resumed, position = make(), make(), 0
    seen: list[tuple[dict[int, str], dict[int, str]]] = []
    for update, count in enumerate(counts):
        if update == cut:
            state = msgspec.json.decode(msgspec.json.encode(resumed.state()))
            resumed = make()
            resumed.restore(state)
            resumed.add([s for s in segments[:position] if s.position > resumed.read_position], now=0.0)
        position += count
        for sampler in (through, resumed):
            sampler.add(segments[position - count : position], now=0.0)
        one, other = sample(through, update), sample(resumed, update)
        assert (one is None) == (other is None)
        if one is not None and other is not None and update < cut:
            assert one.uses == other.uses
        if one is not None and other is not None:
            assert [s.position for s in one.segments] == [s.position for s in other.segments]
            seen.append((outcomes(one), outcomes(other)))

    used = [p for _, other in seen for p, outcome in other.items() if outcome == "used"]
    assert len(used) == len(set(used))
    assert through.steps_read == resumed.steps_read


def test_a_restored_guard_takes_back_what_is_read_again() -> None:
    """Undecided segments are no overlap of themselves after a resume; decided ones still count."""
    sampler = Sampler(EpisodeSelection(5, 1, 1e9))
    sampler.add([make_segment(4, position=1)], now=0.0)
    sampler.add([make_segment(4, position=2, segment_index=1, first_step_index=4)], now=0.0)
    again = Sampler(EpisodeSelection(5, 1, 1e9))
    again.restore(msgspec.json.decode(msgspec.json.encode(sampler.state())))
    again.add([make_segment(4, position=1)], now=0.0)
    again.add([make_segment(4, position=2, segment_index=1, first_step_index=4)], now=0.0)

    assert again.pool.outcomes == {}
    assert sorted(again.pool.undecided) == [1, 2]


def test_the_guard_forgets_no_open_episode_in_its_state() -> None:
    """Spans of episodes that go on are kept, joined where they touch; ended ones are left out."""
    guard = OverlapGuard()
    guard.is_new(make_segment(4, position=1))
    guard.is_new(make_segment(2, position=2, segment_index=1, first_step_index=4))
    guard.is_new(make_segment(3, position=3, actor_index=1, terminated=True))
    restored = OverlapGuard()
    restored.restore(msgspec.json.decode(msgspec.json.encode(guard.state())))

    assert guard.state() == {"episode-0-0": [(0, 6)]}
    assert not restored.is_new(make_segment(1, position=9, segment_index=7, first_step_index=5))
    assert restored.is_new(make_segment(1, position=9, segment_index=2, first_step_index=6))


def test_a_pool_counts_by_outcome() -> None:
    """Every decision is counted, and survives a restore."""
    pool = Pool()
    for position, outcome in ((1, "used"), (2, "stale"), (3, "stale")):
        segment = make_segment(1, position=position, episode_index=position)
        pool.undecided[position] = segment
        pool.read_position = position
        pool.decide([segment], outcome)  # type: ignore[arg-type]
    again = Pool()
    again.restore(pool.state())

    assert again.outcomes == {"used": 1, "stale": 2}
    assert again.read_position == 3


def test_nothing_read_waits_for_the_first_trajectory() -> None:
    """A sampler that has nothing says what it lacks."""
    sampler = Sampler(RolloutSelection(0, 1.0))

    assert sample(sampler) is None
    assert sampler.waiting_for == "rollout 0: actor 0 of client 0"
