"""The ONNX graph of a policy as a template: parse it, refuse what is unsafe, fill in a version's weights.

Pure functions over bytes and protos, driven by `engine.load_policy` and, at export, by the training server.

A *parameter* is an initializer without data: name, shape and dtype stand in the graph, the data in the
version's `weights.safetensors`. So the graph's bytes, and with them its digest, depend on the architecture
alone, and a graph whose weights were not swapped in cannot run. Initializers with data are constants; a
weights file may replace one of the same name, shape and dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from relayrl_shared.errors import ArtefactError
from relayrl_shared.policy.artefact import MAX_GRAPH_BYTES, MAX_WEIGHTS_BYTES

MAX_NODES = 100_000
ALLOWED_DOMAINS = frozenset({"", "ai.onnx"})
UNBOUNDED_OPERATORS = frozenset({"Loop", "Scan", "SequenceMap"})
_DATA_FIELDS = (
    "raw_data",
    "float_data",
    "int32_data",
    "string_data",
    "int64_data",
    "double_data",
    "uint64_data",
)


@dataclass(frozen=True, slots=True)
class GraphTemplate:
    """A checked graph. `digest` is BLAKE3 of the file; `parameters` must all come from a weights file."""

    digest: str
    model: Any  # onnx.ModelProto; never changed after the checks: `fill` works on a copy
    parameters: frozenset[str]
    initializers: frozenset[str]


def parse_template(graph: bytes, graph_digest: str) -> GraphTemplate:
    """Parse and check a graph.

    Raises:
        ArtefactError: it does not parse, is too large, names external data, a custom operator domain,
            functions of its own, an operator that may loop without bound, or one initializer twice.
    """
    if len(graph) > MAX_GRAPH_BYTES:
        raise ArtefactError(f"the graph has {len(graph)} bytes; the limit is {MAX_GRAPH_BYTES}")
    try:
        model = onnx.load_model_from_string(graph)
    except Exception as error:
        raise ArtefactError(f"the graph is not an ONNX model: {error}") from error
    check_model(model)
    names = [tensor.name for tensor in model.graph.initializer]
    if len(set(names)) != len(names):
        raise ArtefactError("the graph names an initializer twice")
    parameters = frozenset(t.name for t in model.graph.initializer if is_parameter(t))
    return GraphTemplate(graph_digest, model, parameters, frozenset(names))


def check_model(model: Any) -> None:
    """Refuse an `onnx.ModelProto` that could read files, run foreign code or not end (contracts H6).

    Raises:
        ArtefactError: naming what was found.
    """
    if model.functions:
        raise ArtefactError(
            f"the graph defines functions of its own ({model.functions[0].name}): inline them"
        )
    if model.training_info:
        raise ArtefactError("the graph holds training information: export for inference")
    for opset in model.opset_import:
        _check_domain(opset.domain, "an operator set")
    if model.graph.sparse_initializer:
        raise ArtefactError("the graph holds sparse initializers, which are not supported")
    for tensor in model.graph.initializer:
        _check_tensor(tensor)
    for count, node in enumerate(_nodes(model.graph)):
        if count >= MAX_NODES:
            raise ArtefactError(f"the graph has more than {MAX_NODES} nodes")
        _check_node(node)


def _nodes(graph: Any) -> Iterator[Any]:
    pending = [graph]
    while pending:
        current = pending.pop()
        for tensor in current.initializer:
            _check_tensor(tensor)
        for node in current.node:
            yield node
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    pending.append(attribute.g)
                pending.extend(attribute.graphs)


def _check_node(node: Any) -> None:
    _check_domain(node.domain, f"operator {node.op_type}")
    if node.op_type in UNBOUNDED_OPERATORS:
        raise ArtefactError(f"the graph uses {node.op_type}, whose running time has no bound")
    for attribute in node.attribute:
        if attribute.HasField("t"):
            _check_tensor(attribute.t)
        for tensor in attribute.tensors:
            _check_tensor(tensor)
        if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
            raise ArtefactError("the graph holds sparse tensors, which are not supported")


def _check_domain(domain: str, what: str) -> None:
    if domain not in ALLOWED_DOMAINS:
        raise ArtefactError(
            f"{what} is of the custom domain {domain!r}; only standard ONNX operators may run"
        )


def _check_tensor(tensor: Any) -> None:
    if tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise ArtefactError(f"tensor {tensor.name!r} names external data; an artefact may not read files")


def is_parameter(tensor: Any) -> bool:
    """Whether an initializer is without data although its shape asks for some."""
    return not any(getattr(tensor, name) for name in _DATA_FIELDS) and all(tensor.dims)


def strip_data(tensor: Any) -> None:
    """Make an initializer a parameter: keep name, shape and dtype, drop its data."""
    for name in _DATA_FIELDS:
        tensor.ClearField(name)


def decode_tensors(data: bytes, what: str) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file by name.

    Raises:
        ArtefactError: too large, or it does not parse.
    """
    if len(data) > MAX_WEIGHTS_BYTES:
        raise ArtefactError(f"{what} has {len(data)} bytes; the limit is {MAX_WEIGHTS_BYTES}")
    try:
        return load_safetensors(data)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ArtefactError(f"{what} is not a safetensors file of plain dtypes: {error}") from error


def fill(template: GraphTemplate, weights: dict[str, NDArray[Any]]) -> bytes:
    """A serialised model with the weights in place of its initializers, which ONNX Runtime can load.

    Raises:
        ArtefactError: a parameter has no tensor, a tensor has no initializer, or shape or dtype differ.
    """
    _check_names(template, weights)
    model = onnx.ModelProto()
    model.CopyFrom(template.model)
    for initializer in model.graph.initializer:
        tensor = weights.get(initializer.name)
        if tensor is not None:
            _put(initializer, tensor)
    return bytes(model.SerializeToString())


def _check_names(template: GraphTemplate, weights: dict[str, NDArray[Any]]) -> None:
    missing = sorted(template.parameters - weights.keys())
    if missing:
        raise ArtefactError(f"the weights lack the graph's parameters {missing}")
    extra = sorted(weights.keys() - template.initializers)
    if extra:
        raise ArtefactError(f"the weights hold tensors that the graph does not have: {extra}")


def _put(initializer: Any, tensor: NDArray[Any]) -> None:
    shape = tuple(initializer.dims)
    if shape != tensor.shape:
        raise ArtefactError(f"{initializer.name} is {tensor.shape} in the weights and {shape} in the graph")
    expected = helper.tensor_dtype_to_np_dtype(initializer.data_type)
    if expected != tensor.dtype:
        raise ArtefactError(
            f"{initializer.name} is {tensor.dtype} in the weights and {expected} in the graph"
        )
    strip_data(initializer)
    initializer.raw_data = np.ascontiguousarray(tensor).tobytes()


def assemble(graph: bytes, weights: bytes) -> bytes:
    """One self-contained ONNX model from the two files of a version, for other tools.

    Raises:
        ArtefactError: as `parse_template` and `fill`.
    """
    return fill(parse_template(graph, ""), decode_tensors(weights, "the weights file"))
