"""Takes trajectories and schemas in on the trajectory server's socket: validates, queues, acknowledges.

Stateless (contracts C4): each message names its run, schema and sequence. Nothing is acknowledged before it
is committed; what fails validation is in quarantine, durably, before its terminal nack (contracts C2).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from blake3 import blake3

from relayrl_shared import frames, logs, messages, telemetry
from relayrl_shared.arrow_codec import body_digest, decode_schema
from relayrl_shared.errors import (
    ContractError,
    Draining,
    FrameError,
    InvalidTrajectory,
    MessageTooLarge,
    Overloaded,
    RelayRLError,
    StoreUnavailable,
)
from relayrl_shared.messages import Ack, AnyMessage, Nack, PutTrajectory
from relayrl_shared.sockets import Incoming, Rejected, RouterServer
from relayrl_shared.store.interface import CommitResult, IncomingTrajectory, Quarantined, Run, TrajectoryStore
from relayrl_shared.store.storable import as_quarantined
from relayrl_shared.trajectory import Columns, Trajectory, TrajectoryMetadata
from relayrl_shared.validation import validate_schema, validate_trajectory
from relayrl_training_server.catalog import Catalog, KnownSchema
from relayrl_training_server.committer import Committer
from relayrl_training_server.garbage import GarbageKeeper
from relayrl_training_server.ingest_metrics import IngestMetrics
from relayrl_training_server.metadata import can_be_named, check_metadata, check_policy, check_rollout
from relayrl_training_server.settings import IngestSettings

LOG = logs.get_logger(__name__)
TRACER = telemetry.tracer(__name__)

MAX_SCHEMA_BYTES = 1 << 20


class Refusal(Exception):
    """A retryable nack: nothing is wrong with the trajectory, only now is not the time."""

    def __init__(self, reason: str, detail: str, retry_after_seconds: float) -> None:
        super().__init__(reason, detail, retry_after_seconds)
        self.reason = reason
        self.detail = detail
        self.retry_after_seconds = retry_after_seconds


class TrajectoryIntake:
    """The handler of the trajectory server's socket; validates in the socket's thread.

    `router` must be set before the socket is served: it answers from this thread and from the committer's.
    """

    def __init__(
        self,
        store: TrajectoryStore,
        settings: IngestSettings,
        committer: Committer,
        garbage: GarbageKeeper,
        metrics: IngestMetrics,
    ) -> None:
        self._store = store
        self._settings = settings
        self._committer = committer
        self._garbage = garbage
        self._metrics = metrics
        self._catalog = Catalog(store)
        self.router: RouterServer

    def handle(self, batch: list[Incoming]) -> None:
        """Answers, or queues with an answer to come, every message of a batch."""
        for incoming in batch:
            message = incoming.message
            try:
                if isinstance(message, PutTrajectory):
                    self._put_trajectory(incoming, message)
                elif isinstance(message, messages.PutSchema):
                    self.router.reply(incoming, self._put_schema(message, incoming.payload[0]))
                else:
                    tag = type(message).__struct_config__.tag
                    raise ContractError(f"the trajectory server takes no {tag} messages")
            except RelayRLError as error:
                self.router.reply_error(incoming, error)
            except Exception as error:  # a fault over one message must not leave the others unanswered
                LOG.error("a message could not be handled", exc_info=error)
                self.router.reply_error(incoming, error)

    # ---- schemas ------------------------------------------------------------------------------------------

    def _put_schema(self, message: messages.PutSchema, encoded: memoryview) -> AnyMessage:
        if len(encoded) > MAX_SCHEMA_BYTES:
            raise MessageTooLarge(f"a schema of {len(encoded)} bytes; the limit is {MAX_SCHEMA_BYTES}")
        if blake3(encoded).hexdigest() != message.digest:
            raise InvalidTrajectory("the schema does not hash to its digest", "schema")
        validate_schema(decode_schema(encoded))
        self._store.put_schema(message.digest, bytes(encoded))
        return messages.Ok()

    # ---- trajectories -------------------------------------------------------------------------------------

    def _put_trajectory(self, incoming: Incoming, message: PutTrajectory) -> None:
        metadata = message.trajectory
        with TRACER.span("ingest.validate", parent=message.traceparent):
            try:
                content = self._validate(metadata, incoming.payload)
            except Refusal as refusal:
                self._refuse(incoming, metadata, refusal)
                return
            except InvalidTrajectory as error:
                self._quarantine(incoming, message, error)
                return
        size = len(content.body) + len(content.final_observation or b"")
        self._submit(incoming, metadata, content, size)

    def _validate(self, metadata: TrajectoryMetadata, payload: list[memoryview]) -> IncomingTrajectory:
        """The trajectory as it goes into the store.

        Raises:
            InvalidTrajectory: for good.
            Refusal: for now.
        """
        check_metadata(metadata)
        run, known = self._look_up(metadata)
        check_policy(metadata, run)
        self._catalog.check_fits(known, run)
        body, final = bytes(payload[0]), bytes(payload[1]) or None
        if body_digest(body, final) != metadata.body_digest:
            raise InvalidTrajectory("the payload does not hash to body_digest", "body_digest")
        columns = known.codec.decode_columns(body, metadata.steps)
        final_observation = known.codec.decode_final_observation(final) if final else None
        trajectory = Trajectory(metadata, columns, final_observation)
        validate_trajectory(known.codec.schema, trajectory, run.allow_nan)
        return _incoming(metadata, columns, body, final)

    def _look_up(self, metadata: TrajectoryMetadata) -> tuple[Run, KnownSchema]:
        run = self._find_run(metadata.run_id)
        if run is None:
            raise InvalidTrajectory(f"there is no run with the id {metadata.run_id}", "unknown_run")
        with self._store_at_hand():
            check_rollout(metadata, run, self._catalog.learner_update)
            known = self._catalog.schema(metadata.schema_digest)
        if known is None:
            raise Refusal("unknown_schema", f"send the schema {metadata.schema_digest} and resend", 0.0)
        return run, known

    def _find_run(self, run_id: str) -> Run | None:
        with self._store_at_hand():
            return self._catalog.run(run_id)

    @contextmanager
    def _store_at_hand(self) -> Iterator[None]:
        """Turns a store that is away into a refusal for now."""
        try:
            yield
        except StoreUnavailable as error:
            self._committer.report(error)
            raise Refusal(error.code, str(error), self._settings.retry_after_seconds) from error

    # ---- answers ------------------------------------------------------------------------------------------

    def _submit(
        self,
        incoming: Incoming,
        metadata: TrajectoryMetadata,
        content: IncomingTrajectory | Quarantined,
        size: int,
    ) -> None:
        """Queues it; the answer follows its transaction."""

        def committed(result: CommitResult | None, error: Exception | None) -> None:
            self._answer(incoming, metadata, content, result, error)

        try:
            self._committer.submit(content, size, committed)
        except (Draining, StoreUnavailable, Overloaded) as error:
            refusal = Refusal(error.code, str(error), self._settings.retry_after_seconds)
            self._refuse(incoming, metadata, refusal)

    def _answer(
        self,
        incoming: Incoming,
        metadata: TrajectoryMetadata,
        content: IncomingTrajectory | Quarantined,
        result: CommitResult | None,
        error: Exception | None,
    ) -> None:
        """In the committing thread, after the transaction or its failure."""
        if isinstance(error, StoreUnavailable):
            delay = self._settings.retry_after_seconds
            self._refuse(incoming, metadata, Refusal(error.code, str(error), delay))
        elif error is not None:
            self._answer_refused_row(incoming, metadata, content, error)
        elif isinstance(content, Quarantined):
            self._terminal(incoming, metadata, content.reason, content.detail)
        elif result is not None and result.outcome == "conflict":
            self._terminal(incoming, metadata, "conflict", result.detail)
        elif result is not None:
            self._acknowledge(incoming, metadata, content, result)

    def _acknowledge(
        self,
        incoming: Incoming,
        metadata: TrajectoryMetadata,
        content: IncomingTrajectory,
        result: CommitResult,
    ) -> None:
        if result.outcome == "stored":
            self._metrics.steps.inc(metadata.steps)
            self._metrics.bytes.inc(len(content.body) + len(content.final_observation or b""))
        self._metrics.trajectories.labels(result.outcome).inc()
        self.router.reply(
            incoming,
            Ack(spool_id=metadata.spool_id, run_id=metadata.run_id, sequence=metadata.sequence),
        )

    def _answer_refused_row(
        self,
        incoming: Incoming,
        metadata: TrajectoryMetadata,
        content: IncomingTrajectory | Quarantined,
        error: Exception,
    ) -> None:
        """The store refuses this row, not the moment: into quarantine with a trajectory, else try again."""
        if isinstance(content, Quarantined) or not isinstance(incoming.message, PutTrajectory):
            delay = self._settings.retry_after_seconds
            self._refuse(incoming, metadata, Refusal("internal", "see the server's log", delay))
        else:
            row = as_quarantined(incoming.message, incoming.payload, "store_refused", str(error))
            self._submit(incoming, metadata, row, sum(map(len, incoming.payload)))

    def _quarantine(self, incoming: Incoming, message: PutTrajectory, error: InvalidTrajectory) -> None:
        """Queues the row of a trajectory that is invalid for good; refused for now without a store."""
        self._keep(incoming, message, incoming.payload, error.reason, str(error))

    def _keep(
        self,
        incoming: Incoming,
        message: PutTrajectory,
        frames: list[memoryview] | None,
        reason: str,
        detail: str,
    ) -> None:
        """In the socket's thread: names run, spool and sequence only where the run is known to exist."""
        metadata = message.trajectory
        try:
            named = can_be_named(metadata) and self._find_run(metadata.run_id) is not None
        except Refusal as refusal:
            self._refuse(incoming, metadata, refusal)
            return
        row = as_quarantined(message, frames, reason, detail, named=named)
        self._submit(incoming, metadata, row, len(row.header) + len(row.payload or b""))

    def _terminal(self, incoming: Incoming, metadata: TrajectoryMetadata, reason: str, detail: str) -> None:
        self._metrics.trajectories.labels("quarantined").inc()
        self._metrics.refusals.labels(reason, "false").inc()
        LOG.warning(
            "trajectory quarantined", reason=reason, detail=detail, trajectory_id=metadata.trajectory_id
        )
        self.router.reply(incoming, _nack(metadata, reason, detail))

    def _refuse(self, incoming: Incoming, metadata: TrajectoryMetadata, refusal: Refusal) -> None:
        self._metrics.trajectories.labels("refused").inc()
        self._metrics.refusals.labels(refusal.reason, "true").inc()
        nack = _nack(metadata, refusal.reason, refusal.detail, refusal.retry_after_seconds)
        self.router.reply(incoming, nack)

    # ---- what did not parse -------------------------------------------------------------------------------

    def on_rejected(self, rejected: Rejected) -> bool:
        """A trajectory above the size limit is nacked for good; anything else goes to the garbage keeper."""
        message = _oversize_trajectory(rejected)
        if message is None:
            return self._garbage.on_rejected(rejected)
        incoming = Incoming(rejected.peer, message, [], 0.0)
        self._keep(incoming, message, None, rejected.error.code, str(rejected.error))
        return True


def _incoming(
    metadata: TrajectoryMetadata, columns: Columns, body: bytes, final: bytes | None
) -> IncomingTrajectory:
    versions = columns.policy_version[columns.policy_version_valid]
    updates = columns.learner_update
    return IncomingTrajectory(
        metadata=metadata,
        body=body,
        final_observation=final,
        policy_version_range=(int(versions.min()), int(versions.max())) if versions.size else None,
        learner_update_range=(int(updates.min()), int(updates.max())),
    )


def _nack(
    metadata: TrajectoryMetadata, reason: str, detail: str, retry_after_seconds: float | None = None
) -> Nack:
    return Nack(
        spool_id=metadata.spool_id,
        run_id=metadata.run_id,
        sequence=metadata.sequence,
        reason=reason,
        detail=detail,
        retryable=retry_after_seconds is not None,
        retry_after_seconds=retry_after_seconds,
    )


def _oversize_trajectory(rejected: Rejected) -> PutTrajectory | None:
    """The trajectory of a message that was only too large."""
    if not isinstance(rejected.error, MessageTooLarge):
        return None
    try:
        message, _ = frames.decode([rejected.frames[0], b"", b""])
    except FrameError:
        return None
    return message if isinstance(message, PutTrajectory) else None
