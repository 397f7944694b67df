"""Trajectories over real sockets into a real SQLite store: once each, acknowledged after the commit only."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from relayrl_shared import frames, messages
from relayrl_shared.arrow_codec import body_digest
from relayrl_shared.errors import (
    ContractError,
    FrameError,
    InvalidTrajectory,
    MessageTooLarge,
    StoreUnavailable,
)
from relayrl_shared.messages import Ack, ErrorReply, Nack
from relayrl_shared.store.interface import CommitResult, IncomingTrajectory, TrajectoryStore
from relayrl_shared.store.open import open_store
from relayrl_shared.testing.trajectories import make_trajectory, small_schema


def nack_of(reply: object) -> tuple[str, bool]:
    """Reason and retryable of a nack."""
    assert isinstance(reply, Nack), reply
    return reply.reason, reply.retryable


def stored_ids(served: Any, run_id: str) -> list[str]:
    """What the store has of a run."""
    store: TrajectoryStore = served.store
    return list(store.trajectory_ids(run_id))


def test_a_trajectory_is_stored_and_acknowledged(served: Any, client: Any) -> None:
    """What is sent is in the store, bit for bit, when its acknowledgement comes."""
    message, payload = client.make(1)

    reply = client.send(message, payload)

    [stored] = served.store.read(client.run_id, 0, 10)
    assert reply == Ack(request_id=reply.request_id, spool_id="spool", run_id=client.run_id, sequence=1)
    assert (message.trajectory, *payload) == (stored.metadata, stored.body, stored.final_observation)
    assert stored.learner_update_range == (0, 0)


def test_a_resend_gets_one_row_and_an_acknowledgement_each_time(served: Any, client: Any) -> None:
    """However often a trajectory comes, it is stored once and acknowledged every time."""
    message, payload = client.make(1)

    replies = [client.send(message, payload) for _ in range(4)]

    assert all(isinstance(reply, Ack) for reply in replies)
    assert stored_ids(served, client.run_id) == [message.trajectory.trajectory_id]


def test_many_at_once_are_all_stored_once(served: Any, client: Any) -> None:
    """A window of trajectories in flight, each sent twice, ends as one row each."""
    acknowledged: list[int] = []
    done = threading.Semaphore(0)

    def on_reply(reply: object, _payload: object, _error: object) -> None:
        if isinstance(reply, Ack):
            acknowledged.append(reply.sequence)
        done.release()

    made = [client.make(sequence) for sequence in range(1, 101)]
    for message, payload in made + made:
        client.trajectories.submit(message, payload, timeout_seconds=30, on_reply=on_reply)
    for _ in range(200):
        assert done.acquire(timeout=30)

    assert sorted(acknowledged) == sorted([*range(1, 101), *range(1, 101)])
    assert len(stored_ids(served, client.run_id)) == 100
    assert served.store.audit(client.run_id).stored_twice == 0


class HeldStore:
    """A real store whose commits wait for the test, or fail as it says."""

    def __init__(self, store: TrajectoryStore) -> None:
        self._store = store
        self.go = threading.Event()
        self.go.set()
        self.entered = threading.Event()
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def commit(self, batch: Sequence[IncomingTrajectory]) -> list[CommitResult]:
        """Waits, fails or commits."""
        self.entered.set()
        assert self.go.wait(20)
        if self.error is not None:
            raise self.error
        return self._store.commit(batch)


@pytest.fixture
def held(tmp_path: Any, start_ingest: Callable[..., Any]) -> Any:
    """A store that the test holds; it closes after the ingest that uses it."""
    store = HeldStore(open_store(f"sqlite:///{tmp_path / 'held'}", writer_of="all"))
    yield store
    store.go.set()


@pytest.fixture
def held_client(held: HeldStore, start_ingest: Callable[..., Any]) -> Any:
    """A joined client of an ingest over the held store."""
    client = start_ingest(store=held, training_server_config__ingest__retry_after_seconds="0.05").client()
    client.hello()
    client.put_schema()
    yield client
    held.go.set()


def test_no_acknowledgement_before_the_commit(held: HeldStore, held_client: Any) -> None:
    """While the transaction is open there is no answer; it comes when the transaction has ended."""
    held.go.clear()
    answered = threading.Event()
    message, payload = held_client.make(1)
    held_client.trajectories.submit(
        message, payload, timeout_seconds=30, on_reply=lambda *_answer: answered.set()
    )

    assert held.entered.wait(10)
    assert not answered.wait(0.2)
    assert list(held.trajectory_ids(held_client.run_id)) == []
    held.go.set()
    assert answered.wait(10)
    assert list(held.trajectory_ids(held_client.run_id)) == [message.trajectory.trajectory_id]


def test_a_store_that_is_away_is_a_retryable_nack_until_it_is_back(held: HeldStore, held_client: Any) -> None:
    """Nothing is acknowledged while the store is away; the same message is stored when it is back."""
    message, payload = held_client.make(1)
    held.error = StoreUnavailable("the database is away")

    refused = held_client.send(message, payload)
    held.error = None
    while isinstance(reply := held_client.send(message, payload), Nack):
        assert nack_of(reply) == ("store_unavailable", True)
        threading.Event().wait(0.02)

    assert nack_of(refused) == ("store_unavailable", True)
    assert refused.retry_after_seconds == 0.05
    assert isinstance(reply, Ack)


def test_readiness_says_that_the_store_is_away(
    tmp_path: Any, held: HeldStore, start_ingest: Callable[..., Any]
) -> None:
    """The reason stands under the item `store` until a commit succeeds."""
    served = start_ingest(store=held)
    client = served.client()
    client.hello()
    client.put_schema()
    held.error = StoreUnavailable("the database is away")
    client.put(1)

    assert served.ingest.readiness()["store"] == "the database is away"


def test_a_row_that_the_store_refuses_goes_to_quarantine_and_the_others_are_stored(
    held: HeldStore, held_client: Any
) -> None:
    """One bad row in a group commit costs only itself."""
    bad, bad_payload = held_client.make(1)
    commit = held.commit

    def refuse_bad(batch: Sequence[IncomingTrajectory]) -> list[CommitResult]:
        if any(row.metadata.sequence == 1 for row in batch):
            raise ValueError("no such column")
        return commit(batch)

    held.commit = refuse_bad  # type: ignore[method-assign]
    held.go.clear()
    replies: dict[int, object] = {}
    done = threading.Semaphore(0)
    for sequence in (1, 2, 3):
        message, payload = (bad, bad_payload) if sequence == 1 else held_client.make(sequence)

        def on_reply(reply: object, _payload: object, _error: object, sequence: int = sequence) -> None:
            replies[sequence] = reply
            done.release()

        held_client.trajectories.submit(message, payload, timeout_seconds=30, on_reply=on_reply)
    held.go.set()
    for _ in range(3):
        assert done.acquire(timeout=20)

    assert nack_of(replies[1]) == ("store_refused", False)
    assert isinstance(replies[2], Ack)
    assert isinstance(replies[3], Ack)
    assert [row.trajectory_id for row in held.quarantined(held_client.run_id)] == [
        bad.trajectory.trajectory_id
    ]


def test_an_invalid_trajectory_is_in_quarantine_before_its_terminal_nack(served: Any, client: Any) -> None:
    """The nack names the reason; the row holds header and payload whole, and the audit counts it."""
    made = make_trajectory(
        client.schema, 3, run_id=client.run_id, policy="cartpole", schema_digest=client.digest
    )
    made.columns.reward[1] = np.nan
    message, payload = client.encode(made)

    reply = client.send(message, payload)

    [row] = served.store.quarantined(client.run_id)
    assert nack_of(reply) == ("reward_not_finite", False)
    assert (row.reason, row.spool_id, row.sequence) == ("reward_not_finite", "spool", 1)
    assert msgspec.msgpack.decode(row.header, type=messages.PutTrajectory).trajectory == message.trajectory
    assert msgspec.msgpack.decode(row.payload) == payload
    assert stored_ids(served, client.run_id) == []
    assert nack_of(client.send(message, payload)) == ("reward_not_finite", False)
    assert len(served.store.quarantined(client.run_id)) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"steps": 9}, None),
        ({"body_digest": "0" * 64}, "body_digest"),
        ({"policy": "another"}, "metadata"),
        ({"episode_id": ""}, "metadata"),
        ({"spool_id": "a\0b"}, "metadata"),
        ({"sequence": 2**63}, "metadata"),
        ({"started_at": float("nan")}, "metadata"),
        ({"rollout_index": -1}, "metadata"),
        ({"run_id": "nobody"}, "unknown_run"),
    ],
)
def test_what_metadata_may_not_say_is_refused_for_good(
    served: Any, client: Any, changes: dict[str, Any], reason: str | None
) -> None:
    """Ids that no store can keep, numbers out of range and contradictions end in quarantine, by reason."""
    message, payload = client.make(1)
    changed = msgspec.structs.replace(message.trajectory, **changes)

    reply = client.send(msgspec.structs.replace(message, trajectory=changed), payload)

    [row] = served.store.quarantined()
    assert isinstance(reply, Nack)
    assert not reply.retryable
    assert reason is None or reply.reason == reason
    assert row.reason == reply.reason
    assert isinstance(client.put(2), Ack)


@pytest.mark.parametrize("fault", ["metadata", "message_too_large"])
def test_a_run_that_does_not_exist_gets_no_rows_by_its_name(
    fault: str, start_ingest: Callable[..., Any]
) -> None:
    """What strangers call a run is in the header alone: no spool, no totals, no sequence is kept for it."""
    served = start_ingest(training_server_config__ingest__limits__max_message_bytes="100000")
    client = served.client()
    changes = {"steps": 0} if fault == "metadata" else {}
    message, payload = client.make(1, run_id="nobody")
    changed = msgspec.structs.replace(message.trajectory, **changes)
    frames = payload if fault == "metadata" else [bytes(150_000), b""]

    reply = client.send(msgspec.structs.replace(message, trajectory=changed), frames)

    [row] = served.store.quarantined()
    assert nack_of(reply) == (fault, False)
    assert (row.run_id, row.spool_id, row.sequence, row.trajectory_id) == (None, None, None, None)
    assert served.store.audit("nobody").accepted == 0
    assert served.store.counts("nobody")["quarantined"] == 0


def test_a_far_future_rollout_is_refused_where_a_pool_would_wait_for_it(served: Any) -> None:
    """Under block a rollout that no learner reaches goes to quarantine; under free it is bookkeeping."""
    replies = {}
    for pacing in ("block", "free"):
        client = served.client()
        client.hello(name=pacing, pacing=pacing)
        client.put_schema()
        message, payload = client.make(1, policy=pacing)
        changed = msgspec.structs.replace(message.trajectory, rollout_index=1_000_001)
        replies[pacing] = client.send(msgspec.structs.replace(message, trajectory=changed), payload)

    assert nack_of(replies["block"]) == ("metadata", False)
    assert isinstance(replies["free"], Ack)


def test_an_unknown_schema_is_asked_for(served: Any) -> None:
    """The first trajectory of a schema is refused for now; it is stored once the schema has come."""
    client = served.client()
    client.hello()
    message, payload = client.make(1)

    refused = client.send(message, payload)
    client.put_schema()
    client.put_schema()

    assert nack_of(refused) == ("unknown_schema", True)
    assert isinstance(client.send(message, payload), Ack)


def test_a_schema_that_lies_is_refused(client: Any) -> None:
    """A schema has to hash to its digest, to parse and to be possible."""
    peer = client.trajectories
    with pytest.raises(InvalidTrajectory, match="hash"):
        peer.request(messages.PutSchema(digest="0" * 64), [b"abc"], timeout_seconds=10)
    with pytest.raises(MessageTooLarge):
        peer.request(messages.PutSchema(digest="0" * 64), [bytes(2 << 20)], timeout_seconds=10)


def test_a_trajectory_of_other_specs_than_the_runs_is_refused(served: Any, client: Any) -> None:
    """A schema that is valid but not the run's goes to quarantine by name."""
    other = served.client(small_schema(observation_size=5))
    other.run_id = client.run_id
    other.put_schema()

    reply = other.put(1)

    assert nack_of(reply) == ("spec_mismatch", False)
    assert "observation_spec" in reply.detail


def test_the_same_id_with_other_content_is_a_conflict(served: Any, client: Any) -> None:
    """A known trajectory id, or a known segment of an episode, with other content goes to quarantine."""
    first, payload = client.make(1)
    client.send(first, payload)

    same_id = client.put(2, trajectory_id=first.trajectory.trajectory_id)
    same_segment = client.put(3, episode_id=first.trajectory.episode_id)

    assert nack_of(same_id) == ("conflict", False)
    assert nack_of(same_segment) == ("conflict", False)
    assert len(stored_ids(served, client.run_id)) == 1


def test_nan_is_taken_where_the_run_allows_it(served: Any) -> None:
    """allow_nan is a field of the run's spec: refused by default, stored where it was set."""
    replies = {}
    for allowed in (False, True):
        client = served.client()
        client.hello(name=f"run-{allowed}", allow_nan=allowed)
        client.put_schema()
        made = make_trajectory(
            client.schema, 3, run_id=client.run_id, policy=f"run-{allowed}", schema_digest=client.digest
        )
        made.columns.observation["observation"][0, 0] = np.nan
        replies[allowed] = client.send(*client.encode(made))

    assert nack_of(replies[False]) == ("nan", False)
    assert isinstance(replies[True], Ack)


def test_an_oversize_trajectory_is_nacked_for_good(start_ingest: Callable[..., Any]) -> None:
    """Above the limit only the header is kept, and the nack is terminal: the spool need not try for ever."""
    served = start_ingest(training_server_config__ingest__limits__max_message_bytes="100000")
    client = served.client()
    client.hello()
    message, _ = client.make(1)

    reply = client.send(message, [bytes(150_000), b""])

    [row] = served.store.quarantined(client.run_id)
    assert nack_of(reply) == ("message_too_large", False)
    assert (row.reason, row.payload, row.sequence) == ("message_too_large", None, 1)


def test_more_than_the_queue_holds_is_refused_for_now(
    tmp_path: Any, held: HeldStore, start_ingest: Callable[..., Any]
) -> None:
    """Back-pressure is a retryable nack with a delay, not growth."""
    served = start_ingest(
        store=held,
        training_server_config__ingest__limits__max_queued="2",
        training_server_config__ingest__commit_rows="1",
    )
    client = served.client()
    client.hello()
    client.put_schema()
    held.go.clear()
    replies: list[object] = []
    done = threading.Semaphore(0)

    def on_reply(reply: object, _payload: object, _error: object) -> None:
        replies.append(reply)
        done.release()

    for sequence in range(1, 11):
        message, payload = client.make(sequence)
        client.trajectories.submit(message, payload, timeout_seconds=30, on_reply=on_reply)
    for _ in range(7):
        assert done.acquire(timeout=10)
    refused = list(replies)
    held.go.set()
    for _ in range(3):
        assert done.acquire(timeout=10)

    assert {nack_of(reply) for reply in refused} == {("overloaded", True)}
    assert len([reply for reply in replies if isinstance(reply, Ack)]) >= 2


@pytest.mark.parametrize("socket_name", ["agent_listener", "trajectory_server"])
@pytest.mark.parametrize(
    ("received", "code"),
    [
        ([b"garbage"], "frame"),
        ([b""], "frame"),
        ([msgspec.msgpack.encode({"kind": "hello", "request_id": 3})], "frame"),
        ([msgspec.msgpack.encode({"kind": "nothing", "request_id": 3})], "frame"),
        ([msgspec.msgpack.encode({"kind": "ok", "version": 7})], "protocol_version"),
        ([msgspec.msgpack.encode({"kind": "ok"}), bytes(200_000)], "message_too_large"),
    ],
)
def test_garbage_gets_an_error_a_counter_and_a_row_and_the_next_is_served(
    start_ingest: Callable[..., Any], socket_name: str, received: list[bytes], code: str
) -> None:
    """Whatever comes on whichever socket, the process says what is wrong and goes on."""
    served = start_ingest(training_server_config__ingest__limits__max_message_bytes="100000")
    socket = getattr(served.ingest, socket_name)
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.set(zmq.LINGER, 0)
        dealer.set(zmq.RCVTIMEO, 10_000)
        dealer.connect(f"tcp://127.0.0.1:{socket.port}")
        dealer.send_multipart(received)
        reply, _ = frames.decode(dealer.recv_multipart())

    client = served.client()
    client.hello()
    client.put_schema()
    assert isinstance(client.put(1), Ack)
    [row] = served.store.quarantined()
    assert isinstance(reply, ErrorReply)
    assert reply.code == row.reason == code
    assert socket_name in row.detail
    assert len(row.payload or b"") <= 64 << 10
    assert socket.statistics().rejected_total == {code: 1}


def test_truncated_frames_are_quarantined(client: Any) -> None:
    """A body cut short, with a digest that fits it, is refused by the codec; the process goes on."""
    message, payload = client.make(1)
    for cut in (0, 1, len(payload[0]) // 2, len(payload[0]) - 1):
        body = payload[0][:cut]
        metadata = msgspec.structs.replace(
            message.trajectory, body_digest=body_digest(body, payload[1]), sequence=cut + 10
        )
        reply = client.send(messages.PutTrajectory(trajectory=metadata), [body, payload[1]])
        assert isinstance(reply, Nack), cut
        assert not reply.retryable

    assert isinstance(client.send(message, payload), Ack)


def test_a_flood_of_garbage_is_counted_and_only_partly_kept(served: Any) -> None:
    """Rows for garbage are bounded in rate; the rest is counted, and every sender gets its error."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.set(zmq.LINGER, 0)
        dealer.set(zmq.RCVTIMEO, 10_000)
        dealer.connect(f"tcp://127.0.0.1:{served.ingest.trajectory_server.port}")
        for _ in range(300):
            dealer.send_multipart([b"garbage"])
        for _ in range(300):
            dealer.recv_multipart()

    assert served.ingest.trajectory_server.statistics().rejected_total == {"frame": 300}
    assert served.ingest.metrics.registry.get_sample_value(
        "relayrl_training_server_ingest_garbage_unkept_total"
    )
    assert len(served.store.quarantined(limit=1000)) < 100


def test_messages_for_another_socket_are_refused_by_name(client: Any) -> None:
    """Each socket says what it does not take."""
    with pytest.raises(ContractError, match="agent listener takes no put_schema"):
        client.listener.request(messages.PutSchema(digest="d"), [b""], timeout_seconds=10)
    with pytest.raises(ContractError, match="trajectory server takes no goodbye"):
        client.trajectories.request(messages.Goodbye(client_id="c", run_id="r"), timeout_seconds=10)
    with pytest.raises(FrameError):
        client.trajectories.request(
            messages.Ack(spool_id="s", run_id="r", sequence=1), [b""], timeout_seconds=10
        )


def test_a_drain_answers_what_was_taken(served: Any, client: Any) -> None:
    """Stopping commits and acknowledges everything that was taken."""
    replies: list[object] = []
    done = threading.Semaphore(0)

    def on_reply(reply: object, _payload: object, _error: object) -> None:
        replies.append(reply)
        done.release()

    made = [client.make(sequence) for sequence in range(1, 51)]
    for message, payload in made:
        client.trajectories.submit(message, payload, timeout_seconds=10, on_reply=on_reply)
    assert done.acquire(timeout=10)
    served.stop()
    for _ in range(49):
        assert done.acquire(timeout=20)

    acknowledged = {reply.sequence for reply in replies if isinstance(reply, Ack)}
    stored = {row.metadata.sequence for row in served.store.read(client.run_id, 0, 100)}
    assert acknowledged == stored
