"""Puts the parts of a running client together, and takes them apart in the right order; driven by `Agent`.

`Plan` says what is wanted; `Standing` is what is known once a run is joined (or, offline, made up); `Runtime`
holds the parts that live from `start` to `shutdown`.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from relayrl_client.actors import ActorDetails, ActorTable
from relayrl_client.closing import RecordIdentity
from relayrl_client.coordinator import Coordinator
from relayrl_client.idle import IdleWatch
from relayrl_client.inference import Inference, LocalInference, ServerInference
from relayrl_client.pacing import Admission, FreePacing, LeasePacing, RolloutPacing
from relayrl_client.policy_slot import PolicySlot
from relayrl_client.recorder import Recorder, RecordLimits
from relayrl_client.segments import Delivery
from relayrl_client.session import Session, SessionLinks
from relayrl_client.settings import (
    ActorInferenceMode,
    ActorTrainingDataMode,
    LimitSettings,
    TimeoutSettings,
    TransportSection,
)
from relayrl_client.storage import StepLayout, StepStorage
from relayrl_shared import telemetry
from relayrl_shared.arrow_codec import schema_digest
from relayrl_shared.errors import PeerTimeout, from_code
from relayrl_shared.identifiers import new_id
from relayrl_shared.messages import ActorInfo, Limits, Pacing, RunRequest, SpoolReport, Welcome
from relayrl_shared.noise import NoiseSource
from relayrl_shared.policy.manifest import PolicyArtefact
from relayrl_shared.registry_client import PolicyWatcher, RegistryClient
from relayrl_shared.settings import HttpSettings, TelemetrySettings
from relayrl_shared.trajectory import RecordSchema

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a client is to be, checked by the builder.

    run: what hello asks for; its name and seed serve offline, too. default_model: acts from the start; None
    where the run's own policy acts. policy: the policy that the inference server is asked for offline.
    """

    schema: RecordSchema
    run: RunRequest
    client_id: str
    actor_count: int
    actor_inference_mode: ActorInferenceMode
    actor_training_data_mode: ActorTrainingDataMode
    transport: TransportSection
    limits: LimitSettings
    timeouts: TimeoutSettings
    default_model: PolicyArtefact | None = None
    policy: str | None = None
    policy_poll_seconds: float = 1.0
    http: HttpSettings = field(default_factory=lambda: HttpSettings(enabled=False))
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)

    @property
    def is_online(self) -> bool:
        """Whether trajectories go to a training server."""
        return self.actor_training_data_mode.startswith("online")

    @property
    def is_recorded(self) -> bool:
        """Whether steps are kept at all."""
        return self.actor_training_data_mode != "disabled"


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a client stands: its run, its place in it, and the rules that it plays by."""

    schema: RecordSchema
    schema_digest: str
    run_id: str
    policy: str
    client_id: str
    client_index: int
    seed: int
    allow_nan: bool
    pacing: Pacing = "free"
    max_policy_lag: int = 0
    rollout_steps: int | None = None
    max_segment_steps: int = 1000
    first_rollout_index: int = 0
    limits: Limits | None = None

    @classmethod
    def offline(cls, plan: Plan) -> Standing:
        """A run of its own, of one client."""
        model = plan.default_model
        return cls(
            schema=plan.schema,
            schema_digest=schema_digest(plan.schema),
            run_id=new_id(),
            policy=model.manifest.policy if model is not None else plan.policy or plan.run.name,
            client_id=plan.client_id,
            client_index=0,
            seed=plan.run.seed or 0,
            allow_nan=bool(plan.run.allow_nan),
            max_segment_steps=plan.limits.max_traj_length,
        )

    @classmethod
    def online(cls, plan: Plan, welcome: Welcome) -> Standing:
        """What the training server said."""
        return cls(
            schema=plan.schema,
            schema_digest=schema_digest(plan.schema),
            run_id=welcome.run_id,
            policy=welcome.policy,
            client_id=plan.client_id,
            client_index=welcome.client_index,
            seed=welcome.seed,
            allow_nan=welcome.allow_nan,
            pacing=welcome.pacing,
            max_policy_lag=welcome.max_policy_lag,
            rollout_steps=welcome.rollout_steps,
            max_segment_steps=welcome.max_segment_steps,
            first_rollout_index=welcome.first_rollout_index,
            limits=welcome.limits,
        )


class OpenDelivery(Protocol):
    """Makes what takes the closed segments, once the run is known."""

    def __call__(self, standing: Standing) -> Delivery:
        """A delivery that is ready to take segments."""


class ReportsSpools(Protocol):
    """A delivery with a spool: reports what it holds of a run (contracts C2)."""

    def spool_reports(self, run_id: str) -> Sequence[SpoolReport]:
        """One report a spool."""


@dataclass(slots=True)
class Runtime:
    """The parts of a running client."""

    plan: Plan
    standing: Standing
    table: ActorTable
    recorder: Recorder
    inference: Inference
    coordinator: Coordinator
    delivery: Delivery
    stopping: threading.Event
    slot: PolicySlot | None = None
    session: Session | None = None
    watcher: PolicyWatcher | None = None
    http_port: int | None = None
    """Where the control plane answers; None where it is off."""
    closing: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def learner_update(self) -> int:
        """The highest number of finished updates that this client knows of."""
        known = 0 if self.session is None else self.session.learner_update
        if self.slot is not None and not self.slot.is_empty:
            known = max(known, self.slot.current.learner_update)
        return known

    def check_run(self) -> None:
        """Nothing while the run goes on.

        Raises:
            RunFailed, UnknownRun, RunMismatch: what the training server said of it.
        """
        failure = None if self.session is None else self.session.failure
        if failure is not None:
            raise from_code(failure.code, str(failure))  # a new one: it may be raised in many threads

    def gives_up(self) -> bool:
        """Whether every wait ends now, since the client stops. Raises as `check_run`."""
        self.check_run()
        return self.stopping.is_set()

    def servers_are_up(self) -> bool:
        """Whether training server and registry answer (contracts E3)."""
        session_up = self.session is None or self.session.is_up
        return session_up and (self.watcher is None or self.watcher.last_error is None)

    def spool_reports(self) -> Sequence[SpoolReport]:
        """What the spools hold of this run."""
        reports = getattr(self.delivery, "spool_reports", None)
        return () if reports is None else tuple(reports(self.standing.run_id))

    def announced(self) -> list[ActorInfo]:
        """The actors that the learner waits for."""
        with self.recorder.lock:
            return [announce(row, detail) for row, detail in self.table.live() if is_announced(detail)]


def is_announced(detail: ActorDetails) -> bool:
    """Whether a learner waits for an actor: it trains and is recorded."""
    return detail.recorded and detail.purpose == "train"


def announce(row: int, detail: ActorDetails) -> ActorInfo:
    """An actor as hello and actor_change carry it."""
    return ActorInfo(
        actor_id=detail.actor_id,
        actor_index=row,
        agent_id=detail.agent_id,
        environment_instance_id=detail.environment.environment_id,
    )


def open_runtime(
    plan: Plan,
    table: ActorTable,
    open_delivery: OpenDelivery,
    offline_standing: Callable[[Plan], Standing] = Standing.offline,
) -> Runtime:
    """Join the run, load the first policy version and get ready to act.

    Args:
        plan: what is wanted.
        table: with the first actors in it, so that hello names them.
        open_delivery: makes what takes the segments.
        offline_standing: the rules to play by where there is no server.

    Raises:
        PeerTimeout: a server did not answer, or no policy version came, within `start_seconds`.
        RelayRLError: the run, the policy or the spool refuses.
    """
    with contextlib.ExitStack() as closing:
        closing.callback(_open_tracing(plan.telemetry).close)
        deadline = time.monotonic() + plan.timeouts.start_seconds
        session: Session | None = None
        if plan.is_online:
            session, standing = _join(plan, table, closing)
        else:
            standing = offline_standing(plan)
        runtime = _assemble(plan, standing, table, open_delivery, session, closing)
        if session is not None:
            session.start(_links(runtime))
            closing.callback(session.stop)
        _follow_policy(runtime, deadline, closing)
        if plan.limits.actor_idle_seconds is not None:
            closing.callback(IdleWatch(runtime.coordinator, plan.limits.actor_idle_seconds).close)
        if plan.http.enabled:
            from relayrl_client.control import serve_control  # a web server is loaded where it is asked for

            runtime.http_port = closing.enter_context(serve_control(runtime, plan.http)).port
        runtime.closing = closing.pop_all()
        return runtime


def _open_tracing(settings: TelemetrySettings) -> telemetry.Telemetry:
    """The export of traces; without OpenTelemetry installed there is none, whatever the environment says."""
    try:
        return telemetry.configure("client", settings)
    except ImportError as exc:
        _log.warning(
            "no traces are sent to %s: %s; install relayrl-shared[otlp]", settings.otlp_endpoint, exc
        )
        return telemetry.Telemetry(active=False)


def _join(plan: Plan, table: ActorTable, closing: contextlib.ExitStack) -> tuple[Session, Standing]:
    address = plan.transport.zmq_addresses.training_addresses.agent_listener_address.zmq
    session = Session(address, plan.client_id, plan.run)
    closing.callback(session.close)
    actors = [announce(row, detail) for row, detail in table.live() if is_announced(detail)]
    welcome = session.join(actors, plan.timeouts.start_seconds)
    for index in range(len(table.handles)):
        table.environments.first_rollout[index] = welcome.first_rollout_index
        table.environments.rollout[index] = welcome.first_rollout_index
    return session, Standing.online(plan, welcome)


def _assemble(
    plan: Plan,
    standing: Standing,
    table: ActorTable,
    open_delivery: OpenDelivery,
    session: Session | None,
    closing: contextlib.ExitStack,
) -> Runtime:
    storage = StepStorage(
        StepLayout(plan.schema),
        max_segment_steps=standing.max_segment_steps,
        limit_bytes=plan.limits.max_open_segment_bytes,
    )
    recorder = Recorder(
        table,
        storage,
        RecordIdentity(
            standing.run_id,
            standing.policy,
            standing.client_id,
            standing.client_index,
            standing.schema_digest,
        ),
        RecordLimits(standing.max_segment_steps, standing.rollout_steps),
    )
    runtime: Runtime

    def check_run() -> None:
        runtime.check_run()

    def gives_up() -> bool:
        return runtime.gives_up()

    def servers_are_up() -> bool:
        return runtime.servers_are_up()

    slot, inference = _inference(plan, standing, closing, check_run)
    delivery = open_delivery(standing)
    closing.callback(delivery.close, plan.timeouts.shutdown_seconds)
    stopping = threading.Event()
    closing.callback(stopping.set)
    admission = _admission(standing, recorder, inference, session, gives_up, servers_are_up)
    coordinator = Coordinator(
        plan.schema,
        recorder,
        inference,
        NoiseSource(standing.seed, standing.client_index),
        admission,
        delivery,
        allow_nan=standing.allow_nan,
        timeout_seconds=plan.timeouts.request_seconds,
    )
    runtime = Runtime(
        plan, standing, table, recorder, inference, coordinator, delivery, stopping, slot, session
    )
    return runtime


def _inference(
    plan: Plan, standing: Standing, closing: contextlib.ExitStack, check: Callable[[], None]
) -> tuple[PolicySlot | None, Inference]:
    if plan.actor_inference_mode == "server":
        address = plan.transport.zmq_addresses.inference_addresses.inference_server_address.zmq
        remote = ServerInference(address, standing.policy, plan.schema, check=check)
        closing.callback(remote.close)
        return None, remote
    slot = PolicySlot(plan.schema)
    if plan.default_model is not None:
        slot.load(plan.default_model)
    return slot, LocalInference(slot, check)


def _admission(
    standing: Standing,
    recorder: Recorder,
    inference: Inference,
    session: Session | None,
    gives_up: Callable[[], bool],
    servers_are_up: Callable[[], bool],
) -> Admission:
    if standing.pacing == "free" or session is None:
        return FreePacing()
    if standing.rollout_steps is not None:
        return RolloutPacing(inference, recorder, standing.max_policy_lag, gives_up, servers_are_up)
    return LeasePacing(gives_up, session.wake, servers_are_up, standing.max_policy_lag)


def _links(runtime: Runtime) -> SessionLinks:
    admission = runtime.coordinator.admission
    policy = runtime.standing.policy
    links = SessionLinks(
        actors=runtime.announced,
        spools=runtime.spool_reports,
        policy_versions=lambda: {policy: runtime.inference.policy_version},
    )
    if not isinstance(admission, LeasePacing):
        return links
    return SessionLinks(
        links.actors, links.spools, links.policy_versions, lease=admission.report, on_lease=admission.grant
    )


def _follow_policy(runtime: Runtime, deadline: float, closing: contextlib.ExitStack) -> None:
    """Follow the run's policy where it acts in this process, and wait for its first version.

    Raises:
        PeerTimeout: there was none in time.
    """
    plan, slot = runtime.plan, runtime.slot
    if slot is None:
        if runtime.inference.admit(0, deadline, runtime.gives_up):
            return
        raise _no_version(runtime, "is the inference server running, and inference_server_address right?")
    if not plan.is_online:
        return
    addresses = plan.transport.zmq_addresses.training_addresses
    registry = RegistryClient(addresses.model_server_address.zmq)
    closing.callback(registry.close)
    watcher = PolicyWatcher(
        registry,
        addresses.model_announcer_address.zmq,
        runtime.standing.policy,
        slot.load,
        plan.policy_poll_seconds,
    )
    closing.callback(watcher.close)
    runtime.watcher = watcher
    if not slot.wait_until(lambda acting: True, deadline, runtime.gives_up):
        raise _no_version(
            runtime,
            slot.last_refusal
            or watcher.last_refusal
            or watcher.last_error
            or "the learner has published none",
        )


def _no_version(runtime: Runtime, why: str) -> PeerTimeout:
    seconds = runtime.plan.timeouts.start_seconds
    return PeerTimeout(f"no version of policy {runtime.standing.policy} within {seconds:g} s: {why}")
