"""Waits for what a process needs at its start; ingest and learner open their stores through it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from relayrl_shared import logs
from relayrl_shared.errors import StoreUnavailable

AVAILABLE_POLL_SECONDS = 0.5

T = TypeVar("T")

LOG = logs.get_logger(__name__)


def when_available(make: Callable[[], T], stop: threading.Event) -> T | None:
    """What `make` makes, as soon as the database that it needs is there; None if `stop` came first."""
    told = False
    while not stop.is_set():
        try:
            return make()
        except StoreUnavailable as error:
            if not told:
                LOG.warning("the store is not available yet; waiting for it", reason=str(error))
            told = True
            stop.wait(AVAILABLE_POLL_SECONDS)
    return None
