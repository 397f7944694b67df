"""Several writers and a reader at once: no row missed, none twice, positions without gaps (contracts D2)."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Connection, text

from relayrl_shared.store import commits
from relayrl_shared.store.interface import IncomingTrajectory, TrajectoryStore
from relayrl_shared.store.postgres import PostgresStore
from relayrl_shared.testing.postgres import PostgresServer, store_database
from relayrl_shared.testing.store import RUN_ID, OpenStore, make_trajectory
from relayrl_shared.trajectory import TrajectoryMetadata

pytestmark = pytest.mark.postgres

WRITERS = 4
BATCHES = 12


def batches_of(writer: int) -> list[list[IncomingTrajectory]]:
    """Batches of different sizes of one writer's own spool; every third comes twice."""
    chance, sequences = random.Random(writer), itertools.count(1)
    batches: list[list[IncomingTrajectory]] = []
    for number in range(BATCHES):
        batch = [
            make_trajectory(next(sequences), spool_id=f"spool-{writer}")
            for _ in range(chance.choice((1, 3, 9)))
        ]
        batches += [batch, batch] if number % 3 == 0 else [batch]
    return batches


def follow(reader: TrajectoryStore, wanted: int, failed: threading.Event) -> list[tuple[int, str]]:
    """What a reader that follows the cursor sees: (position, id) until it has so many, or somebody failed."""
    seen: list[tuple[int, str]] = []
    position = 0
    while len(seen) < wanted and not failed.is_set():
        reader.wait(RUN_ID, position, 1.0)
        page = reader.read(RUN_ID, position, limit=5)
        seen += [(item.position, item.metadata.trajectory_id) for item in page]
        position = page[-1].position if page else position
    return seen


def run_together(
    writers: Sequence[TrajectoryStore], reader: TrajectoryStore
) -> tuple[list[str], list[tuple[int, str]]]:
    """All writers commit their batches at once while the reader follows: (ids committed, what was read)."""
    work = [batches_of(number) for number in range(WRITERS)]
    expected = sorted(
        {item.metadata.trajectory_id for batches in work for batch in batches for item in batch}
    )
    failed = threading.Event()

    def write(number: int) -> None:
        try:
            for batch in work[number]:
                writers[number].commit(batch)
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(WRITERS + 1) as pool:
        reading = pool.submit(follow, reader, len(expected), failed)
        writing: list[Future[None]] = [pool.submit(write, number) for number in range(WRITERS)]
        for future in writing:
            future.result(60.0)
        seen = reading.result(60.0)
    return expected, seen


def check(expected: list[str], seen: list[tuple[int, str]]) -> None:
    """Every row once, in order, at positions without gaps."""
    assert [position for position, _ in seen] == list(range(1, len(expected) + 1))
    assert sorted(trajectory_id for _, trajectory_id in seen) == expected


class TestOneStore:
    """Threads that share a store."""

    def test_a_reader_sees_every_row_once_and_in_order(
        self, store: TrajectoryStore, open_stores: OpenStore
    ) -> None:
        """While four threads commit through one store, a reader misses nothing and sees nothing twice."""
        check(*run_together([store] * WRITERS, open_stores()))

    def test_the_same_batch_from_all_threads_is_stored_once(self, store: TrajectoryStore) -> None:
        """Resends that race with each other and the original leave one row each."""
        batch = [make_trajectory(i) for i in range(1, 31)]
        start = threading.Barrier(WRITERS)

        def send(number: int) -> list[str]:
            start.wait()
            mine = random.Random(number).sample(batch, len(batch))
            return [result.outcome for result in store.commit(mine)]

        with ThreadPoolExecutor(WRITERS) as pool:
            outcomes = [outcome for found in pool.map(send, range(WRITERS)) for outcome in found]
        assert sorted(outcomes) == ["known"] * 30 * (WRITERS - 1) + ["stored"] * 30
        assert len(list(store.trajectory_ids(RUN_ID))) == 30


class Together:
    """Holds several commits at the point where their bodies are written, so that they must collide."""

    def __init__(self, parties: int) -> None:
        self._barrier = threading.Barrier(parties)
        self._first = threading.local()

    @contextmanager
    def patched(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Each thread's first commit waits for the others after it has judged its batch."""
        judge = commits.judge

        def wait_after_judging(*arguments: object) -> commits.Plan:
            plan = judge(*arguments)  # type: ignore[arg-type]  # passed on as they came
            if not getattr(self._first, "done", False):
                self._first.done = True
                self._barrier.wait(20.0)
            return plan

        monkeypatch.setattr(commits, "judge", wait_after_judging)
        yield


class TestManyProcesses:
    """Stores of their own on one Postgres, as ingest replicas have."""

    @pytest.fixture
    def url(self, postgres_store_url: str) -> str:
        """A Postgres database; SQLite has one ingest (contracts D3)."""
        return postgres_store_url

    @pytest.fixture
    def stores(self, url: str) -> Iterator[list[PostgresStore]]:
        """As many stores as writers, and a reader."""
        opened = [PostgresStore(url, writer_of="ingest") for _ in range(WRITERS + 1)]
        yield opened
        for store in opened:
            store.close()

    def test_a_reader_sees_every_row_once_and_in_order(self, stores: list[PostgresStore]) -> None:
        """While four processes' worth of stores commit, a reader misses nothing and sees nothing twice."""
        check(*run_together(stores[:WRITERS], stores[WRITERS]))

    @pytest.mark.parametrize("what", ["trajectory", "digest", "segment"])
    def test_a_race_is_resolved(
        self, stores: list[PostgresStore], monkeypatch: pytest.MonkeyPatch, what: str
    ) -> None:
        """Writers that judged before either wrote: one stores, the other finds it known or in conflict."""
        same = make_trajectory(1)
        other = {
            "trajectory": make_trajectory(1, spool_id="b", **_names(same.metadata)),
            "digest": make_trajectory(1, spool_id="b", body=b"other", **_names(same.metadata)),
            "segment": make_trajectory(1, spool_id="b", episode_id=same.metadata.episode_id),
        }[what]
        neighbours = [make_trajectory(2), make_trajectory(2, spool_id="b")]
        with Together(2).patched(monkeypatch), ThreadPoolExecutor(2) as pool:
            first = pool.submit(stores[0].commit, [same, neighbours[0]])
            second = pool.submit(stores[1].commit, [other, neighbours[1]])
            results = [first.result(60.0), second.result(60.0)]

        assert [result[1].outcome for result in results] == ["stored", "stored"]
        assert sorted(result[0].outcome for result in results) == sorted(
            ["stored", "known" if what == "trajectory" else "conflict"]
        )
        assert [item.position for item in stores[2].read(RUN_ID, 0, 10)] == [1, 2, 3]
        assert stores[2].audit(RUN_ID).missing == 0

    def test_a_race_across_runs_is_resolved(
        self, stores: list[PostgresStore], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The same id sent to two runs at once is stored in one of them and known to the other."""
        same = make_trajectory(1)
        other = make_trajectory(1, run_id="run-2", **_names(same.metadata))
        with Together(2).patched(monkeypatch), ThreadPoolExecutor(2) as pool:
            first = pool.submit(stores[0].commit, [same])
            second = pool.submit(stores[1].commit, [other])
            outcomes = sorted([first.result(60.0)[0].outcome, second.result(60.0)[0].outcome])
        assert outcomes == ["known", "stored"]

    def test_crossed_spools_do_not_deadlock(self, stores: list[PostgresStore]) -> None:
        """Batches that name the same spools and runs in different orders all come through."""
        everything = [
            make_trajectory(i, spool_id=f"s{spool}", run_id=f"run-{run}", **_unique(run, spool, i))
            for run in range(3)
            for spool in range(3)
            for i in range(1, 6)
        ]

        def write(number: int) -> None:
            chance = random.Random(number)
            for _ in range(6):
                stores[number].commit(chance.sample(everything, 20))
            stores[number].commit(chance.sample(everything, len(everything)))

        with ThreadPoolExecutor(WRITERS) as pool:
            list(pool.map(write, range(WRITERS)))
        for run in range(3):
            page = stores[0].read(f"run-{run}", 0, 100)
            assert [item.position for item in page] == list(range(1, 16))
            assert stores[0].audit(f"run-{run}").missing == 0


def _names(metadata: TrajectoryMetadata) -> dict[str, Any]:
    return {"trajectory_id": metadata.trajectory_id, "episode_id": metadata.episode_id}


def _unique(run: int, spool: int, number: int) -> dict[str, Any]:
    return {"trajectory_id": f"{run}-{spool}-{number}", "episode_id": f"{run}-{spool}-{number}"}


def _sequence_instead(connection: Connection, run_id: str, added: Sequence[object]) -> int:
    """Positions as a careless store would give them: from a sequence, which does not follow commit order."""
    numbers = connection.scalars(
        text("SELECT nextval('careless') FROM generate_series(1, :n)"), {"n": len(added)}
    )
    connection.execute(text("SELECT pg_sleep(random() * 0.02)"))
    first = int(min(numbers))
    connection.execute(
        text(
            "INSERT INTO run_counters VALUES (:r, :p, 0, 0, 0) ON CONFLICT (run_id) DO UPDATE "
            "SET last_position = greatest(run_counters.last_position, excluded.last_position)"
        ),
        {"r": run_id, "p": first + len(added) - 1},
    )
    return first


def _no_lock(connection: Connection, run_ids: object) -> None:
    """Leaves out the run's lock."""


class TestPlantedFault:
    """The check above is worth something: it fails on a store whose positions come from a sequence."""

    def test_a_sequence_loses_rows(
        self, packaged_postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With sequences in place of counters the reader passes rows that commit later, and misses them."""
        url = store_database(packaged_postgres)
        writers = [PostgresStore(url, writer_of="ingest") for _ in range(WRITERS)]
        with writers[0]._ingest.write() as connection:
            connection.execute(text("CREATE SEQUENCE careless"))
        monkeypatch.setattr(commits, "advance", _sequence_instead)
        monkeypatch.setattr(commits, "lock_runs", _no_lock)
        missed = _missed(writers)
        for store in writers:
            store.close()
        packaged_postgres.drop_database(url)
        assert missed


def _missed(writers: list[PostgresStore]) -> bool:
    """Whether a reader that polls without pause missed a row in one of several rounds."""
    done = threading.Event()
    seen: list[str] = []

    def poll() -> None:
        position = 0
        while not done.is_set():
            for item in writers[0].read(RUN_ID, position, 100):
                position = item.position
                seen.append(item.metadata.trajectory_id)

    def write(number: int) -> None:
        for sequence in range(1, 26):
            writers[number].commit([make_trajectory(sequence, spool_id=f"spool-{number}")])

    with ThreadPoolExecutor(WRITERS + 1) as pool:
        reading = pool.submit(poll)
        try:
            list(pool.map(write, range(WRITERS)))
        finally:
            done.set()
        reading.result(30.0)
    return len(set(seen)) < len(list(writers[0].trajectory_ids(RUN_ID)))
