"""Hot swap: versions change between two calls, never inside one, and bad ones are refused."""

from __future__ import annotations

import threading
from typing import Any

import gymnasium
import msgspec
import numpy as np
import pytest

from relayrl_client.policy_slot import PolicySlot
from relayrl_client.testing import offline_agent
from relayrl_shared.errors import ArtefactError, ConfigError, InferenceError, PeerTimeout
from relayrl_shared.policy.engine import load_policy
from relayrl_shared.policy.manifest import PolicyArtefact
from relayrl_shared.spaces import ActionSpec, ObservationSpec
from relayrl_shared.testing.policies import make_artefact
from relayrl_shared.trajectory import RecordSchema

ENVIRONMENT = gymnasium.make("CartPole-v1")
OBSERVATION = ObservationSpec.from_gymnasium(ENVIRONMENT.observation_space)
ACTION = ActionSpec.from_gymnasium(ENVIRONMENT.action_space)
BOX = gymnasium.spaces.Box(0, 1, (3,))
OTHER = ObservationSpec.from_gymnasium(BOX)
SCHEMA = RecordSchema(observation=OBSERVATION, action=ACTION)


def version(number: int) -> PolicyArtefact:
    return make_artefact(OBSERVATION, ACTION, policy_version=number, learner_update=number - 1, seed=number)


def test_no_call_sees_two_versions_while_threads_act() -> None:
    """While threads act and versions swap, the outputs of each row are those of the version it names."""
    agent, delivery = offline_agent(ENVIRONMENT, actor_count=3, max_segment_steps=50)
    versions = [version(number) for number in range(2, 7)]
    seen = np.linspace(-1, 1, 4, dtype=np.float32)
    first = agent.plan.default_model
    assert first is not None
    stop, acted = threading.Event(), threading.Event()

    def act(actor: str) -> None:
        step = 0
        while not stop.is_set() or step == 0:
            agent.request_action(actor, seen, reward=0.0 if step else None, greedy=True)
            step += 1
            acted.set()
        agent.end_episode(actor, 0.0, terminated=True)

    with agent:
        threads = [threading.Thread(target=act, args=(actor,)) for actor in agent.get_actor_ids()]
        for thread in threads:
            thread.start()
        for artefact in [*versions, *reversed(versions)]:
            agent.update_model(artefact)
            acted.clear()
            assert acted.wait(5.0)
        stop.set()
        for thread in threads:
            thread.join()

    values = {
        artefact.manifest.policy_version: load_policy(artefact).run(
            {"observation": seen[None], "noise": np.zeros((1, 2), np.float32)}
        )["value"][0]
        for artefact in [first, *versions]
    }
    recorded = 0
    for segment in delivery.segments:
        numbers = segment.columns.policy_version.tolist()
        np.testing.assert_allclose(segment.columns.value, [values[number] for number in numbers], rtol=1e-5)
        np.testing.assert_array_equal(segment.columns.learner_update, segment.columns.policy_version - 1)
        recorded += segment.steps
    assert recorded >= agent.plan.actor_count


def test_a_swap_inside_a_segment_is_recorded_row_by_row() -> None:
    """policy_version is per step, because a swap can fall inside an episode."""
    agent, delivery = offline_agent(ENVIRONMENT, actor_count=1)
    seen = np.zeros(4, np.float32)
    with agent:
        actor = agent.get_actor_ids()[0]
        agent.request_action(actor, seen)
        agent.update_model(version(7))
        assert agent.get_model_version(actor) == [(actor, 7)]
        agent.request_action(actor, seen, reward=0.0)
        agent.end_episode(actor, 0.0, terminated=True)
    assert delivery.segments[0].columns.policy_version.tolist() == [1, 7]
    assert delivery.segments[0].columns.learner_update.tolist() == [0, 6]


def test_a_version_that_no_registry_numbered_is_recorded_as_null() -> None:
    """Local models have no version: null in the record, -1 to the caller (contracts B1)."""
    agent, delivery = offline_agent(
        ENVIRONMENT, actor_count=1, default_model=make_artefact(OBSERVATION, ACTION, policy_version=None)
    )
    with agent:
        actor = agent.get_actor_ids()[0]
        assert agent.request_action(actor, np.zeros(4, np.float32)).policy_version.tolist() == [-1]
        agent.end_episode(actor, 0.0, terminated=True)
    assert not delivery.segments[0].columns.policy_version_valid.any()


@pytest.mark.parametrize(
    ("artefact", "what"),
    [
        (
            make_artefact(ObservationSpec.from_gymnasium(gymnasium.spaces.Box(0, 1, (3,))), ACTION),
            "observation_spec",
        ),
        (make_artefact(OBSERVATION, ActionSpec.from_gymnasium(gymnasium.spaces.Discrete(3))), "action_spec"),
        (make_artefact(OBSERVATION, ACTION, masked_leaves=("action",)), "masked_leaves"),
    ],
)
def test_a_version_for_something_else_is_refused_by_name(artefact: PolicyArtefact, what: str) -> None:
    """The old version acts on; the refusal is counted and says what differs."""
    slot = PolicySlot(SCHEMA)
    slot.load(version(1))
    with pytest.raises(ArtefactError, match=what):
        slot.load(artefact)
    assert slot.current.policy_version == 1
    assert (slot.refused_total, slot.swaps_total) == (1, 1)
    assert what in slot.last_refusal


def test_a_corrupt_version_is_refused() -> None:
    """Bytes that do not hash to their digests never act."""
    slot = PolicySlot(SCHEMA)
    slot.load(version(1))
    bad = version(2)
    with pytest.raises(Exception, match=r"digest|hash"):
        slot.load(msgspec.structs.replace(bad, weights=bad.weights[:-1] + b"x"))
    assert slot.current.policy_version == 1


def test_an_empty_slot_cannot_act_and_a_wait_for_it_ends() -> None:
    """Before the first version a call is a typed error, and waiting has a deadline."""
    slot = PolicySlot(SCHEMA)
    assert slot.is_empty
    with pytest.raises(InferenceError, match="no policy is loaded"):
        _ = slot.current
    with pytest.raises(PeerTimeout, match="version 1"):
        slot.wait_for_version(1, 0.01)


def test_waiting_for_a_version_ends_with_it() -> None:
    """wait_for_version returns once a version at least as new acts."""
    slot = PolicySlot(SCHEMA)
    waiter = threading.Thread(target=slot.wait_for_version, args=(2, 10.0))
    waiter.start()
    slot.load(version(1))
    slot.load(version(3))
    waiter.join(10.0)
    assert not waiter.is_alive()


def test_models_are_the_registrys_matter_online() -> None:
    """update_model is refused where the run's own policy acts."""
    agent, _ = offline_agent(ENVIRONMENT, actor_count=1)
    with agent:
        object.__setattr__(agent.plan, "actor_training_data_mode", "online")
        with pytest.raises(ConfigError, match="registry says"):
            agent.update_model(version(2))


def test_the_outputs_that_a_policy_lacks_are_null_in_the_record() -> None:
    """A deterministic import has neither log-prob nor value: null, never 0 (contracts B2)."""
    from relayrl_client.policy_slot import ActingPolicy

    class Bare:
        manifest: Any = None

    whole = load_policy(version(1))
    bare = Bare()
    bare.manifest = msgspec.structs.replace(
        whole.manifest,
        outputs=msgspec.structs.replace(whole.manifest.outputs, behaviour_log_prob=False, value=False),
    )

    class Acting(Bare):
        manifest = bare.manifest
        policy_version = 1
        learner_update = 0
        inputs = whole.inputs

        @staticmethod
        def run(inputs: Any) -> Any:
            outputs = whole.run(inputs)
            return {name: outputs[name] for name in ("action",)}

    agent, delivery = offline_agent(ENVIRONMENT, actor_count=1)
    with agent:
        slot = agent.runtime.slot
        assert slot is not None
        slot._current = ActingPolicy(Acting())  # type: ignore[arg-type]
        actor = agent.get_actor_ids()[0]
        agent.request_action(actor, np.zeros(4, np.float32))
        agent.end_episode(actor, 0.0, terminated=True)
    columns = delivery.segments[0].columns
    assert not columns.behaviour_log_prob_valid.any()
    assert not columns.value_valid.any()
