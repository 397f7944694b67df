"""SQLite under SIGKILL, a full disk, locks and two ingests: typed errors, nothing lost, nothing twice."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from relayrl_shared.errors import ConfigError, ContractError, StoreError, StoreUnavailable
from relayrl_shared.store.interface import TrajectoryStore
from relayrl_shared.store.open import open_store
from relayrl_shared.testing.store import RUN_ID, make_run, make_trajectory, read_all

WRITER = """
import sys
from relayrl_shared.store.open import open_store
from relayrl_shared.testing.store import make_trajectory

store = open_store(sys.argv[1], writer_of="ingest")
sequence = int(sys.argv[2])
while True:
    batch = [make_trajectory(sequence + i, body=bytes(20_000)) for i in range(8)]
    store.commit(batch)
    sys.stdout.write(f"{sequence + 7}\\n")
    sys.stdout.flush()
    sequence += 8
"""


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A directory that does not exist yet."""
    return f"sqlite:///{tmp_path / 'store'}"


@pytest.fixture
def store(url: str) -> Iterator[TrajectoryStore]:
    """A store that writes everything."""
    store = open_store(url, writer_of="all", deadline_seconds=0.3)
    yield store
    store.close()


@pytest.mark.slow
def test_sigkill_in_the_middle_of_commits(url: str) -> None:
    """An ingest killed again and again at random moments loses nothing that it acknowledged."""
    chance = random.Random(11)
    acknowledged = 0
    for _ in range(5):
        command = [sys.executable, "-c", WRITER, url, str(max(1, acknowledged - 15))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            lines = iter(writer.stdout.readline, "")
            acknowledged = max(int(line) for line in itertools.islice(lines, chance.randint(2, 8)))
            time.sleep(chance.random() * 0.01)  # somewhere inside a later commit
            writer.send_signal(signal.SIGKILL)
            acknowledged = max([acknowledged, *(int(line) for line in lines if line.endswith("\n"))])
        reader = open_store(url)
        found = read_all(reader)
        reader.close()
        assert len(found) == len(set(found))
        assert {make_trajectory(i).metadata.trajectory_id for i in range(1, acknowledged + 1)} <= set(found)
        assert len(found) % 8 == 0, "a batch is stored whole or not at all"

    store = open_store(url, writer_of="ingest")
    results = store.commit([make_trajectory(i, body=bytes(20_000)) for i in range(1, acknowledged + 30)])
    assert {result.outcome for result in results} <= {"known", "stored"}
    audit = store.audit(RUN_ID)
    assert (audit.missing, audit.stored_twice) == (0, 0)
    store.close()


def test_a_second_ingest_is_refused_with_the_reason(url: str, store: TrajectoryStore) -> None:
    """One ingest process a directory; the error names it and the way out, and readers come in."""
    with pytest.raises(StoreError, match=f"process {os.getpid()} .*Postgres"):
        open_store(url, writer_of="ingest")
    open_store(url).close()
    open_store(url, writer_of="learner").close()


def test_the_lock_goes_with_the_store(url: str, store: TrajectoryStore) -> None:
    """Once a store is closed another ingest may open the directory."""
    store.close()
    open_store(url, writer_of="ingest").close()


def test_a_full_disk_is_unavailable_and_recovers(tmp_path: Path, store: TrajectoryStore) -> None:
    """At the limit of space a commit is refused typed and without effect, and goes through later."""
    store.commit([make_trajectory(1)])
    limited = limit_pages(store, 60)
    with pytest.raises(StoreUnavailable, match="full"):
        store.commit([make_trajectory(2, body=bytes(2_000_000))])
    assert [item.metadata.sequence for item in store.read(RUN_ID, 0, 10)] == [1]
    assert [result.outcome for result in store.commit([make_trajectory(3)])] == ["stored"]

    limited.execute("PRAGMA max_page_count = 1000000")
    assert [result.outcome for result in store.commit([make_trajectory(2, body=bytes(2_000_000))])] == [
        "stored"
    ]
    assert store.audit(RUN_ID).missing == 0


def limit_pages(store: TrajectoryStore, pages: int) -> sqlite3.Connection:
    """Sets the limit of the store's own writing connection; returns that connection."""
    from relayrl_shared.store.sqlite import SqliteStore

    assert isinstance(store, SqliteStore)
    engine = store._ingest._writer
    assert engine is not None
    raw = engine.raw_connection()
    connection = raw.driver_connection
    raw.close()  # back to the pool, which hands out the same one
    assert isinstance(connection, sqlite3.Connection)
    connection.execute(f"PRAGMA max_page_count = {pages}")
    return connection


def test_a_foreign_lock_ends_at_the_deadline(url: str, store: TrajectoryStore) -> None:
    """A commit behind somebody else's write transaction raises StoreUnavailable at the deadline."""
    other = sqlite3.connect(
        Path(url.removeprefix("sqlite:///")) / "trajectories.sqlite", isolation_level=None
    )
    other.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(StoreUnavailable, match="locked"):
            store.commit([make_trajectory(1)])
    finally:
        other.close()
    assert [result.outcome for result in store.commit([make_trajectory(1)])] == ["stored"]


def test_every_commit_is_synced(url: str, store: TrajectoryStore) -> None:
    """The writing connection has a write-ahead log and synchronous = FULL."""
    connection = limit_pages(store, 1_000_000)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_readers_of_nothing_see_nothing(url: str) -> None:
    """Where no file is yet, a reader sees an empty store, and the files once they come."""
    reader = open_store(url)
    assert (reader.runs(), reader.learner_update(RUN_ID), reader.audit(RUN_ID).accepted) == ([], 0, 0)
    assert not reader.wait(RUN_ID, 0, 0.01)
    assert not Path(url.removeprefix("sqlite:///")).exists()

    writer = open_store(url, writer_of="all")
    writer.create_run(make_run())
    writer.record_update(RUN_ID, "a", None, "cartpole", 1, None, [], 1)
    assert (reader.runs(), reader.learner_update(RUN_ID)) == ([make_run()], 1)
    writer.close()
    reader.close()


def test_a_file_that_is_no_database_is_a_store_error(url: str) -> None:
    """Garbage in the place of the database is a typed error that no retry mends."""
    directory = Path(url.removeprefix("sqlite:///"))
    directory.mkdir()
    (directory / "trajectories.sqlite").write_bytes(b"garbage" * 1000)
    for writer_of in ("ingest", None):
        with pytest.raises(StoreError, match="not a database") as caught:
            open_store(url, writer_of=writer_of).ping()
        assert not isinstance(caught.value, StoreUnavailable)


def test_a_run_id_cannot_leave_the_directory(store: TrajectoryStore) -> None:
    """A run id that is no file name is refused before a file is touched."""
    for run_id in ("../x", "a/b", "", ".", "a\0"):
        with pytest.raises(ContractError, match="run id"):
            store.learner_update(run_id)


@pytest.mark.parametrize("url", ["sqlite://x", "mysql://x", "", "store.sqlite"])
def test_an_unknown_url_is_refused_with_the_kinds(url: str) -> None:
    """A URL of no known kind is a ConfigError that names the kinds."""
    with pytest.raises(ConfigError, match="sqlite:///DIR or postgresql://"):
        open_store(url)
