"""Memory for the steps of open segments, driven by the recorder.

One step is one row of a structured array, so that recording one actor's step is a single copy of a few dozen
bytes; the steps of many actors are one indexed write a field. Rows come in pages that are handed to actors as
their segments grow: memory follows what is recorded, never actors x maximum length (contracts A6). Closing a
segment gathers its rows into the columns of the trajectory record.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relayrl_shared.errors import ConfigError, Overloaded
from relayrl_shared.spaces import leaf_log_prob_name, mask_leaf_name, policy_action_name
from relayrl_shared.trajectory import Columns, FinalObservation, RecordSchema

GREEDY, FALLBACK, HAS_LOG_PROB, HAS_VALUE, HAS_VERSION = 1, 2, 4, 8, 16

_PAGE_BYTES = 16 * 1024
_MAX_SCRATCHES = 64
_HEADER = ("policy_version", "learner_update", "environment_step")
AUX_PREFIX = "aux."

Values = Mapping[str, NDArray[Any]]
_Field = tuple[str, "np.dtype[Any]", tuple[int, ...]]


def mask_shapes(schema: RecordSchema) -> dict[str, tuple[int, ...]]:
    """Shape of a row of the mask of every masked action leaf, by the action leaf's name."""
    return {
        leaf.name: leaf.mask_shape
        for leaf in schema.action.leaves
        if leaf.name in schema.masked_leaves and leaf.mask_shape is not None
    }


class StepLayout:
    """The structured dtype of one step, and what belongs to which part of the record.

    Attributes:
        dtype: the row; larger items come first, so that nothing is padded but the end.
        values: the fields that a step's writer gives, in the order of the row.
        observation, action: field names, which are the leaves' names.
        policy_action, action_mask, leaf_log_prob: key of the record (the action leaf's name) → field name.
        aux: name → field name.
    """

    def __init__(self, schema: RecordSchema) -> None:
        leaves = schema.action.leaves
        boxes = [leaf for leaf in leaves if leaf.kind == "box"]
        masks = mask_shapes(schema)
        self.schema = schema
        self.observation = tuple(leaf.name for leaf in schema.observation.leaves)
        self.action = tuple(leaf.name for leaf in leaves)
        self.policy_action = {leaf.name: policy_action_name(leaf.name) for leaf in boxes}
        self.action_mask = {name: mask_leaf_name(name) for name in masks}
        hybrid = leaves if schema.leaf_log_probs else ()
        self.leaf_log_prob = {leaf.name: leaf_log_prob_name(leaf.name) for leaf in hybrid}
        self.aux = {name: AUX_PREFIX + name for name in schema.aux}
        single = np.dtype(np.float32)
        fields: list[_Field] = [
            *((leaf.name, leaf.numpy_dtype, leaf.shape) for leaf in schema.observation.leaves),
            *((leaf.name, leaf.numpy_dtype, leaf.shape) for leaf in leaves),
            *((policy_action_name(leaf.name), single, leaf.shape) for leaf in boxes),
            *((mask_leaf_name(name), np.dtype(np.bool_), shape) for name, shape in masks.items()),
            *((name, single, ()) for name in self.leaf_log_prob.values()),
            *((AUX_PREFIX + name, np.dtype(dtype), ()) for name, dtype in schema.aux.items()),
            *((name, single, ()) for name in ("reward", "behaviour_log_prob", "value")),
        ]
        fields.sort(key=lambda field: -field[1].itemsize)
        self.values = tuple(name for name, _, _ in fields)
        header: list[_Field] = [(name, np.dtype(np.int64), ()) for name in _HEADER]
        self.dtype = np.dtype([*header, *fields, ("flags", np.dtype(np.uint8), ())], align=True)
        self.padding = b"\0" * _bytes_after_last_field(self.dtype)


def _bytes_after_last_field(dtype: np.dtype[Any]) -> int:
    names, fields = dtype.names, dtype.fields
    if not names or fields is None:
        return 0
    last, offset = fields[names[-1]][:2]
    return dtype.itemsize - offset - last.itemsize


@dataclass(frozen=True, slots=True)
class StepTags:
    """What all rows of one call share: the version that acted and the flags of the step."""

    policy_version: int
    learner_update: int
    flags: int


@dataclass(frozen=True, slots=True)
class StorageStatistics:
    """Pages are of `page_bytes`; `refused_total` counts allocations beyond the limit."""

    pages_used: int
    pages_limit: int
    page_bytes: int
    refused_total: int


@dataclass(frozen=True, slots=True)
class _Scratch:
    """Rows side by side, filled field by field and then scattered in one pass over the pages."""

    fields: dict[str, NDArray[Any]]
    plain_rows: NDArray[Any]

    @classmethod
    def of(cls, layout: StepLayout, rows: int) -> _Scratch:
        block = np.zeros(rows, layout.dtype)
        fields = {name: block[name] for name in layout.dtype.names or ()}
        return cls(fields, block.view(np.dtype((np.void, layout.dtype.itemsize))))


class StepStorage:
    """Pages of step rows under a byte limit.

    Args:
        layout: the row.
        max_segment_steps: a page never holds more, since a segment cannot.
        limit_bytes: the most that all pages may take. Address space of that size is reserved at once; the
            operating system gives memory only as pages are first used.

    Not thread-safe: the recorder holds its lock around every call.

    Raises:
        ConfigError: not even one page fits under the limit.
    """

    def __init__(self, layout: StepLayout, *, max_segment_steps: int, limit_bytes: int) -> None:
        row_bytes = layout.dtype.itemsize
        self.layout = layout
        # Odd, so that the rows of many actors do not fall into the same few lines of the processor's caches.
        self.page_steps = max(1, min(max_segment_steps, _PAGE_BYTES // row_bytes)) | 1
        pages = limit_bytes // (row_bytes * self.page_steps)
        if pages < 1:
            raise ConfigError(
                f"max_open_segment_bytes is {limit_bytes}; one page of steps takes "
                f"{row_bytes * self.page_steps}: raise it"
            )
        memory: NDArray[np.uint8] = np.empty(pages * self.page_steps * row_bytes, np.uint8)
        self._bytes = memory.data.cast("B")
        self._rows = memory.view(layout.dtype)
        self._plain_rows = memory.view(np.dtype((np.void, row_bytes)))
        self._reward = self._rows["reward"]
        self._scratch: dict[int, _Scratch] = {}
        self._row_bytes = row_bytes
        self._header = struct.Struct("=qqq").pack
        self._pages = pages
        self._fresh = 0  # pages from here on were never used
        self._free: list[int] = []
        self._refused_total = 0

    def allocate(self, pages: int) -> list[int]:
        """First rows of that many pages, all or none.

        Raises:
            Overloaded: the byte limit is reached.
        """
        available = len(self._free) + self._pages - self._fresh
        if pages > available:
            self._refused_total += 1
            raise Overloaded(
                f"the steps of open segments fill max_open_segment_bytes ({self._pages} pages of "
                f"{self._row_bytes * self.page_steps} bytes): end episodes, shorten segments or raise it"
            )
        taken = [self._free.pop() for _ in range(min(pages, len(self._free)))]
        while len(taken) < pages:
            taken.append(self._fresh * self.page_steps)
            self._fresh += 1
        return taken

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back."""
        self._free.extend(pages)

    def write(
        self, slots: NDArray[np.int64], ticks: int | NDArray[np.int64], tags: StepTags, values: Values
    ) -> None:
        """Write one step a slot. `values` has an array [slots, *shape] for each of `layout.values`.

        Args:
            slots: rows to write, int64 [B].
            ticks: of the environment instances: one for all, or int64 [B].
            tags: what all rows share.
            values: the rest.
        """
        if len(slots) == 1:
            self.write_row(slots.item(), ticks if isinstance(ticks, int) else ticks.item(), tags, values)
            return
        scratch = self._scratch.get(len(slots))
        if scratch is None:
            if len(self._scratch) >= _MAX_SCRATCHES:
                self._scratch.clear()
            scratch = self._scratch[len(slots)] = _Scratch.of(self.layout, len(slots))
        fields = scratch.fields
        fields["policy_version"][...] = tags.policy_version
        fields["learner_update"][...] = tags.learner_update
        fields["environment_step"][...] = ticks
        fields["flags"][...] = tags.flags
        for name in self.layout.values:
            fields[name][...] = values[name]
        self._plain_rows[slots] = scratch.plain_rows

    def write_row(self, slot: int, tick: int, tags: StepTags, values: Values) -> None:
        """One row as one copy: indexing every field would cost four times as much."""
        parts = [self._header(tags.policy_version, tags.learner_update, tick)]
        parts += [values[name].tobytes() for name in self.layout.values]
        parts.append(bytes((tags.flags,)))
        parts.append(self.layout.padding)
        begin = slot * self._row_bytes
        self._bytes[begin : begin + self._row_bytes] = b"".join(parts)

    def set_rewards(self, slots: NDArray[np.int64], rewards: float | NDArray[np.float32]) -> None:
        """Write the rewards of steps that were written before: one for all, or float32 [B]."""
        self._reward[slots] = rewards

    def set_reward(self, slot: int, reward: float | NDArray[np.float32]) -> None:
        """Write the reward of one step: a number or float32 [1]."""
        self._reward[slot] = reward if isinstance(reward, float | int) else reward[0]

    def final_observation(self, slot: int) -> FinalObservation:
        """What the actor saw at a recorded step, for a segment that ends before it (contracts A5)."""
        row = self._rows[slot]
        return FinalObservation(
            observation={name: np.array(row[name]) for name in self.layout.observation},
            action_mask={key: np.array(row[name]) for key, name in self.layout.action_mask.items()},
        )

    def gather(self, segments: Sequence[tuple[Sequence[int], int]]) -> list[Columns]:
        """Copy segments out, each given as (its pages in order, steps >= 1); one call shares its blocks."""
        slots = np.concatenate([self._slots(pages, steps) for pages, steps in segments])
        rows = self._plain_rows[slots].view(self.layout.dtype)
        block = {name: np.ascontiguousarray(rows[name]) for name in self.layout.dtype.names or ()}
        flags = block.pop("flags")
        whole = self._columns(block, flags)
        if len(segments) == 1:
            return [whole]
        ends = np.cumsum([steps for _, steps in segments]).tolist()
        return [_slice(whole, end - steps, end) for (_, steps), end in zip(segments, ends, strict=True)]

    def statistics(self) -> StorageStatistics:
        """How full the storage is."""
        return StorageStatistics(
            pages_used=self._fresh - len(self._free),
            pages_limit=self._pages,
            page_bytes=self._row_bytes * self.page_steps,
            refused_total=self._refused_total,
        )

    def _slots(self, pages: Sequence[int], steps: int) -> NDArray[np.int64]:
        if len(pages) == 1:
            return np.arange(pages[0], pages[0] + steps)
        starts = np.asarray(pages, np.int64)[:, None]
        return (starts + np.arange(self.page_steps)).ravel()[:steps]

    def _columns(self, block: dict[str, NDArray[Any]], flags: NDArray[np.uint8]) -> Columns:
        layout = self.layout
        return Columns(
            observation={name: block[name] for name in layout.observation},
            action={name: block[name] for name in layout.action},
            policy_action={key: block[name] for key, name in layout.policy_action.items()},
            action_mask={key: block[name] for key, name in layout.action_mask.items()},
            reward=block["reward"],
            behaviour_log_prob=block["behaviour_log_prob"],
            behaviour_log_prob_valid=(flags & HAS_LOG_PROB) != 0,
            leaf_log_prob={key: block[name] for key, name in layout.leaf_log_prob.items()},
            value=block["value"],
            value_valid=(flags & HAS_VALUE) != 0,
            policy_version=block["policy_version"],
            policy_version_valid=(flags & HAS_VERSION) != 0,
            learner_update=block["learner_update"],
            greedy=(flags & GREEDY) != 0,
            fallback=(flags & FALLBACK) != 0,
            environment_step=block["environment_step"],
            aux={key: block[name] for key, name in layout.aux.items()},
        )


def _slice(columns: Columns, begin: int, end: int) -> Columns:
    """Steps begin … end - 1 as views. Written out, since a rollout of many actors ends here all at once."""
    part = slice(begin, end)
    return Columns(
        observation={name: array[part] for name, array in columns.observation.items()},
        action={name: array[part] for name, array in columns.action.items()},
        policy_action={name: array[part] for name, array in columns.policy_action.items()},
        action_mask={name: array[part] for name, array in columns.action_mask.items()},
        reward=columns.reward[part],
        behaviour_log_prob=columns.behaviour_log_prob[part],
        behaviour_log_prob_valid=columns.behaviour_log_prob_valid[part],
        leaf_log_prob={name: array[part] for name, array in columns.leaf_log_prob.items()},
        value=columns.value[part],
        value_valid=columns.value_valid[part],
        policy_version=columns.policy_version[part],
        policy_version_valid=columns.policy_version_valid[part],
        learner_update=columns.learner_update[part],
        greedy=columns.greedy[part],
        fallback=columns.fallback[part],
        environment_step=columns.environment_step[part],
        aux={name: array[part] for name, array in columns.aux.items()},
    )
