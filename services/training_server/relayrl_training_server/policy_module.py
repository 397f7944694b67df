"""The policy that is trained: one torch module that acts (`forward`, exported) and is learned (`evaluate`).

Built by the learner from a run's specs; `export` makes policy artefacts of it. Observation normalisation,
masking, sampling from given noise, log-probabilities and the value are all in here, so that they exist once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from relayrl_shared.errors import ConfigError, SpecMismatch
from relayrl_shared.policy.interface import input_ports, noise_leaves, output_ports
from relayrl_shared.policy.manifest import GraphOutputs
from relayrl_shared.spaces import (
    ActionSpec,
    ObservationSpec,
    leaf_log_prob_name,
    mask_leaf_name,
    noise_leaf_name,
    policy_action_name,
)
from relayrl_training_server.heads import ActionHead, columns, make_head, total
from relayrl_training_server.networks import (
    ACTION_GAIN,
    VALUE_GAIN,
    Encoder,
    NetworkSettings,
    Normaliser,
    multilayer_perceptron,
)

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a policy says of steps that were taken, float32 [N] each, with gradients.

    log_prob: joint; leaf_log_prob: by action leaf; entropy: summed over the leaves; value: in raw reward
    units, zeros if the policy has no value network.
    """

    log_prob: Tensor
    leaf_log_prob: dict[str, Tensor]
    entropy: Tensor
    value: Tensor


class PolicyModule(nn.Module):
    """Separate action and value perceptrons over one encoder, one head an action leaf.

    Attributes: observation_spec, action_spec, masked_leaves, noise, outputs as in a manifest; input_names and
    output_names of the graph, in order.
    """

    def __init__(
        self,
        observation_spec: ObservationSpec,
        action_spec: ActionSpec,
        masked_leaves: tuple[str, ...] = (),
        network: NetworkSettings | None = None,
        *,
        value_network: bool = True,
        allow_nan: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        """Build with fresh weights.

        Args:
            observation_spec: what it sees.
            action_spec: what it does.
            masked_leaves: the action leaves that take a mask.
            network: shape of the networks.
            value_network: False for algorithms without a value estimate; the graph then has no `value`.
            allow_nan: NaN observations count as the mean instead of spoiling the outputs.
            generator: of the initial weights; None takes torch's own.

        Raises:
            ConfigError: a masked leaf that is no maskable action leaf, or settings that do not fit the spec.
        """
        super().__init__()
        settings = network if network is not None else NetworkSettings()
        _check_masked(action_spec, masked_leaves)
        self.observation_spec = observation_spec
        self.action_spec = action_spec
        self.masked_leaves = masked_leaves
        self.allow_nan = allow_nan
        self.noise = noise_leaves(action_spec)
        self.outputs = _graph_outputs(action_spec, value_network)
        self.input_names = [port.name for port in input_ports(self)]
        self.output_names = [port.name for port in output_ports(self)]
        self.encoder = Encoder(observation_spec, allow_nan=allow_nan)
        self.heads = nn.ModuleList(make_head(leaf, settings) for leaf in action_spec.leaves)
        self._widths = [head.width for head in self._heads()]
        sizes = (self.encoder.width, *settings.hidden_sizes)
        self.pi = multilayer_perceptron(
            (*sizes, sum(self._widths)), settings.activation, ACTION_GAIN, generator
        )
        self.vf = (
            multilayer_perceptron((*sizes, 1), settings.activation, VALUE_GAIN, generator)
            if value_network
            else None
        )

    def _heads(self) -> list[ActionHead]:
        return [head for head in self.heads if isinstance(head, ActionHead)]

    # -- acting: the graph ----------------------------------------------------------------------------------

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Act: the graph that is exported.

        Args:
            inputs: one tensor [N, *shape] for each of `input_names`: observation leaves, masks, noise.

        Returns:
            One tensor [N, *shape] for each of `output_names`.
        """
        given = dict(zip(self.input_names, inputs, strict=True))
        encoded = self.encoder(given)
        outputs: dict[str, Tensor] = {}
        log_probs: list[Tensor] = []
        for head, scores in zip(self._heads(), self._scores(encoded), strict=True):
            name = head.leaf.name
            parameters = head.parameters_of(scores, given.get(mask_leaf_name(name)))
            action, policy_action = head.sample(parameters, given[noise_leaf_name(name)])
            log_probs.append(head.log_prob(parameters, action, policy_action))
            outputs[name] = action
            outputs[leaf_log_prob_name(name)] = log_probs[-1]
            if policy_action is not None:
                outputs[policy_action_name(name)] = policy_action
        outputs["behaviour_log_prob"] = total(log_probs)
        outputs["value"] = self._value(encoded)
        return tuple(outputs[name] for name in self.output_names)

    def _scores(self, encoded: Tensor) -> list[Tensor]:
        return columns(self.pi(encoded), self._widths)

    def _value(self, encoded: Tensor) -> Tensor:
        return encoded.new_zeros(len(encoded)) if self.vf is None else self.vf(encoded).squeeze(1)

    # -- learning -------------------------------------------------------------------------------------------

    def evaluate(
        self, observation: Tensors, action_mask: Tensors, action: Tensors, policy_action: Tensors
    ) -> Evaluation:
        """Log-probabilities, entropy and value of steps that were taken, by the code that acted.

        Args:
            observation: leaves [N, *shape] in the spec's dtypes, by leaf name.
            action_mask: bool [N, *mask_shape] for each masked leaf, by action leaf name.
            action: leaves [N, *shape], by action leaf name.
            policy_action: float32 [N, *shape] for each continuous leaf, by action leaf name.

        Raises:
            SpecMismatch: a leaf, mask or policy action is missing.
        """
        _check_keys("observation", observation, [leaf.name for leaf in self.observation_spec.leaves])
        _check_keys("action_mask", action_mask, self.masked_leaves)
        _check_keys("action", action, [leaf.name for leaf in self.action_spec.leaves])
        _check_keys("policy_action", policy_action, self.outputs.policy_action)
        encoded = self.encoder(observation)
        log_probs: dict[str, Tensor] = {}
        entropies: list[Tensor] = []
        for head, scores in zip(self._heads(), self._scores(encoded), strict=True):
            name = head.leaf.name
            mask = action_mask[name] if name in self.masked_leaves else None
            parameters = head.parameters_of(scores, mask)
            log_probs[name] = head.log_prob(parameters, action[name], policy_action.get(name))
            entropies.append(head.entropy(parameters))
        return Evaluation(
            log_prob=total(list(log_probs.values())),
            leaf_log_prob=log_probs,
            entropy=total(entropies),
            value=self._value(encoded),
        )

    def value(self, observation: Tensors) -> Tensor:
        """Value float32 [N] of observations, in raw reward units; zeros if there is no value network.

        Args:
            observation: leaves [N, *shape], by leaf name.
        """
        return self._value(self.encoder(observation))

    def margin(self, *inputs: Tensor) -> Tensor:
        """How clear each row's choice is, float32 [N]: rounding errors below it change no integer output."""
        given = dict(zip(self.input_names, inputs, strict=True))
        heads = zip(self._heads(), self._scores(self.encoder(given)), strict=True)
        margins = [
            head.margin(
                head.parameters_of(scores, given.get(mask_leaf_name(head.leaf.name))),
                given[noise_leaf_name(head.leaf.name)],
            )
            for head, scores in heads
        ]
        return torch.stack(margins).amin(dim=0)

    # -- normalisation --------------------------------------------------------------------------------------

    @property
    def normalised_leaves(self) -> tuple[str, ...]:
        """The observation leaves that have a mean and an inv_std: those of a float dtype."""
        return self.encoder.float_leaves

    def set_normaliser(self, leaf: str, mean: Tensor, inv_std: Tensor) -> None:
        """Set the statistics of an observation leaf, of its shape or flat; they are cast to float32.

        Raises:
            SpecMismatch: the leaf has none.
        """
        normaliser = self.normaliser(leaf)
        normaliser.mean.copy_(mean.reshape(-1))
        normaliser.inv_std.copy_(inv_std.reshape(-1))

    def normaliser(self, leaf: str) -> Normaliser:
        """The `mean` and `inv_std` float32 [size] of a float observation leaf.

        Raises:
            SpecMismatch: the leaf has none.
        """
        if leaf not in self.normalised_leaves:
            raise SpecMismatch(f"{leaf} has no statistics; float leaves are {list(self.normalised_leaves)}")
        found = self.encoder.normaliser[self.normalised_leaves.index(leaf)]
        assert isinstance(found, Normaliser)
        return found


def _check_keys(what: str, given: Tensors, needed: list[str] | tuple[str, ...]) -> None:
    missing = [name for name in needed if name not in given]
    if missing:
        raise SpecMismatch(
            f"no {what} for {missing}; there are {sorted(given)} (keys are the spec's leaf names)"
        )


def _check_masked(action_spec: ActionSpec, masked_leaves: tuple[str, ...]) -> None:
    maskable = [leaf.name for leaf in action_spec.leaves if leaf.mask_shape is not None]
    unknown = sorted(set(masked_leaves) - set(maskable))
    if unknown:
        raise ConfigError(f"masked leaves {unknown} are not maskable action leaves; those are {maskable}")


def _graph_outputs(action_spec: ActionSpec, value_network: bool) -> GraphOutputs:
    return GraphOutputs(
        behaviour_log_prob=True,
        leaf_log_prob=len(action_spec.leaves) > 1,
        value=value_network,
        policy_action=tuple(leaf.name for leaf in action_spec.leaves if leaf.kind == "box"),
    )
