"""Turns the arguments of a call into checked arrays, before anything is written; driven by the coordinator.

All rows are checked first: one bad row fails the call, and the error names the actor, the leaf and the remedy
(contracts A8). B = actors of the call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from relayrl_client.actors import Selection
from relayrl_client.storage import mask_shapes
from relayrl_shared.errors import (
    ContractError,
    InvalidActionMask,
    InvalidObservation,
    InvalidReward,
    SpecMismatch,
)
from relayrl_shared.spaces import LeafSpec, mask_leaf_name
from relayrl_shared.trajectory import RecordSchema
from relayrl_shared.validation import check_action_mask, check_observation

Arrays = dict[str, NDArray[Any]]

_FEW_NUMBERS = 64
_FLOAT32_MAX = float(np.finfo(np.float32).max)


class Rewards(NamedTuple):
    """Rewards of B actors: one number for all or float32 [B].

    given: None, or bool [B]: False where None was passed for that actor, whose value is then 0.
    """

    values: float | NDArray[np.float32]
    given: NDArray[np.bool_] | None = None


class ObservationReader:
    """Reads observations in the structure of the space: stacked by actor, or one for all.

    Args:
        schema: names the leaves.
        allow_nan: let NaN and infinity pass.
    """

    def __init__(self, schema: RecordSchema, *, allow_nan: bool) -> None:
        self._spec = schema.observation
        self._allow_nan = allow_nan
        self._names = {leaf.name for leaf in schema.observation.leaves}
        first = schema.observation.leaves[0]
        self._single = first.name if len(self._names) == 1 and not first.path else None
        self._shape, self._dtype = first.shape, first.numpy_dtype
        float_leaves = [leaf for leaf in schema.observation.leaves if leaf.numpy_dtype.kind == "f"]
        self._float_leaves = [] if allow_nan else [leaf.name for leaf in float_leaves]
        self._ranged = any(leaf.kind != "box" for leaf in schema.observation.leaves)

    def read(self, value: Any, selection: Selection) -> Arrays:
        """Leaf name → array [B, *shape] of the leaf's dtype.

        Raises:
            SpecMismatch: a shape, dtype or structure that is not the space's.
            InvalidObservation: NaN or infinity where not allowed, or a value outside of a discrete range.
        """
        leaves = self._flatten(value, len(selection))
        if self._ranged:
            self._check(leaves, selection)
            return leaves
        for name in self._float_leaves:
            if not self._is_finite(leaves[name]):
                self._check(leaves, selection)
        return leaves

    def _flatten(self, value: Any, rows: int) -> Arrays:
        name = self._single
        if name is not None and type(value) is np.ndarray and value.dtype == self._dtype:
            if value.shape == (rows, *self._shape):
                return {name: value}
            if rows == 1 and value.shape == self._shape:
                return {name: value[None]}
        if isinstance(value, Mapping) and value.keys() == self._names:
            stacked = {name: np.asarray(array) for name, array in value.items()}
            check_observation(self._spec, stacked, rows, allow_nan=True)
            return stacked
        if self._is_one_row(value):
            row = self._spec.flatten(value)
            return {name: np.repeat(array[None], rows, axis=0) for name, array in row.items()}
        return self._spec.flatten_batch(value, rows)

    def _is_one_row(self, value: Any) -> bool:
        """Whether it lacks the axis of the actors, and so is one observation for all."""
        first = self._spec.leaves[0]
        try:
            for key in first.path:
                value = value[key]
            return np.ndim(value) == len(first.shape)
        except (KeyError, IndexError, TypeError, ValueError):
            return False  # flatten_batch says what is wrong

    def _is_finite(self, array: NDArray[Any]) -> bool:
        """Whether no element is NaN or infinite; maybe False where a sum overflows: `_check` looks again.

        A few numbers are added faster by Python than numpy begins to reduce them.
        """
        if array.size <= _FEW_NUMBERS:
            return math.isfinite(sum(array.ravel().tolist()))
        return bool(np.isfinite(array).all())

    def _check(self, leaves: Arrays, selection: Selection) -> None:
        def check_row(row: slice) -> None:
            part = {name: array[row] for name, array in leaves.items()}
            check_observation(self._spec, part, 1, self._allow_nan)

        try:
            check_observation(self._spec, leaves, len(selection), self._allow_nan)
        except InvalidObservation:
            _blame(check_row, selection)
            raise


class MaskReader:
    """Reads action masks: True = allowed; None allows everything.

    A mask is an array [B, sum nvec] ([B, n, 2] for multi_binary; for multi_discrete also a tuple of parts
    [B, n]), or a mapping by action leaf or by mask leaf where several leaves are masked. Its dtype is bool,
    or an integer one with 0 and 1 as Gymnasium gives them.
    """

    def __init__(self, schema: RecordSchema) -> None:
        self._spec = schema.action
        self._masked = tuple(mask_shapes(schema))
        self._shapes = mask_shapes(schema)
        self._leaves: list[LeafSpec] = [leaf for leaf in schema.action.leaves if leaf.name in self._shapes]

    @property
    def is_masked(self) -> bool:
        """Whether masks are recorded."""
        return bool(self._leaves)

    def read(self, value: Any, selection: Selection, *, check: bool = True) -> Arrays:
        """Mask leaf name (`action_mask.gripper`) → bool [B, *mask_shape] for each masked leaf.

        Args:
            value: the mask.
            selection: the actors.
            check: False for the mask of a final observation, which may allow nothing.

        Raises:
            InvalidActionMask: it allows nothing somewhere, has a wrong shape or dtype, or none is recorded.
        """
        rows = len(selection)
        if not self._leaves:
            if value is not None:
                raise InvalidActionMask(
                    "this agent records no action masks: build it with masked_leaves to pass them"
                )
            return {}
        if value is None:
            return {
                mask_leaf_name(name): np.ones((rows, *shape), np.bool_)
                for name, shape in self._shapes.items()
            }
        masks = {leaf.name: self._as_mask(leaf, self._part(value, leaf), rows) for leaf in self._leaves}
        if check:
            self._check(masks, selection)
        return {mask_leaf_name(name): mask for name, mask in masks.items()}

    def _part(self, value: Any, leaf: LeafSpec) -> Any:
        """The mask of one leaf out of what was passed."""
        if isinstance(value, Mapping):
            for key in (leaf.name, mask_leaf_name(leaf.name)):
                if key in value:
                    return value[key]
        for step in leaf.path:
            try:
                value = value[step]
            except (KeyError, IndexError, TypeError) as exc:
                raise InvalidActionMask(f"there is no mask for {leaf.name}: pass one by that name") from exc
        return value

    def _as_mask(self, leaf: LeafSpec, value: Any, rows: int) -> NDArray[np.bool_]:
        shape = self._shapes[leaf.name]
        if isinstance(value, tuple) and leaf.kind == "multi_discrete":
            value = np.concatenate(value, axis=-1)  # Gymnasium's masks of MultiDiscrete: one part a choice
        array = np.asarray(value)
        if array.shape == shape:
            array = np.repeat(array[None], rows, axis=0)
        if array.shape != (rows, *shape):
            raise InvalidActionMask(
                f"the mask of {leaf.name} has shape {array.shape}, expected {(rows, *shape)}: a row an actor"
            )
        if array.dtype == np.bool_:
            return array
        if array.dtype.kind not in "iu" or ((array != 0) & (array != 1)).any():
            raise InvalidActionMask(
                f"the mask of {leaf.name} is of {array.dtype}: pass bool, True = allowed (or 0 and 1)"
            )
        return array.astype(np.bool_)

    def _check(self, masks: dict[str, NDArray[np.bool_]], selection: Selection) -> None:
        def check_row(row: slice) -> None:
            part = {name: mask[row] for name, mask in masks.items()}
            check_action_mask(self._spec, self._masked, part, 1)

        try:
            check_action_mask(self._spec, self._masked, masks, len(selection))
        except InvalidActionMask:
            _blame(check_row, selection)
            raise


def read_rewards(value: Any, selection: Selection) -> Rewards | None:
    """Rewards of B actors, or None where none was passed.

    Args:
        value: None, one number for all, or B numbers (None among them for actors that have none).
        selection: the actors.

    Raises:
        InvalidReward: not finite, not a number, or not one an actor.
    """
    if value is None:
        return None
    if type(value) is float or type(value) is int:
        if not -_FLOAT32_MAX <= value <= _FLOAT32_MAX:
            raise InvalidReward(f"the reward {value} is not a finite float32: repair the environment")
        return Rewards(value)
    return _reward_array(value, selection)


def _reward_array(value: Any, selection: Selection) -> Rewards | None:
    rows = len(selection)
    given = None
    if isinstance(value, Sequence) and any(reward is None for reward in value):
        given = np.array([reward is not None for reward in value], np.bool_)
        value = [0.0 if reward is None else reward for reward in value]
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as exc:
        raise InvalidReward(f"the rewards are no numbers: {exc}") from exc
    if array.dtype.kind not in "fiub" or array.shape not in ((), (rows,)):
        raise InvalidReward(
            f"the rewards are {array.dtype}{list(array.shape)}: pass one number an actor, {rows} here"
        )
    array = np.broadcast_to(array, (rows,)) if array.shape != (rows,) else array
    if not np.abs(array).max() <= _FLOAT32_MAX:  # written so that NaN fails it too
        row = int(np.argmin(np.abs(array) <= _FLOAT32_MAX))
        raise InvalidReward(
            f"the reward of actor {selection.ids[row]} (row {row}) is not a finite float32: "
            "repair the environment"
        )
    if given is not None and not given.any():
        return None
    return Rewards(array.astype(np.float32), given)


def read_aux(value: Mapping[str, Any] | None, schema: RecordSchema, rows: int) -> Arrays:
    """The auxiliary columns of a step: name → array [B] of the schema's dtype.

    Raises:
        SpecMismatch: a name is unknown or missing, or a column has another shape or dtype.
    """
    value = value or {}
    if value.keys() != schema.aux.keys():
        differing = sorted(value.keys() ^ schema.aux.keys())
        raise SpecMismatch(
            f"aux columns {differing} are unknown or missing; the agent has {sorted(schema.aux)}"
        )
    columns = {}
    for name, dtype in schema.aux.items():
        array = np.asarray(value[name])
        if array.shape not in ((), (rows,)) or not np.can_cast(array.dtype, dtype, "same_kind"):
            raise SpecMismatch(
                f"aux.{name} is {array.dtype}{list(array.shape)}, expected {dtype}[{rows}]: a number an actor"
            )
        columns[name] = np.broadcast_to(array.astype(dtype), (rows,))
    return columns


def _blame(check_row: Callable[[slice], None], selection: Selection) -> None:
    """Raise the error again for the first row that has it, with its actor's id."""
    for row, actor_id in enumerate(selection.ids):
        try:
            check_row(slice(row, row + 1))
        except ContractError as exc:
            raise type(exc)(f"actor {actor_id} (row {row} of the call): {exc}") from None
