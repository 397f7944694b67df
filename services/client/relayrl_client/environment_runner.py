"""Runs Gymnasium environments with an agent: acts, steps, ends episodes, keeps statistics.

runner = EnvironmentRunner(agent, gymnasium.make_vec("CartPole-v1", num_envs=8))
statistics = runner.run(steps=100_000)
returns = evaluate(agent, gymnasium.make_vec("CartPole-v1", num_envs=8), episodes=20)
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from numpy.typing import NDArray

from relayrl_client.actors import PENDING, Selection
from relayrl_client.agent import Agent
from relayrl_client.autoreset import (
    MASK_KEY,
    MaskSource,
    Transition,
    VectorStepper,
    as_vector,
    autoreset_mode,
    rows_of,
)
from relayrl_shared.errors import ConfigError
from relayrl_shared.spaces import ActionSpec, ObservationSpec
from relayrl_shared.trajectory import Purpose

RETURN_WINDOW = 100


@dataclass(frozen=True, slots=True)
class EpisodeSummary:
    """An episode that ended. `environment` is its index in the vector."""

    actor_id: str
    environment: int
    episode_return: float
    steps: int
    terminated: bool


@dataclass(slots=True)
class RunStatistics:
    """What a runner did so far. steps: of all environments, reset ticks not counted. ticks: calls of step."""

    steps: int = 0
    ticks: int = 0
    episodes: int = 0
    seconds: float = 0.0
    returns: deque[float] = field(default_factory=lambda: deque(maxlen=RETURN_WINDOW))
    lengths: deque[int] = field(default_factory=lambda: deque(maxlen=RETURN_WINDOW))

    @property
    def mean_return(self) -> float:
        """Mean return of the last 100 episodes; NaN before the first."""
        return float(np.mean(self.returns)) if self.returns else float("nan")

    @property
    def steps_per_second(self) -> float:
        """Over all the time spent in `run`."""
        return self.steps / self.seconds if self.seconds > 0 else 0.0


class EnvironmentRunner:
    """Drives one vector environment, or a single one, with actors of an agent.

    Args:
        agent: a running agent with the specs of the environment.
        env: of n environments; its spaces must be those of the agent.
        actor_ids: n actors between episodes; by default the agent's own, or n new ones if it has none.
        seed: of the environments, each gets one of its own; by default from the run's seed and the client.
        greedy: take the most likely actions.
        autoreset: the autoreset mode, where the environment does not say it.
        purpose: of new actors.
        record: whether new actors' steps are kept.

    Raises:
        ConfigError: spaces differ, the actors are not n, or the autoreset mode is not known.
    """

    def __init__(
        self,
        agent: Agent,
        env: gymnasium.Env[Any, Any] | VectorEnv[Any, Any, Any],
        *,
        actor_ids: Sequence[str] | None = None,
        seed: int | None = None,
        greedy: bool = False,
        autoreset: AutoresetMode | None = None,
        purpose: Purpose = "train",
        record: bool = True,
    ) -> None:
        self.agent = agent
        self.env = as_vector(env)
        self.statistics = RunStatistics()
        self._greedy = greedy
        _check_spaces(agent, self.env)
        mode = autoreset_mode(self.env) if autoreset is None else autoreset
        self._stepper = VectorStepper(self.env, agent.schema.observation, mode, _mask_source(agent))
        count = self._stepper.count
        self.actor_ids = _actors(agent, count, actor_ids, purpose, record)
        self._environment = agent.new_environment(self.actor_ids, self._stepper.reset_ticks)
        self._all: Selection = agent.select(self.actor_ids)
        self._seeds = _seeds(agent, seed, count)
        self._actions = {
            leaf.name: np.zeros((count, *leaf.shape), leaf.numpy_dtype) for leaf in agent.schema.action.leaves
        }
        self._rewards = np.zeros(count)
        self._returns = np.zeros(count)
        self._lengths = np.zeros(count, np.int64)
        self._started = False
        self._failed = False  # the last request: its rewards may have been written
        self._chosen: Any = None  # actions that the environment has not taken yet
        self._unended: Transition | None = None  # its ends are not recorded yet
        runtime = agent.runtime
        with runtime.recorder.lock:
            each = self._seeds if self._stepper.seeds_each else self._seeds[:1] * count
            runtime.table.set_seeds(self.actor_ids, each)

    def run(
        self,
        *,
        steps: int | None = None,
        episodes: int | None = None,
        on_episode: Callable[[EpisodeSummary], None] | None = None,
        stop: threading.Event | None = None,
    ) -> RunStatistics:
        """Run on until so many more steps or episodes are done, or `stop` is set. May be called again.

        Args:
            steps: environment steps, all environments together; the last tick is finished.
            episodes: episodes that end.
            on_episode: called for each episode that ends.
            stop: checked at every tick.

        Returns:
            The runner's statistics, which it goes on to update.

        Raises:
            ConfigError: no limit was given at all.
            PacingTimeout, RelayRLError: what acting raised; a further `run` goes on where it stood: it steps
                with the actions that were chosen, and records what was not recorded, once.
        """
        if steps is None and episodes is None and stop is None:
            raise ConfigError("run() without an end: pass steps, episodes or stop")
        statistics = self.statistics
        last_step = np.inf if steps is None else statistics.steps + steps
        last_episode = np.inf if episodes is None else statistics.episodes + episodes
        began = time.monotonic()
        try:
            if not self._started:
                self._stepper.reset(self._seeds)
                self._started = True
            while statistics.steps < last_step and statistics.episodes < last_episode:
                if stop is not None and stop.is_set():
                    break
                self._tick(on_episode)
        finally:
            statistics.seconds += time.monotonic() - began
        return statistics

    def close(self) -> None:
        """Remove the actors; open episodes lose the step whose reward is unknown. The environment stays."""
        if self.agent.is_running:
            self.agent.remove_actors(self.actor_ids, keep_trajectories=True)

    def _tick(self, on_episode: Callable[[EpisodeSummary], None] | None) -> None:
        if self._unended is None:
            self._step()
        if self._unended is not None:
            self._end(self._unended, on_episode)

    def _step(self) -> None:
        stepper, statistics = self._stepper, self.statistics
        acting = ~stepper.resetting
        count = int(np.count_nonzero(acting))
        if self._chosen is None:
            self._chosen = self._act_all() if count == stepper.count else self._act_some(acting, count)
        transition = stepper.step(self._chosen)
        self._chosen = None
        statistics.ticks += 1
        statistics.steps += count
        self._rewards = np.where(acting, transition.reward, 0.0)
        self._returns += self._rewards
        self._lengths += acting
        if transition.ended.any():
            self._unended = transition

    def _act_all(self) -> Any:
        observation, mask = self._stepper.observation, self._stepper.mask
        result = self._request(self._all, observation, mask, self._rewards)
        for name, array in self._actions.items():
            array[...] = result.leaves[name]
        return result.action

    def _act_some(self, acting: NDArray[np.bool_], count: int) -> Any:
        """Some environments are on their reset tick: their actors are not in the call."""
        if count == 0:
            self.agent.skip_tick(self._environment)
        else:
            stepper = self._stepper
            observation = {name: array[acting] for name, array in stepper.observation.items()}
            mask = rows_of(stepper.mask, acting)
            result = self._request(self._all.where(acting), observation, mask, self._rewards[acting])
            for name, array in self._actions.items():
                array[acting] = result.leaves[name]
        return self.agent.schema.action.unflatten(self._actions)

    def _request(
        self, selection: Selection, observation: dict[str, NDArray[Any]], mask: Any, rewards: NDArray[Any]
    ) -> Any:
        given: Any = rewards
        if self._failed:
            pending = self.agent.runtime.table.phases(selection) & PENDING
            given = [
                None if is_written else reward for is_written, reward in zip(pending, rewards, strict=True)
            ]
        self._failed = True
        result = self.agent.request_action(selection, observation, mask, given, greedy=self._greedy)
        self._failed = False
        return result

    def _end(self, transition: Transition, on_episode: Callable[[EpisodeSummary], None] | None) -> None:
        ended = transition.ended
        selection = self._all.where(ended)
        if self.agent.runtime.table.phases(selection).any():  # else an end that raised after it was recorded
            self.agent.end_episode(
                selection,
                self._rewards[ended],
                terminated=transition.terminated[ended],
                truncated=transition.truncated[ended],
                final_observation=transition.final_observation,
                final_action_mask=transition.final_mask,
            )
        self._unended = None
        positions = np.flatnonzero(ended).tolist()
        summaries = [
            EpisodeSummary(
                actor_id=self.actor_ids[position],
                environment=position,
                episode_return=float(self._returns[position]),
                steps=int(self._lengths[position]),
                terminated=bool(transition.terminated[position]),
            )
            for position in positions
        ]
        self._rewards[ended] = 0.0
        self._returns[ended] = 0.0
        self._lengths[ended] = 0
        for summary in summaries:
            self.statistics.episodes += 1
            self.statistics.returns.append(summary.episode_return)
            self.statistics.lengths.append(summary.steps)
            if on_episode is not None:
                on_episode(summary)


def evaluate(
    agent: Agent,
    env: gymnasium.Env[Any, Any] | VectorEnv[Any, Any, Any],
    episodes: int,
    *,
    seed: int = 0,
    greedy: bool = True,
    record: bool = False,
    autoreset: AutoresetMode | None = None,
) -> list[float]:
    """Returns of so many episodes, without touching what trains. Each environment runs an equal share.

    Args:
        agent: a running agent.
        env: an environment of its own, not one that trains.
        episodes: how many.
        seed: of the environments.
        greedy: take the most likely actions.
        record: keep the data, marked `evaluate`; no learner waits for it.
        autoreset: the autoreset mode, where the environment does not say it.
    """
    vector = as_vector(env)
    count = int(vector.num_envs)
    ids = agent.new_actors(count, purpose="evaluate", record=record)
    runner = EnvironmentRunner(
        agent, vector, actor_ids=ids, seed=seed, greedy=greedy, autoreset=autoreset, purpose="evaluate"
    )
    share = [episodes // count + (position < episodes % count) for position in range(count)]
    returns: list[list[float]] = [[] for _ in range(count)]
    stop = threading.Event()

    def collect(summary: EpisodeSummary) -> None:
        mine = returns[summary.environment]
        if len(mine) < share[summary.environment]:
            mine.append(summary.episode_return)
        if sum(map(len, returns)) >= episodes:
            stop.set()

    try:
        runner.run(on_episode=collect, stop=stop)
    finally:
        runner.close()
    return [value for mine in returns for value in mine]


def _check_spaces(agent: Agent, env: VectorEnv[Any, Any, Any]) -> None:
    pairs = (
        (
            "observation",
            agent.schema.observation,
            ObservationSpec.from_gymnasium(env.single_observation_space),
        ),
        ("action", agent.schema.action, ActionSpec.from_gymnasium(env.single_action_space)),
    )
    for what, mine, theirs in pairs:
        if mine != theirs:
            raise ConfigError(
                f"the {what} space of the environment is not the agent's: "
                f"{theirs.to_gymnasium()} against {mine.to_gymnasium()}"
            )


def _mask_source(agent: Agent) -> MaskSource | None:
    """Masks come from the observation where it has a leaf of that name, else from `info`."""
    if not agent.schema.masked_leaves:
        return None
    leaves = [leaf.path[0] for leaf in agent.schema.observation.leaves if leaf.path]
    return "observation" if MASK_KEY in leaves else "info"


def _actors(
    agent: Agent, count: int, actor_ids: Sequence[str] | None, purpose: Purpose, record: bool
) -> list[str]:
    ids = agent.get_actor_ids() if actor_ids is None else list(actor_ids)
    if actor_ids is None and not ids:
        ids = agent.new_actors(count, purpose=purpose, record=record)
    if len(ids) != count:
        raise ConfigError(
            f"there are {count} environments in the vector and {len(ids)} actors: pass {count} actor_ids"
        )
    return ids


def _seeds(agent: Agent, seed: int | None, count: int) -> list[int]:
    """A seed for each environment, distinct over the clients of a run."""
    standing = agent.runtime.standing
    entropy = [standing.seed, standing.client_index] if seed is None else [seed]
    return [int(word) for word in np.random.SeedSequence(entropy).generate_state(count)]
