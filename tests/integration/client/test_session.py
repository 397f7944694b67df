"""An online agent against a tiny server on real sockets: joining, heartbeats, pacing, hot swap, leaving."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import pytest

from relayrl_client.agent import Agent
from relayrl_shared.errors import (
    EpisodeError,
    PacingTimeout,
    PeerTimeout,
    RelayRLError,
    RunFailed,
    RunMismatch,
    SpecMismatch,
    StoreUnavailable,
    UnknownRun,
)
from relayrl_shared.spaces import ActionSpec, ObservationSpec
from relayrl_shared.testing.policies import make_artefact

TinyServer = Any  # of conftest, which cannot be imported
OpenAgent = Callable[..., Agent]

SEEN = np.zeros((2, 3), np.float32)


def failure_of(agent: Agent) -> RelayRLError | None:
    """What the session of a running agent cannot get over."""
    session = agent.runtime.session
    assert session is not None
    return session.failure


def act(agent: Agent, ids: list[str], ticks: int, **options: Any) -> list[int]:
    """So many ticks of all actors; the versions that acted."""
    versions = []
    for _ in range(ticks):
        started = bool(agent.runtime.table.columns.phase[0])
        result = agent.request_action(ids, SEEN[: len(ids)], reward=1.0 if started else None, **options)
        versions.append(int(result.policy_version[0]))
    return versions


def test_hello_names_the_run_the_specs_and_the_actors(server: TinyServer, online_agent: OpenAgent) -> None:
    """The server learns all that it checks from the hello."""
    with online_agent(algorithm="PPO", hyperparameters={"gamma": 0.5}, seed=7) as agent:
        hello = server.hellos[0]
        ids = agent.get_actor_ids()
    assert hello.run.name == "tiny"
    assert hello.run.hyperparameters == {"gamma": 0.5}
    assert hello.run.seed == 7
    assert hello.run.observation_spec == agent.schema.observation
    assert [actor.actor_id for actor in hello.actors] == ids
    assert [actor.actor_index for actor in hello.actors] == [0, 1]


def test_a_refused_hello_fails_the_start_by_name(server: TinyServer, online_agent: OpenAgent) -> None:
    """A run with other specs is the server's typed error, and nothing stays open."""
    server.refusal = RunMismatch("observation_spec differs")
    agent = online_agent()
    with pytest.raises(RunMismatch, match="observation_spec differs"):
        agent.start()
    assert not agent.is_running


def test_a_store_that_is_away_for_a_moment_is_waited_for(server: TinyServer, online_agent: OpenAgent) -> None:
    """A retryable answer to hello is asked again; it is no matter of the application."""
    server.hello_failures.append(StoreUnavailable("the database restarts"))
    with online_agent() as agent:
        assert agent.is_running
    assert len(server.hellos) == 2


def test_an_absent_server_fails_the_start_with_the_address(
    server: TinyServer, online_agent: OpenAgent
) -> None:
    """No answer within start_seconds says what was asked, and where."""
    server.stop()
    with pytest.raises(PeerTimeout, match=r"agent listener at tcp://127\.0\.0\.1"):
        online_agent(start_seconds=0.3).start()


def test_without_a_policy_version_the_start_fails(server: TinyServer, online_agent: OpenAgent) -> None:
    """A learner that publishes nothing is named as what is missing."""
    server.versions.clear()
    with pytest.raises(PeerTimeout, match="no version of policy run-1"):
        online_agent(start_seconds=0.3).start()


def test_heartbeats_report_versions_and_spools(server: TinyServer, online_agent: OpenAgent) -> None:
    """What the audit needs is in the heartbeats (contracts C2)."""
    with online_agent() as agent:
        ids = agent.get_actor_ids()
        act(agent, ids, 2)
        agent.end_episode(ids, 1.0, terminated=True)
        agent.flush()
        server.wait(lambda: any(s.highest_accepted == 2 for h in server.heartbeats for s in h.spools))
        server.wait(lambda: server.heartbeats[-1].policy_versions == {"run-1": 1})


def test_a_server_that_forgot_the_client_hears_hello_again(
    server: TinyServer, online_agent: OpenAgent
) -> None:
    """known=False is answered by a hello with the present actors."""
    with online_agent() as agent:
        added = agent.new_actor()
        server.knows_client = False
        server.wait(lambda: len(server.hellos) == 2)
        assert [actor.actor_id for actor in server.hellos[1].actors][-1] == added


def test_a_restarted_server_is_found_again(server: TinyServer, online_agent: OpenAgent) -> None:
    """After an outage heartbeats go on, and the session says when it was down."""
    with online_agent() as agent:
        session = agent.runtime.session
        assert session is not None
        server.wait(lambda: len(server.heartbeats) > 0)
        server.stop()
        deadline = time.monotonic() + 10
        while session.is_up and time.monotonic() < deadline:
            session.wake()
            threading.Event().wait(0.05)
        assert not session.is_up
        before = len(server.heartbeats)
        server.start()
        server.wait(lambda: len(server.heartbeats) > before)


def test_actors_that_come_and_go_are_told(server: TinyServer, online_agent: OpenAgent) -> None:
    """The learner must know whom it waits for; evaluation actors are no matter of its."""
    with online_agent() as agent:
        added = agent.new_actor()
        agent.new_actor(purpose="evaluate")
        handle = agent.new_environment([added])
        agent.remove_actor(added)
    added_ids = [info.actor_id for change in server.changes for info in change.added]
    instances = [info.environment_instance_id for change in server.changes for info in change.added]
    assert added_ids == [added, added]
    assert instances[-1] == handle.environment_id
    assert [actor for change in server.changes for actor in change.removed] == [added]


def test_goodbye_comes_last_with_the_final_report(server: TinyServer, online_agent: OpenAgent) -> None:
    """At the goodbye nothing is left unacknowledged, and all that was accepted is stored."""
    with online_agent() as agent:
        ids = agent.get_actor_ids()
        act(agent, ids, 3)
    assert len(server.goodbyes) == 1
    (report,) = server.goodbyes[0].spools
    assert report.oldest_unacknowledged is None
    assert report.highest_accepted == len(server.stored) == 2
    assert [metadata.steps for metadata in server.stored] == [2, 2]  # the third reward is unknown


def test_in_lockstep_a_rollout_waits_for_its_update(server: TinyServer, online_agent: OpenAgent) -> None:
    """At lag 0 rollout 1 begins with the version of update 1, whose learner got rollout 0 first."""
    with online_agent() as agent:
        ids = agent.get_actor_ids()
        assert act(agent, ids, 4) == [1, 1, 1, 1]

        def publish() -> None:
            server.wait(lambda: len(server.stored) == 2)  # the rollout is there before the wait ends
            server.versions.append(artefact_of(server, 1))

        learner = threading.Thread(target=publish)
        learner.start()
        assert act(agent, ids, 1) == [2]
        learner.join()
    first = server.stored[0]
    assert (first.rollout_index, first.rollout_segments, first.steps) == (0, 1, 4)


def artefact_of(server: TinyServer, learner_update: int) -> Any:
    """A version like those that the server has, of another update."""
    from relayrl_shared.testing.policies import make_artefact

    manifest = server.versions[0].manifest
    return make_artefact(
        manifest.observation_spec,
        manifest.action_spec,
        policy=manifest.policy,
        policy_version=learner_update + 1,
        learner_update=learner_update,
        seed=learner_update,
    )


def test_a_wait_has_a_deadline_and_can_be_taken_up_again(server: TinyServer, online_agent: OpenAgent) -> None:
    """PacingTimeout leaves the actors pending: the retry passes no reward, and goes on."""
    with online_agent() as agent:
        ids = agent.get_actor_ids()
        act(agent, ids, 4)
        with pytest.raises(PacingTimeout, match="1 finished updates"):
            act(agent, ids, 1, timeout_seconds=0.1)
        server.versions.append(artefact_of(server, 1))
        assert agent.request_action(ids, SEEN).policy_version[0] == 2
        assert agent.request_action(ids, SEEN, reward=1.0).policy_version[0] == 2


def test_a_lockstep_loop_of_single_actor_calls_is_refused(
    server: TinyServer, online_agent: OpenAgent
) -> None:
    """One thread that drives two actors one by one would wait for itself; it is told to pass both at once."""
    with online_agent() as agent:
        ids = agent.get_actor_ids()
        for tick in range(4):
            for actor in ids:
                agent.request_action(actor, SEEN[0], reward=1.0 if tick else None)
        with pytest.raises(EpisodeError, match="pass all actors in one call"):
            agent.request_action(ids[0], SEEN[0], reward=1.0)


def test_threads_wait_for_each_other_in_lockstep(server: TinyServer, online_agent: OpenAgent) -> None:
    """Actors in threads of their own each wait for the update, and all go on with it."""
    versions: dict[str, list[int]] = {}
    with online_agent() as agent:

        def drive(actor: str) -> None:
            for tick in range(6):
                result = agent.request_action(actor, SEEN[0], reward=1.0 if tick else None)
                versions.setdefault(actor, []).append(int(result.policy_version[0]))

        threads = [threading.Thread(target=drive, args=(actor,)) for actor in agent.get_actor_ids()]
        for thread in threads:
            thread.start()
        server.wait(lambda: len(server.stored) == 2)
        server.versions.append(artefact_of(server, 1))
        for thread in threads:
            thread.join()
    assert list(versions.values()) == [[1, 1, 1, 1, 2, 2]] * 2


def test_lag_one_overlaps_one_rollout_and_then_waits(server: TinyServer, online_agent: OpenAgent) -> None:
    """At lag 1 rollout 1 begins at once, and rollout 2 needs update 1."""
    server.welcome["max_policy_lag"] = 1
    with online_agent() as agent:
        ids = agent.get_actor_ids()
        assert act(agent, ids, 8) == [1] * 8
        with pytest.raises(PacingTimeout):
            act(agent, ids, 1, timeout_seconds=0.1)


def test_above_lag_zero_acting_goes_on_without_a_server(server: TinyServer, online_agent: OpenAgent) -> None:
    """With the servers down, block goes on unpaced above lag 0, counted (contracts E3)."""
    server.welcome["max_policy_lag"] = 1
    with online_agent() as agent:
        ids = agent.get_actor_ids()
        act(agent, ids, 8)
        server.stop()
        assert act(agent, ids, 1, timeout_seconds=30.0) == [1]
        assert agent.runtime.coordinator.admission.counters.unpaced_rollouts_total == 1
        server.start()


def test_free_pacing_never_waits(server: TinyServer, online_agent: OpenAgent) -> None:
    """Free acts on, whatever the learner does (contracts E1)."""
    server.welcome["pacing"] = "free"
    with online_agent() as agent:
        assert act(agent, agent.get_actor_ids(), 30) == [1] * 30


def test_whole_episode_batches_under_block_take_leases(server: TinyServer, online_agent: OpenAgent) -> None:
    """Without rollout_steps, block acts on the steps that heartbeats were granted (contracts E2)."""
    server.welcome["rollout_steps"] = None
    server.lease_steps = 6
    with online_agent() as agent:
        ids = agent.get_actor_ids()
        act(agent, ids, 3)
        with pytest.raises(PacingTimeout, match="granted no steps"):
            act(agent, ids, 1, timeout_seconds=0.3)
        server.wait(lambda: sum(h.lease_steps_used for h in server.heartbeats) == 6)


def test_heartbeats_renew_the_steps_that_are_held(server: TinyServer, online_agent: OpenAgent) -> None:
    """A reply without new steps moves the expiry of those granted before (contracts E2)."""
    server.welcome["rollout_steps"] = None
    server.lease_steps, server.lease_seconds = 6, 2.0
    with online_agent() as agent:
        ids = agent.get_actor_ids()
        act(agent, ids, 1)
        granted_at = time.monotonic()
        server.wait(lambda: time.monotonic() > granted_at + 2.2)
        act(agent, ids, 2, timeout_seconds=1.0)


def test_inference_through_the_server_samples_with_the_clients_noise(
    server: TinyServer, online_agent: OpenAgent
) -> None:
    """Server inference acts as local inference does: same noise, same version, same actions."""
    server.welcome["pacing"] = "free"
    with online_agent(actor_inference_mode="server") as remote:
        ids = remote.get_actor_ids()
        through_server = [remote.request_action(ids, SEEN, reward=r).action for r in (None, 1.0, 1.0)]
        assert remote.get_model_version() == [(actor, 1) for actor in ids]
    with online_agent() as local:
        ids = local.get_actor_ids()
        at_home = [local.request_action(ids, SEEN, reward=r).action for r in (None, 1.0, 1.0)]
    np.testing.assert_array_equal(through_server, at_home)


def test_server_inference_waits_for_its_update_in_lockstep(
    server: TinyServer, online_agent: OpenAgent
) -> None:
    """Admission looks at the version that the inference server serves."""
    with online_agent(actor_inference_mode="server") as agent:
        ids = agent.get_actor_ids()
        assert act(agent, ids, 4) == [1] * 4
        with pytest.raises(PacingTimeout):
            act(agent, ids, 1, timeout_seconds=0.2)
        server.versions.append(artefact_of(server, 1))
        assert agent.request_action(ids, SEEN).policy_version[0] == 2


def test_an_inference_server_that_vanishes_is_a_typed_error_and_then_a_retry(
    server: TinyServer, online_agent: OpenAgent
) -> None:
    """The request fails at its deadline; when the server is back, the retry acts."""
    server.welcome["pacing"] = "free"
    with online_agent(actor_inference_mode="server") as agent:
        ids = agent.get_actor_ids()
        act(agent, ids, 1)
        server.stop()
        with pytest.raises(PeerTimeout):
            act(agent, ids, 1, timeout_seconds=0.3)
        server.start()
        assert agent.request_action(ids, SEEN, timeout_seconds=10.0).policy_version[0] == 1


def test_a_corrupt_version_is_refused_and_the_old_one_acts(
    server: TinyServer, online_agent: OpenAgent
) -> None:
    """A version that does not load is counted, and a good one after it is taken (failure table)."""
    server.welcome["pacing"] = "free"
    with online_agent() as agent:
        ids = agent.get_actor_ids()
        good = artefact_of(server, 1)
        bad = artefact_of(server, 2)
        broken = type(bad)(bad.manifest, bad.graph, bad.weights, artefact_of(server, 3).golden)
        from relayrl_shared.testing.policies import seal

        server.versions.append(seal(broken))
        slot = agent.runtime.slot
        assert slot is not None
        deadline = time.monotonic() + 10
        while slot.refused_total == 0 and time.monotonic() < deadline:
            threading.Event().wait(0.01)
        assert slot.refused_total == 1
        assert act(agent, ids, 2) == [1, 1]
        server.versions.append(good)
        agent.wait_for_version(2, 10.0)
        assert act(agent, ids, 1) == [2]


@pytest.mark.parametrize("rollout_steps", [4, None], ids=["rollouts", "leases"])
def test_a_failed_run_ends_the_wait_with_a_typed_error(
    server: TinyServer, online_agent: OpenAgent, rollout_steps: int | None
) -> None:
    """Under block nothing is to be waited for any more: the application is told, long before its deadline."""
    server.welcome["rollout_steps"] = rollout_steps
    server.lease_steps = 8
    with online_agent(request_seconds=60.0) as agent:
        ids = agent.get_actor_ids()
        act(agent, ids, 4)
        server.run_state = "failed"
        began = time.monotonic()
        with pytest.raises(RunFailed, match="run tiny has failed"):
            act(agent, ids, 1)
        assert time.monotonic() - began < 20
        server.run_state = "active"
        server.wait(lambda: failure_of(agent) is None)


def test_under_free_acting_goes_on_with_a_failed_run(server: TinyServer, online_agent: OpenAgent) -> None:
    """What is recorded is stored still; that the run failed is told by the session."""
    server.welcome["pacing"] = "free"
    server.run_state = "failed"
    with online_agent() as agent:
        session = agent.runtime.session
        assert session is not None
        server.wait(lambda: session.statistics().state == "failed")
        assert act(agent, agent.get_actor_ids(), 5) == [1] * 5


@pytest.mark.parametrize("pacing", ["block", "free"])
def test_a_run_that_is_gone_is_the_applications_error(
    server: TinyServer, online_agent: OpenAgent, pacing: str
) -> None:
    """What is recorded could never be stored: acting on unpaced would hide it."""
    server.welcome |= {"pacing": pacing, "max_policy_lag": 1}
    with online_agent() as agent:
        ids = agent.get_actor_ids()
        act(agent, ids, 1)
        server.heartbeat_failure = UnknownRun("there is no such run")
        server.wait(lambda: failure_of(agent) is not None)
        with pytest.raises(UnknownRun, match="there is no such run"):
            act(agent, ids, 1)


def test_a_second_hello_that_finds_another_run_is_the_applications_error(
    server: TinyServer, online_agent: OpenAgent
) -> None:
    """A store that was begun anew makes another run of the name: this client's sequences are not of it."""
    server.welcome["max_policy_lag"] = 1
    with online_agent() as agent:
        server.welcome["run_id"] = "0196f3a0-0000-7000-8000-000000000002"
        server.knows_client = False
        server.wait(lambda: failure_of(agent) is not None)
        with pytest.raises(RunMismatch, match="start the client again"):
            act(agent, agent.get_actor_ids(), 1)


def test_a_change_that_is_refused_for_good_does_not_end_the_heartbeats(
    server: TinyServer, online_agent: OpenAgent
) -> None:
    """Its caller gets the error; the next change and the heartbeats go on."""
    with online_agent() as agent:
        server.change_failure = SpecMismatch("actor_index is out of range")
        with pytest.raises(SpecMismatch, match="out of range"):
            agent.new_actor()
        server.change_failure = None
        before = len(server.heartbeats)
        server.wait(lambda: len(server.heartbeats) > before)
        added = agent.new_actor()
    assert added in [info.actor_id for change in server.changes for info in change.added]


def test_server_inference_starts_where_observations_begin_above_zero(
    server: TinyServer, online_agent: OpenAgent
) -> None:
    """The question for the first version is an observation that the spec allows."""
    low, high = 3, 5
    start = np.array([low, low])
    space = gymnasium.spaces.MultiDiscrete([high - low, high - low], start=start)
    observation = ObservationSpec.from_gymnasium(space)
    action = ActionSpec.from_gymnasium(gymnasium.spaces.Discrete(2))
    server.versions[:] = [make_artefact(observation, action, policy="run-1", policy_version=1)]
    options = {"environment": None, "observation_space": space, "action_space": action}
    with online_agent(actor_inference_mode="server", **options):
        pass
    (asked, *_) = server.requests
    assert asked["observation"].tolist() == [[low, low]]
