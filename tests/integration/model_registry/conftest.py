"""A whole registry in this process, on free ports, over real sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from relayrl_model_registry.service import ModelRegistry
from relayrl_model_registry.settings import CollectionSettings, LimitSettings, ModelRegistrySettings
from relayrl_shared.registry_client import RegistryClient
from relayrl_shared.settings import Address, HttpSettings


@contextmanager
def served(registry: ModelRegistry) -> Iterator[ModelRegistry]:
    """Runs the data plane in a thread until the block ends."""
    stop = threading.Event()
    thread = threading.Thread(target=registry.run, args=(stop,))
    thread.start()
    try:
        yield registry
    finally:
        stop.set()
        registry.router.wake()
        thread.join()
        registry.close()


@pytest.fixture
def open_registry(tmp_path: Path) -> Iterator[Callable[[], ModelRegistry]]:
    """Opens a registry over the test's directory; a second call opens the same state."""
    with ExitStack() as stack:

        def open_one() -> ModelRegistry:
            settings = ModelRegistrySettings(
                model_server=Address(port=0),
                model_announcer=Address(port=0),
                http=HttpSettings(port=0),
                directory=str(tmp_path / "registry"),
                limits=LimitSettings(max_blob_bytes=8 << 20, max_message_bytes=2 << 20),
                collection=CollectionSettings(enabled=False),
            )
            return stack.enter_context(served(ModelRegistry(settings)))

        yield open_one


@pytest.fixture
def registry(open_registry: Callable[[], ModelRegistry]) -> ModelRegistry:
    """A running registry."""
    return open_registry()


@pytest.fixture
def client(registry: ModelRegistry) -> Iterator[RegistryClient]:
    """A client of the running registry."""
    client = RegistryClient(f"tcp://127.0.0.1:{registry.router.port}", timeout_seconds=10.0)
    yield client
    client.close()
