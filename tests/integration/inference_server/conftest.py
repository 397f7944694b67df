"""A whole registry and a whole inference server in this process, over real sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from relayrl_inference_server.service import InferenceService
from relayrl_inference_server.settings import InferenceServerSettings
from relayrl_model_registry.service import ModelRegistry
from relayrl_model_registry.settings import ModelRegistrySettings
from relayrl_shared import frames
from relayrl_shared.messages import Actions, RequestActions
from relayrl_shared.policy.engine import load_policy
from relayrl_shared.policy.manifest import PolicyArtefact
from relayrl_shared.registry_client import RegistryClient
from relayrl_shared.settings import Address, HttpSettings
from relayrl_shared.sockets import Peer
from relayrl_shared.spaces import ActionSpec, LeafSpec, ObservationSpec
from relayrl_shared.testing.policies import make_artefact, random_inputs

ANY = Address(port=0)
OBSERVATION = ObservationSpec(leaves=(LeafSpec(name="observation", kind="box", shape=(4,), dtype="float32"),))
ACTION = ActionSpec(
    leaves=(LeafSpec(name="action", kind="discrete", shape=(), dtype="int64", nvec=(3,), start=(0,)),)
)
Arrays = dict[str, NDArray[Any]]


def artefact(update: int, *, policy: str = "cartpole") -> PolicyArtefact:
    """The version of an update: one graph, weights of their own, a masked action."""
    return make_artefact(
        OBSERVATION,
        ACTION,
        policy=policy,
        policy_version=None,
        learner_update=update,
        seed=update,
        masked_leaves=("action",),
    )


def inputs(rows: int, seed: int = 0) -> Arrays:
    """Valid inputs of the policy."""
    return random_inputs(artefact(0).manifest, rows, seed)


@dataclass
class Asker:
    """A client of an inference server."""

    peer: Peer

    def ask(self, arrays: Arrays, policy: str = "cartpole", **options: Any) -> tuple[Actions, Arrays]:
        """The reply and its leaves."""
        headers, packed = frames.pack_leaves(arrays)
        rows = len(next(iter(arrays.values())))
        request = RequestActions(policy=policy, rows=rows, leaves=headers, **options)
        message, payload = self.peer.request(request, (packed,), timeout_seconds=20.0)
        assert isinstance(message, Actions)
        return message, frames.unpack_leaves(message.leaves, payload[0])


def assert_acted(arrays: Arrays, outputs: Arrays, update: int) -> None:
    """The outputs are those of the version that this update made, computed here."""
    expected = load_policy(artefact(update)).run(arrays)
    for name, array in outputs.items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-4, err_msg=name)


@contextmanager
def running(service: ModelRegistry | InferenceService) -> Iterator[threading.Event]:
    """Runs a service in a thread until the block ends; yields its stop event."""
    stop = threading.Event()
    thread = threading.Thread(target=service.run, args=(stop,))
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        service.router.wake()
        thread.join()
        service.close()


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[ModelRegistry]:
    """A running registry that ends with the test, or earlier by `registry_stop`."""
    service = ModelRegistry(
        ModelRegistrySettings(
            model_server=ANY, model_announcer=ANY, http=HttpSettings(port=0), directory=str(tmp_path)
        )
    )
    with running(service):
        yield service


@pytest.fixture
def registry_client(registry: ModelRegistry) -> Iterator[RegistryClient]:
    """A publisher."""
    client = RegistryClient(f"tcp://127.0.0.1:{registry.router.port}")
    yield client
    client.close()


OpenServer = Callable[..., InferenceService]


@pytest.fixture
def open_server(registry: ModelRegistry) -> Iterator[OpenServer]:
    """Opens inference servers of the registry, with settings of the test."""
    with ExitStack() as stack:

        def open_one(**settings: Any) -> InferenceService:
            defaults: dict[str, Any] = {
                "inference_server": ANY,
                "http": HttpSettings(port=0),
                "model_server": Address(port=registry.router.port),
                "model_announcer": Address(port=registry.announcer_port),
                "poll_seconds": 0.2,
                "registry_timeout_seconds": 1.0,
                "drain_seconds": 0.0,
            }
            service = InferenceService(InferenceServerSettings(**(defaults | settings)))
            stack.enter_context(running(service))
            return service

        yield open_one


@pytest.fixture
def server(open_server: OpenServer, registry_client: RegistryClient) -> InferenceService:
    """A running server whose registry has version 1 of `cartpole`."""
    registry_client.publish(artefact(0), fencing_token=1)
    return open_server()


@pytest.fixture
def asker(server: InferenceService) -> Iterator[Asker]:
    """A client of the running server."""
    with Peer(f"tcp://127.0.0.1:{server.router.port}") as peer:
        yield Asker(peer)
