"""Small real policies without torch, for tests of whatever loads, serves, keeps or runs policy artefacts.

`make_artefact` builds an ONNX graph of the shape that the training server exports (one hidden layer, masks,
sampling from noise, log-probs, value) for any observation and action spec. Equal specs give equal graph
bytes; another seed gives other weights.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper
from safetensors.numpy import save as save_safetensors

from relayrl_shared.policy.artefact import digest
from relayrl_shared.policy.engine import run_unchecked
from relayrl_shared.policy.golden import encode_golden, random_inputs
from relayrl_shared.policy.graph import assemble, strip_data
from relayrl_shared.policy.interface import float_bounds, input_ports, noise_leaves, output_ports
from relayrl_shared.policy.manifest import GraphOutputs, PolicyArtefact, PolicyManifest
from relayrl_shared.spaces import (
    ActionSpec,
    LeafSpec,
    ObservationSpec,
    leaf_log_prob_name,
    mask_leaf_name,
    noise_leaf_name,
    policy_action_name,
)

__all__ = ["finish_artefact", "make_artefact", "random_inputs", "seal"]

MASKED_LOGIT = -1e9
GOLDEN_ROWS = 8
_OPSET = 20
_IR_VERSION = 10


def make_artefact(
    observation_spec: ObservationSpec,
    action_spec: ActionSpec,
    *,
    policy: str = "test",
    policy_version: int | None = 1,
    learner_update: int = 0,
    seed: int = 0,
    masked_leaves: tuple[str, ...] = (),
    hidden_size: int = 16,
    run_id: str = "test-run",
    lineage_id: str = "test-lineage",
    algorithm: str = "ppo",
    allow_nan: bool = False,
) -> PolicyArtefact:
    """A valid artefact with random weights and golden vectors.

    Args:
        observation_spec: what the policy sees; every leaf is cast to float32 and flattened.
        action_spec: what it does; all kinds of leaves.
        policy: its name.
        policy_version: None for one that no registry has numbered yet.
        learner_update: finished updates of the learner that made it.
        seed: of the weights and the golden inputs.
        masked_leaves: action leaves that take a mask.
        hidden_size: width of the one hidden layer.
        run_id: of the manifest.
        lineage_id: of the manifest.
        algorithm: of the manifest.
        allow_nan: of the manifest.
    """
    draft = PolicyManifest(
        policy=policy,
        policy_version=policy_version,
        run_id=run_id,
        lineage_id=lineage_id,
        learner_update=learner_update,
        algorithm=algorithm,
        hyperparameters={"hidden_size": hidden_size},
        observation_spec=observation_spec,
        action_spec=action_spec,
        masked_leaves=masked_leaves,
        allow_nan=allow_nan,
        noise=noise_leaves(action_spec),
        outputs=GraphOutputs(
            behaviour_log_prob=True,
            leaf_log_prob=len(action_spec.leaves) > 1,
            value=True,
            policy_action=tuple(leaf.name for leaf in action_spec.leaves if leaf.kind == "box"),
        ),
        graph_digest="",
        weights_digest="",
        golden_digest="",
    )
    builder = _GraphBuilder(draft, hidden_size)
    return finish_artefact(draft, builder.build(), builder.random_weights(seed), seed)


def finish_artefact(
    manifest: PolicyManifest, graph: bytes, weights: dict[str, NDArray[Any]], seed: int = 0
) -> PolicyArtefact:
    """An artefact of these parts: golden vectors run, digests filled in. For bent artefacts in tests."""
    weights_file = save_safetensors(weights)
    golden = _golden_vectors(manifest, graph, weights_file, seed)
    return seal(PolicyArtefact(manifest=manifest, graph=graph, weights=weights_file, golden=golden))


def seal(artefact: PolicyArtefact) -> PolicyArtefact:
    """The artefact with the digests of the bytes that it has."""
    manifest = msgspec.structs.replace(
        artefact.manifest,
        graph_digest=digest(artefact.graph),
        weights_digest=digest(artefact.weights),
        golden_digest=digest(artefact.golden),
    )
    return msgspec.structs.replace(artefact, manifest=manifest)


def _golden_vectors(manifest: PolicyManifest, graph: bytes, weights: bytes, seed: int) -> bytes:
    """Golden vectors: the first half of the rows greedy, the rest sampled."""
    inputs = random_inputs(manifest, GOLDEN_ROWS, seed)
    for noise in manifest.noise:
        inputs[noise.name][: GOLDEN_ROWS // 2] = 0
    return encode_golden(inputs, run_unchecked(assemble(graph, weights), inputs))


class _GraphBuilder:
    """Collects the nodes and initializers of a graph; one per `make_artefact` call."""

    def __init__(self, manifest: PolicyManifest, hidden_size: int) -> None:
        self.manifest = manifest
        self.hidden_size = hidden_size
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the parameters
        self.counter = 0

    def build(self) -> bytes:
        """The graph file: parameters without data, ends named as the manifest says."""
        hidden, width = self._encoder()
        log_probs = [self._head(leaf, hidden) for leaf in self.manifest.action_spec.leaves]
        self._op("Sum", log_probs, "behaviour_log_prob")
        value = self._linear("value", hidden, width, 1)
        self._op("Squeeze", [value, self._constant(np.array([1]))], "value")
        graph = helper.make_graph(
            self.nodes,
            "policy",
            [_value_info(port) for port in input_ports(self.manifest)],
            [_value_info(port) for port in output_ports(self.manifest)],
            [*self.constants, *(_parameter(name, shape) for name, shape in self.shapes.items())],
        )
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION
        )
        return bytes(model.SerializeToString(deterministic=True))

    def random_weights(self, seed: int) -> dict[str, NDArray[Any]]:
        """Random weights for the parameters of the graph that was built."""
        random = np.random.default_rng(seed)
        return {
            name: (random.normal(size=shape) / np.sqrt(max(shape[0], 1))).astype(np.float32)
            for name, shape in self.shapes.items()
        }

    def _op(self, operator: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        self.counter += 1
        name = output or f"v{self.counter}"
        self.nodes.append(helper.make_node(operator, inputs, [name], name=f"n{self.counter}", **attributes))
        return name

    def _constant(self, array: NDArray[Any]) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(onnx.numpy_helper.from_array(np.asarray(array), name))
        return name

    def _float(self, value: float) -> str:
        return self._constant(np.array(value, np.float32))

    def _linear(self, name: str, source: str, fan_in: int, fan_out: int) -> str:
        self.shapes[f"{name}.weight"] = (fan_in, fan_out)
        self.shapes[f"{name}.bias"] = (fan_out,)
        return self._op("Gemm", [source, f"{name}.weight", f"{name}.bias"])

    def _encoder(self) -> tuple[str, int]:
        leaves = self.manifest.observation_spec.leaves
        parts = [
            self._op("Flatten", [self._op("Cast", [leaf.name], to=TensorProto.FLOAT)], axis=1)
            for leaf in leaves
        ]
        flat = self._op("Concat", parts, axis=1)
        fan_in = sum(leaf.size for leaf in leaves)
        return self._op("Tanh", [self._linear("encoder", flat, fan_in, self.hidden_size)]), self.hidden_size

    def _head(self, leaf: LeafSpec, hidden: str) -> str:
        """Adds one action leaf's head; returns the name of its log-prob."""
        noise = noise_leaf_name(leaf.name)
        width = sum(leaf.nvec) or leaf.size
        scores = self._linear(f"head.{leaf.name}", hidden, self.hidden_size, width)
        heads = {"box": self._box, "multi_binary": self._multi_binary}
        parts = heads.get(leaf.kind, self._categorical)(leaf, scores, noise)
        single = len(self.manifest.action_spec.leaves) == 1
        return self._op(
            "ReduceSum",
            [parts, self._constant(np.array([1]))],
            None if single else leaf_log_prob_name(leaf.name),
            keepdims=0,
        )

    def _mask_of(self, leaf: LeafSpec) -> str | None:
        return mask_leaf_name(leaf.name) if leaf.name in self.manifest.masked_leaves else None

    def _categorical(self, leaf: LeafSpec, scores: str, noise: str) -> str:
        mask = self._mask_of(leaf)
        if mask is not None:
            scores = self._op("Where", [mask, scores, self._float(MASKED_LOGIT)])
        noisy = self._op("Add", [scores, noise])
        choices, log_probs, offset = [], [], 0
        for count in leaf.nvec:
            choice = self._op("ArgMax", [self._columns(noisy, offset, count)], axis=1, keepdims=1)
            log_softmax = self._op("LogSoftmax", [self._columns(scores, offset, count)], axis=1)
            choices.append(choice)
            log_probs.append(self._op("GatherElements", [log_softmax, choice], axis=1))
            offset += count
        start = np.array(leaf.start or [0] * len(leaf.nvec), np.int64)
        action = self._op("Add", [self._op("Concat", choices, axis=1), self._constant(start)])
        self._finish_action(leaf, action)
        return self._op("Concat", log_probs, axis=1)

    def _columns(self, source: str, offset: int, count: int) -> str:
        ends = [self._constant(np.array([n])) for n in (offset, offset + count, 1)]
        return self._op("Slice", [source, *ends])

    def _multi_binary(self, leaf: LeafSpec, scores: str, noise: str) -> str:
        mask = self._mask_of(leaf)
        if mask is not None:
            for column, forced in ((0, -MASKED_LOGIT), (1, MASKED_LOGIT)):
                allowed = self._op("Gather", [mask, self._constant(np.array(column))], axis=2)
                scores = self._op("Where", [allowed, scores, self._float(forced)])
        on = self._op("Greater", [self._op("Add", [scores, noise]), self._float(0.0)])
        self._finish_action(leaf, on)
        negative = self._op("Neg", [scores])
        return self._op("Neg", [self._op("Softplus", [self._op("Where", [on, negative, scores])])])

    def _box(self, leaf: LeafSpec, scores: str, noise: str) -> str:
        width = leaf.size
        std = f"head.{leaf.name}.std"
        self.shapes[std] = (width,)
        positive = self._op("Exp", [std])  # random weights may be negative
        sample = self._op("Add", [scores, self._op("Mul", [noise, positive])])
        self._op("Reshape", [sample, self._row_shape(leaf)], policy_action_name(leaf.name))
        wide = self._op("Cast", [sample], to=helper.np_dtype_to_tensor_dtype(float_bounds(leaf)[0].dtype))
        low, high = (self._constant(bound) for bound in float_bounds(leaf))
        clipped = self._op("Max", [self._op("Min", [wide, high]), low])
        integral = leaf.numpy_dtype.kind in "iu"
        self._finish_action(leaf, self._op("Round", [clipped]) if integral else clipped)
        distance = self._op("Div", [self._op("Sub", [sample, scores]), positive])
        square = self._op("Mul", [distance, distance])
        half = self._op("Mul", [square, self._float(-0.5)])
        scale = self._op("Add", [std, self._float(0.5 * np.log(2 * np.pi))])
        return self._op("Sub", [half, scale])

    def _finish_action(self, leaf: LeafSpec, action: str) -> None:
        shaped = self._op("Reshape", [action, self._row_shape(leaf)])
        dtype = helper.np_dtype_to_tensor_dtype(np.dtype(leaf.dtype))
        self._op("Cast", [shaped], leaf.name, to=dtype)

    def _row_shape(self, leaf: LeafSpec) -> str:
        return self._constant(np.array([-1, *leaf.shape], np.int64))


def _value_info(port: Any) -> Any:
    dtype = helper.np_dtype_to_tensor_dtype(np.dtype(port.dtype))
    return helper.make_tensor_value_info(port.name, dtype, ["rows", *port.shape])


def _parameter(name: str, shape: tuple[int, ...]) -> Any:
    tensor = onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name)
    strip_data(tensor)
    return tensor
