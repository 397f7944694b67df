"""Alembic's environment: runs on the connection and the group that `schema.migrate` hands over."""

from alembic import context

_connection = context.config.attributes["connection"]
_group = context.config.attributes["group"]

context.configure(
    connection=_connection,
    target_metadata=_group.metadata,
    version_table=f"{_group.name}_migrations",
)
context.run_migrations()
