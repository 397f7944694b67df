"""The messages of wire protocol 1: one struct a kind; `frames` turns them into bytes and back.

Every message is a header (one of these structs, msgpack, tagged by `kind`) and raw payload frames. The
comment above each class says who sends it to whom and what its payload frames are. docs/wire-protocol.md is
the specification that another language follows.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from relayrl_shared.spaces import ActionSpec, ObservationSpec
from relayrl_shared.trajectory import TrajectoryMetadata

PROTOCOL_VERSION = 1

Pacing = Literal["block", "free"]


class Message(msgspec.Struct, kw_only=True, frozen=True, tag_field="kind"):
    """Fields that every message has. `request_id` is chosen by the asker and returned in the answer."""

    version: int = PROTOCOL_VERSION
    request_id: int = 0
    traceparent: str | None = None


# any server → asker: the request failed. Payload: none.
class ErrorReply(Message, kw_only=True, frozen=True, tag="error"):
    """`code` is a code of `errors`; `retryable` says whether the same request may succeed later."""

    code: str
    message: str
    retryable: bool = False
    retry_after_seconds: float | None = None


# ---- agent listener (training server ingest) --------------------------------------------------------------


class RunRequest(msgspec.Struct, kw_only=True, frozen=True):
    """The run that a client wants to feed. Only what the client sets explicitly is in here (contracts K3)."""

    name: str
    algorithm: str | None = None  # None: join an existing run, or the server's default for a new one
    hyperparameters: dict[str, Any] = {}
    observation_spec: ObservationSpec
    action_spec: ActionSpec
    masked_leaves: tuple[str, ...] = ()
    pacing: Pacing | None = None
    max_policy_lag: int | None = None
    seed: int | None = None
    allow_nan: bool | None = None


class ActorInfo(msgspec.Struct, kw_only=True, frozen=True):
    """An actor as its client announces it."""

    actor_id: str
    actor_index: int
    agent_id: str | None = None
    environment_instance_id: str


class SpoolReport(msgspec.Struct, kw_only=True, frozen=True):
    """What a spool holds for one run (contracts C2). `dropped` are inclusive ranges of sequences."""

    spool_id: str
    run_id: str
    highest_accepted: int
    oldest_unacknowledged: int | None
    dropped: tuple[tuple[int, int], ...] = ()


# client → agent listener. Answer: welcome.
class Hello(Message, kw_only=True, frozen=True, tag="hello"):
    """Joins a run, which is created if it is absent and that is allowed."""

    client_id: str
    run: RunRequest
    actors: tuple[ActorInfo, ...] = ()
    spools: tuple[SpoolReport, ...] = ()


class Limits(msgspec.Struct, kw_only=True, frozen=True):
    """What the server takes. In flight counts unacknowledged trajectories of one client."""

    max_message_bytes: int
    max_in_flight: int
    heartbeat_seconds: float


# agent listener → client.
class Welcome(Message, kw_only=True, frozen=True, tag="welcome"):
    """The run as it is. rollout_steps None: batches are whole episodes. learner_update: finished updates."""

    run_id: str
    run_name: str
    policy: str
    client_index: int
    algorithm: str
    hyperparameters: dict[str, Any]
    pacing: Pacing
    max_policy_lag: int
    rollout_steps: int | None
    max_segment_steps: int
    first_rollout_index: int
    learner_update: int
    seed: int
    allow_nan: bool
    limits: Limits


# client → agent listener, every `heartbeat_seconds`. Answer: heartbeat_reply.
class Heartbeat(Message, kw_only=True, frozen=True, tag="heartbeat"):
    """Keeps the client's actors alive, proves the audit identity, reports versions in use, asks for steps."""

    client_id: str
    run_id: str
    spools: tuple[SpoolReport, ...] = ()
    policy_versions: dict[str, int] = {}
    lease_steps_wanted: int = 0
    lease_steps_used: int = 0
    """Steps of granted leases that have become recorded data since the last heartbeat."""


# agent listener → client.
class HeartbeatReply(Message, kw_only=True, frozen=True, tag="heartbeat_reply"):
    """Where the learner stands, and the steps granted (contracts E2). `known` False: say hello again."""

    known: bool
    learner_update: int
    run_state: str
    lease_steps: int = 0
    lease_expires_in_seconds: float = 0.0


# client → agent listener. Answer: ok.
class ActorChange(Message, kw_only=True, frozen=True, tag="actor_change"):
    """Actors that joined or left since the hello."""

    client_id: str
    run_id: str
    added: tuple[ActorInfo, ...] = ()
    removed: tuple[str, ...] = ()


# client → agent listener. Answer: ok.
class Goodbye(Message, kw_only=True, frozen=True, tag="goodbye"):
    """The client stops; its actors are no longer waited for."""

    client_id: str
    run_id: str
    spools: tuple[SpoolReport, ...] = ()


class Ok(Message, kw_only=True, frozen=True, tag="ok"):
    """Done."""


# ---- trajectory server (training server ingest) -----------------------------------------------------------


# client → trajectory server. Payload: [body, final observation or b""]. Answer: ack, nack or error.
class PutTrajectory(Message, kw_only=True, frozen=True, tag="put_trajectory"):
    """One finished trajectory. The same message may come any number of times; it is stored once."""

    trajectory: TrajectoryMetadata


# client → trajectory server. Payload: [msgpack of RecordSchema]. Answer: ok or error.
class PutSchema(Message, kw_only=True, frozen=True, tag="put_schema"):
    """The schema behind a digest; sent when the server answered `unknown_schema`."""

    digest: str


# trajectory server → client. The trajectory is committed, or was before, or is in quarantine for good.
class Ack(Message, kw_only=True, frozen=True, tag="ack"):
    """The spool entry may go."""

    spool_id: str
    run_id: str
    sequence: int


# trajectory server → client.
class Nack(Message, kw_only=True, frozen=True, tag="nack"):
    """Not stored. Not retryable: it is in quarantine and the spool entry may go (contracts C2)."""

    spool_id: str
    run_id: str
    sequence: int
    reason: str
    detail: str = ""
    retryable: bool
    retry_after_seconds: float | None = None


# ---- model server (model registry) ------------------------------------------------------------------------


# learner → model server. Answer: intent.
class OpenIntent(Message, kw_only=True, frozen=True, tag="open_intent"):
    """Announces the blobs of a publication (contracts L), so that collection leaves them alone."""

    policy: str
    digests: tuple[str, ...]


# model server → learner.
class Intent(Message, kw_only=True, frozen=True, tag="intent"):
    """`missing` are the digests that must be uploaded."""

    intent_id: str
    missing: tuple[str, ...]


# learner → model server. Payload: [chunk]. Chunks of one blob come in order. Answer: ok or error.
class PutBlob(Message, kw_only=True, frozen=True, tag="put_blob"):
    """A part of a blob; the last one (offset + len = total) is checked against the digest."""

    digest: str
    offset: int
    total_bytes: int


# learner → model server. Payload: [manifest JSON]. Answer: published or error.
class Publish(Message, kw_only=True, frozen=True, tag="publish"):
    """Makes a version visible. Idempotent by key; the key with other digests is refused (contracts G1)."""

    intent_id: str
    policy: str
    run_id: str
    lineage_id: str
    learner_update: int
    fencing_token: int


# model server → learner.
class Published(Message, kw_only=True, frozen=True, tag="published"):
    """The version that the key has."""

    policy: str
    policy_version: int


# anyone → model server. Answer: manifest_reply with payload [manifest JSON], or error.
class FetchManifest(Message, kw_only=True, frozen=True, tag="fetch_manifest"):
    """By version, or by alias (`latest` by default)."""

    policy: str
    policy_version: int | None = None
    alias: str = "latest"


class ManifestReply(Message, kw_only=True, frozen=True, tag="manifest_reply"):
    """The manifest is the payload."""

    policy: str
    policy_version: int


# anyone → model server. Answer: blob_chunk with payload [bytes], or error.
class FetchBlob(Message, kw_only=True, frozen=True, tag="fetch_blob"):
    """A part of a blob, at most 1 MiB."""

    digest: str
    offset: int = 0


class BlobChunk(Message, kw_only=True, frozen=True, tag="blob_chunk"):
    """`offset` and `total_bytes` tell how much is left."""

    digest: str
    offset: int
    total_bytes: int


# model announcer → subscribers. ZMQ frames: [policy name utf-8, header].
class Announcement(Message, kw_only=True, frozen=True, tag="announcement"):
    """A hint that an alias points to a version now; the truth is fetched."""

    policy: str
    policy_version: int
    alias: str
    learner_update: int


# ---- inference server -------------------------------------------------------------------------------------


class LeafHeader(msgspec.Struct, frozen=True, array_like=True):
    """Name, numpy dtype and shape (rows first) of one leaf in a packed payload frame."""

    name: str
    dtype: str
    shape: tuple[int, ...]


# client → inference server. Payload: [all leaves, packed in the order of `leaves`]. Answer: actions or error.
class RequestActions(Message, kw_only=True, frozen=True, tag="request_actions"):
    """Observation, mask and noise leaves of `rows` actors. Nothing is computed after the deadline."""

    policy: str
    rows: int
    leaves: tuple[LeafHeader, ...]
    policy_version: int | None = None
    alias: str = "latest"
    timeout_seconds: float = 5.0
    priority: int = 0


# inference server → client. Payload: [all leaves, packed].
class Actions(Message, kw_only=True, frozen=True, tag="actions"):
    """The graph's outputs and the version that computed every row."""

    policy: str
    policy_version: int
    learner_update: int
    rows: int
    leaves: tuple[LeafHeader, ...]


AnyMessage = (
    ErrorReply | Hello | Welcome | Heartbeat | HeartbeatReply | ActorChange | Goodbye | Ok
    | PutTrajectory | PutSchema | Ack | Nack
    | OpenIntent | Intent | PutBlob | Publish | Published | FetchManifest | ManifestReply
    | FetchBlob | BlobChunk | Announcement | RequestActions | Actions
)  # fmt: skip
