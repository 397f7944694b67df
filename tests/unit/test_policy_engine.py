"""The engine: what it loads, what it refuses, and that it never hands out an action that is not one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from safetensors.numpy import save as save_safetensors

from relayrl_shared.errors import ArtefactError, DigestMismatch, GoldenMismatch, InferenceError
from relayrl_shared.policy import engine
from relayrl_shared.policy.engine import LoadedPolicy, load_policy
from relayrl_shared.policy.golden import decode_golden, encode_golden, random_inputs
from relayrl_shared.policy.graph import decode_tensors
from relayrl_shared.policy.manifest import PolicyArtefact
from relayrl_shared.spaces import ActionSpec, LeafSpec, ObservationSpec
from relayrl_shared.testing.policies import finish_artefact, make_artefact, seal

OBSERVATION = ObservationSpec(leaves=(LeafSpec(name="observation", kind="box", shape=(4,), dtype="float32"),))
DISCRETE = ActionSpec(
    leaves=(LeafSpec(name="action", kind="discrete", shape=(), dtype="int64", nvec=(3,), start=(0,)),)
)
BOX = ActionSpec(
    leaves=(
        LeafSpec(name="action", kind="box", shape=(2,), dtype="float32", low=(-1.0, -1.0), high=(1.0, 1.0)),
    )
)


@pytest.fixture(scope="module")
def artefact() -> PolicyArtefact:
    return make_artefact(OBSERVATION, DISCRETE, masked_leaves=("action",))


@pytest.fixture(scope="module")
def policy(artefact: PolicyArtefact) -> LoadedPolicy:
    return load_policy(artefact)


def weights_of(artefact: PolicyArtefact) -> dict[str, Any]:
    return decode_tensors(artefact.weights, "weights")


def with_weights(artefact: PolicyArtefact, weights: dict[str, Any]) -> PolicyArtefact:
    return seal(msgspec.structs.replace(artefact, weights=save_safetensors(weights)))


def with_graph(artefact: PolicyArtefact, model: Any) -> PolicyArtefact:
    return seal(msgspec.structs.replace(artefact, graph=model.SerializeToString()))


def test_loaded_policy_says_what_it_is(policy: LoadedPolicy, artefact: PolicyArtefact) -> None:
    """Version, update, names and manifest are those of the artefact."""
    assert policy.manifest == artefact.manifest
    assert (policy.policy_version, policy.learner_update) == (1, 0)
    assert policy.input_names == ["observation", "action_mask", "noise"]
    assert policy.output_names == ["action", "behaviour_log_prob", "value"]


@pytest.mark.parametrize("rows", [1, 2, 1024])
def test_run_gives_every_output_a_row_for_each_input_row(policy: LoadedPolicy, rows: int) -> None:
    """Outputs have the declared dtypes and one row an actor, whatever the batch."""
    outputs = policy.run(random_inputs(policy.manifest, rows))
    assert {name: (array.shape, array.dtype.name) for name, array in outputs.items()} == {
        "action": ((rows,), "int64"),
        "behaviour_log_prob": ((rows,), "float32"),
        "value": ((rows,), "float32"),
    }


def test_masked_action_is_never_chosen(policy: LoadedPolicy) -> None:
    """Sampling respects the mask, and the log-prob of a forced choice is 0."""
    inputs = random_inputs(policy.manifest, 256)
    inputs["action_mask"][:] = [False, True, False]
    outputs = policy.run(inputs)
    assert (outputs["action"] == 1).all()
    assert not outputs["behaviour_log_prob"].any()


def test_swap_reuses_the_parsed_graph(artefact: PolicyArtefact, policy: LoadedPolicy) -> None:
    """The next version of one graph is loaded without parsing it again, and acts with its own weights."""
    following = make_artefact(OBSERVATION, DISCRETE, masked_leaves=("action",), policy_version=2, seed=1)
    swapped = load_policy(following, previous=policy)
    inputs = random_inputs(policy.manifest, 16)
    assert swapped.template is policy.template
    assert swapped.policy_version == 2
    fresh = load_policy(following).run(inputs)
    for name, array in swapped.run(inputs).items():
        np.testing.assert_array_equal(array, fresh[name])
    assert not np.array_equal(fresh["value"], policy.run(inputs)["value"])


def test_old_version_acts_on_after_a_swap(artefact: PolicyArtefact) -> None:
    """A version that was swapped out still gives what it gave."""
    old = load_policy(artefact)
    inputs = random_inputs(old.manifest, 8)
    before = old.run(inputs)
    load_policy(make_artefact(OBSERVATION, DISCRETE, masked_leaves=("action",), seed=1), previous=old)
    for name, array in old.run(inputs).items():
        np.testing.assert_array_equal(array, before[name])


def test_previous_version_of_another_graph_is_not_used(policy: LoadedPolicy) -> None:
    """A version of another architecture is parsed anew."""
    other = load_policy(make_artefact(OBSERVATION, BOX), previous=policy)
    assert other.template is not policy.template
    assert other.output_names == ["action", "policy_action", "behaviour_log_prob", "value"]


def test_box_actions_are_clipped_and_policy_actions_are_not() -> None:
    """The environment gets what is inside the space; the record keeps the sample."""
    loaded = load_policy(make_artefact(OBSERVATION, BOX))
    outputs = loaded.run(random_inputs(loaded.manifest, 512))
    assert np.abs(outputs["action"]).max() == 1
    assert np.abs(outputs["policy_action"]).max() > 1
    np.testing.assert_array_equal(outputs["action"], np.clip(outputs["policy_action"], -1, 1))


def test_one_policy_serves_several_threads(policy: LoadedPolicy) -> None:
    """Concurrent calls give what calls in turn give."""
    batches = [random_inputs(policy.manifest, 16, seed) for seed in range(16)]
    alone = [policy.run(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(policy.run, batches))
    for one, other in zip(alone, together, strict=True):
        for name in policy.output_names:
            np.testing.assert_array_equal(one[name], other[name])


# -- refused artefacts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["graph", "weights", "golden"])
def test_corrupt_part_is_refused(artefact: PolicyArtefact, part: str) -> None:
    """A flipped bit in any file is found by its digest."""
    data = bytearray(getattr(artefact, part))
    data[-1] ^= 1
    with pytest.raises(DigestMismatch, match=part):
        load_policy(msgspec.structs.replace(artefact, **{part: bytes(data)}))


def test_graph_is_checked_also_when_the_previous_one_is_reused(
    artefact: PolicyArtefact, policy: LoadedPolicy
) -> None:
    """A corrupt graph does not slip through because its digest names a graph that is known."""
    with pytest.raises(DigestMismatch):
        load_policy(msgspec.structs.replace(artefact, graph=b"other"), previous=policy)


def test_missing_tensor_is_refused(artefact: PolicyArtefact) -> None:
    """Weights without one of the graph's parameters are refused by its name."""
    weights = weights_of(artefact)
    del weights["value.bias"]
    with pytest.raises(ArtefactError, match=r"value\.bias"):
        load_policy(with_weights(artefact, weights))


def test_extra_tensor_is_refused(artefact: PolicyArtefact) -> None:
    """Weights with a tensor that the graph lacks are refused by its name."""
    with pytest.raises(ArtefactError, match=r"stray\.weight"):
        load_policy(with_weights(artefact, weights_of(artefact) | {"stray.weight": np.ones(1, np.float32)}))


@pytest.mark.parametrize("change", [lambda a: a.T.copy(), lambda a: a.astype(np.float64)])
def test_tensor_of_wrong_shape_or_dtype_is_refused(artefact: PolicyArtefact, change: Any) -> None:
    """A tensor of another shape or dtype is refused by its name."""
    weights = weights_of(artefact)
    weights["encoder.weight"] = change(weights["encoder.weight"])
    with pytest.raises(ArtefactError, match=r"encoder\.weight"):
        load_policy(with_weights(artefact, weights))


def test_external_data_is_refused(artefact: PolicyArtefact) -> None:
    """A graph that names a file is refused."""
    model = onnx.load_model_from_string(artefact.graph)
    entry = model.graph.initializer[0].external_data.add()
    entry.key, entry.value = "location", "../../secret"
    with pytest.raises(ArtefactError, match="external data"):
        load_policy(with_graph(artefact, model))


def test_custom_domain_is_refused(artefact: PolicyArtefact) -> None:
    """A graph with an operator of a custom domain is refused."""
    model = onnx.load_model_from_string(artefact.graph)
    model.graph.node[0].domain = "custom.operators"
    with pytest.raises(ArtefactError, match=r"custom\.operators"):
        load_policy(with_graph(artefact, model))


def test_graph_that_onnx_runtime_refuses_is_an_artefact_error(artefact: PolicyArtefact) -> None:
    """What ONNX Runtime raises arrives as ours, naming the version."""
    model = onnx.load_model_from_string(artefact.graph)
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ArtefactError, match="policy test version 1"):
        load_policy(with_graph(artefact, model))


def rename(model: Any, old: str, new: str) -> None:
    for end in (*model.graph.input, *model.graph.output):
        if end.name == old:
            end.name = new
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]


@pytest.mark.parametrize("name", ["observation", "action_mask", "noise", "action", "value"])
def test_graph_with_other_ends_than_the_manifest_is_refused(artefact: PolicyArtefact, name: str) -> None:
    """An input or output of another name than the manifest's is refused."""
    model = onnx.load_model_from_string(artefact.graph)
    rename(model, name, "renamed")
    with pytest.raises(ArtefactError, match="renamed"):
        load_policy(with_graph(artefact, model))


def test_manifest_with_another_shape_than_the_graph_is_refused(artefact: PolicyArtefact) -> None:
    """A spec that does not fit the graph is refused, naming the input."""
    spec = ObservationSpec(leaves=(LeafSpec(name="observation", kind="box", shape=(5,), dtype="float32"),))
    manifest = msgspec.structs.replace(artefact.manifest, observation_spec=spec)
    with pytest.raises(ArtefactError, match="input observation"):
        load_policy(msgspec.structs.replace(artefact, manifest=manifest))


def test_manifest_with_another_dtype_than_the_graph_is_refused(artefact: PolicyArtefact) -> None:
    """A spec of another dtype than the graph's output is refused."""
    leaf = msgspec.structs.replace(DISCRETE.leaves[0], dtype="int32")
    manifest = msgspec.structs.replace(artefact.manifest, action_spec=ActionSpec(leaves=(leaf,)))
    with pytest.raises(ArtefactError, match="output action"):
        load_policy(msgspec.structs.replace(artefact, manifest=manifest))


def test_graph_with_a_fixed_batch_is_refused(artefact: PolicyArtefact) -> None:
    """A graph that runs one number of rows only is refused."""
    model = onnx.load_model_from_string(artefact.graph)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8
    with pytest.raises(ArtefactError, match="observation"):
        load_policy(with_graph(artefact, model))


# -- golden vectors -----------------------------------------------------------------------------------------


def test_weights_of_another_version_fail_the_golden_vectors(artefact: PolicyArtefact) -> None:
    """An artefact whose weights were exchanged, digests and all, is refused."""
    other = make_artefact(OBSERVATION, DISCRETE, masked_leaves=("action",), seed=1)
    with pytest.raises(GoldenMismatch, match="golden"):
        load_policy(with_weights(artefact, weights_of(other)))


@pytest.mark.parametrize(("name", "change"), [("action", 1), ("behaviour_log_prob", 1e-2), ("value", -1e-2)])
def test_changed_golden_output_is_found(artefact: PolicyArtefact, name: str, change: float) -> None:
    """Integers must be equal, floats within the tolerance; the output is named."""
    inputs, outputs = decode_golden(artefact.golden)
    outputs[name][3] += np.array(change).astype(outputs[name].dtype)
    bent = seal(msgspec.structs.replace(artefact, golden=encode_golden(inputs, outputs)))
    with pytest.raises(GoldenMismatch, match=name):
        load_policy(bent)


def test_rounding_differences_pass_the_golden_vectors(artefact: PolicyArtefact) -> None:
    """Another machine's last digits do not refuse an artefact."""
    inputs, outputs = decode_golden(artefact.golden)
    outputs["value"] += np.float32(2e-5)
    load_policy(seal(msgspec.structs.replace(artefact, golden=encode_golden(inputs, outputs))))


def test_golden_output_of_another_shape_is_found(artefact: PolicyArtefact) -> None:
    """Golden outputs that would only compare by broadcasting are refused."""
    alike = ({n: np.repeat(a[:1], 8, 0) for n, a in side.items()} for side in decode_golden(artefact.golden))
    inputs, outputs = alike
    load_policy(seal(msgspec.structs.replace(artefact, golden=encode_golden(inputs, outputs))))
    outputs["value"] = outputs["value"][:1]
    with pytest.raises(GoldenMismatch, match="value"):
        load_policy(seal(msgspec.structs.replace(artefact, golden=encode_golden(inputs, outputs))))


@pytest.mark.parametrize("side", [0, 1])
def test_incomplete_golden_vectors_are_refused(artefact: PolicyArtefact, side: int) -> None:
    """Golden vectors that leave out an input or output prove too little."""
    sides = decode_golden(artefact.golden)
    sides[side].pop(next(iter(sides[side])))
    with pytest.raises(ArtefactError, match="golden"):
        load_policy(seal(msgspec.structs.replace(artefact, golden=encode_golden(*sides))))


def test_golden_vectors_without_rows_are_refused(artefact: PolicyArtefact) -> None:
    """Empty golden vectors prove nothing."""
    inputs, outputs = ({n: a[:0] for n, a in side.items()} for side in decode_golden(artefact.golden))
    with pytest.raises(GoldenMismatch, match="no rows"):
        load_policy(seal(msgspec.structs.replace(artefact, golden=encode_golden(inputs, outputs))))


def test_golden_file_with_something_else_is_refused(artefact: PolicyArtefact) -> None:
    """Only inputs and outputs may be in a golden file."""
    stray = save_safetensors({"stray": np.ones(1, np.float32)})
    with pytest.raises(ArtefactError, match="stray"):
        load_policy(seal(msgspec.structs.replace(artefact, golden=stray)))


# -- errors while acting ------------------------------------------------------------------------------------


def test_missing_input_is_an_inference_error_that_names_the_version(policy: LoadedPolicy) -> None:
    """An input that was left out is named, with the version."""
    inputs = random_inputs(policy.manifest, 2)
    del inputs["noise"]
    with pytest.raises(InferenceError, match=r"policy test version 1.*noise"):
        policy.run(inputs)


def test_unknown_input_is_refused(policy: LoadedPolicy) -> None:
    """An input that the graph does not have is not ignored."""
    with pytest.raises(InferenceError, match="stray"):
        policy.run(random_inputs(policy.manifest, 2) | {"stray": np.ones(2, np.float32)})


@pytest.mark.parametrize("name", ["observation", "action_mask", "noise"])
def test_inputs_of_unequal_rows_are_refused(policy: LoadedPolicy, name: str) -> None:
    """One row of noise or mask is not broadcast over many observations."""
    inputs = random_inputs(policy.manifest, 4)
    inputs[name] = inputs[name][:1]
    with pytest.raises(InferenceError, match="rows"):
        policy.run(inputs)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda a: a.astype(np.float64),
        lambda a: a[:, :3],
        lambda a: a[:, None],
        lambda a: a[:0],
        lambda a: a.astype(object),
    ],
)
def test_input_of_wrong_dtype_or_shape_is_refused(policy: LoadedPolicy, spoil: Any) -> None:
    """A wrong observation is a typed error, whatever is wrong with it."""
    inputs = random_inputs(policy.manifest, 2)
    inputs["observation"] = spoil(inputs["observation"])
    with pytest.raises(InferenceError):
        policy.run(inputs)


def test_no_rows_is_refused(policy: LoadedPolicy) -> None:
    """A batch of nobody is an error."""
    with pytest.raises(InferenceError, match="no rows"):
        policy.run(random_inputs(policy.manifest, 0))


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_observation_that_is_not_finite_gives_no_action(
    policy: LoadedPolicy, rows: int, value: float
) -> None:
    """NaN in an observation becomes an error that names the row, not action 0."""
    inputs = random_inputs(policy.manifest, rows)
    inputs["observation"][rows - 1, 2] = np.nan if np.isnan(value) else value
    if np.isnan(value):
        with pytest.raises(InferenceError, match=rf"not finite in rows \[{rows - 1}\]"):
            policy.run(inputs)
    else:  # tanh bounds it: the action is sound
        assert np.isfinite(policy.run(inputs)["behaviour_log_prob"]).all()


@pytest.mark.parametrize("action_spec", [DISCRETE, BOX])
@pytest.mark.parametrize("name", ["head.action.weight", "value.bias"])
def test_nan_weights_give_no_action(
    action_spec: ActionSpec, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights with NaN are refused at load, and raise while acting if they got that far."""
    good = make_artefact(OBSERVATION, action_spec)
    weights = weights_of(good)
    weights[name] = np.full_like(weights[name], np.nan)
    bad = finish_artefact(good.manifest, good.graph, weights)
    with pytest.raises(GoldenMismatch, match="not finite"):
        load_policy(bad)
    monkeypatch.setattr(engine, "_check_golden", lambda loaded, golden: None)
    loaded = load_policy(bad)
    with pytest.raises(InferenceError, match="not finite"):
        loaded.run(random_inputs(loaded.manifest, 1))


def test_large_but_finite_values_pass() -> None:
    """A value whose square overflows is not taken for infinity."""
    good = make_artefact(OBSERVATION, DISCRETE)
    weights = weights_of(good)
    weights["value.bias"] = np.full_like(weights["value.bias"], 3e38)
    loaded = load_policy(finish_artefact(good.manifest, good.graph, weights))
    value = loaded.run(random_inputs(loaded.manifest, 64))["value"]
    assert np.isfinite(value).all()
    assert value.min() > 1e38
