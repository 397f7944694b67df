"""The learner as a process beside a real registry: killed again and again, stopped, and failing."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from relayrl_shared.errors import RelayRLError
from relayrl_shared.policy.manifest import PolicyArtefact
from relayrl_shared.registry_client import RegistryClient
from relayrl_shared.store.interface import Run, TrajectoryStore
from relayrl_shared.store.open import open_store
from relayrl_shared.testing.registry import ServiceProcess, free_ports
from relayrl_training_server.checkpoints import CheckpointDirectory
from relayrl_training_server.testing.actors import RolloutActors, make_run

SMALL: dict[str, Any] = {
    "rollout_steps": 8,
    "train_pi_iters": 2,
    "train_vf_iters": 2,
    "target_kl": None,
    "hidden_sizes": [8],
}


class LearnerProcess(ServiceProcess):
    """A learner that may end by itself."""

    def wait_end(self, timeout_seconds: float) -> int:
        """The exit status, once it has ended."""
        return self._running().wait(timeout_seconds)


class Stack:
    """A registry process, a learner process, and this process in the place of ingest and client."""

    def __init__(self, directory: Path, environment: Any) -> None:
        self.directory = directory
        ports = free_ports(4)
        self.registry = ServiceProcess(
            "relayrl_model_registry",
            [
                f"--set=directory={directory / 'registry'}",
                f"--set=model_server.port={ports[0]}",
                f"--set=model_announcer.port={ports[1]}",
                f"--set=http.port={ports[2]}",
            ],
            ports[2],
            directory / "registry.log",
        )
        self.run: Run = make_run(environment, "PPO", SMALL)
        self.learner = LearnerProcess(
            "relayrl_training_server",
            [
                "learn",
                "--run=run",
                f"--set=training_server_config.directory={directory / 'server'}",
                f"--set=training_server_config.learner.http.port={ports[3]}",
                f"--set=transport_config.zmq_addresses.training_addresses.model_server_address.port={ports[0]}",
            ],
            ports[3],
            directory / "learner.log",
        )
        self.client = RegistryClient(f"tcp://127.0.0.1:{ports[0]}")
        self.store: TrajectoryStore = open_store(f"sqlite:///{directory / 'server'}", writer_of="ingest")
        self.actors = RolloutActors(self.store, self.run, environment, SMALL["rollout_steps"])

    def policy(self, update: int) -> PolicyArtefact:
        """The policy of that update, once it is out."""
        for _ in range(6000):
            try:
                artefact = self.client.fetch("run")
            except RelayRLError:
                artefact = None
            if artefact is not None and artefact.manifest.learner_update >= update:
                return artefact
            self.store.wait("run-run", 1 << 40, 0.02)
        raise AssertionError(f"update {update} was not published: {self.log()}")

    def play(self) -> None:
        """One rollout, with the policy of as many updates."""
        self.actors.load(self.policy(self.actors.rollout_index))
        self.actors.play()

    def status(self) -> dict[str, Any]:
        """What status.json says."""
        path = self.directory / "server" / "runs" / self.run.run_id / "status.json"
        return dict(json.loads(path.read_text()))

    def log(self) -> str:
        """The end of what the learner printed."""
        return (self.directory / "learner.log").read_text(errors="replace")[-3000:]

    def close(self) -> None:
        """Ends what this process opened."""
        self.client.close()
        self.store.close()


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """A stack whose registry runs; the learner is the test's to start."""
    environment = gymnasium.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync")
    made = Stack(tmp_path, environment)
    with made.registry:
        yield made
    made.close()
    environment.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_learner_that_is_killed_goes_on_where_it_stood(stack: Stack) -> None:
    """SIGKILL at random moments: every trajectory is used once, every update published once, SIGTERM ends it.

    Then a reward that is not finite fails the run with its reason and a status that says not to restart.
    """
    seed = random.SystemRandom().randrange(1 << 16)
    moments = random.Random(seed)
    learner = stack.learner
    learner.start()
    try:
        for _ in range(3):
            for _ in range(3):
                stack.play()
            stack.store.wait("run-run", 1 << 40, moments.uniform(0.0, 0.15))
            learner.kill()
            learner.start()
        for _ in range(3):
            stack.play()
        final = stack.policy(12)
        learner.wait_ready(120)
    except BaseException:
        learner.kill()
        raise
    assert learner.terminate(60) == 0, stack.log()
    audit = stack.store.audit(stack.run.run_id)
    stored = stack.store.counts(stack.run.run_id)["trajectories"]
    assert (audit.used, audit.used_twice, audit.unread) == (stored, 0, 0), f"seed {seed}"
    assert final.manifest.policy_version == 13, f"seed {seed}: 12 updates and the first policy, once each"
    assert stack.status()["learner_update"] == 12
    _fail_the_run(stack)


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_database_that_is_not_there_yet_is_waited_for() -> None:
    """A learner that starts before its Postgres says what it waits for, and a signal ends it well."""
    (port,) = free_ports(1)
    store = f"--set=training_server_config.store=postgresql://nobody@127.0.0.1:{port}/nothing"
    command = [sys.executable, "-m", "relayrl_training_server", "learn", "--run=run", store]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        process.terminate()
        ended = process.wait(20)

    assert "not available yet" in said
    assert ended == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(
    shutil.which("strace") is None, reason="NO STRACE: checkpoint before publication not shown"
)
def test_system_calls_show_the_checkpoint_on_disk_before_its_publication(
    stack: Stack, tmp_path: Path
) -> None:
    """Before each publish message: the checkpoint fsynced, renamed into place, its directory fsynced."""
    trace = tmp_path / "trace"
    stack.learner.start()
    try:
        stack.policy(0)
        stack.learner.wait_ready(120)
        calls = "trace=fsync,rename,renameat,renameat2,sendto,sendmsg"
        pid = str(stack.learner.pid)
        command = ["strace", "-f", "-y", "-s", "200", "-e", calls, "-o", str(trace), "-p", pid]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
            assert strace.stderr is not None
            if "attached" not in strace.stderr.readline():
                pytest.skip("STRACE IS NOT PERMITTED: checkpoint before publication not shown")
            for _ in range(3):
                stack.play()
            stack.policy(3)
            strace.terminate()
    finally:
        stack.learner.kill()

    seen = _words(trace.read_text(errors="replace").splitlines())
    published = [index for index, word in enumerate(seen) if word == "publish"]
    assert len(published) == 3
    for start, end in zip([0, *published], published, strict=False):
        assert [word for word in seen[start:end] if word in ("synced", "renamed", "directory synced")][
            :3
        ] == ["synced", "renamed", "directory synced"], seen


def _words(lines: list[str]) -> list[str]:
    """The calls that matter, in order."""
    patterns = {
        r"fsync\(\d+<[^>]*/checkpoints>": "directory synced",
        r"fsync\(\d+<[^>]*/checkpoints/[^>]+>": "synced",
        r"rename(at2?)?\(.*/checkpoints/": "renamed",
        r"send(to|msg)\(.*kind.{1,6}publish.{1,4}version": "publish",
    }
    found = []
    for line in lines:
        word = next((word for pattern, word in patterns.items() if re.search(pattern, line)), None)
        if word is not None:
            found.append(word)
    return found


def _fail_the_run(stack: Stack) -> None:
    """A reward that no validation saw: the learner refuses to learn NaN."""
    directory = CheckpointDirectory(stack.directory / "server" / "runs" / stack.run.run_id / "checkpoints", 5)
    before = directory.newest(stack.run.run_id)
    stack.actors.load(stack.policy(12))
    stack.actors.scale_rewards(np.inf)
    stack.actors.play()
    stack.learner.start()
    exit_status = stack.learner.wait_end(120)

    assert exit_status == 3, stack.log()
    assert stack.status()["state"] == "failed"
    assert "NonFiniteUpdate" in stack.status()["reason"]
    assert directory.newest(stack.run.run_id) == before
