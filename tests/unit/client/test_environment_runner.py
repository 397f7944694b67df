"""The environment runner over an environment that counts: each record proves where it came from."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, cast

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from relayrl_client.environment_runner import EnvironmentRunner, EpisodeSummary, evaluate
from relayrl_client.segments import ClosedSegment
from relayrl_client.testing import CountingEnvironment, counting_vector, offline_agent, total_steps
from relayrl_shared.errors import (
    ConfigError,
    InvalidActionMask,
    InvalidObservation,
    PacingTimeout,
    SpoolError,
)

MODES = list(AutoresetMode)


def episode_length(episode: float, number: float, max_length: int = 5) -> int:
    return (int(episode) + int(number)) % max_length + 1


def check_rows(segment: ClosedSegment) -> None:
    """Every row shows the step that it was acted on, and holds the reward of that very action."""
    episode, step, number = segment.columns.observation["observation"].T
    first = segment.metadata.first_step_index
    assert (episode == episode[0]).all()
    assert (number == number[0]).all()
    np.testing.assert_array_equal(step, np.arange(first, first + segment.steps))
    np.testing.assert_array_equal(segment.columns.reward, 1000 * episode + step + 1)
    forbidden = ((episode + step) % 3).astype(int)
    assert not segment.columns.action_mask["action"][np.arange(segment.steps), forbidden].any()
    assert (segment.columns.action["action"] != forbidden).all()


def check_end(segment: ClosedSegment) -> None:
    """The final observation is of the same episode, one step on; the flags are those of the environment."""
    episode, last_step, number = segment.columns.observation["observation"][-1]
    assert segment.final_observation is not None
    final = segment.final_observation.observation["observation"]
    np.testing.assert_array_equal(final, (episode, last_step + 1, number))
    assert not segment.final_observation.action_mask["action"][int(episode + last_step + 1) % 3]
    is_end = last_step + 1 == episode_length(episode, number)
    truncates = int(episode) % 2 == 1
    assert segment.metadata.terminated == (is_end and not truncates)
    assert segment.metadata.truncated == (is_end and truncates)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize(("rollout_steps", "max_segment_steps"), [(None, 1000), (7, 1000), (None, 2), (8, 3)])
def test_rewards_ends_and_final_observations_are_those_of_their_steps(
    mode: AutoresetMode, rollout_steps: int | None, max_segment_steps: int
) -> None:
    """In every autoreset mode each row holds its own reward, each segment its own next observation."""
    env = counting_vector(3, mode)
    agent, delivery = offline_agent(
        env, actor_count=3, masked=True, rollout_steps=rollout_steps, max_segment_steps=max_segment_steps
    )
    with agent:
        statistics = EnvironmentRunner(agent, env).run(steps=60)

    for segment in delivery.segments:
        check_rows(segment)
        check_end(segment)
    dropped = statistics.steps - total_steps(delivery.segments)
    assert 0 <= dropped <= 3  # at most one an actor, at shutdown
    assert max(segment.steps for segment in delivery.segments) <= max_segment_steps


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_every_actor_cuts_its_rollouts_at_the_same_ticks(mode: AutoresetMode) -> None:
    """A rollout is T ticks of the vector; a reset tick leaves a hole, and never shifts the cut."""
    env = counting_vector(3, mode)
    agent, delivery = offline_agent(env, actor_count=3, masked=True, rollout_steps=8)
    with agent:
        runner = EnvironmentRunner(agent, env)
        while runner.statistics.ticks < 33:  # four rollouts, and the call that cuts the last
            runner.run(steps=1)
        ids = agent.get_actor_ids()

    for segment in delivery.segments:
        ticks = segment.columns.environment_step
        rollout = segment.metadata.rollout_index
        assert (ticks // 8 == rollout).all()
    for rollout in range(4):
        for actor in ids:
            mine = [s for s in delivery.of(actor) if s.metadata.rollout_index == rollout]
            announced = [s.metadata.rollout_segments for s in mine]
            assert announced[:-1] == [None] * (len(mine) - 1)
            assert announced[-1] == len(mine)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_only_next_step_leaves_holes(mode: AutoresetMode) -> None:
    """NEXT_STEP has a tick without a step after each end; the other modes have none."""
    env = counting_vector(2, mode)
    agent, delivery = offline_agent(env, actor_count=2, masked=True)
    with agent:
        statistics = EnvironmentRunner(agent, env).run(steps=40)
    holes = 2 * statistics.ticks - statistics.steps

    assert (holes > 0) == (mode is AutoresetMode.NEXT_STEP)
    if mode is AutoresetMode.NEXT_STEP:
        finished = [s for s in delivery.segments if s.metadata.terminated or s.metadata.truncated]
        assert holes in range(len(finished) - 2, len(finished) + 1)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_statistics_count_what_the_environment_paid(mode: AutoresetMode) -> None:
    """Returns, lengths and callbacks agree with the environment's own arithmetic."""
    env = counting_vector(2, mode)
    agent, _ = offline_agent(env, actor_count=2, masked=True)
    summaries: list[EpisodeSummary] = []
    with agent:
        runner = EnvironmentRunner(agent, env)
        statistics = runner.run(episodes=12, on_episode=summaries.append)

    assert statistics.episodes == len(summaries) >= 12
    assert list(statistics.returns) == [summary.episode_return for summary in summaries]
    for environment in (0, 1):
        mine = [summary for summary in summaries if summary.environment == environment]
        for episode, summary in enumerate(mine):
            length = episode_length(episode, environment)
            assert summary.steps == length
            assert summary.episode_return == sum(1000 * episode + step + 1 for step in range(length))
            assert summary.terminated == (episode % 2 == 0)


def test_every_environment_gets_a_seed_of_its_own() -> None:
    """No two environments of a vector are seeded alike, nor with the run's seed itself."""
    env = counting_vector(4, AutoresetMode.SAME_STEP)
    agent, _ = offline_agent(env, actor_count=4, masked=True, seed=5)
    with agent:
        EnvironmentRunner(agent, env).run(steps=4)
    seeds = [environment.seeds[0] for environment in env.envs]  # type: ignore[attr-defined]

    assert None not in seeds
    assert len(set(seeds)) == 4


def test_a_single_environment_runs_without_a_vector() -> None:
    """A plain environment is run as a vector of one that the runner resets itself."""
    env = CountingEnvironment()
    agent, delivery = offline_agent(env, actor_count=1, masked=True)
    with agent:
        EnvironmentRunner(agent, env).run(steps=15)

    assert delivery.segments
    for segment in delivery.segments:
        check_rows(segment)
        check_end(segment)


def test_a_lone_environment_on_its_reset_tick_still_ticks() -> None:
    """With NEXT_STEP and one environment no actor is in the call of a reset tick, and the rollout goes on."""
    env = counting_vector(1, AutoresetMode.NEXT_STEP)
    agent, delivery = offline_agent(env, actor_count=1, masked=True, rollout_steps=6)
    with agent:
        runner = EnvironmentRunner(agent, env)
        while runner.statistics.ticks < 25:
            runner.run(steps=1)

    for segment in delivery.segments:
        check_rows(segment)
        check_end(segment)
        assert (segment.columns.environment_step // 6 == segment.metadata.rollout_index).all()
    assert {s.metadata.rollout_index for s in delivery.segments if s.metadata.rollout_segments} >= {
        0,
        1,
        2,
        3,
    }


def test_running_on_continues_where_it_stood() -> None:
    """Two runs record what one long run records."""

    def record(parts: Sequence[int]) -> list[Any]:
        env = counting_vector(2, AutoresetMode.NEXT_STEP)
        agent, delivery = offline_agent(env, actor_count=2, masked=True, rollout_steps=5)
        with agent:
            runner = EnvironmentRunner(agent, env)
            for steps in parts:
                runner.run(steps=steps)
        return [s.columns.observation["observation"].tolist() for s in delivery.segments]

    assert record([2, 4, 14]) == record([20])


def test_evaluation_is_greedy_apart_and_shared_equally() -> None:
    """Evaluation runs an equal share of episodes an environment, and records nothing."""
    env = counting_vector(2, AutoresetMode.SAME_STEP)
    agent, delivery = offline_agent(env, actor_count=2, masked=True)
    with agent:
        returns = evaluate(agent, counting_vector(3, AutoresetMode.NEXT_STEP), 7)
        actors = agent.get_actor_ids()

    expected = [
        sum(1000 * episode + step + 1 for step in range(episode_length(episode, number)))
        for number, share in enumerate((3, 2, 2))
        for episode in range(share)
    ]
    assert returns == expected
    assert len(actors) == 2
    assert delivery.segments == []


def test_evaluation_is_stored_on_request_and_marked() -> None:
    """With record=True the data is kept under the purpose `evaluate`, and greedy."""
    env = counting_vector(1, AutoresetMode.SAME_STEP)
    agent, delivery = offline_agent(env, masked=True)
    with agent:
        evaluate(agent, counting_vector(1, AutoresetMode.DISABLED), 3, record=True)

    assert {segment.metadata.purpose for segment in delivery.segments} == {"evaluate"}
    assert all(segment.columns.greedy.all() for segment in delivery.segments)


def test_another_environment_than_the_agents_is_refused() -> None:
    """An environment whose spaces differ from the agent's is a typed error at once."""
    agent, _ = offline_agent(CountingEnvironment())
    with agent, pytest.raises(ConfigError, match="observation space"):
        EnvironmentRunner(agent, gymnasium.make_vec("CartPole-v1", num_envs=1))


def test_a_number_of_actors_that_does_not_fit_is_refused() -> None:
    """There must be one actor an environment."""
    env = counting_vector(3, AutoresetMode.SAME_STEP)
    agent, _ = offline_agent(env, actor_count=2)
    with agent, pytest.raises(ConfigError, match="3 environments in the vector and 2 actors"):
        EnvironmentRunner(agent, env)


def test_a_run_without_an_end_is_refused() -> None:
    """`run` needs steps, episodes or a stop event."""
    env = counting_vector(1, AutoresetMode.SAME_STEP)
    agent, _ = offline_agent(env, masked=True)
    with agent, pytest.raises(ConfigError, match="without an end"):
        EnvironmentRunner(agent, env).run()


def test_an_undeclared_autoreset_mode_is_refused() -> None:
    """An environment that does not say how it resets is not guessed at."""
    env = counting_vector(1, AutoresetMode.SAME_STEP)
    env.metadata = {}
    agent, _ = offline_agent(env, masked=True)
    with agent:
        with pytest.raises(ConfigError, match="autoreset"):
            EnvironmentRunner(agent, env)
        EnvironmentRunner(agent, env, autoreset=AutoresetMode.SAME_STEP).run(steps=3)


def test_missing_masks_are_an_error() -> None:
    """An agent that records masks refuses an environment whose info has none."""
    env = gymnasium.make_vec("CartPole-v1", num_envs=1, vectorization_mode="sync")
    agent, delivery = offline_agent(env, masked=True)
    with agent, pytest.raises(InvalidActionMask, match="info has no 'action_mask'"):
        EnvironmentRunner(agent, env).run(steps=1)
    assert delivery.segments == []


def test_masks_come_from_the_observation_where_it_has_them() -> None:
    """A Dict observation with `action_mask` needs nothing in info."""

    class Masking(gymnasium.Env[dict[str, Any], np.int64]):
        observation_space = gymnasium.spaces.Dict(
            {
                "seen": gymnasium.spaces.Box(0, 9, (1,), np.float32),
                "action_mask": gymnasium.spaces.MultiBinary(3),
            }
        )
        action_space = gymnasium.spaces.Discrete(3)

        def show(self) -> dict[str, Any]:
            return {"seen": np.zeros(1, np.float32), "action_mask": np.array([0, 1, 0], np.int8)}

        def reset(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
            return self.show(), {}

        def step(self, action: np.int64) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
            assert action == 1
            return self.show(), 0.0, False, False, {}

    env = Masking()
    agent, delivery = offline_agent(env, masked=True)
    with agent:
        EnvironmentRunner(agent, env).run(steps=10)
    assert delivery.segments[0].columns.action_mask["action"].tolist() == [[False, True, False]] * 9


class Layered(gymnasium.Env[dict[str, Any], Any]):
    """A nested observation and a tuple of actions, whose mask comes as a tuple of parts."""

    observation_space = gymnasium.spaces.Dict(
        {
            "count": gymnasium.spaces.Box(0, 99, (2,), np.float32),
            "inner": gymnasium.spaces.Tuple((gymnasium.spaces.Discrete(50), gymnasium.spaces.MultiBinary(2))),
        }
    )
    action_space = gymnasium.spaces.MultiDiscrete([2, 3])

    def __init__(self) -> None:
        self.steps = self.episodes = 0

    def show(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What is seen now: action (1, steps % 3) alone is allowed."""
        mask = np.zeros(3, np.int8)
        mask[self.steps % 3] = 1
        seen = {
            "count": np.array([self.episodes, self.steps], np.float32),
            "inner": (np.int64(self.steps), np.array([1, 0], np.int8)),
        }
        return seen, {"action_mask": (np.array([0, 1], np.int8), mask)}

    def reset(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The next episode."""
        self.steps, self.episodes = 0, self.episodes + 1
        return self.show()

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """One step; an episode has as many as its number."""
        assert action.tolist() == [1, self.steps % 3]
        self.steps += 1
        seen, info = self.show()
        return seen, float(self.steps), False, self.steps >= self.episodes, info


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_nested_spaces_run_in_every_mode(mode: AutoresetMode) -> None:
    """Structured observations, their final ones and structured masks keep their rows."""
    env = SyncVectorEnv([Layered, Layered], autoreset_mode=mode)
    agent, delivery = offline_agent(env, actor_count=2, masked=True)
    with agent:
        EnvironmentRunner(agent, env).run(steps=40)
    for segment in delivery.segments:
        steps = segment.columns.observation["observation.count"][:, 1]
        np.testing.assert_array_equal(steps, segment.columns.observation["observation.inner.0"])
        np.testing.assert_array_equal(segment.columns.reward, steps + 1)
        np.testing.assert_array_equal(segment.columns.action["action"][:, 1], steps % 3)
        assert segment.final_observation is not None
        final = segment.final_observation.observation
        assert final["observation.count"][1] == steps[-1] + 1 == final["observation.inner.0"]
        assert final["observation.inner.1"].tolist() == [1, 0]
        assert segment.final_observation.action_mask["action"][2:].argmax() == (steps[-1] + 1) % 3


def test_after_a_pacing_timeout_the_runner_goes_on() -> None:
    """A call that failed in between is taken up by the next run without its rewards, and nothing is lost."""
    env = counting_vector(2, AutoresetMode.SAME_STEP)
    agent, delivery = offline_agent(env, actor_count=2, masked=True)
    with agent:
        runner = EnvironmentRunner(agent, env)
        runner.run(steps=6)
        admission = agent.runtime.coordinator.admission
        admission.every_call = True

        def deny(*_: Any) -> None:
            raise PacingTimeout("not yet")

        admission.admit = deny  # type: ignore[method-assign,assignment]
        for _ in range(2):
            with pytest.raises(PacingTimeout):
                runner.run(steps=6)
        del admission.admit
        runner.run(steps=30)
    for segment in delivery.segments:
        check_rows(segment)
        check_end(segment)
    assert runner.statistics.steps == 36


class Interrupted(Exception):
    """What an application's own code may raise."""


def once(call: Any, error: Exception, *, at: int = 0) -> Any:
    """The call, but that it raises instead the given time."""
    left = [at]

    def guarded(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            raise error
        return call(*args, **kwargs)

    return guarded


def check_all(delivery: Any, runner: EnvironmentRunner, steps: int) -> None:
    """Every step that the environment took is recorded once, with its own reward."""
    for segment in delivery.segments:
        check_rows(segment)
        check_end(segment)
    assert runner.statistics.steps == steps
    assert total_steps(delivery.segments) == steps - delivery_dropped(runner)


def delivery_dropped(runner: EnvironmentRunner) -> int:
    """Steps whose reward was unknown at the end of the agent."""
    return sum(1 for length in runner._lengths if length)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("at", range(4))
def test_after_a_call_that_was_refused_the_rewards_are_passed_again(mode: AutoresetMode, at: int) -> None:
    """An error before anything was written leaves no actor pending."""
    env = counting_vector(2, mode)
    agent, delivery = offline_agent(env, actor_count=2, masked=True)
    with agent:
        runner = EnvironmentRunner(agent, env)
        begin = agent.runtime.recorder.begin
        agent.runtime.recorder.begin = once(begin, InvalidObservation("NaN"), at=at)  # type: ignore[method-assign]
        with pytest.raises(InvalidObservation):
            runner.run(steps=20)
        runner.run(steps=20 - runner.statistics.steps)
    check_all(delivery, runner, 20)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("at", range(4))
def test_after_an_environment_that_raised_the_same_actions_are_taken(mode: AutoresetMode, at: int) -> None:
    """No step gets the reward of the one before."""
    env = counting_vector(2, mode)
    agent, delivery = offline_agent(env, actor_count=2, masked=True)
    with agent:
        runner = EnvironmentRunner(agent, env)
        env.step = once(env.step, Interrupted(), at=at)  # type: ignore[method-assign]
        with pytest.raises(Interrupted):
            runner.run(steps=20)
        runner.run(steps=20 - runner.statistics.steps)
    check_all(delivery, runner, 20)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
@pytest.mark.parametrize("is_recorded", [False, True])
def test_after_an_end_that_raised_it_is_recorded_once(mode: AutoresetMode, is_recorded: bool) -> None:
    """Before it was recorded it is told again; afterwards its rewards are not told to the next episode."""
    env = counting_vector(2, mode)
    agent, delivery = offline_agent(env, actor_count=2, masked=True)
    with agent:
        runner = EnvironmentRunner(agent, env)
        if is_recorded:
            delivery.submit = once(delivery.submit, SpoolError("gone"))  # type: ignore[method-assign]
        else:
            agent.end_episode = once(agent.end_episode, SpoolError("gone"))  # type: ignore[method-assign]
        summaries: list[EpisodeSummary] = []
        with pytest.raises(SpoolError):
            runner.run(steps=30, on_episode=summaries.append)
        runner.run(steps=30 - runner.statistics.steps, on_episode=summaries.append)
    check_all(delivery, runner, 30)
    assert len(summaries) == sum(s.metadata.terminated or s.metadata.truncated for s in delivery.segments)


def test_the_seeds_of_the_environments_are_in_the_record() -> None:
    """Each actor's segments carry what its own environment was reset with."""
    env = counting_vector(2, AutoresetMode.SAME_STEP)
    agent, delivery = offline_agent(env, actor_count=2, masked=True)
    with agent:
        EnvironmentRunner(agent, env, seed=5).run(steps=20)
        ids = agent.get_actor_ids()
    given = [cast("CountingEnvironment", inner).seeds[0] for inner in env.envs]
    assert [delivery.of(actor)[0].metadata.seed for actor in ids] == given
    assert len(set(given)) == 2


def test_a_stop_event_ends_the_run() -> None:
    """`stop` is looked at between two ticks."""
    env = counting_vector(1, AutoresetMode.SAME_STEP)
    agent, _ = offline_agent(env, masked=True)
    stop = threading.Event()
    with agent:
        statistics = EnvironmentRunner(agent, env).run(stop=stop, on_episode=lambda _: stop.set())
    assert statistics.episodes == 1
