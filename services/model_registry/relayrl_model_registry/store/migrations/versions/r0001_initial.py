"""The first schema: policies, runs, versions, aliases and their history, intents."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Creates all tables."""
    _create_versions()
    _create_aliases()
    _create_intents()
    schema = op.create_table(
        "registry_schema",
        sa.Column("singleton", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("minimum_code_schema", sa.Integer, nullable=False),
    )
    op.bulk_insert(schema, [{"singleton": 1, "minimum_code_schema": 1}])


def _create_versions() -> None:
    op.create_table(
        "registry_policies",
        sa.Column("policy", sa.Text, primary_key=True),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("newest_version", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "registry_runs",
        sa.Column("run_id", sa.Text, primary_key=True),
        sa.Column("newest_fencing_token", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "registry_versions",
        sa.Column("policy", sa.Text, sa.ForeignKey("registry_policies.policy"), primary_key=True),
        sa.Column("policy_version", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("run_id", sa.Text, nullable=False),
        sa.Column("lineage_id", sa.Text, nullable=False),
        sa.Column("learner_update", sa.BigInteger, nullable=False),
        sa.Column("fencing_token", sa.BigInteger, nullable=False),
        sa.Column("parent_version", sa.BigInteger),
        sa.Column("algorithm", sa.Text, nullable=False),
        sa.Column("graph_digest", sa.Text, nullable=False),
        sa.Column("weights_digest", sa.Text, nullable=False),
        sa.Column("golden_digest", sa.Text, nullable=False),
        sa.Column("manifest", sa.Text, nullable=False),
        sa.Column("published_at", sa.Double, nullable=False),
        sa.Column("collected_at", sa.Double),
        sa.UniqueConstraint("run_id", "lineage_id", "policy", "learner_update", name="registry_versions_key"),
    )


def _create_aliases() -> None:
    op.create_table(
        "registry_aliases",
        sa.Column("policy", sa.Text, primary_key=True),
        sa.Column("alias", sa.Text, primary_key=True),
        sa.Column("policy_version", sa.BigInteger, nullable=False),
        sa.ForeignKeyConstraint(
            ["policy", "policy_version"], ["registry_versions.policy", "registry_versions.policy_version"]
        ),
    )
    op.create_table(
        "registry_alias_moves",
        sa.Column(
            "position",
            sa.BigInteger().with_variant(sa.Integer, "sqlite"),
            primary_key=True,
            autoincrement=True,
        ),
        sa.Column("policy", sa.Text, nullable=False),
        sa.Column("alias", sa.Text, nullable=False),
        sa.Column("from_version", sa.BigInteger),
        sa.Column("to_version", sa.BigInteger, nullable=False),
        sa.Column("moved_at", sa.Double, nullable=False),
        sa.Column("moved_by", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
    )
    op.create_index(
        "registry_alias_moves_alias", "registry_alias_moves", ["policy", "alias", "position"], unique=False
    )


def _create_intents() -> None:
    op.create_table(
        "registry_intents",
        sa.Column("intent_id", sa.Text, primary_key=True),
        sa.Column("policy", sa.Text, nullable=False),
        sa.Column("opened_at", sa.Double, nullable=False),
    )
    op.create_table(
        "registry_intent_digests",
        sa.Column(
            "intent_id",
            sa.Text,
            sa.ForeignKey("registry_intents.intent_id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("digest", sa.Text, primary_key=True),
    )
