"""Records what actors do: rewards on the right steps, segments cut and closed where the contracts say.

The coordinator drives it in two halves around the inference: `begin` writes the rewards and closes what is
due, `finish` writes the new steps; `abandon` stands in for `finish` where the call failed in between
(contracts A). Each half holds the lock; nothing waits inside. B = actors of a call, E = their environments.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from relayrl_client.actors import (
    ACTING,
    ACTING_BUSY,
    BUSY,
    EACH_STEP,
    EPISODE,
    NEVER,
    NOT_BUSY,
    PENDING,
    ROOM,
    SLOT,
    STEP,
    STEP_INDEX,
    TURN,
    ActorDetails,
    ActorTable,
    Selection,
)
from relayrl_client.call_rules import check_begin, check_end
from relayrl_client.closing import Closing, RecordIdentity, close_segments, release
from relayrl_client.inputs import Rewards
from relayrl_client.segments import ClosedSegment
from relayrl_client.storage import StepStorage, StepTags
from relayrl_shared.errors import EpisodeError, RelayRLError
from relayrl_shared.identifiers import uuid7
from relayrl_shared.trajectory import FinalObservation

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class RecordLimits:
    """Where segments end. rollout_steps: ticks of a rollout (contracts F1); None: whole-episode batches."""

    max_segment_steps: int
    rollout_steps: int | None = None


@dataclass(slots=True)
class RecorderCounters:
    """Plain counters, written under the recorder's lock and read by whoever reports them."""

    steps_total: int = 0
    segments_total: int = 0
    episodes_total: int = 0
    dropped_steps_total: int = 0
    abandoned_calls_total: int = 0


class Begun(NamedTuple):
    """What a call has after its first half.

    step_index, episode_index: int64 [B], the counters of the noise. closed: segments to submit now. rollout:
    the rollout that begins with this call and has to be admitted. error: why it cannot go on. turned: whether
    the call took the long way.
    """

    step_index: NDArray[np.int64]
    episode_index: NDArray[np.int64]
    closed: Sequence[ClosedSegment] = ()
    rollout: int | None = None
    error: RelayRLError | None = None
    turned: bool = False


class Recorder:
    """The open segments of all actors of a client in one run.

    Args:
        table: the actors.
        storage: where their steps are.
        identity: goes into every segment.
        limits: where segments end.
        clock: Unix seconds, for people only.
    """

    def __init__(
        self,
        table: ActorTable,
        storage: StepStorage,
        identity: RecordIdentity,
        limits: RecordLimits,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.lock = threading.Lock()
        self.table = table
        self.storage = storage
        self.identity = identity
        self.limits = limits
        self.counters = RecorderCounters()
        self._clock = clock

    # -- the first half of a call ----------------------------------------------------------------------

    def begin(self, selection: Selection, leaves: Arrays, rewards: Rewards | None) -> Begun:
        """Write the rewards to the previous steps, close what is full or cut, make room, mark as busy.

        Args:
            selection: the actors.
            leaves: their checked observation and mask leaves [B, …], the final observation of what closes.
            rewards: of their previous steps.

        Raises:
            UnknownActor: one of them was removed.
            EpisodeError: another call is at work on one of them.
            InvalidReward: a reward is missing, or given where there is no step for it.
        """
        with self.lock:
            if selection.row is not None and rewards is not None:
                begun = self._begin_one(selection, selection.row, rewards)
                if begun is not None:
                    return begun
            columns, index = self.table.columns, selection.index
            phases = columns.phase[index]
            in_stride = phases.tobytes() == selection.acting and not self._is_turn(selection)
            if in_stride and selection.recorded:
                in_stride = rewards is not None and rewards.given is None
            if not in_stride:
                for row in selection.rows[phases == 0].tolist():
                    self.table.detail(row)  # raises for one that was removed since it was selected
                check_begin(selection, phases, columns.progress[index, STEP_INDEX], rewards)
                return self._turn(selection, phases.copy(), leaves, rewards)
            progress = columns.progress[index]
            if selection.recorded and rewards is not None:
                self.storage.set_rewards(progress[:, SLOT], rewards.values)
            columns.phase[index] = ACTING_BUSY
            return Begun(progress[:, STEP_INDEX], columns.episode_index[index])

    def _begin_one(self, selection: Selection, row: int, rewards: Rewards) -> Begun | None:
        """The short way of one recorded actor in the middle of a segment; None: it has to take the other.

        Arrays of one would cost it more than the inference of a small policy.
        """
        columns, environments, one = self.table.columns, self.table.environments, selection.environment
        if columns.phase_of[row] != ACTING or rewards.given is not None or one is None:
            return None
        if selection.paced and environments.tick_of[one] >= environments.turn_at_of[one]:
            return None
        self.storage.set_reward(columns.progress_of[3 * row + SLOT], rewards.values)
        columns.phase_of[row] = ACTING_BUSY
        return Begun(*columns.counters_of(row))

    def _is_turn(self, selection: Selection) -> bool:
        """Whether an environment of these actors begins a rollout with this call."""
        if not selection.paced:
            return False
        environments, one = self.table.environments, selection.environment
        if one is not None:
            return environments.tick.item(one) >= environments.turn_at.item(one)
        many = selection.environments
        return bool((environments.tick[many] >= environments.turn_at[many]).any())

    def _turn(
        self, selection: Selection, phases: NDArray[np.uint8], leaves: Arrays, rewards: Rewards | None
    ) -> Begun:
        """The long way: some actor begins an episode, a segment or a page, or its rollout is over."""
        columns, rows = self.table.columns, selection.rows
        if selection.recorded:
            self._write_rewards(rows, phases, rewards)
        rollout = self._turn_rollouts(selection)
        closing = []
        for position in np.flatnonzero(phases != ACTING) if rollout is None else range(len(rows)):
            row = int(rows[position])
            due = self._due(row, self.table.detail(row), leaves, int(position))
            if due is not None:
                closing.append(due)
        closed = self._close(closing)
        error = self._make_room(selection, phases)
        columns.phase[selection.index] = ACTING_BUSY if selection.recorded else EPISODE | BUSY
        return Begun(
            step_index=columns.progress[rows, STEP_INDEX],
            episode_index=columns.episode_index[rows],
            closed=closed,
            rollout=rollout,
            error=error,
            turned=True,
        )

    def _write_rewards(
        self, rows: NDArray[np.int64], phases: NDArray[np.uint8], rewards: Rewards | None
    ) -> None:
        waiting = (phases & STEP) != 0
        if rewards is None or not waiting.any():
            return
        values = np.broadcast_to(np.asarray(rewards.values, np.float32), (len(rows),))
        self.storage.set_rewards(self.table.columns.progress[rows[waiting], SLOT], values[waiting])

    def _turn_rollouts(self, selection: Selection) -> int | None:
        """Move the environments whose rollout is over on; the highest rollout that begins, if one does."""
        if not selection.paced:
            return None
        environments, many = self.table.environments, selection.environments
        turning = many[environments.tick[many] >= environments.turn_at[many]]
        if not len(turning):
            return None
        steps = self.limits.rollout_steps
        if steps is None:
            return 0
        rollouts = environments.first_rollout[turning] + environments.tick[turning] // steps
        environments.rollout[turning] = rollouts
        self._cut_at_next_call(set(turning.tolist()))
        return int(rollouts.max())

    def _cut_at_next_call(self, environments: set[int]) -> None:
        """Mark all acting actors of environments whose rollout is over, those that are not in this call too.

        The marked ones take the long way when they are called next, and their segment closes there.
        """
        phases = self.table.columns.phase
        for row, detail in self.table.live():
            if phases[row] & STEP and detail.environment.index in environments:
                phases[row] |= TURN

    def _due(self, row: int, detail: ActorDetails, leaves: Arrays, position: int) -> Closing | None:
        """The open segment of an actor if this call closes it: it is full, or its rollout is over."""
        if not detail.recorded:
            return None
        steps = self._open_steps(row, detail)
        cut = detail.rollout_index != int(self.table.environments.rollout[detail.environment.index])
        if steps == 0 or not (cut or steps >= self.limits.max_segment_steps):
            return None
        final = self._final(leaves, position)
        return Closing(row, detail, steps, final, ends_rollout=cut)

    def _open_steps(self, row: int, detail: ActorDetails) -> int:
        """Steps in the open segment of an actor."""
        if not detail.pages:
            return 0
        return int(self.table.columns.progress[row, STEP_INDEX]) - detail.first_step_index

    def _final(self, leaves: Arrays, position: int) -> FinalObservation:
        layout = self.storage.layout
        return FinalObservation(
            observation={name: np.array(leaves[name][position]) for name in layout.observation},
            action_mask={key: np.array(leaves[name][position]) for key, name in layout.action_mask.items()},
        )

    def _make_room(self, selection: Selection, phases: NDArray[np.uint8]) -> RelayRLError | None:
        """Begin episodes and segments, and see that each actor's next step has a row."""
        for position in np.flatnonzero((phases & EPISODE) == 0).tolist():
            self._open_episode(int(selection.rows[position]))
        if not selection.recorded:
            return None
        room = self.table.columns.progress[selection.rows, ROOM]
        short = selection.rows[room == 0].tolist()
        try:
            pages = self.storage.allocate(len(short))
        except RelayRLError as exc:
            return exc
        for row, page in zip(short, pages, strict=True):
            self._give_page(row, page)
        return None

    def _open_episode(self, row: int) -> None:
        detail = self.table.detail(row)
        detail.episode_id = uuid7()
        detail.segment_index = 0
        detail.first_step_index = 0
        self.table.columns.progress[row] = (0, 0, 0)

    def _give_page(self, row: int, page: int) -> None:
        detail = self.table.detail(row)
        progress = self.table.columns.progress
        if not detail.pages:
            self._open_segment(row, detail)
        steps = int(progress[row, STEP_INDEX]) - detail.first_step_index
        detail.pages.append(page)
        progress[row, SLOT] = page - 1
        progress[row, ROOM] = min(self.storage.page_steps, self.limits.max_segment_steps - steps)

    def _open_segment(self, row: int, detail: ActorDetails) -> None:
        detail.first_step_index = int(self.table.columns.progress[row, STEP_INDEX])
        detail.started_at = self._clock()
        detail.driver = threading.get_ident()
        rollout = int(self.table.environments.rollout[detail.environment.index])
        if rollout != detail.rollout_index:
            detail.rollout_index = rollout
            detail.rollout_segments = 0

    # -- the second half -------------------------------------------------------------------------------

    def finish(self, selection: Selection, begun: Begun, tags: StepTags, values: Arrays) -> None:
        """Write the steps that the actors now take.

        Args:
            selection: the actors, as in `begin`.
            begun: what `begin` gave.
            tags: the version that acted, and flags.
            values: an array [B, …] for each of `layout.values`; ignored for actors that are not recorded.
        """
        with self.lock:
            if selection.row is not None and selection.recorded and not begun.turned:
                self._finish_one(selection, selection.row, tags, values)
                return
            columns, index = self.table.columns, selection.index
            progress = columns.progress[index]
            progress += EACH_STEP  # of the columns themselves where the index is a slice, else of a copy
            if not isinstance(index, slice):
                columns.progress[index] = progress
            if selection.recorded:
                self._write_steps(selection, progress, tags, values)
            else:
                columns.phase[index] = EPISODE
            self._tick(selection, begun)

    def _finish_one(self, selection: Selection, row: int, tags: StepTags, values: Arrays) -> None:
        """The short way of one actor, as in `_begin_one`."""
        columns, environments = self.table.columns, self.table.environments
        progress, at = columns.progress_of, 3 * row
        environment = selection.environment or 0
        tick = environments.tick_of[environment]
        slot, room = progress[at + SLOT] + 1, progress[at + ROOM] - 1
        progress[at + SLOT] = slot
        progress[at + STEP_INDEX] += 1
        progress[at + ROOM] = room
        self.storage.write_row(slot, tick, tags, values)
        columns.phase_of[row] = ACTING | (columns.phase_of[row] & TURN if room else TURN)
        environments.tick_of[environment] = tick + 1
        self.counters.steps_total += 1

    def _write_steps(
        self, selection: Selection, progress: NDArray[np.int64], tags: StepTags, values: Arrays
    ) -> None:
        columns = self.table.columns
        tick = self.table.environments.tick
        one = selection.environment
        ticks = tick[selection.environment_of] if one is None else tick.item(one)
        self.storage.write(progress[:, SLOT], ticks, tags, values)
        columns.phase[selection.index] &= NOT_BUSY  # a TURN that another thread set meanwhile stays
        room = progress[:, ROOM]
        if room.item() == 0 if len(room) == 1 else not room.all():
            columns.phase[selection.rows[room == 0]] |= TURN
        self.counters.steps_total += len(selection)

    def _tick(self, selection: Selection, begun: Begun) -> None:
        environments, one = self.table.environments, selection.environment
        if begun.turned and selection.paced:
            many, steps = selection.environments, self.limits.rollout_steps
            following = NEVER if steps is None else (environments.tick[many] // steps + 1) * steps
            environments.turn_at[many] = following
        if one is None:
            environments.tick[selection.environments] += 1
        else:
            environments.tick[one] += 1

    def skip_tick(self, environment: int) -> None:
        """Let an environment tick without a step of any actor: all were on their reset tick."""
        with self.lock:
            self.table.environments.tick[environment] += 1

    def abandon(self, selection: Selection) -> None:
        """The call failed after `begin`: what was written stands; the actors are pending (contracts A8)."""
        with self.lock:
            after = EPISODE | PENDING if selection.recorded else EPISODE
            self.table.columns.phase[selection.index] = after
            self.counters.abandoned_calls_total += 1

    # -- ends ------------------------------------------------------------------------------------------

    def end_episode(
        self,
        selection: Selection,
        rewards: Rewards | None,
        terminated: NDArray[np.bool_],
        truncated: NDArray[np.bool_],
        final: Arrays | None,
    ) -> list[ClosedSegment]:
        """Write the last rewards and close the episodes.

        Args:
            selection: the actors.
            rewards: of their last steps.
            terminated: bool [B]; wins over truncated (contracts A4).
            truncated: bool [B].
            final: checked final observation and mask leaves [B, …], or None.

        Raises:
            EpisodeError: an actor is not in an episode, or another call is at work on it.
            InvalidReward: a reward is missing, or given where it was written before.
        """
        with self.lock:
            phases = self.table.columns.phase[selection.index].copy()
            check_end(selection, phases, rewards)
            if selection.recorded:
                self._write_rewards(selection.rows, phases, rewards)
            closing = [
                self._ending(
                    row, steps, bool(terminated[position]), bool(truncated[position]), final, position
                )
                for position, row in enumerate(selection.rows.tolist())
                if (steps := self._open_steps(row, self.table.detail(row)))
            ]
            closed = self._close(closing)
            self._leave_episodes(selection.rows.tolist())
            return closed

    def _ending(
        self, row: int, steps: int, terminated: bool, truncated: bool, final: Arrays | None, position: int
    ) -> Closing:
        detail = self.table.detail(row)
        return Closing(
            row=row,
            detail=detail,
            steps=steps,
            final=None if final is None else self._final(final, position),
            terminated=terminated,
            truncated=truncated,
            ends_rollout=self._ends_rollout(detail),
        )

    def _ends_rollout(self, detail: ActorDetails) -> bool:
        """Whether an episode that ends now leaves its actor no further step in its rollout (contracts F1)."""
        steps = self.limits.rollout_steps
        if steps is None or detail.purpose != "train":
            return False
        environments, index = self.table.environments, detail.environment.index
        following = (detail.rollout_index - int(environments.first_rollout[index]) + 1) * steps
        return int(environments.tick[index]) + detail.environment.reset_ticks >= following

    def drop_open(self, actor_ids: Sequence[str]) -> list[ClosedSegment]:
        """Leave the episodes of actors without their last reward (contracts A5).

        The step whose reward is unknown is dropped and counted; what it saw is the final observation.

        Raises:
            UnknownActor: there is no actor of that id.
            EpisodeError: a call is at work on one of them.
        """
        with self.lock:
            return self._drop_open(actor_ids)

    def remove(self, actor_ids: Sequence[str]) -> tuple[list[ClosedSegment], list[ActorDetails]]:
        """`drop_open`, and take the actors out of the table; no call comes in between.

        Raises:
            UnknownActor: there is no actor of that id; none was removed.
            EpisodeError: a call is at work on one of them; none was removed.
        """
        with self.lock:
            ids = list(dict.fromkeys(actor_ids))
            closed = self._drop_open(ids)
            removed = [self.table.detail(self.table.row(actor_id)) for actor_id in ids]
            for actor_id in ids:
                self.table.remove(actor_id)
            return closed, removed

    def _drop_open(self, actor_ids: Sequence[str]) -> list[ClosedSegment]:
        rows = [self.table.row(actor_id) for actor_id in actor_ids]
        for row, actor_id in zip(rows, actor_ids, strict=True):
            if self.table.columns.phase[row] & BUSY:
                raise EpisodeError(f"actor {actor_id}: a call is at work on it; wait for it to return")
        closing = [due for row in rows if (due := self._without_last_step(row)) is not None]
        closed = self._close(closing)
        self._leave_episodes(rows)
        return closed

    def _without_last_step(self, row: int) -> Closing | None:
        detail = self.table.detail(row)
        steps = self._open_steps(row, detail)
        if steps == 0:
            return None
        self.counters.dropped_steps_total += 1
        if steps == 1:
            return None
        final = self.storage.final_observation(int(self.table.columns.progress[row, SLOT]))
        return Closing(row, detail, steps - 1, final, ends_rollout=True)

    def _leave_episodes(self, rows: Sequence[int]) -> None:
        columns = self.table.columns
        for row in rows:
            detail = self.table.detail(row)
            if detail.pages:
                release(row, detail, self.table, self.storage)
            if columns.progress[row, STEP_INDEX] > 0:
                columns.episode_index[row] += 1
                self.counters.episodes_total += 1
            columns.progress[row] = 0
            columns.phase[row] = 0

    def _close(self, closing: Sequence[Closing]) -> list[ClosedSegment]:
        closed = close_segments(closing, self.table, self.storage, self.identity, self._clock())
        self.counters.segments_total += len(closed)
        return closed

    # -- pacing ----------------------------------------------------------------------------------------

    def behind(self, rollout: int) -> list[ActorDetails]:
        """Actors that the learner waits for and that have not finished the rollouts before.

        Those of the call itself are among them where their environment does not begin that rollout with it.
        """
        with self.lock:
            return [detail for row, detail in self.table.live() if self._is_behind(row, detail, rollout)]

    def _is_behind(self, row: int, detail: ActorDetails, rollout: int) -> bool:
        steps = self.limits.rollout_steps
        if steps is None or not detail.recorded or detail.purpose != "train":
            return False
        environments, index = self.table.environments, detail.environment.index
        reached = int(environments.first_rollout[index]) + int(environments.tick[index]) // steps
        return reached < rollout or (self._open_steps(row, detail) > 0 and detail.rollout_index < rollout)
