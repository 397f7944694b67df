"""A real inference server process: its command line, its HTTP, its policies, and SIGKILL under load."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import httpx
import pytest

from relayrl_inference_server.service import InferenceService
from relayrl_shared import frames
from relayrl_shared.errors import Overloaded, RelayRLError, TransportError
from relayrl_shared.messages import RequestActions
from relayrl_shared.registry_client import RegistryClient
from relayrl_shared.sockets import Peer

from .conftest import Asker, OpenServer, artefact, assert_acted, inputs
from .test_hot_swap import Processes

pytestmark = pytest.mark.timeout(110)


def test_help_answers_without_the_heavy_imports() -> None:
    """--help parses before it imports."""
    code = (
        "import sys; from relayrl_inference_server import main\n"
        "try: main.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'onnxruntime', 'numpy', 'fastapi', 'torch', 'pyarrow', 'zmq'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)

    assert "--config" in done.stdout


def test_bad_settings_end_it_with_the_reason() -> None:
    """Status 2 and the nearest valid key."""
    command = [sys.executable, "-m", "relayrl_inference_server", "--set=batching.max_batch_row=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert done.returncode == 2
    assert "batching.max_batch_rows" in done.stderr


def test_address_in_use_ends_it_with_the_reason(server: InferenceService) -> None:
    """Another process on the port is a start-up error, not a silent second server."""
    command = [sys.executable, "-m", "relayrl_inference_server", "--set=http.port=0"]
    command.append(f"--set=inference_server.port={server.router.port}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert done.returncode == 2
    assert str(server.router.port) in done.stderr


def test_http_shows_what_is_loaded_and_served(asker: Asker, server: InferenceService) -> None:
    """Policies with their versions, metrics of the requests, info and readiness."""
    for rows in (1, 3):
        asker.ask(inputs(rows))
    with httpx.Client(base_url=server.http.url) as http:
        (policy,) = http.get("/v1/policies").json()["policies"]
        metrics = http.get("/metrics").text
        info = http.get("/v1/info").json()
        ready = http.get("/readyz")

    assert (policy["policy"], policy["alias"], policy["policy_version"]) == ("cartpole", "latest", 1)
    assert "relayrl_inference_server_rows_total 4.0" in metrics
    assert 'relayrl_inference_server_batch_rows_bucket{le="2"} 1.0' in metrics
    assert info["inference_server_port"] == server.router.port
    assert ready.status_code == 200


def test_policies_at_one_time_are_bounded(open_server: OpenServer, registry_client: RegistryClient) -> None:
    """One policy too many is Overloaded, and those that are loaded go on."""
    from relayrl_inference_server.settings import LimitSettings

    for name in ("a", "b"):
        registry_client.publish(artefact(0, policy=name), fencing_token=1)
    server = open_server(limits=LimitSettings(max_policies=1))
    with Peer(f"tcp://127.0.0.1:{server.router.port}") as peer:
        Asker(peer).ask(inputs(1), policy="a")
        with pytest.raises(Overloaded, match="max_policies"):
            Asker(peer).ask(inputs(1), policy="b")
        Asker(peer).ask(inputs(1), policy="a")


def test_pinned_versions_that_are_kept_are_bounded(
    open_server: OpenServer, registry_client: RegistryClient
) -> None:
    """The least recently asked version makes room, and is loaded again when it is asked for."""
    from relayrl_inference_server.settings import LimitSettings

    for update in range(5):
        registry_client.publish(artefact(update), fencing_token=1)
    server = open_server(limits=LimitSettings(max_pinned_versions=2))
    with Peer(f"tcp://127.0.0.1:{server.router.port}") as peer:
        for version in (1, 2, 3, 4, 1):
            message, outputs = Asker(peer).ask(inputs(4), policy_version=version)
            assert message.policy_version == version
            assert_acted(inputs(4), outputs, version - 1)

    assert sum(status.alias is None for status in server.pool.status()) == 2


class Load:
    """Keeps requests open on one connection; every answer or error is counted."""

    def __init__(self, peer: Peer, window: int) -> None:
        self._peer = peer
        self._headers, self._packed = frames.pack_leaves(inputs(2))
        self._lock = threading.Lock()
        self._open = 0
        self.submitted = 0
        self.answered = 0
        self.errors: Counter[str] = Counter()
        self.stopping = False
        self.enough = threading.Event()
        self.idle = threading.Event()
        for _ in range(window):
            self._submit()

    def _submit(self) -> None:
        with self._lock:
            self._open += 1
            self.submitted += 1
        request = RequestActions(policy="cartpole", rows=2, leaves=self._headers)
        self._peer.submit(request, (self._packed,), timeout_seconds=5.0, on_reply=self._on_reply)

    def _on_reply(self, message: object, payload: list[memoryview], error: RelayRLError | None, /) -> None:
        with self._lock:
            self._open -= 1
            self.answered += message is not None
            if error is not None:
                self.errors[type(error).__name__ if isinstance(error, TransportError) else repr(error)] += 1
            if self.answered >= 200:
                self.enough.set()
            if self._open == 0:
                self.idle.set()
            go_on = not self.stopping and error is None
        if go_on:
            self._submit()


@pytest.mark.slow
def test_sigkill_under_load_leaves_no_request_unanswered(tmp_path: Path) -> None:
    """Every open request ends with a typed error by its deadline, and a restart serves again."""
    both = Processes(tmp_path)
    with both.registry:
        client = RegistryClient(both.registry_address)
        client.publish(artefact(0), fencing_token=1)
        client.close()
        with both.inference, Peer(both.inference_address) as peer:
            load = Load(peer, 32)
            assert load.enough.wait(30)
            both.inference.kill()
            load.stopping = True
            assert load.idle.wait(20)

            assert load.answered + sum(load.errors.values()) == load.submitted
            assert set(load.errors) <= {"PeerLost", "PeerTimeout"}
            both.inference.start()
            both.inference.wait_ready()
            assert_acted(inputs(2), Asker(peer).ask(inputs(2))[1], 0)
