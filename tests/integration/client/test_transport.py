"""The way to the server over real sockets: everything accepted arrives, once is enough, whatever breaks."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from relayrl_client.delivery import RoutedDelivery, open_delivery
from relayrl_client.segments import ClosedSegment
from relayrl_client.spool import Spool
from relayrl_client.transport import TrajectorySender, TransportSink
from relayrl_shared.arrow_codec import body_digest, decode_columns, encode_schema, schema_digest
from relayrl_shared.errors import (
    FrameError,
    InvalidTrajectory,
    MessageTooLarge,
    Overloaded,
    RunMismatch,
    StoreUnavailable,
)
from relayrl_shared.messages import Ack, AnyMessage, Limits, Nack, Ok, PutSchema, PutTrajectory
from relayrl_shared.sockets import Incoming, Peer, RouterServer
from relayrl_shared.store.open import open_store
from relayrl_shared.testing.tcp_proxy import TcpProxy
from relayrl_shared.testing.trajectories import make_trajectory, small_schema
from relayrl_shared.trajectory import TrajectoryMetadata

SCHEMA = small_schema()
DIGEST = schema_digest(SCHEMA)
Decide = Callable[[TrajectoryMetadata, int], AnyMessage | Exception | None]


class Store:
    """What the server of these tests has stored; it outlives the server."""

    def __init__(self) -> None:
        self.trajectories: dict[str, TrajectoryMetadata] = {}
        self.order: list[TrajectoryMetadata] = []
        self.schemas: dict[str, bytes] = {}
        self.tries: dict[str, int] = {}
        self.most_at_once = 0
        self.schema_refusal: Exception | None = None


class TrajectoryServer:
    """A real socket server that checks and stores, and answers as `decide` says: None means an ack."""

    def __init__(self, store: Store, decide: Decide, port: int) -> None:
        self.store = store
        self.decide = decide
        self._stop = threading.Event()
        self._router = RouterServer(f"tcp://127.0.0.1:{port}")
        self.port = self._router.port
        self._thread = threading.Thread(target=self._router.run, args=(self._handle, self._stop))
        self._thread.start()

    @property
    def address(self) -> str:
        """Where to connect."""
        return f"tcp://127.0.0.1:{self.port}"

    def _handle(self, batch: list[Incoming]) -> None:
        self.store.most_at_once = max(self.store.most_at_once, len(batch))
        for incoming in batch:
            answer = self._answer(incoming)
            if isinstance(answer, Exception):
                self._router.reply_error(incoming, answer)
            elif answer is not None:
                self._router.reply(incoming, answer)

    def _answer(self, incoming: Incoming) -> AnyMessage | Exception | None:
        message = incoming.message
        if isinstance(message, PutSchema):
            if self.store.schema_refusal is not None:
                return self.store.schema_refusal
            self.store.schemas[message.digest] = bytes(incoming.payload[0])
            return Ok()
        assert isinstance(message, PutTrajectory)
        metadata = message.trajectory
        tries = self.store.tries[metadata.trajectory_id] = self.store.tries.get(metadata.trajectory_id, 0) + 1
        decided = self.decide(metadata, tries)
        if decided is not None:
            return None if decided is SILENCE else decided
        body, final = incoming.payload
        assert body_digest(body, final) == metadata.body_digest
        decode_columns(SCHEMA, body, metadata.steps)
        if metadata.trajectory_id not in self.store.trajectories:
            self.store.trajectories[metadata.trajectory_id] = metadata
            self.store.order.append(metadata)
        return Ack(spool_id=metadata.spool_id, run_id=metadata.run_id, sequence=metadata.sequence)

    def close(self) -> None:
        """Stops serving at once."""
        self._stop.set()
        self._router.wake()
        self._thread.join()
        self._router.close()


SILENCE = Ok()


def nack(metadata: TrajectoryMetadata, reason: str, after: float | None = None) -> Nack:
    """A refusal; retryable where a time is given."""
    return Nack(
        spool_id=metadata.spool_id,
        run_id=metadata.run_id,
        sequence=metadata.sequence,
        reason=reason,
        retryable=after is not None,
        retry_after_seconds=after,
    )


def segment(number: int, actor_id: str = "actor", run_id: str = "run") -> ClosedSegment:
    """A closed segment as the recorder hands it over."""
    made = make_trajectory(
        SCHEMA,
        3,
        seed=number,
        actor_id=actor_id,
        run_id=run_id,
        segment_index=number,
        spool_id="",
        sequence=0,
    )
    return ClosedSegment(made.metadata, made.columns, made.final_observation)


@pytest.fixture
def store() -> Store:
    """An empty store."""
    return Store()


@pytest.fixture
def serve(store: Store) -> Iterator[Callable[..., TrajectoryServer]]:
    """Starts servers and stops them afterwards."""
    servers: list[TrajectoryServer] = []

    def start(decide: Decide = lambda metadata, tries: None, port: int = 0) -> TrajectoryServer:
        servers.append(TrajectoryServer(store, decide, port))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Callable[..., TransportSink]]:
    """Opens sinks with a spool each below one directory, and closes them afterwards."""
    opened: list[TransportSink] = []

    def make(address: str, spool_id: str = "spool", reply_timeout_seconds: float = 5.0) -> TransportSink:
        sender = TrajectorySender(
            Peer(address), max_in_flight=8, reply_timeout_seconds=reply_timeout_seconds, jitter=lambda: 0.0
        )
        opened.append(TransportSink(SCHEMA, Spool(tmp_path, spool_id), sender))
        return opened[-1]

    yield make
    for sink in opened:
        sink.close()


def write(sink: TransportSink, count: int, actors: str = "a", first: int = 0) -> list[str]:
    """Writes segments of the actors in turn; their ids."""
    made = [segment(first + number, actors[number % len(actors)]) for number in range(count)]
    for each in made:
        sink.write(each)
    return [each.metadata.trajectory_id for each in made]


def test_all_arrives_in_order(
    store: Store, serve: Callable[..., TrajectoryServer], connect: Callable[..., TransportSink]
) -> None:
    """What is written is stored with its place in the spool, and the spool is empty afterwards."""
    sink = connect(serve().address)

    written = write(sink, 100, "abc")

    assert sink.drain(30)
    assert [metadata.trajectory_id for metadata in store.order] == written
    assert [metadata.sequence for metadata in store.order] == list(range(1, 101))
    assert {metadata.schema_digest for metadata in store.order} == {DIGEST}
    assert sink.spool.pending_count() == 0
    assert sink.sender.statistics().acknowledged_total == 100


def test_nothing_is_sent_before_it_is_accepted(
    tmp_path: Path, store: Store, serve: Callable[..., TrajectoryServer]
) -> None:
    """While the fsync has not returned, the server sees nothing."""
    gate = threading.Event()

    def wait(descriptor: int) -> None:
        gate.wait(30)

    spool = Spool(tmp_path, "slow", fsync=wait)
    sink = TransportSink(SCHEMA, spool, TrajectorySender(Peer(serve().address)))
    write(sink, 3)

    assert not sink.drain(0.2)
    assert store.order == []
    gate.set()

    assert sink.drain(30)
    assert len(store.order) == 3
    sink.close()


def test_window_bounds_what_is_unanswered(
    store: Store, serve: Callable[..., TrajectoryServer], connect: Callable[..., TransportSink]
) -> None:
    """Without answers no more than the window goes out; the rest stays in the spool."""
    sink = connect(serve(lambda metadata, tries: SILENCE).address, reply_timeout_seconds=60.0)
    write(sink, 30)

    assert not sink.drain(0.3)

    assert len(store.tries) == 8
    statistics = sink.sender.statistics()
    assert (statistics.in_flight, statistics.waiting) == (8, 22)


def test_unanswered_is_sent_again(
    store: Store, serve: Callable[..., TrajectoryServer], connect: Callable[..., TransportSink]
) -> None:
    """An answer that never comes is a resend at the deadline."""
    server = serve(lambda metadata, tries: SILENCE if tries == 1 else None)
    sink = connect(server.address, reply_timeout_seconds=0.1)

    written = write(sink, 20)

    assert sink.drain(30)
    assert sorted(store.trajectories) == sorted(written)
    assert sink.sender.statistics().retried_total >= 20


def test_retryable_refusals_are_sent_again(
    store: Store, serve: Callable[..., TrajectoryServer], connect: Callable[..., TransportSink]
) -> None:
    """Nacks, overload and errors that may pass are repeated; nothing is given up."""
    refusals: list[Callable[[TrajectoryMetadata], AnyMessage | Exception]] = [
        lambda metadata: nack(metadata, "store_unavailable", 0.01),
        lambda metadata: Overloaded("busy", 0.01),
        lambda metadata: StoreUnavailable("restarting"),
        lambda metadata: RuntimeError("a fault of the server"),
    ]
    server = serve(lambda metadata, tries: refusals[metadata.sequence % 4](metadata) if tries <= 2 else None)
    sink = connect(server.address)

    written = write(sink, 12)

    assert sink.drain(30)
    assert sorted(store.trajectories) == sorted(written)


def test_retry_after_is_respected(
    store: Store, serve: Callable[..., TrajectoryServer], connect: Callable[..., TransportSink]
) -> None:
    """Nothing is sent before the time that the server asked for."""
    times: list[float] = []

    def refuse_once(metadata: TrajectoryMetadata, tries: int) -> AnyMessage | None:
        times.append(time.monotonic())
        return nack(metadata, "busy", 0.4) if tries == 1 else None

    sink = connect(serve(refuse_once).address)
    write(sink, 1)

    assert sink.drain(30)
    assert times[1] - times[0] >= 0.4


def test_unknown_schema_is_sent_once_and_the_rest_waits(
    store: Store, serve: Callable[..., TrajectoryServer], connect: Callable[..., TransportSink]
) -> None:
    """The server asks for the schema by a nack, gets it, and then everything."""
    server = serve(
        lambda metadata, tries: (
            nack(metadata, "unknown_schema", 0.0) if metadata.schema_digest not in store.schemas else None
        )
    )
    sink = connect(server.address)

    written = write(sink, 40)

    assert sink.drain(30)
    assert store.schemas == {DIGEST: encode_schema(SCHEMA)}
    assert [metadata.trajectory_id for metadata in store.order] == written
    assert sink.sender.statistics().schemas_sent_total == 1
    assert sum(store.tries.values()) <= 48  # the window that was out at first, twice


def test_what_needs_a_refused_schema_moves_to_rejected(
    store: Store, serve: Callable[..., TrajectoryServer], connect: Callable[..., TransportSink]
) -> None:
    """A schema that the server will never take does not hold up the rest, nor is it sent for ever."""
    store.schema_refusal = InvalidTrajectory("a leaf has no name", "schema")
    sink = connect(
        serve(
            lambda metadata, tries: nack(metadata, "unknown_schema", 0.0) if metadata.sequence < 4 else None
        ).address
    )

    written = write(sink, 3)
    assert sink.drain(30)
    assert sink.sender.statistics().rejected_total == 3
    write(sink, 2, first=3)

    assert sink.drain(30)
    assert [metadata.sequence for metadata in store.order] == [4, 5]
    reason = sink.spool.path / "rejected" / f"{written[0]}.json"
    assert "a leaf has no name" in reason.read_text()


@pytest.mark.parametrize("error", [FrameError("garbled"), InvalidTrajectory("garbled"), RunMismatch("no")])
def test_an_error_in_place_of_an_answer_is_sent_again(
    error: Exception,
    store: Store,
    serve: Callable[..., TrajectoryServer],
    connect: Callable[..., TransportSink],
) -> None:
    """Bytes that were damaged on the way say nothing of the trajectory."""
    sink = connect(serve(lambda metadata, tries: error if tries == 1 else None).address)

    write(sink, 2)

    assert sink.drain(30)
    assert len(store.order) == 2
    assert sink.sender.statistics().rejected_total == 0


def test_a_disk_that_fails_to_read_does_not_end_the_sender(
    store: Store, serve: Callable[..., TrajectoryServer], tmp_path: Path
) -> None:
    """The entry counts as dropped, and those after it are sent."""
    spool = Spool(tmp_path, "spool", memory_bytes=0, segment_bytes=1)
    sender = TrajectorySender(Peer(serve().address))
    sender.pause()
    sink = TransportSink(SCHEMA, spool, sender)
    write(sink, 3)
    assert sink.flush(30)
    second = spool.listen(lambda entries: None)[1].segment
    readable, second.descriptor = second.descriptor, os.open(second.path, os.O_WRONLY)
    os.close(readable)

    sender.resume()

    assert sink.drain(30)
    assert [metadata.sequence for metadata in store.order] == [1, 3]
    assert spool.report("run").dropped == ((2, 2),)
    sink.close()


def test_terminal_nack_frees_the_entry(
    store: Store, serve: Callable[..., TrajectoryServer], connect: Callable[..., TransportSink]
) -> None:
    """What the server put into quarantine is not sent again, and counted."""
    sink = connect(
        serve(lambda metadata, tries: nack(metadata, "nan") if metadata.sequence == 2 else None).address
    )

    write(sink, 3)

    assert sink.drain(30)
    statistics = sink.sender.statistics()
    assert (statistics.quarantined_total, statistics.acknowledged_total) == (1, 2)
    assert sorted(store.tries.values()) == [1, 1, 1]


@pytest.mark.parametrize("answer", ["unknown_run", "error"])
def test_what_no_server_takes_moves_to_rejected(
    answer: str, store: Store, serve: Callable[..., TrajectoryServer], connect: Callable[..., TransportSink]
) -> None:
    """A run that is gone, or a message above the server's limit, moves the trajectory aside."""
    server = serve(
        lambda metadata, tries: (
            nack(metadata, "unknown_run") if answer == "unknown_run" else MessageTooLarge("never")
        )
    )
    sink = connect(server.address)

    (written,) = write(sink, 1)

    assert sink.drain(30)
    assert sink.sender.statistics().rejected_total == 1
    assert (sink.spool.path / "rejected" / f"{written}.json").exists()


@pytest.mark.parametrize("fault", ["too large", "schema missing"])
def test_the_audit_explains_what_was_rejected_in_a_living_run(
    fault: str,
    tmp_path: Path,
    serve: Callable[..., TrajectoryServer],
    connect: Callable[..., TransportSink],
) -> None:
    """What no server takes counts as dropped: nothing is missing for ever (contracts C2)."""

    def decide(metadata: TrajectoryMetadata, tries: int) -> AnyMessage | Exception | None:
        if fault == "schema missing":
            return nack(metadata, "unknown_schema", 0.0)
        return MessageTooLarge("never")

    sink = connect(serve(decide).address)
    written = segment(0)
    if fault == "schema missing":
        numbered = msgspec.structs.replace(written.metadata, schema_digest="nobody has it")
        sink.spool.append(numbered, b"body")
    else:
        sink.write(written)
    assert sink.drain(30)

    with closing(open_store(f"sqlite:///{tmp_path / 'server'}", writer_of="ingest")) as server:
        server.touch_client("run", "client", [sink.spool.report("run")])
        audit = server.audit("run")

    assert (audit.accepted, audit.dropped, audit.missing) == (1, 1, 0)


def test_server_that_is_away_gets_everything_when_it_comes(
    store: Store,
    serve: Callable[..., TrajectoryServer],
    connect: Callable[..., TransportSink],
    free_port: Callable[[], int],
) -> None:
    """Without a server the spool grows; when there is one, all is sent."""
    port = free_port()
    sink = connect(f"tcp://127.0.0.1:{port}")
    written = write(sink, 50)
    assert sink.flush(30)
    assert not sink.drain(0.2)
    assert sink.spool.pending_count() == 50

    serve(port=port)

    assert sink.drain(30)
    assert [metadata.trajectory_id for metadata in store.order] == written


def test_broken_connections_lose_and_double_nothing(
    store: Store, serve: Callable[..., TrajectoryServer], connect: Callable[..., TransportSink]
) -> None:
    """Connections that are reset again and again cost resends only."""
    with TcpProxy(serve().port) as proxy:
        sink = connect(proxy.address, reply_timeout_seconds=1.0)
        written: list[str] = []
        for number in range(10):
            written += write(sink, 20, "abcd", first=20 * number)
            assert sink.flush(30)
            proxy.reset()

        assert sink.drain(60)

    assert sorted(store.trajectories) == sorted(written)
    assert len(store.order) == len(written)


def test_server_restarts_in_the_middle(
    store: Store, serve: Callable[..., TrajectoryServer], connect: Callable[..., TransportSink]
) -> None:
    """A server that dies between taking and answering sees the trajectories again, and knows them."""
    server = serve(lambda metadata, tries: SILENCE if metadata.sequence > 10 else None)
    sink = connect(server.address)
    written = write(sink, 40)
    assert not sink.drain(0.2)

    server.close()
    serve(port=server.port)

    assert sink.drain(30)
    assert sorted(store.trajectories) == sorted(written)


def test_next_start_sends_what_the_last_one_left(
    tmp_path: Path, store: Store, serve: Callable[..., TrajectoryServer], free_port: Callable[[], int]
) -> None:
    """Orphan spools are adopted, sent under their own run, and removed when they are empty."""
    nowhere = f"tcp://127.0.0.1:{free_port()}"
    first = open_delivery("online", SCHEMA, address=nowhere, spool_directory=tmp_path)
    for number in range(10):
        first.submit(segment(number, run_id="old run"))
    first.flush(30)
    first.close(0.1)
    (left,) = tmp_path.iterdir()

    second = open_delivery("online", SCHEMA, address=serve().address, spool_directory=tmp_path)

    assert second.drain(30)
    assert [(metadata.run_id, metadata.spool_id) for metadata in store.order] == [("old run", left.name)] * 10
    reports = second.spool_reports("old run")
    assert [(each.highest_accepted, each.oldest_unacknowledged) for each in reports] == [(10, None)]
    second.close(1.0)
    assert list(tmp_path.iterdir()) == []


def test_paused_sender_sends_nothing(
    store: Store, serve: Callable[..., TrajectoryServer], connect: Callable[..., TransportSink]
) -> None:
    """Between pause and resume the spool only grows."""
    sink = connect(serve().address)
    sink.sender.pause()
    write(sink, 5)
    assert not sink.drain(0.2)
    assert store.order == []

    sink.sender.resume()

    assert sink.drain(30)


def test_damaged_record_is_given_up_alone(
    store: Store, serve: Callable[..., TrajectoryServer], tmp_path: Path
) -> None:
    """An entry that the disk does not give back is counted as dropped; the others are sent."""
    spool = Spool(tmp_path, "spool", memory_bytes=0)
    sender = TrajectorySender(Peer(serve().address))
    sender.pause()
    sink = TransportSink(SCHEMA, spool, sender)
    write(sink, 3)
    assert sink.flush(30)
    entry = spool.listen(lambda entries: None)[1]
    with entry.segment.path.open("r+b") as file:
        file.seek(entry.offset + 20)
        file.write(b"\0\0\0\0")

    sender.resume()

    assert sink.drain(30)
    assert [metadata.sequence for metadata in store.order] == [1, 3]
    assert spool.report("run").dropped == ((2, 2),)
    sink.close()


def test_whole_delivery_with_memory_beside_the_server(
    tmp_path: Path, store: Store, serve: Callable[..., TrajectoryServer]
) -> None:
    """`online_with_memory` does both, and tells what its spool holds."""
    limits = Limits(max_message_bytes=1 << 20, max_in_flight=4, heartbeat_seconds=1.0)
    delivery: RoutedDelivery = open_delivery(
        "online_with_memory",
        SCHEMA,
        address=serve().address,
        spool_directory=tmp_path,
        limits=limits,
        routers=2,
    )
    for number in range(20):
        delivery.submit(segment(number, "ab"[number % 2]))
    delivery.flush(30)

    assert delivery.drain(30)
    assert delivery.memory is not None
    assert {actor: len(held) for actor, held in delivery.memory.snapshot().items()} == {"a": 10, "b": 10}
    (report,) = delivery.spool_reports("run")
    assert (report.highest_accepted, report.oldest_unacknowledged) == (20, None)
    spool, sender = delivery.spool_statistics(), delivery.sender_statistics()
    assert spool is not None
    assert sender is not None
    assert (spool.acknowledged_total, sender.in_flight, sender.waiting) == (20, 0, 0)
    for actor in "ab":
        indices = [metadata.segment_index for metadata in store.order if metadata.actor_id == actor]
        assert indices == sorted(indices)
    delivery.close(5.0)
