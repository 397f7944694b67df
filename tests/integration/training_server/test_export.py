"""Export through the real exporter and engine: the graph follows its weights, whatever they are (H1)."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from gymnasium import spaces
from torch import nn

from relayrl_shared.errors import ArtefactError, GoldenMismatch
from relayrl_shared.policy.engine import LoadedPolicy, load_policy
from relayrl_shared.policy.golden import decode_golden, random_inputs
from relayrl_shared.policy.graph import decode_tensors
from relayrl_shared.policy.manifest import PolicyArtefact
from relayrl_shared.spaces import ActionSpec, ObservationSpec, mask_leaf_name
from relayrl_shared.testing.policies import seal
from relayrl_training_server import export
from relayrl_training_server.networks import NetworkSettings
from relayrl_training_server.policy_module import PolicyModule

pytestmark = pytest.mark.slow

BOX = spaces.Box(-np.inf, np.inf, (4,), np.float32)
RICH = spaces.Dict(
    {
        "camera": spaces.Box(0, 255, (4, 3, 2), np.uint8),
        "pose": spaces.Tuple((spaces.Box(-5, 5, (), np.float64), spaces.Box(-5, 5, (2, 2), np.float32))),
        "gear": spaces.Discrete(4, start=-1),
        "switches": spaces.MultiDiscrete([2, 3]),
        "lamps": spaces.MultiBinary(3),
    }
)
MATRIX_OF_CHOICES = np.array([[2, 3], [4, 2]])
HYBRID = spaces.Dict(
    {
        "move": spaces.Box(np.array([-1, -2], np.float32), np.array([1, 3], np.float32)),
        "use": spaces.Tuple([spaces.Discrete(4, start=1), spaces.MultiBinary(3)]),
        "aim": spaces.MultiDiscrete([3, 2]),
    }
)
HYBRID_MASKS = ("action.use.0", "action.use.1", "action.aim")
RELU = NetworkSettings(activation="relu", hidden_sizes=(32,))
TANH = NetworkSettings(squash="tanh")
CLIP = NetworkSettings()

MATRIX: dict[str, tuple[spaces.Space[Any], spaces.Space[Any], tuple[str, ...], NetworkSettings]] = {
    "cartpole": (BOX, spaces.Discrete(2), (), CLIP),
    "masked": (BOX, spaces.Discrete(5, start=-2), ("action",), RELU),
    "multi_discrete": (spaces.Discrete(6), spaces.MultiDiscrete(MATRIX_OF_CHOICES), ("action",), CLIP),
    "multi_binary": (BOX, spaces.MultiBinary(4), ("action",), CLIP),
    "clip": (BOX, spaces.Box(-1, 1, (2, 3), np.float64), (), RELU),
    "tanh": (BOX, spaces.Box(-2, 2, (1,), np.float32), (), TANH),
    "integers": (spaces.Box(-9, 9, (2,), np.int16), spaces.Box(0, 255, (2,), np.uint8), (), CLIP),
    "hybrid": (RICH, HYBRID, HYBRID_MASKS, TANH),
}
FIELDS: dict[str, Any] = {
    "policy": "test",
    "run_id": "run",
    "lineage_id": "lineage",
    "learner_update": 3,
    "algorithm": "ppo",
    "hyperparameters": {"lr": 1e-3},
}


def make_module(name: str, seed: int = 0, **options: Any) -> PolicyModule:
    observation, action, masks, network = MATRIX[name]
    return PolicyModule(
        ObservationSpec.from_gymnasium(observation),
        ActionSpec.from_gymnasium(action),
        masks,
        network,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


def randomise(module: PolicyModule, seed: int) -> None:
    """Every tensor of the state gets another value, statistics and standard deviations included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.4)


@pytest.fixture(scope="module")
def graphs() -> dict[str, bytes]:
    """The exported graphs by name of the matrix, filled as tests need them."""
    return {}


def graph_of(graphs: dict[str, bytes], name: str) -> bytes:
    if name not in graphs:
        graphs[name] = export.export_graph(make_module(name))
    return graphs[name]


@pytest.fixture(scope="module")
def cartpole(graphs: dict[str, bytes]) -> PolicyArtefact:
    return export.build_artefact(make_module("cartpole"), graph_of(graphs, "cartpole"), **FIELDS)


def assert_equal_to_torch(policy: LoadedPolicy, module: PolicyModule, rows: int, greedy: bool) -> None:
    inputs = random_inputs(module, rows, seed=rows)
    if greedy:
        for noise in module.noise:
            inputs[noise.name][:] = 0
    tensors = [torch.from_numpy(array) for array in inputs.values()]
    with torch.no_grad():
        expected = dict(zip(module.output_names, module(*tensors), strict=True))
        clear = (module.margin(*tensors) > 1e-4).numpy()
    assert clear.mean() > 0.95 or rows < 30
    outputs = policy.run(inputs)
    assert list(outputs) == module.output_names
    for name, array in outputs.items():
        wanted = expected[name].numpy()
        assert (array.dtype, array.shape) == (wanted.dtype, wanted.shape)
        if array.dtype.kind == "f":
            # 1e-5 of rounding, at the scale of the numbers: a log-prob may be a sum over dozens of parts.
            np.testing.assert_allclose(array[clear], wanted[clear], rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(array[clear], wanted[clear])


@pytest.mark.parametrize("name", MATRIX)
def test_randomised_weights_act_as_in_torch_after_a_swap(graphs: dict[str, bytes], name: str) -> None:
    """With all tensors randomised and swapped in, the graph equals the module for every batch size."""
    module = make_module(name)
    graph = graph_of(graphs, name)
    policy = None
    for seed in range(3):
        randomise(module, seed)
        artefact = export.build_artefact(module, graph, **FIELDS)
        policy = load_policy(artefact, previous=policy)
        for rows in (1, 2, 3, 33, 1024):
            for greedy in (False, True):
                assert_equal_to_torch(policy, module, rows, greedy)


@pytest.mark.parametrize("name", MATRIX)
def test_every_tensor_is_a_parameter_of_its_own_name(graphs: dict[str, bytes], name: str) -> None:
    """The graph's parameters are the module's state, and its weights file holds exactly them."""
    module = make_module(name)
    policy = load_policy(export.build_artefact(module, graph_of(graphs, name), **FIELDS))
    assert policy.template.parameters == module.state_dict().keys()
    assert decode_tensors(export.weights_bytes(module), "weights").keys() == module.state_dict().keys()


@pytest.mark.parametrize("name", ["cartpole", "tanh", "hybrid"])
def test_each_tensor_alone_changes_what_the_graph_does(graphs: dict[str, bytes], name: str) -> None:
    """No tensor of the weights file is decoration: changing any one of them is seen in the outputs."""
    module = make_module(name)
    randomise(module, 0)
    graph = graph_of(graphs, name)
    policy = load_policy(export.build_artefact(module, graph, **FIELDS))
    inputs = random_inputs(module, 256)
    before = policy.run(inputs)
    for tensor_name, tensor in module.state_dict().items():
        kept = tensor.clone()
        tensor.add_(0.5)
        after = load_policy(export.build_artefact(module, graph, **FIELDS), previous=policy).run(inputs)
        tensor.copy_(kept)
        assert any(not np.array_equal(before[key], after[key]) for key in before), tensor_name


def test_fresh_weights_load_and_name_their_version(cartpole: PolicyArtefact) -> None:
    """The first artefact of a run loads, and its manifest says what it was given."""
    policy = load_policy(cartpole)
    assert policy.learner_update == 3
    assert policy.policy_version is None
    assert policy.manifest.hyperparameters == {"lr": 1e-3}
    assert policy.manifest.created_at > 0


def test_log_prob_of_acting_is_repeated_by_evaluate(graphs: dict[str, bytes]) -> None:
    """What the engine recorded is what the learner computes: at lag 0 the ratio is 1 to 1e-5 (H5)."""
    module = make_module("hybrid")
    randomise(module, 7)
    policy = load_policy(export.build_artefact(module, graph_of(graphs, "hybrid"), **FIELDS))
    inputs = random_inputs(module, 512, seed=11)
    outputs = policy.run(inputs)
    leaves = [leaf.name for leaf in module.action_spec.leaves]
    with torch.no_grad():
        seen = module.evaluate(
            {leaf.name: torch.from_numpy(inputs[leaf.name]) for leaf in module.observation_spec.leaves},
            {name: torch.from_numpy(inputs[mask_leaf_name(name)]) for name in module.masked_leaves},
            {name: torch.from_numpy(outputs[name]) for name in leaves},
            {"action.move": torch.from_numpy(outputs["policy_action.move"])},
        )
    ratio = (seen.log_prob - torch.from_numpy(outputs["behaviour_log_prob"])).exp()
    assert float((ratio - 1).abs().max()) < 1e-5 * 5
    np.testing.assert_allclose(seen.value.numpy(), outputs["value"], atol=1e-5, rtol=1e-5)


# -- one architecture, one graph ----------------------------------------------------------------------------

PRINT_DIGEST = """
import sys, torch
from gymnasium import spaces
from relayrl_shared.policy.artefact import digest
from relayrl_shared.spaces import ActionSpec, ObservationSpec
from relayrl_training_server.export import export_graph
from relayrl_training_server.policy_module import PolicyModule
torch.manual_seed(int(sys.argv[1]))
module = PolicyModule(
    ObservationSpec.from_gymnasium(spaces.Box(-float("inf"), float("inf"), (4,))),
    ActionSpec.from_gymnasium(spaces.Discrete(2)),
)
sys.stdout.write(digest(export_graph(module)))
"""


def test_graph_is_the_same_bytes_in_another_process(cartpole: PolicyArtefact) -> None:
    """Another process with other weights exports the same graph and prints nothing of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PRINT_DIGEST, "1"],
        check=True,
        capture_output=True,
        text=True,
        timeout=110,
        env={"PYTHONHASHSEED": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.stdout == cartpole.manifest.graph_digest
    assert done.stderr == ""


def test_graph_holds_no_weights_and_no_traces(cartpole: PolicyArtefact) -> None:
    """The graph's bytes know neither weights nor this machine's files."""
    assert len(cartpole.graph) < 4096
    assert b".py" not in cartpole.graph
    assert b"pytorch" not in cartpole.graph
    model = onnx.load_model_from_string(cartpole.graph)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert [dim.dim_param for dim in model.graph.input[0].type.tensor_type.shape.dim] == ["rows", ""]


def test_other_architectures_have_other_graphs(graphs: dict[str, bytes]) -> None:
    """Specs, masks, squashing and sizes are part of the graph."""
    names = ["cartpole", "masked", "tanh", "clip"]
    assert len({graph_of(graphs, name) for name in names}) == len(names)


def test_export_leaves_everything_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    """Exporting changes neither weights nor training mode nor random state, and logs nothing."""
    module = make_module("cartpole", value_network=False, allow_nan=True)
    module.train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = torch.get_rng_state()
    export.export_graph(module)
    assert module.training
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert caplog.records == []


# -- what export refuses ------------------------------------------------------------------------------------


class WithUnusedTensor(PolicyModule):
    """A module with a parameter that acting does not use."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.stray = nn.Parameter(torch.ones(3))


def test_tensor_that_the_graph_does_not_use_fails_the_export() -> None:
    """A tensor that a swap could not reach is named at export."""
    module = WithUnusedTensor(
        ObservationSpec.from_gymnasium(BOX), ActionSpec.from_gymnasium(spaces.Discrete(2))
    )
    with pytest.raises(ArtefactError, match="stray"):
        export.export_graph(module)


def test_folding_exporter_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expression of weights that was folded to a constant fails the export (measured: off by 0.6)."""
    module = make_module("tanh")
    real = export._export

    def folding(folded: PolicyModule) -> Any:
        model = real(folded)
        node = next(node for node in model.graph.node if node.op_type == "Exp")
        stale = onnx.numpy_helper.from_array(np.ones(1, np.float32), "folded")
        model.graph.initializer.append(stale)
        for user in model.graph.node:
            user.input[:] = ["folded" if name == node.output[0] else name for name in user.input]
        return model

    monkeypatch.setattr(export, "_export", folding)
    with pytest.raises(ArtefactError, match="folded"):
        export.export_graph(module)


@pytest.mark.parametrize("broken", ["pi.0.weight", "vf.0.bias", "encoder.normaliser.0.mean"])
def test_weights_with_nan_cannot_become_an_artefact(graphs: dict[str, bytes], broken: str) -> None:
    """A learner that diverged publishes nothing, and says what is not finite."""
    module = make_module("cartpole")
    module.state_dict()[broken].fill_(torch.nan)
    with pytest.raises(ArtefactError, match="not finite"):
        export.build_artefact(module, graph_of(graphs, "cartpole"), **FIELDS)


# -- golden vectors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MATRIX)
def test_golden_rows_are_clear_and_of_both_kinds(name: str) -> None:
    """Golden vectors hold greedy and sampled rows, masks, and choices that rounding cannot change (H4)."""
    module = make_module(name)
    randomise(module, 1)
    inputs, _ = decode_golden(export.golden_vectors(module))
    tensors = [torch.from_numpy(inputs[name]) for name in module.input_names]
    with torch.no_grad():
        assert (module.margin(*tensors) > 1e-2).all()
    silent = np.all([~inputs[noise.name].any(axis=1) for noise in module.noise], axis=0)
    assert silent.sum() > 1
    assert (~silent).sum() > 1
    for leaf in module.masked_leaves:
        assert not inputs[mask_leaf_name(leaf)].all()


def test_golden_vectors_of_a_policy_without_preference() -> None:
    """Equal logits give no clear greedy row: the sampled rows prove the version alone."""
    module = make_module("cartpole")
    with torch.no_grad():
        for tensor in module.pi.parameters():
            tensor.zero_()
    inputs, outputs = decode_golden(export.golden_vectors(module))
    assert inputs["noise"].any(axis=1).all()
    assert len(outputs["action"]) > 1


def test_golden_vectors_of_a_large_action_space() -> None:
    """Where some of very many parts is always close, the clearest rows serve."""
    module = PolicyModule(
        ObservationSpec.from_gymnasium(BOX), ActionSpec.from_gymnasium(spaces.MultiDiscrete([5] * 800))
    )
    randomise(module, 0)
    inputs, outputs = decode_golden(export.golden_vectors(module))
    tensors = [torch.from_numpy(inputs[name]) for name in module.input_names]
    with torch.no_grad():
        assert (module.margin(*tensors) > 1e-4).all()
    assert len(outputs["action"]) > 1


def test_golden_vectors_belong_to_their_version(cartpole: PolicyArtefact) -> None:
    """Weights of one version with the golden vectors of another are refused."""
    module = make_module("cartpole")
    randomise(module, 5)
    mixed = PolicyArtefact(
        manifest=cartpole.manifest,
        graph=cartpole.graph,
        weights=export.weights_bytes(module),
        golden=cartpole.golden,
    )
    with pytest.raises(GoldenMismatch):
        load_policy(seal(mixed))


def test_equal_weights_make_equal_artefacts(graphs: dict[str, bytes]) -> None:
    """Weights and golden files are the same bytes for the same weights, so that blobs are shared."""
    graph = graph_of(graphs, "cartpole")
    first, second = (
        export.build_artefact(make_module("cartpole"), graph, created_at=1.0, **FIELDS) for _ in range(2)
    )
    assert first == second


def test_policy_without_value_that_allows_nan_exports() -> None:
    """REINFORCE without baseline has a graph without value; missing readings act alike in both worlds."""
    module = make_module("cartpole", value_network=False, allow_nan=True)
    randomise(module, 2)
    policy = load_policy(export.build_artefact(module, export.export_graph(module), **FIELDS))
    assert policy.output_names == ["action", "behaviour_log_prob"]
    inputs = random_inputs(module, 64)
    inputs["observation"][::2, 1] = np.nan
    outputs = policy.run(inputs)
    with torch.no_grad():
        expected = module(*(torch.from_numpy(array) for array in inputs.values()))
    for array, wanted in zip(outputs.values(), expected, strict=True):
        np.testing.assert_allclose(array, wanted.numpy(), rtol=1e-5, atol=1e-5)
