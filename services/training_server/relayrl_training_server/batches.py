"""From decoded trajectories to learner arrays; the sampler chooses segments, an algorithm takes the batch.

Rows are steps, chain by chain (a chain is an unbroken run of steps of one episode), in an order that
depends on what the segments are and never on when they arrived (contracts F2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relayrl_shared.errors import InvalidTrajectory
from relayrl_shared.trajectory import Columns, FinalObservation, TrajectoryMetadata

Leaves = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Segment:
    """A stored trajectory, decoded.

    oldest_update: the learner_update that its oldest step acted with. stored_bytes: of its payload.
    """

    position: int
    metadata: TrajectoryMetadata
    columns: Columns
    final_observation: FinalObservation | None
    oldest_update: int
    stored_bytes: int = 0

    @property
    def ended(self) -> bool:
        """Whether the episode ends with it."""
        return self.metadata.terminated or self.metadata.truncated


Chain = tuple[Segment, ...]


@dataclass(frozen=True)
class Batch:
    """What an update learns from: N rows in B chains of at most T steps.

    observation, action, policy_action, action_mask: leaves [N, ...] by their names. reward,
    behaviour_log_prob: float32 [N]. from_policy: float32 [N], 0 at fallback steps; policy_weight: float32
    [N], 0 also where there is no behaviour_log_prob (contracts B2). final_observation: leaves [F, ...], one
    row a chain that did not terminate; `final_chains` int64 [F] says which. lengths: int64 [B]. truncated:
    bool [B]. whole: how many chains are episodes from their first step to their end. Mask and policy_action
    leaves are keyed by the name of their action leaf.
    """

    observation: Leaves
    action: Leaves
    policy_action: Leaves
    action_mask: Leaves
    reward: NDArray[np.float32]
    behaviour_log_prob: NDArray[np.float32]
    from_policy: NDArray[np.float32]
    policy_weight: NDArray[np.float32]
    learner_update: NDArray[np.int64]
    final_observation: Leaves
    final_chains: NDArray[np.int64]
    lengths: NDArray[np.int64]
    truncated: NDArray[np.bool_]
    whole: int

    @property
    def steps(self) -> int:
        """N."""
        return len(self.reward)

    @property
    def chains(self) -> int:
        """B."""
        return len(self.lengths)

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """Where chain b has a step t, bool [T, B]."""
        held: NDArray[np.bool_] = np.arange(int(self.lengths.max()))[:, None] < self.lengths[None, :]
        return held

    def to_chains(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Rows [N] as a time-major array [T, B], 0 in the padding."""
        padded = np.zeros(self.mask.shape[::-1], dtype=np.float32)
        padded[self.mask.T] = rows
        return np.ascontiguousarray(padded.T)

    def to_rows(self, chains: NDArray[np.float32]) -> NDArray[np.float32]:
        """A time-major array [T, B] as rows [N]; the inverse of `to_chains`."""
        rows: NDArray[np.float32] = chains.T[self.mask.T]
        return rows

    def bootstrap(self, final_values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Values of the final observations [F] by chain [B]: 0 where it terminated."""
        values = np.zeros(self.chains, dtype=np.float32)
        values[self.final_chains] = final_values
        return values


def order(metadata: TrajectoryMetadata) -> tuple[int, int, int, int, int, str]:
    """The place of a segment in a batch (contracts F2)."""
    m = metadata
    return (m.rollout_index, m.client_index, m.actor_index, m.episode_index, m.segment_index, m.actor_id)


def chain_up(segments: Iterable[Segment]) -> list[Chain]:
    """Joins segments that follow each other in an episode; chains in the order of their first segments."""
    episodes: dict[str, list[Segment]] = {}
    for segment in segments:
        episodes.setdefault(segment.metadata.episode_id, []).append(segment)
    chains = [chain for episode in episodes.values() for chain in _split(episode)]
    return sorted(chains, key=lambda chain: order(chain[0].metadata))


def _split(episode: list[Segment]) -> list[Chain]:
    """The unbroken runs among the segments of one episode."""
    runs: list[list[Segment]] = []
    for segment in sorted(episode, key=lambda s: s.metadata.segment_index):
        if runs and follows(runs[-1][-1].metadata, segment.metadata):
            runs[-1].append(segment)
        else:
            runs.append([segment])
    return [tuple(run) for run in runs]


def follows(before: TrajectoryMetadata, after: TrajectoryMetadata) -> bool:
    """Whether `after` is the next segment of the same episode, without a gap."""
    return (
        before.episode_id == after.episode_id
        and before.segment_index + 1 == after.segment_index
        and before.first_step_index + before.steps == after.first_step_index
    )


def build_batch(segments: Sequence[Segment]) -> Batch:
    """Learner arrays of the segments, in any order given.

    Raises:
        InvalidTrajectory: a segment that did not terminate has no final observation.
        ValueError: no segments.
    """
    chains = chain_up(segments)
    ordered = [segment for chain in chains for segment in chain]
    columns = [segment.columns for segment in ordered]
    open_chains = [b for b, chain in enumerate(chains) if not chain[-1].metadata.terminated]
    return Batch(
        observation=_leaves(columns, lambda c: c.observation),
        action=_leaves(columns, lambda c: c.action),
        policy_action=_leaves(columns, lambda c: c.policy_action),
        action_mask=_leaves(columns, lambda c: c.action_mask),
        reward=np.concatenate([c.reward for c in columns]).astype(np.float32, copy=False),
        behaviour_log_prob=np.concatenate([_known_log_prob(c) for c in columns]),
        from_policy=np.concatenate([~c.fallback for c in columns]).astype(np.float32),
        policy_weight=np.concatenate([_policy_weight(c) for c in columns]),
        learner_update=np.concatenate([c.learner_update for c in columns]),
        final_observation=_final_leaves([chains[b][-1] for b in open_chains]),
        final_chains=np.array(open_chains, dtype=np.int64),
        lengths=np.array([sum(s.metadata.steps for s in chain) for chain in chains], dtype=np.int64),
        truncated=np.array([_truncated(chain[-1].metadata) for chain in chains], dtype=np.bool_),
        whole=sum(chain[0].metadata.first_step_index == 0 and chain[-1].ended for chain in chains),
    )


def _truncated(metadata: TrajectoryMetadata) -> bool:
    return metadata.truncated and not metadata.terminated


def _known_log_prob(columns: Columns) -> NDArray[np.float32]:
    """behaviour_log_prob with 0 where it is null; those rows have no weight."""
    known: NDArray[np.float32] = np.where(columns.behaviour_log_prob_valid, columns.behaviour_log_prob, 0.0)
    return known.astype(np.float32, copy=False)


def _policy_weight(columns: Columns) -> NDArray[np.float32]:
    weight: NDArray[np.bool_] = columns.behaviour_log_prob_valid & ~columns.fallback
    return weight.astype(np.float32)


def _leaves(columns: Sequence[Columns], of: Callable[[Columns], Leaves]) -> Leaves:
    """The leaves of all segments, concatenated. A mask that a segment lacks allowed everything."""
    shapes = {name: array.shape[1:] for c in columns for name, array in of(c).items()}
    joined: Leaves = {}
    for name, shape in shapes.items():
        parts = [
            of(c)[name] if name in of(c) else np.ones((len(c.reward), *shape), dtype=np.bool_)
            for c in columns
        ]
        joined[name] = np.concatenate(parts)
    return joined


def _final_leaves(segments: Sequence[Segment]) -> Leaves:
    """The final observations of the segments, stacked; no leaves where there are no segments."""
    finals = []
    for segment in segments:
        if segment.final_observation is None:
            raise InvalidTrajectory(
                f"trajectory {segment.metadata.trajectory_id} did not terminate and has no final_observation"
            )
        finals.append(segment.final_observation.observation)
    return {name: np.stack([final[name] for final in finals]) for name in (finals[0] if finals else {})}
