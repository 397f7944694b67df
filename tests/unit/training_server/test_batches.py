"""Batches: chains, their order, padding, masks, weights, final observations."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relayrl_shared.errors import InvalidTrajectory
from relayrl_training_server.batches import Segment, build_batch, chain_up, follows
from relayrl_training_server.testing.segments import make_metadata, make_segment


def episode(actor: int, lengths: list[int], position: int, last: str = "cut") -> list[Segment]:
    """Consecutive segments of one episode."""
    starts = np.cumsum([0, *lengths]).tolist()
    return [
        make_segment(
            steps,
            position=position + i,
            actor_index=actor,
            segment_index=i,
            first_step_index=starts[i],
            terminated=i == len(lengths) - 1 and last == "terminated",
            truncated=i == len(lengths) - 1 and last == "truncated",
        )
        for i, steps in enumerate(lengths)
    ]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=4), st.randoms())
def test_the_order_of_arrival_does_not_matter(lengths: list[list[int]], shuffle: random.Random) -> None:
    """A batch depends on what the segments are, never on the order in which they came (contracts F2)."""
    segments = [s for actor, parts in enumerate(lengths) for s in episode(actor, parts, 10 * actor)]
    shuffled = list(segments)
    shuffle.shuffle(shuffled)
    one, other = build_batch(segments), build_batch(shuffled)

    np.testing.assert_array_equal(one.reward, other.reward)
    np.testing.assert_array_equal(one.lengths, [sum(parts) for parts in lengths])
    expected = np.concatenate([s.columns.reward for s in segments])
    np.testing.assert_array_equal(one.reward, expected)


def test_segments_of_an_episode_become_one_chain() -> None:
    """What follows without a gap is one chain; its end is that of its last segment."""
    batch = build_batch(episode(0, [3, 2], 1, "terminated") + episode(1, [4], 5, "truncated"))

    assert batch.lengths.tolist() == [5, 4]
    assert batch.truncated.tolist() == [False, True]
    assert batch.final_chains.tolist() == [1]
    assert batch.whole == 2


def test_a_gap_splits_a_chain() -> None:
    """With its middle segment missing an episode is two chains, and no whole one."""
    first, _, last = episode(0, [3, 2, 2], 1, "terminated")
    batch = build_batch([first, last])

    assert batch.lengths.tolist() == [3, 2]
    assert batch.final_chains.tolist() == [0]
    assert batch.whole == 0


def test_chains_stand_in_the_order_of_f2() -> None:
    """Rollout, client, actor, episode: in this order, whatever the ids and positions."""
    keys = [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 0, 0)]
    segments = [
        make_segment(
            2,
            position=i,
            rollout_index=rollout,
            client_index=client,
            actor_index=actor,
            episode_index=index,
            episode_id=f"{9 - i}",
        )
        for i, (rollout, client, actor, index) in enumerate(keys)
    ]

    assert [chain[0].position for chain in chain_up(segments)] == [4, 3, 2, 1, 0]


def test_rows_and_chains_are_inverse() -> None:
    """Rows become [T, B] with zeros in the padding, and come back as they were."""
    batch = build_batch([make_segment(3, position=1), make_segment(1, position=2, actor_index=1)])
    rows = np.arange(1.0, 5.0, dtype=np.float32)
    chains = batch.to_chains(rows)

    assert chains.tolist() == [[1.0, 4.0], [2.0, 0.0], [3.0, 0.0]]
    assert batch.mask.tolist() == [[True, True], [True, False], [True, False]]
    np.testing.assert_array_equal(batch.to_rows(chains), rows)


def test_bootstrap_values_reach_open_chains_only() -> None:
    """A terminated chain bootstraps with 0, the others with the value of their final observation."""
    segments = [
        make_segment(1, position=1, actor_index=0),
        make_segment(1, position=2, actor_index=1, terminated=True),
        make_segment(1, position=3, actor_index=2, truncated=True),
        make_segment(1, position=4, actor_index=3, terminated=True, truncated=True),
    ]
    batch = build_batch(segments)

    assert batch.bootstrap(np.array([7.0, 9.0], dtype=np.float32)).tolist() == [7.0, 0.0, 9.0, 0.0]
    assert batch.truncated.tolist() == [False, False, True, False]
    assert batch.final_observation["observation"].shape == (2, 3)


def test_all_terminated_needs_no_final_observation() -> None:
    """Without an open chain there are no final observations to value."""
    batch = build_batch([make_segment(2, terminated=True)])

    assert batch.final_observation == {}
    assert batch.bootstrap(np.zeros(0, dtype=np.float32)).tolist() == [0.0]


def test_an_open_chain_without_final_observation_is_refused() -> None:
    """A cut without the next observation could not be valued; the error names the trajectory."""
    segment = make_segment(2)
    broken = Segment(1, segment.metadata, segment.columns, None, 0)

    with pytest.raises(InvalidTrajectory, match=segment.metadata.trajectory_id):
        build_batch([broken])


def test_weights_follow_fallback_and_missing_log_probs() -> None:
    """A fallback step, and one without behaviour_log_prob, has no weight in a policy loss (contracts B2)."""
    columns = {
        "fallback": np.array([False, True, False]),
        "behaviour_log_prob_valid": np.array([True, False, False]),
        "behaviour_log_prob": np.array([-1.0, np.nan, np.nan], dtype=np.float32),
    }
    batch = build_batch([make_segment(3, columns=columns)])

    assert batch.from_policy.tolist() == [1.0, 0.0, 1.0]
    assert batch.policy_weight.tolist() == [1.0, 0.0, 0.0]
    assert batch.behaviour_log_prob.tolist() == [-1.0, 0.0, 0.0]


def test_an_absent_mask_allowed_everything() -> None:
    """Where one segment has a mask and another none, the other's steps were unmasked."""
    mask = np.array([[True, False]] * 2)
    batch = build_batch(
        [
            make_segment(2, position=1, columns={"action_mask": {"action": mask}}),
            make_segment(1, position=2, actor_index=1),
        ]
    )

    assert batch.action_mask["action"].tolist() == [[True, False], [True, False], [True, True]]


def test_what_follows_is_the_next_segment_without_a_gap() -> None:
    """Same episode, next index, next step: all three."""
    before = make_metadata(3)
    after = make_metadata(2, segment_index=1, first_step_index=3)

    assert follows(before, after)
    assert not follows(before, make_metadata(2, segment_index=1, first_step_index=4))
    assert not follows(before, make_metadata(2, segment_index=2, first_step_index=3))
    assert not follows(before, make_metadata(2, segment_index=1, first_step_index=3, episode_id="other"))
