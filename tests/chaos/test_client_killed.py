"""SIGKILL of a client in the middle of a training: what its spool had is stored by the next start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relayrl_shared.store.open import open_store

RUN = "client-killed"
WHILE_AWAY = 10

CLIENT = """
import os, sys, threading
from pathlib import Path
from relayrl_cli import presets
from relayrl_cli.addresses import read_stack_file
from relayrl_cli.agents import build_training_agent
from relayrl_cli.plan import plan_from_preset
from relayrl_cli.run_view import RunView
from relayrl_cli.table import open_view
from relayrl_cli.train import TrainingSession

directory, steps = Path(sys.argv[1]), int(sys.argv[3])
ledger = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def note(trajectory_ids):
    os.write(ledger, "".join(f"{name}\\n" for name in trajectory_ids).encode())
    os.fsync(ledger)

plan = plan_from_preset(presets.load("cartpole-ppo"), "client-killed", steps=steps)
agent = build_training_agent(plan, read_stack_file(directory).addresses, directory, on_accepted=note)
outcome = TrainingSession(plan, agent, RunView(lambda: None)).run(threading.Event(), open_view(sys.stderr))
sys.exit(0 if outcome.undelivered == 0 else 4)
"""

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(240)]


def start_client(stack: Any, ledger: Any, steps: int) -> subprocess.Popen[bytes]:
    """A client in a process of its own that notes what its spool accepted."""
    command = [sys.executable, "-c", CLIENT, str(stack.directory), str(ledger.path), str(steps)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for_ids(ledger: Any, count: int, client: subprocess.Popen[bytes]) -> None:
    """Returns once so many trajectories are accepted."""
    deadline = time.monotonic() + 90
    while len(ledger.ids()) < count:
        assert client.poll() is None, client.communicate()[1].decode()
        assert time.monotonic() < deadline, f"{len(ledger.ids())} accepted of {count}"
        time.sleep(0.02)


def stored_ids(url: str) -> list[str]:
    """Every trajectory id in the store."""
    store = open_store(url)
    try:
        record = store.run_by_name(RUN)
        assert record is not None
        return list(store.trajectory_ids(record.run_id))
    finally:
        store.close()


def spooled_bytes(directory: Path) -> int:
    """What lies in the spools."""
    return sum(file.stat().st_size for file in (directory / "client" / "spool").rglob("*") if file.is_file())


def test_the_next_start_delivers_what_a_killed_client_had_spooled(
    start_stack: Callable[..., Any], ledger: Any, relayrl: Callable[..., Any]
) -> None:
    """Ingest is held still, so that the spool fills; the client dies; its successor sends all of it."""
    stack = start_stack()
    client = start_client(stack, ledger, steps=1_000_000)
    wait_for_ids(ledger, 50, client)
    ingest = stack.pid("ingest")
    os.kill(ingest, signal.SIGSTOP)
    try:
        wait_for_ids(ledger, len(ledger.ids()) + WHILE_AWAY, client)
        client.kill()
        client.communicate()
        accepted = ledger.ids()
        undelivered = accepted - set(stored_ids(stack.file.store))
    finally:
        os.kill(ingest, signal.SIGCONT)
    assert len(undelivered) >= WHILE_AWAY - 1
    assert spooled_bytes(stack.directory) > 0

    successor = start_client(stack, ledger, steps=2_000)
    _, errors = successor.communicate(timeout=120)

    assert successor.returncode == 0, errors.decode()
    stored = stored_ids(stack.file.store)
    assert len(stored) == len(set(stored))
    assert ledger.ids() - set(stored) == set()
    audit = relayrl("audit", RUN, "--dir", stack.directory)
    assert audit.returncode == 0, audit.stdout + audit.stderr
