"""A whole inference server: socket, policies, HTTP; driven by `main` and the one-process mode.

service = InferenceService(settings)
service.run(stop_event)     # serves from this thread until the event, then drains
service.close()
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from relayrl_inference_server.app import create_inference_app
from relayrl_inference_server.batcher import BatchLimits
from relayrl_inference_server.policies import PolicyPool
from relayrl_inference_server.server import InferenceServer
from relayrl_inference_server.settings import InferenceServerSettings
from relayrl_shared import lifecycle, logs, sockets
from relayrl_shared.registry_client import RegistryClient

LOG = logs.get_logger(__name__)


class InferenceService:
    """Everything is bound and answers HTTP when the constructor returns; `run` serves requests.

    Args:
        settings: of this server.
        drain: asks the process to stop, for POST /v1/drain; None: that answers 404.

    Attributes:
        serving: whether `run` is running.
    """

    def __init__(self, settings: InferenceServerSettings, drain: Callable[[], None] | None = None) -> None:
        self.serving = False
        self._settings = settings
        with ExitStack() as stack:
            self._open(settings, stack)
            self.http = lifecycle.serve_http(create_inference_app(self, drain), settings.http)
            stack.callback(self.http.close)
            self._closing = stack.pop_all()

    def _open(self, settings: InferenceServerSettings, stack: ExitStack) -> None:
        limits, batching = settings.limits, settings.batching
        self.router = sockets.RouterServer(
            settings.inference_server.zmq,
            max_message_bytes=limits.max_message_bytes,
            max_batch=2 * limits.max_queued_requests,
        )
        stack.callback(self.router.close)
        batch_limits = BatchLimits(
            max_batch_rows=batching.max_batch_rows,
            max_delay_seconds=batching.max_delay_ms / 1000,
            max_queued_requests=limits.max_queued_requests,
            max_queued_rows=limits.max_queued_rows,
        )
        self.server = InferenceServer(self.router, batch_limits, limits)
        client = RegistryClient(settings.model_server.zmq, timeout_seconds=settings.registry_timeout_seconds)
        stack.callback(client.close)
        self.pool = PolicyPool(
            client,
            settings.model_announcer.zmq,
            poll_seconds=settings.poll_seconds,
            max_policies=limits.max_policies,
            max_pinned_versions=limits.max_pinned_versions,
            max_batch_rows=batching.max_batch_rows,
            on_loaded=self.server.on_loaded,
        )
        stack.callback(self.pool.close)
        self.server.use(self.pool)
        for policy in settings.policies:
            self.pool.follow(policy)

    def run(self, stop: threading.Event) -> None:
        """Serves from this thread until `stop`, then refuses new requests for `drain_seconds` and returns."""
        end = threading.Event()
        drain = threading.Thread(target=self._drain, args=(stop, end), name="drain", daemon=True)
        drain.start()
        self.serving = True
        LOG.info("serving", inference_server_port=self.router.port, http_port=self.http.port)
        try:
            self.router.run(self.server.handle, end)
        finally:
            self.serving = False

    def _drain(self, stop: threading.Event, end: threading.Event) -> None:
        stop.wait()
        self.server.draining = True
        LOG.info("draining", seconds=self._settings.drain_seconds)
        end.wait(self._settings.drain_seconds)
        self.pool.close()  # its loaders answer what is parked with them, while the socket still sends
        self.server.refuse_parked()
        end.set()
        self.router.wake()

    def readiness(self) -> Mapping[str, str | None]:
        """What an answer needs: the serving loop and the policies that were asked for at the start."""
        serving = self.serving and not self.server.draining
        reason = "draining" if self.server.draining else "requests are not being served"
        return {"serving": None if serving else reason, **self.pool.waiting_for(self._settings.policies)}

    def close(self) -> None:
        """Frees sockets and threads, after `run` has returned."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
