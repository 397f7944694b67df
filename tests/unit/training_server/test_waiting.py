"""Waiting for a store at the start of a process."""

from __future__ import annotations

import threading

import pytest

from relayrl_shared.errors import ConfigError, StoreUnavailable
from relayrl_training_server import waiting


def test_what_is_there_is_made_at_once() -> None:
    """No wait where nothing is missing."""
    assert waiting.when_available(lambda: "store", threading.Event()) == "store"


def test_an_unavailable_store_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as it takes."""
    monkeypatch.setattr(waiting, "AVAILABLE_POLL_SECONDS", 0.001)
    missing = iter([True, True, False])

    def make() -> str:
        if next(missing):
            raise StoreUnavailable("starting up")
        return "store"

    assert waiting.when_available(make, threading.Event()) == "store"


def test_a_stop_ends_the_waiting() -> None:
    """Then there is nothing to use."""
    stop = threading.Event()

    def make() -> str:
        stop.set()
        raise StoreUnavailable("never")

    assert waiting.when_available(make, stop) is None


def test_other_errors_are_not_waited_out() -> None:
    """A setting that is wrong stays wrong."""

    def make() -> str:
        raise ConfigError("no such store")

    with pytest.raises(ConfigError):
        waiting.when_available(make, threading.Event())
