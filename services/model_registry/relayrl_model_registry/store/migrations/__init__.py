"""The registry's Alembic tree; its version table is its own, so that a database can hold other trees."""
