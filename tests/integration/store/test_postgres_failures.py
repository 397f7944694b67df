"""Postgres that crashes, hangs up, refuses or would lose data: typed errors, then success, nothing twice."""

from __future__ import annotations

import itertools
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from relayrl_shared.errors import ConfigError, StoreError, StoreUnavailable
from relayrl_shared.store.interface import IncomingTrajectory, TrajectoryStore
from relayrl_shared.store.open import open_store
from relayrl_shared.testing.postgres import PostgresServer, packaged_binaries, store_database
from relayrl_shared.testing.store import RUN_ID, make_trajectory

pytestmark = [pytest.mark.postgres, pytest.mark.slow]


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A server of this module alone, to be mistreated."""
    binaries = packaged_binaries()
    if binaries is None:
        pytest.skip("NO PACKAGED POSTGRES: its tests do not run")
    server = PostgresServer(binaries)
    server.start()
    yield server
    server.close()


@pytest.fixture
def url(server: PostgresServer) -> Iterator[str]:
    """A database of its own on the server, which runs with its defaults before and after the test."""
    url = store_database(server)
    yield url
    server.drop_database(url)


def commit_until_stored(
    store: TrajectoryStore, batch: list[IncomingTrajectory], refused: threading.Event, stop: threading.Event
) -> None:
    """Sends a batch, as ingest does, until the store has answered for it."""
    while not stop.is_set():
        try:
            store.commit(batch)
        except StoreUnavailable:
            refused.set()
            stop.wait(0.02)
            continue
        return


def test_a_crash_under_load_loses_nothing_and_doubles_nothing(server: PostgresServer, url: str) -> None:
    """While writers commit, the server is stopped as in a crash and started again, three times over."""
    stop, refused = threading.Event(), threading.Event()
    stores = [open_store(url, writer_of="ingest", deadline_seconds=10.0) for _ in range(2)]
    acknowledged: list[str] = []

    def write(number: int) -> None:
        for sequence in itertools.count(1):
            batch = [make_trajectory(sequence, spool_id=f"spool-{number}", body=bytes(5000))]
            commit_until_stored(stores[number], batch, refused, stop)
            if stop.is_set():
                return
            acknowledged.append(batch[0].metadata.trajectory_id)

    with ThreadPoolExecutor(2) as pool:
        writing = [pool.submit(write, number) for number in range(2)]
        for _ in range(3):
            before = len(acknowledged)
            while len(acknowledged) < before + 20:
                stop.wait(0.01)
            server.stop(signal.SIGQUIT)
            assert refused.wait(10.0)
            refused.clear()
            server.start()
        before = len(acknowledged)
        while len(acknowledged) < before + 20:
            stop.wait(0.01)
        stop.set()
        for future in writing:
            future.result(30.0)

    found = list(stores[0].trajectory_ids(RUN_ID))
    assert len(found) == len(set(found))
    assert set(acknowledged) <= set(found)
    assert stores[0].audit(RUN_ID).missing == 0
    assert stores[0].counts(RUN_ID)["last_position"] == len(found)
    for store in stores:
        store.close()


def test_a_stopped_server_is_unavailable_and_then_serves(server: PostgresServer, url: str) -> None:
    """Every kind of call says StoreUnavailable while the server is down, and works when it is back."""
    store = open_store(url, writer_of="all", deadline_seconds=5.0)
    server.stop(signal.SIGINT)
    try:
        for call in (
            store.ping,
            lambda: store.commit([make_trajectory(1)]),
            lambda: store.read(RUN_ID, 0, 1),
            lambda: store.wait(RUN_ID, 0, 1.0),
            lambda: store.acquire_lease(RUN_ID, "me", 1.0),
        ):
            with pytest.raises(StoreUnavailable):
                call()
        with pytest.raises(StoreUnavailable):
            open_store(url, writer_of="ingest")
    finally:
        server.start()
    store.ping()
    assert [result.outcome for result in store.commit([make_trajectory(1)])] == ["stored"]
    assert store.wait(RUN_ID, 0, 1.0)
    store.close()


def test_a_cut_connection_fails_one_call_at_most(server: PostgresServer, url: str) -> None:
    """When the server ends all its connections, the next call has a fresh one."""
    store = open_store(url, writer_of="ingest")
    store.commit([make_trajectory(1)])
    store.wait(RUN_ID, 1, 0.0)
    with psycopg.connect(server.url(), autocommit=True) as administrator:
        administrator.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
            "AND backend_type = 'client backend'"
        )
    assert [result.outcome for result in store.commit([make_trajectory(2)])] == ["stored"]
    assert store.wait(RUN_ID, 1, 5.0)
    store.close()


def test_a_connection_cut_inside_a_commit_has_no_effect(server: PostgresServer, url: str) -> None:
    """A commit whose connection is cut while it waits for a lock raises, stores nothing, and works again."""
    store = open_store(url, writer_of="ingest")
    store.commit([make_trajectory(1)])
    with psycopg.connect(url) as blocker, ThreadPoolExecutor(1) as pool:
        blocker.execute("LOCK TABLE trajectory_log IN ACCESS EXCLUSIVE MODE")
        committing = pool.submit(store.commit, [make_trajectory(2)])
        with psycopg.connect(server.url(), autocommit=True) as administrator:
            cut = 0
            while not cut:
                rows = administrator.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                ).fetchall()
                cut = len(rows)
        with pytest.raises(StoreUnavailable):
            committing.result(30.0)
    assert list(store.trajectory_ids(RUN_ID)) == [make_trajectory(1).metadata.trajectory_id]
    assert [result.position for result in store.commit([make_trajectory(2)])] == [2]
    store.close()


def test_a_lock_that_never_comes_ends_at_the_deadline(url: str) -> None:
    """Every wait has a deadline: a commit behind a lock raises StoreUnavailable in time."""
    store = open_store(url, writer_of="ingest", deadline_seconds=0.5)
    with psycopg.connect(url) as blocker:
        blocker.execute("LOCK TABLE trajectory_log IN ACCESS EXCLUSIVE MODE")
        with pytest.raises(StoreUnavailable, match="timeout"):
            store.commit([make_trajectory(1)])
    assert [result.outcome for result in store.commit([make_trajectory(1)])] == ["stored"]
    store.close()


@pytest.mark.parametrize("name", ["fsync", "synchronous_commit"])
def test_a_server_that_does_not_sync_is_refused(server: PostgresServer, url: str, name: str) -> None:
    """A server that acknowledges before it has synced is refused by name, unless told otherwise."""
    server.stop()
    server.start(**{name: "off"})
    try:
        with pytest.raises(ConfigError, match=f"{name} = off"):
            open_store(url, writer_of="ingest")
        open_store(url, writer_of="ingest", allow_unsafe=True).close()
    finally:
        server.stop()
        server.start()
    open_store(url, writer_of="ingest").close()


def test_a_server_that_turned_unsafe_is_refused_at_the_next_connection(
    server: PostgresServer, url: str
) -> None:
    """The check holds for connections that are made later, too."""
    store = open_store(url, writer_of="ingest")
    server.stop()
    server.start(fsync="off")
    try:
        with pytest.raises(ConfigError):
            store.commit([make_trajectory(1)])
    finally:
        server.stop()
        server.start()
    store.close()


def test_nobody_listening_is_unavailable() -> None:
    """A port where nothing listens is StoreUnavailable, at once."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(StoreUnavailable):
            open_store(f"postgresql://postgres@127.0.0.1:{port}/postgres", writer_of="ingest")


def test_a_deaf_server_ends_at_the_deadline() -> None:
    """A server that accepts connections and never answers is StoreUnavailable at the deadline."""
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        port = deaf.getsockname()[1]
        with pytest.raises(StoreUnavailable):
            open_store(
                f"postgresql://postgres@127.0.0.1:{port}/postgres", writer_of="ingest", deadline_seconds=1.0
            )


def test_a_reader_of_an_empty_database_says_what_to_do(server: PostgresServer) -> None:
    """A database without tables is not created by who only reads."""
    url = server.create_database()
    with pytest.raises(StoreUnavailable, match="start the training server"):
        open_store(url)
    server.drop_database(url)


def test_other_errors_are_not_retryable(url: str) -> None:
    """What no retry mends is a StoreError and no StoreUnavailable."""
    store = open_store(url, writer_of="ingest")
    with psycopg.connect(url) as administrator:
        administrator.execute("DROP TABLE schemas")
    with pytest.raises(StoreError) as caught:
        store.put_schema("digest", b"")
    assert not isinstance(caught.value, StoreUnavailable)
    store.close()


def test_bodies_are_stored_out_of_line_and_uncompressed(url: str) -> None:
    """The body columns are EXTERNAL, so that Postgres never tries to compress what is dense already."""
    with psycopg.connect(url) as administrator:
        rows = administrator.execute(
            "SELECT attname, attstorage FROM pg_attribute WHERE attrelid = 'trajectories'::regclass "
            "AND attname IN ('body', 'final_observation')"
        ).fetchall()
    assert sorted(rows) == [("body", "e"), ("final_observation", "e")]
