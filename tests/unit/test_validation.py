"""Validation: every rule refuses by name, and lets everything else pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from relayrl_shared.errors import InvalidActionMask, InvalidObservation, InvalidTrajectory, SpecMismatch
from relayrl_shared.spaces import ActionSpec, LeafSpec, ObservationSpec
from relayrl_shared.testing.trajectories import make_metadata, make_trajectory, small_schema
from relayrl_shared.trajectory import RecordSchema, Trajectory
from relayrl_shared.validation import (
    check_action_mask,
    check_observation,
    inside,
    validate_schema,
    validate_trajectory,
)

OBSERVATION = ObservationSpec.from_gymnasium(
    spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (2, 2), np.uint8),
            "room": spaces.Discrete(3),
            "speed": spaces.Box(-1, 1, ()),
        }
    )
)
ACTION = ActionSpec.from_gymnasium(
    spaces.Dict(
        {
            "aim": spaces.Box(-1, 1, (2,)),
            "buttons": spaces.MultiBinary(2),
            "move": spaces.Discrete(3, start=1),
            "pair": spaces.MultiDiscrete([2, 3], start=[0, -1]),
        }
    )
)
MASKED = ("action.buttons", "action.move", "action.pair")
HYBRID = RecordSchema(observation=OBSERVATION, action=ACTION, masked_leaves=MASKED, leaf_log_probs=True)


def observation(**changes: Any) -> dict[str, Any]:
    """Two good rows, with changes."""
    leaves: dict[str, Any] = {
        "observation.camera": np.zeros((2, 2, 2), np.uint8),
        "observation.room": np.array([0, 2]),
        "observation.speed": np.array([0.0, 7.0], np.float32),
    }
    return {**leaves, **{f"observation.{name}": value for name, value in changes.items()}}


def test_good_observation_passes() -> None:
    """Values outside of a box's bounds are the environment's affair."""
    check_observation(OBSERVATION, observation(), 2)


@pytest.mark.parametrize(
    ("changes", "error", "names"),
    [
        ({"camera": np.zeros((2, 2, 3), np.uint8)}, SpecMismatch, r"observation.camera is uint8\[2, 2, 3\]"),
        ({"camera": np.zeros((2, 2, 2))}, SpecMismatch, "expected uint8"),
        ({"speed": np.zeros(3, np.float32)}, SpecMismatch, "observation.speed"),
        ({"lidar": np.zeros(2)}, SpecMismatch, r"no such observation leaves: \['observation.lidar'\]"),
        ({"speed": np.array([0, np.nan], np.float32)}, InvalidObservation, "NaN in row 1; .*allow_nan"),
        ({"speed": np.array([np.inf, 0], np.float32)}, InvalidObservation, "infinity in row 0"),
        ({"room": np.array([0, 3])}, InvalidObservation, "observation.room: 3 in row 1 is outside of 0 … 2"),
    ],
)
def test_bad_observation_is_refused(changes: dict[str, Any], error: type[Exception], names: str) -> None:
    """The error names the leaf, the row and the remedy."""
    with pytest.raises(error, match=names):
        check_observation(OBSERVATION, observation(**changes), 2)


def test_missing_observation_leaf_is_refused() -> None:
    """A leaf that is not there is named."""
    leaves = observation()
    del leaves["observation.room"]

    with pytest.raises(SpecMismatch, match=r"observation.room is missing"):
        check_observation(OBSERVATION, leaves, 2)


def test_nan_passes_where_the_run_allows_it() -> None:
    """allow_nan lets NaN and infinity through."""
    check_observation(
        OBSERVATION, observation(speed=np.array([np.nan, np.inf], np.float32)), 2, allow_nan=True
    )


def mask(*flags: Any) -> Any:
    """A bool array."""
    return np.array(flags, bool)


@pytest.mark.parametrize(
    ("masks", "names"),
    [
        ({"action.aim": mask([1, 1])}, "does not mask 'action.aim'"),
        ({"action.move": mask([1, 1], [1, 1])}, r"is bool\[2, 2\], expected bool\[2, 3\]"),
        ({"action.move": np.ones((2, 3), np.int8)}, r"is int8\[2, 3\]"),
        ({"action.move": mask([1, 0, 0], [0, 0, 0])}, "action.move allows nothing in row 1"),
        ({"action.pair": mask([1, 0, 0, 0, 0], [1, 1, 1, 1, 1])}, "action.pair allows nothing in row 0"),
        (
            {"action.buttons": mask([[1, 0], [0, 1]], [[1, 1], [0, 0]])},
            "action.buttons allows nothing in row 1",
        ),
    ],
)
def test_bad_mask_is_refused(masks: dict[str, Any], names: str) -> None:
    """The error names the leaf and the row that has no choice."""
    with pytest.raises(InvalidActionMask, match=names):
        check_action_mask(ACTION, MASKED, masks, 2)


def test_good_masks_pass() -> None:
    """One choice in every factor is enough; leaves without a mask allow everything."""
    check_action_mask(ACTION, MASKED, {"action.pair": mask([1, 0, 0, 0, 1], [0, 1, 1, 0, 0])}, 2)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(list(ACTION.leaves)), st.integers(0, 2**31))
def test_inside_agrees_with_gymnasium(leaf: LeafSpec, seed: int) -> None:
    """A row is inside exactly where Gymnasium's `contains` says so."""
    space = ActionSpec(leaves=(msgspec.structs.replace(leaf, path=()),)).to_gymnasium()
    rng = np.random.default_rng(seed)
    rows = rng.integers(-2, 4, (5, *leaf.shape)).astype(leaf.numpy_dtype)

    assert inside(leaf, rows).tolist() == [space.contains(row) for row in rows]


@pytest.mark.parametrize("schema", [small_schema(), small_schema(masked=True), HYBRID])
@pytest.mark.parametrize("seed", range(4))
def test_good_trajectory_passes(schema: RecordSchema, seed: int) -> None:
    """What a client records is accepted, masks and hybrids included."""
    validate_trajectory(schema, make_trajectory(schema, 6, seed))


def metadata(**changes: Any) -> Callable[[Trajectory], None]:
    """A change of metadata."""

    def change(trajectory: Trajectory) -> None:
        trajectory.metadata = msgspec.structs.replace(trajectory.metadata, **changes)

    return change


def column(name: str, value: Any, leaf: str | None = None, row: Any = 2) -> Callable[[Trajectory], None]:
    """A change of one row of one column."""

    def change(trajectory: Trajectory) -> None:
        array = getattr(trajectory.columns, name)
        (array if leaf is None else array[leaf])[row] = value

    return change


def both(*changes: Callable[[Trajectory], None]) -> Callable[[Trajectory], None]:
    """Several changes."""

    def change(trajectory: Trajectory) -> None:
        for each in changes:
            each(trajectory)

    return change


def masked(leaf: str, flags: Any, action: Any) -> Callable[[Trajectory], None]:
    """A mask in every row, and an action."""

    def change(trajectory: Trajectory) -> None:
        trajectory.columns.action_mask[leaf] = np.array([flags] * 6, bool)
        trajectory.columns.action[leaf][:] = action

    return change


def no_final(trajectory: Trajectory) -> None:
    """Takes the final observation away from a segment that goes on."""
    trajectory.final_observation = None
    trajectory.metadata = msgspec.structs.replace(trajectory.metadata, terminated=False)


def bad_final(trajectory: Trajectory) -> None:
    """NaN in the final observation."""
    assert trajectory.final_observation is not None
    trajectory.final_observation.observation["observation.speed"] = np.array(np.nan, np.float32)


def bad_policy_action(trajectory: Trajectory) -> None:
    """NaN in an unclipped action."""
    trajectory.columns.policy_action["action.aim"] = np.full((6, 2), np.nan, np.float32)


RULES: list[tuple[str, Callable[[Trajectory], None]]] = [
    ("steps_mismatch", metadata(steps=5)),
    ("final_observation_missing", no_final),
    ("nan", bad_final),
    ("nan", column("observation", np.inf, "observation.speed")),
    ("observation_outside_space", column("observation", 3, "observation.room")),
    ("action_outside_space", column("action", 4, "action.move")),
    ("action_outside_space", column("action", 0, "action.move")),
    ("action_outside_space", column("action", 1.5, "action.aim")),
    ("action_outside_space", column("action", np.nan, "action.aim")),
    ("action_outside_space", column("action", 2, "action.buttons")),
    ("policy_action_not_finite", bad_policy_action),
    ("mask_allows_nothing", masked("action.move", [0, 0, 0], 1)),
    ("action_masked", masked("action.move", [1, 0, 1], 2)),
    ("action_masked", masked("action.pair", [0, 1, 0, 1, 1], [1, -1])),
    ("action_masked", masked("action.buttons", [[1, 1], [1, 0]], [0, 1])),
    ("reward_not_finite", column("reward", np.nan)),
    ("environment_step", column("environment_step", 1)),
    ("environment_step", column("environment_step", -1, row=0)),
    ("version_range", column("learner_update", -1)),
    ("version_range", both(column("policy_version", -1), column("policy_version_valid", True))),
    (
        "log_prob_not_finite",
        both(column("behaviour_log_prob", -np.inf), column("behaviour_log_prob_valid", True)),
    ),
    (
        "log_prob_not_finite",
        both(column("leaf_log_prob", np.nan, "action.aim"), column("behaviour_log_prob_valid", True)),
    ),
    ("value_not_finite", both(column("value", np.nan), column("value_valid", True))),
]


@pytest.mark.parametrize(("reason", "change"), RULES)
def test_bad_trajectory_is_refused_with_its_reason(reason: str, change: Callable[[Trajectory], None]) -> None:
    """Each rule refuses alone, with its own word."""
    trajectory = make_trajectory(HYBRID, 6)
    change(trajectory)

    with pytest.raises(InvalidTrajectory) as caught:
        validate_trajectory(HYBRID, trajectory)

    assert caught.value.reason == reason


def test_positive_log_prob_is_refused_for_discrete_actions_only() -> None:
    """A density may exceed 1, a probability may not."""
    change = both(column("behaviour_log_prob", 0.5), column("behaviour_log_prob_valid", True))
    discrete, hybrid = make_trajectory(small_schema(), 6), make_trajectory(HYBRID, 6)
    change(discrete)
    change(hybrid)

    validate_trajectory(HYBRID, hybrid)
    with pytest.raises(InvalidTrajectory) as caught:
        validate_trajectory(small_schema(), discrete)

    assert caught.value.reason == "log_prob_positive"


def test_what_is_null_is_not_looked_at() -> None:
    """NaN under a null is no NaN."""
    trajectory = make_trajectory(small_schema(), 6)
    both(column("value", np.nan), column("value_valid", False))(trajectory)
    both(column("behaviour_log_prob", np.nan), column("behaviour_log_prob_valid", False))(trajectory)

    validate_trajectory(small_schema(), trajectory)


def test_termination_needs_no_final_observation() -> None:
    """Only a segment that goes on, or was truncated, must say what came next."""
    trajectory = make_trajectory(small_schema(), 6)
    trajectory.final_observation = None

    validate_trajectory(small_schema(), trajectory)


def leaf(**changes: Any) -> LeafSpec:
    """A discrete observation leaf, with changes."""
    fields: dict[str, Any] = {
        "name": "observation",
        "kind": "discrete",
        "shape": (),
        "dtype": "int64",
        "nvec": (3,),
        "start": (0,),
    }
    return LeafSpec(**{**fields, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "object"},
        {"dtype": "float32"},
        {"name": "action"},
        {"kind": "box", "shape": (-1,)},
        {"kind": "box", "shape": (1 << 20, 1 << 20)},
        {"kind": "box", "shape": (3,), "low": (0.0, 1.0)},
        {"nvec": (0,)},
        {"nvec": (1, 2)},
        {"start": ()},
        {"nvec": (1 << 40,)},
    ],
)
def test_impossible_schema_is_refused(changes: dict[str, Any]) -> None:
    """A leaf that cannot be laid out is refused before anything is."""
    schema = msgspec.structs.replace(small_schema(), observation=ObservationSpec(leaves=(leaf(**changes),)))

    with pytest.raises(InvalidTrajectory) as caught:
        validate_schema(schema)

    assert caught.value.reason == "schema"


@pytest.mark.parametrize(
    "changes",
    [
        {"masked_leaves": ("action", "action")},
        {"masked_leaves": ("action.other",)},
        {"aux": {"note": "U5"}},
        {"observation": ObservationSpec(leaves=())},
        {"observation": ObservationSpec(leaves=(leaf(), leaf()))},
    ],
)
def test_impossible_combination_is_refused(changes: dict[str, Any]) -> None:
    """Masks of what is not there, and names that occur twice, are refused."""
    with pytest.raises(InvalidTrajectory):
        validate_schema(msgspec.structs.replace(small_schema(), **changes))


def test_metadata_of_the_helper_is_complete() -> None:
    """The helper's metadata is a value of the record."""
    assert msgspec.convert(msgspec.to_builtins(make_metadata(3)), type(make_metadata(3))).steps == 3
