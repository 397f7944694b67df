"""A whole registry: store, blobs, data plane, announcer, HTTP; driven by `main` and the one-process mode.

registry = ModelRegistry(settings)
registry.run(stop_event)     # serves from this thread until the event
registry.close()
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from relayrl_model_registry.announcer import AliasAnnouncer
from relayrl_model_registry.app import create_registry_app
from relayrl_model_registry.blobs import BlobStore
from relayrl_model_registry.collection import Collector
from relayrl_model_registry.dataplane import ModelServer
from relayrl_model_registry.settings import ModelRegistrySettings
from relayrl_model_registry.store.sql import open_store
from relayrl_model_registry.versions import Catalog
from relayrl_shared import lifecycle, logs, sockets
from relayrl_shared.errors import RelayRLError

LOG = logs.get_logger(__name__)


class ModelRegistry:
    """Everything is bound and answers HTTP when the constructor returns; `run` serves the data plane.

    Args:
        settings: of this registry.
        drain: asks the process to stop, for POST /v1/drain; None: that answers 404.

    Attributes:
        serving: whether `run` is running.
    """

    def __init__(self, settings: ModelRegistrySettings, drain: Callable[[], None] | None = None) -> None:
        self.serving = False
        with ExitStack() as stack:
            self._open(settings, stack)
            self.http = lifecycle.serve_http(create_registry_app(self, drain), settings.http)
            stack.callback(self.http.close)
            self._closing = stack.pop_all()

    def _open(self, settings: ModelRegistrySettings, stack: ExitStack) -> None:
        limits = settings.limits
        self._store = open_store(settings.effective_database_url)
        stack.callback(self._store.close)
        self.blobs = BlobStore(
            settings.effective_blob_directory,
            max_blob_bytes=limits.max_blob_bytes,
            max_uploads=limits.max_uploads,
            upload_timeout_seconds=limits.upload_timeout_seconds,
        )
        publisher = sockets.Announcer(settings.model_announcer.zmq)
        stack.callback(publisher.close)
        self.announcer_port = publisher.port
        self.announcer = AliasAnnouncer(publisher)
        self.catalog = Catalog(self._store, self.blobs, self.announcer.announce)
        self.router = sockets.RouterServer(
            settings.model_server.zmq,
            max_message_bytes=limits.max_message_bytes,
            max_queued=limits.max_queued,
        )
        stack.callback(self.router.close)
        self.model_server = ModelServer(self.catalog, self.blobs, self.router)
        self.collector = Collector(self.catalog, settings.collection)
        stack.callback(self.collector.close)

    def run(self, stop: threading.Event) -> None:
        """Serves publications and fetches from this thread until `stop`; what was taken is answered."""
        self.serving = True
        LOG.info(
            "serving",
            model_server_port=self.router.port,
            model_announcer_port=self.announcer_port,
            http_port=self.http.port,
        )
        try:
            self.router.run(self.model_server.handle, stop)
        finally:
            self.serving = False

    def readiness(self) -> Mapping[str, str | None]:
        """What a publication needs: the database and the data plane."""
        return {
            "database": self._database_problem(),
            "model_server": None if self.serving else "the data plane is not being served",
        }

    def _database_problem(self) -> str | None:
        try:
            self._store.ping()
        except RelayRLError as error:
            return str(error)
        return None

    def close(self) -> None:
        """Frees sockets, threads and connections, after `run` has returned."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
