"""Versions that come, go and cannot be loaded, while clients ask without pause."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import pytest

from relayrl_inference_server.service import InferenceService
from relayrl_model_registry.service import ModelRegistry
from relayrl_shared.errors import ArtefactError, DigestMismatch, PeerTimeout
from relayrl_shared.policy.engine import LoadedPolicy, load_policy
from relayrl_shared.registry_client import RegistryClient
from relayrl_shared.sockets import Peer
from relayrl_shared.testing.policies import seal
from relayrl_shared.testing.registry import ServiceProcess, free_ports

from .conftest import Arrays, Asker, OpenServer, artefact, assert_acted, inputs

pytestmark = pytest.mark.timeout(110)

SWAPS = 200
CLIENTS = 8


def wait_for_version(asker: Asker, version: int, timeout_seconds: float = 20.0) -> None:
    """Asks until the version acts."""
    deadline = time.monotonic() + timeout_seconds
    while asker.ask(inputs(1))[0].policy_version != version:
        assert time.monotonic() < deadline, f"version {version} is not in use after {timeout_seconds} s"


def test_new_version_is_in_use_soon(asker: Asker, registry_client: RegistryClient) -> None:
    """Announced or polled, the next version acts without a restart."""
    asker.ask(inputs(1))
    registry_client.publish(artefact(1), fencing_token=1)
    wait_for_version(asker, 2)

    assert_acted(inputs(5), asker.ask(inputs(5))[1], 1)


class Client(threading.Thread):
    """Asks in a closed loop until told to stop, and keeps what it got."""

    def __init__(self, port: int, seed: int, stop: threading.Event) -> None:
        super().__init__()
        self._peer = Peer(f"tcp://127.0.0.1:{port}")
        self._stop_asking = stop
        self.arrays: Arrays = inputs(1 + seed % 3, seed)
        self.replies: list[tuple[int, int, Arrays]] = []
        self.failures: list[Exception] = []

    def run(self) -> None:
        """Asks."""
        asker = Asker(self._peer)
        while not self._stop_asking.is_set():
            try:
                message, outputs = asker.ask(self.arrays)
            except Exception as error:  # noqa: BLE001  # asserted to be none
                self.failures.append(error)
            else:
                self.replies.append((message.policy_version, message.learner_update, outputs))
        self._peer.close()


@cache
def loaded(version: int) -> LoadedPolicy:
    """The version as it is here."""
    return load_policy(artefact(version - 1))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_request_fails_while_versions_are_swapped(
    server: InferenceService, asker: Asker, registry_client: RegistryClient
) -> None:
    """8 clients during 200 publications: 0 failures, no version goes back, each reply is its version's."""
    asker.ask(inputs(1))
    stop = threading.Event()
    clients = [Client(server.router.port, seed, stop) for seed in range(CLIENTS)]
    for client in clients:
        client.start()
    for update in range(1, SWAPS + 1):
        number = registry_client.publish(artefact(update), fencing_token=1)
        if update % 10 == 0:
            wait_for_version(asker, number)
    wait_for_version(asker, SWAPS + 1)
    stop.set()
    for client in clients:
        client.join(30)

    seen: set[int] = set()
    for client in clients:
        assert client.failures == []
        order = [version for version, _, _ in client.replies]
        assert order == sorted(order)
        seen.update(order)
        expected = {v: loaded(v).run(client.arrays) for v in set(order)}
        for version, update, outputs in client.replies:
            assert update == version - 1
            for name, array in outputs.items():
                np.testing.assert_allclose(array, expected[version][name], rtol=1e-4, atol=1e-4)
    assert len(seen) > 20
    assert max(seen) == SWAPS + 1
    errors = dict(server.server.counters().errors)
    assert errors == {}


@pytest.mark.parametrize("kind", ["weights", "golden", "graph"])
def test_version_that_cannot_be_loaded_is_refused_and_the_old_one_serves(
    server: InferenceService, asker: Asker, registry_client: RegistryClient, kind: str
) -> None:
    """Weights of noise, another version's golden vectors, a graph that is none: counted, not served."""
    asker.ask(inputs(1))
    good = artefact(1)
    bad = {
        "weights": msgspec.structs.replace(good, weights=b"noise" * 100),
        "golden": msgspec.structs.replace(good, golden=artefact(2).golden),
        "graph": msgspec.structs.replace(good, graph=b"\x08\x07not onnx"),
    }[kind]
    number = registry_client.publish(seal(bad), fencing_token=1)
    deadline = time.monotonic() + 20
    while server.pool.status()[0].refused_total == 0:
        assert asker.ask(inputs(1))[0].policy_version == 1
        assert time.monotonic() < deadline

    (status,) = server.pool.status()
    assert (status.policy_version, status.refused_total) == (1, 1)
    assert status.last_error
    assert_acted(inputs(3), asker.ask(inputs(3))[1], 0)
    with pytest.raises((ArtefactError, DigestMismatch)):
        asker.ask(inputs(1), policy_version=number)
    registry_client.publish(artefact(3), fencing_token=1)
    wait_for_version(asker, number + 1)


def test_alias_is_followed_forth_and_back(
    registry: ModelRegistry, asker: Asker, registry_client: RegistryClient
) -> None:
    """Production goes where the registry moves it, whatever latest does; a rollback arrives as well."""
    for update in (1, 2):
        registry_client.publish(artefact(update), fencing_token=1)
    registry.catalog.move_alias("cartpole", "production", 2, moved_by="ada", reason="first")
    assert asker.ask(inputs(1), alias="production")[0].policy_version == 2
    for version in (3, 1):
        registry.catalog.move_alias("cartpole", "production", version, moved_by="ada", reason="try")
        deadline = time.monotonic() + 20
        while asker.ask(inputs(1), alias="production")[0].policy_version != version:
            assert time.monotonic() < deadline
    assert asker.ask(inputs(1))[0].policy_version == 3


def test_policy_published_later_is_served_and_readiness_waits_for_it(
    open_server: OpenServer, registry_client: RegistryClient
) -> None:
    """A policy that is named in the settings is waited for by /readyz."""
    server = open_server(policies=("cartpole",))
    deadline = time.monotonic() + 20
    while server.readiness()["policy cartpole"] in (None, "not loaded yet"):
        assert time.monotonic() < deadline
    assert "cartpole" in str(server.readiness()["policy cartpole"])
    registry_client.publish(artefact(0), fencing_token=1)
    while server.readiness()["policy cartpole"] is not None:
        assert time.monotonic() < deadline

    with Peer(f"tcp://127.0.0.1:{server.router.port}") as peer:
        assert_acted(inputs(2), Asker(peer).ask(inputs(2))[1], 0)


class Processes:
    """A registry and an inference server as processes of their own."""

    def __init__(self, directory: Path) -> None:
        server, announcer, registry_http, inference, inference_http = free_ports(5)
        shared = [f"--set=model_server.port={server}", f"--set=model_announcer.port={announcer}"]
        self.registry = ServiceProcess(
            "relayrl_model_registry",
            [*shared, f"--set=http.port={registry_http}", f"--set=directory={directory / 'registry'}"],
            registry_http,
            directory / "registry.log",
        )
        self.inference = ServiceProcess(
            "relayrl_inference_server",
            [
                *shared,
                f"--set=http.port={inference_http}",
                f"--set=inference_server.port={inference}",
                "--set=poll_seconds=0.2",
                "--set=registry_timeout_seconds=1",
                "--set=drain_seconds=0.2",
                '--set=policies=["cartpole"]',
            ],
            inference_http,
            directory / "inference.log",
        )
        self.registry_address = f"tcp://127.0.0.1:{server}"
        self.inference_address = f"tcp://127.0.0.1:{inference}"


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    """Both running, with version 1 in use."""
    both = Processes(tmp_path)
    with both.registry:
        client = RegistryClient(both.registry_address)
        client.publish(artefact(0), fencing_token=1)
        client.close()
        with both.inference:
            yield both


@pytest.mark.slow
def test_registry_down_keeps_the_version_in_use_and_comes_back(processes: Processes) -> None:
    """With the registry killed every request is served; a new policy is a typed error; then swaps go on."""
    with Peer(processes.inference_address) as peer:
        asker = Asker(peer)
        asker.ask(inputs(1))
        processes.registry.kill()
        for seed in range(200):
            arrays = inputs(2, seed)
            message, outputs = asker.ask(arrays)
            assert message.policy_version == 1
        assert_acted(arrays, outputs, 0)
        with pytest.raises(PeerTimeout):
            asker.ask(inputs(1), policy="other")
        assert asker.ask(inputs(1))[0].policy_version == 1

        processes.registry.start()
        processes.registry.wait_ready()
        client = RegistryClient(processes.registry_address)
        client.publish(artefact(1), fencing_token=1)
        client.close()
        wait_for_version(asker, 2)


@pytest.mark.slow
def test_sigterm_drains_and_ends_with_status_0(processes: Processes) -> None:
    """What was taken is answered before the process ends."""
    with Peer(processes.inference_address) as peer:
        assert_acted(inputs(2), Asker(peer).ask(inputs(2))[1], 0)

    assert processes.inference.terminate() == 0
