"""What every trajectory store does with runs, clients, schemas and reading; each test runs on each store."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from relayrl_shared.errors import StoreError
from relayrl_shared.store.interface import TrajectoryStore
from relayrl_shared.testing.store import (
    RUN_ID,
    OpenStore,
    make_actor,
    make_run,
    make_trajectory,
    read_all,
)

pytestmark = pytest.mark.postgres


class TestRuns:
    """Runs are created once by name and keep their definition."""

    def test_a_run_reads_back_equal(self, store: TrajectoryStore) -> None:
        """A stored run is found by name, by id and in the list, equal to what was given."""
        run = make_run()
        assert store.create_run(run) == run

        assert store.run_by_name("cartpole") == run
        assert store.run_by_id(RUN_ID) == run
        assert store.runs() == [run]

    def test_an_unknown_run_is_none(self, store: TrajectoryStore) -> None:
        """Who asks for a run that is not there gets None."""
        assert store.run_by_name("nobody") is None
        assert store.run_by_id("nobody") is None

    def test_the_second_run_of_a_name_is_the_first(self, store: TrajectoryStore) -> None:
        """Creating a run whose name is taken returns the one that is there."""
        first = store.create_run(make_run())
        assert store.create_run(make_run(run_id="run-2", seed=8)) == first

    def test_a_run_id_of_another_name_is_refused(self, store: TrajectoryStore) -> None:
        """A run id that belongs to another name is an error, not another run."""
        store.create_run(make_run())
        with pytest.raises(StoreError, match="another name"):
            store.create_run(make_run(name="pendulum"))

    def test_the_creation_time_is_filled_in(self, store: TrajectoryStore) -> None:
        """A run without a creation time gets the store's."""
        assert store.create_run(make_run(created_at=0.0)).created_at > 1e9

    def test_the_state_and_its_reason_are_kept(self, store: TrajectoryStore) -> None:
        """The state of a run changes and its definition stays."""
        run = store.create_run(make_run())
        store.set_run_state(RUN_ID, "failed", "the cursor was pruned")
        expected = msgspec.structs.replace(run, state="failed", state_reason="the cursor was pruned")
        assert store.run_by_id(RUN_ID) == expected

    def test_a_learner_notes_a_failure_where_it_may(self, store_url: str, open_stores: OpenStore) -> None:
        """One database takes it from any writer; a file of SQLite only from its owner (decision 0001)."""
        owner = open_stores(writer_of="ingest")
        owner.create_run(make_run())
        learner = open_stores(writer_of="learner")
        if store_url.startswith("sqlite"):
            with pytest.raises(StoreError, match="only 'ingest'"):
                learner.set_run_state(RUN_ID, "failed", "no")
        else:
            learner.set_run_state(RUN_ID, "failed", "no")
        with pytest.raises(StoreError):
            open_stores(writer_of=None).set_run_state(RUN_ID, "failed", "no")

        run = owner.run_by_id(RUN_ID)
        assert run is not None
        assert (run.state == "failed") == (not store_url.startswith("sqlite"))

    def test_eight_creators_agree(self, store: TrajectoryStore) -> None:
        """Threads that create a run of one name at once all get the same run."""
        start = threading.Barrier(8)

        def create(number: int) -> str:
            start.wait()
            return store.create_run(make_run(run_id=f"run-{number}")).run_id

        with ThreadPoolExecutor(8) as pool:
            found = set(pool.map(create, range(8)))

        assert len(found) == 1
        assert [run.run_id for run in store.runs()] == list(found)


class TestClients:
    """Clients keep their index; their actors come and go."""

    def test_the_index_of_a_client_stays(self, store: TrajectoryStore) -> None:
        """Clients are numbered from 0 in a run, and one that comes again has its number."""
        indices = [store.join_client(RUN_ID, name, [], 0) for name in ("a", "b", "a", "c")]
        assert indices == [0, 1, 0, 2]
        assert store.join_client("run-2", "c", [], 0) == 0

    def test_the_index_outlives_a_goodbye(self, store: TrajectoryStore) -> None:
        """A client that left and joins again has its number, and others never get it."""
        store.join_client(RUN_ID, "a", [], 0)
        store.leave_client(RUN_ID, "a")
        assert store.join_client(RUN_ID, "b", [], 0) == 1
        assert store.join_client(RUN_ID, "a", [], 0) == 0

    def test_eight_clients_at_once_get_eight_indices(self, store: TrajectoryStore) -> None:
        """Clients that join at once never share an index."""
        with ThreadPoolExecutor(8) as pool:
            indices = list(pool.map(lambda i: store.join_client(RUN_ID, f"client-{i}", [], 0), range(8)))
        assert sorted(indices) == list(range(8))

    def test_live_actors_come_in_order_with_their_client(self, store: TrajectoryStore) -> None:
        """Live actors are sorted by client and actor index and carry what the hello said."""
        store.join_client(RUN_ID, "b", [make_actor("b1", 1), make_actor("b0", 0)], 3)
        store.join_client(RUN_ID, "a", [make_actor("a0", 0)], 5)

        found = store.live_actors(RUN_ID)

        assert [(actor.info.actor_id, actor.client_index) for actor in found] == [
            ("b0", 0),
            ("b1", 0),
            ("a0", 1),
        ]
        assert found[0].info == make_actor("b0", 0)
        assert (found[2].first_rollout_index, found[2].client_id, found[2].left_at) == (5, "a", None)

    def test_a_new_hello_replaces_the_actors(self, store: TrajectoryStore) -> None:
        """Actors that the newer hello does not name have left; those that it names live from its rollout."""
        store.join_client(RUN_ID, "a", [make_actor("old", 0), make_actor("both", 1)], 0)
        store.join_client(RUN_ID, "a", [make_actor("both", 1), make_actor("new", 2)], 4)

        found = {actor.info.actor_id: actor.first_rollout_index for actor in store.live_actors(RUN_ID)}
        assert found == {"both": 4, "new": 4}

    def test_actors_change(self, store: TrajectoryStore) -> None:
        """Added actors live from the given rollout on, removed ones have left, the rest stay."""
        store.join_client(RUN_ID, "a", [make_actor("stays", 0), make_actor("goes", 1)], 0)
        store.change_actors(RUN_ID, "a", [make_actor("comes", 2)], ["goes"], 6)

        found = {actor.info.actor_id: actor.first_rollout_index for actor in store.live_actors(RUN_ID)}
        assert found == {"stays": 0, "comes": 6}

    def test_a_touch_tells_whether_the_client_is_known(self, store: TrajectoryStore) -> None:
        """Heartbeats of clients that never joined or have left are answered with False."""
        assert not store.touch_client(RUN_ID, "a", [])
        store.join_client(RUN_ID, "a", [make_actor()], 0)
        assert store.touch_client(RUN_ID, "a", [])
        store.leave_client(RUN_ID, "a")
        assert not store.touch_client(RUN_ID, "a", [])
        assert store.live_actors(RUN_ID) == []

    def test_silent_clients_expire_once(self, store: TrajectoryStore) -> None:
        """Clients silent for long enough are marked as left and named once; the others stay."""
        store.join_client(RUN_ID, "a", [make_actor()], 0)
        assert store.expire_clients(60.0) == []
        assert store.expire_clients(-1.0) == ["a"]
        assert store.expire_clients(-1.0) == []
        assert store.live_actors(RUN_ID) == []
        assert not store.touch_client(RUN_ID, "a", [])


class TestSchemas:
    """Schemas are bytes behind a digest."""

    def test_a_schema_reads_back_and_stays(self, store: TrajectoryStore) -> None:
        """The bytes of a digest come back; putting them again is nothing; an unknown digest is None."""
        store.put_schema("digest", b"\x00schema")
        store.put_schema("digest", b"\x00schema")
        assert store.schema("digest") == b"\x00schema"
        assert store.schema("another") is None


class TestReading:
    """What was committed comes back whole, in order and within limits."""

    def test_a_trajectory_reads_back_equal_in_every_bit(self, store: TrajectoryStore) -> None:
        """Metadata, body and final observation read back as they were given."""
        item = make_trajectory(
            1, body=bytes(range(256)) * 300, final_observation=b"\x00\xff", seed=(1 << 64) - 1, agent_id="a"
        )
        (result,) = store.commit([item])
        assert (result.outcome, result.position) == ("stored", 1)

        (found,) = store.read(RUN_ID, 0, 10)

        assert found.metadata == item.metadata
        assert (found.body, found.final_observation) == (item.body, item.final_observation)
        assert (found.position, found.learner_update_range) == (1, (0, 1))

    def test_an_empty_body_and_no_final_observation(self, store: TrajectoryStore) -> None:
        """Empty bytes stay empty bytes and None stays None."""
        store.commit([make_trajectory(1, body=b""), make_trajectory(2, final_observation=b"")])
        first, second = store.read(RUN_ID, 0, 10)
        assert (first.body, first.final_observation) == (b"", None)
        assert second.final_observation == b""

    def test_reading_goes_on_from_a_position(self, store: TrajectoryStore) -> None:
        """A reader gets what lies after its position, in order, at most its limit, of its run only."""
        store.commit([make_trajectory(i) for i in range(1, 6)])
        store.commit([make_trajectory(1, run_id="run-2", spool_id="other")])

        assert [item.position for item in store.read(RUN_ID, 0, 2)] == [1, 2]
        assert [item.position for item in store.read(RUN_ID, 2, 10)] == [3, 4, 5]
        assert store.read(RUN_ID, 5, 10) == []
        assert [item.position for item in store.read("run-2", 0, 10)] == [1]

    def test_reading_stops_at_the_bytes(self, store: TrajectoryStore) -> None:
        """A read takes no more bytes than asked for, yet always one trajectory."""
        store.commit([make_trajectory(i, body=bytes(1000)) for i in range(1, 5)])
        assert [item.position for item in store.read(RUN_ID, 0, 10, max_bytes=2500)] == [1, 2]
        assert [item.position for item in store.read(RUN_ID, 1, 10, max_bytes=1)] == [2]

    def test_counts(self, store: TrajectoryStore) -> None:
        """The counters add up trajectories, steps and ended episodes of the run; all 0 before the first."""
        assert set(store.counts(RUN_ID).values()) == {0}
        store.commit([make_trajectory(1, steps=3), make_trajectory(2, steps=4, terminated=False)])
        store.commit([make_trajectory(3, steps=5, terminated=False, truncated=True)])
        assert store.counts(RUN_ID) == {
            "trajectories": 3,
            "steps": 12,
            "episodes": 2,
            "quarantined": 0,
            "last_position": 3,
        }

    def test_find_by_actor_and_episode(self, store: TrajectoryStore) -> None:
        """Metadata is found by actor and by episode, in order, within the limit."""
        segments = [make_trajectory(i, episode_id="e", segment_index=i, actor_id="x") for i in (1, 2, 3)]
        store.commit([*segments, make_trajectory(4)])

        assert [m.sequence for m in store.find(RUN_ID, episode_id="e")] == [1, 2, 3]
        assert [m.sequence for m in store.find(RUN_ID, actor_id="x", limit=2)] == [1, 2]
        assert [m.sequence for m in store.find(RUN_ID)] == [1, 2, 3, 4]
        assert store.find("run-2", actor_id="x") == []

    def test_all_ids_in_order(self, store: TrajectoryStore) -> None:
        """The ids of a run come in the order of positions."""
        items = [make_trajectory(i) for i in (3, 1, 2)]
        store.commit(items)
        assert list(store.trajectory_ids(RUN_ID)) == [item.metadata.trajectory_id for item in items]

    def test_another_store_reads_what_is_committed(
        self, store: TrajectoryStore, open_stores: OpenStore
    ) -> None:
        """A reader that was open before sees what was committed after."""
        reader = open_stores()
        assert reader.runs() == []
        store.create_run(make_run())
        store.commit([make_trajectory(1)])
        assert reader.run_by_id(RUN_ID) == make_run()
        assert read_all(reader) == read_all(store) == list(store.trajectory_ids(RUN_ID))

    def test_a_reader_does_not_write(self, store: TrajectoryStore, open_stores: OpenStore) -> None:
        """A store that was opened to read refuses to write, and says how to open it."""
        reader = open_stores()
        with pytest.raises(StoreError, match="writer_of"):
            reader.commit([make_trajectory(1)])
        with pytest.raises(StoreError, match="writer_of"):
            reader.acquire_lease(RUN_ID, "me", 1.0)

    def test_ping(self, store: TrajectoryStore) -> None:
        """A reachable store answers."""
        store.ping()


class TestWaiting:
    """A reader waits for a later position."""

    def test_what_is_there_is_not_waited_for(self, store: TrajectoryStore) -> None:
        """A position that the run has passed is reported at once."""
        store.commit([make_trajectory(1)])
        assert store.wait(RUN_ID, 0, 0.0)
        assert not store.wait(RUN_ID, 1, 0.0)

    def test_a_commit_of_another_store_wakes_the_reader(
        self, store: TrajectoryStore, open_stores: OpenStore
    ) -> None:
        """A wait ends with True when another store commits, long before its time is over."""
        reader = open_stores()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(reader.wait, RUN_ID, 0, 30.0)
            store.commit([make_trajectory(1)])
            assert waiting.result(10.0)

    def test_closing_ends_the_wait(self, open_stores: OpenStore, store: TrajectoryStore) -> None:
        """A wait ends with False when its store is closed."""
        reader = open_stores()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(reader.wait, RUN_ID, 0, 30.0)
            reader.close()
            assert not waiting.result(10.0)
