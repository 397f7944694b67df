"""The process `relayrl-training-server learn --run R`: opens what a learner needs and serves its health."""

from __future__ import annotations

import threading

import msgspec
from prometheus_client import CollectorRegistry

from relayrl_shared import http_api, lifecycle, logs, telemetry
from relayrl_shared.errors import ConfigError, RelayRLError
from relayrl_shared.lifecycle import StopSignal
from relayrl_shared.registry_client import RegistryClient
from relayrl_shared.store.interface import Run, TrajectoryStore
from relayrl_shared.store.open import open_store
from relayrl_training_server.children import RUN_FAILED_STATUS
from relayrl_training_server.failures import note_failure
from relayrl_training_server.learner import Learner, is_passing
from relayrl_training_server.settings import TrainingServerSettings
from relayrl_training_server.waiting import when_available

RESTART_STATUS = 1
"""Exit status where another start may go well: a lost lease, a store that is away."""

_REGISTRY_SECONDS = 5.0
_LOOK_SECONDS = 0.25

LOG = logs.get_logger(__name__)


def main(settings: TrainingServerSettings, run: str, event: threading.Event | None = None) -> int:
    """Learns a run until a signal; returns the exit status: 0 after a stop.

    Args:
        settings: of the training server.
        run: id or name of the run; it is waited for if it is not there yet.
        event: set by the signal; None makes one.
    """
    logs.configure("training-server-learner", settings.log)
    exporter = telemetry.configure("training-server-learner", settings.telemetry)
    try:
        with StopSignal(event=event) as stop:
            return _serve(settings, run, stop)
    finally:
        exporter.close()


def _serve(settings: TrainingServerSettings, name: str, stop: StopSignal) -> int:
    def opened() -> TrajectoryStore:
        allow_unsafe = settings.server.allow_unsafe_store
        return open_store(settings.store_url, writer_of="learner", allow_unsafe=allow_unsafe)

    store = when_available(opened, stop.event)
    if store is None:
        return 0
    try:
        run = wait_for_run(store, name, stop.event)
        if run is None:
            return 0
        registry = RegistryClient(
            settings.addresses.model_server_address.zmq, timeout_seconds=_REGISTRY_SECONDS
        )
        try:
            return _learn(settings, with_timeout(run, settings), store, registry, stop)
        finally:
            registry.close()
    finally:
        store.close()


def _learn(
    settings: TrainingServerSettings,
    run: Run,
    store: TrajectoryStore,
    registry: RegistryClient,
    stop: StopSignal,
) -> int:
    metrics = CollectorRegistry()
    directory = settings.run_directory(run.run_id)
    try:
        learner = Learner(run, store, registry, directory, metrics=metrics)
    except ConfigError as error:
        LOG.error("the run cannot be learned", run=run.name, reason=str(error))
        note_failure(store, run.run_id, directory, f"{type(error).__name__}: {error}")
        return RUN_FAILED_STATUS
    try:
        app = http_api.create_app(
            "training-server",
            readiness=learner.readiness,
            info=learner.info,
            metrics=metrics,
            drain=stop.stop,
        )
        with lifecycle.serve_http(app, settings.server.learner.http) as http:
            learner.http_port = http.port
            learner.run(stop.event)
    except Exception as error:  # noqa: BLE001  # custom algorithms raise anything; the status tells which
        LOG.error("the learner ends", run=run.name, reason=f"{type(error).__name__}: {error}")
        return RESTART_STATUS if is_passing(error) else RUN_FAILED_STATUS
    return 0


def wait_for_run(store: TrajectoryStore, name: str, stop: threading.Event) -> Run | None:
    """The run of that id or name, once it is there; None if `stop` came first."""
    while not stop.is_set():
        try:
            run = store.run_by_id(name) or store.run_by_name(name)
        except RelayRLError as error:
            if not error.retryable:
                raise
            run = None
        if run is not None:
            return run
        stop.wait(_LOOK_SECONDS)
    return None


def with_timeout(run: Run, settings: TrainingServerSettings) -> Run:
    """The run with the server's collection timeout, where its settings have one."""
    seconds = settings.server.collection_timeout_seconds
    if seconds is None:
        return run
    changed = {**run.hyperparameters, "collection_timeout_seconds": seconds}
    return msgspec.structs.replace(run, hyperparameters=changed)
