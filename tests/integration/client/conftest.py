"""A tiny training server and registry on real sockets: answer by the protocol, write down what came."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from relayrl_client.agent import Agent
from relayrl_client.builder import AgentBuilder
from relayrl_client.testing import CountingEnvironment
from relayrl_shared.errors import RelayRLError
from relayrl_shared.frames import pack_leaves, unpack_leaves
from relayrl_shared.messages import (
    Ack,
    Actions,
    ActorChange,
    AnyMessage,
    BlobChunk,
    ErrorReply,
    FetchBlob,
    FetchManifest,
    Goodbye,
    Heartbeat,
    HeartbeatReply,
    Hello,
    Limits,
    ManifestReply,
    Ok,
    PutSchema,
    PutTrajectory,
    RequestActions,
    Welcome,
)
from relayrl_shared.policy.artefact import encode_manifest
from relayrl_shared.policy.engine import LoadedPolicy, load_policy
from relayrl_shared.policy.manifest import PolicyArtefact
from relayrl_shared.sockets import Incoming, RouterServer
from relayrl_shared.spaces import ActionSpec, ObservationSpec
from relayrl_shared.testing.policies import make_artefact
from relayrl_shared.trajectory import TrajectoryMetadata

OBSERVATION = ObservationSpec.from_gymnasium(CountingEnvironment.observation_space)
ACTION = ActionSpec.from_gymnasium(CountingEnvironment.action_space)


def artefact(learner_update: int, **options: Any) -> PolicyArtefact:
    """The version that so many updates made; its number is one higher."""
    return make_artefact(
        OBSERVATION,
        ACTION,
        policy="run-1",
        policy_version=learner_update + 1,
        learner_update=learner_update,
        seed=learner_update,
        **options,
    )


def refused(error: RelayRLError) -> ErrorReply:
    """The answer that stands for an error."""
    return ErrorReply(code=error.code, message=str(error), retryable=error.retryable)


@dataclass
class TinyServer:
    """All services of a stack behind one ROUTER, answered by what the test sets.

    welcome: fields of the welcome. versions: what the registry has; the last is the latest.
    """

    welcome: dict[str, Any] = field(default_factory=dict)
    versions: list[PolicyArtefact] = field(default_factory=lambda: [artefact(0)])
    hellos: list[Hello] = field(default_factory=list)
    heartbeats: list[Heartbeat] = field(default_factory=list)
    changes: list[ActorChange] = field(default_factory=list)
    goodbyes: list[Goodbye] = field(default_factory=list)
    stored: list[TrajectoryMetadata] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    traceparents: list[str | None] = field(default_factory=list)
    refusal: RelayRLError | None = None
    knows_client: bool = True
    hello_failures: list[RelayRLError] = field(default_factory=list)
    """Answers to the next hellos, one each."""
    heartbeat_failure: RelayRLError | None = None
    change_failure: RelayRLError | None = None
    run_state: str = "active"
    lease_steps: int = 0
    lease_seconds: float = 10.0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self.port = 0
        self._loaded: dict[int, LoadedPolicy] = {}
        self._thread: threading.Thread | None = None

    # -- life ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Bind, the first time to any port and then to the same again, and serve."""
        self._router = RouterServer(f"tcp://127.0.0.1:{self.port}")
        self.port = self._router.port
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._router.run, args=(self._handle, self._stop))
        self._thread.start()

    def stop(self) -> None:
        """Vanish."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._router.close()
            self._thread = None

    def wait(self, condition: Callable[[], bool], timeout_seconds: float = 10.0) -> None:
        """Wait until what came satisfies a condition."""
        with self.changed:
            assert self.changed.wait_for(condition, timeout_seconds), "it did not come in time"

    # -- answers ---------------------------------------------------------------------------------------

    def _handle(self, batch: list[Incoming]) -> None:
        for incoming in batch:
            with self.changed:
                reply, *payload = self._answer(incoming)
                self.changed.notify_all()
            self._router.reply(incoming, reply, payload)

    def _answer(self, incoming: Incoming) -> tuple[Any, ...]:
        message = incoming.message
        self.traceparents.append(message.traceparent)
        if isinstance(message, Hello):
            return (self._hello(message),)
        if isinstance(message, Heartbeat):
            return (self._heartbeat(message),)
        if isinstance(message, ActorChange) and self.change_failure is not None:
            return (refused(self.change_failure),)
        if isinstance(message, ActorChange | Goodbye):
            (self.changes if isinstance(message, ActorChange) else self.goodbyes).append(message)  # type: ignore[arg-type]
            return (Ok(),)
        if isinstance(message, PutTrajectory):
            metadata = message.trajectory
            self.stored.append(metadata)
            return (Ack(spool_id=metadata.spool_id, run_id=metadata.run_id, sequence=metadata.sequence),)
        if isinstance(message, PutSchema):
            return (Ok(),)
        if isinstance(message, RequestActions):
            return self._act(message, incoming.payload)
        return self._registry(message)

    def _hello(self, hello: Hello) -> AnyMessage:
        self.hellos.append(hello)
        if self.hello_failures:
            failure = self.hello_failures.pop()
            return ErrorReply(code=failure.code, message=str(failure), retryable=failure.retryable)
        if self.refusal is not None:
            return ErrorReply(code=self.refusal.code, message=str(self.refusal))
        self.knows_client = True
        fields: dict[str, Any] = {
            "run_id": "0196f3a0-0000-7000-8000-000000000001",
            "run_name": hello.run.name,
            "policy": "run-1",
            "client_index": 0,
            "algorithm": "PPO",
            "hyperparameters": {},
            "pacing": "block",
            "max_policy_lag": 0,
            "rollout_steps": 4,
            "max_segment_steps": 1000,
            "first_rollout_index": 0,
            "learner_update": 0,
            "seed": 1,
            "allow_nan": False,
            "limits": Limits(max_message_bytes=1 << 20, max_in_flight=16, heartbeat_seconds=0.05),
        }
        return Welcome(**(fields | self.welcome))

    def _heartbeat(self, heartbeat: Heartbeat) -> AnyMessage:
        self.heartbeats.append(heartbeat)
        if self.heartbeat_failure is not None:
            return refused(self.heartbeat_failure)
        steps = min(self.lease_steps, heartbeat.lease_steps_wanted)
        self.lease_steps -= steps
        return HeartbeatReply(
            known=self.knows_client,
            learner_update=self.versions[-1].manifest.learner_update if self.versions else 0,
            run_state=self.run_state,
            lease_steps=steps,
            lease_expires_in_seconds=self.lease_seconds,
        )

    def _registry(self, message: AnyMessage) -> tuple[Any, ...]:
        if isinstance(message, FetchManifest):
            if not self.versions:
                return (ErrorReply(code="unknown_policy", message="none was published"),)
            wanted = message.policy_version
            manifests = [version.manifest for version in self.versions]
            found = next((m for m in manifests if m.policy_version == wanted), manifests[-1])
            reply = ManifestReply(policy=found.policy, policy_version=found.policy_version or 0)
            return reply, encode_manifest(found)
        assert isinstance(message, FetchBlob)
        for version in self.versions:
            manifest = version.manifest
            for digest, blob in (
                (manifest.graph_digest, version.graph),
                (manifest.weights_digest, version.weights),
                (manifest.golden_digest, version.golden),
            ):
                if digest == message.digest:
                    chunk = BlobChunk(digest=digest, offset=message.offset, total_bytes=len(blob))
                    return chunk, blob[message.offset :]
        return (ErrorReply(code="registry", message="no such blob"),)

    def _act(self, message: RequestActions, payload: list[memoryview]) -> tuple[Any, ...]:
        inputs = unpack_leaves(message.leaves, payload[0])
        self.requests.append({name: np.array(array) for name, array in inputs.items()})
        if not self.versions:
            return (ErrorReply(code="unknown_policy", message="none was published"),)
        version = self.versions[-1]
        number = version.manifest.policy_version or 0
        if number not in self._loaded:
            self._loaded[number] = load_policy(version)
        headers, frame = pack_leaves(self._loaded[number].run(inputs))
        reply = Actions(
            policy=message.policy,
            policy_version=number,
            learner_update=version.manifest.learner_update,
            rows=message.rows,
            leaves=headers,
        )
        return reply, frame


@pytest.fixture
def server() -> Iterator[TinyServer]:
    """A tiny server that runs."""
    tiny = TinyServer()
    tiny.start()
    yield tiny
    tiny.stop()


@pytest.fixture
def online_agent(server: TinyServer, tmp_path: Path) -> Callable[..., Agent]:
    """Builds agents of the tiny server; further options are those of `AgentBuilder`."""

    def build(**options: Any) -> Agent:
        address = f"127.0.0.1:{server.port}"
        chosen: dict[str, Any] = {
            "environment": CountingEnvironment(),
            "actor_count": 2,
            "actor_training_data_mode": "online_with_memory",
            "run_name": "tiny",
            "agent_listener_address": address,
            "trajectory_server_address": address,
            "model_server_address": address,
            "model_announcer_address": "127.0.0.1:9",
            "inference_server_address": address,
            "spool_directory": tmp_path / "spool",
            "start_seconds": 5.0,
            "request_seconds": 5.0,
        }
        agent = AgentBuilder(**(chosen | options)).build()
        fast = msgspec.structs.replace(agent.plan.timeouts, shutdown_seconds=3.0)
        object.__setattr__(agent.plan, "timeouts", fast)
        object.__setattr__(agent.plan, "policy_poll_seconds", 0.02)
        return agent

    return build
