"""What a policy's graph takes and gives, derived from its manifest: names, dtypes, shapes, in order.

Used by the engine to check a graph, by the exporter to name its ends and by whoever builds inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from relayrl_shared.policy.manifest import GraphOutputs, NoiseKind, NoiseLeaf
from relayrl_shared.spaces import (
    ActionSpec,
    LeafSpec,
    ObservationSpec,
    leaf_log_prob_name,
    mask_leaf_name,
    noise_leaf_name,
    policy_action_name,
)

NOISE_KINDS: dict[str, NoiseKind] = {
    "discrete": "gumbel",
    "multi_discrete": "gumbel",
    "multi_binary": "logistic",
    "box": "normal",
}


Arrays = dict[str, NDArray[Any]]


class ActingInterface(Protocol):
    """What fixes a graph's ends: a `PolicyManifest`, or the module that will be exported."""

    @property
    def observation_spec(self) -> ObservationSpec:
        """What the policy sees."""

    @property
    def action_spec(self) -> ActionSpec:
        """What it does."""

    @property
    def masked_leaves(self) -> tuple[str, ...]:
        """The action leaves that take a mask."""

    @property
    def noise(self) -> tuple[NoiseLeaf, ...]:
        """The noise that sampling takes."""

    @property
    def outputs(self) -> GraphOutputs:
        """Which outputs are real."""


@dataclass(frozen=True, slots=True)
class Port:
    """One input or output of a graph. `shape` is without the rows axis; `dtype` a numpy name."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def float_bounds(leaf: LeafSpec) -> tuple[NDArray[Any], NDArray[Any]]:
    """Finite bounds of a box leaf [1, size] in the dtype that its actions are clipped in, inside the leaf's.

    float32 for float16 and float32 leaves, else float64: a bound rounded to float32 could lie outside.
    """
    dtype = np.float32 if leaf.dtype in ("float16", "float32") else np.float64
    low, high = (bound.reshape(1, leaf.size) for bound in leaf.bounds())
    limit = np.finfo(leaf.dtype if leaf.numpy_dtype.kind == "f" else dtype).max
    inner_low, inner_high = (np.clip(bound.astype(dtype), -limit, limit) for bound in (low, high))
    if leaf.numpy_dtype.kind in "iu":  # 2**63 - 1 rounds up to a float64 that no int64 holds
        inner_high = np.where(inner_high >= 2.0**63, np.nextafter(inner_high, 0), inner_high)
    return inner_low, inner_high


def noise_leaves(action_spec: ActionSpec) -> tuple[NoiseLeaf, ...]:
    """The noise inputs that sampling these action leaves takes, one a leaf (contracts H2)."""
    return tuple(
        NoiseLeaf(
            name=noise_leaf_name(leaf.name),
            action_leaf=leaf.name,
            kind=NOISE_KINDS[leaf.kind],
            width=sum(leaf.nvec) if leaf.nvec else leaf.size,
        )
        for leaf in action_spec.leaves
    )


def input_ports(interface: ActingInterface) -> tuple[Port, ...]:
    """The graph's inputs in order: observation leaves, mask leaves, noise leaves."""
    ports = [Port(leaf.name, leaf.dtype, leaf.shape) for leaf in interface.observation_spec.leaves]
    ports += [
        Port(mask_leaf_name(leaf.name), "bool", leaf.mask_shape)
        for leaf in interface.action_spec.leaves
        if leaf.name in interface.masked_leaves and leaf.mask_shape is not None
    ]
    ports += [Port(noise.name, "float32", (noise.width,)) for noise in interface.noise]
    return tuple(ports)


def output_ports(interface: ActingInterface) -> tuple[Port, ...]:
    """The graph's outputs in order: actions, policy actions, log-probs, value."""
    leaves, real = interface.action_spec.leaves, interface.outputs
    ports = [Port(leaf.name, leaf.dtype, leaf.shape) for leaf in leaves]
    ports += [
        Port(policy_action_name(leaf.name), "float32", leaf.shape)
        for leaf in leaves
        if leaf.name in real.policy_action
    ]
    if real.behaviour_log_prob:
        ports.append(Port("behaviour_log_prob", "float32", ()))
    if real.leaf_log_prob:
        ports += [Port(leaf_log_prob_name(leaf.name), "float32", ()) for leaf in leaves]
    if real.value:
        ports.append(Port("value", "float32", ()))
    return tuple(ports)
