"""The tables of the trajectory store as SQLAlchemy Core metadata; every statement of this package names them.

Two groups, because SQLite keeps one file an owner (contracts D3): `TRAJECTORY_TABLES` are written by ingest,
`LEARNER_TABLES` by the learner of a run. On Postgres both lie in one database. The migrations create them.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

TRAJECTORY_TABLES = MetaData()
LEARNER_TABLES = MetaData()

CODE_SCHEMA = 1
"""The schema that this code knows. A database whose `minimum_code_schema` is above it is refused (D5)."""


def _schema_table(name: str, metadata: MetaData) -> Table:
    return Table(
        name,
        metadata,
        Column("id", Integer, primary_key=True, autoincrement=False),  # always 1
        Column("schema", Integer, nullable=False),  # of the newest code that migrated
        Column("minimum_code_schema", Integer, nullable=False),
    )


trajectory_schema = _schema_table("trajectory_schema", TRAJECTORY_TABLES)
learner_schema = _schema_table("learner_schema", LEARNER_TABLES)

runs = Table(
    "runs",
    TRAJECTORY_TABLES,
    Column("run_id", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("definition", LargeBinary, nullable=False),  # msgpack of interface.Run as created
    Column("state", Text, nullable=False),
    Column("state_reason", Text, nullable=False),
    Column("created_at", Float, nullable=False),
)

run_counters = Table(
    "run_counters",
    TRAJECTORY_TABLES,
    Column("run_id", Text, primary_key=True),
    Column("last_position", BigInteger, nullable=False),
    Column("trajectories", BigInteger, nullable=False),
    Column("steps", BigInteger, nullable=False),
    Column("episodes", BigInteger, nullable=False),  # ended ones
)

clients = Table(
    "clients",
    TRAJECTORY_TABLES,
    Column("run_id", Text, primary_key=True),
    Column("client_id", Text, primary_key=True),
    Column("client_index", Integer, nullable=False),
    Column("last_seen_at", Float, nullable=False),
    Column("left_at", Float),
    UniqueConstraint("run_id", "client_index"),
)

actors = Table(
    "actors",
    TRAJECTORY_TABLES,
    Column("run_id", Text, primary_key=True),
    Column("client_id", Text, primary_key=True),
    Column("actor_id", Text, primary_key=True),
    Column("actor_index", Integer, nullable=False),
    Column("agent_id", Text),
    Column("environment_instance_id", Text, nullable=False),
    Column("first_rollout_index", BigInteger, nullable=False),
    Column("left_at", Float),
)

schemas = Table(
    "schemas",
    TRAJECTORY_TABLES,
    Column("digest", Text, primary_key=True),
    Column("schema", LargeBinary, nullable=False),
)

spools = Table(
    "spools",
    TRAJECTORY_TABLES,
    Column("run_id", Text, primary_key=True),
    Column("spool_id", Text, primary_key=True),
    Column("known", LargeBinary, nullable=False),  # msgpack of sequences.SequenceSet
    Column("highest_seen", BigInteger, nullable=False),
    Column("quarantined", BigInteger, nullable=False),  # sequences that ended in quarantine
    Column("dropped", BigInteger, nullable=False),  # sequences that the client dropped by its policy
    Column("repeated", BigInteger, nullable=False),  # sequences of a trajectory that another sequence stored
    Column("highest_accepted", BigInteger),  # of the latest report; null before the first
    Column("oldest_unacknowledged", BigInteger),
)

trajectories = Table(
    "trajectories",
    TRAJECTORY_TABLES,
    Column("trajectory_id", Text, primary_key=True),
    Column("run_id", Text, nullable=False),
    Column("policy", Text, nullable=False),
    Column("actor_id", Text, nullable=False),
    Column("episode_id", Text, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("episode_return", Float, nullable=False),
    Column("terminated", Boolean, nullable=False),
    Column("truncated", Boolean, nullable=False),
    Column("purpose", Text, nullable=False),
    Column("started_at", Float, nullable=False),
    Column("ended_at", Float, nullable=False),
    Column("stored_at", Float, nullable=False),
    Column("policy_version_min", BigInteger),
    Column("policy_version_max", BigInteger),
    Column("learner_update_min", BigInteger, nullable=False),
    Column("learner_update_max", BigInteger, nullable=False),
    Column("schema_digest", Text, nullable=False),
    Column("header", LargeBinary, nullable=False),  # msgpack of TrajectoryMetadata
    Column("final_observation", LargeBinary),
    Column("body", LargeBinary, nullable=False),
    Index("trajectories_actor", "run_id", "actor_id"),
    Index("trajectories_episode", "episode_id"),
)

trajectory_log = Table(
    "trajectory_log",
    TRAJECTORY_TABLES,
    Column("run_id", Text, primary_key=True),
    Column("position", BigInteger, primary_key=True),
    Column("trajectory_id", Text, nullable=False, unique=True),
    Column("episode_id", Text, nullable=False),
    Column("segment_index", Integer, nullable=False),
    Column("first_step_index", BigInteger, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("spool_id", Text, nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("body_digest", Text, nullable=False),
    Column("stored_bytes", BigInteger, nullable=False),
    UniqueConstraint("episode_id", "segment_index"),
    Index("trajectory_log_spool", "run_id", "spool_id", "sequence"),
)

quarantine = Table(
    "quarantine",
    TRAJECTORY_TABLES,
    Column("quarantine_id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("run_id", Text, nullable=False),  # "" where it is not known
    Column("spool_id", Text),
    Column("sequence", BigInteger),
    Column("trajectory_id", Text),
    Column("reason", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("header", LargeBinary, nullable=False),
    Column("payload", LargeBinary),
    Column("received_at", Float, nullable=False),
    Index("quarantine_run", "run_id", "quarantine_id"),
    Index("quarantine_digest", "digest"),
)

quarantine_totals = Table(
    "quarantine_totals",
    TRAJECTORY_TABLES,
    Column("run_id", Text, primary_key=True),
    Column("rows", BigInteger, nullable=False),
    Column("payload_bytes", BigInteger, nullable=False),
    Column("payloads_dropped", BigInteger, nullable=False),
)

step_leases = Table(
    "step_leases",
    TRAJECTORY_TABLES,
    Column("run_id", Text, primary_key=True),
    Column("client_id", Text, primary_key=True),
    Column("unused_steps", BigInteger, nullable=False),
    Column("expires_at", Float, nullable=False),
)

learner_leases = Table(
    "learner_leases",
    LEARNER_TABLES,
    Column("run_id", Text, primary_key=True),
    Column("token", BigInteger, nullable=False),
    Column("holder", Text, nullable=False),
    Column("expires_at", Float, nullable=False),  # 0: released
)

demands = Table(
    "demands",
    LEARNER_TABLES,
    Column("run_id", Text, primary_key=True),
    Column("learner_update", BigInteger, nullable=False),
    Column("steps", BigInteger, nullable=False),
)

updates = Table(
    "updates",
    LEARNER_TABLES,
    Column("run_id", Text, primary_key=True),
    Column("lineage_id", Text, primary_key=True),
    Column("policy", Text, primary_key=True),
    Column("learner_update", BigInteger, primary_key=True, autoincrement=False),
    Column("parent_lineage_id", Text),
    Column("policy_version", BigInteger),
    Column("fencing_token", BigInteger, nullable=False),
    Column("ordinal", BigInteger, nullable=False),  # order of recording in the run, from 1
    Column("recorded_at", Float, nullable=False),
    UniqueConstraint("run_id", "ordinal"),
)

uses = Table(
    "uses",
    LEARNER_TABLES,
    Column("run_id", Text, primary_key=True),
    Column("lineage_id", Text, primary_key=True),
    Column("policy", Text, primary_key=True),
    Column("learner_update", BigInteger, primary_key=True, autoincrement=False),
    Column("trajectory_id", Text, primary_key=True),
    Column("position", BigInteger, nullable=False),
    Column("outcome", Text, nullable=False),
)
