"""The learner over a real SQLite store, with policies that act through ONNX Runtime."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import gymnasium
import pytest

from relayrl_shared.errors import StoreUnavailable
from relayrl_shared.policy.artefact import digest
from relayrl_shared.store.interface import TrajectoryStore
from relayrl_shared.store.open import open_store
from relayrl_training_server.algorithms.build import build_algorithm
from relayrl_training_server.checkpoints import CheckpointDirectory
from relayrl_training_server.export import export_graph
from relayrl_training_server.learner import Learner, LearnerTimes
from relayrl_training_server.testing.actors import RolloutActors, make_run
from relayrl_training_server.testing.registry import MemoryRegistry

FAST = LearnerTimes(wait_seconds=0.02, lease_seconds=2.0, retry_seconds=0.05, patience_seconds=0.0)
SMALL: dict[str, Any] = {
    "rollout_steps": 16,
    "minibatch": 32,
    "train_pi_iters": 3,
    "train_vf_iters": 3,
    "target_kl": None,
    "hidden_sizes": [16],
}


class Rig:
    """A store, a registry, one environment and its actors; learners come and go."""

    def __init__(self, directory: Path, hyperparameters: dict[str, Any], lag: int = 0, **run: Any) -> None:
        self.directory = directory
        self.store: TrajectoryStore = open_store(f"sqlite:///{directory / 'store'}", writer_of="all")
        self.registry = MemoryRegistry()
        self.environment = gymnasium.make_vec("CartPole-v1", num_envs=3, vectorization_mode="sync")
        algorithm = run.pop("algorithm", "PPO")
        self.run = make_run(self.environment, algorithm, hyperparameters, max_policy_lag=lag, **run)
        self.graph: bytes | None = None
        self.failures: list[BaseException] = []
        self.actors = RolloutActors(
            self.store, self.run, self.environment, hyperparameters.get("rollout_steps", 16), prefix="a-"
        )

    def learner(self) -> Learner:
        """A fresh learner over what the directory holds."""
        directory = self.directory / "run"
        return Learner(self.run, self.store, self.registry, directory, graph=self.graph, times=FAST)

    @contextmanager
    def learning(self) -> Iterator[Learner]:
        """A learner that runs in a thread; leaving stops it and raises what it raised."""
        learner, stop = self.learner(), threading.Event()

        def work() -> None:
            try:
                learner.run(stop)
            except BaseException as error:  # noqa: BLE001  # raised again below
                self.failures.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield learner
        finally:
            stop.set()
            thread.join(30)
        if self.failures:
            raise self.failures.pop()

    def wait(self, condition: Callable[[], bool], seconds: float = 30.0) -> None:
        """Waits until the condition holds."""
        pause = threading.Event()
        for _ in range(int(seconds / 0.02)):
            if condition() or self.failures:
                return
            pause.wait(0.02)
        raise AssertionError("it did not come to pass in time")

    def lockstep(self, rollouts: int) -> None:
        """Plays rollouts, each with the policy of as many updates; waits for the update of each."""
        for _ in range(rollouts):
            update = self.actors.rollout_index
            self.wait(lambda: self.published(update))  # noqa: B023
            self.actors.load(self.registry.latest)
            self.actors.play()
        self.wait(lambda: self.published(self.actors.rollout_index))

    def published(self, update: int) -> bool:
        """Whether this update is out."""
        return bool(self.registry.artefacts) and self.registry.latest.manifest.learner_update >= update

    def close(self) -> None:
        """Ends everything."""
        self.environment.close()
        self.store.close()


@pytest.fixture(scope="module")
def small_graph() -> bytes:
    """The graph of `SMALL` on CartPole, exported once."""
    environment = gymnasium.make_vec("CartPole-v1", num_envs=1, vectorization_mode="sync")
    run = make_run(environment, "PPO", SMALL)
    environment.close()
    return export_graph(
        build_algorithm("PPO", run.hyperparameters, run.observation_spec, run.action_spec).module
    )


@pytest.fixture
def rig(tmp_path: Path, small_graph: bytes) -> Iterator[Callable[..., Rig]]:
    """Makes rigs, each in a directory of its own."""
    rigs: list[Rig] = []

    def make(hyperparameters: dict[str, Any] | None = None, **run: Any) -> Rig:
        directory = tmp_path / f"rig-{len(rigs)}"
        rigs.append(Rig(directory, {**SMALL, **(hyperparameters or {})}, **run))
        rigs[-1].graph = small_graph if rigs[-1].run.algorithm == "PPO" else None
        return rigs[-1]

    yield make
    for made in rigs:
        made.close()


def weights(rig: Rig) -> list[str]:
    """The digest of every version's weights, in order."""
    return [digest(artefact.weights) for artefact in rig.registry.artefacts]


def test_lockstep_twice_gives_the_same_weights(rig: Callable[..., Rig]) -> None:
    """Two learners that see the same data publish the same bits at every update (contracts F2)."""
    histories = []
    for _ in range(2):
        one = rig({"normalize_obs": True})
        with one.learning():
            one.lockstep(4)
        histories.append(weights(one))

    assert histories[0] == histories[1]
    assert len(set(histories[0])) == 5


def test_a_resume_continues_to_the_bit(rig: Callable[..., Rig]) -> None:
    """A learner stopped and started again between updates ends with the weights of one that ran through."""
    hyperparameters = {"normalize_obs": True, "normalize_returns": True, "minibatch": 16}
    through, stopped = rig(hyperparameters), rig(hyperparameters)
    with through.learning():
        through.lockstep(4)
    for rollouts in (1, 2, 1):
        with stopped.learning():
            stopped.lockstep(rollouts)

    assert weights(through) == weights(stopped)


def test_every_trajectory_is_used_once(rig: Callable[..., Rig]) -> None:
    """After a few rollouts and a restart, all that was stored is used, nothing twice (promise 2)."""
    one = rig()
    with one.learning():
        one.lockstep(2)
    with one.learning():
        one.lockstep(2)
    one.wait(lambda: one.store.learner_update(one.run.run_id) == 4)

    audit = one.store.audit(one.run.run_id)
    assert audit.used == one.store.counts(one.run.run_id)["trajectories"]
    assert (audit.used_twice, audit.unread) == (0, 0)


def test_the_first_minibatch_has_ratios_of_one(rig: Callable[..., Rig]) -> None:
    """At lag 0 learner and ONNX actors agree: |ratio - 1| < 1e-4, clip fraction 0 (contracts H5)."""
    one = rig({"normalize_obs": True, "normalize_returns": True})
    with one.learning() as learner:
        one.lockstep(4)
        metrics = [artefact.manifest.metrics for artefact in one.registry.artefacts[1:]]

    assert learner.learner_update == 4
    assert max(m["first_ratio_deviation"] for m in metrics) < 1e-4
    assert {m["first_clip_fraction"] for m in metrics} == {0.0}
    assert one.registry.latest.manifest.metrics["ratio_deviation"] > 1e-4


def test_readiness_names_who_is_missing(rig: Callable[..., Rig]) -> None:
    """At lag 0 the learner waits and says for which actors."""
    one = rig()
    with one.learning() as learner:
        one.wait(lambda: learner.readiness()["batch"] is not None)

        assert learner.readiness()["batch"] == (
            "waiting for rollout 0: actor 0 of client 0, actor 1 of client 0, actor 2 of client 0"
        )


def test_a_registry_that_is_down_queues_publications(rig: Callable[..., Rig]) -> None:
    """The learner goes on as far as the lag allows, says what it waits for, and catches up in order."""
    one = rig(lag=1)
    with one.learning() as learner:
        one.lockstep(1)
        one.registry.down = True
        for _ in range(3):
            one.actors.play()
        one.wait(lambda: learner.readiness()["registry"] is not None)
        one.wait(lambda: learner.info()["pending_publications"] == 3)
        one.registry.down = False
        one.wait(lambda: one.published(4))

    updates = [artefact.manifest.learner_update for artefact in one.registry.artefacts]
    assert updates == [0, 1, 2, 3, 4]
    assert one.store.audit(one.run.run_id).used_twice == 0


def test_nothing_is_published_before_its_checkpoint_is_durable(rig: Callable[..., Rig]) -> None:
    """A disk that is full for a moment holds the update back until its checkpoint is there (contracts G1)."""
    one = rig()
    checkpoints = one.directory / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    full = checkpoints / ".checkpoint-000000000001.relayrl.tmp"
    full.symlink_to("/dev/full")
    with one.learning() as learner:
        one.lockstep(1)

    found = CheckpointDirectory(checkpoints, 5).newest(one.run.run_id)
    assert not full.is_symlink()
    assert found is not None
    assert (found[0].learner_update, learner.learner_update, len(one.registry.artefacts)) == (1, 1, 2)


class RestartingStore:
    """A store whose database restarts while the learner waits for data."""

    def __init__(self, store: TrajectoryStore, failures: int) -> None:
        self._store = store
        self.failures = failures

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def wait(self, run_id: str, after_position: int, timeout_seconds: float) -> bool:
        """Fails as often as told."""
        if self.failures:
            self.failures -= 1
            raise StoreUnavailable("the database is starting up")
        return self._store.wait(run_id, after_position, timeout_seconds)


def test_a_store_that_is_away_while_nothing_comes_is_waited_for(rig: Callable[..., Rig]) -> None:
    """A restart of the database between two batches ends nothing."""
    one = rig()
    restarting = RestartingStore(one.store, failures=3)
    one.store = cast(TrajectoryStore, restarting)
    with one.learning():
        one.wait(lambda: restarting.failures == 0)
        one.lockstep(1)

    assert one.published(1)


def test_a_resume_from_an_older_checkpoint_keeps_its_uses(rig: Callable[..., Rig]) -> None:
    """The update that a new lineage begins with is cut from its parent, and counts in the new one (G1)."""
    one = rig()
    with one.learning():
        one.lockstep(3)
    newest = max((one.directory / "run" / "checkpoints").glob("checkpoint-*.relayrl"))
    newest.write_bytes(newest.read_bytes()[:-1])
    with one.learning() as learner:
        one.wait(lambda: learner.learner_update == 3)
        one.wait(lambda: one.registry.latest.manifest.learner_update == 3)
        one.lockstep(1)
    one.wait(lambda: one.store.learner_update(one.run.run_id) == 4)

    audit = one.store.audit(one.run.run_id)
    assert audit.used == one.store.counts(one.run.run_id)["trajectories"]
    assert (audit.used_twice, audit.unread) == (0, 0)
