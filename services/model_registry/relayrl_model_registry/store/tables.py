"""The registry's tables, for `sql`; the migrations create them.

Names start with `registry_`, so that one Postgres database can hold the trajectory store beside them.
"""

from __future__ import annotations

import sqlalchemy as sa

metadata = sa.MetaData()

policies = sa.Table(
    "registry_policies",
    metadata,
    sa.Column("policy", sa.Text, primary_key=True),
    sa.Column("created_at", sa.Double, nullable=False),
    sa.Column("newest_version", sa.BigInteger, nullable=False),
)

runs = sa.Table(
    "registry_runs",
    metadata,
    sa.Column("run_id", sa.Text, primary_key=True),
    sa.Column("newest_fencing_token", sa.BigInteger, nullable=False),
)

versions = sa.Table(
    "registry_versions",
    metadata,
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

aliases = sa.Table(
    "registry_aliases",
    metadata,
    sa.Column("policy", sa.Text, primary_key=True),
    sa.Column("alias", sa.Text, primary_key=True),
    sa.Column("policy_version", sa.BigInteger, nullable=False),
    sa.ForeignKeyConstraint(
        ["policy", "policy_version"], ["registry_versions.policy", "registry_versions.policy_version"]
    ),
)

alias_moves = sa.Table(
    "registry_alias_moves",
    metadata,
    sa.Column(
        "position", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True
    ),
    sa.Column("policy", sa.Text, nullable=False),
    sa.Column("alias", sa.Text, nullable=False),
    sa.Column("from_version", sa.BigInteger),
    sa.Column("to_version", sa.BigInteger, nullable=False),
    sa.Column("moved_at", sa.Double, nullable=False),
    sa.Column("moved_by", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Index("registry_alias_moves_alias", "policy", "alias", "position"),
)

intents = sa.Table(
    "registry_intents",
    metadata,
    sa.Column("intent_id", sa.Text, primary_key=True),
    sa.Column("policy", sa.Text, nullable=False),
    sa.Column("opened_at", sa.Double, nullable=False),
)

intent_digests = sa.Table(
    "registry_intent_digests",
    metadata,
    sa.Column(
        "intent_id",
        sa.Text,
        sa.ForeignKey("registry_intents.intent_id", ondelete="CASCADE"),
        primary_key=True,
    ),
    sa.Column("digest", sa.Text, primary_key=True),
)

schema = sa.Table(
    "registry_schema",
    metadata,
    sa.Column("singleton", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("minimum_code_schema", sa.Integer, nullable=False),
)
