"""Observation and action specs: what an environment shows and takes, as named, typed leaf arrays.

A spec flattens a Gymnasium space (nested Dict and Tuple included) to leaves in a fixed order. Everything that
is recorded, sent or learned is keyed by the leaves' names. Drive it by `ObservationSpec.from_gymnasium` and
`ActionSpec.from_gymnasium`. Gymnasium is imported by the two conversions only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from relayrl_shared.errors import SpecMismatch

if TYPE_CHECKING:
    import gymnasium

Kind = Literal["box", "discrete", "multi_discrete", "multi_binary"]
Path = tuple[str | int, ...]
Leaves = dict[str, NDArray[Any]]


def _replace_root(action_leaf: str, root: str) -> str:
    return root + action_leaf.removeprefix(ActionSpec.root)


def mask_leaf_name(action_leaf: str) -> str:
    """The mask of an action leaf: `action.gripper` → `action_mask.gripper`."""
    return _replace_root(action_leaf, "action_mask")


def policy_action_name(action_leaf: str) -> str:
    """The unclipped or pre-squash twin of a continuous action leaf: `action` → `policy_action`."""
    return _replace_root(action_leaf, "policy_action")


def noise_leaf_name(action_leaf: str) -> str:
    """The noise that samples an action leaf: `action` → `noise`."""
    return _replace_root(action_leaf, "noise")


def leaf_log_prob_name(action_leaf: str) -> str:
    """The log-probability of one leaf of a hybrid action: `action.0` → `leaf_log_prob.0`."""
    return _replace_root(action_leaf, "leaf_log_prob")


@lru_cache(maxsize=64)
def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(name)


class LeafSpec(msgspec.Struct, kw_only=True, frozen=True):
    """One leaf array.

    name: `observation`, `observation.camera`, `action`, `action.0.gripper`: the root and the path, dotted.
    path: the keys (str, of a Dict) and indices (int, of a Tuple) that lead to it; () for a single leaf.
    kind: where it came from. box: shape and bounds. discrete: shape (), values start … start + nvec[0] - 1.
    multi_discrete: shape as given, nvec flattened in C order, `start` likewise. multi_binary: 0 or 1.
    dtype: numpy name of the recorded array. low, high: box only; one number for all, or one an element (C
    order); None: no bound but the dtype's. An infinite element beside finite ones is written as the largest
    finite number of the dtype, so that a manifest stays valid JSON; `bounds` gives the infinity back.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    path: Path = ()
    low: tuple[int | float, ...] | None = None
    high: tuple[int | float, ...] | None = None
    nvec: tuple[int, ...] = ()
    start: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Elements of one row."""
        return math.prod(self.shape)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype of the recorded array."""
        return _dtype(self.dtype)

    @property
    def mask_shape(self) -> tuple[int, ...] | None:
        """Shape of a row of its action mask: (sum nvec,), (n, 2) for multi_binary, None for a box."""
        if self.kind == "box":
            return None
        return (self.size, 2) if self.kind == "multi_binary" else (sum(self.nvec),)

    def bounds(self) -> tuple[NDArray[Any], NDArray[Any]]:
        """Lowest and highest allowed value of every element, both of the leaf's shape and dtype."""
        dtype = self.numpy_dtype
        if self.kind == "box":
            return _expand(self.low, self.shape, dtype, -1), _expand(self.high, self.shape, dtype, 1)
        if self.kind == "multi_binary":
            return np.zeros(self.shape, dtype), np.ones(self.shape, dtype)
        low = np.array(self.start, dtype).reshape(self.shape)
        return low, low + (np.array(self.nvec, dtype).reshape(self.shape) - np.array(1, dtype))


class _Spec(msgspec.Struct, kw_only=True, frozen=True):
    """What observation and action specs share: the leaves, in flattening order."""

    root: ClassVar[str]
    leaves: tuple[LeafSpec, ...]

    @classmethod
    def from_gymnasium(cls, space: gymnasium.Space[Any]) -> Self:
        """The spec of a Gymnasium space of one environment (not of a vector of them).

        Raises:
            SpecMismatch: the space has a part other than Box, Discrete, MultiDiscrete, MultiBinary, Dict or
                Tuple, has no leaves, or two of its leaves would have the same name.
        """
        leaves = tuple(_leaves_of(space, cls.root, ()))
        names = [leaf.name for leaf in leaves]
        if not leaves:
            raise SpecMismatch(f"the {cls.root} space {space} has no leaves; give it at least one entry")
        if len(set(names)) != len(names):
            raise SpecMismatch(f"two leaves of the {cls.root} space share a name in {names}; rename the keys")
        return cls(leaves=leaves)

    def to_gymnasium(self) -> gymnasium.Space[Any]:
        """A Gymnasium space that contains what the original contained."""
        return _assemble_space([(leaf.path, _leaf_space(leaf)) for leaf in self.leaves])

    def flatten(self, value: Any) -> Leaves:
        """One value of the space as leaf arrays, each of the leaf's own shape (no row axis).

        Raises:
            SpecMismatch: a part is missing, or its shape or dtype does not fit; names the leaf.
        """
        return {leaf.name: _as_leaf(leaf, _follow(value, leaf), leaf.shape) for leaf in self.leaves}

    def flatten_batch(self, value: Any, n: int) -> Leaves:
        """What a vector environment of `n` returns as leaf arrays [n, *shape].

        Raises:
            SpecMismatch: a part is missing, or its shape or dtype does not fit; names the leaf.
        """
        return {leaf.name: _as_leaf(leaf, _follow(value, leaf), (n, *leaf.shape)) for leaf in self.leaves}

    def unflatten(self, leaves: Mapping[str, NDArray[Any]]) -> Any:
        """The value in the space's own structure; leading axes (a batch) are kept.

        Raises:
            SpecMismatch: a leaf is missing.
        """
        missing = [leaf.name for leaf in self.leaves if leaf.name not in leaves]
        if missing:
            raise SpecMismatch(f"no array for the leaves {missing}; there are {sorted(leaves)}")
        if not self.leaves[0].path:
            return leaves[self.leaves[0].name][()]
        return _assemble_value([(leaf.path, leaves[leaf.name][()]) for leaf in self.leaves])

    def leaf(self, name: str) -> LeafSpec:
        """The leaf of that name.

        Raises:
            SpecMismatch: there is none.
        """
        for leaf in self.leaves:
            if leaf.name == name:
                return leaf
        raise SpecMismatch(f"no leaf {name!r}; there are {[leaf.name for leaf in self.leaves]}")

    def digest(self) -> str:
        """BLAKE3 (hex) of the spec; equal specs have equal digests in every process and release."""
        from blake3 import blake3

        return blake3(msgspec.msgpack.encode((self.root, self))).hexdigest()


class ObservationSpec(_Spec, kw_only=True, frozen=True):
    """The leaves of an observation, in flattening order."""

    root: ClassVar[str] = "observation"


class ActionSpec(_Spec, kw_only=True, frozen=True):
    """The leaves of an action, in flattening order."""

    root: ClassVar[str] = "action"


# -- spaces to leaves ---------------------------------------------------------------------------------------


def _leaves_of(space: gymnasium.Space[Any], name: str, path: Path) -> Iterator[LeafSpec]:
    """The leaves below a space, in order."""
    from gymnasium import spaces

    children: list[tuple[Any, Any]]
    if isinstance(space, spaces.Dict):
        children = list(space.spaces.items())
    elif isinstance(space, spaces.Tuple):
        children = list(enumerate(space.spaces))
    else:
        yield _leaf_of(space, name, path)
        return
    for key, child in children:
        if not isinstance(key, str | int) or (isinstance(key, int) and isinstance(space, spaces.Dict)):
            raise SpecMismatch(f"the key {key!r} below {name} is not a string; rename it")
        yield from _leaves_of(child, f"{name}.{key}", (*path, key))


def _leaf_of(space: gymnasium.Space[Any], name: str, path: Path) -> LeafSpec:
    from gymnasium import spaces

    if isinstance(space, spaces.Box):
        low, high = _bound(space.low, -1), _bound(space.high, 1)
        dtype = np.dtype(space.dtype).name
        return LeafSpec(
            name=name, path=path, kind="box", shape=tuple(space.shape), dtype=dtype, low=low, high=high
        )
    if isinstance(space, spaces.Discrete):
        nvec, start = (int(space.n),), (int(space.start),)
        return LeafSpec(
            name=name, path=path, kind="discrete", shape=(), dtype="int64", nvec=nvec, start=start
        )
    if isinstance(space, spaces.MultiDiscrete):
        return _multi_discrete_leaf(space, name, path)
    if isinstance(space, spaces.MultiBinary):
        return LeafSpec(name=name, path=path, kind="multi_binary", shape=tuple(space.shape), dtype="int8")
    raise SpecMismatch(
        f"{name} is a {type(space).__name__}; use Box, Discrete, MultiDiscrete, MultiBinary, Dict or Tuple"
    )


def _multi_discrete_leaf(space: gymnasium.spaces.MultiDiscrete, name: str, path: Path) -> LeafSpec:
    return LeafSpec(
        name=name,
        path=path,
        kind="multi_discrete",
        shape=tuple(space.shape),
        dtype=np.dtype(space.dtype).name,
        nvec=tuple(int(n) for n in space.nvec.ravel()),
        start=tuple(int(s) for s in space.start.ravel()),
    )


def _extreme(dtype: np.dtype[Any], sign: int) -> int | float:
    """The largest finite number of a dtype, or the lowest (sign -1)."""
    if dtype.kind == "b":
        return int(sign > 0)
    if dtype.kind == "f":
        return sign * float(np.finfo(dtype).max)
    return int(np.iinfo(dtype).max) if sign > 0 else int(np.iinfo(dtype).min)


def _bound(values: NDArray[Any], sign: int) -> tuple[int | float, ...] | None:
    """One side of a box: None if it never binds, one number if all are equal, else one an element."""
    extreme = _extreme(values.dtype, sign)
    flat = values.ravel()
    beyond = flat * sign >= extreme * sign if values.dtype.kind == "f" else flat == extreme
    if bool(np.all(beyond)):
        return None
    numbers = [extreme if is_out else number.item() for number, is_out in zip(flat, beyond, strict=True)]
    numbers = [float(number) if values.dtype.kind == "f" else int(number) for number in numbers]
    return (numbers[0],) if len(set(numbers)) == 1 else tuple(numbers)


def _expand(
    bound: tuple[int | float, ...] | None, shape: tuple[int, ...], dtype: np.dtype[Any], sign: int
) -> NDArray[Any]:
    """A box bound as an array; unbounded floats are infinite, unbounded integers the dtype's limit."""
    extreme = _extreme(dtype, sign)
    unbounded = sign * np.inf if dtype.kind == "f" else extreme
    if bound is None:
        return np.full(shape, unbounded, dtype)
    numbers = np.array([unbounded if number == extreme else number for number in bound], dtype)
    return np.full(shape, numbers[0], dtype) if len(numbers) == 1 else numbers.reshape(shape)


# -- leaves to spaces ---------------------------------------------------------------------------------------


def _leaf_space(leaf: LeafSpec) -> gymnasium.Space[Any]:
    from gymnasium import spaces

    if leaf.kind == "box":
        low, high = leaf.bounds()
        return spaces.Box(low, high, shape=leaf.shape, dtype=leaf.numpy_dtype.type)
    if leaf.kind == "discrete":
        return spaces.Discrete(leaf.nvec[0], start=leaf.start[0])
    if leaf.kind == "multi_binary":
        return spaces.MultiBinary(leaf.shape[0] if len(leaf.shape) == 1 else leaf.shape)
    nvec = np.array(leaf.nvec, np.int64).reshape(leaf.shape)
    start = np.array(leaf.start, np.int64).reshape(leaf.shape)
    return spaces.MultiDiscrete(nvec, dtype=leaf.numpy_dtype.type, start=start)


def _children(parts: list[tuple[Path, Any]]) -> dict[str | int, list[tuple[Path, Any]]]:
    """The parts by the first step of their paths, in order."""
    children: dict[str | int, list[tuple[Path, Any]]] = {}
    for path, part in parts:
        children.setdefault(path[0], []).append((path[1:], part))
    return children


def _assemble_value(parts: list[tuple[Path, Any]]) -> Any:
    if not parts[0][0]:
        return parts[0][1]
    built = {key: _assemble_value(below) for key, below in _children(parts).items()}
    return tuple(built.values()) if isinstance(parts[0][0][0], int) else built


def _assemble_space(parts: list[tuple[Path, Any]]) -> gymnasium.Space[Any]:
    from collections import OrderedDict

    from gymnasium import spaces

    if not parts[0][0]:
        leaf_space: gymnasium.Space[Any] = parts[0][1]
        return leaf_space
    built = {key: _assemble_space(below) for key, below in _children(parts).items()}
    if isinstance(parts[0][0][0], int):
        return spaces.Tuple(tuple(built.values()))
    return spaces.Dict(OrderedDict((str(key), space) for key, space in built.items()))


# -- values to leaves ---------------------------------------------------------------------------------------


def _follow(value: Any, leaf: LeafSpec) -> Any:
    """The part of a value that a leaf names."""
    try:
        for key in leaf.path:
            value = value[key]
    except (KeyError, IndexError, TypeError) as exc:
        raise SpecMismatch(
            f"{leaf.name}: the value has no entry {key!r}; pass the structure of the space"
        ) from exc
    return value


def _as_leaf(leaf: LeafSpec, value: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    """An array of exactly this shape and the leaf's dtype, without a copy where it has them already."""
    dtype = leaf.numpy_dtype
    array = value if isinstance(value, np.ndarray) else _convert(leaf, value)
    if array.shape != shape:
        raise SpecMismatch(f"{leaf.name}: shape {array.shape}, expected {shape}")
    if array.dtype == dtype:
        return array
    if not np.can_cast(array.dtype, dtype, "safe"):
        raise SpecMismatch(f"{leaf.name}: dtype {array.dtype}, expected {dtype}; cast it with .astype")
    return array.astype(dtype)


def _convert(leaf: LeafSpec, value: Any) -> NDArray[Any]:
    """Numbers and sequences, which have no dtype of their own, as an array of the leaf's dtype."""
    if isinstance(value, np.generic):
        return np.asarray(value)
    if isinstance(value, list | tuple) and value and isinstance(value[0], np.ndarray | np.generic):
        return np.stack([np.asarray(part) for part in value])
    try:
        array = np.asarray(value)
        if not np.can_cast(array.dtype, leaf.numpy_dtype, "same_kind") and array.dtype.kind not in "iu":
            raise SpecMismatch(f"{leaf.name}: {array.dtype} does not fit {leaf.dtype}")
        return np.asarray(value, dtype=leaf.numpy_dtype)
    except (TypeError, ValueError, OverflowError) as exc:
        raise SpecMismatch(f"{leaf.name}: {type(value).__name__} is no array of {leaf.dtype}: {exc}") from exc
