"""Encoders and perceptrons: what a policy's network sees of an observation, and how it starts."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from relayrl_shared.spaces import ObservationSpec
from relayrl_training_server.networks import Encoder, NetworkSettings, multilayer_perceptron


def encode(space: spaces.Space[Any], *values: Any, allow_nan: bool = False) -> Tensor:
    spec = ObservationSpec.from_gymnasium(space)
    rows = [spec.flatten(value) for value in values]
    leaves = {leaf.name: torch.from_numpy(np.stack([row[leaf.name] for row in rows])) for leaf in spec.leaves}
    encoded: Tensor = Encoder(spec, allow_nan=allow_nan)(leaves)
    return encoded


def test_floats_pass_unchanged_until_statistics_are_set() -> None:
    """Normalisation is the identity, to the bit, until the learner sets it."""
    values = np.array([1e-30, -3.3, 1e30], np.float32)
    encoded = encode(spaces.Box(-np.inf, np.inf, (3,)), values)
    assert encoded.dtype == torch.float32
    assert encoded.numpy().tolist() == [values.tolist()]


def test_scalar_and_matrix_leaves_are_flattened_in_c_order() -> None:
    """A leaf of any shape becomes its elements in C order."""
    assert encode(spaces.Box(-9, 9, ()), np.float32(4)).tolist() == [[4]]
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert encode(spaces.Box(0, 9, (2, 3)), matrix).tolist() == [[0, 1, 2, 3, 4, 5]]


def test_double_observations_are_cast_to_single() -> None:
    """float64 leaves are cast inside the network."""
    assert encode(spaces.Box(-1, 1, (1,), np.float64), np.array([0.1])).item() == np.float32(0.1)


def test_images_are_scaled_and_other_integers_are_not() -> None:
    """uint8 becomes 0 … 1; other integers keep their value."""
    assert encode(spaces.Box(0, 255, (2,), np.uint8), np.array([0, 255], np.uint8)).tolist() == [[0, 1]]
    assert encode(spaces.Box(-99, 99, (1,), np.int32), np.array([-7], np.int32)).tolist() == [[-7]]


def test_discrete_leaves_are_one_hot_with_their_start() -> None:
    """A discrete value is a unit vector, counted from the space's start."""
    assert encode(spaces.Discrete(3, start=5), 5, 7).tolist() == [[1, 0, 0], [0, 0, 1]]


def test_multi_discrete_leaves_are_one_hot_part_by_part() -> None:
    """Each part of a multi-discrete leaf has its own unit vector."""
    assert encode(spaces.MultiDiscrete([2, 3]), np.array([1, 2])).tolist() == [[0, 1, 0, 0, 1]]


def test_bits_are_numbers() -> None:
    """Multi-binary leaves are 0 and 1."""
    assert encode(spaces.MultiBinary(3), np.array([1, 0, 1], np.int8)).tolist() == [[1, 0, 1]]


def test_leaves_are_joined_in_the_order_of_the_spec() -> None:
    """A Dict observation is its leaves, one after the other."""
    space = spaces.Dict({"b": spaces.Discrete(2), "a": spaces.Box(-1, 1, (1,))})
    value = {"a": np.array([0.5], np.float32), "b": 1}
    spec = ObservationSpec.from_gymnasium(space)
    expected = {"observation.a": [0.5], "observation.b": [0.0, 1.0]}
    assert encode(space, value).tolist() == [[x for leaf in spec.leaves for x in expected[leaf.name]]]
    assert Encoder(spec, allow_nan=False).width == 3


def test_statistics_shift_and_scale_their_own_leaf() -> None:
    """(x - mean) · inv_std, for the float leaf that they were set for."""
    spec = ObservationSpec.from_gymnasium(
        spaces.Dict({"x": spaces.Box(-9, 9, (2,)), "y": spaces.Box(-9, 9, (1,)), "n": spaces.Discrete(2)})
    )
    encoder = Encoder(spec, allow_nan=False)
    assert encoder.float_leaves == tuple(
        n for n in (leaf.name for leaf in spec.leaves) if not n.endswith("n")
    )
    which = encoder.float_leaves.index("observation.x")
    state = encoder.state_dict()
    state[f"normaliser.{which}.mean"] = torch.tensor([1.0, 2.0])
    state[f"normaliser.{which}.inv_std"] = torch.tensor([0.5, 4.0])
    encoder.load_state_dict(state)
    leaves = {
        "observation.x": torch.tensor([[3.0, 3.0]]),
        "observation.y": torch.tensor([[7.0]]),
        "observation.n": torch.tensor([0]),
    }
    parts = {"observation.x": [1.0, 4.0], "observation.y": [7.0], "observation.n": [1.0, 0.0]}
    assert encoder(leaves).tolist() == [[x for leaf in spec.leaves for x in parts[leaf.name]]]


def test_nan_spoils_the_encoding_unless_it_is_allowed() -> None:
    """NaN passes through by default; where it is allowed it counts as the mean."""
    space = spaces.Box(-1, 1, (2,))
    value = np.array([np.nan, 0.5], np.float32)
    assert torch.isnan(encode(space, value)[0, 0])
    assert encode(space, value, allow_nan=True).tolist() == [[0, 0.5]]


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_perceptron_has_the_layers_it_was_asked_for(activation: Any) -> None:
    """Hidden layers of the given widths with the activation between, none after the last."""
    network = multilayer_perceptron((3, 8, 5, 2), activation, 1.0, None)
    kinds = [type(layer) for layer in network]
    between = nn.Tanh if activation == "tanh" else nn.ReLU
    assert kinds == [nn.Linear, between, nn.Linear, between, nn.Linear]
    assert network(torch.zeros(7, 3)).shape == (7, 2)


def test_perceptron_without_hidden_layers_is_linear() -> None:
    """hidden_sizes () gives one linear layer."""
    assert len(multilayer_perceptron((3, 2), "tanh", 1.0, None)) == 1


def test_weights_start_orthogonal_with_their_gain_and_biases_zero() -> None:
    """Hidden layers have gain √2, the last one its own (contracts O)."""
    network = multilayer_perceptron((16, 16, 4), "tanh", 0.01, torch.Generator().manual_seed(0))
    hidden, last = (layer for layer in network if isinstance(layer, nn.Linear))
    torch.testing.assert_close(hidden.weight @ hidden.weight.T, 2 * torch.eye(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(last.weight @ last.weight.T, 1e-4 * torch.eye(4), atol=1e-8, rtol=0)
    assert not hidden.bias.any()
    assert not last.bias.any()


def test_generator_decides_the_weights() -> None:
    """Equal generators give equal weights, and torch's own is left alone."""

    def weights(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        layer = multilayer_perceptron((4, 3), "tanh", 1.0, generator)[0]
        assert isinstance(layer, nn.Linear)
        return layer.weight.detach()

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_unknown_network_settings_are_refused() -> None:
    """A misspelt key or an activation that does not exist is an error."""
    for wrong in ({"hiden_sizes": [4]}, {"activation": "gelu"}, {"squash": "sigmoid"}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(wrong, NetworkSettings)
    assert msgspec.convert({"hidden_sizes": [4]}, NetworkSettings).hidden_sizes == (4,)
