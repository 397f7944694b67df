"""Creates and checks the schema of a database: driven by every store that opens, and by `migrate`.

Migrations expand first and contract one release later, so older code may go on over a newer schema until the
database says otherwise in `minimum_code_schema` (contracts D5).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, MetaData, Table, inspect, select

from relayrl_shared.errors import SchemaVersionError
from relayrl_shared.store import tables


@dataclass(frozen=True, slots=True)
class Group:
    """Tables that are migrated together. `name` is the folder of their migrations."""

    name: str
    metadata: MetaData
    schema_table: Table


TRAJECTORIES = Group("trajectories", tables.TRAJECTORY_TABLES, tables.trajectory_schema)
LEARNER = Group("learner", tables.LEARNER_TABLES, tables.learner_schema)
GROUPS = (TRAJECTORIES, LEARNER)


def database_schema(connection: Connection, group: Group) -> int:
    """The schema that the database has; 0 where the group was never migrated.

    Raises:
        SchemaVersionError: the database needs newer code than this.
    """
    table = group.schema_table
    if not inspect(connection).has_table(table.name):
        return 0
    row = connection.execute(select(table)).mappings().first()
    if row is None:
        return 0
    if row["minimum_code_schema"] > tables.CODE_SCHEMA:
        needed, ours = row["minimum_code_schema"], tables.CODE_SCHEMA
        raise SchemaVersionError(
            f"the {group.name} tables need code of schema {needed} or newer and this is {ours}: "
            "install the release that migrated them"
        )
    return int(row["schema"])


def migrate(connection: Connection, group: Group) -> bool:
    """Brings the group up to this code inside the open transaction; False if it was there already.

    The caller holds a lock against others who migrate.
    """
    if database_schema(connection, group) >= tables.CODE_SCHEMA:
        return False
    from alembic import command  # slow to import, and rarely needed
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("version_locations", str(Path(__file__).parent / "migrations" / group.name))
    config.set_main_option("path_separator", "os")
    config.attributes.update(connection=connection, group=group)
    command.upgrade(config, "head")
    return True
