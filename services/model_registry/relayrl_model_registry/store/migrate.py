"""Brings a database to the schema of this code, under a lock; `sql.open_store` calls it at every start."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from relayrl_model_registry.store import tables
from relayrl_shared.errors import SchemaVersionError

CODE_SCHEMA = 1
"""The schema that this code was written for; a database may demand more (contracts D5)."""

VERSION_TABLE = "registry_alembic_version"
_LOCK_KEY = 0x52_4C_4D_52  # any constant of our own: two migrating processes meet on it


def migrate(connection: sa.Connection) -> None:
    """Upgrades to the newest schema inside the connection's open transaction.

    Raises:
        SchemaVersionError: the database needs newer code than this.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK_KEY)))
    config = _config(connection)
    current = MigrationContext.configure(
        connection, opts={"version_table": VERSION_TABLE}
    ).get_current_revision()
    if current is None or current in _known_revisions(config):
        command.upgrade(config, "head")
    _check_minimum(connection)


def _config(connection: sa.Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    config.attributes["version_table"] = VERSION_TABLE
    return config


def _known_revisions(config: Config) -> set[str]:
    return {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}


def _check_minimum(connection: sa.Connection) -> None:
    minimum = connection.execute(sa.select(tables.schema.c.minimum_code_schema)).scalar_one()
    if minimum > CODE_SCHEMA:
        raise SchemaVersionError(
            f"the registry's database needs code of schema {minimum} or newer, this is {CODE_SCHEMA}; "
            "start the newer release, or restore a backup from before it"
        )
