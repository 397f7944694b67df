"""The shipped test policies: valid for every kind of space, equal graphs for equal specs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from relayrl_shared.policy.engine import load_policy
from relayrl_shared.policy.golden import random_inputs
from relayrl_shared.spaces import ActionSpec, ObservationSpec
from relayrl_shared.testing.policies import make_artefact

OBSERVATIONS: dict[str, spaces.Space[Any]] = {
    "box": spaces.Box(-np.inf, np.inf, (4,), np.float32),
    "image": spaces.Box(0, 255, (3, 4, 2), np.uint8),
    "discrete": spaces.Discrete(5, start=2),
    "dict": spaces.Dict({"a": spaces.Box(-1, 1, (), np.float64), "b": spaces.MultiBinary(3)}),
}
ACTIONS: dict[str, tuple[spaces.Space[Any], tuple[str, ...]]] = {
    "discrete": (spaces.Discrete(3, start=-1), ("action",)),
    "multi_discrete": (spaces.MultiDiscrete(np.array([[2, 3], [4, 1]])), ("action",)),
    "multi_binary": (spaces.MultiBinary(4), ("action",)),
    "box": (spaces.Box(-2, 1, (2, 3), np.float64), ()),
    "unbounded": (spaces.Box(-np.inf, np.inf, (1,), np.float32), ()),
    "integers": (spaces.Box(-3, 3, (2,), np.int16), ()),
    "hybrid": (
        spaces.Dict({"move": spaces.Box(-1, 1, (2,)), "use": spaces.Tuple([spaces.Discrete(4)])}),
        ("action.use.0",),
    ),
}


@pytest.mark.parametrize("observation", OBSERVATIONS)
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_every_kind_of_space_loads_and_acts_inside_the_space(
    observation: str, action: str, masked: bool
) -> None:
    """A test policy of any spec is a valid artefact whose actions the space contains."""
    space, masks = ACTIONS[action]
    spec = ActionSpec.from_gymnasium(space)
    artefact = make_artefact(
        ObservationSpec.from_gymnasium(OBSERVATIONS[observation]), spec, masked_leaves=masks if masked else ()
    )
    policy = load_policy(artefact)
    outputs = policy.run(random_inputs(policy.manifest, 16, seed=3))
    assert (outputs["behaviour_log_prob"] <= 0).all() or "box" in [leaf.kind for leaf in spec.leaves]
    for row in range(16):
        assert space.contains(spec.unflatten({leaf.name: outputs[leaf.name][row] for leaf in spec.leaves}))


def test_another_seed_gives_other_weights_of_the_same_graph() -> None:
    """Versions made with different seeds share the graph and differ in weights and golden vectors."""
    specs = (
        ObservationSpec.from_gymnasium(OBSERVATIONS["box"]),
        ActionSpec.from_gymnasium(spaces.Discrete(2)),
    )
    first, second = make_artefact(*specs, seed=0), make_artefact(*specs, seed=1)
    assert first.graph == second.graph
    assert first.weights != second.weights
    assert first.golden != second.golden
    assert make_artefact(*specs, seed=0) == first
