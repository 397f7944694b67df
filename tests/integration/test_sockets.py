"""Sockets: answers, deadlines, broken links, garbage and limits, over real TCP."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
import zmq

from relayrl_shared import frames, messages
from relayrl_shared.errors import (
    ConfigError,
    FrameError,
    MessageTooLarge,
    Overloaded,
    PeerLost,
    PeerRejected,
    PeerTimeout,
    RelayRLError,
    RunMismatch,
)
from relayrl_shared.messages import Announcement, AnyMessage
from relayrl_shared.sockets import AnnouncementListener, Announcer, Incoming, Peer, Rejected, RouterServer
from relayrl_shared.testing.tcp_proxy import TcpProxy

Handler = Callable[[RouterServer, Incoming], None]
HEARTBEAT = messages.Heartbeat(client_id="c", run_id="r")


def echo(server: RouterServer, incoming: Incoming) -> None:
    """Answers with the message and payload that came."""
    server.reply(incoming, incoming.message, incoming.payload)


@contextmanager
def serving(handler: Handler = echo, **options: Any) -> Iterator[RouterServer]:
    """A server in a thread that calls `handler` for each message."""
    stop = threading.Event()
    with RouterServer("tcp://127.0.0.1:0", **options) as server:

        def handle(batch: list[Incoming]) -> None:
            for incoming in batch:
                handler(server, incoming)

        thread = threading.Thread(target=server.run, args=(handle, stop))
        thread.start()
        try:
            yield server
        finally:
            stop.set()
            server.wake()
            thread.join()


@contextmanager
def raw_dealer(port: int) -> Iterator[zmq.Socket[bytes]]:
    """A DEALER that sends any frames."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.set(zmq.LINGER, 0)
        dealer.set(zmq.RCVTIMEO, 5000)
        dealer.connect(f"tcp://127.0.0.1:{port}")
        yield dealer


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Waits for a condition that another thread makes true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        threading.Event().wait(0.005)


def test_a_request_gets_its_answer_with_the_payload() -> None:
    """The answer to a request carries the message and payload that the handler gave."""
    message = messages.PutSchema(digest="d")
    with serving() as server, Peer(f"tcp://127.0.0.1:{server.port}") as peer:
        reply, payload = peer.request(message, [b"abc"], timeout_seconds=5)

    assert isinstance(reply, messages.PutSchema)
    assert [bytes(frame) for frame in payload] == [b"abc"]


def test_answers_find_their_requests_in_any_order() -> None:
    """A server that answers late and out of order, from another thread, still reaches each request."""
    held: list[Incoming] = []

    def hold(server: RouterServer, incoming: Incoming) -> None:
        held.append(incoming)
        if len(held) == 3:
            threading.Thread(target=answer_backwards, args=(server,)).start()

    def answer_backwards(server: RouterServer) -> None:
        for one in reversed(held):
            echo(server, one)

    answers: queue.Queue[tuple[int, AnyMessage | None]] = queue.Queue()
    with serving(hold) as server, Peer(f"tcp://127.0.0.1:{server.port}") as peer:
        for number in range(3):
            peer.submit(
                messages.Ack(spool_id="s", run_id="r", sequence=number),
                timeout_seconds=5,
                on_reply=lambda reply, _payload, _error, number=number: answers.put((number, reply)),
            )
        received = dict(answers.get(timeout=5) for _ in range(3))

    assert {number: number for number in range(3)} == {
        number: reply.sequence for number, reply in received.items() if isinstance(reply, messages.Ack)
    }


def test_errors_arrive_as_the_class_that_was_raised() -> None:
    """A typed error of the handler reaches the caller with its class and text, and the server goes on."""
    errors: list[Exception] = [RunMismatch("seed differs"), Overloaded("busy", 2.5), ValueError("secret")]

    def fail(server: RouterServer, incoming: Incoming) -> None:
        if errors:
            raise errors.pop(0)
        echo(server, incoming)

    with serving(fail) as server, Peer(f"tcp://127.0.0.1:{server.port}") as peer:
        with pytest.raises(RunMismatch, match="seed differs"):
            peer.request(HEARTBEAT, timeout_seconds=5)
        with pytest.raises(Overloaded) as overloaded:
            peer.request(HEARTBEAT, timeout_seconds=5)
        with pytest.raises(RelayRLError) as internal:
            peer.request(HEARTBEAT, timeout_seconds=5)
        peer.request(HEARTBEAT, timeout_seconds=5)

        assert server.statistics().handler_errors_total == 3
    assert overloaded.value.retry_after_seconds == 2.5
    assert "secret" not in str(internal.value)


def test_a_code_that_is_not_known_here_is_peer_rejected() -> None:
    """An error code of a later version arrives as PeerRejected with the code in its text."""

    def refuse(server: RouterServer, incoming: Incoming) -> None:
        server.reply(incoming, messages.ErrorReply(code="from_the_future", message="no"))

    with (
        serving(refuse) as server,
        Peer(f"tcp://127.0.0.1:{server.port}") as peer,
        pytest.raises(PeerRejected),
    ):
        peer.request(HEARTBEAT, timeout_seconds=5)


def test_a_server_that_never_answers_is_a_timeout() -> None:
    """Without an answer the request ends at its deadline, and a late answer is counted and dropped."""
    held: list[Incoming] = []
    with (
        serving(lambda _server, incoming: held.append(incoming)) as server,
        Peer(f"tcp://127.0.0.1:{server.port}") as peer,
    ):
        begun = time.monotonic()
        with pytest.raises(PeerTimeout, match=r"within 0\.2 s"):
            peer.request(HEARTBEAT, timeout_seconds=0.2)
        assert 0.2 <= time.monotonic() - begun < 2

        server.reply(held[0], messages.Ok())
        wait_until(lambda: peer.statistics().unmatched_total == 1)
        assert peer.statistics().timeouts_total == 1


def test_a_port_where_nobody_listens_is_a_timeout(free_port: Callable[[], int]) -> None:
    """A request to nobody ends at its deadline as well."""
    with Peer(f"tcp://127.0.0.1:{free_port()}") as peer, pytest.raises(PeerTimeout):
        peer.request(HEARTBEAT, timeout_seconds=0.2)


def test_a_listener_that_never_speaks_is_a_timeout() -> None:
    """A TCP server that accepts and stays silent is no connection: the request ends at its deadline."""
    with (
        socket.create_server(("127.0.0.1", 0)) as deaf,
        Peer(f"tcp://127.0.0.1:{deaf.getsockname()[1]}") as peer,
    ):
        with pytest.raises(PeerTimeout):
            peer.request(HEARTBEAT, timeout_seconds=0.2)
        assert not peer.connected


def test_a_broken_connection_ends_what_was_sent_and_keeps_what_was_not() -> None:
    """Requests under way end with PeerLost at once; one that waits for a connection is answered later."""
    held: list[Incoming] = []

    def hold_first(server: RouterServer, incoming: Incoming) -> None:
        if held:
            echo(server, incoming)
        held.append(incoming)

    with serving(hold_first) as server, TcpProxy(server.port) as proxy, Peer(proxy.address) as peer:
        outcome: queue.Queue[RelayRLError | None] = queue.Queue()
        peer.submit(HEARTBEAT, timeout_seconds=30, on_reply=lambda _m, _p, error: outcome.put(error))
        wait_until(lambda: len(held) == 1)
        proxy.refuse()
        assert isinstance(outcome.get(timeout=5), PeerLost)

        peer.submit(HEARTBEAT, timeout_seconds=30, on_reply=lambda _m, _p, error: outcome.put(error))
        proxy.accept()
        assert outcome.get(timeout=10) is None
        assert peer.statistics().connects_total == 2


def test_requests_survive_a_stalled_link() -> None:
    """A link that stalls for a moment delays the answer and loses nothing."""
    with (
        serving() as server,
        TcpProxy(server.port, latency_seconds=0.01) as proxy,
        Peer(proxy.address) as peer,
    ):
        peer.request(HEARTBEAT, timeout_seconds=5)
        proxy.blackhole()
        with pytest.raises(PeerTimeout):
            peer.request(HEARTBEAT, timeout_seconds=0.1)
        proxy.flow()

        assert isinstance(peer.request(HEARTBEAT, timeout_seconds=5)[0], messages.Heartbeat)


def test_closing_ends_open_requests_and_refuses_new_ones() -> None:
    """Nobody is left waiting when a peer closes."""
    outcome: queue.Queue[RelayRLError | None] = queue.Queue()
    with serving(lambda _server, _incoming: None) as server:
        peer = Peer(f"tcp://127.0.0.1:{server.port}")
        peer.submit(HEARTBEAT, timeout_seconds=30, on_reply=lambda _m, _p, error: outcome.put(error))
        peer.close()

    assert isinstance(outcome.get(timeout=5), PeerLost)
    with pytest.raises(PeerLost, match="closed"):
        peer.request(HEARTBEAT, timeout_seconds=1)


def test_the_queue_of_a_peer_is_bounded(free_port: Callable[[], int]) -> None:
    """Above the limits in requests or bytes a submit is refused and its callback not called."""
    address = f"tcp://127.0.0.1:{free_port()}"
    calls: list[object] = []

    def submit(peer: Peer, size: int) -> None:
        schema = messages.PutSchema(digest="d")
        peer.submit(schema, [bytes(size)], timeout_seconds=30, on_reply=lambda *answer: calls.append(answer))

    with Peer(address, max_queued=2) as peer:
        submit(peer, 1)
        submit(peer, 1)
        with pytest.raises(Overloaded):
            submit(peer, 1)
    with Peer(address, max_queued_bytes=1000) as peer:
        submit(peer, 800)
        with pytest.raises(Overloaded):
            submit(peer, 800)
    with Peer(address, max_message_bytes=1000) as peer, pytest.raises(MessageTooLarge):
        submit(peer, 1000)
    assert len(calls) == 3


def test_a_callback_that_raises_is_counted_and_the_peer_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """A fault in one on_reply does not reach the requests of others, and is in the log."""

    def fault(*_answer: object) -> None:
        raise ValueError

    with serving() as server, Peer(f"tcp://127.0.0.1:{server.port}") as peer:
        peer.submit(HEARTBEAT, timeout_seconds=5, on_reply=fault)
        peer.request(HEARTBEAT, timeout_seconds=5)

        assert peer.statistics().callback_errors_total == 1
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [ValueError]


@pytest.mark.parametrize(
    ("received", "code", "request_id"),
    [
        ([b"garbage"], "frame", 0),
        ([b""], "frame", 0),
        ([msgspec.msgpack.encode({"kind": "unheard of", "request_id": 4})], "frame", 4),
        ([msgspec.msgpack.encode({"kind": "ok", "version": 9, "request_id": 4})], "protocol_version", 4),
        ([msgspec.msgpack.encode({"kind": "ok", "request_id": 4}), b"extra"], "frame", 4),
        (
            [msgspec.msgpack.encode({"kind": "put_schema", "request_id": 4}), bytes(3000)],
            "message_too_large",
            4,
        ),
        ([msgspec.msgpack.encode({"kind": "ok", "request_id": 4})] + [b""] * 100, "frame", 4),
    ],
)
def test_what_is_no_message_gets_an_error_and_the_next_message_is_served(
    received: list[bytes], code: str, request_id: int
) -> None:
    """Garbage, unknown kinds, other versions and oversize get an error that says which, and are counted."""
    with serving(max_message_bytes=2000) as server, raw_dealer(server.port) as dealer:
        dealer.send_multipart(received)
        error, _ = frames.decode(dealer.recv_multipart())
        dealer.send_multipart([bytes(frames.encode(HEARTBEAT)[0])])
        answer, _ = frames.decode(dealer.recv_multipart())

        assert server.statistics().rejected_total == {code: 1}
    assert isinstance(error, messages.ErrorReply)
    assert (error.code, error.request_id, error.retryable) == (code, request_id, False)
    assert isinstance(answer, messages.Heartbeat)


def test_a_frame_far_above_the_limit_closes_the_connection_only() -> None:
    """What is too large to read at all costs its sender the connection and nobody else anything."""
    with (
        serving(max_message_bytes=1000) as server,
        raw_dealer(server.port) as hostile,
        Peer(f"tcp://127.0.0.1:{server.port}") as peer,
    ):
        hostile.send_multipart([bytes(8 << 20)])
        peer.request(HEARTBEAT, timeout_seconds=5)

        assert server.statistics().received_total == 1


def test_bytes_that_are_not_zmtp_cost_their_connection_only() -> None:
    """An HTTP request to a data port is dropped; the server serves on."""
    with (
        serving() as server,
        Peer(f"tcp://127.0.0.1:{server.port}") as peer,
        socket.create_connection(("127.0.0.1", server.port)) as stranger,
    ):
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
        peer.request(HEARTBEAT, timeout_seconds=5)


def test_the_hook_sees_rejected_frames_and_may_answer_itself() -> None:
    """on_rejected gets the frames as they came; when it says it has answered, no second answer goes."""
    seen: list[Rejected] = []
    servers: list[RouterServer] = []

    def hook(rejected: Rejected) -> bool:
        seen.append(rejected)
        servers[0].reply_rejected(rejected, messages.Ok())
        return True

    with serving(on_rejected=hook) as server, raw_dealer(server.port) as dealer:
        servers.append(server)
        dealer.send_multipart([b"garbage", b"more"])
        answer, _ = frames.decode(dealer.recv_multipart())

    assert isinstance(answer, messages.Ok)
    assert seen[0].frames == [b"garbage", b"more"]


def test_a_hook_that_fails_leaves_the_error_reply_standing() -> None:
    """A fault in the hook is counted; the sender still gets the error."""

    def hook(_rejected: Rejected) -> bool:
        raise ValueError

    with serving(on_rejected=hook) as server, raw_dealer(server.port) as dealer:
        dealer.send_multipart([b"garbage"])
        answer, _ = frames.decode(dealer.recv_multipart())

        assert server.statistics().handler_errors_total == 1
    assert isinstance(answer, messages.ErrorReply)


def test_garbage_from_a_server_ends_the_request_with_a_frame_error() -> None:
    """An answer that does not parse ends its request as soon as the request id can be read."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.set(zmq.LINGER, 0)
        port = router.bind_to_random_port("tcp://127.0.0.1")

        def answer() -> None:
            peer_id, header = router.recv_multipart()
            request_id = frames.decode([header])[0].request_id
            router.send_multipart([peer_id, b"garbage"])
            router.send_multipart([peer_id, msgspec.msgpack.encode({"kind": "?", "request_id": request_id})])

        thread = threading.Thread(target=answer)
        thread.start()
        with Peer(f"tcp://127.0.0.1:{port}") as peer:
            with pytest.raises(FrameError):
                peer.request(HEARTBEAT, timeout_seconds=5)
            assert peer.statistics().garbage_total == 2
        thread.join()


def test_a_reply_to_a_peer_that_has_gone_is_counted() -> None:
    """A server notices that nobody is there to take an answer, and goes on."""
    held: list[Incoming] = []
    with serving(lambda _server, incoming: held.append(incoming)) as server:
        with Peer(f"tcp://127.0.0.1:{server.port}") as peer, pytest.raises(PeerTimeout):
            peer.request(HEARTBEAT, timeout_seconds=0.1)

        def answered_in_vain() -> bool:
            server.reply(held[0], messages.Ok())
            return server.statistics().undeliverable_total > 0

        wait_until(answered_in_vain)


def test_a_port_that_is_taken_is_an_error_at_once() -> None:
    """A server that cannot bind says so when it is made."""
    with serving() as server, pytest.raises(ConfigError, match="cannot bind"):
        RouterServer(f"tcp://127.0.0.1:{server.port}")


def test_many_threads_share_a_peer() -> None:
    """Requests of several threads over one connection each get their own answer."""
    wrong: list[int] = []

    def ask(peer: Peer, base: int) -> None:
        for number in range(base, base + 100):
            reply, _ = peer.request(
                messages.Ack(spool_id="s", run_id="r", sequence=number), timeout_seconds=10
            )
            if not isinstance(reply, messages.Ack) or reply.sequence != number:
                wrong.append(number)

    with serving() as server, Peer(f"tcp://127.0.0.1:{server.port}") as peer:
        threads = [threading.Thread(target=ask, args=(peer, base)) for base in range(0, 800, 100)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert peer.statistics().answered_total == 800
    assert wrong == []


def test_announcements_reach_exact_names_only() -> None:
    """A listener hears of its policies, not of others whose names begin alike."""
    heard: queue.Queue[Announcement] = queue.Queue()
    announcer = Announcer("tcp://127.0.0.1:0")
    listener = AnnouncementListener(f"tcp://127.0.0.1:{announcer.port}", ["run"], heard.put)
    try:
        for version in range(1, 1000):
            for policy in ("run2", "run"):
                announcer.announce(
                    Announcement(policy=policy, policy_version=version, alias="latest", learner_update=0)
                )
            try:
                first = heard.get(timeout=0.01)
            except queue.Empty:
                continue
            break
    finally:
        listener.close()
        announcer.close()

    assert first.policy == "run"
    assert all(one.policy == "run" for one in list(heard.queue))


def test_a_listener_survives_garbage_and_a_callback_that_raises() -> None:
    """Frames that are no announcement and faults of the callback are counted; listening goes on."""
    done = threading.Event()

    def fault(announcement: Announcement) -> None:
        if announcement.policy_version == 2:
            done.set()
        raise ValueError

    with zmq.Context() as context, context.socket(zmq.XPUB) as publisher:
        publisher.set(zmq.LINGER, 0)
        port = publisher.bind_to_random_port("tcp://127.0.0.1")
        listener = AnnouncementListener(f"tcp://127.0.0.1:{port}", [], fault)
        publisher.recv()
        publisher.send_multipart([b"p", b"garbage"])
        publisher.send_multipart([b"p", bytes(frames.encode(HEARTBEAT)[0])])
        for version in (1, 2):
            hint = Announcement(policy="p", policy_version=version, alias="latest", learner_update=0)
            publisher.send_multipart([b"p", bytes(frames.encode(hint)[0])])
        assert done.wait(5)
        listener.close()

    assert (listener.garbage_total, listener.received_total, listener.callback_errors_total) == (2, 2, 2)
