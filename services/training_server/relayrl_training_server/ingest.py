"""The ingest process: two sockets, a committing thread, health over HTTP.

Driven by `main`, and by the one-process mode:

ingest = Ingest(settings)
ingest.run(stop_event)     # serves until the event, then drains
ingest.close()
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from prometheus_client import CollectorRegistry

from relayrl_shared import http_api, lifecycle, logs, telemetry
from relayrl_shared.errors import RelayRLError, StoreUnavailable
from relayrl_shared.lifecycle import StopSignal
from relayrl_shared.sockets import RouterServer
from relayrl_shared.store.interface import TrajectoryStore
from relayrl_shared.store.open import open_store
from relayrl_shared.store.quarantine import QuarantineLimits
from relayrl_training_server.committer import Committer
from relayrl_training_server.failures import carry_out_failures
from relayrl_training_server.garbage import GarbageKeeper
from relayrl_training_server.ingest_metrics import IngestMetrics
from relayrl_training_server.intake import TrajectoryIntake
from relayrl_training_server.listener import AgentListener
from relayrl_training_server.settings import LimitSettings, TrainingServerSettings
from relayrl_training_server.waiting import when_available

LOG = logs.get_logger(__name__)

MAINTENANCE_SECONDS = 1.0


class Ingest:
    """Both sockets are bound and HTTP answers when the constructor returns; `run` serves.

    Args:
        settings: of the training server.
        store: an open store to write in place of an own one; it is not closed here.
        drain: asks the process to stop, for POST /v1/drain; None: that answers 404.
    """

    def __init__(
        self,
        settings: TrainingServerSettings,
        *,
        store: TrajectoryStore | None = None,
        drain: Callable[[], None] | None = None,
    ) -> None:
        self._settings = settings.server.ingest
        self._run_directory = settings.run_directory
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._threads: list[threading.Thread] = []
        self.serving = False
        self.draining = False
        with ExitStack() as stack:
            self._open(settings, store, stack)
            app = http_api.create_app(
                "training-server",
                readiness=self.readiness,
                info=self.info,
                metrics=self.metrics.registry,
                drain=drain,
            )
            self.http = lifecycle.serve_http(app, self._settings.http)
            stack.callback(self.http.close)
            self._closing = stack.pop_all()

    def _open(
        self, settings: TrainingServerSettings, store: TrajectoryStore | None, stack: ExitStack
    ) -> None:
        limits = self._settings.limits
        if store is None:
            store = open_store(
                settings.store_url,
                writer_of="ingest",
                limits=QuarantineLimits(limits.quarantine_rows, limits.quarantine_bytes),
                allow_unsafe=settings.server.allow_unsafe_store,
            )
            stack.callback(store.close)
        self.store = store
        self.metrics = IngestMetrics(CollectorRegistry())
        self._committer = Committer(store, self._settings, self.metrics)
        stack.callback(self._committer.close, 5.0)
        self._open_sockets(settings, store, limits, stack)
        self.metrics.watch_queue(lambda: self._committer.queued)
        self.metrics.watch_sockets(
            {"agent_listener": self.agent_listener, "trajectory_server": self.trajectory_server}
        )

    def _open_sockets(
        self,
        settings: TrainingServerSettings,
        store: TrajectoryStore,
        limits: LimitSettings,
        stack: ExitStack,
    ) -> None:
        keepers = {
            name: GarbageKeeper(name, self._committer, self.metrics, limits.max_quarantined_frames_bytes)
            for name in ("agent_listener", "trajectory_server")
        }
        self._intake = TrajectoryIntake(
            store, self._settings, self._committer, keepers["trajectory_server"], self.metrics
        )
        self.trajectory_server = RouterServer(
            settings.addresses.trajectory_server_address.zmq,
            max_message_bytes=limits.max_message_bytes,
            on_rejected=self._intake.on_rejected,
        )
        stack.callback(self.trajectory_server.close)
        self._intake.router = self.trajectory_server
        self.agent_listener = RouterServer(
            settings.addresses.agent_listener_address.zmq,
            max_message_bytes=limits.max_message_bytes,
            on_rejected=keepers["agent_listener"].on_rejected,
        )
        stack.callback(self.agent_listener.close)
        self._listener = AgentListener(store, settings.server, self.metrics, self.agent_listener)

    # ---- serving ------------------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Serves until `stop`, then commits and answers what was taken.

        Raises:
            RelayRLError: a serving thread failed.
        """
        self._start("trajectory server", lambda: self.trajectory_server.run(self._intake.handle, self._stop))
        self._start("agent listener", lambda: self.agent_listener.run(self._listener.handle, self._stop))
        self._start("maintenance", self._maintain)
        self.serving = True
        LOG.info("serving", **self.info())
        while not stop.wait(0.2) and self._failure is None:
            continue
        self._drain()
        if self._failure is not None:
            raise RelayRLError(f"ingest failed: {self._failure}") from self._failure

    def _start(self, name: str, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001  # reported by `run`, which ends the process
                self._failure = error

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _drain(self) -> None:
        """New trajectories are told to try again; those taken are committed and answered."""
        self.draining = True
        committed = self._committer.close(self._settings.drain_seconds)
        if not committed:
            LOG.error("the store did not take everything within the drain", waiting=self._committer.queued)
        self._stop.set()
        for router in (self.trajectory_server, self.agent_listener):
            router.wake()
        for thread in self._threads:
            thread.join(5.0)
        self.serving = False
        LOG.info("drained", committed=committed)

    def _maintain(self) -> None:
        """Expires silent clients, notes failed runs and looks whether the store is there."""
        started = time.monotonic()
        while not self._stop.wait(MAINTENANCE_SECONDS):
            try:
                self.store.ping()
                self._committer.report(None)
                carry_out_failures(self.store, self._run_directory)
                # Clients that were silent because this process was not there get their time first.
                if time.monotonic() - started > self._settings.client_timeout_seconds:
                    self._expire()
            except StoreUnavailable as error:
                self._committer.report(error)
            except RelayRLError as error:
                LOG.error("maintenance failed", exc_info=error)

    def _expire(self) -> None:
        for client_id in self.store.expire_clients(self._settings.client_timeout_seconds):
            self.metrics.expired.inc()
            LOG.warning("client has been silent and counts as left", client_id=client_id)

    # ---- control plane ------------------------------------------------------------------------------------

    def readiness(self) -> Mapping[str, str | None]:
        """The store and both sockets."""
        waiting = None if self.serving else "not being served yet"
        return {
            "store": self._committer.unavailable,
            "agent_listener": waiting,
            "trajectory_server": waiting,
            "draining": "ingest is about to stop" if self.draining else None,
        }

    def info(self) -> Mapping[str, Any]:
        """Where it is reached and how much waits."""
        return {
            "process": "ingest",
            "agent_listener_port": self.agent_listener.port,
            "trajectory_server_port": self.trajectory_server.port,
            "queued_trajectories": self._committer.queued,
        }

    def close(self) -> None:
        """Frees sockets, threads and connections, after `run` has returned."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run_ingest(settings: TrainingServerSettings, event: threading.Event | None = None) -> int:
    """The process: serves until a signal, which sets `event`. Returns the exit status."""
    logs.configure("training-server-ingest", settings.log)
    exporter = telemetry.configure("training-server", settings.telemetry)
    try:
        with StopSignal(event=event) as stop:
            ingest = when_available(lambda: Ingest(settings, drain=stop.stop), stop.event)
            if ingest is not None:
                with ingest:
                    ingest.run(stop.event)
    finally:
        exporter.close()
    return 0
