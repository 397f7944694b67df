"""`Agent`: what an application drives to act in its environment and record what happens.

with AgentBuilder(actor_count=1, observation_space=env.observation_space, ...).build() as agent:
    actor = agent.get_actor_ids()[0]
    observation, _ = env.reset()
    result = agent.request_action(actor, observation)
    observation, reward, terminated, truncated, _ = env.step(result.action)
    ...
    result = agent.request_action(actor, observation, reward=reward)   # the reward of the action before
    agent.end_episode(actor, reward, terminated=True)  # or truncated=True, final_observation=observation
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from relayrl_client.actors import ActorDetails, ActorTable, EnvironmentHandle, Selection
from relayrl_client.coordinator import ActionResult, Flag
from relayrl_client.runtime import OpenDelivery, Plan, Runtime, Standing, announce, is_announced, open_runtime
from relayrl_shared.errors import ConfigError, EpisodeError, PeerTimeout, UnknownActor
from relayrl_shared.policy.manifest import PolicyArtefact
from relayrl_shared.trajectory import Purpose, RecordSchema, Trajectory


class Agent:
    """A client runtime. Thread-safe; one actor takes one call at a time. Made by `AgentBuilder`.

    Args:
        plan: what it is to be.
        open_delivery: makes what takes closed segments, once the run is known.
        offline_standing: the rules to play by where there is no server.
    """

    def __init__(
        self,
        plan: Plan,
        open_delivery: OpenDelivery,
        offline_standing: Callable[[Plan], Standing] = Standing.offline,
    ) -> None:
        self.plan = plan
        self._offline_standing = offline_standing
        self._open_delivery = open_delivery
        self._runtime: Runtime | None = None

    # -- life ------------------------------------------------------------------------------------------

    def start(self) -> Self:
        """Join the run, load the first policy version and make `actor_count` actors. Returns itself.

        Raises:
            EpisodeError: it runs already.
            PeerTimeout: a server, or the first policy version, did not come within `start_seconds`.
            RunMismatch: the run exists with other specs or settings.
        """
        if self._runtime is not None:
            raise EpisodeError("the agent runs already: shutdown first, or restart")
        table = ActorTable()
        for _ in range(self.plan.actor_count):
            environment = table.new_environment(0, 0)
            table.add(self._details(str(uuid.uuid4()), environment))
        self._runtime = open_runtime(self.plan, table, self._open_delivery, self._offline_standing)
        return self

    def restart(self) -> Self:
        """`shutdown` and `start`; actors get new ids."""
        self.shutdown()
        return self.start()

    def shutdown(self, timeout_seconds: float | None = None) -> None:
        """Leave all episodes (contracts A5), flush, say goodbye and release everything. Safe to call twice.

        The step of each open episode whose reward is unknown is dropped and counted.

        Raises:
            SpoolError, PeerTimeout: what was closed could not be accepted in time; all is released still.
            EpisodeError: a call was still at work on an actor, whose open segment is lost; likewise.
        """
        runtime, self._runtime = self._runtime, None
        if runtime is None:
            return
        seconds = self.plan.timeouts.shutdown_seconds if timeout_seconds is None else timeout_seconds
        deadline = time.monotonic() + seconds
        runtime.stopping.set()
        with runtime.closing:
            # Callbacks run from the last to the first, each whatever the others raise.
            runtime.closing.callback(_leave, runtime, deadline)
            runtime.closing.callback(lambda: runtime.delivery.flush(max(deadline - time.monotonic(), 0.1)))
            runtime.closing.callback(runtime.coordinator.finish, deadline)
            runtime.closing.callback(_drop_all, runtime, deadline)

    def __enter__(self) -> Self:
        return self if self._runtime is not None else self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    @property
    def runtime(self) -> Runtime:
        """The running parts, for metrics, the control plane and tests.

        Raises:
            EpisodeError: the agent does not run.
        """
        runtime = self._runtime
        if runtime is None:
            raise EpisodeError("the agent does not run: call start() first, or use it in a with statement")
        return runtime

    @property
    def is_running(self) -> bool:
        """Whether it was started and not shut down."""
        return self._runtime is not None

    @property
    def schema(self) -> RecordSchema:
        """What is recorded: specs, masks, aux columns."""
        return self.plan.schema

    # -- acting ----------------------------------------------------------------------------------------

    def select(self, actor_ids: str | Sequence[str]) -> Selection:
        """These actors, resolved: pass it in place of the ids, and parts of it by `Selection.where`.

        It is good until actors are removed, renamed or moved.

        Raises:
            UnknownActor, EpisodeError: there is no such actor, or one is named twice.
        """
        return self.runtime.table.select(actor_ids)

    def request_action(
        self,
        actor_ids: str | Sequence[str] | Selection,
        observation: Any,
        action_mask: Any = None,
        reward: Any = None,
        *,
        environment: EnvironmentHandle | None = None,
        greedy: bool = False,
        timeout_seconds: float | None = None,
        aux: Mapping[str, Any] | None = None,
    ) -> ActionResult:
        """Choose the next actions of any number of actors, and record the steps. B = actors.

        Args:
            actor_ids: B ids; a single id (no list) takes and gives values without the actor axis.
            observation: in the structure of the observation space, stacked by actor [B, …]; or one for all.
            action_mask: bool [B, sum nvec], True = allowed; a mapping where several leaves are masked. None
                allows everything.
            reward: received since each actor's previous action, which it is recorded with: one number, or B.
                None or 0 on the first call of an episode; None in the retry of a call that failed.
            environment: the instance that all of them are in, checked where given.
            greedy: take the most likely action.
            timeout_seconds: of admission and inference; default `timeouts.request_seconds`.
            aux: the values of the schema's auxiliary columns, by name.

        Raises:
            ContractError, UnknownActor: a bad argument, named by its class and message (SpecMismatch,
                InvalidObservation, InvalidActionMask, InvalidReward, EpisodeError); nothing was recorded.
            PacingTimeout, InferenceError, TransportError, Overloaded: no action came; the rewards stand, and
                the retry passes reward=None.
        """
        return self.runtime.coordinator.request_action(
            actor_ids,
            observation,
            action_mask,
            reward,
            environment=environment,
            greedy=greedy,
            timeout_seconds=timeout_seconds,
            aux=aux,
        )

    def end_episode(
        self,
        actor_ids: str | Sequence[str] | Selection,
        reward: Any = None,
        *,
        terminated: Flag = False,
        truncated: Flag = False,
        final_observation: Any = None,
        final_action_mask: Any = None,
    ) -> None:
        """End the episodes of actors with their last rewards. B = actors.

        Args:
            actor_ids: B ids, or a single one.
            reward: of the last actions: one number, or B.
            terminated: one bool, or B. Both flags count as terminated.
            truncated: likewise; needs final_observation.
            final_observation: what was seen after the last actions, as in `request_action`.
            final_action_mask: the masks that came with it.

        Raises:
            EpisodeError: neither flag, not in an episode, or truncated without final_observation.
            ContractError, UnknownActor: another bad argument, named; nothing was recorded.
            SpoolError: delivery is closed.

        A segment that delivery has no room for within `timeouts.request_seconds` is kept, and goes first at
        the next call; until then `request_action` raises Overloaded.
        """
        self.runtime.coordinator.end_episode(
            actor_ids,
            reward,
            terminated=terminated,
            truncated=truncated,
            final_observation=final_observation,
            final_action_mask=final_action_mask,
        )

    def flag_last_action(self, actor_ids: str | Sequence[str], reward: Any = 0.0) -> None:
        """End the episodes as terminated: `end_episode(actor_ids, reward, terminated=True)`."""
        self.end_episode(actor_ids, reward, terminated=True)

    # -- actors ----------------------------------------------------------------------------------------

    def new_actor(
        self,
        actor_id: str | None = None,
        *,
        agent_id: str | None = None,
        purpose: Purpose = "train",
        record: bool = True,
        seed: int | None = None,
    ) -> str:
        """A new actor in an environment instance of its own; returns its id.

        Args:
            actor_id: a UUID; one is made where it is left out.
            agent_id: the environment's name of the agent, where there are several.
            purpose: `evaluate` marks its data so; no learner waits for it.
            record: False: its steps are not kept, and its rewards not needed.
            seed: of its environment, for the record.

        Raises:
            ContractError: the id is taken, or no UUID.
        """
        return self._add([actor_id], agent_id, purpose, record, seed)[0]

    def new_actors(self, count: int, *, purpose: Purpose = "train", record: bool = True) -> list[str]:
        """That many new actors; returns their ids.

        Raises:
            ConfigError: count is below 1.
        """
        if count < 1:
            raise ConfigError(f"new_actors({count}): ask for at least 1")
        return self._add([None] * count, None, purpose, record, None)

    def remove_actor(self, actor_id: str) -> None:
        """Forget an actor; see `remove_actors`."""
        self.remove_actors([actor_id])

    def remove_actors(self, actor_ids: Sequence[str], *, keep_trajectories: bool = False) -> None:
        """Forget actors. Their open segments close without the step whose reward is unknown (contracts A5).

        Args:
            actor_ids: of the actors.
            keep_trajectories: leave what the memory sink holds of them there; else it is let go, so that
                actors that come and go do not fill the memory. Files and the server keep theirs.

        Raises:
            UnknownActor: there is no such actor; none was removed.
            EpisodeError: a call is at work on one of them; none was removed.
        """
        runtime = self.runtime
        removed = runtime.coordinator.remove(actor_ids)
        forget = getattr(runtime.delivery, "forget", None)
        if forget is not None and not keep_trajectories:
            forget([detail.actor_id for detail in removed])
        announced = [detail.actor_id for detail in removed if is_announced(detail)]
        if runtime.session is not None and announced:
            runtime.session.change_actors(removed=announced)

    def set_actor_id(self, current: str, new: str) -> None:
        """Rename an actor between two episodes.

        Raises:
            UnknownActor: there is no actor of the current id.
            ContractError: the new id is taken, or no UUID.
            EpisodeError: it is in an episode, whose segments carry the current id.
        """
        runtime = self.runtime
        with runtime.recorder.lock:
            row = runtime.table.row(current)
            if runtime.table.columns.phase[row]:
                raise EpisodeError(f"actor {current} is in an episode; rename it after end_episode")
            runtime.table.rename(current, new)
            detail = runtime.table.detail(row)
        if runtime.session is not None and is_announced(detail):
            runtime.session.change_actors([announce(row, detail)], [current])

    def get_actor_ids(self) -> list[str]:
        """The ids of all actors, in the order of their making."""
        return self.runtime.table.ids

    def new_environment(self, actor_ids: Sequence[str], reset_ticks: int = 0) -> EnvironmentHandle:
        """An environment instance in which these actors act: one call that covers it is one tick for all.

        It goes on in the middle of a rollout where they were, so that the learner gets that one whole.

        Args:
            actor_ids: actors between two episodes.
            reset_ticks: ticks without a step after each end (1 for NEXT_STEP autoreset).

        Raises:
            UnknownActor, EpisodeError: there is no such actor, or it is in an episode, or they are in
                different places of a rollout.
            ConfigError: reset_ticks is negative.
        """
        runtime = self.runtime
        with runtime.recorder.lock:
            place = runtime.table.next_place(actor_ids, runtime.recorder.limits.rollout_steps)
            handle = runtime.table.new_environment(reset_ticks, *place)
            runtime.table.move(actor_ids, handle)
            rows = [runtime.table.row(actor_id) for actor_id in actor_ids]
            moved = [(row, runtime.table.detail(row)) for row in rows]
        self._announce(moved)
        return handle

    def skip_tick(self, environment: EnvironmentHandle) -> None:
        """Let an environment tick without a call: all of its actors were on their reset tick."""
        self.runtime.recorder.skip_tick(environment.index)

    # -- policy ----------------------------------------------------------------------------------------

    def get_model_version(self, actor_ids: str | Sequence[str] | None = None) -> list[tuple[str, int]]:
        """(id, policy version in use) of actors, all by default; -1 without one.

        Raises:
            UnknownActor: there is no such actor.
        """
        runtime = self.runtime
        ids = [actor_ids] if isinstance(actor_ids, str) else actor_ids
        version = runtime.inference.policy_version
        known = runtime.table.ids if ids is None else ids
        return [(actor_id, version) for actor_id in known if runtime.table.row(actor_id) >= 0]

    def wait_for_version(self, policy_version: int, timeout_seconds: float = 60.0) -> None:
        """Return when a version at least this new is in use.

        Raises:
            PeerTimeout: it did not come in time.
        """
        runtime = self.runtime
        if runtime.slot is not None:
            runtime.slot.wait_for_version(policy_version, timeout_seconds)
        elif runtime.inference.policy_version < policy_version:
            raise PeerTimeout(
                f"the inference server acted with version {runtime.inference.policy_version} so far; "
                "with inference `server` the version is known from its answers: request an action first"
            )

    def update_model(self, artefact: PolicyArtefact) -> None:
        """Act with this version from the next call on. Offline only: online, the run's own policy acts.

        Raises:
            ConfigError: the agent is online, or acts through the inference server.
            ArtefactError: it is corrupt or does not fit; the old version acts on.
        """
        runtime = self.runtime
        if runtime.slot is None or self.plan.is_online:
            raise ConfigError(
                "update_model is for local inference offline; here the registry says which version acts"
            )
        runtime.slot.load(artefact)

    # -- data ------------------------------------------------------------------------------------------

    def flush(self, timeout_seconds: float | None = None) -> None:
        """Return when all closed segments are accepted: fsynced in the spool, or in their sink.

        Raises:
            SpoolError, Overloaded, PeerTimeout: they could not be, or not in time.
        """
        seconds = self.plan.timeouts.flush_seconds if timeout_seconds is None else timeout_seconds
        deadline = time.monotonic() + seconds
        self.runtime.coordinator.submit_kept(deadline)
        self.runtime.delivery.flush(max(deadline - time.monotonic(), 0.0))

    def get_trajectory_memory(self, drain: bool = False) -> dict[str, list[Trajectory]]:
        """What the memory sink holds, by actor id, oldest first.

        Args:
            drain: empty it.

        Raises:
            ConfigError: the data mode has no memory sink.
        """
        memory = getattr(self.runtime.delivery, "memory", None)
        if memory is None:
            raise ConfigError(
                f"data mode {self.plan.actor_training_data_mode} keeps no trajectories in memory: "
                "choose one with `memory`"
            )
        held: dict[str, list[Trajectory]] = memory.drain() if drain else memory.snapshot()
        return held

    # -- help ------------------------------------------------------------------------------------------

    def _add(
        self,
        actor_ids: Sequence[str | None],
        agent_id: str | None,
        purpose: Purpose,
        record: bool,
        seed: int | None,
    ) -> list[str]:
        """New actors, each in an environment of its own; the server is told of all of them at once."""
        runtime = self.runtime
        added = []
        with runtime.recorder.lock:
            first = max(runtime.standing.first_rollout_index, runtime.learner_update)
            for actor_id in actor_ids:
                details = self._details(
                    actor_id or str(uuid.uuid4()),
                    runtime.table.new_environment(0, first),
                    agent_id=agent_id,
                    purpose=purpose,
                    recorded=record and self.plan.is_recorded,
                    seed=seed,
                )
                added.append((runtime.table.add(details), details))
        self._announce(added)
        return [details.actor_id for _, details in added]

    def _details(
        self,
        actor_id: str,
        environment: EnvironmentHandle,
        *,
        agent_id: str | None = None,
        purpose: Purpose = "train",
        recorded: bool | None = None,
        seed: int | None = None,
    ) -> ActorDetails:
        is_recorded = self.plan.is_recorded if recorded is None else recorded
        return ActorDetails(actor_id, environment, agent_id, purpose, is_recorded, seed)

    def _announce(self, actors: Sequence[tuple[int, ActorDetails]]) -> None:
        session = self.runtime.session
        added = [announce(row, detail) for row, detail in actors if is_announced(detail)]
        if session is not None and added:
            session.change_actors(added)


def _drop_all(runtime: Runtime, deadline: float) -> None:
    """Leave all episodes; calls that are at work are given until the deadline to return.

    Raises:
        EpisodeError: one did not; all other actors have left.
    """
    pause = threading.Event()  # nobody sets it
    actor_ids = runtime.table.ids
    while True:
        busy: list[tuple[str, EpisodeError]] = []
        for actor_id in actor_ids:
            try:
                runtime.coordinator.drop_open([actor_id])
            except EpisodeError as exc:
                busy.append((actor_id, exc))
            except UnknownActor:
                continue  # removed meanwhile
        if not busy:
            return
        if time.monotonic() >= deadline:
            raise busy[0][1]
        actor_ids = [actor_id for actor_id, _ in busy]
        pause.wait(0.01)


def _leave(runtime: Runtime, deadline: float) -> None:
    """Let the server take what is accepted, and say goodbye."""
    if runtime.session is not None:
        runtime.delivery.drain(max(deadline - time.monotonic(), 0.0))
        runtime.session.leave(runtime.spool_reports(), max(deadline - time.monotonic(), 0.1))
