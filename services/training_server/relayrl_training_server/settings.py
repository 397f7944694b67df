"""The training server's settings, read once by `main` and handed to supervisor, ingest and learner.

The tree is that of the original's training_server_config.json where a key still has a meaning. One file
serves all three kinds of process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from relayrl_shared.messages import Pacing
from relayrl_shared.settings import Address, HttpSettings, LogSettings, Settings, TelemetrySettings

ENVIRONMENT_PREFIX = "RELAYRL_TRAINING_SERVER"

Count = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0)]


class LimitSettings(Settings, frozen=True, kw_only=True):
    """Bounds on what clients may send and on what waits for the store.

    max_message_bytes: of one message, all frames. max_in_flight: unacknowledged trajectories that a client is
    told to keep to. max_queued, max_queued_bytes: validated trajectories that wait for their commit; above
    either, clients are told to try again. max_quarantined_frames_bytes: kept of a message that did not parse.
    """

    max_message_bytes: Count = 64 << 20
    max_in_flight: Count = 64
    max_queued: Count = 8192
    max_queued_bytes: Count = 512 << 20
    max_actors: Count = 100_000
    max_quarantined_frames_bytes: Count = 64 << 10
    quarantine_rows: Count = 10_000
    quarantine_bytes: Count = 256 << 20


class IngestSettings(Settings, frozen=True, kw_only=True):
    """How ingest serves.

    commit_rows, commit_delay_seconds, commit_bytes: a group commit takes what came within the delay, up to
    so many rows and bytes. heartbeat_seconds: told to clients. client_timeout_seconds: a client that is
    silent for so long has left. lease_seconds: how long granted steps stay granted without a heartbeat.
    retry_after_seconds: told with refusals that may succeed later.
    """

    http: HttpSettings = HttpSettings(port=8085)
    commit_rows: Count = 256
    commit_bytes: Count = 32 << 20
    commit_delay_seconds: Annotated[float, Meta(ge=0, le=1)] = 0.005
    heartbeat_seconds: Seconds = 2.0
    client_timeout_seconds: Seconds = 30.0
    lease_seconds: Seconds = 20.0
    retry_after_seconds: Seconds = 0.5
    drain_seconds: Seconds = 10.0
    limits: LimitSettings = LimitSettings()


class LearnerSettings(Settings, frozen=True, kw_only=True):
    """How a learner process serves; what it learns with are the run's hyperparameters."""

    http: HttpSettings = HttpSettings(port=0)


class SupervisorSettings(Settings, frozen=True, kw_only=True):
    """How children are kept.

    poll_seconds: how often runs and children are looked at. A child that dies is started again after
    restart_delay_seconds, doubled for each death in a row up to restart_delay_max_seconds; a child that lived
    for stable_seconds starts over. After restart_limit deaths in a row it stays down and readiness says so.
    drain_seconds: children get so long to stop before they are killed. hang_seconds: a child that makes no
    sign of life for so long is killed and started again; longer than the longest update or export.
    """

    poll_seconds: Seconds = 0.25
    restart_delay_seconds: Seconds = 0.1
    restart_delay_max_seconds: Seconds = 10.0
    restart_limit: Count = 10
    stable_seconds: Seconds = 5.0
    drain_seconds: Seconds = 20.0
    hang_seconds: Seconds = 300.0
    start_ingest: bool = True
    start_learners: bool = True


class ServerConfig(Settings, frozen=True, kw_only=True):
    """The section `training_server_config`.

    store: `sqlite:///DIR` or `postgresql://…`; None: SQLite in `directory`. directory: checkpoints and, with
    SQLite, the store. default_algorithm, default_hyperparameters (by algorithm), default_pacing and
    default_max_policy_lag: for runs whose creator says nothing. allow_new_runs: whether a hello may create a
    run. collection_timeout_seconds: how long a batch waits for silent actors; None: as the run's
    hyperparameters say. config_update_polling_seconds: how often the file is read again.
    """

    config_update_polling_seconds: Seconds = 10.0
    default_algorithm: str = "PPO"
    default_hyperparameters: dict[str, dict[str, Any]] = {}
    default_pacing: Pacing = "free"
    default_max_policy_lag: NotNegative = 1
    allow_new_runs: bool = True
    store: str | None = None
    allow_unsafe_store: bool = False
    directory: str = "training-server"
    collection_timeout_seconds: Seconds | None = None
    http: HttpSettings = HttpSettings(port=8082)
    ingest: IngestSettings = IngestSettings()
    learner: LearnerSettings = LearnerSettings()
    supervisor: SupervisorSettings = SupervisorSettings()


class TrainingAddresses(Settings, frozen=True, kw_only=True):
    """Where ingest binds, and where the registry takes publications."""

    agent_listener_address: Address = Address(port=7777)
    trajectory_server_address: Address = Address(port=7776)
    model_server_address: Address = Address(port=50051)


class ZmqAddresses(Settings, frozen=True, kw_only=True):
    """Addresses on the ZMQ data plane."""

    training_addresses: TrainingAddresses = TrainingAddresses()


class TransportConfig(Settings, frozen=True, kw_only=True):
    """The section `transport_config`."""

    zmq_addresses: ZmqAddresses = ZmqAddresses()


class TrainingServerSettings(Settings, frozen=True, kw_only=True):
    """Everything that a process of the training server is told."""

    training_server_config: ServerConfig = ServerConfig()
    transport_config: TransportConfig = TransportConfig()
    log: LogSettings = LogSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @property
    def server(self) -> ServerConfig:
        """The section `training_server_config`."""
        return self.training_server_config

    @property
    def addresses(self) -> TrainingAddresses:
        """The section `transport_config.zmq_addresses.training_addresses`."""
        return self.transport_config.zmq_addresses.training_addresses

    @property
    def store_url(self) -> str:
        """The trajectory store to open."""
        return self.server.store or f"sqlite:///{Path(self.server.directory).absolute()}"

    def run_directory(self, run_id: str) -> Path:
        """Where a run keeps its checkpoints and logs."""
        return Path(self.server.directory).absolute() / "runs" / run_id
