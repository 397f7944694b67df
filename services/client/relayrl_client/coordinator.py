"""The hot path: one call of `request_action` or `end_episode` from its arguments to its result.

Driven by `Agent`. The order of things is that of contracts A1: rewards are written and due segments closed
and submitted; then comes the wait for admission; then the action is chosen, and the new steps are written.
The recorder's lock is held around array work only. B = actors of the call.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from relayrl_client.actors import ActorDetails, EnvironmentHandle, Selection
from relayrl_client.inference import Decision, Inference
from relayrl_client.inputs import Arrays, MaskReader, ObservationReader, Rewards, read_aux, read_rewards
from relayrl_client.pacing import Admission
from relayrl_client.recorder import Begun, Recorder
from relayrl_client.segments import ClosedSegment, SegmentSink
from relayrl_client.storage import AUX_PREFIX
from relayrl_shared.errors import EpisodeError, Overloaded, RelayRLError, SpecMismatch, SpoolError
from relayrl_shared.noise import NoiseSource
from relayrl_shared.trajectory import RecordSchema

Flag = bool | Sequence[bool] | NDArray[np.bool_]

_RETRY_SECONDS = 0.05

_log = logging.getLogger(__name__)


class ActionResult(NamedTuple):
    """What `request_action` gives.

    action: in the structure of the action space, stacked in the order of the actor ids; the bare action where
    a single id (no list) was passed. policy_version: int64 [B], -1 where the policy has none. leaves: all
    outputs of the policy by name, [B, …] each.
    """

    action: Any
    policy_version: NDArray[np.int64]
    leaves: Mapping[str, NDArray[Any]]


@dataclass(slots=True)
class CallCounters:
    """Plain counters of calls; lost updates between threads are tolerated, they serve people."""

    requests_total: int = 0
    request_errors_total: int = 0
    ended_episodes_total: int = 0
    lost_segments_total: int = 0  # that delivery had no room for when the client ended


class Coordinator:
    """Carries out calls.

    Args:
        schema: of what is recorded.
        recorder: writes it.
        inference: chooses actions.
        noise: draws what samples them.
        admission: when a call may act.
        sink: takes closed segments.
        allow_nan: let NaN observations pass.
        timeout_seconds: of a call that gives none.
    """

    def __init__(
        self,
        schema: RecordSchema,
        recorder: Recorder,
        inference: Inference,
        noise: NoiseSource,
        admission: Admission,
        sink: SegmentSink,
        *,
        allow_nan: bool = False,
        timeout_seconds: float = 60.0,
    ) -> None:
        self.schema = schema
        self.recorder = recorder
        self.inference = inference
        self.admission = admission
        self.counters = CallCounters()
        self._table = recorder.table
        self._noise = noise
        self._sink = sink
        self._timeout_seconds = timeout_seconds
        self._observations = ObservationReader(schema, allow_nan=allow_nan)
        self._masks = MaskReader(schema)
        first = schema.action.leaves[0]
        self._single_action = first.name if len(schema.action.leaves) == 1 and not first.path else None
        self._kept: deque[ClosedSegment] = deque()  # had no room in delivery so far
        self._handing_over = threading.Lock()
        self._blanks: dict[int, Arrays] = {}
        self._versions: dict[tuple[int, int], NDArray[np.int64]] = {}

    # -- request_action --------------------------------------------------------------------------------

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
        """See `Agent.request_action`."""
        self.counters.requests_total += 1
        deadline = time.monotonic() + (self._timeout_seconds if timeout_seconds is None else timeout_seconds)
        single = isinstance(actor_ids, str)
        selection = self._table.select(actor_ids)
        if environment is not None:
            _check_environment(selection, environment)
        leaves = self._observations.read(observation, selection)
        if action_mask is not None or self._masks.is_masked:
            leaves |= self._masks.read(action_mask, selection)
        extra = read_aux(aux, self.schema, len(selection)) if aux or self.schema.aux else None
        begun = self.recorder.begin(selection, leaves, read_rewards(reward, selection))
        try:
            if begun.turned or self._kept or self.admission.every_call:
                self._settle(selection, begun, deadline)
            decision = self._decide(selection, begun, leaves, greedy, deadline)
            values = self._values(len(selection), leaves, decision, extra)
        except BaseException:
            self.recorder.abandon(selection)
            self.counters.request_errors_total += 1
            raise
        self.recorder.finish(selection, begun, decision.tags, values)
        return self._result(selection, decision, single)

    def _settle(self, selection: Selection, begun: Begun, deadline: float) -> None:
        """Submit what the call closed, then wait for admission (contracts A1)."""
        self._submit(begun.closed, deadline)
        if begun.error is not None:
            raise begun.error
        self.admission.admit(selection, begun.rollout, deadline)

    def _decide(
        self, selection: Selection, begun: Begun, leaves: Arrays, greedy: bool, deadline: float
    ) -> Decision:
        inference, rows = self.inference, len(selection)
        noise = inference.noise
        if greedy:
            drawn = self._noise.zero(noise, rows)
        else:
            drawn = self._noise.draw(noise, selection.rows, begun.episode_index, begun.step_index)
        return inference.act({**leaves, **drawn}, rows, greedy=greedy, deadline=deadline)

    def _values(self, rows: int, leaves: Arrays, decision: Decision, extra: Arrays | None) -> Arrays:
        """What the recorder writes: blanks where the policy has no such output (their flags say so)."""
        blanks = self._blanks.get(rows)
        if blanks is None:
            names = ("reward", "behaviour_log_prob", "value")
            blanks = self._blanks[rows] = {name: np.zeros(rows, np.float32) for name in names}
        values = {**blanks, **leaves, **decision.outputs}
        if extra:
            values.update({AUX_PREFIX + name: column for name, column in extra.items()})
        for leaf, name in self.recorder.storage.layout.policy_action.items():
            if name not in values:
                values[name] = values[leaf].astype(np.float32)
        return values

    def _result(self, selection: Selection, decision: Decision, single: bool) -> ActionResult:
        rows, outputs = len(selection), decision.outputs
        key = (decision.policy_version, rows)
        versions = self._versions.get(key)
        if versions is None:
            if len(self._versions) > 256:
                self._versions.clear()
            versions = self._versions[key] = np.full(rows, decision.policy_version, np.int64)
            versions.flags.writeable = False
        name = self._single_action
        if single:
            action = self.schema.action.unflatten({leaf: array[0] for leaf, array in outputs.items()})
        else:
            action = outputs[name] if name is not None else self.schema.action.unflatten(outputs)
        return ActionResult(action, versions, outputs)

    # -- ends ------------------------------------------------------------------------------------------

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
        """See `Agent.end_episode`."""
        selection = self._table.select(actor_ids)
        ends = _flags(terminated, selection, "terminated"), _flags(truncated, selection, "truncated")
        _check_ends(selection, *ends, has_final=final_observation is not None)
        final = None
        if final_observation is not None:
            final = self._observations.read(final_observation, selection)
            final |= self._masks.read(final_action_mask, selection, check=False)
        rewards: Rewards | None = read_rewards(reward, selection)
        closed = self.recorder.end_episode(selection, rewards, *ends, final)
        self.counters.ended_episodes_total += len(selection)
        self._submit_or_keep(closed, time.monotonic() + self._timeout_seconds)

    def drop_open(self, actor_ids: Sequence[str]) -> None:
        """Close the open segments of actors without their last reward (contracts A5). Does not wait."""
        self._submit_or_keep(self.recorder.drop_open(actor_ids), time.monotonic())

    def remove(self, actor_ids: Sequence[str]) -> list[ActorDetails]:
        """`drop_open`, and forget the actors; returns what was known of them. Does not wait."""
        closed, removed = self.recorder.remove(actor_ids)
        self._submit_or_keep(closed, time.monotonic())
        return removed

    # -- delivery --------------------------------------------------------------------------------------

    def _submit(self, closed: Sequence[ClosedSegment], deadline: float) -> None:
        """Hand segments to delivery, after those that were kept; what it does not take is kept.

        A call of `request_action` fails while something is kept, so that this stays bounded.

        Raises:
            Overloaded: there was no room until the deadline.
        """
        if self._kept:
            self._kept.extend(closed)
            self.submit_kept(deadline)
            return
        for position, segment in enumerate(closed):
            try:
                self._sink.submit(segment, _left(deadline))
            except BaseException:
                self._kept.extend(closed[position:])
                raise

    def _submit_or_keep(self, closed: Sequence[ClosedSegment], deadline: float) -> None:
        """As `_submit`, where the call has done its work: the next call tells whether there is room."""
        with contextlib.suppress(Overloaded):
            self._submit(closed, deadline)

    def submit_kept(self, deadline: float) -> None:
        """Hand over what delivery had no room for.

        Raises:
            Overloaded: there is still no room at the deadline; all is kept still.
        """
        if not self._handing_over.acquire(timeout=_left(deadline)):
            raise Overloaded(f"{len(self._kept)} closed segments wait for room in delivery")
        try:
            while self._kept:
                self._sink.submit(self._kept[0], _left(deadline))
                self._kept.popleft()
        finally:
            self._handing_over.release()

    def finish(self, deadline: float) -> None:
        """Hand over what was kept, before the client ends; nothing is recorded any more.

        Raises:
            SpoolError: delivery did not take all until the deadline; the rest is logged, counted and lost.
        """
        pause = threading.Event()  # nobody sets it
        while True:
            try:
                return self.submit_kept(deadline)
            except RelayRLError as exc:
                if not isinstance(exc, Overloaded) or time.monotonic() >= deadline:
                    raise self._lost(exc) from exc
            pause.wait(min(_RETRY_SECONDS, _left(deadline)))

    def _lost(self, why: RelayRLError) -> SpoolError:
        lost = list(self._kept)
        self.counters.lost_segments_total += len(lost)
        for segment in lost:
            _log.error("trajectory %s is lost, delivery did not take it", segment.metadata.trajectory_id)
        return SpoolError(f"{len(lost)} closed segments had no room in delivery and are lost: {why}")

    @property
    def refused_segments(self) -> int:
        """Closed segments that delivery had no room for so far and that wait for the next call."""
        return len(self._kept)


def _left(deadline: float) -> float:
    """Seconds until a deadline, as locks take them."""
    return min(max(deadline - time.monotonic(), 0.0), threading.TIMEOUT_MAX)


def _check_environment(selection: Selection, environment: EnvironmentHandle) -> None:
    if selection.environment != environment.index:
        raise EpisodeError(
            f"these actors are not all in environment {environment.environment_id}: "
            "make the environment with their ids (new_environment)"
        )


def _flags(value: Flag, selection: Selection, name: str) -> NDArray[np.bool_]:
    """A flag for each actor; bool [B]."""
    array = np.asarray(value)
    if array.dtype != np.bool_ or array.shape not in ((), (len(selection),)):
        raise SpecMismatch(f"{name} is {array.dtype}{list(array.shape)}: pass one bool, or one an actor")
    return np.broadcast_to(array, (len(selection),))


def _check_ends(
    selection: Selection, terminated: NDArray[np.bool_], truncated: NDArray[np.bool_], has_final: bool
) -> None:
    """Every actor ends one way or the other, and a truncated one shows what came after (contracts A4, A9)."""
    for position, actor_id in enumerate(selection.ids):
        if not terminated[position] and not truncated[position]:
            raise EpisodeError(
                f"actor {actor_id}: say how its episode ends: terminated=True or truncated=True"
            )
        if not terminated[position] and not has_final:
            raise EpisodeError(
                f"actor {actor_id}: a truncated episode needs final_observation: learners bootstrap from it"
            )
