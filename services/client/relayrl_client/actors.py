"""The actors and environments of a client: ids, and the state of every actor as columns of arrays.

The recorder drives it and holds its lock around every call; `select` alone is also called without it. An
actor's row is its `actor_index`: it is never used again, since the noise of an actor is keyed by it.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from relayrl_shared.errors import ConfigError, ContractError, EpisodeError, UnknownActor
from relayrl_shared.trajectory import Purpose

# Phases of an actor, as bits.
EPISODE = 1  # an episode is open
STEP = 2  # the open segment's last step waits for its reward
TURN = 4  # before the next step: the segment is full, or the next step needs another page
PENDING = 8  # the last call failed after the reward was written (contracts A8)
BUSY = 16  # a call is at work on this actor

ACTING = EPISODE | STEP
ACTING_BUSY = ACTING | BUSY
NOT_BUSY = np.uint8(0xFF ^ BUSY)

_MAX_CACHED_SELECTIONS = 4096
NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class EnvironmentHandle:
    """An environment instance: the actors that act in it tick together.

    environment_id: UUID, the record's environment_instance_id. index: its row in the table.
    reset_ticks: ticks without a step after each end of an episode (1 for NEXT_STEP autoreset).
    """

    environment_id: str
    index: int
    reset_ticks: int


@dataclass(frozen=True, slots=True)
class Selection:
    """The actors of one call, resolved once and kept while the same ids are passed.

    rows: int64 [B]. index: what to index columns with: a slice where the rows follow each other, since that
    costs a fraction of an array. environments: int64 [E] without repeats; environment_of: int64 [B], that of
    each actor; environment: the only one, where there is only one. recorded: whether their steps are kept.
    paced: whether they belong to the rollouts that the learner waits for. acting: the phases of B actors that
    are in the middle of a segment, as bytes.
    """

    ids: tuple[str, ...]
    rows: NDArray[np.int64]
    index: slice | NDArray[np.int64]
    row: int | None
    environments: NDArray[np.int64]
    environment_of: NDArray[np.int64]
    environment: int | None
    recorded: bool
    paced: bool
    acting: bytes

    def __len__(self) -> int:
        return len(self.ids)

    def where(self, chosen: NDArray[np.bool_]) -> Selection:
        """The actors for which `chosen` (bool [B]) is True; at least one must be.

        It costs no look-up, so that a vector environment may leave out other actors at every tick.
        """
        rows = self.rows[chosen]
        ids = tuple(itertools.compress(self.ids, chosen.tolist()))
        environment_of = self.environment_of[chosen]
        one = self.environment
        return Selection(
            ids=ids,
            rows=rows,
            index=_index_of(rows),
            row=rows.item() if len(rows) == 1 else None,
            environments=self.environments if one is not None else np.unique(environment_of),
            environment_of=environment_of,
            environment=one,
            recorded=self.recorded,
            paced=self.paced,
            acting=self.acting[: len(ids)],
        )


def _index_of(rows: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """A slice where the rows follow each other, else the rows."""
    if len(rows) == rows[-1] - rows[0] + 1 and bool((np.diff(rows) == 1).all()):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


@dataclass(slots=True)
class ActorDetails:
    """What is known of one actor beside its columns; touched at the edges of segments only."""

    actor_id: str
    environment: EnvironmentHandle
    agent_id: str | None
    purpose: Purpose
    recorded: bool
    seed: int | None
    episode_id: str = ""
    pages: list[int] = field(default_factory=list)
    segment_index: int = 0
    first_step_index: int = 0
    started_at: float = 0.0
    rollout_index: int = -1  # of the open segment, or of the last one
    rollout_segments: int = 0  # closed so far in that rollout
    driver: int | None = None  # the thread that called last


class ActorColumns:
    """The columns that every call touches, by row; for many actors as arrays, for one as plain integers.

    phase: uint8 [rows]. progress: int64 [rows, 3]: slot of the last step in the storage, step_index of the
    next step in the episode, room for steps before the next TURN: one array, as each step adds (1, 1, -1).
    episode_index: int64 [rows]. phase_of, progress_of: the same memory as flat views, which read and write
    single numbers in a fraction of the time that numpy takes.
    """

    __slots__ = ("_counters", "episode_index", "phase", "phase_of", "progress", "progress_of")

    def __init__(self, rows: int) -> None:
        self.phase = np.zeros(rows, np.uint8)
        self.progress = np.zeros((rows, 3), np.int64)
        self.episode_index = np.zeros(rows, np.int64)
        self.phase_of = self.phase.data
        self.progress_of = self.progress.reshape(-1).data
        self._counters: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}

    def grown(self, rows: int) -> ActorColumns:
        """A copy with room for more rows."""
        grown = ActorColumns(rows)
        have = len(self.phase)
        grown.phase[:have] = self.phase
        grown.progress[:have] = self.progress
        grown.episode_index[:have] = self.episode_index
        return grown

    def counters_of(self, row: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """step_index and episode_index of one actor as arrays [1] that follow the columns."""
        counters = self._counters.get(row)
        if counters is None:
            counters = self.progress[row : row + 1, STEP_INDEX], self.episode_index[row : row + 1]
            self._counters[row] = counters
        return counters


SLOT, STEP_INDEX, ROOM = 0, 1, 2
EACH_STEP = np.array([[1, 1, -1]], np.int64)


class EnvironmentColumns:
    """Environment instances by row; see `ActorColumns` for the flat views.

    tick: ticks so far. rollout: the one it is in, first_rollout: its first. turn_at: a call at this tick or
    later begins a rollout, and takes the long way. All int64 [rows].
    """

    __slots__ = ("first_rollout", "rollout", "tick", "tick_of", "turn_at", "turn_at_of")

    def __init__(self, rows: int) -> None:
        self.tick = np.zeros(rows, np.int64)
        self.rollout = np.zeros(rows, np.int64)
        self.first_rollout = np.zeros(rows, np.int64)
        self.turn_at = np.zeros(rows, np.int64)
        self.tick_of = self.tick.data
        self.turn_at_of = self.turn_at.data

    def grown(self, rows: int) -> EnvironmentColumns:
        """A copy with room for more rows."""
        grown = EnvironmentColumns(rows)
        have = len(self.tick)
        for name in ("tick", "rollout", "first_rollout", "turn_at"):
            getattr(grown, name)[:have] = getattr(self, name)
        return grown


class ActorTable:
    """All actors of a client by id, and their environments."""

    def __init__(self) -> None:
        self.columns = ActorColumns(16)
        self.environments = EnvironmentColumns(16)
        self.details: list[ActorDetails | None] = []
        self.handles: list[EnvironmentHandle] = []
        self._row_of: dict[str, int] = {}
        self._selections: dict[tuple[str, ...], Selection] = {}

    # -- environments ----------------------------------------------------------------------------------

    def new_environment(self, reset_ticks: int, first_rollout: int, tick: int = 0) -> EnvironmentHandle:
        """A new environment instance without actors.

        Args:
            reset_ticks: ticks without a step after each end.
            first_rollout: the rollout that it begins in.
            tick: how many ticks of that rollout are over.

        Raises:
            ConfigError: reset_ticks is negative.
        """
        if reset_ticks < 0:
            raise ConfigError(f"reset_ticks is {reset_ticks}; it counts ticks and is 0 or more")
        index = len(self.handles)
        if index >= len(self.environments.tick):
            self.environments = self.environments.grown(2 * index)
        handle = EnvironmentHandle(str(uuid.uuid4()), index, reset_ticks)
        self.handles.append(handle)
        environments = self.environments
        environments.first_rollout[index] = environments.rollout[index] = first_rollout
        environments.tick[index] = tick
        return handle

    def move(self, actor_ids: Sequence[str], environment: EnvironmentHandle) -> None:
        """Put actors into an environment instance.

        Raises:
            UnknownActor: there is no actor of that id.
            EpisodeError: one is in the middle of an episode.
        """
        rows = [self.row(actor_id) for actor_id in actor_ids]
        for actor_id, row in zip(actor_ids, rows, strict=True):
            if self.columns.phase[row]:
                raise EpisodeError(f"actor {actor_id} is in an episode; move it after end_episode")
        for row in rows:
            self.detail(row).environment = environment
        self._selections = {}

    def next_place(self, actor_ids: Sequence[str], rollout_steps: int | None) -> tuple[int, int]:
        """Where these actors go on in a new environment: the rollout, and how many of its ticks are over.

        Raises:
            UnknownActor: there is no actor of that id.
            EpisodeError: some are in the middle of a rollout and others are elsewhere.
        """
        if rollout_steps is None:
            return 0, 0
        places = {}
        for actor_id in actor_ids:
            environment = self.detail(self.row(actor_id)).environment
            done, tick = divmod(int(self.environments.tick[environment.index]), rollout_steps)
            if tick and tick + environment.reset_ticks >= rollout_steps:
                done, tick = done + 1, 0  # reset ticks were all that was left of it
            places[int(self.environments.first_rollout[environment.index]) + done, tick] = actor_id
        if len(places) > 1 and any(tick for _, tick in places):
            (rollout, tick), actor_id = max(places.items(), key=lambda place: place[0][1])
            raise EpisodeError(
                f"actor {actor_id} is {tick} ticks into rollout {rollout} of {rollout_steps} ticks, and "
                "others are elsewhere: one environment has one rollout. Let each finish its own first, or "
                "make new actors (new_actors) for this environment"
            )
        return max(places, default=(0, 0))

    # -- actors ----------------------------------------------------------------------------------------

    def add(self, details: ActorDetails) -> int:
        """Add an actor and return its row.

        Raises:
            ContractError: the id is taken.
        """
        self._check_free(details.actor_id)
        row = len(self.details)
        if row >= len(self.columns.phase):
            self.columns = self.columns.grown(2 * row)
        self.details.append(details)
        self._row_of[details.actor_id] = row
        return row

    def remove(self, actor_id: str) -> None:
        """Forget an actor; its row stays empty for good."""
        row = self.row(actor_id)
        self.details[row] = None
        self.columns.phase[row] = 0
        del self._row_of[actor_id]
        self._selections = {}

    def rename(self, current: str, new: str) -> None:
        """Give an actor another id.

        Raises:
            UnknownActor: there is no actor of the current id.
            ContractError: the new id is taken, or not a UUID.
        """
        row = self.row(current)
        self._check_free(new)
        self.detail(row).actor_id = new
        self._row_of[new] = self._row_of.pop(current)
        self._selections = {}

    def _check_free(self, actor_id: str) -> None:
        if actor_id in self._row_of:
            raise ContractError(f"the actor id {actor_id} is taken; choose another or leave it out")
        try:
            uuid.UUID(actor_id)
        except (ValueError, AttributeError, TypeError) as exc:
            raise ContractError(f"the actor id {actor_id!r} is not a UUID; leave it out to get one") from exc

    @property
    def ids(self) -> list[str]:
        """The ids of all actors, in the order of their making."""
        return [detail.actor_id for detail in self.details if detail is not None]

    def row(self, actor_id: str) -> int:
        """The row of an actor.

        Raises:
            UnknownActor: there is no such actor.
        """
        row = self._row_of.get(actor_id) if isinstance(actor_id, str) else None
        if row is None:
            raise UnknownActor(
                f"no actor {actor_id!r} in this client: use an id that new_actor gave and is not removed"
            )
        return row

    def detail(self, row: int) -> ActorDetails:
        """The details of the actor in a row.

        Raises:
            UnknownActor: it was removed.
        """
        detail = self.details[row]
        if detail is None:
            raise UnknownActor(f"the actor with index {row} was removed")
        return detail

    def live(self) -> list[tuple[int, ActorDetails]]:
        """Rows and details of all actors."""
        return [(row, detail) for row, detail in enumerate(self.details) if detail is not None]

    def phases(self, selection: Selection) -> NDArray[np.uint8]:
        """The phases of these actors now; uint8 [B]."""
        return self.columns.phase[selection.rows]

    def set_seeds(self, actor_ids: Sequence[str], seeds: Sequence[int]) -> None:
        """Note what the environments of these actors were seeded with, for the record.

        Raises:
            UnknownActor: there is no actor of that id.
        """
        for actor_id, seed in zip(actor_ids, seeds, strict=True):
            self.detail(self.row(actor_id)).seed = seed

    # -- selections ------------------------------------------------------------------------------------

    def select(self, actor_ids: str | Sequence[str] | Selection) -> Selection:
        """The actors of a call, in the order of the ids; a selection is given back as it is.

        Raises:
            UnknownActor: an id is not known.
            EpisodeError: no id, one id twice, or recorded actors beside others.
        """
        if isinstance(actor_ids, Selection):
            return actor_ids
        ids = (actor_ids,) if isinstance(actor_ids, str) else tuple(actor_ids)
        known = self._selections
        selection = known.get(ids)
        if selection is None:
            selection = self._resolve(ids)
            if len(known) >= _MAX_CACHED_SELECTIONS:
                known.clear()
            known[ids] = selection
        return selection

    def _resolve(self, ids: tuple[str, ...]) -> Selection:
        if not ids:
            raise EpisodeError("no actor ids: name at least one actor")
        numbers = [self.row(actor_id) for actor_id in ids]
        if len(set(numbers)) != len(numbers):
            twice = next(actor_id for actor_id in ids if ids.count(actor_id) > 1)
            raise EpisodeError(f"actor {twice} is named twice in one call")
        details = [self.detail(row) for row in numbers]
        if len({(detail.recorded, detail.purpose) for detail in details}) > 1:
            raise EpisodeError("actors that train and actors that evaluate in one call: call them apart")
        rows = np.array(numbers, np.int64)
        environment_of = np.array([detail.environment.index for detail in details], np.int64)
        environments = np.unique(environment_of)
        recorded = details[0].recorded
        return Selection(
            ids=ids,
            rows=rows,
            index=_index_of(rows),
            row=numbers[0] if len(numbers) == 1 else None,
            environments=environments,
            environment_of=environment_of,
            environment=int(environments[0]) if len(environments) == 1 else None,
            recorded=recorded,
            paced=recorded and details[0].purpose == "train",
            acting=bytes([ACTING if recorded else EPISODE]) * len(ids),
        )
