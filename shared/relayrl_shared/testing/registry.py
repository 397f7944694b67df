"""For tests of whoever publishes or fetches: opaque artefacts, free ports, services as processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from blake3 import blake3

from relayrl_shared.policy.manifest import GraphOutputs, NoiseLeaf, PolicyArtefact, PolicyManifest
from relayrl_shared.spaces import ActionSpec, LeafSpec, ObservationSpec

START_SECONDS = 60.0


def opaque_artefact(
    *,
    policy: str = "cartpole",
    run_id: str = "run-1",
    lineage_id: str = "lineage-1",
    learner_update: int = 0,
    seed: int = 0,
    weights_bytes: int = 1000,
) -> PolicyArtefact:
    """An artefact that no engine would load, but that can be published and fetched: the files are any bytes.

    The graph is the same for every seed, the weights and golden vectors differ.
    """
    graph = b"graph of " + policy.encode()
    weights = blake3(f"weights {seed}".encode()).digest(length=weights_bytes)
    golden = blake3(f"golden {seed}".encode()).digest(length=100)
    manifest = PolicyManifest(
        policy=policy,
        run_id=run_id,
        lineage_id=lineage_id,
        learner_update=learner_update,
        algorithm="ppo",
        hyperparameters={"gamma": 0.99},
        observation_spec=ObservationSpec(
            leaves=(LeafSpec(name="observation", kind="box", shape=(4,), dtype="float32"),)
        ),
        action_spec=ActionSpec(
            leaves=(LeafSpec(name="action", kind="discrete", shape=(), dtype="int64", nvec=(2,), start=(0,)),)
        ),
        masked_leaves=(),
        noise=(NoiseLeaf(name="noise", action_leaf="action", kind="gumbel", width=2),),
        outputs=GraphOutputs(behaviour_log_prob=True, leaf_log_prob=False, value=True),
        graph_digest=blake3(graph).hexdigest(),
        weights_digest=blake3(weights).hexdigest(),
        golden_digest=blake3(golden).hexdigest(),
    )
    return PolicyArtefact(manifest, graph, weights, golden)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nothing bound a moment ago."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


class ServiceProcess:
    """A service of this repository as a process of its own; `with` waits until it is ready and ends it after.

    Args:
        module: such as `relayrl_model_registry`, run with `python -m`.
        arguments: its command line.
        http_port: where it answers /readyz.
        log: file that gets what it prints.
        environment: added to this process's.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        http_port: int,
        log: Path,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._command = [sys.executable, "-m", module, *arguments]
        self._environment = {**os.environ, **(environment or {})}
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"http://127.0.0.1:{http_port}"

    @property
    def pid(self) -> int:
        """The process id of the running service."""
        return self._running().pid

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("the service was not started")
        return self._process

    def start(self) -> None:
        """Starts the process and returns at once."""
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self._command, env=self._environment, stdout=output, stderr=subprocess.STDOUT
            )

    def wait_ready(self, timeout_seconds: float = START_SECONDS) -> dict[str, Any]:
        """What /readyz said when ready; AssertionError with the log if it does not get there."""
        deadline = time.monotonic() + timeout_seconds
        answer: Any = "nothing"
        while time.monotonic() < deadline and self._running().poll() is None:
            try:
                response = httpx.get(f"{self.url}/readyz", timeout=1.0)
                answer = response.json()
                if response.status_code == httpx.codes.OK:
                    return dict(answer)
            except httpx.HTTPError as error:
                answer = error
            time.sleep(0.02)  # another process: there is no event to wait for
        text = self._log.read_text(errors="replace")[-4000:]
        raise AssertionError(f"{self._command} is not ready: {answer}\n{text}")

    def kill(self) -> None:
        """SIGKILL, and waits until it is gone."""
        self._running().kill()
        self._running().wait(10)

    def terminate(self, timeout_seconds: float = 15.0) -> int:
        """SIGTERM; the exit status. Raises subprocess.TimeoutExpired if it does not end in time."""
        self._running().send_signal(signal.SIGTERM)
        return self._running().wait(timeout_seconds)

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()
