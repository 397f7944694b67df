"""The tables of ingest: runs, clients, spools, trajectories, their log and quarantine."""

import sqlalchemy as sa
from alembic import op

revision = "trajectories_0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Creates schema 1; any code of schema 1 may work on it."""
    _create_runs()
    _create_trajectories()
    _create_quarantine()
    _create_schema()
    if op.get_bind().dialect.name == "postgresql":
        # The bodies are compressed or dense already: keep them out of line and skip another try.
        op.execute("ALTER TABLE trajectories ALTER COLUMN body SET STORAGE EXTERNAL")
        op.execute("ALTER TABLE trajectories ALTER COLUMN final_observation SET STORAGE EXTERNAL")


def _create_runs() -> None:
    op.create_table(
        "runs",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("definition", sa.LargeBinary(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("state_reason", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("run_id"),
        sa.UniqueConstraint("name"),
    )
    op.create_table(
        "run_counters",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("last_position", sa.BigInteger(), nullable=False),
        sa.Column("trajectories", sa.BigInteger(), nullable=False),
        sa.Column("steps", sa.BigInteger(), nullable=False),
        sa.Column("episodes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("run_id"),
    )
    op.create_table(
        "clients",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("client_id", sa.Text(), nullable=False),
        sa.Column("client_index", sa.Integer(), nullable=False),
        sa.Column("last_seen_at", sa.Float(), nullable=False),
        sa.Column("left_at", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("run_id", "client_id"),
        sa.UniqueConstraint("run_id", "client_index"),
    )
    op.create_table(
        "actors",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("client_id", sa.Text(), nullable=False),
        sa.Column("actor_id", sa.Text(), nullable=False),
        sa.Column("actor_index", sa.Integer(), nullable=False),
        sa.Column("agent_id", sa.Text(), nullable=True),
        sa.Column("environment_instance_id", sa.Text(), nullable=False),
        sa.Column("first_rollout_index", sa.BigInteger(), nullable=False),
        sa.Column("left_at", sa.Float(), nullable=True),
        sa.PrimaryKeyConstraint("run_id", "client_id", "actor_id"),
    )
    op.create_table(
        "schemas",
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("schema", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("digest"),
    )
    op.create_table(
        "step_leases",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("client_id", sa.Text(), nullable=False),
        sa.Column("unused_steps", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "client_id"),
    )


def _create_trajectories() -> None:
    op.create_table(
        "spools",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("spool_id", sa.Text(), nullable=False),
        sa.Column("known", sa.LargeBinary(), nullable=False),
        sa.Column("highest_seen", sa.BigInteger(), nullable=False),
        sa.Column("quarantined", sa.BigInteger(), nullable=False),
        sa.Column("dropped", sa.BigInteger(), nullable=False),
        sa.Column("repeated", sa.BigInteger(), nullable=False),
        sa.Column("highest_accepted", sa.BigInteger(), nullable=True),
        sa.Column("oldest_unacknowledged", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("run_id", "spool_id"),
    )
    op.create_table(
        "trajectories",
        sa.Column("trajectory_id", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("policy", sa.Text(), nullable=False),
        sa.Column("actor_id", sa.Text(), nullable=False),
        sa.Column("episode_id", sa.Text(), nullable=False),
        sa.Column("steps", sa.Integer(), nullable=False),
        sa.Column("episode_return", sa.Float(), nullable=False),
        sa.Column("terminated", sa.Boolean(), nullable=False),
        sa.Column("truncated", sa.Boolean(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("started_at", sa.Float(), nullable=False),
        sa.Column("ended_at", sa.Float(), nullable=False),
        sa.Column("stored_at", sa.Float(), nullable=False),
        sa.Column("policy_version_min", sa.BigInteger(), nullable=True),
        sa.Column("policy_version_max", sa.BigInteger(), nullable=True),
        sa.Column("learner_update_min", sa.BigInteger(), nullable=False),
        sa.Column("learner_update_max", sa.BigInteger(), nullable=False),
        sa.Column("schema_digest", sa.Text(), nullable=False),
        sa.Column("header", sa.LargeBinary(), nullable=False),
        sa.Column("final_observation", sa.LargeBinary(), nullable=True),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("trajectory_id"),
    )
    op.create_index("trajectories_actor", "trajectories", ["run_id", "actor_id"], unique=False)
    op.create_index("trajectories_episode", "trajectories", ["episode_id"], unique=False)
    op.create_table(
        "trajectory_log",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("trajectory_id", sa.Text(), nullable=False),
        sa.Column("episode_id", sa.Text(), nullable=False),
        sa.Column("segment_index", sa.Integer(), nullable=False),
        sa.Column("first_step_index", sa.BigInteger(), nullable=False),
        sa.Column("steps", sa.Integer(), nullable=False),
        sa.Column("spool_id", sa.Text(), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("body_digest", sa.Text(), nullable=False),
        sa.Column("stored_bytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "position"),
        sa.UniqueConstraint("episode_id", "segment_index"),
        sa.UniqueConstraint("trajectory_id"),
    )
    op.create_index(
        "trajectory_log_spool", "trajectory_log", ["run_id", "spool_id", "sequence"], unique=False
    )


def _create_quarantine() -> None:
    op.create_table(
        "quarantine",
        sa.Column("quarantine_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("spool_id", sa.Text(), nullable=True),
        sa.Column("sequence", sa.BigInteger(), nullable=True),
        sa.Column("trajectory_id", sa.Text(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("header", sa.LargeBinary(), nullable=False),
        sa.Column("payload", sa.LargeBinary(), nullable=True),
        sa.Column("received_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("quarantine_id"),
    )
    op.create_index("quarantine_digest", "quarantine", ["digest"], unique=False)
    op.create_index("quarantine_run", "quarantine", ["run_id", "quarantine_id"], unique=False)
    op.create_table(
        "quarantine_totals",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("rows", sa.BigInteger(), nullable=False),
        sa.Column("payload_bytes", sa.BigInteger(), nullable=False),
        sa.Column("payloads_dropped", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("run_id"),
    )


def _create_schema() -> None:
    op.create_table(
        "trajectory_schema",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("schema", sa.Integer(), nullable=False),
        sa.Column("minimum_code_schema", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.execute("INSERT INTO trajectory_schema (id, schema, minimum_code_schema) VALUES (1, 1, 1)")
