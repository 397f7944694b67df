"""Checks of values against specs: on the client before anything is recorded, at ingest before it is stored.

The client drives `check_observation` and `check_action_mask` on its hot path (B = rows, actors of a call);
ingest drives `validate_schema` and `validate_trajectory` (T = steps). Masks are keyed by the action leaf's
name, as in `Columns`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relayrl_shared.errors import InvalidActionMask, InvalidObservation, InvalidTrajectory, SpecMismatch
from relayrl_shared.spaces import ActionSpec, LeafSpec, ObservationSpec
from relayrl_shared.trajectory import Columns, FinalObservation, RecordSchema, Trajectory

Arrays = Mapping[str, NDArray[Any]]

_NAN_REMEDY = "repair the environment, or create the run with allow_nan"
_MAX_ELEMENTS = (1 << 31) - 1
_LOG_PROB_TOLERANCE = 1e-4
_DTYPES = frozenset(
    ["bool", "float16", "float32", "float64"]
    + [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
)


# -- the client's hot path ----------------------------------------------------------------------------------


def check_observation(spec: ObservationSpec, leaves: Arrays, rows: int, allow_nan: bool = False) -> None:
    """Checks the observations of B actors.

    Args:
        spec: the run's observation spec.
        leaves: leaf name → [B, *shape].
        rows: B.
        allow_nan: let NaN and infinity pass.

    Raises:
        SpecMismatch: a leaf is missing, unknown, or of another shape or dtype; names it.
        InvalidObservation: NaN or infinity where not allowed, or a discrete value outside of its range.
    """
    if len(leaves) != len(spec.leaves):
        unknown = sorted(set(leaves) - {leaf.name for leaf in spec.leaves})
        if unknown:
            raise SpecMismatch(f"no such observation leaves: {unknown}")
    for leaf in spec.leaves:
        array = leaves.get(leaf.name)
        if array is None:
            raise SpecMismatch(f"{leaf.name} is missing; there are {sorted(leaves)}")
        if array.shape != (rows, *leaf.shape) or array.dtype != leaf.numpy_dtype:
            found = f"{array.dtype}{list(array.shape)}"
            raise SpecMismatch(f"{leaf.name} is {found}, expected {leaf.dtype}{[rows, *leaf.shape]}")
        if array.dtype.kind == "f":
            if not allow_nan and not np.isfinite(array).all():
                raise InvalidObservation(f"{leaf.name}: {_describe_bad_float(array)}; {_NAN_REMEDY}")
        elif leaf.kind != "box" and not inside(leaf, array).all():
            raise InvalidObservation(f"{leaf.name}: {_describe_outside(leaf, array)}")


def check_action_mask(spec: ActionSpec, masked_leaves: tuple[str, ...], masks: Arrays, rows: int) -> None:
    """Checks the action masks of B actors. A masked leaf without a mask allows everything.

    Args:
        spec: the run's action spec.
        masked_leaves: the action leaves that the run masks.
        masks: action leaf name → bool [B, *mask_shape]; True = allowed.
        rows: B.

    Raises:
        InvalidActionMask: a mask of an unknown or unmasked leaf, of another shape or dtype, or one that
            allows nothing; names the leaf and the first bad row.
    """
    for name, mask in masks.items():
        if name not in masked_leaves:
            raise InvalidActionMask(f"the run does not mask {name!r}; it masks {list(masked_leaves)}")
        leaf = spec.leaf(name)
        shape = (rows, *(leaf.mask_shape or ()))
        if mask.shape != shape or mask.dtype != np.bool_:
            found = f"{mask.dtype}{list(mask.shape)}"
            raise InvalidActionMask(
                f"the mask of {name} is {found}, expected bool{list(shape)}, True = allowed"
            )
        allowing = mask_allows(leaf, mask)
        if not allowing.all():
            row = int(np.argmin(allowing))
            raise InvalidActionMask(
                f"the mask of {name} allows nothing in row {row}; allow at least one action"
            )


def mask_allows(leaf: LeafSpec, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether each row of a mask [N, *mask_shape] leaves a choice everywhere; bool [N]."""
    some: NDArray[np.bool_]
    if leaf.kind == "multi_discrete" and leaf.nvec:
        some = np.asarray(np.logical_or.reduceat(mask, _offsets(leaf), axis=1))
    elif leaf.kind == "multi_binary":
        some = np.asarray(mask.any(axis=2))
    else:
        return np.asarray(mask.any(axis=1))
    return np.asarray(some.all(axis=1))


def inside(leaf: LeafSpec, values: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each row of values [N, *shape] lies in the leaf's space (NaN does not); bool [N]."""
    low, high = leaf.bounds()
    fits: NDArray[np.bool_] = (values >= low) & (values <= high)
    return np.asarray(fits.reshape(len(values), -1).all(axis=1))


def _offsets(leaf: LeafSpec) -> NDArray[np.int64]:
    """Where each of the nvec begins in a mask of sum nvec."""
    return np.cumsum((0, *leaf.nvec[:-1]), dtype=np.int64)


def _describe_bad_float(array: NDArray[Any]) -> str:
    row = int(np.argmin(np.isfinite(array).reshape(len(array), -1).all(axis=1)))
    return f"{'NaN' if np.isnan(array[row]).any() else 'infinity'} in row {row}"


def _describe_outside(leaf: LeafSpec, array: NDArray[Any]) -> str:
    row = int(np.argmin(inside(leaf, array)))
    low, high = leaf.bounds()
    return f"{array[row].tolist()} in row {row} is outside of {low.tolist()} … {high.tolist()}"


# -- schemas ------------------------------------------------------------------------------------------------


def validate_schema(schema: RecordSchema) -> None:
    """Checks a record schema that came from elsewhere, before anything is laid out by it.

    Raises:
        InvalidTrajectory: (reason `schema`) a dtype, shape, name or number in it cannot be.
    """
    names: list[str] = []
    for spec in (schema.observation, schema.action):
        for leaf in spec.leaves:
            _require(leaf.name.split(".")[0] == spec.root, f"a leaf of {spec.root} is named {leaf.name}")
            _validate_leaf(leaf)
            names.append(leaf.name)
    _require(len(set(names)) == len(names), "two leaves have one name")
    _require(bool(schema.observation.leaves), "there is no observation leaf")
    maskable = {leaf.name for leaf in schema.action.leaves if leaf.kind != "box"}
    _require(set(schema.masked_leaves) <= maskable, "a masked leaf is continuous or unknown")
    _require(len(set(schema.masked_leaves)) == len(schema.masked_leaves), "a leaf is masked twice")
    for name, dtype in schema.aux.items():
        _require(dtype in _DTYPES, f"aux.{name} has dtype {dtype}")


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise InvalidTrajectory(f"the schema is not valid: {what}", "schema")


def _validate_leaf(leaf: LeafSpec) -> None:
    _require(leaf.dtype in _DTYPES, f"{leaf.name} has dtype {leaf.dtype}")
    _require(all(0 <= axis <= _MAX_ELEMENTS for axis in leaf.shape), f"{leaf.name} has shape {leaf.shape}")
    _require(leaf.size <= _MAX_ELEMENTS, f"{leaf.name} has {leaf.size} elements")
    if leaf.kind == "box":
        for bound in (leaf.low, leaf.high):
            _require(bound is None or len(bound) in (1, leaf.size), f"{leaf.name} has {bound} as a bound")
    elif leaf.kind != "multi_binary":
        _require(len(leaf.nvec) == len(leaf.start) == leaf.size, f"{leaf.name}: nvec, start and shape differ")
        _require(all(n > 0 for n in leaf.nvec), f"{leaf.name} has a choice of nothing")
        _require(sum(leaf.nvec) <= _MAX_ELEMENTS, f"{leaf.name} has {sum(leaf.nvec)} choices")
    if leaf.kind != "box":
        _require(leaf.dtype[0] in "iu", f"{leaf.name} is {leaf.kind} of dtype {leaf.dtype}")


# -- finished trajectories ----------------------------------------------------------------------------------


def validate_trajectory(schema: RecordSchema, trajectory: Trajectory, allow_nan: bool = False) -> None:
    """Checks a decoded trajectory by its meaning; the codec has checked columns, dtypes and shapes.

    Raises:
        InvalidTrajectory: with the reason `steps_mismatch`, `reward_not_finite`, `environment_step`,
            `version_range`, `final_observation_missing`, `nan`, `observation_outside_space`,
            `action_outside_space`, `policy_action_not_finite`, `mask_allows_nothing`, `action_masked`,
            `log_prob_not_finite`, `log_prob_positive` or `value_not_finite`.
    """
    metadata, columns, final = trajectory.metadata, trajectory.columns, trajectory.final_observation
    _reject(len(columns.reward) != metadata.steps, "steps_mismatch", "metadata and columns differ in steps")
    _reject(final is None and not metadata.terminated, "final_observation_missing", "it did not terminate")
    _validate_scalars(columns)
    _validate_observations(schema, columns.observation, allow_nan)
    _validate_actions(schema, columns)
    _validate_outputs(schema, columns)
    if final is not None:
        _validate_final(schema, final, allow_nan)


def _reject(bad: bool | np.bool_, reason: str, detail: str) -> None:
    if bad:
        raise InvalidTrajectory(f"{reason}: {detail}", reason)


def _validate_scalars(columns: Columns) -> None:
    _reject(not np.isfinite(columns.reward).all(), "reward_not_finite", "a reward is NaN or infinite")
    ticks = columns.environment_step
    backwards = ticks[0] < 0 or bool((ticks[1:] <= ticks[:-1]).any())
    _reject(backwards, "environment_step", "the ticks do not grow")
    _reject(columns.learner_update.min() < 0, "version_range", "learner_update is negative")
    versions = columns.policy_version[columns.policy_version_valid]
    _reject(bool((versions < 0).any()), "version_range", "policy_version is negative")


def _validate_observations(schema: RecordSchema, leaves: Arrays, allow_nan: bool) -> None:
    """Leaves of [T, *shape]."""
    for leaf in schema.observation.leaves:
        array = leaves[leaf.name]
        if array.dtype.kind == "f":
            _reject(not allow_nan and not np.isfinite(array).all(), "nan", f"{leaf.name} is not finite")
        elif leaf.kind != "box":
            _reject(not inside(leaf, array).all(), "observation_outside_space", leaf.name)


def _validate_actions(schema: RecordSchema, columns: Columns) -> None:
    for leaf in schema.action.leaves:
        action = columns.action[leaf.name]
        _reject(not inside(leaf, action).all(), "action_outside_space", leaf.name)
        mask = columns.action_mask.get(leaf.name)
        if mask is not None:
            _reject(not mask_allows(leaf, mask).all(), "mask_allows_nothing", leaf.name)
            _reject(not _allowed(leaf, action, mask).all(), "action_masked", leaf.name)
    for name, values in columns.policy_action.items():
        _reject(not np.isfinite(values).all(), "policy_action_not_finite", name)


def _allowed(leaf: LeafSpec, action: NDArray[Any], mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether the mask allows each element of the actions [T, *shape]; bool [T, elements]."""
    flat = action.reshape(len(action), -1).astype(np.int64)
    rows = np.arange(len(flat))[:, None]
    if leaf.kind == "multi_binary":
        allowed: NDArray[np.bool_] = mask[rows, np.arange(flat.shape[1]), flat]
    else:
        allowed = mask[rows, flat - np.array(leaf.start) + _offsets(leaf)]
    return allowed


def _validate_outputs(schema: RecordSchema, columns: Columns) -> None:
    valid = columns.behaviour_log_prob_valid
    log_probs = columns.behaviour_log_prob[valid]
    _reject(not np.isfinite(log_probs).all(), "log_prob_not_finite", "behaviour_log_prob")
    discrete = all(leaf.kind != "box" for leaf in schema.action.leaves)
    too_high = discrete and bool((log_probs > _LOG_PROB_TOLERANCE).any())
    _reject(too_high, "log_prob_positive", "a probability of discrete actions is above 1")
    for name, values in columns.leaf_log_prob.items():
        _reject(not np.isfinite(values[valid]).all(), "log_prob_not_finite", name)
    _reject(not np.isfinite(columns.value[columns.value_valid]).all(), "value_not_finite", "value")


def _validate_final(schema: RecordSchema, final: FinalObservation, allow_nan: bool) -> None:
    _validate_observations(schema, {name: leaf[None] for name, leaf in final.observation.items()}, allow_nan)
