"""Fixtures that every suite shares. Suites order: unit, contract, integration, e2e, chaos, packaging."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def root_logging() -> Iterator[None]:
    """Puts back the handlers and the level of the root logger, which `logs.configure` changes."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


@pytest.fixture
def free_port() -> Callable[[], int]:
    """A TCP port of 127.0.0.1 that nothing listens on now; bind port 0 instead wherever that is possible."""

    def find() -> int:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port: int = listener.getsockname()[1]
            return port

    return find


@pytest.fixture
def stack_directory(tmp_path: Path) -> Path:
    """An empty directory for all state of a stack."""
    directory = tmp_path / "stack"
    directory.mkdir()
    return directory


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """URL of an empty database on a real Postgres; skips loudly where none can be started."""
    testing = pytest.importorskip("relayrl_shared.testing.postgres", reason="no Postgres helper")
    with testing.temporary_postgres() as url:
        yield url
