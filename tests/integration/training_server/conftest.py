"""An ingest on real sockets and a real SQLite store, and a client that speaks the wire by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from relayrl_shared import messages
from relayrl_shared.arrow_codec import RecordCodec, body_digest, encode_schema, schema_digest
from relayrl_shared.messages import ActorInfo, AnyMessage
from relayrl_shared.settings import load_settings
from relayrl_shared.sockets import Peer
from relayrl_shared.store.interface import TrajectoryStore
from relayrl_shared.testing.trajectories import make_trajectory, small_schema
from relayrl_shared.trajectory import RecordSchema, Trajectory
from relayrl_training_server.ingest import Ingest
from relayrl_training_server.settings import TrainingServerSettings

TIMEOUT_SECONDS = 20.0
STEPS = 8


def ingest_settings(directory: Path, **overrides: str) -> TrainingServerSettings:
    """Settings for a directory, free ports, no HTTP; overrides as of the command line, dots as `__`."""
    addresses = "transport_config.zmq_addresses.training_addresses"
    values = {
        "training_server_config.directory": str(directory),
        "training_server_config.ingest.http.enabled": "false",
        f"{addresses}.agent_listener_address.port": "0",
        f"{addresses}.trajectory_server_address.port": "0",
    }
    values |= {name.replace("__", "."): value for name, value in overrides.items()}
    return load_settings(TrainingServerSettings, environment_prefix="NONE", overrides=values)


class WireClient:
    """A client of one run that says exactly what a test wants."""

    def __init__(self, listener_port: int, trajectory_port: int, schema: RecordSchema | None = None) -> None:
        self.schema = schema or small_schema()
        self.codec = RecordCodec(self.schema)
        self.digest = schema_digest(self.schema)
        self.listener = Peer(f"tcp://127.0.0.1:{listener_port}")
        self.trajectories = Peer(f"tcp://127.0.0.1:{trajectory_port}")
        self.run_id = ""
        self.welcome: messages.Welcome | None = None

    def run_request(self, **changes: Any) -> messages.RunRequest:
        """The request for run `cartpole` with the specs of the schema."""
        fields: dict[str, Any] = {
            "name": "cartpole",
            "observation_spec": self.schema.observation,
            "action_spec": self.schema.action,
            "masked_leaves": self.schema.masked_leaves,
        }
        return messages.RunRequest(**{**fields, **changes})

    def hello(self, client_id: str = "client", actors: int = 1, **changes: Any) -> messages.Welcome:
        """Joins the run; keeps its id."""
        announced = tuple(
            ActorInfo(actor_id=f"{client_id}-{index}", actor_index=index, environment_instance_id="instance")
            for index in range(actors)
        )
        hello = messages.Hello(client_id=client_id, run=self.run_request(**changes), actors=announced)
        welcome = self.ask(hello)
        assert isinstance(welcome, messages.Welcome)
        self.run_id, self.welcome = welcome.run_id, welcome
        return welcome

    def ask(self, message: AnyMessage) -> AnyMessage:
        """Asks the agent listener."""
        return self.listener.request(message, timeout_seconds=TIMEOUT_SECONDS)[0]

    def put_schema(self) -> None:
        """Sends the schema."""
        message = messages.PutSchema(digest=self.digest)
        reply, _ = self.trajectories.request(
            message, [encode_schema(self.schema)], timeout_seconds=TIMEOUT_SECONDS
        )
        assert isinstance(reply, messages.Ok)

    def make(self, sequence: int, **changes: Any) -> tuple[messages.PutTrajectory, list[bytes]]:
        """A valid trajectory message of the run; `changes` replace metadata fields."""
        made = make_trajectory(
            self.schema,
            STEPS,
            seed=sequence,
            **{
                "run_id": self.run_id,
                "policy": "cartpole",
                "sequence": sequence,
                "schema_digest": self.digest,
                **changes,
            },
        )
        return self.encode(made)

    def encode(self, made: Trajectory) -> tuple[messages.PutTrajectory, list[bytes]]:
        """The message of a trajectory, with the digest of its payload."""
        body = self.codec.encode_columns(made.columns)
        final = self.codec.encode_final_observation(made.final_observation) if made.final_observation else b""
        digest = made.metadata.body_digest or body_digest(body, final or None)
        metadata = msgspec.structs.replace(made.metadata, body_digest=digest)
        return messages.PutTrajectory(trajectory=metadata), [body, final]

    def send(self, message: messages.PutTrajectory, payload: list[bytes]) -> AnyMessage:
        """Sends a trajectory and waits for its answer."""
        return self.trajectories.request(message, payload, timeout_seconds=TIMEOUT_SECONDS)[0]

    def put(self, sequence: int, **changes: Any) -> AnyMessage:
        """Makes and sends a trajectory."""
        return self.send(*self.make(sequence, **changes))

    def close(self) -> None:
        """Closes both connections."""
        self.listener.close()
        self.trajectories.close()


class RunningIngest:
    """An ingest in a thread."""

    def __init__(self, settings: TrainingServerSettings, store: TrajectoryStore | None = None) -> None:
        self.ingest = Ingest(settings, store=store)
        self.stop_event = threading.Event()
        self.failures: list[BaseException] = []
        self._thread = threading.Thread(target=self._run)
        self._clients: list[WireClient] = []
        self._thread.start()

    def _run(self) -> None:
        try:
            self.ingest.run(self.stop_event)
        except Exception as error:  # noqa: BLE001  # the test's thread looks at it
            self.failures.append(error)

    @property
    def store(self) -> TrajectoryStore:
        """The store that it writes."""
        return self.ingest.store

    def client(self, schema: RecordSchema | None = None) -> WireClient:
        """A new client, closed with the ingest."""
        client = WireClient(self.ingest.agent_listener.port, self.ingest.trajectory_server.port, schema)
        self._clients.append(client)
        return client

    def stop(self) -> None:
        """Drains it; clients stay open."""
        self.stop_event.set()
        self._thread.join()

    def close(self) -> None:
        """Drains and closes everything."""
        self.stop()
        for client in self._clients:
            client.close()
        self.ingest.close()
        assert self.failures == []


StartIngest = Callable[..., RunningIngest]


@contextmanager
def running(
    settings: TrainingServerSettings, store: TrajectoryStore | None = None
) -> Iterator[RunningIngest]:
    """An ingest for the length of a block."""
    served = RunningIngest(settings, store)
    try:
        yield served
    finally:
        served.close()


@pytest.fixture
def start_ingest(tmp_path: Path) -> Iterator[StartIngest]:
    """Starts ingests in one directory, one after another or with changed settings; closes what is left."""
    started: list[RunningIngest] = []

    def start(store: TrajectoryStore | None = None, **overrides: str) -> RunningIngest:
        started.append(RunningIngest(ingest_settings(tmp_path / "server", **overrides), store))
        return started[-1]

    yield start
    for served in started:
        served.close()


@pytest.fixture
def served(start_ingest: StartIngest) -> RunningIngest:
    """An ingest with default settings."""
    return start_ingest()


@pytest.fixture
def client(served: RunningIngest) -> WireClient:
    """A client of `served` that has joined and sent its schema."""
    client = served.client()
    client.hello()
    client.put_schema()
    return client


@pytest.fixture
def wire_client() -> Iterator[Callable[[int, int], WireClient]]:
    """Makes clients for any ports and closes them."""
    made: list[WireClient] = []

    def make(listener_port: int, trajectory_port: int) -> WireClient:
        made.append(WireClient(listener_port, trajectory_port))
        return made[-1]

    yield make
    for client in made:
        client.close()
