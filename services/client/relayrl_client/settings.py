"""The client's settings: `client_config.json`, with the original's key tree where a key still has a meaning.

Read once by `AgentBuilder` or the standalone client and passed down as values.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from relayrl_shared.messages import Pacing
from relayrl_shared.settings import Address, HttpSettings, Settings, TelemetrySettings

ENVIRONMENT_PREFIX = "RELAYRL_CLIENT"

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]

ActorInferenceMode = Literal["local", "server"]
ActorTrainingDataMode = Literal[
    "disabled",
    "offline_with_memory",
    "offline_with_files",
    "offline_with_files_and_memory",
    "online",
    "online_with_memory",
    "online_with_files",
    "online_with_files_and_memory",
]


class TrajectoryFileSettings(Settings, frozen=True, kw_only=True):
    """Where the file sink writes, and how."""

    directory: str = "experiment_data"
    file_type: Literal["Arrow"] = "Arrow"


class SpoolSettings(Settings, frozen=True, kw_only=True):
    """Where accepted trajectories wait for the server, and what happens at `limit_bytes`."""

    directory: str = "spool"
    limit_bytes: Count = 4 << 30
    at_limit: Literal["block", "refuse", "drop_oldest"] = "block"


class TimeoutSettings(Settings, frozen=True, kw_only=True):
    """Deadlines. start: for the servers and the first policy version. request: of a call that gives none."""

    start_seconds: Seconds = 180.0
    request_seconds: Seconds = 60.0
    flush_seconds: Seconds = 30.0
    shutdown_seconds: Seconds = 10.0


class LimitSettings(Settings, frozen=True, kw_only=True):
    """Bounds on memory. max_traj_length: steps of a segment where no server says otherwise.

    memory_trajectories_per_actor: what the memory sink keeps; the oldest goes first, counted.
    actor_idle_seconds: an actor without a call for so long leaves its episode (its last step is dropped and
    counted); None: never.
    """

    max_traj_length: Count = 1000
    max_open_segment_bytes: Count = 1 << 30
    memory_trajectories_per_actor: Count = 1000
    actor_idle_seconds: Seconds | None = None


class RunSettings(Settings, frozen=True, kw_only=True):
    """The run to join or create. What is None is the server's choice, or the run's where it exists."""

    name: str = "default"
    algorithm: str | None = None
    pacing: Pacing | None = None
    max_policy_lag: Annotated[int, Meta(ge=0)] | None = None
    seed: int | None = None
    allow_nan: bool | None = None


class ClientSection(Settings, frozen=True, kw_only=True):
    """The `client_config` section. http: health, metrics and info of this client, off by default."""

    client_id: str | None = None
    actor_count: Annotated[int, Meta(ge=0)] = 0
    actor_inference_mode: ActorInferenceMode = "local"
    actor_training_data_mode: ActorTrainingDataMode = "online"
    router_scale: Count = 1
    router_buffer_size_per_actor: Count = 1000
    init_hyperparameters: dict[str, dict[str, Any]] = {}
    run: RunSettings = RunSettings()
    trajectory_file_output: TrajectoryFileSettings = TrajectoryFileSettings()
    spool: SpoolSettings = SpoolSettings()
    timeouts: TimeoutSettings = TimeoutSettings()
    limits: LimitSettings = LimitSettings()
    policy_poll_seconds: Seconds = 1.0
    http: HttpSettings = HttpSettings(enabled=False, port=8081)
    telemetry: TelemetrySettings = TelemetrySettings()


class InferenceAddresses(Settings, frozen=True, kw_only=True):
    """Where the inference server is."""

    inference_server_address: Address = Address(port=7800)


class TrainingAddresses(Settings, frozen=True, kw_only=True):
    """Where the training server and the model registry are."""

    model_server_address: Address = Address(port=50051)
    model_announcer_address: Address = Address(port=50052)
    trajectory_server_address: Address = Address(port=7776)
    agent_listener_address: Address = Address(port=7777)


class ZmqAddresses(Settings, frozen=True, kw_only=True):
    """The data plane."""

    inference_addresses: InferenceAddresses = InferenceAddresses()
    training_addresses: TrainingAddresses = TrainingAddresses()


class LocalModelModule(Settings, frozen=True, kw_only=True):
    """The folder of a policy artefact that acts where no default_model is passed; None: there is none."""

    directory: str | None = None


class TransportSection(Settings, frozen=True, kw_only=True):
    """The `transport_config` section."""

    zmq_addresses: ZmqAddresses = ZmqAddresses()
    local_model_module: LocalModelModule = LocalModelModule()


class ClientSettings(Settings, frozen=True, kw_only=True):
    """Everything that a client is told."""

    client_config: ClientSection = ClientSection()
    transport_config: TransportSection = TransportSection()
