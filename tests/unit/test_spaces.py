"""Specs: any space of the supported kinds flattens to leaves and comes back."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from hypothesis import given, settings
from hypothesis import strategies as st

from relayrl_shared.errors import SpecMismatch
from relayrl_shared.spaces import (
    ActionSpec,
    ObservationSpec,
    leaf_log_prob_name,
    mask_leaf_name,
    noise_leaf_name,
    policy_action_name,
)

FLOATS = ["float16", "float32", "float64"]
INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
shapes = st.lists(st.integers(1, 3), max_size=3).map(tuple)


@st.composite
def boxes(draw: st.DrawFn) -> spaces.Box:
    """A box of any dtype and shape, its bounds equal, different, infinite or mixed."""
    dtype, shape = np.dtype(draw(st.sampled_from(FLOATS + INTEGERS))), draw(shapes)
    size = int(np.prod(shape, dtype=int))
    low = np.array(draw(st.lists(st.integers(0, 9), min_size=size, max_size=size)), dtype).reshape(shape)
    high = np.asarray(low + np.array(draw(st.integers(1, 9)), dtype), dtype)
    if dtype.kind == "f":
        low[np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size))).reshape(shape)] = -np.inf
        high[np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size))).reshape(shape)] = np.inf
    return spaces.Box(low, high, shape, dtype.type)


discretes = st.builds(lambda n, start: spaces.Discrete(n, start=start), st.integers(1, 9), st.integers(-5, 5))
multi_discretes = st.builds(
    lambda nvec, start: spaces.MultiDiscrete(nvec, start=[start] * len(nvec)),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.integers(-3, 3),
)
multi_binaries = st.one_of(st.integers(1, 4), st.just([2, 3])).map(spaces.MultiBinary)
simple = st.one_of(boxes(), discretes, multi_discretes, multi_binaries)
any_space = st.recursive(
    simple,
    lambda child: st.one_of(
        st.dictionaries(st.sampled_from(["a", "b", "camera"]), child, min_size=1, max_size=3).map(
            spaces.Dict
        ),
        st.lists(child, min_size=1, max_size=3).map(lambda parts: spaces.Tuple(tuple(parts))),
    ),
    max_leaves=5,
)


def same(expected: Any, actual: Any) -> bool:
    """Whether two values of one space are equal in structure and every element."""
    if isinstance(expected, dict):
        return list(expected) == list(actual) and all(same(expected[key], actual[key]) for key in expected)
    if isinstance(expected, tuple):
        return len(expected) == len(actual) and all(map(same, expected, actual))
    return np.array_equal(expected, actual, equal_nan=np.asarray(expected).dtype.kind == "f")


@settings(max_examples=30, deadline=None)
@given(any_space)
def test_space_comes_back(space: spaces.Space[Any]) -> None:
    """A space, its spec, the spec's JSON and msgpack all stand for the same space."""
    spec = ObservationSpec.from_gymnasium(space)

    assert spec.to_gymnasium() == space
    assert msgspec.json.decode(msgspec.json.encode(spec), type=ObservationSpec) == spec
    assert (
        msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=ObservationSpec).digest() == spec.digest()
    )


@settings(max_examples=30, deadline=None)
@given(any_space, st.integers(0, 2**31))
def test_value_comes_back(space: spaces.Space[Any], seed: int) -> None:
    """A sample flattens to arrays of the leaves' shapes and dtypes, and unflattens to itself."""
    space.seed(seed)
    value = space.sample()
    spec = ActionSpec.from_gymnasium(space)

    leaves = spec.flatten(value)

    assert [(leaf.shape, leaf.dtype) for leaf in spec.leaves] == [
        (array.shape, array.dtype.name) for array in leaves.values()
    ]
    assert same(value, spec.unflatten(leaves))


@settings(max_examples=40, deadline=None)
@given(any_space, st.integers(1, 4))
def test_batch_comes_back(space: spaces.Space[Any], n: int) -> None:
    """What a vector environment returns flattens to [n, *shape] and unflattens to itself."""
    value = batch_space(space, n).sample()
    spec = ObservationSpec.from_gymnasium(space)

    leaves = spec.flatten_batch(value, n)

    assert all(leaves[leaf.name].shape == (n, *leaf.shape) for leaf in spec.leaves)
    assert same(value, spec.unflatten(leaves))


def test_names_and_shapes_of_a_hybrid() -> None:
    """Leaves are named by their path; masks have a flag for every choice."""
    space = spaces.Dict(
        {
            "arm": spaces.Tuple(
                (spaces.Discrete(3, start=-1), spaces.MultiDiscrete(np.array([[2, 3], [4, 5]])))
            ),
            "light": spaces.MultiBinary(4),
            "thrust": spaces.Box(-1, 1, (2,)),
        }
    )

    spec = ActionSpec.from_gymnasium(space)

    assert [(leaf.name, leaf.mask_shape, leaf.size) for leaf in spec.leaves] == [
        ("action.arm.0", (3,), 1),
        ("action.arm.1", (14,), 4),
        ("action.light", (4, 2), 4),
        ("action.thrust", None, 2),
    ]


def test_companion_names() -> None:
    """Masks, samples, noise and log-probs are named after their action leaf."""
    names = [name("action.arm.0") for name in (mask_leaf_name, policy_action_name, noise_leaf_name)]

    assert names == ["action_mask.arm.0", "policy_action.arm.0", "noise.arm.0"]
    assert leaf_log_prob_name("action") == "leaf_log_prob"


def test_single_leaf_has_the_bare_name() -> None:
    """A space without structure is one leaf named as its root."""
    assert ObservationSpec.from_gymnasium(spaces.Discrete(2)).leaves[0].name == "observation"
    assert ActionSpec.from_gymnasium(spaces.Discrete(2)).leaves[0].name == "action"


def test_integer_bounds_are_exact() -> None:
    """Bounds beyond 2**53 lose nothing."""
    space = spaces.Box(0, 2**64 - 2, (1,), np.uint64)

    low, high = ObservationSpec.from_gymnasium(space).leaves[0].bounds()

    assert (int(low[0]), int(high[0])) == (0, 2**64 - 2)


def test_digest_differs_by_content_and_role() -> None:
    """Another bound, and an action in place of an observation, give another digest."""
    one, other = spaces.Box(-1, 1, (2,)), spaces.Box(-1, 2, (2,))

    digests = {
        ObservationSpec.from_gymnasium(one).digest(),
        ObservationSpec.from_gymnasium(other).digest(),
        ActionSpec.from_gymnasium(one).digest(),
    }

    assert len(digests) == 3


def test_digest_is_pinned() -> None:
    """The digest of a spec is the same in every release; stored schemas depend on it."""
    spec = ObservationSpec.from_gymnasium(spaces.Box(-1, 1, (2,)))

    assert spec.digest() == "4a5c00a3c67ec74b51f5aaae5fe47a8e27c767ae4b9ebc2aa557b3722b01b834"


@pytest.mark.parametrize(
    ("space", "names"),
    [
        (spaces.Text(5), "Text"),
        (spaces.Dict({"a": spaces.Graph(spaces.Discrete(2), None)}), "observation.a"),
        (spaces.Dict({}), "no leaves"),
        (
            spaces.Dict({"a.b": spaces.Discrete(2), "a": spaces.Dict({"b": spaces.Discrete(2)})}),
            "share a name",
        ),
    ],
)
def test_unsupported_space_is_refused_by_name(space: spaces.Space[Any], names: str) -> None:
    """A space that cannot be a spec is refused with what is wrong in it."""
    with pytest.raises(SpecMismatch, match=names):
        ObservationSpec.from_gymnasium(space)


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ({"camera": np.zeros((2, 2), np.uint8)}, "observation.speed"),
        ({"camera": np.zeros((2, 3), np.uint8), "speed": 0.0}, r"observation.camera: shape \(2, 3\)"),
        ({"camera": np.zeros((2, 2), np.int64), "speed": 0.0}, "observation.camera: dtype int64"),
        ({"camera": np.zeros((2, 2), np.uint8), "speed": np.float64(0)}, "observation.speed: dtype float64"),
        ({"camera": [[1, 2], [3, 300]], "speed": 0.0}, "observation.camera"),
        ({"camera": [[1.5, 2], [3, 4]], "speed": 0.0}, "observation.camera"),
        (np.zeros((2, 2), np.uint8), "observation.camera"),
    ],
)
def test_wrong_value_is_refused_by_leaf(value: Any, names: str) -> None:
    """A value of another structure, shape or dtype is refused with the leaf's name."""
    space = spaces.Dict({"camera": spaces.Box(0, 255, (2, 2), np.uint8), "speed": spaces.Box(-1, 1, ())})

    with pytest.raises(SpecMismatch, match=names):
        ObservationSpec.from_gymnasium(space).flatten(value)


def test_numbers_and_safe_dtypes_are_taken() -> None:
    """Python numbers, lists and arrays that cast without loss become the leaf's dtype."""
    spec = ObservationSpec.from_gymnasium(spaces.Box(-1, 1, (2,), np.float64))

    arrays = [spec.flatten(value)["observation"] for value in ([1, 0.5], np.array([1, 0.5], np.float32))]

    assert [(array.dtype.name, array.tolist()) for array in arrays] == [("float64", [1, 0.5])] * 2


def test_missing_leaf_is_refused() -> None:
    """Unflattening without one of the leaves names it."""
    spec = ActionSpec.from_gymnasium(spaces.Tuple((spaces.Discrete(2), spaces.Discrete(2))))

    with pytest.raises(SpecMismatch, match=r"action\.1"):
        spec.unflatten({"action.0": np.zeros((), np.int64)})
