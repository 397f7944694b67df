"""The three ways to cut batches; the sampler drives one of them, `selection_for` chooses which.

Rollouts: all live actors of a run under block pacing. Freshest: any segments, newest first, under free
pacing. Episodes: whole episodes, newest first, under either.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from relayrl_shared.store.interface import Run, StoredActor
from relayrl_training_server.algorithms.configs import PPOConfig, build_config
from relayrl_training_server.batches import Segment, follows
from relayrl_training_server.sampler import Moment, Pool, Selected, Selection

_REMEMBERED_EPISODES = 65_536
_NAMED = 8  # at most so many actors are named in a readiness message


@dataclass
class _Delivery:
    """What an actor has delivered of one rollout. `expected` is known once its last segment is there."""

    usable: list[Segment] = field(default_factory=list)
    delivered: int = 0
    expected: int | None = None

    @property
    def complete(self) -> bool:
        return self.expected is not None and self.delivered >= self.expected


class RolloutSelection(Selection):
    """Batch r is rollout r of every live actor (contracts F1).

    At policy lag 0 it waits for ever and says for whom; above it, who is silent past the timeout is left out.

    Args:
        max_policy_lag: of the run.
        collection_timeout_seconds: how long a silent actor is waited for.
    """

    def __init__(self, max_policy_lag: int, collection_timeout_seconds: float) -> None:
        self.max_policy_lag = max_policy_lag
        self.collection_timeout_seconds = collection_timeout_seconds
        self.left_out_total = 0
        self._rollouts: dict[int, dict[str, _Delivery]] = {}
        self._last_arrival: dict[str, float] = {}
        self._asked: tuple[int, float] = (-1, 0.0)

    def add(self, segment: Segment, usable: bool, now: float) -> None:
        """Counts a segment as delivered."""
        metadata = segment.metadata
        delivery = self._rollouts.setdefault(metadata.rollout_index, {}).setdefault(
            metadata.actor_id, _Delivery()
        )
        delivery.delivered += 1
        delivery.expected = metadata.rollout_segments or delivery.expected
        if usable:
            delivery.usable.append(segment)
        self._last_arrival[metadata.actor_id] = now

    def drop(self, moment: Moment, pool: Pool) -> None:
        """Passes over rollouts whose update is done."""
        for late in [index for index in self._rollouts if index < moment.learner_update]:
            for delivery in self._rollouts.pop(late).values():
                pool.decide(delivery.usable, "stale")

    def select(self, moment: Moment, pool: Pool) -> Selected:
        """Rollout `learner_update` of all live actors, once it is complete; what is left of it may be empty.

        Above policy lag 0 it goes on without those who are silent, as soon as anybody has shown that this
        rollout has begun: what is missing may be in quarantine or dropped, and never come.
        """
        self.drop(moment, pool)
        rollout = moment.learner_update
        awaited = [actor for actor in moment.actors if actor.first_rollout_index <= rollout]
        deliveries = self._rollouts.get(rollout, {})
        missing = [actor for actor in awaited if not _is_complete(deliveries, actor)]
        if not awaited:
            return Selected(waiting_for=f"rollout {rollout}: an actor")
        silent = self._silent(missing, moment)
        if len(silent) < len(missing) or (missing and not self._has_begun(awaited)):
            return Selected(waiting_for=f"rollout {rollout}: {_names(missing)}")
        self.left_out_total += len(silent)
        segments = [segment for delivery in deliveries.values() for segment in delivery.usable]
        self._rollouts.pop(rollout, None)
        stale = [segment for segment in segments if is_stale(segment, moment, self.max_policy_lag)]
        pool.decide(stale, "stale")  # acted while nobody could be asked for newer weights (contracts E3)
        fresh = [segment for segment in segments if not is_stale(segment, moment, self.max_policy_lag)]
        return Selected(tuple(sorted(fresh, key=lambda s: s.position)), found=True)

    def _has_begun(self, awaited: list[StoredActor]) -> bool:
        """Whether any of them has delivered of this rollout or a later one."""
        names = {actor.info.actor_id for actor in awaited}
        return any(not names.isdisjoint(deliveries) for deliveries in self._rollouts.values())

    def wanted_steps(self, moment: Moment) -> int:
        """Rollouts are admitted by their number alone, never by leases."""
        return 0

    def state(self) -> dict[str, Any]:
        """What was delivered and decided upon of rollouts that are still open."""
        unusable = {
            str(index): {name: [d.delivered - len(d.usable), d.expected] for name, d in actors.items()}
            for index, actors in self._rollouts.items()
        }
        return {"unusable": unusable, "left_out_total": self.left_out_total}

    def restore(self, state: dict[str, Any]) -> None:
        """Undecided segments are read again; the others are not, so that they stay counted."""
        self.left_out_total = int(state["left_out_total"])
        self._rollouts = {
            int(index): {
                name: _Delivery(delivered=count, expected=expected)
                for name, (count, expected) in actors.items()
            }
            for index, actors in state["unusable"].items()
        }

    def _silent(self, missing: list[StoredActor], moment: Moment) -> list[StoredActor]:
        """Those of the missing that are not waited for any more; none at policy lag 0."""
        if self.max_policy_lag == 0:
            return []
        if self._asked[0] != moment.learner_update:
            self._asked = (moment.learner_update, moment.now)
        deadline = moment.now - self.collection_timeout_seconds
        asked = self._asked[1]
        return [a for a in missing if max(asked, self._last_arrival.get(a.info.actor_id, asked)) < deadline]


class FreshestSelection(Selection):
    """Any segments within the lag bound, newest first, until there are steps enough (contracts E2).

    Args:
        max_policy_lag: of the run; older segments are stale.
        rollout_steps: steps of a batch for each live actor.
        min_steps: steps of a batch, whoever lives; None: by the actors.
    """

    def __init__(self, max_policy_lag: int, rollout_steps: int, min_steps: int | None) -> None:
        self.max_policy_lag = max_policy_lag
        self.rollout_steps = rollout_steps
        self.min_steps = min_steps
        self._segments: dict[int, Segment] = {}

    def add(self, segment: Segment, usable: bool, now: float) -> None:
        """Keeps what is usable."""
        if usable:
            self._segments[segment.position] = segment

    def drop(self, moment: Moment, pool: Pool) -> None:
        """Passes over what is beyond the lag bound."""
        stale = [s for s in self._segments.values() if is_stale(s, moment, self.max_policy_lag)]
        pool.decide(stale, "stale")
        for segment in stale:
            del self._segments[segment.position]

    def select(self, moment: Moment, pool: Pool) -> Selected:
        """The newest segments that fill a batch."""
        self.drop(moment, pool)
        target = self._target(moment)
        chosen: list[Segment] = []
        steps = 0
        for position in sorted(self._segments, reverse=True):
            if steps >= target:
                break
            chosen.append(self._segments[position])
            steps += chosen[-1].metadata.steps
        if steps < target:
            return Selected(waiting_for=f"{target - steps} of {target} steps")
        for segment in chosen:
            del self._segments[segment.position]
        return Selected(tuple(reversed(chosen)), found=True)

    def wanted_steps(self, moment: Moment) -> int:
        """What the batch lacks."""
        held = sum(segment.metadata.steps for segment in self._segments.values())
        return max(0, self._target(moment) - held)

    def state(self) -> dict[str, Any]:
        """Nothing: the pool holds the segments."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Starts empty; undecided segments are read again."""
        self._segments = {}

    def _target(self, moment: Moment) -> int:
        return self.min_steps or self.rollout_steps * max(1, len(moment.actors))


@dataclass
class _Episode:
    """The segments of one episode so far."""

    segments: list[Segment] = field(default_factory=list)
    last_arrival: float = 0.0

    def add(self, segment: Segment, now: float) -> None:
        """Keeps the segments in order."""
        self.segments.append(segment)
        self.segments.sort(key=lambda s: s.metadata.segment_index)
        self.last_arrival = now

    @property
    def whole(self) -> bool:
        """Whether it is there from its first step to its end, without a gap."""
        first, last = self.segments[0].metadata, self.segments[-1]
        steps = zip(self.segments, self.segments[1:], strict=False)
        unbroken = all(follows(before.metadata, after.metadata) for before, after in steps)
        return first.segment_index == 0 and last.ended and unbroken

    @property
    def steps(self) -> int:
        return sum(segment.metadata.steps for segment in self.segments)


class EpisodeSelection(Selection):
    """Whole episodes within the lag bound, newest first, until there are enough (contracts E2, F3).

    Args:
        max_policy_lag: of the run, counted from an episode's oldest step.
        episodes: of a batch.
        episode_timeout_seconds: how long the missing part of an episode is waited for.
    """

    def __init__(self, max_policy_lag: int, episodes: int, episode_timeout_seconds: float) -> None:
        self.max_policy_lag = max_policy_lag
        self.episodes = episodes
        self.episode_timeout_seconds = episode_timeout_seconds
        self.typical_steps = 32.0
        self._open: dict[str, _Episode] = {}
        self._given_up: dict[str, None] = {}

    def add(self, segment: Segment, usable: bool, now: float) -> None:
        """Joins it to its episode; an episode with an unusable part is given up."""
        episode_id = segment.metadata.episode_id
        if usable:
            self._open.setdefault(episode_id, _Episode()).add(segment, now)
        else:
            self._give_up(episode_id, over=segment.ended and episode_id not in self._open)

    def select(self, moment: Moment, pool: Pool) -> Selected:
        """The newest whole episodes, once there are enough."""
        self.drop(moment, pool)
        whole = {name: episode for name, episode in self._open.items() if episode.whole}
        if len(whole) < self.episodes:
            return Selected(waiting_for=f"{self.episodes - len(whole)} of {self.episodes} whole episodes")
        newest = sorted(whole, key=lambda name: whole[name].segments[-1].position)[-self.episodes :]
        chosen = [self._open.pop(name) for name in newest]
        for episode in chosen:
            self.typical_steps += 0.1 * (episode.steps - self.typical_steps)
        return Selected(tuple(segment for episode in chosen for segment in episode.segments), found=True)

    def wanted_steps(self, moment: Moment) -> int:
        """An estimate: the missing episodes, and half an episode under way for each actor."""
        whole = sum(episode.whole for episode in self._open.values())
        if whole >= self.episodes:
            return 0
        return int(self.typical_steps * (self.episodes - whole + 0.5 * len(moment.actors))) + 1

    def state(self) -> dict[str, Any]:
        """The episodes that were given up while parts of them may still come."""
        return {"given_up": list(self._given_up), "typical_steps": self.typical_steps}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to what `state` gave."""
        self._given_up = dict.fromkeys(state["given_up"])
        self.typical_steps = float(state["typical_steps"])

    def drop(self, moment: Moment, pool: Pool) -> None:
        """Gives up episodes with a stale step, those whose rest does not come, and what belongs to such."""
        for name, episode in list(self._open.items()):
            late = moment.now - episode.last_arrival > self.episode_timeout_seconds and not episode.whole
            if any(is_stale(segment, moment, self.max_policy_lag) for segment in episode.segments):
                pool.decide(episode.segments, "stale")
            elif name in self._given_up or late:
                pool.decide(episode.segments, "incomplete")
            else:
                continue
            self._give_up(name, over=self._open.pop(name).segments[-1].ended)

    def _give_up(self, name: str, *, over: bool) -> None:
        """Remembers the episode until its end has come, and of very many the last ones."""
        self._given_up.pop(name, None)
        if not over:
            self._given_up[name] = None
        while len(self._given_up) > _REMEMBERED_EPISODES:
            del self._given_up[next(iter(self._given_up))]


def is_stale(segment: Segment, moment: Moment, max_policy_lag: int) -> bool:
    """Whether its oldest step acted with weights beyond the lag bound."""
    return moment.learner_update - segment.oldest_update > max_policy_lag


def selection_for(run: Run) -> Selection:
    """How batches of a run are cut, by its algorithm's needs and its pacing.

    Raises:
        ConfigError: hyperparameters that are unknown or out of range.
    """
    config = build_config(run.algorithm, run.hyperparameters)
    if not isinstance(config, PPOConfig) or config.rollout_steps is None:
        return EpisodeSelection(run.max_policy_lag, config.traj_per_epoch, config.episode_timeout_seconds)
    if run.pacing == "free":
        return FreshestSelection(run.max_policy_lag, config.rollout_steps, config.min_steps_per_epoch)
    return RolloutSelection(run.max_policy_lag, config.collection_timeout_seconds)


def _is_complete(deliveries: dict[str, _Delivery], actor: StoredActor) -> bool:
    delivery = deliveries.get(actor.info.actor_id)
    return delivery is not None and delivery.complete


def _names(actors: Iterable[StoredActor]) -> str:
    """Actors by client and index, the first few of them."""
    listed = sorted((actor.client_index, actor.info.actor_index) for actor in actors)
    named = ", ".join(f"actor {index} of client {client}" for client, index in listed[:_NAMED])
    return named if len(listed) <= _NAMED else f"{named} and {len(listed) - _NAMED} more"
