"""Lease, demand, reader and publisher of the learner over a real SQLite store."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relayrl_shared import arrow_codec
from relayrl_shared.errors import (
    ContractError,
    DigestMismatch,
    GoldenMismatch,
    InvalidTrajectory,
    LeaseLost,
    RegistryError,
    RelayRLError,
)
from relayrl_shared.messages import ActorInfo
from relayrl_shared.store.interface import IncomingTrajectory, Run, TrajectoryStore, Use
from relayrl_shared.store.open import open_store
from relayrl_shared.testing.store import make_run as make_stored_run
from relayrl_shared.trajectory import FinalObservation, RecordSchema
from relayrl_training_server.algorithms.base import Algorithm
from relayrl_training_server.algorithms.build import build_algorithm
from relayrl_training_server.algorithms.configs import complete_hyperparameters
from relayrl_training_server.demand import PATIENCE_SECONDS, Demand
from relayrl_training_server.export import export_graph
from relayrl_training_server.learner import Learner
from relayrl_training_server.lease import RunLease
from relayrl_training_server.publisher import Lineage, Publisher
from relayrl_training_server.reader import SegmentReader
from relayrl_training_server.sampler import Moment, Sampler
from relayrl_training_server.selections import selection_for
from relayrl_training_server.testing.registry import MemoryRegistry
from relayrl_training_server.testing.segments import (
    ACTION,
    OBSERVATION,
    make_actor,
    make_columns,
    make_metadata,
    make_segment,
)


def make_run(**changes: Any) -> Run:
    """A run named `run` over the small specs."""
    algorithm = changes.get("algorithm", "PPO")
    fields = {
        "run_id": "run",
        "name": "run",
        "observation_spec": OBSERVATION,
        "action_spec": ACTION,
        "hyperparameters": complete_hyperparameters(algorithm, {"hidden_sizes": [4]}),
    }
    return make_stored_run(**{**fields, **changes})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[TrajectoryStore]:
    """A store that may do everything, with the run in it."""
    opened = open_store(f"sqlite:///{tmp_path / 'store'}", writer_of="all")
    opened.create_run(make_run())
    yield opened
    opened.close()


# ---- lease


def test_a_second_process_in_the_directory_is_refused(store: TrajectoryStore, tmp_path: Path) -> None:
    """Two learners cannot share a directory, whatever the lease says."""
    first = RunLease(store, "run", tmp_path / "run")
    assert first.acquire(threading.Event())
    with pytest.raises(LeaseLost, match="another learner process"):
        RunLease(store, "run", tmp_path / "run").acquire(threading.Event())
    first.close()


def test_a_successor_in_the_directory_takes_over_at_once(store: TrajectoryStore, tmp_path: Path) -> None:
    """A learner that was killed leaves its lease open; the next one in its place does not wait for it."""
    killed = RunLease(store, "run", tmp_path / "run", ttl_seconds=600.0)
    killed.acquire(threading.Event())
    assert killed._lock is not None
    killed._lock.close()  # what the kernel does when a process dies
    successor = RunLease(store, "run", tmp_path / "run", ttl_seconds=600.0)

    assert successor.acquire(threading.Event())
    assert successor.token == killed.token + 1
    successor.close()
    killed._lock = None
    killed.close()


def test_one_elsewhere_waits_and_says_for_whom(store: TrajectoryStore, tmp_path: Path) -> None:
    """Another directory is another holder: it waits until the lease is released or expires."""
    here, there = (RunLease(store, "run", tmp_path / name, ttl_seconds=600.0) for name in ("here", "there"))
    here.acquire(threading.Event())
    waiter = threading.Thread(target=there.acquire, args=(threading.Event(),))
    waiter.start()
    pause = threading.Event()
    while there.waiting_for == "the lease of the run":
        pause.wait(0.01)

    assert "holds the lease" in str(there.waiting_for)
    here.close()
    waiter.join(10)
    assert there.token == here.token + 1
    there.close()


def test_a_stop_ends_the_waiting(store: TrajectoryStore, tmp_path: Path) -> None:
    """A learner that never got the lease stops without one."""
    here, there = (RunLease(store, "run", tmp_path / name) for name in ("here", "there"))
    here.acquire(threading.Event())
    stop = threading.Event()
    stop.set()

    assert not there.acquire(stop)
    there.close()
    here.close()


def test_a_lost_lease_is_noticed(store: TrajectoryStore, tmp_path: Path) -> None:
    """When a newer token is given, the renewal fails and the learner stops."""
    lease = RunLease(store, "run", tmp_path / "run", ttl_seconds=0.2)
    lease.acquire(threading.Event())
    lease.check()
    store.release_lease("run", lease.token)
    store.acquire_lease("run", "someone else", 60.0)

    assert lease.lost.wait(5.0)
    with pytest.raises(LeaseLost, match="token 1"):
        lease.check()
    lease.close()


# ---- demand


def demand_of(store: TrajectoryStore, **changes: Any) -> tuple[Demand, Sampler, Run]:
    """The demand of a run that takes whole episodes under block pacing, and its sampler."""
    changes.setdefault("algorithm", "REINFORCE")
    hyperparameters = complete_hyperparameters(changes["algorithm"], {"traj_per_epoch": 2})
    run = make_run(pacing=changes.pop("pacing", "block"), hyperparameters=hyperparameters, **changes)
    return Demand(store, run), Sampler(selection_for(run)), run


def at(now: float, update: int = 0) -> Moment:
    """A moment with one live actor."""
    return Moment(update, [make_actor(0)], now)


def test_a_demand_is_for_what_a_batch_lacks(store: TrajectoryStore) -> None:
    """Cumulative: what was read, and an estimate of what is missing (contracts E2)."""
    demand, sampler, _ = demand_of(store)
    demand.ask(sampler, at(0.0), arrived=False)
    first = store.demand("run")
    sampler.add([make_segment(10, position=1, terminated=True)], 0.0)
    demand.ask(sampler, at(0.1), arrived=True)
    second = store.demand("run")

    assert first is not None
    assert second is not None
    assert first == (0, 81)  # 32 steps an episode, two episodes and half a one under way
    assert second[1] >= first[1]


def test_a_demand_grows_while_nothing_comes(store: TrajectoryStore) -> None:
    """Episodes longer than expected use the grants up; waiting asks for more, so that none is stuck."""
    demand, sampler, _ = demand_of(store)
    asked = []
    for step in range(4):
        demand.ask(sampler, at(step * (PATIENCE_SECONDS + 0.1) + 1e6), arrived=False)
        asked.append(store.demand("run"))
    steps = [entry[1] for entry in asked if entry is not None]

    assert steps == sorted(steps)
    assert steps[-1] >= 8 * 81


def test_a_demand_never_shrinks(store: TrajectoryStore) -> None:
    """It is cumulative: clients may have been granted it already."""
    demand, sampler, _ = demand_of(store)
    demand.ask(sampler, at(1e6), arrived=False)
    before = store.demand("run")
    sampler.add([make_segment(1, position=p, episode_index=p, terminated=True) for p in (1, 2)], 0.0)
    demand.ask(sampler, at(1e6, update=1), arrived=True)
    after = store.demand("run")

    assert before is not None
    assert after is not None
    assert after[1] >= before[1]
    assert after[0] == 1


@pytest.mark.parametrize("changes", [{"pacing": "free"}, {"algorithm": "PPO"}])
def test_runs_without_leases_ask_for_nothing(store: TrajectoryStore, changes: dict[str, Any]) -> None:
    """Free pacing needs no grants, rollouts are admitted by their number."""
    run = make_run(**changes)
    Demand(store, run).ask(Sampler(selection_for(run)), at(0.0), arrived=False)

    assert store.demand("run") is None


# ---- reader

SCHEMA = RecordSchema(observation=OBSERVATION, action=ACTION)


def commit(
    store: TrajectoryStore, body: bytes | None = None, schema_digest: str | None = None, count: int = 1
) -> None:
    """Stores segments of four steps, each an episode of its own."""
    known = arrow_codec.schema_digest(SCHEMA)
    body = arrow_codec.encode_columns(SCHEMA, make_columns(4)) if body is None else body
    observation: dict[str, Any] = {"observation": np.ones(3, dtype=np.float32)}
    final = arrow_codec.encode_final_observation(SCHEMA, FinalObservation(observation, {}))
    digests = {"schema_digest": schema_digest or known, "body_digest": arrow_codec.body_digest(body, final)}
    store.commit(
        [
            IncomingTrajectory(
                metadata=make_metadata(4, episode_index=index, sequence=index + 1, **digests),
                body=body,
                final_observation=final,
                policy_version_range=None,
                learner_update_range=(3, 5),
            )
            for index in range(count)
        ]
    )


def test_segments_are_read_as_they_were_stored(store: TrajectoryStore) -> None:
    """Columns, final observation and the age of the oldest step."""
    schema_digest = arrow_codec.schema_digest(SCHEMA)
    store.put_schema(schema_digest, arrow_codec.encode_schema(SCHEMA))
    commit(store)
    (segment,) = SegmentReader(store, "run").read_after(0)

    np.testing.assert_array_equal(segment.columns.reward, make_columns(4).reward)
    assert segment.final_observation is not None
    assert segment.final_observation.observation["observation"].tolist() == [1.0, 1.0, 1.0]
    assert (segment.oldest_update, segment.position) == (3, 1)
    assert SegmentReader(store, "run").read_after(1) == []


def test_a_missing_schema_is_named(store: TrajectoryStore) -> None:
    """A log without its schema is a damaged store, and no reason to guess."""
    commit(store, schema_digest="unknown")

    with pytest.raises(InvalidTrajectory, match="unknown"):
        SegmentReader(store, "run").read_after(0)


@pytest.mark.parametrize(("pacing", "expected"), [("free", 600), ("block", 256)])
def test_under_free_pacing_the_backlog_is_read_to_its_end(
    store: TrajectoryStore, tmp_path: Path, pacing: str, expected: int
) -> None:
    """The newest is learned from first, so that it must be known; rollouts come page by page (E1)."""
    store.put_schema(arrow_codec.schema_digest(SCHEMA), arrow_codec.encode_schema(SCHEMA))
    commit(store, count=600)
    learner = Learner(make_run(pacing=pacing), store, MemoryRegistry(), tmp_path / "run")

    assert learner._read(threading.Event())
    assert learner.sampler.read_position == expected


# ---- publisher


@pytest.fixture(scope="module")
def graph() -> bytes:
    """The graph of the small architecture."""
    return export_graph(make_algorithm().module)


def make_algorithm(seed: int = 1) -> Algorithm[Any]:
    """A small PPO with moved weights, so that its choices are clear."""
    return build_algorithm("PPO", {"hidden_sizes": [4]}, OBSERVATION, ACTION, seed=seed)


class Bench:
    """A publisher over the store and a registry in memory."""

    def __init__(self, store: TrajectoryStore, graph: bytes) -> None:
        self.store, self.graph = store, graph
        self.registry = MemoryRegistry()
        self.algorithm = make_algorithm()
        self.lineage = Lineage("run", "run", "PPO", {}, "lineage", None)
        self.publisher = self.make()

    def make(self) -> Publisher:
        """A publisher as a process that starts makes it."""
        return Publisher(self.registry, self.store, self.graph, fencing_token=1)

    def prepare(self, update: int) -> None:
        """Queues an update that used one trajectory."""
        use = Use(trajectory_id=f"trajectory-{update}", position=update, outcome="used")
        self.publisher.prepare(self.algorithm.module, self.lineage, update, (use,), update, {"loss": 0.5})

    def recorded(self) -> int:
        """What the store knows of finished updates."""
        return self.store.learner_update("run")


@pytest.fixture
def bench(store: TrajectoryStore, graph: bytes) -> Bench:
    """A fresh bench."""
    return Bench(store, graph)


def test_an_update_goes_to_the_registry_and_then_to_the_store(bench: Bench) -> None:
    """One version with its lineage and metrics, one set of use rows (contracts G1)."""
    bench.prepare(1)
    assert bench.publisher.pending == 1
    assert bench.publisher.flush()
    manifest = bench.registry.latest.manifest

    assert (manifest.learner_update, manifest.store_cursor, manifest.metrics) == (1, 1, {"loss": 0.5})
    assert (bench.publisher.policy_version, bench.publisher.pending) == (1, 0)
    assert bench.recorded() == 1


def test_what_the_registry_does_not_take_waits_in_order(bench: Bench) -> None:
    """Nothing is recorded before it is published, and all goes out once the registry is back."""
    bench.registry.down = True
    for update in (1, 2, 3):
        bench.prepare(update)
        assert not bench.publisher.flush()
    assert (bench.publisher.trouble, bench.recorded()) == ("the registry is down", 0)
    bench.registry.down = False

    assert bench.publisher.flush()
    assert [a.manifest.learner_update for a in bench.registry.artefacts] == [1, 2, 3]
    assert (bench.recorded(), bench.publisher.trouble) == (3, "")


@pytest.mark.parametrize(
    "error", [ContractError("leaves a gap"), RelayRLError("I/O error"), RegistryError("the intent is closed")]
)
def test_what_a_registry_in_trouble_says_is_not_final(bench: Bench, error: RelayRLError) -> None:
    """Only a lost lease, another artefact under the key and an unfit one end a run; the rest waits."""
    bench.registry.trouble = error
    bench.prepare(1)
    waited = bench.publisher.flush()
    said = bench.publisher.trouble
    bench.registry.trouble = None

    assert (waited, said) == (False, str(error))
    assert bench.publisher.flush()
    assert bench.recorded() == 1


def test_a_resume_repeats_without_effect(bench: Bench) -> None:
    """What had gone out goes out again: no new version, no new row (contracts G1)."""
    for update in (1, 2):
        bench.prepare(update)
        bench.publisher.flush()
    held = bench.publisher.publications
    attempts = bench.registry.attempts
    again = bench.make()
    again.resume(held)

    assert [p.learner_update for p in held] == [1, 2]
    assert again.flush()
    assert bench.registry.attempts == attempts + 2
    assert (len(bench.registry.artefacts), again.policy_version) == (2, 2)


def test_the_last_two_publications_are_held(bench: Bench) -> None:
    """A checkpoint holds the one before as well, settled or not, and never more than it must."""
    for update in range(1, 6):
        bench.prepare(update)
        bench.publisher.flush()

    assert [p.learner_update for p in bench.publisher.publications] == [4, 5]
    assert [use.position for use in bench.publisher.uses_of(5)] == [5]
    assert bench.publisher.uses_of(3) == ()


def test_a_published_version_is_not_asked_for_again(bench: Bench) -> None:
    """When the store fails after the registry took the version, only the record is repeated."""
    bench.prepare(1)
    newer = bench.store.acquire_lease("run", "a newer learner", 60.0)
    bench.store.release_lease("run", newer)
    bench.store.acquire_lease("run", "a still newer learner", 60.0)  # token 2: this publisher's is 1
    with pytest.raises(LeaseLost):
        bench.publisher.flush()

    assert [p.policy_version for p in bench.publisher.publications] == [1]
    assert not bench.publisher.publications[0].recorded


def test_one_key_with_two_contents_is_an_error(bench: Bench) -> None:
    """The same update of the same lineage cannot have other weights (contracts G1)."""
    bench.prepare(1)
    bench.publisher.flush()
    bench.algorithm = make_algorithm(seed=2)
    bench.publisher = bench.make()
    bench.prepare(1)

    with pytest.raises(DigestMismatch):
        bench.publisher.flush()


def test_an_artefact_proves_itself_before_it_goes_out(bench: Bench, graph: bytes) -> None:
    """A graph that computes something else than the module is found before publication (contracts G3)."""
    other = build_algorithm(
        "PPO", {"hidden_sizes": [4], "activation": "relu"}, OBSERVATION, ACTION
    )  # the same tensors, another function
    bench.publisher = Publisher(bench.registry, bench.store, graph, fencing_token=1)
    with pytest.raises(GoldenMismatch):
        bench.publisher.prepare(other.module, bench.lineage, 1)

    assert bench.registry.artefacts == []


def test_actors_join_with_the_store(store: TrajectoryStore) -> None:
    """The selection sees live actors as the store has them."""
    infos = [ActorInfo(actor_id="actor-0", actor_index=0, environment_instance_id="environment")]
    store.join_client("run", "client", infos, 0)
    sampler = Sampler(selection_for(make_run(pacing="block")))
    sampler.batch(Moment(0, store.live_actors("run"), 0.0))

    assert sampler.waiting_for == "rollout 0: actor 0 of client 0"
