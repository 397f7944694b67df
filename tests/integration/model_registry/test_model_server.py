"""Publishing and fetching through real sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import zmq

from relayrl_model_registry.blobs import digest_of
from relayrl_model_registry.service import ModelRegistry
from relayrl_shared import messages
from relayrl_shared.errors import (
    ContractError,
    DigestMismatch,
    FrameError,
    MessageTooLarge,
    RegistryError,
    RelayRLError,
    StaleFencingToken,
    UnknownPolicy,
    UnknownPolicyVersion,
)
from relayrl_shared.messages import Announcement, AnyMessage
from relayrl_shared.registry_client import RegistryClient
from relayrl_shared.sockets import AnnouncementListener, Peer
from relayrl_shared.testing.registry import opaque_artefact


@pytest.fixture
def peer(registry: ModelRegistry) -> Iterator[Peer]:
    """A raw connection to the model server."""
    with Peer(f"tcp://127.0.0.1:{registry.router.port}") as peer:
        yield peer


def test_fetched_artefact_is_the_published_one(client: RegistryClient) -> None:
    """By alias and by number, with several chunks a file, every byte and the number."""
    artefact = opaque_artefact(learner_update=4, weights_bytes=(2 << 20) + 17)
    version = client.publish(artefact, fencing_token=1)
    expected = msgspec.structs.replace(
        artefact, manifest=msgspec.structs.replace(artefact.manifest, policy_version=version)
    )

    assert client.fetch("cartpole") == expected
    assert client.fetch("cartpole", policy_version=version) == expected
    assert client.latest_version("cartpole") == version == 1


def test_old_versions_stay_fetchable(client: RegistryClient) -> None:
    """Versions are immutable; each number gives its own weights."""
    artefacts = [opaque_artefact(learner_update=update, seed=update) for update in range(5)]
    versions = [client.publish(artefact, fencing_token=1) for artefact in artefacts]

    assert versions == [1, 2, 3, 4, 5]
    for version, artefact in zip(versions, artefacts, strict=True):
        assert client.fetch("cartpole", policy_version=version).weights == artefact.weights


def test_publishing_twice_gives_one_version(client: RegistryClient) -> None:
    """The key makes it idempotent; other weights under the same key are refused."""
    first = client.publish(opaque_artefact(seed=1), fencing_token=1)
    again = client.publish(opaque_artefact(seed=1), fencing_token=1)

    assert first == again == 1
    with pytest.raises(DigestMismatch, match="new lineage"):
        client.publish(opaque_artefact(seed=2), fencing_token=1)


def test_learner_that_lost_its_lease_cannot_publish(client: RegistryClient) -> None:
    """The stale token arrives as its own class, and latest stays."""
    client.publish(opaque_artefact(learner_update=1, seed=1), fencing_token=5)

    with pytest.raises(StaleFencingToken, match="token 5"):
        client.publish(opaque_artefact(learner_update=2, seed=2), fencing_token=4)
    assert client.latest_version("cartpole") == 1


def test_two_publishers_at_once_lose_nothing(registry: ModelRegistry) -> None:
    """Two learners of two runs publish to their policies and to a shared one at the same time."""
    barrier = threading.Barrier(2)

    def publish(run: int) -> list[int]:
        client = RegistryClient(f"tcp://127.0.0.1:{registry.router.port}")
        barrier.wait(10)
        numbers = [
            client.publish(
                opaque_artefact(run_id=f"run-{run}", learner_update=update, seed=100 * run + update),
                fencing_token=1,
            )
            for update in range(20)
        ]
        client.close()
        return numbers

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(publish, range(2))

    assert sorted(first + second) == list(range(1, 41))
    assert first == sorted(first)
    assert second == sorted(second)


def test_unknown_things_arrive_as_their_errors(client: RegistryClient) -> None:
    """Policy, version, alias and blob that do not exist."""
    with pytest.raises(UnknownPolicy):
        client.fetch("cartpole")
    client.publish(opaque_artefact(), fencing_token=1)
    with pytest.raises(UnknownPolicyVersion):
        client.fetch("cartpole", policy_version=2)
    with pytest.raises(UnknownPolicyVersion):
        client.fetch("cartpole", alias="production")
    with pytest.raises(RegistryError, match="never uploaded"):
        client.fetch_blob(digest_of(b"nobody's"))


def test_damaged_blob_on_disk_is_refused(
    client: RegistryClient, registry: ModelRegistry, tmp_path: Path
) -> None:
    """A flipped byte is found by the registry, not handed out; publishing again repairs it."""
    artefact = opaque_artefact()
    client.publish(artefact, fencing_token=1)
    digest = artefact.manifest.weights_digest
    path = tmp_path / "registry" / "blobs" / digest[:2] / digest
    path.write_bytes(b"?" + artefact.weights[1:])

    with pytest.raises(DigestMismatch, match="damaged"):
        client.fetch("cartpole")
    client.publish(artefact, fencing_token=1)
    assert client.fetch("cartpole").weights == artefact.weights


def test_publication_is_announced(client: RegistryClient, registry: ModelRegistry) -> None:
    """Whoever listens to the policy hears of the version after it can be fetched; others hear nothing."""
    heard: list[Announcement] = []
    fetched: list[int] = []
    found = threading.Event()

    def on_announcement(announcement: Announcement) -> None:
        heard.append(announcement)
        fetched.append(client.latest_version("cartpole"))
        found.set()

    listener = AnnouncementListener(
        f"tcp://127.0.0.1:{registry.announcer_port}", ["cartpole"], on_announcement
    )
    update = 0
    while not found.is_set() and update < 200:  # a subscription takes a moment to arrive
        client.publish(opaque_artefact(policy="other", learner_update=update, seed=update), fencing_token=1)
        client.publish(opaque_artefact(learner_update=update, seed=update), fencing_token=1)
        update += 1
    found.wait(10)
    listener.close()

    assert {announcement.policy for announcement in heard} == {"cartpole"}
    assert heard[0].alias == "latest"
    assert heard[0].policy_version == heard[0].learner_update + 1
    assert all(seen >= told.policy_version for seen, told in zip(fetched, heard, strict=True))


@pytest.mark.parametrize(
    ("message", "payload", "error"),
    [
        (messages.OpenIntent(policy="", digests=("00" * 32,)), (), ContractError),
        (messages.OpenIntent(policy="a", digests=("../../etc/passwd",)), (), ContractError),
        (messages.PutBlob(digest="zz", offset=0, total_bytes=1), (b"a",), ContractError),
        (messages.PutBlob(digest="00" * 32, offset=0, total_bytes=1), (b"a",), DigestMismatch),
        (messages.PutBlob(digest="00" * 32, offset=0, total_bytes=1 << 50), (b"a",), ContractError),
        (messages.FetchBlob(digest="../x"), (), ContractError),
        (messages.FetchBlob(digest="00" * 32, offset=-1), (), RegistryError),
        (messages.Ok(), (), ContractError),
        (messages.FetchManifest(policy="\x00" * 100_000), (), UnknownPolicy),
        (
            messages.Publish(
                intent_id="x", policy="a", run_id="r", lineage_id="l", learner_update=0, fencing_token=1
            ),
            (b"{}",),
            ContractError,
        ),
        (
            messages.Publish(
                intent_id="x", policy="a", run_id="r", lineage_id="l", learner_update=0, fencing_token=1
            ),
            (b"\xff" * 1000,),
            ContractError,
        ),
    ],
)
def test_bad_request_gets_its_error_and_the_next_one_is_served(
    peer: Peer,
    client: RegistryClient,
    message: AnyMessage,
    payload: tuple[bytes, ...],
    error: type[Exception],
) -> None:
    """A typed error reply; the registry goes on."""
    with pytest.raises(error):
        peer.request(message, payload, timeout_seconds=10.0)

    assert client.publish(opaque_artefact(), fencing_token=1) == 1


def test_oversize_message_gets_its_error(peer: Peer, client: RegistryClient) -> None:
    """Above limits.max_message_bytes the answer says so."""
    blob = bytes((2 << 20) + 1)
    message = messages.PutBlob(digest=digest_of(blob), offset=0, total_bytes=len(blob))

    with pytest.raises(MessageTooLarge):
        peer.request(message, (blob,), timeout_seconds=10.0)
    assert client.publish(opaque_artefact(), fencing_token=1) == 1


def test_garbage_gets_an_error_reply_and_the_next_message_is_served(
    registry: ModelRegistry, client: RegistryClient
) -> None:
    """Frames that are no message: an error reply each, counted, and the process lives."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context.socket(zmq.DEALER) as raw:
        raw.connect(f"tcp://127.0.0.1:{registry.router.port}")
        for frames in ([b""], [b"\xc1\xff"], [b"\x00" * 10_000], [b"a"] * 50):
            raw.send_multipart(frames)
            assert raw.poll(10_000)
            assert b"error" in raw.recv_multipart()[0]
    context.term()

    assert sum(registry.router.statistics().rejected_total.values()) == 4
    assert client.publish(opaque_artefact(), fencing_token=1) == 1


def test_wrong_protocol_version_is_named(peer: Peer) -> None:
    """The answer is an error of its own class with the request's id."""
    with pytest.raises(FrameError, match="protocol version 9"):
        peer.request(messages.FetchManifest(policy="a", version=9), timeout_seconds=10.0)


def test_state_survives_a_restart(
    open_registry: Callable[[], ModelRegistry],
) -> None:
    """Another registry over the same directory serves the same versions and goes on counting."""
    artefact = opaque_artefact()
    for expected in (1, 2):
        registry = open_registry()
        client = RegistryClient(f"tcp://127.0.0.1:{registry.router.port}")
        update = expected - 1
        assert (
            client.publish(opaque_artefact(learner_update=update, seed=update), fencing_token=1) == expected
        )
        assert client.fetch("cartpole", policy_version=1).weights == artefact.weights
        client.close()


def test_bad_requests_between_good_ones_hurt_nobody(peer: Peer, client: RegistryClient) -> None:
    """A hundred at once, every second one unknown: exactly these fail."""
    client.publish(opaque_artefact(), fencing_token=1)
    outcomes: dict[int, bool] = {}
    done = threading.Event()

    def note(index: int, error: RelayRLError | None) -> None:
        outcomes[index] = error is None
        if len(outcomes) == 100:
            done.set()

    for index in range(100):
        question = messages.FetchManifest(policy="nobody" if index % 2 else "cartpole")
        peer.submit(
            question,
            timeout_seconds=10.0,
            on_reply=lambda _, __, error, index=index: note(index, error),
        )
    assert done.wait(20)

    assert outcomes == {index: index % 2 == 0 for index in range(100)}
