"""Observation and action specs: what an environment shows and takes, as named, typed leaf arrays.

A spec flattens a Gymnasium space (nested Dict and Tuple included) to leaves in a fixed order. Everything that
is recorded, sent or learned is keyed by the leaves' names. Drive it by `ObservationSpec.from_gymnasium` and
`ActionSpec.from_gymnasium`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Kind = Literal["box", "discrete", "multi_discrete", "multi_binary"]


class LeafSpec(msgspec.Struct, kw_only=True, frozen=True):
    """One leaf array.

    name: `observation`, `observation.camera`, `action`, `action.0.gripper`: the root and the path, dotted.
    kind: where it came from. box: shape and bounds. discrete: shape (), values start … start + nvec[0] - 1.
    multi_discrete: shape as given, nvec flattened in C order, `start` likewise. multi_binary: 0 or 1.
    dtype: numpy name of the recorded array. low, high: box only; one number for all, or one an element (C order).
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    nvec: tuple[int, ...] = ()
    start: tuple[int, ...] = ()


class ObservationSpec(msgspec.Struct, kw_only=True, frozen=True):
    """The leaves of an observation, in flattening order."""

    leaves: tuple[LeafSpec, ...]


class ActionSpec(msgspec.Struct, kw_only=True, frozen=True):
    """The leaves of an action, in flattening order."""

    leaves: tuple[LeafSpec, ...]
