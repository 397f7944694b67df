"""Good and bad requests to a running inference server, over real sockets."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from relayrl_inference_server.service import InferenceService
from relayrl_inference_server.settings import BatchingSettings, InferenceServerSettings, LimitSettings
from relayrl_shared import frames, messages
from relayrl_shared.errors import (
    ContractError,
    Draining,
    FrameError,
    InvalidActionMask,
    InvalidObservation,
    MessageTooLarge,
    Overloaded,
    PeerLost,
    PeerTimeout,
    RelayRLError,
    SpecMismatch,
    UnknownPolicy,
    UnknownPolicyVersion,
)
from relayrl_shared.messages import AnyMessage, LeafHeader, RequestActions
from relayrl_shared.registry_client import RegistryClient
from relayrl_shared.settings import Address, HttpSettings
from relayrl_shared.sockets import Peer

from .conftest import Arrays, Asker, OpenServer, artefact, assert_acted, inputs, running

pytestmark = pytest.mark.timeout(60)


def test_reply_holds_what_the_version_computes(asker: Asker) -> None:
    """One row and many, loaded on the first request."""
    for rows in (1, 7, 300):
        arrays = inputs(rows, rows)
        message, outputs = asker.ask(arrays)

        assert (message.policy_version, message.learner_update, message.rows) == (1, 0, rows)
        assert set(outputs) == {"action", "behaviour_log_prob", "value"}
        assert_acted(arrays, outputs, 0)


def test_order_of_the_leaves_does_not_matter(asker: Asker) -> None:
    """Leaves are found by name."""
    arrays = inputs(3)
    _, outputs = asker.ask(dict(reversed(arrays.items())))

    assert_acted(arrays, outputs, 0)


def test_same_noise_gives_the_same_actions_again(asker: Asker) -> None:
    """A resend samples the same action (contracts F2)."""
    arrays = inputs(50)

    first, second = asker.ask(arrays)[1], asker.ask(arrays)[1]
    np.testing.assert_array_equal(first["action"], second["action"])


def test_version_is_pinned_by_number(asker: Asker, registry_client: RegistryClient) -> None:
    """Old versions are loaded on demand and served beside the latest."""
    for update in (1, 2):
        registry_client.publish(artefact(update), fencing_token=1)
    arrays = inputs(20)
    for version in (2, 1, 3, 2):
        message, outputs = asker.ask(arrays, policy_version=version)
        assert message.policy_version == version
        assert_acted(arrays, outputs, version - 1)


def with_leaf(name: str, row: int, value: Any) -> Arrays:
    """Three rows of inputs with a bad value in one."""
    arrays = {key: array.copy() for key, array in inputs(3).items()}
    arrays[name][row] = value
    return arrays


def without(name: str) -> Arrays:
    """Inputs that lack a leaf."""
    arrays = inputs(3)
    del arrays[name]
    return arrays


BAD: list[tuple[Callable[[], Arrays], dict[str, Any], type[RelayRLError], str]] = [
    (lambda: with_leaf("observation", 1, np.nan), {}, InvalidObservation, "observation: NaN in row 1"),
    (lambda: with_leaf("action_mask", 2, False), {}, InvalidActionMask, "action allows nothing in row 2"),
    (lambda: with_leaf("noise", 0, np.inf), {}, ContractError, "noise holds NaN or infinity"),
    (lambda: without("observation"), {}, SpecMismatch, "observation is missing"),
    (lambda: without("noise"), {}, SpecMismatch, "zeros give the greedy action"),
    (lambda: inputs(3) | {"more": np.zeros(3)}, {}, SpecMismatch, "takes no 'more'"),
    (lambda: inputs(3) | {"observation": np.zeros((3, 4))}, {}, SpecMismatch, "observation is float64"),
    (lambda: inputs(3) | {"observation": np.zeros((3, 5), np.float32)}, {}, SpecMismatch, r"\[3, 5\]"),
    (
        lambda: inputs(3) | {"action_mask": np.ones((3, 3), np.uint8)},
        {},
        SpecMismatch,
        "mask is uint8",
    ),
    (lambda: inputs(3), {"policy": "nobody"}, UnknownPolicy, "'nobody'"),
    (lambda: inputs(3), {"policy_version": 9}, UnknownPolicyVersion, "no version 9"),
    (lambda: inputs(3), {"alias": "production"}, UnknownPolicyVersion, "no alias 'production'"),
    (lambda: inputs(3), {"timeout_seconds": 0.0}, PeerTimeout, "nothing was computed"),
    (lambda: inputs(3), {"timeout_seconds": float("nan")}, ContractError, "timeout_seconds is nan"),
    (lambda: inputs(3), {"timeout_seconds": -1.0}, ContractError, "timeout_seconds is -1"),
    (lambda: inputs(20_000), {}, ContractError, "takes 1 to 16384"),
]


@pytest.mark.parametrize(("make", "options", "error", "message"), BAD)
def test_bad_request_gets_a_typed_error_that_names_the_thing(
    asker: Asker,
    make: Callable[[], Arrays],
    options: dict[str, Any],
    error: type[RelayRLError],
    message: str,
) -> None:
    """The error arrives as its class, and the next request is served."""
    asker.ask(inputs(1))
    with pytest.raises(error, match=message):
        asker.ask(make(), **options)

    assert_acted(inputs(3), asker.ask(inputs(3))[1], 0)


@pytest.mark.parametrize(
    ("request_message", "payload", "error"),
    [
        (RequestActions(policy="cartpole", rows=0, leaves=()), b"", ContractError),
        (RequestActions(policy="cartpole", rows=-1, leaves=()), b"", ContractError),
        (RequestActions(policy="cartpole", rows=1, leaves=()), b"", SpecMismatch),
        (
            RequestActions(
                policy="cartpole",
                rows=1,
                leaves=tuple(
                    LeafHeader(name, "float32", (1 << 62, 1 << 62))
                    for name in ("observation", "action_mask", "noise")
                ),
            ),
            b"",
            SpecMismatch,
        ),
        (messages.Ok(), None, ContractError),
        (messages.FetchManifest(policy="cartpole"), None, ContractError),
    ],
)
def test_message_that_is_no_sensible_request_is_refused(
    asker: Asker, request_message: AnyMessage, payload: bytes | None, error: type[RelayRLError]
) -> None:
    """Nothing is allocated by what a header claims, and other kinds are refused."""
    asker.ask(inputs(1))
    with pytest.raises(error):
        asker.peer.request(request_message, () if payload is None else (payload,), timeout_seconds=10.0)

    assert_acted(inputs(2), asker.ask(inputs(2))[1], 0)


def test_frame_that_is_shorter_than_its_leaves_is_refused(asker: Asker) -> None:
    """Sizes must agree before anything is read."""
    headers, packed = frames.pack_leaves(inputs(2))
    request = RequestActions(policy="cartpole", rows=2, leaves=headers)
    asker.ask(inputs(2))

    with pytest.raises(FrameError, match="the frame has"):
        asker.peer.request(request, (packed[:-8],), timeout_seconds=10.0)


def test_garbage_gets_error_replies_and_the_next_request_is_served(
    asker: Asker, server: InferenceService
) -> None:
    """Frames that are no message are answered and counted."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context.socket(zmq.DEALER) as raw:
        raw.connect(f"tcp://127.0.0.1:{server.router.port}")
        good = frames.encode(RequestActions(policy="cartpole", rows=1, leaves=()), (b"",))
        for parts in (
            [b""],
            [b"\xc1"],
            [b"x" * 5000],
            [b"a"] * 70,
            [bytes(good[0])],
            [*map(bytes, good), b""],
        ):
            raw.send_multipart(parts)
            assert raw.poll(10_000)
            assert b"error" in raw.recv_multipart()[0]
    context.term()

    assert sum(server.router.statistics().rejected_total.values()) == 6
    assert_acted(inputs(2), asker.ask(inputs(2))[1], 0)


def test_other_protocol_version_is_named(asker: Asker) -> None:
    """An error of its own class, with the request's id."""
    headers, packed = frames.pack_leaves(inputs(1))
    request = RequestActions(policy="cartpole", rows=1, leaves=headers, version=2)

    with pytest.raises(FrameError, match="protocol version 2"):
        asker.peer.request(request, (packed,), timeout_seconds=10.0)


def test_oversize_message_is_refused(open_server: OpenServer, registry_client: RegistryClient) -> None:
    """Above limits.max_message_bytes the answer says so."""
    registry_client.publish(artefact(0), fencing_token=1)
    server = open_server(limits=LimitSettings(max_message_bytes=1000))
    with Peer(f"tcp://127.0.0.1:{server.router.port}") as peer, pytest.raises(MessageTooLarge):
        Asker(peer).ask(inputs(100))


class Collected:
    """Replies and errors of requests that were submitted together."""

    def __init__(self, expected: int) -> None:
        self.messages: list[AnyMessage] = []
        self.errors: list[RelayRLError] = []
        self._left = expected
        self._lock = threading.Lock()
        self.done = threading.Event()

    def __call__(
        self, message: AnyMessage | None, payload: list[memoryview], error: RelayRLError | None, /
    ) -> None:
        """Notes one answer."""
        with self._lock:
            if message is not None:
                self.messages.append(message)
            if error is not None:
                self.errors.append(error)
            self._left -= 1
            if self._left == 0:
                self.done.set()


def submit_many(peer: Peer, count: int, arrays: Arrays, **options: Any) -> Collected:
    """Submits equal requests at once and waits for all answers."""
    headers, packed = frames.pack_leaves(arrays)
    rows = len(next(iter(arrays.values())))
    request = RequestActions(policy="cartpole", rows=rows, leaves=headers, **options)
    collected = Collected(count)
    for _ in range(count):
        peer.submit(request, (packed,), timeout_seconds=30.0, on_reply=collected)
    assert collected.done.wait(40)
    return collected


def test_requests_that_queue_meanwhile_share_a_forward(asker: Asker, server: InferenceService) -> None:
    """500 requests sent at once take far fewer forwards, and all are answered."""
    asker.ask(inputs(1))
    before = server.server.counters().batches_total
    collected = submit_many(asker.peer, 500, inputs(2))

    assert len(collected.messages) == 500
    assert server.server.counters().batches_total - before < 250


def test_flood_is_shed_with_retry_after_and_nothing_is_unanswered(
    open_server: OpenServer, registry_client: RegistryClient
) -> None:
    """Above the queue's limit requests are refused; each one gets an answer, and calm returns."""
    registry_client.publish(artefact(0), fencing_token=1)
    server = open_server(
        limits=LimitSettings(max_queued_requests=8), batching=BatchingSettings(max_batch_rows=8)
    )
    with Peer(f"tcp://127.0.0.1:{server.router.port}") as peer:
        Asker(peer).ask(inputs(1))
        collected = submit_many(peer, 3000, inputs(8))
        shed = [error for error in collected.errors if isinstance(error, Overloaded)]

        assert len(shed) == len(collected.errors) == server.server.counters().shed_total
        assert len(collected.messages) + len(shed) == 3000
        assert shed
        assert all(0 < error.retry_after_seconds <= 5 for error in shed)
        assert_acted(inputs(2), Asker(peer).ask(inputs(2))[1], 0)


def test_one_bad_request_among_many_hurts_nobody(asker: Asker, server: InferenceService) -> None:
    """Every tenth request has NaN: exactly these fail."""
    asker.ask(inputs(1))
    good_headers, good = frames.pack_leaves(inputs(2))
    _, bad = frames.pack_leaves(inputs(2) | {"observation": np.full((2, 4), np.nan, np.float32)})
    collected = Collected(500)
    request = RequestActions(policy="cartpole", rows=2, leaves=good_headers)
    for index in range(500):
        payload = (bad if index % 10 == 0 else good,)
        asker.peer.submit(request, payload, timeout_seconds=30.0, on_reply=collected)
    assert collected.done.wait(40)

    assert len(collected.messages) == 450
    assert {type(error) for error in collected.errors} == {InvalidObservation}
    assert server.server.counters().errors["invalid_observation"] == 50


def test_draining_server_refuses_new_requests_by_name(asker: Asker, server: InferenceService) -> None:
    """The client can go elsewhere: the error is Draining, and readiness says so."""
    asker.ask(inputs(1))
    server.server.draining = True

    with pytest.raises(Draining):
        asker.ask(inputs(1))
    assert server.readiness()["serving"] == "draining"


def test_a_drain_answers_what_waits_for_policies(free_port: Any) -> None:
    """Requests whose policies are being loaded, or wait for that, are answered before the socket closes."""
    nowhere = Address(port=free_port())
    answers: queue.SimpleQueue[RelayRLError | None] = queue.SimpleQueue()
    with ExitStack() as ending:
        stop, service = open_stoppable(ending, nowhere)
        with Peer(f"tcp://127.0.0.1:{service.router.port}") as peer:
            headers, packed = frames.pack_leaves(inputs(1))
            for policy in ("a", "b", "c", "d"):
                request = RequestActions(policy=policy, rows=1, leaves=headers, timeout_seconds=30.0)
                peer.submit(
                    request,
                    (packed,),
                    timeout_seconds=20.0,
                    on_reply=lambda message, payload, error: answers.put(error),
                )
            while service.server.queued_requests < 4:
                threading.Event().wait(0.01)
            stop.set()
            errors = [answers.get(timeout=10) for _ in range(4)]

    kinds = {type(error) for error in errors}
    assert Draining in kinds
    assert all(isinstance(error, RelayRLError) for error in errors)
    assert PeerLost not in kinds


def open_stoppable(ending: ExitStack, registry: Address) -> tuple[threading.Event, InferenceService]:
    """A server of its own, and what stops it."""
    service = InferenceService(
        InferenceServerSettings(
            inference_server=Address(port=0),
            http=HttpSettings(port=0),
            model_server=registry,
            model_announcer=registry,
            registry_timeout_seconds=1.0,
            drain_seconds=0.0,
        )
    )
    return ending.enter_context(running(service)), service


def test_deadline_that_passed_in_the_queue_is_answered_so(asker: Asker, server: InferenceService) -> None:
    """Requests behind a long forward whose time runs out are counted as expired, not computed."""
    asker.ask(inputs(1))
    collected = submit_many(asker.peer, 100, inputs(500), timeout_seconds=0.002)
    expired = [error for error in collected.errors if isinstance(error, PeerTimeout)]

    assert expired
    assert len(expired) == server.server.counters().expired_total
    assert len(collected.messages) + len(expired) == 100
    rows = server.server.counters().rows_total
    assert rows == 1 + 500 * len(collected.messages)


def test_manifest_hash_is_stable() -> None:
    """The artefacts of this suite share a graph, so that a swap is one of weights."""
    first, second = artefact(0), artefact(1)

    assert first.manifest.graph_digest == second.manifest.graph_digest
    assert first.manifest.weights_digest != second.manifest.weights_digest
    assert msgspec.structs.replace(first.manifest, policy_version=1).policy_version == 1
