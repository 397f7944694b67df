"""Graph templates: what is refused before ONNX Runtime sees it, and how weights are filled in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save as save_safetensors

from relayrl_shared.errors import ArtefactError
from relayrl_shared.policy import graph as graphs

WEIGHTS = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float32)}


def make_model() -> Any:
    """A linear layer whose weight and bias are parameters and whose scale is a constant."""
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Gemm", ["x", "weight", "bias"], ["sum"]),
                helper.make_node("Mul", ["sum", "scale"], ["y"]),
            ],
            "linear",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 2])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 3])],
            [
                *(numpy_helper.from_array(np.zeros_like(array), name) for name, array in WEIGHTS.items()),
                helper.make_tensor("scale", TensorProto.FLOAT, [], [2.0]),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    for tensor in model.graph.initializer[:2]:
        graphs.strip_data(tensor)
    return model


def template_of(model: Any) -> graphs.GraphTemplate:
    return graphs.parse_template(model.SerializeToString(), "digest")


def test_parameters_are_the_initializers_without_data() -> None:
    """A template knows what a weights file must bring and what it may bring."""
    template = template_of(make_model())
    assert template.parameters == {"weight", "bias"}
    assert template.initializers == {"weight", "bias", "scale"}


def test_filled_model_computes_with_the_weights() -> None:
    """Weights that were filled in are what the model multiplies with."""
    filled = graphs.fill(template_of(make_model()), WEIGHTS)
    session = onnxruntime.InferenceSession(filled)
    x = np.array([[1, 2], [3, 4]], np.float32)
    np.testing.assert_array_equal(
        session.run(None, {"x": x})[0], 2 * (x @ WEIGHTS["weight"] + WEIGHTS["bias"])
    )


def test_filling_leaves_the_template_as_it_was() -> None:
    """Two fills of one template do not see each other's weights."""
    template = template_of(make_model())
    before = template.model.SerializeToString()
    first = graphs.fill(template, WEIGHTS)
    second = graphs.fill(template, {name: array + 1 for name, array in WEIGHTS.items()})
    assert template.model.SerializeToString() == before
    assert first != second
    assert graphs.fill(template, WEIGHTS) == first


def test_weights_may_replace_a_constant_of_the_same_shape() -> None:
    """A tensor for an initializer that has data takes its place."""
    filled = graphs.fill(template_of(make_model()), WEIGHTS | {"scale": np.array(0.0, np.float32)})
    session = onnxruntime.InferenceSession(filled)
    assert not session.run(None, {"x": np.ones((1, 2), np.float32)})[0].any()
    scale = onnx.load_model_from_string(filled).graph.initializer[2]
    assert (scale.raw_data, list(scale.float_data)) == (bytes(4), [])  # never two sets of data


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"weight": WEIGHTS["weight"]}, r"lack .*bias"),
        (WEIGHTS | {"other": np.ones(1, np.float32)}, r"does not have.*other"),
        (WEIGHTS | {"bias": np.ones(4, np.float32)}, r"bias is \(4,\).*\(3,\)"),
        (WEIGHTS | {"bias": np.ones((3, 1), np.float32)}, "bias"),
        (WEIGHTS | {"bias": np.ones(3, np.float64)}, "bias is float64 .* float32"),
        ({}, "lack"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(weights: dict[str, Any], message: str) -> None:
    """Missing, extra, wrongly shaped and wrongly typed tensors are refused, and named."""
    with pytest.raises(ArtefactError, match=message):
        graphs.fill(template_of(make_model()), weights)


def test_unfilled_graph_cannot_run() -> None:
    """A graph whose weights were forgotten is refused by ONNX Runtime rather than run with zeros."""
    with pytest.raises(Exception, match=r"weight|bias"):
        onnxruntime.InferenceSession(make_model().SerializeToString())


def add_external_data(model: Any) -> None:
    entry = model.graph.initializer[0].external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL


def add_external_constant(model: Any) -> None:
    tensor = numpy_helper.from_array(np.ones(1, np.float32), "c")
    tensor.data_location = TensorProto.EXTERNAL
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def add_external_data_in_a_branch(model: Any) -> None:
    tensor = numpy_helper.from_array(np.ones(1, np.float32), "c")
    tensor.data_location = TensorProto.EXTERNAL
    output = helper.make_tensor_value_info("c", TensorProto.FLOAT, [1])
    branch = helper.make_graph([], "branch", [], [output], [tensor])
    model.graph.node.append(
        helper.make_node("If", ["condition"], ["z"], then_branch=branch, else_branch=branch)
    )


def add_custom_domain(model: Any) -> None:
    model.opset_import.append(helper.make_opsetid("com.evil", 1))


def add_custom_operator(model: Any) -> None:
    model.graph.node.append(helper.make_node("Shell", ["x"], ["z"], domain="com.evil"))


def add_contributed_operator(model: Any) -> None:
    model.graph.node.append(helper.make_node("FusedGemm", ["x"], ["z"], domain="com.microsoft"))


def add_loop(model: Any) -> None:
    model.graph.node.append(helper.make_node("Loop", ["", ""], ["z"]))


def add_function(model: Any) -> None:
    model.functions.append(helper.make_function("f", "bomb", ["a"], ["b"], [], []))


def add_sparse_initializer(model: Any) -> None:
    model.graph.sparse_initializer.add()


def add_sparse_attribute(model: Any) -> None:
    node = helper.make_node("Constant", [], ["c"])
    attribute = node.attribute.add()
    attribute.name = "sparse_value"
    attribute.sparse_tensor.dims.append(1)
    model.graph.node.append(node)


def add_training_info(model: Any) -> None:
    model.training_info.add()


def add_second_initializer_of_one_name(model: Any) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones(3, np.float32), "bias"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (add_external_data, "external data"),
        (add_external_constant, "external data"),
        (add_external_data_in_a_branch, "external data"),
        (add_custom_domain, "custom domain 'com.evil'"),
        (add_custom_operator, "Shell"),
        (add_contributed_operator, "custom domain 'com.microsoft'"),
        (add_loop, "Loop"),
        (add_function, "functions"),
        (add_sparse_initializer, "sparse"),
        (add_sparse_attribute, "sparse"),
        (add_training_info, "training"),
        (add_second_initializer_of_one_name, "twice"),
    ],
)
def test_unsafe_graph_is_refused(spoil: Callable[[Any], None], message: str) -> None:
    """What could read files, run foreign code or not end is refused before ONNX Runtime sees it."""
    model = make_model()
    spoil(model)
    with pytest.raises(ArtefactError, match=message):
        template_of(model)


@pytest.mark.parametrize("data", [b"garbage", b"\x08", b"\xff" * 64])
def test_garbage_graph_is_refused(data: bytes) -> None:
    """Bytes that are no protobuf give a typed error."""
    with pytest.raises(ArtefactError, match="not an ONNX model"):
        graphs.parse_template(data, "digest")


def test_oversize_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph above its limit is not parsed."""
    monkeypatch.setattr(graphs, "MAX_GRAPH_BYTES", 10)
    with pytest.raises(ArtefactError, match="limit is 10"):
        template_of(make_model())


def test_graph_with_too_many_nodes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of operators is bounded."""
    monkeypatch.setattr(graphs, "MAX_NODES", 1)
    with pytest.raises(ArtefactError, match="more than 1 nodes"):
        template_of(make_model())


@pytest.mark.parametrize("data", [b"", b"12345678", b"\xff" * 32, save_safetensors(WEIGHTS)[:-1]])
def test_garbage_weights_are_refused(data: bytes) -> None:
    """Bytes that are no whole safetensors file give a typed error that says which file."""
    with pytest.raises(ArtefactError, match="the weights file"):
        graphs.decode_tensors(data, "the weights file")


def test_oversize_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights above their limit are not parsed."""
    monkeypatch.setattr(graphs, "MAX_WEIGHTS_BYTES", 10)
    with pytest.raises(ArtefactError, match="limit is 10"):
        graphs.decode_tensors(save_safetensors(WEIGHTS), "the weights file")


def test_assembled_model_is_self_contained() -> None:
    """Other tools get one ordinary ONNX model out of a version's two files."""
    model = onnx.load_model_from_string(
        graphs.assemble(make_model().SerializeToString(), save_safetensors(WEIGHTS))
    )
    onnx.checker.check_model(model)
    assert {t.name: numpy_helper.to_array(t).tolist() for t in model.graph.initializer} == {
        "weight": WEIGHTS["weight"].tolist(),
        "bias": WEIGHTS["bias"].tolist(),
        "scale": 2.0,
    }
