"""Answers clients on the agent listener: hello, heartbeat, actor changes, goodbye (contracts E, K3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from relayrl_shared import logs, messages
from relayrl_shared.errors import ContractError, RelayRLError, SpecMismatch, UnknownRun
from relayrl_shared.messages import ActorInfo, AnyMessage, SpoolReport
from relayrl_shared.sockets import Incoming, RouterServer
from relayrl_shared.store.interface import Run, TrajectoryStore
from relayrl_training_server.admission import find_or_create_run
from relayrl_training_server.algorithms.configs import needs
from relayrl_training_server.ingest_metrics import IngestMetrics
from relayrl_training_server.metadata import check_id
from relayrl_training_server.settings import ServerConfig

LOG = logs.get_logger(__name__)

_MAX_STEPS = 2**62


class AgentListener:
    """The handler of the agent listener's socket; serves from the socket's thread."""

    def __init__(
        self, store: TrajectoryStore, config: ServerConfig, metrics: IngestMetrics, router: RouterServer
    ) -> None:
        self._store = store
        self._config = config
        self._metrics = metrics
        self._router = router
        self._handlers: Mapping[type[Any], Callable[[Any], AnyMessage]] = {
            messages.Hello: self._hello,
            messages.Heartbeat: self._heartbeat,
            messages.ActorChange: self._actor_change,
            messages.Goodbye: self._goodbye,
        }

    def handle(self, batch: list[Incoming]) -> None:
        """Answers every message; the failure of one is its own answer only."""
        for incoming in batch:
            self._answer(incoming)

    def _answer(self, incoming: Incoming) -> None:
        kind = type(incoming.message)
        outcome = "ok"
        try:
            if kind not in self._handlers:
                raise ContractError(f"the agent listener takes no {kind.__struct_config__.tag} messages")
            self._router.reply(incoming, self._handlers[kind](incoming.message))
        except RelayRLError as error:
            outcome = error.code
            self._router.reply_error(incoming, error)
        except Exception as error:  # a fault in one answer must not leave the others unanswered
            outcome = RelayRLError.code
            LOG.error("a client's message could not be answered", exc_info=error)
            self._router.reply_error(incoming, error)
        label = str(kind.__struct_config__.tag) if kind in self._handlers else "other"
        self._metrics.clients.labels(label, outcome).inc()

    # ---- hello --------------------------------------------------------------------------------------------

    def _hello(self, hello: messages.Hello) -> messages.Welcome:
        self._check_client(hello.client_id, hello.actors, hello.spools)
        run = find_or_create_run(self._store, hello.run, self._config)
        first_rollout_index = self._store.learner_update(run.run_id)
        client_index = self._store.join_client(run.run_id, hello.client_id, hello.actors, first_rollout_index)
        self._store.touch_client(run.run_id, hello.client_id, hello.spools)
        LOG.info(
            "client joined",
            run=run.name,
            client_id=hello.client_id,
            client_index=client_index,
            actors=len(hello.actors),
            first_rollout_index=first_rollout_index,
        )
        return self._welcome(run, client_index, first_rollout_index)

    def _welcome(self, run: Run, client_index: int, first_rollout_index: int) -> messages.Welcome:
        demands = needs(run.algorithm, run.hyperparameters)
        ingest = self._config.ingest
        return messages.Welcome(
            run_id=run.run_id,
            run_name=run.name,
            policy=run.name,
            client_index=client_index,
            algorithm=run.algorithm,
            hyperparameters=run.hyperparameters,
            pacing=run.pacing,
            max_policy_lag=run.max_policy_lag,
            rollout_steps=demands.rollout_steps,
            max_segment_steps=demands.max_segment_steps,
            first_rollout_index=first_rollout_index,
            learner_update=first_rollout_index,
            seed=run.seed,
            allow_nan=run.allow_nan,
            limits=messages.Limits(
                max_message_bytes=ingest.limits.max_message_bytes,
                max_in_flight=ingest.limits.max_in_flight,
                heartbeat_seconds=ingest.heartbeat_seconds,
            ),
        )

    def _check_client(
        self, client_id: str, actors: Sequence[ActorInfo], spools: Sequence[SpoolReport]
    ) -> None:
        check_id("client_id", client_id)
        limit = self._config.ingest.limits.max_actors
        if len(actors) > limit:
            raise ContractError(f"{len(actors)} actors in one message; the limit is {limit}")
        for actor in actors:
            _check_actor(actor)
        if len({actor.actor_id for actor in actors}) != len(actors):
            raise ContractError("two actors have one actor_id")
        if len({actor.actor_index for actor in actors}) != len(actors):
            raise ContractError("two actors have one actor_index: their noise would be the same")
        for spool in spools:
            _check_spool(spool)

    # ---- afterwards ---------------------------------------------------------------------------------------

    def _heartbeat(self, heartbeat: messages.Heartbeat) -> messages.HeartbeatReply:
        self._check_client(heartbeat.client_id, (), heartbeat.spools)
        run = self._run(heartbeat.run_id)
        known = self._store.touch_client(run.run_id, heartbeat.client_id, heartbeat.spools)
        lease_steps, expires = self._grant(run, heartbeat) if known else (0, 0.0)
        return messages.HeartbeatReply(
            known=known,
            learner_update=self._store.learner_update(run.run_id),
            run_state=run.state,
            lease_steps=lease_steps,
            lease_expires_in_seconds=expires,
        )

    def _grant(self, run: Run, heartbeat: messages.Heartbeat) -> tuple[int, float]:
        """Steps granted now, and seconds until all that the client holds expires; 0 where it holds none."""
        wanted, used = heartbeat.lease_steps_wanted, heartbeat.lease_steps_used
        if not (0 <= wanted <= _MAX_STEPS and 0 <= used <= _MAX_STEPS):
            raise ContractError(f"lease_steps_wanted {wanted} and lease_steps_used {used} are out of range")
        if not wanted and not used and not _takes_leases(run):
            return 0, 0.0
        ttl = self._config.ingest.lease_seconds
        return self._store.grant_steps(run.run_id, heartbeat.client_id, wanted, used, ttl), ttl

    def _actor_change(self, change: messages.ActorChange) -> messages.Ok:
        self._check_client(change.client_id, change.added, ())
        run = self._run(change.run_id)
        first_rollout_index = self._store.learner_update(run.run_id)
        self._store.change_actors(
            run.run_id, change.client_id, change.added, change.removed, first_rollout_index
        )
        return messages.Ok()

    def _goodbye(self, goodbye: messages.Goodbye) -> messages.Ok:
        self._check_client(goodbye.client_id, (), goodbye.spools)
        run = self._run(goodbye.run_id)
        self._store.touch_client(run.run_id, goodbye.client_id, goodbye.spools)
        self._store.leave_client(run.run_id, goodbye.client_id)
        LOG.info("client left", run=run.name, client_id=goodbye.client_id)
        return messages.Ok()

    def _run(self, run_id: str) -> Run:
        run = self._store.run_by_id(run_id)
        if run is None:
            raise UnknownRun(f"there is no run with the id {run_id[:100]!r}; say hello again")
        return run


def _takes_leases(run: Run) -> bool:
    """Whether the run's clients act on granted steps (contracts E2), which heartbeats renew."""
    return run.pacing == "block" and needs(run.algorithm, run.hyperparameters).rollout_steps is None


def _check_actor(actor: ActorInfo) -> None:
    check_id("actor_id", actor.actor_id)
    check_id("environment_instance_id", actor.environment_instance_id)
    if actor.agent_id is not None:
        check_id("agent_id", actor.agent_id)
    if not 0 <= actor.actor_index < 2**32:
        raise SpecMismatch(f"actor_index {actor.actor_index} is outside 0 … 2**32 - 1")


def _check_spool(spool: SpoolReport) -> None:
    check_id("spool_id", spool.spool_id)
    check_id("run_id", spool.run_id)
    numbers = [spool.highest_accepted, spool.oldest_unacknowledged or 0, *sum(spool.dropped, ())]
    if not all(0 <= number < 2**63 for number in numbers):
        raise ContractError(f"the report of spool {spool.spool_id} has numbers out of range")
