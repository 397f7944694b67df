"""Alembic migrations of the trajectory store, one folder of revisions a group of tables."""
