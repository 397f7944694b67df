"""The process manager with real child processes: order, readiness, restarts with a limit, drain."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from relayrl_cli.addresses import Addresses, Ports, is_alive, read_stack_file
from relayrl_cli.processes import ProcessSpec, RestartPolicy, not_ready
from relayrl_cli.stack import Stack, StackError, StackPlan, plan_stack

CHILD = """
import http.server, json, os, pathlib, signal, sys, threading, time
name, port, directory, mode = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3]), sys.argv[4]
with (directory / "order").open("a") as order: order.write(f"start {name}\\n")
print(name, "says hello", flush=True)
if mode == "dies" or (mode == "dies-later" and (directory / "die").exists()): sys.exit(3)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        missing = "store is away" if (directory / "away").exists() else None
        body = json.dumps({"checks": {"store": missing}}).encode()
        self.send_response(503 if missing else 200); self.end_headers(); self.wfile.write(body)
    def log_message(self, *_): pass
server = http.server.HTTPServer(("127.0.0.1", port), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
done = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: None if mode == "stubborn" else done.set())
while not done.wait(0.02): pass
with (directory / "order").open("a") as order: order.write(f"stop {name}\\n")
"""


class Stage:
    """Makes plans of small child processes and collects what a stack reports."""

    def __init__(self, directory: Path, free_port: Callable[[], int]) -> None:
        self.directory = directory
        self.lines: list[str] = []
        self.stop = threading.Event()
        self._free_port = free_port
        self._stacks: list[Stack] = []

    def stack(self, *modes: str, restart: RestartPolicy | None = None) -> Stack:
        """A stack of children `p0`, `p1`, … with the given modes."""
        specs = tuple(self._spec(f"p{index}", mode) for index, mode in enumerate(modes))
        policy = restart or RestartPolicy(delay_seconds=0.01)
        stack = Stack(
            StackPlan(self.directory, "sqlite:///x", Addresses(), specs, {}, policy), self.lines.append
        )
        self._stacks.append(stack)
        return stack

    def _spec(self, name: str, mode: str) -> ProcessSpec:
        port = self._free_port()
        command = (sys.executable, "-c", CHILD, name, str(port), str(self.directory), mode)
        return ProcessSpec(name, command, f"http://127.0.0.1:{port}", self.directory / "logs" / f"{name}.log")

    def order(self) -> list[str]:
        """What the children did, in order."""
        return (self.directory / "order").read_text().splitlines()

    def touch(self, name: str) -> Path:
        """A file that changes what children do."""
        file = self.directory / name
        file.touch()
        return file

    def kill_all(self) -> None:
        """Leaves nothing behind."""
        for stack in self._stacks:
            stack.kill()


@pytest.fixture
def stage(stack_directory: Path, free_port: Callable[[], int]) -> Iterator[Stage]:
    """A stage whose children end with the test."""
    found = Stage(stack_directory, free_port)
    yield found
    found.kill_all()


def until(condition: Callable[[], bool], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        threading.Event().wait(0.01)


def written_pid(directory: Path) -> int | None:
    file = read_stack_file(directory)
    return None if file is None else file.processes["p0"].pid


def test_processes_start_in_order_and_stop_in_reverse(stage: Stage) -> None:
    """Each starts once the one before is ready; consumers stop before what they need."""
    with stage.stack("serves", "serves") as stack:
        assert stack.start(stage.stop)
        assert {entry.state for entry in stack.processes().values()} == {"ready"}
    assert stage.order() == ["start p0", "start p1", "stop p1", "stop p0"]
    assert stage.lines[0].startswith("p0 is ready")


def test_the_stack_file_says_what_runs(stage: Stage) -> None:
    """Pids, states and logs, for `relayrl status`; after the stop nothing lives."""
    with stage.stack("serves") as stack:
        stack.start(stage.stop)
        running = read_stack_file(stage.directory)
    stopped = read_stack_file(stage.directory)

    assert running is not None
    assert stopped is not None
    assert (running.pid, running.running) == (os.getpid(), True)
    entry = running.processes["p0"]
    assert (entry.state, stopped.processes["p0"].state) == ("ready", "stopped")
    assert entry.pid is not None
    assert not is_alive(entry.pid)
    assert "p0 says hello" in Path(entry.log).read_text()


def test_a_process_that_is_not_ready_holds_the_next_back(stage: Stage) -> None:
    """Readiness is asked, not guessed; a stop while waiting ends the start."""
    away = stage.touch("away")
    stack = stage.stack("serves", "serves")
    started: list[bool] = []
    thread = threading.Thread(target=lambda: started.append(stack.start(stage.stop)))
    thread.start()
    (spec, _) = stack.plan.processes
    until(lambda: not_ready(spec.url) == {"store": "store is away"})
    assert stage.order() == ["start p0"]

    away.unlink()
    thread.join(15)

    assert started == [True]
    stack.stop()


def test_a_stop_while_starting_ends_the_start(stage: Stage) -> None:
    """Ctrl-C during the start drains what has started."""
    stage.touch("away")
    with stage.stack("serves", "serves") as stack:
        threading.Timer(0.3, stage.stop.set).start()
        assert stack.start(stage.stop) is False

    assert stage.order() == ["start p0", "stop p0"]


def test_a_process_that_dies_at_the_start_is_an_error_with_its_log(stage: Stage) -> None:
    """The message has the status and the end of the log."""
    with (
        stage.stack("dies") as stack,
        pytest.raises(StackError, match=r"status 3; the end of .*\n.*says hello"),
    ):
        stack.start(stage.stop)


def test_a_killed_process_is_reported_and_started_again(stage: Stage) -> None:
    """With a new pid, and counted."""
    with stage.stack("serves", "serves") as stack:
        stack.start(stage.stop)
        first = stack.processes()["p0"].pid
        assert first is not None

        os.kill(first, signal.SIGKILL)
        until(lambda: (stack.processes()["p0"].restarts, stack.processes()["p0"].state) == (1, "ready"))

        assert stack.processes()["p0"].pid not in {first, None}
        assert stack.healthy
        assert any("p0 ended with status -9; started again" in line for line in stage.lines)
        until(lambda: "p0 is ready" in stage.lines[-1])
        until(lambda: written_pid(stage.directory) == stack.processes()["p0"].pid)


def test_restarts_have_a_limit(stage: Stage) -> None:
    """A process that keeps dying stays down, and says so."""
    with stage.stack("dies-later", restart=RestartPolicy(limit=2, delay_seconds=0.01)) as stack:
        stack.start(stage.stop)
        stage.touch("die")
        pid = stack.processes()["p0"].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

        until(lambda: not stack.healthy)

        assert stack.processes()["p0"].restarts == 2
        assert any("keeps failing and stays down" in line for line in stage.lines)


def test_a_process_that_does_not_drain_is_killed_after_the_deadline(stage: Stage) -> None:
    """And reported."""
    stack = stage.stack("stubborn")
    stack.start(stage.stop)
    pid = stack.processes()["p0"].pid
    assert pid is not None

    assert stack.stop(timeout_seconds=0.3) is False

    assert not is_alive(pid)
    assert "p0 did not drain in 0.3 s and was killed" in stage.lines


def test_a_second_stack_in_the_same_directory_is_refused(stage: Stage) -> None:
    """Two would write the same files."""
    with stage.stack("serves") as stack:
        stack.start(stage.stop)

        with pytest.raises(StackError, match=r"a stack runs in .*choose another --dir"):
            stage.stack("serves").start(stage.stop)
        assert stack.processes()["p0"].state == "ready"


def test_a_plan_puts_everything_below_its_directory(tmp_path: Path) -> None:
    """The services get their ports, state and the extra settings that are theirs; the store has a default."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/model_registry_config.json").write_text("{}")

    plan = plan_stack(
        tmp_path / "d",
        Ports(registry_http=1234),
        configuration=tmp_path / "conf",
        extra=["model_registry.log.level=debug"],
    )

    registry, training, inference = plan.processes
    assert plan.store == f"sqlite:///{tmp_path}/d/training-server"
    assert registry.url == "http://127.0.0.1:1234"
    assert registry.log == tmp_path / "d/logs/model-registry.log"
    assert {"http.port=1234", "log.level=debug", str(tmp_path / "conf/model_registry_config.json")} <= set(
        registry.command
    )
    assert "supervise" in training.command
    assert "log.level=debug" not in inference.command


def test_free_ports_are_distinct() -> None:
    """Every address of a stack has its own."""
    ports = Ports.free()
    values = [getattr(ports, name) for name in Ports.__struct_fields__]

    assert len(set(values)) == len(values)
