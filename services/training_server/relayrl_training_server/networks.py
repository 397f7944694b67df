"""The plain networks of a policy: what makes one vector of an observation, and the multilayer perceptrons.

Built by `policy_module.PolicyModule`; everything here is exported into the acting graph as it stands.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
import torch
from torch import Tensor, nn

from relayrl_shared.spaces import LeafSpec, ObservationSpec

HIDDEN_GAIN = math.sqrt(2)
ACTION_GAIN = 0.01
VALUE_GAIN = 1.0


class NetworkSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The shape of a policy's networks. Other values are another architecture, with a graph of its own.

    hidden_sizes: widths of the hidden layers, of the action and the value network alike; () for linear ones.
    activation: after each hidden layer.
    squash: how continuous actions come inside their bounds. clip: cut off; tanh: squashed and scaled (the
        bounds must be finite).
    initial_log_std: of continuous actions, at the start; learned, and independent of the observation.
    """

    hidden_sizes: tuple[int, ...] = (64, 64)
    activation: Literal["tanh", "relu"] = "tanh"
    squash: Literal["clip", "tanh"] = "clip"
    initial_log_std: float = 0.0


class Normaliser(nn.Module):
    """Shift and scale of one float leaf: (x - mean) · inv_std, float32 [size] each; identity until set."""

    mean: Tensor
    inv_std: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("inv_std", torch.ones(size))

    def forward(self, values: Tensor) -> Tensor:
        """Args: values float32 [N, size]. Returns: float32 [N, size]."""
        return (values - self.mean) * self.inv_std


class Encoder(nn.Module):
    """Observation leaves to one float32 vector [N, width].

    Floats are normalised; uint8 is scaled to 0 … 1; other integers are cast; discrete parts are one-hot. With
    `allow_nan`, a NaN counts as the leaf's mean (0 after normalisation).
    """

    def __init__(self, observation_spec: ObservationSpec, *, allow_nan: bool) -> None:
        super().__init__()
        self.leaves = observation_spec.leaves
        self.allow_nan = allow_nan
        self.width = sum(sum(leaf.nvec) or leaf.size for leaf in self.leaves)
        self.float_leaves = tuple(leaf.name for leaf in self.leaves if leaf.numpy_dtype.kind == "f")
        sizes = [leaf.size for leaf in self.leaves if leaf.name in self.float_leaves]
        self.normaliser = nn.ModuleList(Normaliser(size) for size in sizes)

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Args: observation leaves [N, *shape] in the spec's dtypes. Returns: float32 [N, width]."""
        parts = [self._encode(leaf, observation[leaf.name]) for leaf in self.leaves]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _encode(self, leaf: LeafSpec, values: Tensor) -> Tensor:
        if leaf.nvec:
            return one_hot(leaf, values)
        numbers = flat(leaf, values).to(torch.float32)
        if leaf.name in self.float_leaves:
            numbers = self.normaliser[self.float_leaves.index(leaf.name)](numbers)
            return torch.where(torch.isnan(numbers), 0.0, numbers) if self.allow_nan else numbers
        return numbers / 255.0 if leaf.dtype == "uint8" else numbers


def flat(leaf: LeafSpec, values: Tensor) -> Tensor:
    """A leaf [N, *shape] as [N, size]; itself where it is so already."""
    if leaf.shape == ():
        return values.unsqueeze(1)
    return values if len(leaf.shape) == 1 else values.reshape(-1, leaf.size)


def one_hot(leaf: LeafSpec, values: Tensor) -> Tensor:
    """A discrete or multi-discrete leaf [N, *shape] as float32 [N, sum nvec]."""
    index = flat(leaf, values).to(torch.int64)
    parts = [
        index[:, i : i + 1] == torch.arange(start, start + count).unsqueeze(0)
        for i, (start, count) in enumerate(zip(starts(leaf), leaf.nvec, strict=True))
    ]
    return torch.cat(parts, dim=1).to(torch.float32)


def starts(leaf: LeafSpec) -> tuple[int, ...]:
    """The first value of each part of a discrete leaf."""
    return leaf.start or (0,) * len(leaf.nvec)


def multilayer_perceptron(
    sizes: Sequence[int],
    activation: Literal["tanh", "relu"],
    output_gain: float,
    generator: torch.Generator | None,
) -> nn.Sequential:
    """Linear layers of these sizes with the activation between them, orthogonal weights, biases 0.

    Args:
        sizes: input width, hidden widths, output width.
        activation: between the layers.
        output_gain: gain of the last layer; the hidden ones have √2.
        generator: of the weights; None takes torch's own.
    """
    layers: list[nn.Module] = []
    for i in range(len(sizes) - 1):
        last = i == len(sizes) - 2
        layers.append(linear(sizes[i], sizes[i + 1], output_gain if last else HIDDEN_GAIN, generator))
        if not last:
            layers.append(nn.Tanh() if activation == "tanh" else nn.ReLU())
    return nn.Sequential(*layers)


def linear(fan_in: int, fan_out: int, gain: float, generator: torch.Generator | None) -> nn.Linear:
    """A linear layer with orthogonal weights (Saxe et al., 2013) of this gain and biases 0."""
    layer = nn.Linear(fan_in, fan_out)
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    nn.init.zeros_(layer.bias)
    return layer
