"""The tables of the learner: lease, demand, updates and uses."""

import sqlalchemy as sa
from alembic import op

revision = "learner_0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Creates schema 1; any code of schema 1 may work on it."""
    _create_leases()
    _create_updates()
    _create_schema()


def _create_leases() -> None:
    op.create_table(
        "learner_leases",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("token", sa.BigInteger(), nullable=False),
        sa.Column("holder", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("run_id"),
    )
    op.create_table(
        "demands",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("learner_update", sa.BigInteger(), nullable=False),
        sa.Column("steps", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("run_id"),
    )


def _create_updates() -> None:
    op.create_table(
        "updates",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("lineage_id", sa.Text(), nullable=False),
        sa.Column("policy", sa.Text(), nullable=False),
        sa.Column("learner_update", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("parent_lineage_id", sa.Text(), nullable=True),
        sa.Column("policy_version", sa.BigInteger(), nullable=True),
        sa.Column("fencing_token", sa.BigInteger(), nullable=False),
        sa.Column("ordinal", sa.BigInteger(), nullable=False),
        sa.Column("recorded_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "lineage_id", "policy", "learner_update"),
        sa.UniqueConstraint("run_id", "ordinal"),
    )
    op.create_table(
        "uses",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("lineage_id", sa.Text(), nullable=False),
        sa.Column("policy", sa.Text(), nullable=False),
        sa.Column("learner_update", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("trajectory_id", sa.Text(), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "lineage_id", "policy", "learner_update", "trajectory_id"),
    )


def _create_schema() -> None:
    op.create_table(
        "learner_schema",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("schema", sa.Integer(), nullable=False),
        sa.Column("minimum_code_schema", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.execute("INSERT INTO learner_schema (id, schema, minimum_code_schema) VALUES (1, 1, 1)")
