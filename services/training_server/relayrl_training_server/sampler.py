"""Chooses what an update learns from: reads the store by cursor and decides upon every trajectory once.

The learner drives it: `add` what was read, ask for a `batch`, keep `state` in the checkpoint. How batches
are cut is a `Selection`: rollouts of all actors (contracts F1), the freshest segments (E2), or whole
episodes (F3). What is decided is counted by outcome and becomes a use row of the next update; what is not
stays in the pool.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from relayrl_shared.store.interface import StoredActor, Use, UseOutcome
from relayrl_shared.trajectory import TrajectoryMetadata
from relayrl_training_server.batches import Segment

_REMEMBERED_EPISODES = 65_536


@dataclass(frozen=True)
class Moment:
    """When a batch is asked for. `now` is monotonic, seconds; decisions at policy lag 0 do not read it."""

    learner_update: int
    actors: Sequence[StoredActor]
    now: float


@dataclass(frozen=True)
class Selected:
    """What a selection found: a batch of segments, or whom or what it waits for."""

    segments: tuple[Segment, ...] = ()
    found: bool = False
    waiting_for: str = ""


@dataclass(frozen=True)
class Sampled:
    """A batch, and every decision since the batch before it: as uses, and as metadata of what was decided."""

    segments: tuple[Segment, ...]
    uses: tuple[Use, ...]
    decided: tuple[TrajectoryMetadata, ...] = ()


class Selection(ABC):
    """How batches are cut from the pool. It decides what is stale or incomplete, and what is used."""

    @abstractmethod
    def add(self, segment: Segment, usable: bool, now: float) -> None:
        """Takes a segment in; one that is not usable is decided upon already and counts as delivered only."""

    @abstractmethod
    def select(self, moment: Moment, pool: Pool) -> Selected:
        """A batch whose segments are now the caller's, or why there is none yet."""

    @abstractmethod
    def drop(self, moment: Moment, pool: Pool) -> None:
        """Passes over what no batch will take any more."""

    @abstractmethod
    def wanted_steps(self, moment: Moment) -> int:
        """How many more steps the next batch wants (contracts E2); 0 if it has all."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the pool's own state."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to what `state` gave."""


class Pool:
    """What was read and not yet decided upon, and the cursor that follows from it."""

    def __init__(self) -> None:
        self.read_position = 0
        self.undecided: dict[int, Segment] = {}
        self.decided: set[int] = set()
        self.uses: list[Use] = []
        self.settled: list[TrajectoryMetadata] = []
        self.outcomes: Counter[str] = Counter()
        self.held_bytes = 0

    @property
    def cursor(self) -> int:
        """Every position up to here is decided upon; a resume reads on from it."""
        return min(self.undecided) - 1 if self.undecided else self.read_position

    def hold(self, segment: Segment) -> None:
        """Takes a segment in, undecided."""
        self.undecided[segment.position] = segment
        self.held_bytes += segment.stored_bytes

    def decide(self, segments: Iterable[Segment], outcome: UseOutcome) -> None:
        """Marks segments of the pool for good."""
        for segment in segments:
            del self.undecided[segment.position]
            self.held_bytes -= segment.stored_bytes
            self.decided.add(segment.position)
            self.outcomes[outcome] += 1
            self.settled.append(segment.metadata)
            trajectory_id = segment.metadata.trajectory_id
            self.uses.append(Use(trajectory_id=trajectory_id, position=segment.position, outcome=outcome))

    def take(self, segments: tuple[Segment, ...]) -> Sampled:
        """Marks a batch as used; gives it with the decisions since the last one, by position."""
        self.decide(segments, "used")
        uses = tuple(sorted(self.uses, key=lambda use: use.position))
        sampled = Sampled(segments, uses, tuple(self.settled))
        self.uses, self.settled = [], []
        cursor = self.cursor
        self.decided = {position for position in self.decided if position > cursor}
        return sampled

    def state(self) -> dict[str, Any]:
        """The cursor and the decided positions above it."""
        cursor = self.cursor
        decided = sorted(position for position in self.decided if position > cursor)
        return {"cursor": cursor, "decided": decided, "outcomes": dict(self.outcomes)}

    def restore(self, state: dict[str, Any]) -> None:
        """An empty pool that reads on from the cursor."""
        self.read_position = int(state["cursor"])
        self.undecided, self.uses, self.settled, self.held_bytes = {}, [], [], 0
        self.decided = set(state["decided"])
        self.outcomes = Counter(state["outcomes"])


@dataclass
class OverlapGuard:
    """Finds segments whose steps an episode has already (contracts B4), by what was seen of each episode."""

    spans: OrderedDict[str, list[tuple[int, int]]] = field(default_factory=OrderedDict)
    ended: set[str] = field(default_factory=set)

    def is_new(self, segment: Segment) -> bool:
        """Whether no step of the segment was seen before; notes its steps if so."""
        metadata = segment.metadata
        start, end = metadata.first_step_index, metadata.first_step_index + metadata.steps
        spans = self.spans.setdefault(metadata.episode_id, [])
        self.spans.move_to_end(metadata.episode_id)
        if any(first < end and start < last for first, last in spans):
            return False
        spans.append((start, end))
        self.spans[metadata.episode_id] = _merged(spans)
        if segment.ended:
            self.ended.add(metadata.episode_id)
        while len(self.spans) > _REMEMBERED_EPISODES:
            self.ended.discard(self.spans.popitem(last=False)[0])
        return True

    def state(self) -> dict[str, list[tuple[int, int]]]:
        """What was seen of the episodes that go on."""
        return {name: spans for name, spans in self.spans.items() if name not in self.ended}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to what `state` gave."""
        self.spans = OrderedDict((name, [tuple(span) for span in spans]) for name, spans in state.items())
        self.ended = set()


class Sampler:
    """The pool and a selection over it.

    Args:
        selection: how batches are cut.
        guard: finds overlaps.
        evaluation: whether the algorithm says that it may learn from evaluation and greedy data.
    """

    def __init__(
        self, selection: Selection, guard: OverlapGuard | None = None, *, evaluation: bool = False
    ) -> None:
        self.evaluation = evaluation
        self.selection = selection
        self.guard = guard or OverlapGuard()
        self.pool = Pool()
        self.steps_read = 0
        self.waiting_for = "the first trajectory"

    @property
    def read_position(self) -> int:
        """The last position that was read; the next read goes on after it."""
        return self.pool.read_position

    def add(self, segments: Iterable[Segment], now: float) -> None:
        """Takes in what was read, in order of position; known positions are left out."""
        for segment in segments:
            self.pool.read_position = max(self.pool.read_position, segment.position)
            if segment.position in self.pool.decided or segment.position in self.pool.undecided:
                continue
            self.pool.hold(segment)
            self.steps_read += segment.metadata.steps
            outcome = self._refused(segment)
            if outcome is not None:
                self.pool.decide([segment], outcome)
            self.selection.add(segment, outcome is None, now)

    def drop(self, moment: Moment) -> None:
        """Passes over what no batch will take any more, so that the pool has room to read on."""
        self.selection.drop(moment, self.pool)

    def batch(self, moment: Moment) -> Sampled | None:
        """The next batch with every decision since the last one, or None; then `waiting_for` says why."""
        selected = self.selection.select(moment, self.pool)
        self.waiting_for = selected.waiting_for
        if not selected.found:
            return None
        return self.pool.take(selected.segments)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; undecided segments are read again."""
        pending = sum(segment.metadata.steps for segment in self.pool.undecided.values())
        return {
            "pool": self.pool.state(),
            "guard": _without(self.guard.state(), self.pool.undecided.values()),
            "selection": self.selection.state(),
            "steps_read": self.steps_read - pending,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to what `state` gave."""
        self.pool.restore(state["pool"])
        self.guard.restore(state["guard"])
        self.selection.restore(state["selection"])
        self.steps_read = int(state["steps_read"])

    def _refused(self, segment: Segment) -> UseOutcome | None:
        """Why no learner may use a segment, if so (contracts B4, B5)."""
        if segment.metadata.purpose == "evaluate" and not self.evaluation:
            return "evaluation"
        if not self.evaluation and bool(segment.columns.greedy.any()):
            return "greedy"
        return None if self.guard.is_new(segment) else "overlap"


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Disjoint spans, those that touch joined, in order."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _without(
    spans: dict[str, list[tuple[int, int]]], segments: Iterable[Segment]
) -> dict[str, list[tuple[int, int]]]:
    """Spans less those of segments that will be read again."""
    left = {name: list(parts) for name, parts in spans.items()}
    for segment in segments:
        m = segment.metadata
        cut = (m.first_step_index, m.first_step_index + m.steps)
        if m.episode_id in left:
            left[m.episode_id] = [piece for span in left[m.episode_id] for piece in _cut(span, cut)]
    return {name: parts for name, parts in left.items() if parts}


def _cut(span: tuple[int, int], hole: tuple[int, int]) -> list[tuple[int, int]]:
    """What is left of a span beside a hole in it."""
    if hole[1] <= span[0] or hole[0] >= span[1]:
        return [span]
    pieces = [(span[0], hole[0]), (hole[1], span[1])]
    return [piece for piece in pieces if piece[0] < piece[1]]
