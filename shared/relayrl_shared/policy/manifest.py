"""The manifest of a policy version: what its files are and how to run them.

Written by the learner at publication, kept by the model registry, read by whoever loads the version.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from relayrl_shared.spaces import ActionSpec, ObservationSpec

MANIFEST_FORMAT = 1

NoiseKind = Literal["gumbel", "logistic", "normal", "none"]


class NoiseLeaf(msgspec.Struct, kw_only=True, frozen=True):
    """One noise input of the graph, one an action leaf (contracts H2). The array is float32 [rows, width]."""

    name: str  # `noise` + the action leaf's path: action.gripper → noise.gripper
    action_leaf: str
    kind: NoiseKind
    width: int


class GraphOutputs(msgspec.Struct, kw_only=True, frozen=True):
    """Which outputs of the graph are real; the others are absent from the graph (contracts B2)."""

    behaviour_log_prob: bool
    leaf_log_prob: bool
    value: bool
    policy_action: tuple[str, ...] = ()  # action leaves that have a `policy_` twin output


class PolicyManifest(msgspec.Struct, kw_only=True, frozen=True):
    """A policy version.

    Graph inputs, in order: observation leaves by their names [B, *shape]; mask leaves named `action_mask` +
    path (bool [B, sum nvec] or [B, n, 2] for multi_binary) for each leaf in `masked_leaves`; noise leaves.
    Graph outputs, in order: action leaves by their names; `policy_action` + path for those in
    `outputs.policy_action`; `behaviour_log_prob` [B]; `leaf_log_prob` + path [B] each; `value` [B].
    policy_version is None until the registry gives one.
    """

    format: int = MANIFEST_FORMAT
    policy: str
    policy_version: int | None = None
    run_id: str
    lineage_id: str
    learner_update: int
    parent_version: int | None = None
    algorithm: str
    hyperparameters: dict[str, Any]
    observation_spec: ObservationSpec
    action_spec: ActionSpec
    masked_leaves: tuple[str, ...]
    allow_nan: bool = False
    noise: tuple[NoiseLeaf, ...]
    outputs: GraphOutputs
    graph_digest: str  # BLAKE3 of the ONNX graph file
    weights_digest: str  # BLAKE3 of weights.safetensors
    golden_digest: str  # BLAKE3 of golden.safetensors (inputs `in/…`, outputs `out/…`)
    store_cursor: int = 0
    metrics: dict[str, float] = {}
    created_at: float = 0.0


class PolicyArtefact(msgspec.Struct, frozen=True):
    """A manifest with the bytes that its digests name; nothing is trusted before `engine.load_policy`."""

    manifest: PolicyManifest
    graph: bytes
    weights: bytes
    golden: bytes
