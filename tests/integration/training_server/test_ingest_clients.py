"""Clients on the agent listener: what a hello creates, compares and refuses, and what heartbeats say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from relayrl_shared import messages
from relayrl_shared.errors import (
    ConfigError,
    ContractError,
    RelayRLError,
    RunMismatch,
    SpecMismatch,
    UnknownRun,
)
from relayrl_shared.messages import ActorInfo, SpoolReport
from relayrl_shared.spaces import ActionSpec
from relayrl_shared.store.open import open_store
from relayrl_shared.testing.trajectories import small_schema


def test_a_hello_creates_the_run_with_defaults_filled_in(served: Any) -> None:
    """The run has what its creator set, and the algorithm's defaults for the rest."""
    client = served.client()

    welcome = client.hello(algorithm="ppo", hyperparameters={"gamma": 0.9}, pacing="block", seed=7)

    run = served.store.run_by_name("cartpole")
    assert run.run_id == welcome.run_id
    assert (run.algorithm, run.seed, run.pacing, run.max_policy_lag) == ("PPO", 7, "block", 1)
    assert run.hyperparameters["gamma"] == 0.9
    assert run.hyperparameters["clip_ratio"] == 0.2
    assert welcome.hyperparameters == run.hyperparameters
    assert (welcome.policy, welcome.rollout_steps, welcome.max_segment_steps) == ("cartpole", 128, 128)
    assert (welcome.client_index, welcome.first_rollout_index, welcome.learner_update) == (0, 0, 0)
    assert welcome.limits.max_message_bytes == 64 << 20


def test_whole_episodes_have_no_rollout_steps(served: Any) -> None:
    """REINFORCE collects whole episodes, cut into segments of bounded length."""
    welcome = served.client().hello(algorithm="REINFORCE", hyperparameters={"max_segment_steps": 50})

    assert (welcome.rollout_steps, welcome.max_segment_steps) == (None, 50)


def test_the_servers_defaults_fill_what_the_creator_leaves_open(start_ingest: Callable[..., Any]) -> None:
    """Configured hyperparameters, algorithm and seed stand in; what the hello sets goes over them."""
    served = start_ingest(
        training_server_config__default_algorithm="REINFORCE",
        training_server_config__default_hyperparameters='{"reinforce": {"gamma": 0.5, "seed": 11}}',
    )

    welcome = served.client().hello(hyperparameters={"lam": 0.8})

    assert (welcome.algorithm, welcome.seed) == ("REINFORCE", 11)
    assert (welcome.hyperparameters["gamma"], welcome.hyperparameters["lam"]) == (0.5, 0.8)


def test_clients_of_a_run_get_indices_and_keep_them(served: Any) -> None:
    """Noise depends on the index, so a client that comes again has the one that it had."""
    indices = [served.client().hello(client_id=name).client_index for name in ("a", "b", "a", "c")]

    assert indices == [0, 1, 0, 2]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"algorithm": "REINFORCE"}, "algorithm"),
        ({"hyperparameters": {"gamma": 0.5}}, r"hyperparameters\.gamma"),
        ({"observation_spec": small_schema(observation_size=5).observation}, "observation_spec"),
        ({"action_spec": small_schema(actions=3).action}, "action_spec"),
        ({"masked_leaves": ("action",)}, "masked_leaves"),
        ({"pacing": "block"}, "pacing"),
        ({"max_policy_lag": 3}, "max_policy_lag"),
        ({"seed": 99}, "seed"),
        ({"allow_nan": True}, "allow_nan"),
    ],
)
def test_a_difference_from_the_run_is_refused_by_name(
    served: Any, changes: dict[str, Any], field: str
) -> None:
    """A later hello that says otherwise is told which field differs and both values; nothing changes."""
    served.client().hello(hyperparameters={"gamma": 0.9}, pacing="free", seed=7)

    with pytest.raises(RunMismatch, match=f"^{field}: .*cartpole"):
        served.client().hello(client_id="other", **changes)

    assert {actor.client_id for actor in served.store.live_actors(served.store.runs()[0].run_id)} == {
        "client"
    }


def test_what_a_hello_leaves_out_is_not_compared(served: Any) -> None:
    """A client that sets nothing joins a run of any settings, and one that repeats them does too."""
    settings = {"algorithm": "PPO", "hyperparameters": {"gamma": 0.9}, "max_policy_lag": 0, "seed": 7}
    first = served.client().hello(**settings)

    assert served.client().hello().run_id == first.run_id
    assert served.client().hello(**settings).run_id == first.run_id


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"algorithm": "PPOO"}, ConfigError, "PPO"),
        ({"hyperparameters": {"gama": 0.9}}, ConfigError, "gamma"),
        ({"hyperparameters": {"gamma": 1.5}}, ConfigError, "gamma"),
        ({"hyperparameters": {"gamma": "high"}}, ConfigError, "gamma"),
        ({"algorithm": "REINFORCE", "hyperparameters": {"rollout_steps": 5}}, ConfigError, "traj_per_epoch"),
        ({"name": "../etc"}, ConfigError, "run name"),
        ({"max_policy_lag": -1}, ConfigError, "max_policy_lag"),
        ({"seed": -1}, ConfigError, "seed"),
        ({"action_spec": ActionSpec(leaves=())}, SpecMismatch, "no leaves"),
        ({"masked_leaves": ("nothing",)}, SpecMismatch, "masked leaf"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_it_exists(
    served: Any, changes: dict[str, Any], error: type[RelayRLError], text: str
) -> None:
    """Unknown names, values out of range and impossible specs are typed errors that name the remedy."""
    with pytest.raises(error, match=text):
        served.client().hello(**changes)

    assert served.store.runs() == []


def test_a_server_that_creates_no_runs_says_so(start_ingest: Callable[..., Any]) -> None:
    """With allow_new_runs off an unknown name is refused."""
    served = start_ingest(training_server_config__allow_new_runs="false")

    with pytest.raises(UnknownRun, match="cartpole"):
        served.client().hello()


def test_two_actors_with_one_index_or_id_are_refused(served: Any) -> None:
    """Two actors of equal index would draw the same noise."""
    client = served.client()
    for second in (("b", 0), ("a", 1)):
        actors = tuple(
            ActorInfo(actor_id=actor_id, actor_index=index, environment_instance_id="i")
            for actor_id, index in (("a", 0), second)
        )
        with pytest.raises(ContractError, match="two actors"):
            client.ask(messages.Hello(client_id="c", run=client.run_request(), actors=actors))


def test_a_client_that_joins_late_begins_at_the_learners_update(tmp_path: Any, start_ingest: Any) -> None:
    """Nobody waits for rollouts that a late client could not have made."""
    store = open_store(f"sqlite:///{tmp_path / 'store'}", writer_of="all")
    served = start_ingest(store=store)
    run_id = served.client().hello().run_id
    token = store.acquire_lease(run_id, "learner", 10)
    for update in (1, 2, 3):
        store.record_update(run_id, "lineage", None, "cartpole", update, update, [], token)

    welcome = served.client().hello(client_id="late")

    assert (welcome.first_rollout_index, welcome.learner_update) == (3, 3)


def test_a_heartbeat_reports_spools_and_says_where_the_learner_is(served: Any, client: Any) -> None:
    """What the spools report is in the audit; the answer has the update and the run's state."""
    report = SpoolReport(spool_id="spool", run_id=client.run_id, highest_accepted=5, oldest_unacknowledged=2)
    client.put(1)

    reply = client.ask(messages.Heartbeat(client_id="client", run_id=client.run_id, spools=(report,)))

    audit = served.store.audit(client.run_id)
    assert (reply.known, reply.learner_update, reply.run_state) == (True, 0, "active")
    assert (audit.accepted, audit.stored, audit.in_spool, audit.missing) == (5, 1, 4, 0)


def test_steps_are_granted_out_of_the_learners_demand(tmp_path: Any, start_ingest: Any) -> None:
    """A heartbeat that asks for steps gets what the learner wants and nobody else holds."""
    store = open_store(f"sqlite:///{tmp_path / 'store'}", writer_of="all")
    served = start_ingest(store=store)
    run_id = served.client().hello(client_id="a").run_id
    served.client().hello(client_id="b")
    client = served.client()

    def granted(client_id: str, wanted: int) -> int:
        reply = client.ask(messages.Heartbeat(client_id=client_id, run_id=run_id, lease_steps_wanted=wanted))
        assert isinstance(reply, messages.HeartbeatReply)
        return reply.lease_steps

    before = granted("a", 100)
    store.set_demand(run_id, 0, 150)

    assert (before, granted("a", 100), granted("b", 100), granted("b", 100)) == (0, 100, 50, 0)


def test_every_heartbeat_renews_what_a_client_holds_and_says_for_how_long(
    tmp_path: Any, start_ingest: Any
) -> None:
    """Without a new grant, too, where the run paces by leases; elsewhere there is nothing to renew."""
    store = open_store(f"sqlite:///{tmp_path / 'store'}", writer_of="all")
    served = start_ingest(store=store, training_server_config__ingest__lease_seconds="7")
    client = served.client()
    paced = client.hello(pacing="block", hyperparameters={"rollout_steps": None, "traj_per_epoch": 8}).run_id
    free = client.hello(name="free", pacing="free").run_id
    store.set_demand(paced, 0, 10)

    replies = [
        client.ask(messages.Heartbeat(client_id="client", run_id=run_id, lease_steps_wanted=wanted))
        for run_id, wanted in ((paced, 10), (paced, 10), (paced, 0), (free, 0))
    ]

    grants = [(reply.lease_steps, reply.lease_expires_in_seconds) for reply in replies]
    assert grants == [(10, 7.0), (0, 7.0), (0, 7.0), (0, 0.0)]


def test_unknown_clients_are_told_to_say_hello_and_unknown_runs_are_errors(client: Any) -> None:
    """`known` false is the way to learn that one was forgotten."""
    reply = client.ask(messages.Heartbeat(client_id="stranger", run_id=client.run_id))

    assert not reply.known
    with pytest.raises(UnknownRun):
        client.ask(messages.Heartbeat(client_id="client", run_id="nothing"))


def test_actors_join_leave_and_say_goodbye(served: Any, client: Any) -> None:
    """The learner waits for those who are there, and no longer."""

    def live() -> list[str]:
        return [actor.info.actor_id for actor in served.store.live_actors(client.run_id)]

    added = ActorInfo(actor_id="late", actor_index=5, environment_instance_id="i")
    client.ask(
        messages.ActorChange(client_id="client", run_id=client.run_id, added=(added,), removed=("client-0",))
    )
    after_change = live()
    client.ask(messages.Goodbye(client_id="client", run_id=client.run_id))

    assert (after_change, live()) == (["late"], [])
    assert not client.ask(messages.Heartbeat(client_id="client", run_id=client.run_id)).known


def test_a_silent_client_counts_as_left(start_ingest: Callable[..., Any]) -> None:
    """A client without heartbeats is no longer waited for; the next heartbeat tells it."""
    served = start_ingest(training_server_config__ingest__client_timeout_seconds="0.5")
    client = served.client()
    client.hello()

    while served.store.live_actors(client.run_id):
        assert not served._thread.join(0.05)

    assert not client.ask(messages.Heartbeat(client_id="client", run_id=client.run_id)).known
    assert client.hello().client_index == 0


@pytest.mark.parametrize("client_id", ["", "a\0b", "x" * 300])
def test_ids_that_no_store_can_keep_are_refused(served: Any, client_id: str) -> None:
    """An empty, endless or NUL-bearing id is an error of the sender."""
    with pytest.raises(ContractError, match="client_id"):
        served.client().hello(client_id=client_id)
