"""The agent offline: the order of things in a call, bad arguments, actors, ends (contracts A)."""

from __future__ import annotations

import threading
from typing import Any

import gymnasium
import numpy as np
import pytest

from relayrl_client.agent import Agent
from relayrl_client.inference import Decision
from relayrl_client.inputs import Rewards
from relayrl_client.segments import ClosedSegment
from relayrl_client.testing import CheckingDelivery, CountingEnvironment, offline_agent
from relayrl_shared.errors import (
    ConfigError,
    ContractError,
    EpisodeError,
    InferenceError,
    InvalidActionMask,
    InvalidObservation,
    InvalidReward,
    Overloaded,
    RelayRLError,
    SpecMismatch,
    SpoolError,
    UnknownActor,
)

CARTPOLE = gymnasium.make("CartPole-v1")


def seen(*values: float) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Observations [B, 4] that show a number each."""
    return np.array([[value, 0, 0, 0] for value in values], np.float32)


@pytest.fixture
def pair() -> Any:
    """A running agent with two actors, and its delivery."""
    agent, delivery = offline_agent(CARTPOLE, actor_count=2, max_segment_steps=4)
    with agent:
        yield agent, delivery


Pair = tuple[Agent, CheckingDelivery]


# -- rewards and segments ----------------------------------------------------------------------------------


def test_a_reward_goes_to_the_previous_step_of_its_actor(pair: Pair) -> None:
    """What request_action is given was received for the action before."""
    agent, delivery = pair
    ids = agent.get_actor_ids()
    agent.request_action(ids, seen(1, 2))
    agent.request_action(ids, seen(3, 4), reward=[10.0, 20.0])
    agent.end_episode(ids, [30.0, 40.0], terminated=True)

    first, second = (delivery.of(actor)[0] for actor in ids)
    assert first.columns.reward.tolist() == [10, 30]
    assert second.columns.reward.tolist() == [20, 40]
    assert first.columns.observation["observation"][:, 0].tolist() == [1, 3]
    assert first.metadata.episode_return == 40


def test_a_full_segment_closes_with_the_next_observation(pair: Pair) -> None:
    """At its maximum length a segment waits for its last reward and what came after (contracts A3)."""
    agent, delivery = pair
    actor = agent.get_actor_ids()[0]
    for step in range(4):
        agent.request_action([actor], seen(step), reward=step if step else None)
    assert delivery.segments == []
    agent.request_action([actor], seen(99), reward=4.0)

    (segment,) = delivery.segments
    assert segment.columns.reward.tolist() == [1, 2, 3, 4]
    assert segment.final_observation is not None
    assert segment.final_observation.observation["observation"][0] == 99
    assert not segment.metadata.terminated
    assert not segment.metadata.truncated
    agent.end_episode([actor], 5.0, terminated=True)
    last = delivery.segments[1]
    assert last.columns.observation["observation"][:, 0].tolist() == [99]
    assert (last.metadata.segment_index, last.metadata.first_step_index) == (1, 4)


def test_the_first_call_of_an_episode_takes_no_reward(pair: Pair) -> None:
    """There is no step for it: None or 0 only (contracts A2)."""
    agent, _ = pair
    ids = agent.get_actor_ids()
    with pytest.raises(InvalidReward, match="first call of an episode"):
        agent.request_action(ids, seen(1, 2), reward=[0.0, 1.0])
    agent.request_action(ids, seen(1, 2), reward=0.0)


def test_a_missing_reward_is_an_error(pair: Pair) -> None:
    """A recorded step without its reward would be a silent zero."""
    agent, _ = pair
    ids = agent.get_actor_ids()
    agent.request_action(ids, seen(1, 2))
    with pytest.raises(InvalidReward, match="no reward for its step 0"):
        agent.request_action(ids, seen(1, 2))
    with pytest.raises(InvalidReward, match=ids[1]):
        agent.request_action(ids, seen(1, 2), reward=[1.0, None])
    with pytest.raises(InvalidReward, match="last step"):
        agent.end_episode(ids, terminated=True)


def test_both_flags_count_as_terminated(pair: Pair) -> None:
    """Termination wins over truncated (contracts A4)."""
    agent, delivery = pair
    actor = agent.get_actor_ids()[0]
    agent.request_action(actor, seen(1)[0])
    agent.end_episode(actor, 1.0, terminated=True, truncated=True)
    assert delivery.segments[0].metadata.terminated
    assert not delivery.segments[0].metadata.truncated


def test_an_end_needs_a_flag_and_a_truncation_its_observation(pair: Pair) -> None:
    """end_episode with neither flag, or truncated without final_observation, is an error (A4, A9)."""
    agent, delivery = pair
    ids = agent.get_actor_ids()
    agent.request_action(ids, seen(1, 2))
    with pytest.raises(EpisodeError, match="terminated=True or truncated=True"):
        agent.end_episode(ids, 1.0, terminated=[True, False])
    with pytest.raises(EpisodeError, match=f"{ids[1]}: a truncated episode needs final_observation"):
        agent.end_episode(ids, 1.0, terminated=[True, False], truncated=[False, True])
    assert delivery.segments == []
    agent.end_episode(
        ids, 1.0, terminated=[True, False], truncated=[False, True], final_observation=seen(7, 8)
    )
    final = delivery.of(ids[1])[0].final_observation
    assert final is not None
    assert final.observation["observation"][0] == 8


def test_flag_last_action_terminates(pair: Pair) -> None:
    """The original's name for an end."""
    agent, delivery = pair
    actor = agent.get_actor_ids()[0]
    agent.request_action(actor, seen(1)[0])
    agent.flag_last_action(actor, 3.0)
    assert delivery.segments[0].metadata.terminated
    assert delivery.segments[0].columns.reward.tolist() == [3]


def test_an_end_outside_of_an_episode_is_an_error(pair: Pair) -> None:
    """Nothing to end: no segment comes of it."""
    agent, delivery = pair
    with pytest.raises(EpisodeError, match="not in an episode"):
        agent.end_episode(agent.get_actor_ids(), 1.0, terminated=True)
    assert delivery.segments == []


def test_removal_drops_the_step_whose_reward_is_unknown(pair: Pair) -> None:
    """What that step saw is the final observation of the others (contracts A5)."""
    agent, delivery = pair
    actor = agent.get_actor_ids()[0]
    for step in range(3):
        agent.request_action(actor, seen(step)[0], reward=1.0 if step else None)
    agent.remove_actor(actor)

    (segment,) = delivery.segments
    assert segment.steps == 2
    assert segment.final_observation is not None
    assert segment.final_observation.observation["observation"][0] == 2
    assert agent.runtime.recorder.counters.dropped_steps_total == 1
    with pytest.raises(UnknownActor):
        agent.request_action(actor, seen(1)[0])


def test_removal_after_one_step_leaves_nothing(pair: Pair) -> None:
    """A lone step without a reward is dropped and counted, and its memory given back."""
    agent, delivery = pair
    actor = agent.get_actor_ids()[0]
    agent.request_action(actor, seen(1)[0])
    agent.remove_actor(actor)
    assert delivery.segments == []
    assert agent.runtime.recorder.counters.dropped_steps_total == 1
    assert agent.runtime.recorder.storage.statistics().pages_used == 0


def test_shutdown_closes_what_is_open() -> None:
    """Shutdown treats every actor as removed."""
    agent, delivery = offline_agent(CARTPOLE, actor_count=2)
    with agent:
        ids = agent.get_actor_ids()
        agent.request_action(ids, seen(1, 2))
        agent.request_action(ids, seen(3, 4), reward=1.0)
    assert [segment.steps for segment in delivery.segments] == [1, 1]
    assert not agent.is_running
    agent.shutdown()


def test_episodes_and_segments_are_numbered(pair: Pair) -> None:
    """episode_index counts per actor; episode ids differ; all is named in the metadata."""
    agent, delivery = pair
    actor = agent.get_actor_ids()[0]
    for _ in range(3):
        agent.request_action(actor, seen(1)[0])
        agent.end_episode(actor, 1.0, terminated=True)
    metadata = [segment.metadata for segment in delivery.segments]
    assert [m.episode_index for m in metadata] == [0, 1, 2]
    assert len({m.episode_id for m in metadata}) == 3
    assert {m.actor_index for m in metadata} == {0}
    assert {m.policy for m in metadata} == {"test"}


# -- results -----------------------------------------------------------------------------------------------


def test_actions_come_in_the_order_of_the_ids(pair: Pair) -> None:
    """The order of the ids is the order of the rows, whatever the order of the actors' making."""
    agent, delivery = pair
    one, two = agent.get_actor_ids()
    result = agent.request_action([two, one], seen(1, 2))
    agent.end_episode([one, two], 0.0, terminated=True)
    assert result.action.tolist() == [
        delivery.of(two)[0].columns.action["action"][0],
        delivery.of(one)[0].columns.action["action"][0],
    ]
    assert result.policy_version.tolist() == [1, 1]
    assert delivery.of(two)[0].columns.observation["observation"][0, 0] == 1


def test_a_single_id_gives_a_bare_action(pair: Pair) -> None:
    """Without a list of ids there is no actor axis on either side."""
    agent, _ = pair
    result = agent.request_action(agent.get_actor_ids()[0], seen(1)[0])
    assert np.ndim(result.action) == 0
    assert CARTPOLE.action_space.contains(np.int64(result.action))


def test_one_observation_serves_all_actors(pair: Pair) -> None:
    """An observation without the actor axis is shown to every listed actor, as in the original."""
    agent, delivery = pair
    ids = agent.get_actor_ids()
    agent.request_action(ids, seen(5)[0])
    agent.end_episode(ids, 0.0, terminated=True)
    assert [segment.columns.observation["observation"][0, 0] for segment in delivery.segments] == [5, 5]


def test_greedy_is_recorded_and_repeats_itself(pair: Pair) -> None:
    """Zero noise gives the same action each time, and the record says so."""
    agent, delivery = pair
    actor = agent.get_actor_ids()[0]
    actions = set()
    for step in range(4):
        result = agent.request_action(actor, seen(1)[0], reward=0.0 if step else None, greedy=step != 2)
        actions |= {int(result.action)} if step != 2 else set()
    agent.end_episode(actor, 0.0, terminated=True)
    assert len(actions) == 1
    assert delivery.segments[0].columns.greedy.tolist() == [True, True, False, True]


def test_equal_seeds_act_alike_and_others_do_not() -> None:
    """Noise comes from the run's seed, the actor, the episode and the step, and nothing else."""

    def actions(seed: int) -> list[int]:
        agent, _ = offline_agent(CARTPOLE, actor_count=1, seed=seed)
        with agent:
            actor = agent.get_actor_ids()[0]
            return [
                int(agent.request_action(actor, seen(1)[0], reward=0.0 if step else None).action)
                for step in range(40)
            ]

    assert actions(1) == actions(1)
    assert actions(1) != actions(2)


def test_aux_columns_are_recorded(pair: Pair) -> None:
    """An application's own columns of a step travel with it."""
    agent, delivery = offline_agent(CARTPOLE, actor_count=1, aux={"lap": "float32"})
    with agent:
        actor = agent.get_actor_ids()[0]
        agent.request_action([actor], seen(1), aux={"lap": [2.5]})
        with pytest.raises(SpecMismatch, match="lap"):
            agent.request_action([actor], seen(1), reward=1.0)
        agent.end_episode(actor, 1.0, terminated=True)
    assert delivery.segments[0].columns.aux["lap"].tolist() == [2.5]


# -- bad arguments -----------------------------------------------------------------------------------------

BAD_CALLS: list[tuple[str, type[RelayRLError], str, dict[str, Any]]] = [
    ("shape", SpecMismatch, r"observation: shape \(2, 3\)", {"observation": np.zeros((2, 3), np.float32)}),
    ("rows", SpecMismatch, r"shape \(3, 4\)", {"observation": np.zeros((3, 4), np.float32)}),
    ("dtype", SpecMismatch, "float64.*astype", {"observation": np.zeros((2, 4))}),
    ("nan", InvalidObservation, "NaN.*allow_nan", {"observation": seen(1, float("nan"))}),
    ("infinity", InvalidObservation, "infinity", {"observation": seen(float("inf"), 1)}),
    ("text", SpecMismatch, "observation", {"observation": "left"}),
    ("reward nan", InvalidReward, "finite", {"reward": float("nan")}),
    ("reward inf", InvalidReward, "finite", {"reward": [1.0, float("inf")]}),
    ("reward beyond float32", InvalidReward, "finite float32", {"reward": 1e39}),
    ("reward shape", InvalidReward, "one number an actor", {"reward": [1.0, 2.0, 3.0]}),
    ("reward text", InvalidReward, "reward", {"reward": ["a", "b"]}),
    ("mask", InvalidActionMask, "masked_leaves", {"action_mask": np.ones((2, 2), np.bool_)}),
]


@pytest.mark.parametrize(
    ("error", "message", "change"), [call[1:] for call in BAD_CALLS], ids=[c[0] for c in BAD_CALLS]
)
def test_bad_arguments_are_typed_errors_and_record_nothing(
    pair: Pair, error: type[RelayRLError], message: str, change: dict[str, Any]
) -> None:
    """A bad row fails the call; the same call with good arguments then succeeds, reward included."""
    agent, delivery = pair
    ids = agent.get_actor_ids()
    agent.request_action(ids, seen(1, 2))
    good: dict[str, Any] = {"observation": seen(3, 4), "reward": 1.0}
    with pytest.raises(error, match=message):
        agent.request_action(ids, **(good | change))
    agent.request_action(ids, **good)
    agent.end_episode(ids, 1.0, terminated=True)
    assert [segment.columns.reward.tolist() for segment in delivery.segments] == [[1, 1], [1, 1]]


def test_errors_name_the_actor_whose_row_is_bad(pair: Pair) -> None:
    """Of many actors the message names the one that is wrong."""
    agent, _ = pair
    ids = agent.get_actor_ids()
    with pytest.raises(InvalidObservation, match=f"actor {ids[1]}"):
        agent.request_action(ids, seen(1, float("nan")))


@pytest.mark.parametrize("ids", [["nobody"], ["1c0d4a1c-0000-4000-8000-000000000000"], [None], [7]])
def test_unknown_actors_are_refused(pair: Pair, ids: list[Any]) -> None:
    """No actor of that id: an error that says where ids come from."""
    agent, _ = pair
    with pytest.raises(UnknownActor, match="new_actor"):
        agent.request_action(ids, seen(1))


def test_one_unknown_id_fails_the_whole_call(pair: Pair) -> None:
    """Nobody acts where one cannot (the original skipped unknown ids silently)."""
    agent, _ = pair
    known = agent.get_actor_ids()[0]
    with pytest.raises(UnknownActor):
        agent.request_action([known, "nobody"], seen(1, 2))
    agent.request_action([known], seen(1))  # still the first call of its episode: no reward is due


def test_no_ids_and_doubled_ids_are_refused(pair: Pair) -> None:
    """A call names each actor once, and at least one."""
    agent, _ = pair
    one = agent.get_actor_ids()[0]
    with pytest.raises(EpisodeError, match="at least one"):
        agent.request_action([], seen())
    with pytest.raises(EpisodeError, match="twice"):
        agent.request_action([one, one], seen(1, 2))


def test_nan_passes_where_it_is_allowed() -> None:
    """allow_nan lets NaN observations through to the policy, and refuses nothing else."""
    agent, delivery = offline_agent(CARTPOLE, actor_count=1, allow_nan=True)
    with agent:
        actor = agent.get_actor_ids()[0]
        with pytest.raises(InferenceError):  # this policy cannot act on NaN; the check before it let it pass
            agent.request_action(actor, seen(float("nan"))[0])
    assert delivery.segments == []


# -- masks -------------------------------------------------------------------------------------------------


def masked_agent() -> tuple[Agent, CheckingDelivery]:
    return offline_agent(CountingEnvironment(), actor_count=2, masked=True)


def test_masked_actions_are_never_taken_and_the_mask_is_recorded() -> None:
    """True means allowed; integers 0 and 1 are taken as Gymnasium gives them."""
    agent, delivery = masked_agent()
    mask = np.array([[0, 0, 1], [1, 0, 0]], np.int8)
    with agent:
        ids = agent.get_actor_ids()
        for step in range(5):
            result = agent.request_action(ids, np.zeros((2, 3), np.float32), mask, 0.0 if step else None)
            assert result.action.tolist() == [2, 0]
        agent.end_episode(ids, 0.0, terminated=True)
    assert (delivery.segments[0].columns.action_mask["action"] == mask[0].astype(bool)).all()


def test_without_a_mask_everything_is_allowed() -> None:
    """None records a mask of ones."""
    agent, delivery = masked_agent()
    with agent:
        ids = agent.get_actor_ids()
        agent.request_action(ids, np.zeros((2, 3), np.float32))
        agent.end_episode(ids, 0.0, terminated=True)
    assert delivery.segments[0].columns.action_mask["action"].all()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.array([[1, 1, 1], [0, 0, 0]], np.bool_), "allows nothing"),
        (np.ones((2, 4), np.bool_), "shape"),
        (np.ones((2, 3), np.float32), "float32"),
        (np.array([[1, 1, 1], [0, 2, 0]], np.int8), "0 and 1"),
        ("all", "shape"),
    ],
)
def test_bad_masks_are_refused(mask: Any, message: str) -> None:
    """A mask that allows nothing, or of another shape or dtype, is a typed error and nothing is recorded."""
    agent, delivery = masked_agent()
    with agent:
        ids = agent.get_actor_ids()
        with pytest.raises(InvalidActionMask, match=message):
            agent.request_action(ids, np.zeros((2, 3), np.float32), mask)
    assert delivery.segments == []


def test_an_empty_mask_names_its_actor() -> None:
    """The message tells whose row allows nothing."""
    agent, _ = masked_agent()
    with agent:
        ids = agent.get_actor_ids()
        mask = np.array([[1, 1, 1], [0, 0, 0]], np.bool_)
        with pytest.raises(InvalidActionMask, match=f"actor {ids[1]}"):
            agent.request_action(ids, np.zeros((2, 3), np.float32), mask)


def test_a_final_mask_may_allow_nothing() -> None:
    """After the last step there may be nothing left to do."""
    agent, delivery = masked_agent()
    with agent:
        ids = agent.get_actor_ids()
        agent.request_action(ids, np.zeros((2, 3), np.float32))
        agent.end_episode(
            ids,
            1.0,
            truncated=True,
            final_observation=np.ones((2, 3), np.float32),
            final_action_mask=np.zeros((2, 3), np.bool_),
        )
    final = delivery.segments[0].final_observation
    assert final is not None
    assert not final.action_mask["action"].any()


# -- failures in between -----------------------------------------------------------------------------------


class Failing:
    """An inference that fails while `broken` is set, and else asks the real one."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.broken = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def act(self, *args: Any, **kwargs: Any) -> Decision:
        """Fails, or asks the real one."""
        if self.broken:
            raise InferenceError("the policy is broken")
        decision: Decision = self.real.act(*args, **kwargs)
        return decision


def break_inference(agent: Agent) -> Failing:
    failing = Failing(agent.runtime.coordinator.inference)
    agent.runtime.coordinator.inference = failing
    return failing


def test_after_a_failed_inference_the_reward_stands_and_the_retry_passes_none(pair: Pair) -> None:
    """The actor is pending: another reward is an error, None goes on (contracts A8)."""
    agent, delivery = pair
    actor = agent.get_actor_ids()[0]
    failing = break_inference(agent)
    agent.request_action(actor, seen(1)[0])
    failing.broken = True
    with pytest.raises(InferenceError, match="broken"):
        agent.request_action(actor, seen(2)[0], reward=5.0)
    failing.broken = False
    with pytest.raises(InvalidReward, match="reward=None"):
        agent.request_action(actor, seen(2)[0], reward=5.0)
    agent.request_action(actor, seen(2)[0])
    agent.end_episode(actor, 6.0, terminated=True)
    assert delivery.segments[0].columns.reward.tolist() == [5, 6]


def test_a_segment_that_closed_before_the_failure_stands(pair: Pair) -> None:
    """The closed segment was submitted; the retry opens the next one."""
    agent, delivery = pair
    actor = agent.get_actor_ids()[0]
    failing = break_inference(agent)
    for step in range(4):
        agent.request_action(actor, seen(step)[0], reward=1.0 if step else None)
    failing.broken = True
    with pytest.raises(InferenceError):
        agent.request_action(actor, seen(4)[0], reward=9.0)
    assert delivery.segments[0].columns.reward.tolist() == [1, 1, 1, 9]
    failing.broken = False
    agent.request_action(actor, seen(4)[0])
    agent.end_episode(actor, 2.0, terminated=True)
    assert delivery.segments[1].columns.observation["observation"][:, 0].tolist() == [4]


def test_a_failed_first_call_leaves_an_episode_without_steps(pair: Pair) -> None:
    """It can be retried or ended; an episode without steps leaves no segment."""
    agent, delivery = pair
    actor = agent.get_actor_ids()[0]
    failing = break_inference(agent)
    failing.broken = True
    with pytest.raises(InferenceError):
        agent.request_action(actor, seen(1)[0])
    agent.end_episode(actor, terminated=True)
    failing.broken = False
    agent.request_action(actor, seen(2)[0])
    agent.end_episode(actor, 1.0, terminated=True)
    assert [segment.metadata.episode_index for segment in delivery.segments] == [0]


def test_two_calls_for_one_actor_at_once_are_refused(pair: Pair) -> None:
    """While a call is at work on an actor, another is an error, and so is its removal."""
    agent, _ = pair
    actor = agent.get_actor_ids()[0]
    entered, leave = threading.Event(), threading.Event()

    class Slow(Failing):
        def act(self, *args: Any, **kwargs: Any) -> Decision:
            entered.set()
            leave.wait(5)
            return super().act(*args, **kwargs)

    agent.runtime.coordinator.inference = Slow(agent.runtime.coordinator.inference)
    thread = threading.Thread(target=agent.request_action, args=(actor, seen(1)[0]))
    thread.start()
    assert entered.wait(5)
    with pytest.raises(EpisodeError, match="another call"):
        agent.request_action(actor, seen(1)[0])
    with pytest.raises(EpisodeError, match="another call"):
        agent.end_episode(actor, 1.0, terminated=True)
    with pytest.raises(EpisodeError, match="at work"):
        agent.remove_actor(actor)
    leave.set()
    thread.join()
    agent.end_episode(actor, 1.0, terminated=True)


def test_full_storage_is_a_typed_error_that_can_be_waited_out() -> None:
    """Beyond the byte limit the call fails before it acts; ending episodes makes room again."""
    agent, delivery = offline_agent(CARTPOLE, actor_count=3)
    limits = agent.plan.limits
    small = type(limits)(max_open_segment_bytes=40_000)
    object.__setattr__(agent.plan, "limits", small)
    with agent:
        ids = agent.get_actor_ids()
        agent.request_action(ids[:2], seen(1, 2))
        with pytest.raises(Overloaded, match="max_open_segment_bytes"):
            agent.request_action(ids[2], seen(3)[0])
        agent.end_episode(ids[0], 1.0, terminated=True)
        agent.request_action(ids[2], seen(3)[0])
        assert agent.runtime.recorder.storage.statistics().refused_total == 1
    assert len(delivery.segments) == 1


class FullAtTimes:
    """Stands in front of a delivery: has no room while `full`, and notes how long callers would wait."""

    def __init__(self, delivery: CheckingDelivery) -> None:
        self.take = delivery.submit
        self.full = False
        self.waits: list[float] = []
        delivery.submit = self.submit  # type: ignore[method-assign]

    def submit(self, segment: ClosedSegment, timeout_seconds: float | None = None) -> None:
        """Take a segment, or have no room."""
        if self.full:
            assert timeout_seconds is not None, "nothing may wait without a deadline"
            self.waits.append(timeout_seconds)
            raise Overloaded("the spool is full")
        self.take(segment, timeout_seconds)


def test_a_segment_without_room_is_kept_and_goes_first_at_the_next_call(pair: Pair) -> None:
    """The end has happened; calls that act fail until delivery takes it, and their retry passes None."""
    agent, delivery = pair
    actor = agent.get_actor_ids()[0]
    door = FullAtTimes(delivery)
    agent.request_action(actor, seen(1)[0])
    door.full = True
    agent.end_episode(actor, 7.0, terminated=True)
    for _ in range(2):
        with pytest.raises(Overloaded):
            agent.request_action(actor, seen(2)[0], timeout_seconds=0.5)
        assert agent.runtime.coordinator.refused_segments == 1
    assert 0 < door.waits[-1] <= 0.5
    door.full = False
    agent.request_action(actor, seen(3)[0])
    agent.end_episode(actor, 8.0, terminated=True)
    assert [segment.columns.reward.tolist() for segment in delivery.segments] == [[7], [8]]
    assert delivery.segments[1].columns.observation["observation"][:, 0].tolist() == [3]


def test_a_cut_without_room_leaves_the_actor_pending(pair: Pair) -> None:
    """request_action raises at its deadline; the reward stands and the closed segment is kept."""
    agent, delivery = pair
    actor = agent.get_actor_ids()[0]
    door = FullAtTimes(delivery)
    for step in range(4):
        agent.request_action(actor, seen(step)[0], reward=1.0 if step else None)
    door.full = True
    with pytest.raises(Overloaded):
        agent.request_action(actor, seen(4)[0], reward=9.0, timeout_seconds=0.5)
    door.full = False
    agent.request_action(actor, seen(4)[0])
    assert delivery.segments[0].columns.reward.tolist() == [1, 1, 1, 9]


def test_flush_hands_over_what_was_kept(pair: Pair) -> None:
    """Flush speaks of all closed segments, those without room included."""
    agent, delivery = pair
    actor = agent.get_actor_ids()[0]
    door = FullAtTimes(delivery)
    agent.request_action(actor, seen(1)[0])
    door.full = True
    agent.end_episode(actor, 7.0, terminated=True)
    with pytest.raises(Overloaded):
        agent.flush(0.0)
    door.full = False
    agent.flush(1.0)
    assert delivery.segments[0].columns.reward.tolist() == [7]


def test_shutdown_waits_for_room_no_longer_than_it_has(caplog: pytest.LogCaptureFixture) -> None:
    """What finds no room is lost, logged by its id and counted; flush and all the rest run still."""
    agent, delivery = offline_agent(CARTPOLE, actor_count=2)
    agent.start()
    ids, runtime = agent.get_actor_ids(), agent.runtime
    flushed: list[float] = []
    delivery.flush = flushed.append  # type: ignore[method-assign,assignment]
    FullAtTimes(delivery).full = True
    agent.request_action(ids, seen(1, 2))
    agent.request_action(ids, seen(1, 2), reward=1.0)
    with pytest.raises(SpoolError, match="2 closed segments had no room"):
        agent.shutdown(0.05)
    assert runtime.coordinator.counters.lost_segments_total == 2
    assert [record.message.split()[0] for record in caplog.records] == ["trajectory", "trajectory"]
    assert len(flushed) == 1
    assert not agent.is_running


def test_shutdown_hands_over_what_was_kept() -> None:
    """Room that comes in time is used, also where delivery refuses rather than blocks."""
    agent, delivery = offline_agent(CARTPOLE, actor_count=1)
    agent.start()
    actor, door = agent.get_actor_ids()[0], FullAtTimes(delivery)
    door.full = True
    agent.request_action(actor, seen(1)[0])
    agent.end_episode(actor, 7.0, terminated=True)
    timer = threading.Timer(0.05, setattr, (door, "full", False))
    timer.start()
    agent.shutdown(5.0)
    assert delivery.segments[0].columns.reward.tolist() == [7]


def test_shutdown_leaves_all_episodes_but_those_of_calls_at_work() -> None:
    """A busy actor's error comes last: the others' segments, flush and release are done before."""
    agent, delivery = offline_agent(CARTPOLE, actor_count=3)
    flushed: list[float] = []
    released: list[float] = []
    delivery.flush = flushed.append  # type: ignore[method-assign,assignment]
    delivery.close = released.append  # type: ignore[method-assign,assignment]
    agent.start()
    ids = agent.get_actor_ids()
    agent.request_action(ids, seen(1, 2, 3))
    agent.request_action(ids, seen(1, 2, 3), reward=1.0)
    agent.runtime.recorder.begin(agent.select(ids[0]), {"observation": seen(4)}, Rewards(1.0))
    with pytest.raises(EpisodeError, match=f"{ids[0]}: a call is at work"):
        agent.shutdown(0.02)
    assert [len(delivery.of(actor)) for actor in ids] == [0, 1, 1]
    assert len(flushed) == len(released) == 1


# -- actors ------------------------------------------------------------------------------------------------


def test_actors_can_be_made_renamed_and_removed(pair: Pair) -> None:
    """Ids are UUIDs, unique, and mean the same actor after a rename."""
    agent, delivery = pair
    mine = "0b0f8a52-4b6e-4c0f-9d3c-6a1e4a1f0001"
    renamed = "0b0f8a52-4b6e-4c0f-9d3c-6a1e4a1f0002"
    assert agent.new_actor(mine) == mine
    with pytest.raises(ContractError, match="taken"):
        agent.new_actor(mine)
    with pytest.raises(ContractError, match="not a UUID"):
        agent.new_actor("Bob")
    agent.set_actor_id(mine, renamed)
    assert agent.get_actor_ids()[-1] == renamed
    with pytest.raises(UnknownActor):
        agent.request_action(mine, seen(1)[0])
    agent.request_action(renamed, seen(1)[0])
    with pytest.raises(EpisodeError, match="after end_episode"):
        agent.set_actor_id(renamed, mine)
    agent.end_episode(renamed, 1.0, terminated=True)
    assert delivery.segments[0].metadata.actor_id == renamed
    agent.remove_actors([renamed])
    assert renamed not in agent.get_actor_ids()


def test_an_actor_index_is_never_used_again(pair: Pair) -> None:
    """Noise is keyed by it: a new actor must not repeat a removed one's."""
    agent, delivery = pair
    agent.remove_actors(agent.get_actor_ids())
    fresh = agent.new_actors(2)
    agent.request_action(fresh, seen(1, 2))
    agent.end_episode(fresh, 0.0, terminated=True)
    assert [segment.metadata.actor_index for segment in delivery.segments] == [2, 3]


class Announced:
    """A session that notes what it is told."""

    def __init__(self) -> None:
        self.changes: list[tuple[int, list[str]]] = []
        self.learner_update = 0

    def change_actors(self, added: Any = (), removed: Any = ()) -> bool:
        """Note how many came and who went."""
        self.changes.append((len(added), list(removed)))
        return True


def test_the_server_is_told_once_of_many_actors(pair: Pair) -> None:
    """With the server away each telling takes seconds: one for all."""
    agent, _ = pair
    session = Announced()
    agent.runtime.session = session  # type: ignore[assignment]
    try:
        ids = agent.new_actors(64)
        agent.remove_actors(ids)
    finally:
        agent.runtime.session = None
    assert session.changes == [(64, []), (0, ids)]


def test_a_removal_that_fails_removes_nobody(pair: Pair) -> None:
    """One unknown id, and all actors go on; one that is named twice is removed once."""
    agent, delivery = pair
    ids = agent.get_actor_ids()
    agent.request_action(ids, seen(1, 2))
    with pytest.raises(UnknownActor):
        agent.remove_actors([*ids, "nobody"])
    agent.request_action(ids, seen(1, 2), reward=1.0)
    agent.remove_actors([ids[0], ids[0]])
    assert agent.get_actor_ids() == ids[1:]
    assert [segment.steps for segment in delivery.segments] == [1]


def test_no_new_actors_is_refused(pair: Pair) -> None:
    """new_actors(0) is a mistake of the caller's."""
    with pytest.raises(ConfigError, match="at least 1"):
        pair[0].new_actors(0)


def test_an_environment_of_several_actors_ticks_once_a_call() -> None:
    """Actors of one instance share its ticks; a handle that does not fit is refused."""
    agent, delivery = offline_agent(CARTPOLE, actor_count=3)
    with agent:
        ids = agent.get_actor_ids()
        handle = agent.new_environment(ids[:2])
        agent.request_action(ids[:2], seen(1, 2), environment=handle)
        agent.skip_tick(handle)
        agent.request_action(ids[:2], seen(1, 2), reward=1.0)
        with pytest.raises(EpisodeError, match="new_environment"):
            agent.request_action(ids[2], seen(1)[0], environment=handle)
        with pytest.raises(EpisodeError, match="in an episode"):
            agent.new_environment(ids)
        agent.end_episode(ids[:2], 1.0, terminated=True)
    assert delivery.segments[0].columns.environment_step.tolist() == [0, 2]
    assert {s.metadata.environment_instance_id for s in delivery.segments} == {handle.environment_id}


def test_unrecorded_actors_need_no_rewards_and_leave_nothing() -> None:
    """record=False acts only; it may not be mixed with recorded actors in one call."""
    agent, delivery = offline_agent(CARTPOLE, actor_count=1)
    with agent:
        silent = agent.new_actor(record=False)
        for _ in range(3):
            agent.request_action(silent, seen(1)[0])
        with pytest.raises(EpisodeError, match="apart"):
            agent.request_action([*agent.get_actor_ids()], seen(1, 2))
        agent.end_episode(silent, terminated=True)
    assert delivery.segments == []


def test_with_data_disabled_nothing_is_recorded() -> None:
    """The data mode `disabled` needs no rewards and keeps no steps."""
    agent, delivery = offline_agent(CARTPOLE, actor_count=2, actor_training_data_mode="disabled")
    with agent:
        ids = agent.get_actor_ids()
        for _ in range(3):
            agent.request_action(ids, seen(1, 2))
        agent.end_episode(ids, terminated=True)
        assert agent.runtime.recorder.storage.statistics().pages_used == 0
    assert delivery.segments == []


# -- life --------------------------------------------------------------------------------------------------


def test_an_agent_that_does_not_run_says_so() -> None:
    """Before start and after shutdown every call is a typed error."""
    agent, _ = offline_agent(CARTPOLE)
    with pytest.raises(EpisodeError, match="start"):
        agent.request_action("x", seen(1))
    with agent, pytest.raises(EpisodeError, match="runs already"):
        agent.start()
    with pytest.raises(EpisodeError, match="start"):
        agent.get_actor_ids()


def test_a_restart_has_new_actors_and_acts() -> None:
    """A restart is a shutdown and a start."""
    agent, _ = offline_agent(CARTPOLE, actor_count=1)
    with agent:
        before = agent.get_actor_ids()
        agent.restart()
        after = agent.get_actor_ids()
        agent.request_action(after, seen(1))
    assert before != after
