"""Migrations: they build what the code expects, once, and refuse only code that is too old (contracts D5)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, UniqueConstraint, inspect, update

from relayrl_shared.errors import SchemaVersionError
from relayrl_shared.store import schema, tables
from relayrl_shared.store.interface import TrajectoryStore
from relayrl_shared.store.migrate import main
from relayrl_shared.store.open import open_store
from relayrl_shared.store.sql_store import SqlStore
from relayrl_shared.testing.postgres import PostgresServer
from relayrl_shared.testing.store import RUN_ID, OpenStore, make_run, make_trajectory

pytestmark = pytest.mark.postgres


@contextmanager
def connected(store: TrajectoryStore, group: schema.Group) -> Iterator[Connection]:
    """A write transaction on the tables of a group."""
    assert isinstance(store, SqlStore)
    database = store._ingest if group is schema.TRAJECTORIES else store._learner(RUN_ID)
    with database.write() as connection:
        yield connection


def touch_all(store: TrajectoryStore) -> None:
    """Reads a row of each group, which opens its file on SQLite."""
    store.ping()
    store.demand(RUN_ID)


@pytest.mark.parametrize("group", schema.GROUPS, ids=[group.name for group in schema.GROUPS])
class TestMigrations:
    """For each group of tables."""

    def test_migrations_build_the_tables_of_the_code(
        self, store: TrajectoryStore, group: schema.Group
    ) -> None:
        """Nothing differs between a migrated database and the tables that the statements name."""

        def ours(thing: object, name: str | None, kind: str, *_: object) -> bool:
            return kind != "table" or name in group.metadata.tables

        with connected(store, group) as connection:
            context = MigrationContext.configure(connection, opts={"include_object": ours})
            assert compare_metadata(context, group.metadata) == []

    def test_unique_constraints_are_there(self, store: TrajectoryStore, group: schema.Group) -> None:
        """Each unique constraint of the code is in the database: exactly-once rests on them."""
        with connected(store, group) as connection:
            for table in group.metadata.tables.values():
                expected = {
                    tuple(column.name for column in constraint.columns)
                    for constraint in table.constraints
                    if isinstance(constraint, UniqueConstraint)
                }
                found = inspect(connection).get_unique_constraints(table.name)
                assert {tuple(item["column_names"]) for item in found} == expected

    def test_newer_tables_that_allow_this_code_are_taken(
        self, store: TrajectoryStore, open_stores: OpenStore, group: schema.Group
    ) -> None:
        """A database that newer code has expanded serves this code on, and is not migrated back."""
        self.set_schema(store, group, schema_number=99, minimum=tables.CODE_SCHEMA)
        store.close()
        again = open_stores(writer_of="all")
        with connected(again, group) as connection:
            assert schema.database_schema(connection, group) == 99

    @pytest.mark.parametrize("writer_of", ["all", None])
    def test_tables_that_need_newer_code_are_refused(
        self, store: TrajectoryStore, open_stores: OpenStore, group: schema.Group, writer_of: str | None
    ) -> None:
        """A database whose minimum is above this code is refused by writers and readers."""
        self.set_schema(store, group, schema_number=99, minimum=42)
        store.close()
        with pytest.raises(SchemaVersionError, match=rf"{group.name} .*42 .*{tables.CODE_SCHEMA}"):
            touch_all(open_stores(writer_of=writer_of))

    def set_schema(
        self, store: TrajectoryStore, group: schema.Group, *, schema_number: int, minimum: int
    ) -> None:
        """What a newer release would write."""
        values = {"schema": schema_number, "minimum_code_schema": minimum}
        with connected(store, group) as connection:
            connection.execute(update(group.schema_table).values(values))


class TestOpening:
    """Services migrate when they start."""

    def test_data_stays(self, store: TrajectoryStore, open_stores: OpenStore) -> None:
        """Opening again neither migrates nor loses anything."""
        store.create_run(make_run())
        store.commit([make_trajectory(1)])
        store.close()
        again = open_stores(writer_of="all")
        assert again.runs() == [make_run()]
        assert len(list(again.trajectory_ids(RUN_ID))) == 1

    def test_eight_openers_migrate_once(self, packaged_postgres: PostgresServer) -> None:
        """Processes that start at once on an empty Postgres all come up."""
        url = packaged_postgres.create_database()
        with ThreadPoolExecutor(8) as pool:
            stores = list(pool.map(lambda _: open_store(url, writer_of="ingest"), range(8)))
        for store in stores:
            store.ping()
            store.close()
        packaged_postgres.drop_database(url)

    def test_learners_of_one_directory_come_up_together(self, store_url: str) -> None:
        """Learners that open their file at once all find its tables."""
        if not store_url.startswith("sqlite"):
            pytest.skip("one database for all on Postgres")
        stores = [open_store(store_url, writer_of="learner") for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda store: store.set_demand(RUN_ID, 0, 1), stores))
        for store in stores:
            assert store.demand(RUN_ID) == (0, 1)
            store.close()


class TestCommand:
    """`python -m relayrl_shared.store.migrate URL`."""

    def test_it_migrates_and_says_so(self, store_url: str, capsys: pytest.CaptureFixture[str]) -> None:
        """A store is migrated, and again without harm."""
        assert (main([store_url]), main([store_url])) == (0, 0)
        assert capsys.readouterr().out == "migrated\nmigrated\n"
        open_store(store_url).close()

    def test_a_bad_url_is_status_1(self, capsys: pytest.CaptureFixture[str]) -> None:
        """What cannot be migrated is said on stderr, with status 1."""
        assert main(["nonsense"]) == 1
        assert "not migrated: store URL 'nonsense'" in capsys.readouterr().err

    @pytest.mark.slow
    def test_it_runs_as_a_module(self, store_url: str) -> None:
        """The command works from a shell."""
        if not store_url.startswith("sqlite"):
            pytest.skip("once is enough")
        command = [sys.executable, "-m", "relayrl_shared.store.migrate", store_url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (0, "migrated\n")
