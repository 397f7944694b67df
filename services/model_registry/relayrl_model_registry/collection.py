"""Gives up the files of old versions from time to time, in a thread of its own; driven by `service`."""

from __future__ import annotations

import threading

from relayrl_model_registry.settings import CollectionSettings
from relayrl_model_registry.versions import Catalog
from relayrl_shared import logs
from relayrl_shared.errors import RelayRLError

LOG = logs.get_logger(__name__)


class Collector:
    """Collects every `interval_seconds` until closed.

    Args:
        catalog: whose files.
        settings: what to keep.
    """

    def __init__(self, catalog: Catalog, settings: CollectionSettings) -> None:
        self._catalog = catalog
        self._settings = settings
        self._closing = threading.Event()
        self.versions_total = 0
        self.blobs_total = 0
        self.errors_total = 0
        self._thread = threading.Thread(target=self._run, name="collection", daemon=True)
        if settings.enabled:
            self._thread.start()

    def collect(self) -> None:
        """Collects once; an error is counted and logged, and the next time tries again."""
        settings = self._settings
        try:
            versions, blobs = self._catalog.collect(
                settings.keep_unaliased_versions,
                settings.minimum_age_seconds,
                settings.intent_timeout_seconds,
            )
        except (RelayRLError, OSError) as error:
            self.errors_total += 1
            LOG.warning("collection failed", error=str(error))
            return
        self.versions_total += versions
        self.blobs_total += blobs
        if versions or blobs:
            LOG.info("collected", versions=versions, blobs=blobs)

    def close(self) -> None:
        """Ends the thread."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._closing.wait(self._settings.interval_seconds):
            self.collect()
