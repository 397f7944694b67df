"""All services in this process, each in a thread, for debugging: same objects, same settings.

`relayrl train --in-process` drives it. Prefer processes for work: here everything shares one interpreter.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Self

from relayrl_cli.addresses import Addresses, Ports
from relayrl_cli.run_view import RunFigures
from relayrl_cli.service_settings import default_store, service_settings
from relayrl_inference_server.service import InferenceService
from relayrl_inference_server.settings import ENVIRONMENT_PREFIX as INFERENCE_PREFIX
from relayrl_inference_server.settings import InferenceServerSettings
from relayrl_model_registry.service import ModelRegistry
from relayrl_model_registry.settings import ENVIRONMENT_PREFIX as REGISTRY_PREFIX
from relayrl_model_registry.settings import ModelRegistrySettings
from relayrl_shared import logs
from relayrl_shared.registry_client import RegistryClient
from relayrl_shared.settings import load_settings
from relayrl_shared.store.interface import Run
from relayrl_shared.store.open import open_store
from relayrl_training_server.ingest import Ingest
from relayrl_training_server.learner import Learner
from relayrl_training_server.settings import ENVIRONMENT_PREFIX as TRAINING_PREFIX
from relayrl_training_server.settings import TrainingServerSettings

LOG = logs.get_logger(__name__)

LOOK_SECONDS = 0.1
JOIN_SECONDS = 20.0


class InProcessStack:
    """A context manager: entering starts every service, leaving drains them.

    Args:
        directory: all state, laid out as that of a stack of processes.
        ports: of the sockets; free ones by default.
        store: URL of the trajectory store; None: SQLite below the directory.
    """

    def __init__(self, directory: Path, *, ports: Ports | None = None, store: str | None = None) -> None:
        self._directory = directory.absolute()
        self._ports = ports or Ports.free()
        self._store_url = store or default_store(self._directory)
        self.addresses = Addresses.of(self._ports)
        self._stop = threading.Event()
        self._stop_learners = threading.Event()
        self._threads: list[threading.Thread] = []
        self._learners: dict[str, threading.Thread] = {}
        self._failures: dict[str, str] = {}  # of learners, by the run's name
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        overrides = service_settings(self._directory, self._ports, self._store_url)
        with ExitStack() as closing:
            self._open(overrides, closing)
            self._closing = closing.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_learners.set()
        for learner in self._learners.values():
            learner.join(JOIN_SECONDS)
        self._stop.set()
        for thread in self._threads:
            thread.join(JOIN_SECONDS)
        self._closing.close()

    def trouble(self, run: str) -> str | None:
        """Why the run's learner ended by a failure; None while it did not."""
        failure = self._failures.get(run)
        return None if failure is None else f"run {run} has failed: {failure}"

    def figures(self, run: str) -> RunFigures | None:
        """How the store sees a run; None while there is none of that name."""
        found = self._store.run_by_name(run)
        if found is None:
            return None
        stored = self._store.counts(found.run_id)["trajectories"]
        update = self._store.learner_update(found.run_id)
        return RunFigures(stored, update, found.state, found.state_reason)

    def _open(self, overrides: dict[str, dict[str, str]], closing: ExitStack) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        registry_settings = load_settings(
            ModelRegistrySettings,
            environment_prefix=REGISTRY_PREFIX,
            environment=os.environ,
            overrides=overrides["model_registry"],
        )
        self._settings = load_settings(
            TrainingServerSettings,
            environment_prefix=TRAINING_PREFIX,
            environment=os.environ,
            overrides=overrides["training_server"],
        )
        inference_settings = load_settings(
            InferenceServerSettings,
            environment_prefix=INFERENCE_PREFIX,
            environment=os.environ,
            overrides=overrides["inference_server"],
        )
        registry = closing.enter_context(ModelRegistry(registry_settings))
        self._serve("model-registry", registry.run)
        self._store = open_store(self._store_url, writer_of="all")
        closing.callback(self._store.close)
        self._registry_client = RegistryClient(self._settings.addresses.model_server_address.zmq)
        closing.callback(self._registry_client.close)
        ingest = closing.enter_context(Ingest(self._settings, store=self._store))
        self._serve("ingest", ingest.run)
        self._serve("learners", self._keep_learners)
        inference = closing.enter_context(InferenceService(inference_settings))
        self._serve("inference-server", inference.run)

    def _serve(self, name: str, run: Callable[[threading.Event], None]) -> None:
        thread = threading.Thread(target=run, args=(self._stop,), name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _keep_learners(self, stop: threading.Event) -> None:
        """Starts a learner for each run that appears."""
        while not stop.is_set() and not self._stop_learners.wait(LOOK_SECONDS):
            for run in self._store.runs():
                if run.run_id not in self._learners and run.state == "active":
                    thread = threading.Thread(
                        target=self._learn, args=(run,), name=f"learner-{run.name}", daemon=True
                    )
                    self._learners[run.run_id] = thread
                    thread.start()

    def _learn(self, run: Run) -> None:
        directory = self._settings.run_directory(run.run_id)
        try:
            with closing(Learner(run, self._store, self._registry_client, directory)) as learner:
                learner.run(self._stop_learners)
        except Exception as error:  # a thread's end must be seen by the session that waits for it
            LOG.error("the learner failed", run=run.name, exc_info=error)
            self._failures[run.name] = f"{type(error).__name__}: {error}"
