"""The command line as a user runs it: real services, real processes, real signals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from relayrl_cli.addresses import is_alive, read_stack_file
from relayrl_shared.testing.postgres import PostgresServer

ROOT = Path(__file__).parents[2]
START_SECONDS = 90

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(240)]


class Command:
    """A `relayrl` command in a process group of its own, its output collected line by line."""

    def __init__(self, *arguments: str | Path) -> None:
        command = (sys.executable, "-u", "-m", "relayrl_cli", *map(str, arguments))
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
        )
        self.lines: list[str] = []
        self._ended = False
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self.lines.append(line.rstrip())
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def text(self) -> str:
        """Everything that it has printed."""
        return "\n".join(self.lines)

    def expect(self, pattern: str, timeout_seconds: float = START_SECONDS) -> None:
        """Waits until what it printed matches; fails at once if it ends without."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or re.search(pattern, self.text), timeout_seconds)
        assert re.search(pattern, self.text), f"no {pattern!r} in:\n{self.text}"

    def kill(self) -> None:
        """SIGKILL, of the command alone."""
        self._process.kill()
        self._process.wait(10)

    def interrupt(self) -> None:
        """Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def wait(self, timeout_seconds: float = 120) -> int:
        """Its exit status."""
        status = self._process.wait(timeout_seconds)
        self._reader.join(5)
        return status

    def end(self) -> None:
        """Leaves nothing running, whatever happened."""
        if self._process.poll() is None:
            self.interrupt()
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self.interrupt()
                self._process.wait(10)
        self._reader.join(5)
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture
def commands() -> Iterator[list[Command]]:
    """Commands that end with the test."""
    started: list[Command] = []
    yield started
    for command in reversed(started):
        command.end()


def relayrl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "relayrl_cli", *map(str, arguments))
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=150)


def pids(directory: Path) -> list[int]:
    stack = read_stack_file(directory)
    assert stack is not None
    return [entry.pid for entry in stack.processes.values() if entry.pid is not None]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A running stack that the tests of this file share, each with a run of its own; its directory."""
    directory = tmp_path_factory.mktemp("shared") / "stack"
    up = Command("up", "--dir", directory, "--auto-ports")
    try:
        up.expect("all services are ready")
        yield directory
    finally:
        up.end()


def test_demo_interrupted_while_training_drains_and_says_what_was_kept(
    commands: list[Command], stack_directory: Path
) -> None:
    """Status 130, no process left, and every accepted trajectory accounted for."""
    commands.append(demo := Command("demo", "--dir", stack_directory))
    demo.expect(r"policy version [2-9]")
    running = pids(stack_directory)

    demo.interrupt()

    assert demo.wait() == 130
    assert "interrupted; what was recorded is kept" in demo.text
    assert f"kept in {stack_directory}" in demo.text
    assert [pid for pid in running if is_alive(pid)] == []
    audit = relayrl("audit", "cartpole-ppo", "--dir", stack_directory)
    assert "the identity holds" in audit.stdout, audit.stdout + audit.stderr


def test_demo_that_does_not_learn_ends_with_status_1(commands: list[Command], stack_directory: Path) -> None:
    """The policy is tested through the inference server all the same."""
    commands.append(demo := Command("demo", "--dir", stack_directory, "--steps", "2000", "--episodes", "4"))

    assert demo.wait() == 1, demo.text
    assert re.search(r"policy version \d+: mean return \d+", demo.text)
    assert "was NOT reached" in demo.text


def test_the_example_application_learns_online(stack: Path) -> None:
    """Its own loop feeds the learner, and newer policies act in it; all of it is accounted for."""
    example = ROOT / "examples/cartpole_application.py"
    command = (sys.executable, example, stack / "client_config.json", "150")

    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=150)

    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 150
    assert int(lines[-1].rpartition(" ")[2]) > int(lines[0].rpartition(" ")[2])
    audit = json.loads(relayrl("audit", "cartpole-application", "--dir", stack, "--json").stdout)
    assert (audit["missing"], audit["stored_twice"], audit["used_twice"], audit["in_spool"]) == (0, 0, 0, 0)
    assert audit["stored"] >= 150


def test_a_stack_serves_training_and_survives_a_killed_service(stack: Path) -> None:
    """`status` shows the restart, and `train` ends as asked."""
    before = pids(stack)
    os.kill(before[0], signal.SIGKILL)
    deadline = time.monotonic() + 60
    while (shown := relayrl("status", "--dir", stack, "--json")).returncode != 0:
        assert time.monotonic() < deadline, shown.stdout
    restarted = json.loads(shown.stdout)["processes"]["model-registry"]

    trained = relayrl("train", "--preset", "cartpole-ppo", "--run", "kill", "--steps", "1500", "--dir", stack)

    assert restarted["restarts"] == 1
    assert restarted["pid"] != before[0]
    assert trained.returncode == 1, trained.stdout + trained.stderr
    assert re.search(r"run kill: 1,5\d\d steps", trained.stdout)
    assert relayrl("audit", "kill", "--dir", stack).returncode == 0


def test_training_in_one_process_leaves_the_same_kind_of_record(tmp_path: Path) -> None:
    """`--in-process` writes the store, the registry and the checkpoints where a stack would."""
    trained = relayrl(
        "train",
        "--preset",
        "cartpole-ppo",
        "--in-process",
        "--run",
        "r",
        "--steps",
        "1500",
        "--dir",
        tmp_path,
    )

    assert "run r: 1,5" in trained.stdout, trained.stdout + trained.stderr
    audit = relayrl("audit", "r", "--dir", tmp_path, "--json")
    assert audit.returncode == 0
    assert msgspec.json.decode(audit.stdout)["used"] > 0
    assert (tmp_path / "registry/registry.sqlite").is_file()
    assert list(tmp_path.glob("training-server/runs/*/checkpoints/*"))


def test_a_run_with_other_settings_is_refused_by_name(stack: Path) -> None:
    """The second client is told what differs, and nothing is recorded."""
    arguments = ("--preset", "cartpole-ppo", "--run", "r", "--steps", "300", "--dir", stack)
    relayrl("train", *arguments)

    refused = relayrl("train", *arguments, "--set", "gamma=0.5")

    assert refused.returncode == 2
    assert "gamma" in refused.stderr


def test_an_unknown_environment_is_refused(tmp_path: Path) -> None:
    """Before anything starts."""
    refused = relayrl(
        "train", "--env", "CartPole-v99", "--algorithm", "PPO", "--in-process", "--dir", tmp_path
    )

    assert refused.returncode == 2
    assert "CartPole" in refused.stderr


def test_demo_learns_cartpole(commands: list[Command], stack_directory: Path) -> None:
    """The promise of the README: 475 within 150,000 steps, then a greedy test; status 0."""
    commands.append(demo := Command("demo", "--dir", stack_directory))

    assert demo.wait(230) == 0, demo.text
    assert "was reached" in demo.text
    found = re.search(r"policy version \d+: mean return ([\d.]+)", demo.text)
    assert found
    assert float(found[1]) >= 400


def test_a_killed_up_takes_its_services_with_it(commands: list[Command], stack_directory: Path) -> None:
    """SIGKILL of the command leaves nothing running, so that the next one starts in the same place."""
    commands.append(up := Command("up", "--dir", stack_directory, "--auto-ports"))
    up.expect("all services are ready")
    running = pids(stack_directory)

    up.kill()

    deadline = time.monotonic() + 40
    while any(is_alive(pid) for pid in running):
        assert time.monotonic() < deadline, "services outlived the command"
        threading.Event().wait(0.05)
    commands.append(again := Command("up", "--dir", stack_directory, "--auto-ports"))
    again.expect("all services are ready")


@pytest.mark.postgres
def test_up_with_postgres_keeps_everything_there(
    commands: list[Command], stack_directory: Path, packaged_postgres: PostgresServer
) -> None:
    """Registry and trajectories share the database; a run trains a few updates."""
    url = packaged_postgres.create_database()
    commands.append(up := Command("up", "--dir", stack_directory, "--auto-ports", "--store", url))
    up.expect("all services are ready")

    trained = relayrl("train", "--preset", "cartpole-ppo", "--steps", "3000", "--dir", stack_directory)

    assert re.search(r"policy version (\d\d|[3-9])$", trained.stdout, re.MULTILINE), (
        trained.stdout + trained.stderr
    )
    assert not (stack_directory / "registry/registry.sqlite").exists()
