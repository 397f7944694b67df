"""Runs the registry's migrations on the connection that `migrate` hands over, inside its transaction."""

from __future__ import annotations

from alembic import context

from relayrl_model_registry.store.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=context.config.attributes["version_table"],
    transactional_ddl=True,
    transaction_per_migration=False,
)
context.run_migrations()
