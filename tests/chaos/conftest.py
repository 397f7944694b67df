"""What the chaos tests share: a stack started by `relayrl up`, its processes by name, and a ledger of ids."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from relayrl_cli.addresses import StackFile, read_stack_file

READY_SECONDS = 90.0


class RunningStack:
    """`relayrl up` in a process of its own, in a directory of its own.

    Args:
        directory: for all state.
        options: further arguments of `relayrl up`.
    """

    def __init__(self, directory: Path, *options: str) -> None:
        self.directory = directory
        self._log = (directory.parent / f"{directory.name}-up.log").open("ab")
        command = (
            sys.executable,
            "-m",
            "relayrl_cli",
            "up",
            "--dir",
            str(directory),
            "--auto-ports",
            *options,
        )
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, process_group=0)
        self.wait_ready()

    def wait_ready(self) -> None:
        """Returns when every process of the stack is ready."""
        deadline = time.monotonic() + READY_SECONDS
        while time.monotonic() < deadline:
            file = read_stack_file(self.directory)
            ready = file is not None and file.pid == self._process.pid and len(file.processes) == 3
            if ready and file is not None and all(e.state == "ready" for e in file.processes.values()):
                return
            assert self._process.poll() is None, self.output()
            time.sleep(0.05)
        raise AssertionError(f"the stack is not ready:\n{self.output()}")

    @property
    def file(self) -> StackFile:
        """stack.json as it is now."""
        file = read_stack_file(self.directory)
        assert file is not None
        return file

    def output(self) -> str:
        """What `relayrl up` has printed."""
        return Path(self._log.name).read_text(errors="replace")

    def pid(self, name: str) -> int | None:
        """The process called `supervise`, `ingest`, `learn`, `model-registry` or `inference-server` now."""
        if name in ("model-registry", "inference-server"):
            return self.file.processes[name].pid
        supervisor = self.file.processes["training-server"].pid
        if name == "supervise" or supervisor is None:
            return supervisor
        try:
            children = psutil.Process(supervisor).children()
            return next((child.pid for child in children if name in child.cmdline()), None)
        except psutil.NoSuchProcess:
            return None

    def kill(self, name: str) -> int:
        """SIGKILL, as soon as there is such a process; its pid."""
        deadline = time.monotonic() + READY_SECONDS
        while (pid := self.pid(name)) is None or not psutil.pid_exists(pid):
            assert time.monotonic() < deadline, f"no process {name}:\n{self.output()}"
            time.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
        return pid

    def stop(self) -> None:
        """Ctrl-C, and whatever that leaves by force."""
        children = psutil.Process(self._process.pid).children(recursive=True) if self.alive else []
        if self.alive:
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for child in children:
            if child.is_running():
                child.kill()
        self._log.close()

    @property
    def alive(self) -> bool:
        """Whether `relayrl up` runs."""
        return self._process.poll() is None


class Ledger:
    """Trajectory ids that the spool called accepted, each on disk before the call returns."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a+b", buffering=0)
        self._lock = threading.Lock()
        self.path = path

    def note(self, trajectory_ids: Sequence[str]) -> None:
        """Called by the spool after its fsync."""
        lines = "".join(f"{trajectory_id}\n" for trajectory_id in trajectory_ids)
        with self._lock:
            self._file.write(lines.encode())
            os.fsync(self._file.fileno())

    def ids(self) -> set[str]:
        """Everything noted so far, by any process; a torn last line was not accepted yet."""
        whole, _, _ = self.path.read_text().rpartition("\n")
        return set(whole.split())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


@pytest.fixture
def start_stack(tmp_path: Path) -> Iterator[Callable[..., RunningStack]]:
    """Starts stacks that end with the test."""
    stacks: list[RunningStack] = []

    def start(*options: str, name: str = "stack") -> RunningStack:
        stacks.append(RunningStack(tmp_path / name, *options))
        return stacks[-1]

    yield start
    for stack in stacks:
        stack.stop()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A ledger of accepted ids."""
    book = Ledger(tmp_path / "ledger.txt")
    yield book
    book.close()


@pytest.fixture
def relayrl() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a `relayrl` command to its end."""

    def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
        command = (sys.executable, "-m", "relayrl_cli", *map(str, arguments))
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=150)

    return run
