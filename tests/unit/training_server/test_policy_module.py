"""The policy module: it learns from exactly what it did, and says what its graph takes and gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from relayrl_shared.errors import ConfigError, SpecMismatch
from relayrl_shared.policy.golden import random_inputs
from relayrl_shared.spaces import (
    ActionSpec,
    ObservationSpec,
    leaf_log_prob_name,
    mask_leaf_name,
    policy_action_name,
)
from relayrl_training_server.networks import NetworkSettings
from relayrl_training_server.policy_module import PolicyModule

HYBRID = spaces.Dict(
    {
        "move": spaces.Box(-1, 1, (2,)),
        "use": spaces.Tuple([spaces.Discrete(4, start=1), spaces.MultiBinary(3)]),
        "aim": spaces.MultiDiscrete([3, 2]),
    }
)
HYBRID_MASKS = ("action.use.0", "action.use.1", "action.aim")
SPACES: dict[str, tuple[spaces.Space[Any], tuple[str, ...]]] = {
    "discrete": (spaces.Discrete(3, start=2), ("action",)),
    "multi_discrete": (spaces.MultiDiscrete([3, 2]), ("action",)),
    "multi_binary": (spaces.MultiBinary(3), ("action",)),
    "box": (spaces.Box(-1, 1, (2, 2)), ()),
    "integers": (spaces.Box(-3, 3, (2,), np.int32), ()),
    "hybrid": (HYBRID, HYBRID_MASKS),
}
OBSERVATION = spaces.Dict({"x": spaces.Box(-9, 9, (3,)), "n": spaces.Discrete(4)})
SMALL = NetworkSettings(hidden_sizes=(8,))


def make_module(
    space: spaces.Space[Any],
    masked_leaves: tuple[str, ...] = (),
    network: NetworkSettings = SMALL,
    **options: Any,
) -> PolicyModule:
    module = PolicyModule(
        ObservationSpec.from_gymnasium(OBSERVATION),
        ActionSpec.from_gymnasium(space),
        masked_leaves,
        network,
        generator=torch.Generator().manual_seed(0),
        **options,
    )
    randomise(module)
    return module


def randomise(module: PolicyModule) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)


def act(module: PolicyModule, rows: int = 32) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    inputs = {name: torch.from_numpy(array) for name, array in random_inputs(module, rows, seed=5).items()}
    outputs = module(*inputs.values())
    return inputs, dict(zip(module.output_names, outputs, strict=True))


def evaluation_of(module: PolicyModule, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Any:
    leaves = [leaf.name for leaf in module.action_spec.leaves]
    return module.evaluate(
        {leaf.name: inputs[leaf.name] for leaf in module.observation_spec.leaves},
        {name: inputs[mask_leaf_name(name)] for name in module.masked_leaves},
        {name: outputs[name] for name in leaves},
        {name: outputs[policy_action_name(name)] for name in module.outputs.policy_action},
    )


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("masked", [False, True])
def test_evaluate_repeats_the_log_prob_of_acting_to_the_bit(name: str, masked: bool) -> None:
    """Evaluating the steps that were taken gives the recorded numbers: the first ratio is 1."""
    space, masks = SPACES[name]
    module = make_module(space, masks if masked else ())
    with torch.no_grad():
        inputs, outputs = act(module)
        seen = evaluation_of(module, inputs, outputs)
    assert torch.equal(seen.log_prob, outputs["behaviour_log_prob"])
    assert torch.equal(seen.value, outputs["value"])
    if module.outputs.leaf_log_prob:
        for leaf, log_prob in seen.leaf_log_prob.items():
            assert torch.equal(log_prob, outputs[leaf_log_prob_name(leaf)])


def test_tanh_squash_repeats_its_log_prob_too() -> None:
    """The squashed policy is evaluated by its pre-squash sample."""
    module = make_module(spaces.Box(-2, 3, (2,)), network=NetworkSettings(squash="tanh"))
    inputs, outputs = act(module)
    assert torch.equal(evaluation_of(module, inputs, outputs).log_prob, outputs["behaviour_log_prob"])
    assert (outputs["action"] != outputs["policy_action"]).all()


def test_joint_log_prob_is_the_sum_of_the_leaves() -> None:
    """Heads of a hybrid action are independent."""
    module = make_module(HYBRID, HYBRID_MASKS)
    _, outputs = act(module)
    leaves = [leaf_log_prob_name(leaf.name) for leaf in module.action_spec.leaves]
    torch.testing.assert_close(
        outputs["behaviour_log_prob"], torch.stack([outputs[name] for name in leaves]).sum(0)
    )


@pytest.mark.parametrize("name", SPACES)
def test_actions_are_inside_the_space(name: str) -> None:
    """What the environment gets is always an element of its space, of the right dtype."""
    space, masks = SPACES[name]
    module = make_module(space, masks)
    _, outputs = act(module)
    spec = module.action_spec
    for row in range(32):
        leaves = {leaf.name: outputs[leaf.name][row].detach().numpy() for leaf in spec.leaves}
        assert space.contains(spec.unflatten(leaves))


def test_names_of_a_single_leaf_policy() -> None:
    """One leaf: no leaf_log_prob; discrete: no policy action."""
    module = make_module(spaces.Discrete(2), ("action",))
    assert module.input_names == ["observation.n", "observation.x", "action_mask", "noise"] or (
        module.input_names == ["observation.x", "observation.n", "action_mask", "noise"]
    )
    assert module.output_names == ["action", "behaviour_log_prob", "value"]
    assert [(leaf.kind, leaf.width) for leaf in module.noise] == [("gumbel", 2)]


def test_names_of_a_hybrid_policy() -> None:
    """Each leaf of a hybrid has its noise and log-prob; continuous ones their policy action."""
    module = make_module(HYBRID, HYBRID_MASKS)
    assert "policy_action.move" in module.output_names
    assert "policy_action.aim" not in module.output_names
    assert {"leaf_log_prob.move", "leaf_log_prob.use.0"} <= set(module.output_names)
    assert {leaf.name: (leaf.kind, leaf.width) for leaf in module.noise} == {
        "noise.move": ("normal", 2),
        "noise.use.0": ("gumbel", 4),
        "noise.use.1": ("logistic", 3),
        "noise.aim": ("gumbel", 5),
    }


def test_policy_without_value_network_has_no_value() -> None:
    """Algorithms without a value estimate have no such output; evaluate gives zeros."""
    module = make_module(spaces.Discrete(2), value_network=False)
    inputs, outputs = act(module)
    assert module.output_names == ["action", "behaviour_log_prob"]
    assert not module.outputs.value
    assert not evaluation_of(module, inputs, outputs).value.any()
    assert not any(name.startswith("vf") for name in module.state_dict())


def test_value_of_observations_is_that_of_acting() -> None:
    """`value` needs observations only."""
    module = make_module(spaces.Discrete(2))
    inputs, outputs = act(module)
    observation = {leaf.name: inputs[leaf.name] for leaf in module.observation_spec.leaves}
    assert torch.equal(module.value(observation), outputs["value"])


def test_action_and_value_networks_are_apart() -> None:
    """The policy's loss does not touch the value network, nor the other way round."""
    module = make_module(spaces.Discrete(2))
    inputs, outputs = act(module)
    seen = evaluation_of(module, inputs, outputs)
    seen.log_prob.sum().backward()
    gradients = {name: parameter.grad is not None for name, parameter in module.named_parameters()}
    assert {name.split(".")[0] for name, given in gradients.items() if given} == {"pi"}
    module.zero_grad()
    seen.value.sum().backward()
    touched = {n.split(".")[0] for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"vf"}


def test_learning_raises_the_log_prob_of_what_it_is_told() -> None:
    """Gradient steps on log_prob make the actions of each kind of leaf more likely."""
    module = make_module(HYBRID, HYBRID_MASKS)
    with torch.no_grad():
        inputs, outputs = act(module)
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-2)
    before = evaluation_of(module, inputs, outputs)
    for _ in range(10):
        optimiser.zero_grad()
        (-evaluation_of(module, inputs, outputs).log_prob.mean()).backward()
        optimiser.step()
    after = evaluation_of(module, inputs, outputs)
    for leaf, log_prob in after.leaf_log_prob.items():
        assert log_prob.mean() > before.leaf_log_prob[leaf].mean()


@pytest.mark.parametrize(
    ("which", "message"),
    [(0, "observation"), (1, "action_mask"), (2, "action"), (3, "policy_action")],
)
def test_evaluate_names_what_is_missing(which: int, message: str) -> None:
    """A mask or leaf under another key is an error, never 'everything allowed'."""
    module = make_module(HYBRID, HYBRID_MASKS)
    inputs, outputs = act(module)
    given: list[dict[str, Tensor]] = [
        {leaf.name: inputs[leaf.name] for leaf in module.observation_spec.leaves},
        {name: inputs[mask_leaf_name(name)] for name in module.masked_leaves},
        {leaf.name: outputs[leaf.name] for leaf in module.action_spec.leaves},
        {name: outputs[policy_action_name(name)] for name in module.outputs.policy_action},
    ]
    given[which] = {f"other_{name}": tensor for name, tensor in given[which].items()}
    with pytest.raises(SpecMismatch, match=f"no {message} for"):
        module.evaluate(*given)


@pytest.mark.parametrize("leaf", ["action.move", "action.nothing", "action_mask.aim"])
def test_masking_what_cannot_be_masked_is_refused(leaf: str) -> None:
    """A box, or a name that is no action leaf, cannot take a mask."""
    with pytest.raises(ConfigError, match=leaf):
        make_module(HYBRID, (leaf,))


def test_statistics_change_what_the_networks_see() -> None:
    """With mean and inv_std set, acting equals acting on observations normalised by hand."""
    module = make_module(spaces.Discrete(3))
    assert module.normalised_leaves == ("observation.x",)
    plain = make_module(spaces.Discrete(3))
    mean, inv_std = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.1, 2.0, 1.0])
    plain.set_normaliser("observation.x", torch.zeros(3), torch.ones(3))
    module.set_normaliser("observation.x", mean.double(), inv_std.double())
    inputs, _ = act(module)
    by_hand = inputs | {"observation.x": (inputs["observation.x"] - mean) * inv_std}
    for ours, theirs in zip(module(*inputs.values()), plain(*by_hand.values()), strict=True):
        assert torch.equal(ours, theirs)
    assert module.normaliser("observation.x").mean.dtype == torch.float32


def test_leaf_without_statistics_is_refused() -> None:
    """Only float leaves are normalised; the message lists them."""
    module = make_module(spaces.Discrete(3))
    with pytest.raises(SpecMismatch, match=r"observation\.n has no statistics.*observation\.x"):
        module.set_normaliser("observation.n", torch.zeros(4), torch.ones(4))


def test_equal_generators_make_equal_policies() -> None:
    """The initial weights come from the given generator alone."""

    def fresh(seed: int) -> dict[str, Tensor]:
        specs = ObservationSpec.from_gymnasium(OBSERVATION), ActionSpec.from_gymnasium(HYBRID)
        return PolicyModule(*specs, generator=torch.Generator().manual_seed(seed)).state_dict()

    first, same, other = fresh(0), fresh(0), fresh(1)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_fresh_policy_is_nearly_uniform() -> None:
    """The last layer's small gain starts every action about equally likely."""
    specs = ObservationSpec.from_gymnasium(OBSERVATION), ActionSpec.from_gymnasium(spaces.Discrete(4))
    module = PolicyModule(*specs, generator=torch.Generator().manual_seed(0))
    _, outputs = act(module)
    torch.testing.assert_close(
        outputs["behaviour_log_prob"].exp(), torch.full((32,), 0.25), atol=0.02, rtol=0
    )


def test_allowed_nan_gives_finite_outputs() -> None:
    """With allow_nan a missing reading counts as the mean, and everything stays finite."""
    for allow_nan in (False, True):
        module = make_module(spaces.Discrete(3), allow_nan=allow_nan)
        inputs, _ = act(module)
        inputs["observation.x"][:, 1] = torch.nan
        finite = [bool(torch.isfinite(output).all()) for output in module(*inputs.values())[1:]]
        assert finite == [allow_nan, allow_nan]
