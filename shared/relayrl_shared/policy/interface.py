"""What a policy's graph takes and gives, derived from its manifest: names, dtypes, shapes, in order.

Used by the engine to check a graph, by the exporter to name its ends and by whoever builds inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from relayrl_shared.policy.manifest import NoiseKind, NoiseLeaf, PolicyManifest
from relayrl_shared.spaces import ActionSpec, LeafSpec

NOISE_KINDS: dict[str, NoiseKind] = {
    "discrete": "gumbel",
    "multi_discrete": "gumbel",
    "multi_binary": "logistic",
    "box": "normal",
}


@dataclass(frozen=True, slots=True)
class Port:
    """One input or output of a graph. `shape` is without the rows axis; `dtype` a numpy name."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def twin(prefix: str, action_leaf: str) -> str:
    """The name of an action leaf's companion: `twin("noise", "action.gripper")` is `noise.gripper`."""
    return prefix + action_leaf.removeprefix("action")


def element_count(leaf: LeafSpec) -> int:
    """Elements of one row of a leaf."""
    count = 1
    for length in leaf.shape:
        count *= length
    return count


def mask_shape(leaf: LeafSpec) -> tuple[int, ...] | None:
    """Shape of one row of an action leaf's mask; None for a box, which has none (contracts H2)."""
    if leaf.kind == "box":
        return None
    return (element_count(leaf), 2) if leaf.kind == "multi_binary" else (sum(leaf.nvec),)


def noise_leaves(action_spec: ActionSpec) -> tuple[NoiseLeaf, ...]:
    """The noise inputs that sampling these action leaves takes, one a leaf (contracts H2)."""
    return tuple(
        NoiseLeaf(
            name=twin("noise", leaf.name),
            action_leaf=leaf.name,
            kind=NOISE_KINDS[leaf.kind],
            width=sum(leaf.nvec) if leaf.nvec else element_count(leaf),
        )
        for leaf in action_spec.leaves
    )


def input_ports(manifest: PolicyManifest) -> tuple[Port, ...]:
    """The graph's inputs in order: observation leaves, mask leaves, noise leaves."""
    ports = [Port(leaf.name, leaf.dtype, leaf.shape) for leaf in manifest.observation_spec.leaves]
    for leaf in manifest.action_spec.leaves:
        shape = mask_shape(leaf)
        if leaf.name in manifest.masked_leaves and shape is not None:
            ports.append(Port(twin("action_mask", leaf.name), "bool", shape))
    ports += [Port(noise.name, "float32", (noise.width,)) for noise in manifest.noise]
    return tuple(ports)


def output_ports(manifest: PolicyManifest) -> tuple[Port, ...]:
    """The graph's outputs in order: actions, policy actions, log-probs, value."""
    leaves, real = manifest.action_spec.leaves, manifest.outputs
    ports = [Port(leaf.name, leaf.dtype, leaf.shape) for leaf in leaves]
    ports += [
        Port(twin("policy_action", leaf.name), "float32", leaf.shape)
        for leaf in leaves
        if leaf.name in real.policy_action
    ]
    if real.behaviour_log_prob:
        ports.append(Port("behaviour_log_prob", "float32", ()))
    if real.leaf_log_prob:
        ports += [Port(twin("leaf_log_prob", leaf.name), "float32", ()) for leaf in leaves]
    if real.value:
        ports.append(Port("value", "float32", ()))
    return tuple(ports)
