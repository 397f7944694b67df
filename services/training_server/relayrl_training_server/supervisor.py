"""The supervisor process: starts ingest and a learner for each active run, watches them, and serves HTTP.

It holds no data: runs, counts and audits are read from the store, children meet there (contracts K1). A new
run is seen by looking at the store every `poll_seconds`.
"""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
from prometheus_client import CollectorRegistry

from relayrl_shared import lifecycle, logs, telemetry
from relayrl_shared.errors import RelayRLError, StoreUnavailable
from relayrl_shared.lifecycle import StopSignal
from relayrl_shared.settings import HttpSettings
from relayrl_shared.store.interface import Run, TrajectoryStore
from relayrl_shared.store.open import open_store
from relayrl_training_server.app import create_supervisor_app
from relayrl_training_server.children import RUN_FAILED_STATUS, ChildKeeper, ChildSpec, ChildStatus
from relayrl_training_server.settings import TrainingServerSettings
from relayrl_training_server.supervisor_metrics import watch_children

LOG = logs.get_logger(__name__)

INGEST = "ingest"
_ANY_HOSTS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def learner_name(run: Run) -> str:
    """The name of the learner child of a run."""
    return f"learner {run.name}"


class Supervisor:
    """HTTP answers when the constructor returns; `run` keeps the children.

    Args:
        settings: of the training server.
        child_arguments: what every child is told on its command line, so that it has the same settings.
        drain: asks the process to stop, for POST /v1/drain; None: that answers 404.
    """

    def __init__(
        self,
        settings: TrainingServerSettings,
        child_arguments: Sequence[str] = (),
        *,
        drain: Callable[[], None] | None = None,
    ) -> None:
        self._settings = settings
        self._store_problem: str | None = "not looked at yet"
        self._store: TrajectoryStore | None = None
        self._runs: list[Run] = []
        self.metrics = CollectorRegistry()
        self._keeper = ChildKeeper(settings.server.supervisor, child_arguments)
        watch_children(self.metrics, self._keeper.statuses)
        with ExitStack() as stack:
            stack.callback(self._close_store)
            self.http = lifecycle.serve_http(create_supervisor_app(self, drain), settings.server.http)
            stack.callback(self.http.close)
            self._closing = stack.pop_all()

    @property
    def store(self) -> TrajectoryStore:
        """The store, for reading. Raises StoreUnavailable until it could be opened."""
        if self._store is None:
            raise StoreUnavailable(f"the store could not be opened yet: {self._store_problem}")
        return self._store

    def _open_store(self) -> TrajectoryStore:
        if self._store is None:
            allow_unsafe = self._settings.server.allow_unsafe_store
            self._store = open_store(self._settings.store_url, allow_unsafe=allow_unsafe)
        return self._store

    def _close_store(self) -> None:
        if self._store is not None:
            self._store.close()

    def run(self, stop: threading.Event) -> None:
        """Keeps the children until `stop`, then drains them."""
        options = self._settings.server.supervisor
        LOG.info("supervising", **self.info())
        try:
            while not stop.is_set():
                self._look()
                self._keeper.poll()
                stop.wait(options.poll_seconds)
        finally:
            LOG.info("draining children")
            self._keeper.stop_all(options.drain_seconds)

    def _look(self) -> None:
        """Reads the runs and says which children there should be; the last answer stands without a store."""
        try:
            self._runs = self._open_store().runs()
            self._store_problem = None
        except RelayRLError as error:
            self._store_problem = str(error)
        self._keeper.want(self._wanted())

    def _wanted(self) -> list[ChildSpec]:
        options = self._settings.server.supervisor
        wanted = [ChildSpec(INGEST, (INGEST,))] if options.start_ingest else []
        if options.start_learners:
            wanted += [
                ChildSpec(learner_name(run), ("learn", "--run", run.run_id), RUN_FAILED_STATUS)
                for run in self._runs
                if run.state in ("active", "paused")
            ]
        return wanted

    # ---- control plane ------------------------------------------------------------------------------------

    def children(self) -> dict[str, ChildStatus]:
        """Every child by name."""
        return self._keeper.statuses()

    def readiness(self) -> Mapping[str, str | None]:
        """The store, ingest, and the learner of each run."""
        checks: dict[str, str | None] = {"store": self._store_problem}
        if self._settings.server.supervisor.start_ingest:
            checks[INGEST] = "is being started"
        for name, child in self.children().items():
            checks[name] = child.problem
        if INGEST in checks and checks[INGEST] is None:
            checks[INGEST] = readiness_problem(self._settings.server.ingest.http)
        return checks

    def info(self) -> Mapping[str, Any]:
        """What it keeps running."""
        return {
            "process": "supervisor",
            "store": self._settings.store_url.rpartition("@")[2],
            "children": {name: msgspec.to_builtins(child) for name, child in self.children().items()},
        }

    def close(self) -> None:
        """Frees connections and HTTP, after `run` has returned."""
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Readiness(msgspec.Struct):
    """What matters of an answer to /readyz."""

    checks: dict[str, str | None]


def readiness_problem(settings: HttpSettings, timeout_seconds: float = 1.0) -> str | None:
    """What a child's /readyz says that it waits for; None where it is ready or cannot be asked."""
    if not settings.enabled or settings.port == 0:
        return None
    connection = http.client.HTTPConnection(
        _ANY_HOSTS.get(settings.host, settings.host), settings.port, timeout=timeout_seconds
    )
    try:
        connection.request("GET", "/readyz")
        answer = msgspec.json.decode(connection.getresponse().read(), type=_Readiness)
        waiting = [f"{item}: {reason}" for item, reason in answer.checks.items() if reason is not None]
    except (OSError, http.client.HTTPException, msgspec.MsgspecError) as error:
        return f"does not answer on port {settings.port}: {error}"
    finally:
        connection.close()
    return "; ".join(waiting) or None


def run_supervisor(
    settings: TrainingServerSettings, *, config_file: Path | None = None, overrides: Sequence[str] = ()
) -> int:
    """The process: serves until a signal. Returns the exit status."""
    logs.configure("training-server", settings.log)
    exporter = telemetry.configure("training-server", settings.telemetry)
    arguments = [] if config_file is None else ["--config", str(config_file)]
    for pair in overrides:
        arguments += ["--set", pair]
    try:
        with StopSignal() as stop, Supervisor(settings, arguments, drain=stop.stop) as supervisor:
            supervisor.run(stop.event)
    finally:
        exporter.close()
    return 0
