"""The learner process of a run: reads the store, updates, checkpoints, publishes (contracts E, F, G).

Driven by `main` (`relayrl-training-server learn --run R`), and by the one-process mode and tests:

    learner = Learner(run, store, registry, directory)
    learner.run(stop_event)    # in a thread; returns after the update under way
    learner.close()

Nothing here serves requests: readiness and metrics are snapshots that HTTP reads from its own thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from prometheus_client import CollectorRegistry

from relayrl_shared import logs, telemetry
from relayrl_shared.errors import (
    LeaseLost,
    RelayRLError,
    StaleFencingToken,
    StorageFull,
    StoreUnavailable,
)
from relayrl_shared.identifiers import new_id
from relayrl_shared.policy.artefact import digest
from relayrl_shared.store.interface import Run, TrajectoryStore
from relayrl_training_server.algorithms.base import AlgorithmState, Metrics
from relayrl_training_server.algorithms.build import build_for_run, use_deterministic_torch
from relayrl_training_server.algorithms.configs import needs
from relayrl_training_server.batches import build_batch
from relayrl_training_server.checkpoints import Checkpoint, CheckpointDirectory
from relayrl_training_server.demand import Demand
from relayrl_training_server.export import export_graph
from relayrl_training_server.learner_metrics import LearnerMetrics
from relayrl_training_server.lease import LEASE_SECONDS, RunLease
from relayrl_training_server.progress import STATUS_NAME, EpisodeLedger, ProgressFile, write_status
from relayrl_training_server.publisher import Lineage, Publisher, Registry
from relayrl_training_server.reader import SegmentReader
from relayrl_training_server.sampler import Moment, Sampled, Sampler
from relayrl_training_server.selections import RolloutSelection, selection_for

LOG = logs.get_logger(__name__)
TRACER = telemetry.tracer(__name__)

POOL_BYTES = 256 << 20
"""Undecided trajectories that are held in memory: above it, no more is read than the next batch needs."""

_LINKS = 32  # trajectories that an update's span is linked to, at most


@dataclass(frozen=True)
class LearnerTimes:
    """Durations, seconds.

    wait, idle_wait: sleeps between looks at the store, the first and the longest. lease: its time to live.
    retry: between tries of what is away. patience: readiness says whom a batch waits for once it has waited
    so long.
    """

    wait_seconds: float = 0.1
    idle_wait_seconds: float = 1.0
    lease_seconds: float = LEASE_SECONDS
    retry_seconds: float = 0.25
    patience_seconds: float = 5.0


@dataclass(frozen=True)
class _Unsaved:
    """An update that no durable checkpoint contains yet. `describe` tells people of it, once it is out."""

    describe: Callable[[], None] = lambda: None


class Learner:
    """One run's learner state and its loop.

    Args:
        run: what to learn, as the store has it. store: opened with writer_of="learner" (or "all").
        registry: where versions go. directory: of the run: checkpoints, progress.csv, status.json. graph:
        an exported graph of the run's architecture, where there is one at hand; exporting takes seconds.
        metrics: None makes an own registry. times: durations.
    """

    def __init__(
        self,
        run: Run,
        store: TrajectoryStore,
        registry: Registry,
        directory: Path,
        *,
        graph: bytes | None = None,
        metrics: CollectorRegistry | None = None,
        times: LearnerTimes | None = None,
    ) -> None:
        use_deterministic_torch()
        self.run_record = run
        self.directory = directory
        self.times = times or LearnerTimes()
        self.metrics = LearnerMetrics(metrics or CollectorRegistry())
        self.algorithm = build_for_run(run)
        demands = needs(run.algorithm, run.hyperparameters)
        self.sampler = Sampler(selection_for(run), evaluation=demands.evaluation)
        self.ledger = EpisodeLedger()
        self._store = store
        self._registry = registry
        self._reader = SegmentReader(store, run.run_id)
        self._demand = Demand(store, run)
        self._lease = RunLease(store, run.run_id, directory, self.times.lease_seconds)
        retention = int(self.algorithm.config.checkpoint_retention)
        self._checkpoints = CheckpointDirectory(directory / "checkpoints", retention)
        self._lineage = Lineage(run.run_id, run.name, run.algorithm, run.hyperparameters, new_id(), None)
        self._graph = graph or b""
        self._publisher: Publisher | None = None
        self._progress: ProgressFile | None = None
        self._stage = "starting"
        self._waiting_since: float | None = None
        self._trouble: dict[str, str] = {}
        self._unsaved: _Unsaved | None = None
        self.failure = ""
        self.http_port = 0

    @property
    def learner_update(self) -> int:
        """Finished updates."""
        return self.algorithm.updates

    # ---- life ---------------------------------------------------------------------------------------------

    def run(self, stop: threading.Event) -> None:
        """Learns until `stop`; the update under way is finished and published first.

        Raises:
            LeaseLost: another learner has the run now.
            Exception: what is not `is_passing` failed the run; status.json says why.
        """
        try:
            if self._lease.acquire(stop):
                self._start()
                self._learn(stop)
        except Exception as error:
            if not is_passing(error):
                self._fail(error)
            raise
        finally:
            self._stage = "stopped"
            self._lease.close()

    def close(self) -> None:
        """Gives the lease back if `run` did not."""
        self._lease.close()

    def _learn(self, stop: threading.Event) -> None:
        wait_seconds = self.times.wait_seconds
        while not stop.is_set():
            self._lease.check()
            try:
                if self._turn(stop):
                    wait_seconds = self.times.wait_seconds
                else:  # a run that nobody feeds is looked at ever less often; a new trajectory ends the wait
                    self._store.wait(self.run_record.run_id, self.sampler.read_position, wait_seconds)
                    wait_seconds = min(2 * wait_seconds, self.times.idle_wait_seconds)
            except (StoreUnavailable, StorageFull) as error:
                self._note_trouble("store", str(error))
                stop.wait(self.times.retry_seconds)
            else:
                self._trouble.pop("store", None)

    def _turn(self, stop: threading.Event) -> bool:
        """Reads what is new and does at most one update; False if there was nothing to do."""
        if self._unsaved is not None:
            self._finish(self._unsaved)
            return True
        if not self._may_update():  # nor read: what could not be learned from soon would fill the memory
            stop.wait(self.times.retry_seconds)
            return True
        arrived = self._read(stop)
        run_id = self.run_record.run_id
        moment = Moment(self.learner_update, self._store.live_actors(run_id), time.monotonic())
        sampled = self.sampler.batch(moment)
        if sampled is None:
            self._wait_for(moment)
            self._demand.ask(self.sampler, moment, arrived=arrived)
            return arrived
        self._update(sampled)
        return True

    def _read(self, stop: threading.Event) -> bool:
        """Takes in what is new; under free pacing all of it, since the newest is learned from first (E1)."""
        to_the_end = self.run_record.pacing == "free"
        arrived = False
        while not arrived or (to_the_end and self._has_room() and not stop.is_set()):
            segments = self._reader.read_after(self.sampler.read_position)
            if not segments:
                break
            self.sampler.add(segments, time.monotonic())
            arrived = True
        return arrived

    def _has_room(self) -> bool:
        """Whether more may be read than a batch needs; what no batch will take makes room."""
        pool = self.sampler.pool
        if pool.held_bytes >= POOL_BYTES:
            self.sampler.drop(Moment(self.learner_update, (), time.monotonic()))
        return pool.held_bytes < POOL_BYTES

    def _wait_for(self, moment: Moment) -> None:
        """Notes what the batch waits for, and since when; without actors there is nothing to wait for."""
        self._stage = f"waiting for {self.sampler.waiting_for}"
        if self._waiting_since is None or not moment.actors:
            self._waiting_since = moment.now if moment.actors else None

    def _may_update(self) -> bool:
        """Whether the queue of publications has room: beyond the lag nobody could use a version."""
        publisher = self._publisher
        assert publisher is not None
        if publisher.pending and not publisher.flush():
            self._note_trouble("registry", publisher.trouble)
        if not publisher.pending:
            self._trouble.pop("registry", None)
        return publisher.pending <= self.run_record.max_policy_lag + 1

    # ---- start --------------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Resumes from the newest checkpoint, or publishes update 0."""
        self._stage = "starting"
        token = self._lease.token
        self._checkpoints.fence(token)
        found = self._checkpoints.newest(self.run_record.run_id)
        self._graph = self._graph_of(None if found is None else found[0])
        self._publisher = Publisher(self._registry, self._store, self._graph, token)
        self.metrics.watch_queue(lambda: 0 if self._publisher is None else self._publisher.pending)
        if found is not None:
            self._resume(*found)
        self._progress = ProgressFile(self.directory / "progress.csv", self.learner_update)
        if found is None or not found[1]:
            self._queue_publication(Sampled((), self._publisher.uses_of(self.learner_update)), {})
            self._unsaved = _Unsaved()
        else:
            self._publish()
        LOG.info("learning", run=self.run_record.name, learner_update=self.learner_update, token=token)

    def _graph_of(self, checkpoint: Checkpoint | None) -> bytes:
        """The exported graph: the checkpoint's, or a new one, which takes seconds."""
        graph = None if checkpoint is None else self._checkpoints.graph(checkpoint.graph_digest)
        return graph or self._graph or export_graph(self.algorithm.module)

    def _resume(self, checkpoint: Checkpoint, is_newest: bool) -> None:
        """Goes on where a checkpoint stood; on a line of its own unless it is the newest (contracts G1)."""
        assert self._publisher is not None
        tensors = safetensors.torch.load(checkpoint.tensors)
        self.algorithm.restore(AlgorithmState(tensors, checkpoint.values))
        self.sampler.restore(checkpoint.sampler)
        self.ledger.restore(checkpoint.progress["episodes"])
        self._publisher.resume(checkpoint.publications)
        if is_newest:
            lineage = (checkpoint.lineage_id, checkpoint.parent_lineage_id)
        else:
            lineage = (new_id(), checkpoint.lineage_id)
        run = self.run_record
        self._lineage = Lineage(run.run_id, run.name, run.algorithm, run.hyperparameters, *lineage)

    # ---- an update ----------------------------------------------------------------------------------------

    def _update(self, sampled: Sampled) -> None:
        """Contracts G1: learn, checkpoint, publish, record."""
        self._stage = f"update {self.learner_update + 1}"
        self._waiting_since = None
        started = time.monotonic()
        lag = 0
        learned: Metrics = {"batch_steps": 0.0}
        if sampled.segments:
            batch = build_batch(sampled.segments)
            lag = self.learner_update - int(batch.learner_update.min())
            with _span(sampled, self.learner_update + 1):
                learned = self.algorithm.update(batch)
        else:
            self.algorithm.skip()
        self.ledger.absorb(sampled.decided)
        self.metrics.update_seconds.observe(time.monotonic() - started)
        self._queue_publication(sampled, learned)
        self._unsaved = _Unsaved(lambda: self._describe(sampled, learned, lag, time.monotonic() - started))
        self._finish(self._unsaved)

    def _finish(self, unsaved: _Unsaved) -> None:
        """Checkpoint, then publication; nothing goes out while the checkpoint cannot be written (G1)."""
        self._checkpoint()
        self._unsaved = None
        self._publish()
        unsaved.describe()

    def _queue_publication(self, sampled: Sampled, learned: Metrics) -> None:
        assert self._publisher is not None
        summary = {name: value for name, value in self.ledger.describe().items() if value is not None}
        self._publisher.prepare(
            self.algorithm.module,
            self._lineage,
            self.learner_update,
            sampled.uses,
            self.sampler.pool.cursor,
            {**learned, **summary},
        )

    def _checkpoint(self) -> None:
        """Writes everything down, the queued publications included."""
        assert self._publisher is not None
        started = time.monotonic()
        state = self.algorithm.state()
        graph_digest = digest(self._graph)
        self._checkpoints.save_graph(graph_digest, self._graph)
        self._checkpoints.save(
            Checkpoint(
                run_id=self.run_record.run_id,
                lineage_id=self._lineage.lineage_id,
                parent_lineage_id=self._lineage.parent_lineage_id,
                learner_update=self.learner_update,
                fencing_token=self._lease.token,
                graph_digest=graph_digest,
                tensors=safetensors.torch.save(state.tensors),
                values=state.values,
                sampler=self.sampler.state(),
                progress={"episodes": self.ledger.state()},
                publications=self._publisher.publications,
                created_at=time.time(),
            )
        )
        self.metrics.checkpoint_seconds.observe(time.monotonic() - started)

    def _publish(self) -> None:
        assert self._publisher is not None
        self._lease.check()
        started = time.monotonic()
        if not self._publisher.flush():
            self._note_trouble("registry", self._publisher.trouble)
        self.metrics.publish_seconds.observe(time.monotonic() - started)
        self.metrics.learner_update.set(self.learner_update)
        self.metrics.policy_version.set(self._publisher.policy_version or 0)
        self._tell(lambda: self.write_status("active"))

    def _describe(self, sampled: Sampled, learned: Metrics, lag: int, seconds: float) -> None:
        """Tells people: metrics, progress.csv, status.json."""
        progress = self._progress
        assert progress is not None
        outcomes: dict[str, int] = {}
        for use in sampled.uses:
            outcomes[use.outcome] = outcomes.get(use.outcome, 0) + 1
        episodes = self.ledger.describe()
        self.metrics.note(learned, outcomes)
        self.metrics.policy_lag.set(lag)
        self.metrics.mean_return.set(episodes["mean_return"] or 0.0)
        row = {"learner_update": self.learner_update, "steps_learned": self.algorithm.steps_learned}
        whole = {**row, **episodes, "policy_lag": lag, "update_seconds": seconds, **learned}
        self._tell(lambda: progress.append(whole))

    def _tell(self, write: Callable[[], None]) -> None:
        """Writes what only people read; without space for it the learner goes on."""
        try:
            write()
        except OSError as error:
            self._note_trouble("files", str(error))
        else:
            self._trouble.pop("files", None)

    # ---- what others see ----------------------------------------------------------------------------------

    def readiness(self) -> Mapping[str, str | None]:
        """What the learner waits for, item by item; from any thread."""
        learning = self._stage if self._stage.startswith(("starting", "stopped")) else None
        since = self._waiting_since
        late = since is not None and time.monotonic() - since >= self.times.patience_seconds
        return {
            "lease": self._lease.waiting_for,
            "learner": self.failure or learning,
            "batch": self._stage if late and self._stage.startswith("waiting") else None,
            "registry": self._trouble.get("registry"),
            "store": self._trouble.get("store"),
            "files": self._trouble.get("files"),
        }

    def info(self) -> dict[str, Any]:
        """Where the learner stands; from any thread."""
        publisher, run = self._publisher, self.run_record
        selection = self.sampler.selection
        return {
            "run_id": run.run_id,
            "run": run.name,
            "algorithm": run.algorithm,
            "stage": self._stage,
            "learner_update": self.learner_update,
            "policy_version": None if publisher is None else publisher.policy_version,
            "pending_publications": 0 if publisher is None else publisher.pending,
            "steps_learned": self.algorithm.steps_learned,
            "steps_read": self.sampler.steps_read,
            "store_cursor": self.sampler.pool.cursor,
            "trajectories": dict(self.sampler.pool.outcomes),
            "actors_left_out": selection.left_out_total if isinstance(selection, RolloutSelection) else 0,
            "lineage_id": self._lineage.lineage_id,
            "fencing_token": self._lease.token,
            **self.ledger.describe(),
        }

    def write_status(self, state: str) -> None:
        """Replaces status.json."""
        status = {"state": state, "reason": self.failure, "http_port": self.http_port, **self.info()}
        write_status(self.directory / STATUS_NAME, status)

    def _fail(self, error: Exception) -> None:
        """Notes why the run failed, where the supervisor and people look."""
        self.failure = f"{type(error).__name__}: {error}"
        LOG.error("run failed", run=self.run_record.name, reason=self.failure, exc_info=error)
        try:
            self.write_status("failed")
            self._store.set_run_state(self.run_record.run_id, "failed", self.failure)
        except (OSError, RelayRLError) as note_error:
            LOG.info("the state of the run is for ingest to note", reason=str(note_error))

    def _note_trouble(self, what: str, reason: str) -> None:
        if self._trouble.get(what) != reason:
            LOG.warning("waiting", what=what, reason=reason)
        self._trouble[what] = reason


def _span(sampled: Sampled, learner_update: int) -> telemetry.Span:
    """The span of an update, in the trace of one of its trajectories and linked to others."""
    parents = [segment.metadata.traceparent for segment in sampled.segments]
    return TRACER.span(
        "learner.update", parent=parents[0], links=parents[1:_LINKS], learner_update=learner_update
    )


def is_passing(error: Exception) -> bool:
    """Whether a learner that is started again may get on: not the run failed, but what it stands on."""
    if isinstance(error, RelayRLError):
        return error.retryable or isinstance(error, LeaseLost | StaleFencingToken)
    return isinstance(error, OSError | MemoryError)
