"""The supervisor as a process: it keeps its children, shows runs, drains, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from relayrl_shared.messages import Ack
from relayrl_shared.settings import HttpSettings
from relayrl_shared.testing.registry import ServiceProcess, free_ports
from relayrl_training_server.supervisor import readiness_problem

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


class Stack:
    """A supervisor process with its ingest, without learners."""

    def __init__(self, directory: Path, hang_seconds: float = 60.0) -> None:
        self.listener_port, self.trajectory_port, self.http_port, self.ingest_port = free_ports(4)
        addresses = "transport_config.zmq_addresses.training_addresses"
        settings = {
            "training_server_config.directory": directory / "server",
            "training_server_config.http.port": self.http_port,
            "training_server_config.ingest.http.port": self.ingest_port,
            "training_server_config.supervisor.start_learners": "false",
            "training_server_config.supervisor.hang_seconds": hang_seconds,
            f"{addresses}.agent_listener_address.port": self.listener_port,
            f"{addresses}.trajectory_server_address.port": self.trajectory_port,
        }
        arguments = ["supervise"]
        for key, value in settings.items():
            arguments += ["--set", f"{key}={value}"]
        self.service = ServiceProcess(
            "relayrl_training_server", arguments, self.http_port, directory / "supervisor.log"
        )

    def get(self, path: str) -> Any:
        """What a route answers."""
        return httpx.get(f"{self.service.url}{path}", timeout=5).json()

    def ingest(self) -> dict[str, Any]:
        """The status of the ingest child."""
        found: dict[str, Any] = next(
            child for child in self.get("/v1/processes") if child["name"] == "ingest"
        )
        return found


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """A stack that is ready."""
    stack = Stack(tmp_path)
    with stack.service:
        yield stack


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits for something that another process does."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        threading.Event().wait(0.05)


def is_gone(pid: int) -> bool:
    """Whether there is no such process, or only its remains."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_it_shows_runs_trajectories_and_audits(stack: Stack, wire_client: Any) -> None:
    """What clients sent is shown by run, by id or name; what does not exist is a 404."""
    client = wire_client(stack.listener_port, stack.trajectory_port)
    client.hello(hyperparameters={"gamma": 0.9})
    client.put_schema()
    assert isinstance(client.put(1), Ack)
    assert not client.put(2, policy="another").retryable

    [run] = stack.get("/v1/runs")
    shown = stack.get("/v1/runs/cartpole")
    audit = stack.get(f"/v1/runs/{client.run_id}/audit")
    [trajectory] = stack.get("/v1/runs/cartpole/trajectories?actor_id=actor&limit=5")
    [quarantined] = stack.get("/v1/quarantine?run=cartpole")

    assert (run["name"], run["learner_update"], run["counts"]["trajectories"]) == ("cartpole", 0, 1)
    assert (shown["hyperparameters"]["gamma"], shown["live_actors"], shown["learner"]) == (0.9, 1, None)
    assert (audit["stored"], audit["quarantined"], audit["missing"]) == (1, 1, 0)
    assert (trajectory["sequence"], quarantined["sequence"]) == (1, 2)
    assert quarantined["reason"] == "metadata"
    assert stack.get("/v1/runs/nothing")["code"] == "unknown_run"
    assert stack.get("/v1/runs/cartpole/trajectories?actor_id=nobody") == []


def test_a_killed_ingest_comes_back_and_is_reported(stack: Stack, wire_client: Any) -> None:
    """Readiness says that ingest died and how, until it serves again; clients go on."""
    client = wire_client(stack.listener_port, stack.trajectory_port)
    client.hello()
    client.put_schema()
    pid = stack.ingest()["pid"]
    os.kill(pid, signal.SIGKILL)

    wait_until(lambda: stack.ingest()["deaths_total"] == 1)
    assert stack.ingest()["last_exit"] == "killed by SIGKILL"
    stack.service.wait_ready()

    assert stack.ingest()["pid"] != pid
    assert isinstance(client.put(1), Ack)


def test_an_ingest_that_hangs_is_replaced(tmp_path: Path) -> None:
    """A process that is only stopped is as good as dead: the next one serves (contracts K1)."""
    stack = Stack(tmp_path, hang_seconds=15.0)
    with stack.service:
        before = stack.ingest()
        os.kill(before["pid"], signal.SIGSTOP)

        wait_until(lambda: stack.ingest()["deaths_total"] > before["deaths_total"])
        found = stack.ingest()
        stack.service.wait_ready()

    assert found["last_exit"] == "no sign of life for 15 s, killed by SIGKILL"


def test_a_killed_supervisor_leaves_nothing_and_the_next_one_takes_over(stack: Stack) -> None:
    """The children end with it, so that their ports and files are free for the next."""
    pid = stack.ingest()["pid"]
    stack.service.kill()

    wait_until(lambda: is_gone(pid))
    stack.service.start()
    stack.service.wait_ready()

    assert stack.ingest()["pid"] != pid


def test_sigterm_drains_the_children(stack: Stack) -> None:
    """A stop ends with status 0 and no process left."""
    pid = stack.ingest()["pid"]

    assert stack.service.terminate() == 0

    assert is_gone(pid)


def test_readiness_of_a_child_that_cannot_be_asked_is_its_life() -> None:
    """Without HTTP the process is all there is to see; with it, silence is a problem."""
    assert readiness_problem(HttpSettings(enabled=False, port=1)) is None
    assert readiness_problem(HttpSettings(port=0)) is None
    assert "does not answer" in (readiness_problem(HttpSettings(port=free_ports(1)[0])) or "")


def test_without_a_database_it_serves_and_says_what_it_waits_for(tmp_path: Path) -> None:
    """A Postgres that is not there yet is a reason in readiness, not an end; ingest waits for it too."""
    http_port, nowhere = free_ports(2)
    settings = {
        "training_server_config.store": f"postgresql://user@127.0.0.1:{nowhere}/nothing",
        "training_server_config.http.port": http_port,
        "training_server_config.ingest.http.enabled": "false",
    }
    arguments = ["supervise"]
    for key, value in settings.items():
        arguments += ["--set", f"{key}={value}"]
    service = ServiceProcess("relayrl_training_server", arguments, http_port, tmp_path / "supervisor.log")
    service.start()
    try:
        wait_until(lambda: "not available yet" in (tmp_path / "supervisor.log").read_text())
        ready = httpx.get(f"{service.url}/readyz", timeout=5)
        runs = httpx.get(f"{service.url}/v1/runs", timeout=5)
        [ingest] = httpx.get(f"{service.url}/v1/processes", timeout=5).json()
    finally:
        assert service.terminate() == 0

    assert (ready.status_code, ingest["state"], ingest["deaths_total"]) == (503, "running", 0)
    assert "refused" in ready.json()["checks"]["store"]
    assert (runs.status_code, runs.json()["code"]) == (503, "store_unavailable")
