"""An ingest process killed under load and started again: nothing lost, nothing twice."""

from __future__ import annotations

import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from relayrl_shared.errors import RelayRLError
from relayrl_shared.messages import Ack, AnyMessage, Nack
from relayrl_shared.store.open import open_store
from relayrl_shared.testing.registry import ServiceProcess, free_ports

KILLS = 3
ACKS_BETWEEN_KILLS = 40
IN_FLIGHT = 32


class Ledger:
    """What the test has sent and seen acknowledged; a sender of a bounded window that resends."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.sent: dict[int, str] = {}
        self.acknowledged: set[int] = set()
        self.changed = threading.Condition()
        self._stop = threading.Event()
        self._window = threading.Semaphore(IN_FLIGHT)
        self._thread = threading.Thread(target=self._send_all)
        self._thread.start()

    def _send_all(self) -> None:
        sequence = 0
        while not self._stop.is_set():
            self._window.acquire()
            sequence += 1
            message, payload = self.client.make(sequence)
            self.sent[sequence] = message.trajectory.trajectory_id
            self._send(sequence, message, payload)

    def _send(self, sequence: int, message: Any, payload: list[bytes]) -> None:
        def on_reply(reply: AnyMessage | None, _payload: object, error: RelayRLError | None) -> None:
            if isinstance(reply, Ack):
                with self.changed:
                    self.acknowledged.add(sequence)
                    self.changed.notify_all()
                self._window.release()
                return
            assert error is not None or (isinstance(reply, Nack) and reply.retryable), reply
            threading.Timer(0.05, self._send, (sequence, message, payload)).start()

        self.client.trajectories.submit(message, payload, timeout_seconds=2.0, on_reply=on_reply)

    def wait_for(self, acknowledged: int) -> None:
        """Waits until so many are acknowledged."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.acknowledged) >= acknowledged, timeout=60)

    def finish(self) -> None:
        """Stops making new ones and waits until all are acknowledged."""
        self._stop.set()
        self._thread.join(60)
        self.wait_for(len(self.sent))


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_kills_under_load_lose_nothing_and_store_nothing_twice(tmp_path: Path, wire_client: Any) -> None:
    """Every trajectory that was sent is stored once, whatever SIGKILL interrupted; ready again within 5 s."""
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")  # noqa: T201  # to repeat the moments of the kills
    chance = random.Random(seed)
    listener_port, trajectory_port, http_port = free_ports(3)
    addresses = "transport_config.zmq_addresses.training_addresses"
    settings = {
        "training_server_config.directory": tmp_path / "server",
        "training_server_config.ingest.http.port": http_port,
        f"{addresses}.agent_listener_address.port": listener_port,
        f"{addresses}.trajectory_server_address.port": trajectory_port,
    }
    arguments = ["ingest"] + [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    service = ServiceProcess("relayrl_training_server", arguments, http_port, tmp_path / "ingest.log")
    with service:
        client = wire_client(listener_port, trajectory_port)
        client.hello()
        client.put_schema()
        ledger = Ledger(client)
        for kill in range(1, KILLS + 1):
            ledger.wait_for(kill * ACKS_BETWEEN_KILLS)
            time.sleep(chance.uniform(0, 0.05))  # a random moment is the point
            service.kill()
            started = time.monotonic()
            service.start()
            service.wait_ready()
            print(f"ready after {time.monotonic() - started:.2f} s")  # noqa: T201  # a figure, not a check
        ledger.finish()
        assert service.terminate() == 0

    store = open_store(f"sqlite:///{tmp_path / 'server'}")
    try:
        stored = list(store.trajectory_ids(client.run_id))
        audit = store.audit(client.run_id)
    finally:
        store.close()
    assert sorted(stored) == sorted(ledger.sent.values())
    assert len(set(stored)) == len(stored)
    assert (audit.stored, audit.stored_twice, audit.quarantined) == (len(ledger.sent), 0, 0)
