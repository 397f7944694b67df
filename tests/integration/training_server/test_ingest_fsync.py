"""The kernel's own order of things in ingest: a commit is on disk before its acknowledgement leaves."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from relayrl_shared.messages import Ack
from relayrl_shared.testing.registry import free_ports

TRAJECTORIES = 5
READY_SECONDS = 60


def traced_ingest(directory: Path, ports: list[int], trace: Path) -> subprocess.Popen[bytes]:
    """An ingest process under strace, both in a process group of their own."""
    addresses = "transport_config.zmq_addresses.training_addresses"
    settings = {
        "training_server_config.directory": directory,
        "training_server_config.ingest.http.port": ports[2],
        f"{addresses}.agent_listener_address.port": ports[0],
        f"{addresses}.trajectory_server_address.port": ports[1],
    }
    options = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    calls = "trace=fsync,fdatasync,sendto,recvfrom"
    strace = ["strace", "-f", "-y", "-s", "256", "-e", calls, "-o", str(trace)]
    command = [*strace, sys.executable, "-m", "relayrl_training_server", "ingest", *options]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, process_group=0)


def wait_ready(process: subprocess.Popen[bytes], port: int) -> None:
    """Returns when /readyz answers 200; skips where the kernel forbids tracing."""
    transport = httpx.HTTPTransport(retries=0)
    with httpx.Client(transport=transport, timeout=1.0) as client:
        for _ in range(READY_SECONDS * 10):
            if process.poll() is not None:
                pytest.skip(f"STRACE DID NOT RUN, the fsync is not shown: {process.communicate()[1]!r}")
            try:
                if client.get(f"http://127.0.0.1:{port}/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            try:
                process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
    raise AssertionError("ingest is not ready")


def words(lines: list[str]) -> list[str]:
    """The calls that matter, in order: a trajectory came, the database was synced, an ack left."""
    patterns = {
        r"recvfrom\(.*put_trajectory": "trajectory",
        r"(recvfrom resumed).*put_trajectory": "trajectory",
        r"fdatasync\(\d+<[^>]*trajectories\.sqlite(-wal)?>\) += 0": "synced",
        r"fsync\(\d+<[^>]*trajectories\.sqlite(-wal)?>\) += 0": "synced",
        r"f(data)?sync resumed.*= 0": "synced",
        r"sendto\(.*kind\\?\W*\w*\\?\W*ack\b": "acknowledged",
    }
    return [name for line in lines for pattern, name in patterns.items() if re.search(pattern, line)]


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.skipif(shutil.which("strace") is None, reason="NO STRACE: the fsync before an ack is not shown")
def test_an_acknowledgement_leaves_after_the_fsync(tmp_path: Path, wire_client: Any) -> None:
    """Between the arrival of each trajectory and its acknowledgement lies a sync of the store's file."""
    ports, trace = free_ports(3), tmp_path / "trace"
    process = traced_ingest(tmp_path / "server", ports, trace)
    try:
        wait_ready(process, ports[2])
        client = wire_client(ports[0], ports[1])
        client.hello()
        client.put_schema()
        for sequence in range(1, TRAJECTORIES + 1):
            message, payload = client.make(sequence)
            answer, _ = client.trajectories.request(message, payload, timeout_seconds=20.0)
            assert isinstance(answer, Ack)
    finally:
        os.killpg(process.pid, signal.SIGTERM)  # strace alone would leave the traced process
        process.communicate(timeout=60)

    seen = words(trace.read_text(errors="replace").splitlines())
    acknowledged = [index for index, word in enumerate(seen) if word == "acknowledged"]
    assert len(acknowledged) == TRAJECTORIES
    for index in acknowledged:
        arrival = max(i for i in range(index) if seen[i] == "trajectory")
        assert "synced" in seen[arrival:index], seen
