"""The registry client against servers that answer well, badly and not at all."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec
import pytest

from relayrl_shared import messages
from relayrl_shared.errors import (
    DigestMismatch,
    FrameError,
    PeerRejected,
    PeerTimeout,
    RegistryError,
    RelayRLError,
    StaleFencingToken,
    StorageFull,
    UnknownPolicy,
)
from relayrl_shared.messages import Announcement, AnyMessage
from relayrl_shared.policy.manifest import PolicyArtefact
from relayrl_shared.registry_client import CHUNK_BYTES, PolicyWatcher, RegistryClient
from relayrl_shared.sockets import Announcer, Incoming, Peer, RouterServer
from relayrl_shared.testing.registry import opaque_artefact

Answer = tuple[AnyMessage, list[bytes]]


class ScriptedRegistry:
    """Keeps versions as a registry does; a test may put another answer in place of any."""

    def __init__(self) -> None:
        self.router = RouterServer("tcp://127.0.0.1:0")
        self.address = f"tcp://127.0.0.1:{self.router.port}"
        self.artefacts: dict[int, PolicyArtefact] = {}
        self.blobs: dict[str, bytes] = {}
        self.uploads: dict[str, bytearray] = {}
        self.asked: list[AnyMessage] = []
        self.instead: Callable[[AnyMessage], Answer | None] = lambda _message: None

    def add(self, artefact: PolicyArtefact) -> int:
        """A new version."""
        version = len(self.artefacts) + 1
        self.artefacts[version] = artefact
        manifest = artefact.manifest
        self.blobs |= {
            manifest.graph_digest: artefact.graph,
            manifest.weights_digest: artefact.weights,
            manifest.golden_digest: artefact.golden,
        }
        return version

    def handle(self, batch: list[Incoming]) -> None:
        """Answers a batch."""
        for incoming in batch:
            self.asked.append(incoming.message)
            reply, payload = self.instead(incoming.message) or self.answer(incoming)
            self.router.reply(incoming, reply, payload)

    def answer(self, incoming: Incoming) -> Answer:
        """The true answer."""
        message = incoming.message
        if isinstance(message, messages.FetchManifest):
            version = message.policy_version or len(self.artefacts)
            if version not in self.artefacts:
                return messages.ErrorReply(code="unknown_policy", message="nothing published"), []
            manifest = msgspec.json.encode(self.artefacts[version].manifest)
            return messages.ManifestReply(policy=message.policy, policy_version=version), [manifest]
        if isinstance(message, messages.FetchBlob):
            blob = self.blobs[message.digest]
            chunk = blob[message.offset : message.offset + CHUNK_BYTES]
            found = messages.BlobChunk(digest=message.digest, offset=message.offset, total_bytes=len(blob))
            return found, [chunk]
        if isinstance(message, messages.OpenIntent):
            missing = tuple(digest for digest in message.digests if digest not in self.blobs)
            return messages.Intent(intent_id="intent", missing=missing), []
        if isinstance(message, messages.PutBlob):
            self.uploads.setdefault(message.digest, bytearray()).extend(incoming.payload[0])
            return messages.Ok(), []
        assert isinstance(message, messages.Publish)
        return messages.Published(policy=message.policy, policy_version=7), []


@pytest.fixture
def registry() -> Iterator[ScriptedRegistry]:
    """A running scripted registry."""
    scripted = ScriptedRegistry()
    stop = threading.Event()
    thread = threading.Thread(target=scripted.router.run, args=(scripted.handle, stop))
    thread.start()
    yield scripted
    stop.set()
    scripted.router.wake()
    thread.join()
    scripted.router.close()


@pytest.fixture
def client(registry: ScriptedRegistry) -> Iterator[RegistryClient]:
    """A client of it."""
    client = RegistryClient(registry.address, timeout_seconds=5.0)
    yield client
    client.close()


def test_a_version_comes_back_as_it_was_published(registry: ScriptedRegistry, client: RegistryClient) -> None:
    """Manifest and files arrive whole, files above 1 MiB in parts, with the version filled in."""
    artefact = opaque_artefact(weights_bytes=2 * CHUNK_BYTES + 5)
    registry.add(artefact)

    fetched = client.fetch("cartpole")

    assert (fetched.graph, fetched.weights, fetched.golden) == (
        artefact.graph,
        artefact.weights,
        artefact.golden,
    )
    assert fetched.manifest == msgspec.structs.replace(artefact.manifest, policy_version=1)


def test_files_are_fetched_once(registry: ScriptedRegistry, client: RegistryClient) -> None:
    """The graph of the next version is the same file, which is kept by digest."""
    for seed in (1, 2):
        registry.add(opaque_artefact(seed=seed))
        client.fetch("cartpole")

    fetched = [message.digest for message in registry.asked if isinstance(message, messages.FetchBlob)]
    assert len(fetched) == len(set(fetched)) == 5


def test_the_cache_is_bounded(registry: ScriptedRegistry) -> None:
    """What does not fit is fetched again."""
    registry.add(opaque_artefact(weights_bytes=5000))
    client = RegistryClient(registry.address, cache_bytes=100)
    try:
        client.fetch("cartpole")
        client.fetch("cartpole")
    finally:
        client.close()

    weights = registry.artefacts[1].manifest.weights_digest
    fetched = [m.digest for m in registry.asked if isinstance(m, messages.FetchBlob)]
    assert fetched.count(weights) == 2


def test_only_missing_files_are_uploaded(registry: ScriptedRegistry, client: RegistryClient) -> None:
    """Publication sends what the registry lacks, in parts, and returns the version."""
    artefact = opaque_artefact(weights_bytes=2 * CHUNK_BYTES + 5)
    registry.blobs[artefact.manifest.graph_digest] = artefact.graph

    version = client.publish(artefact, fencing_token=3)

    assert version == 7
    assert {digest: bytes(blob) for digest, blob in registry.uploads.items()} == {
        artefact.manifest.weights_digest: artefact.weights,
        artefact.manifest.golden_digest: artefact.golden,
    }
    offsets = [
        m.offset
        for m in registry.asked
        if isinstance(m, messages.PutBlob) and m.digest == artefact.manifest.weights_digest
    ]
    assert offsets == [0, CHUNK_BYTES, 2 * CHUNK_BYTES]


def test_an_upload_that_the_registry_has_forgotten_begins_again(
    registry: ScriptedRegistry, client: RegistryClient
) -> None:
    """A registry killed in the middle of a file answers with a gap; the publication starts over (G1)."""
    gaps = iter([True])

    def forget(message: AnyMessage) -> Answer | None:
        if isinstance(message, messages.PutBlob) and message.offset and next(gaps, False):
            return messages.ErrorReply(code="contract", message="leaves a gap after 0: begin again at 0"), []
        return None

    registry.instead = forget

    assert client.publish(opaque_artefact(weights_bytes=2 * CHUNK_BYTES), fencing_token=1) == 7
    assert sum(isinstance(message, messages.OpenIntent) for message in registry.asked) == 2


@pytest.mark.parametrize(
    ("code", "error", "intents"),
    [
        ("internal", PeerRejected, 3),
        ("registry", RegistryError, 3),
        ("stale_fencing_token", StaleFencingToken, 1),
        ("digest_mismatch", DigestMismatch, 1),
        ("storage_full", StorageFull, 1),
    ],
)
def test_a_publication_is_tried_again_where_that_may_help(
    registry: ScriptedRegistry, client: RegistryClient, code: str, error: type[RelayRLError], intents: int
) -> None:
    """A few times from the intent on, unless the refusal is for good or asks for time."""

    def refuse(message: AnyMessage) -> Answer | None:
        if isinstance(message, messages.Publish):
            return messages.ErrorReply(code=code, message="no"), []
        return None

    registry.instead = refuse
    with pytest.raises(error):
        client.publish(opaque_artefact(), fencing_token=1)

    assert sum(isinstance(message, messages.OpenIntent) for message in registry.asked) == intents


def test_an_upload_that_arrives_damaged_is_not_a_clash_of_keys(
    registry: ScriptedRegistry, client: RegistryClient
) -> None:
    """DigestMismatch is for the key alone, since a learner fails its run for it."""

    def refuse(message: AnyMessage) -> Answer | None:
        if isinstance(message, messages.PutBlob):
            return messages.ErrorReply(code="digest_mismatch", message="torn"), []
        return None

    registry.instead = refuse
    with pytest.raises(RegistryError, match="damaged") as raised:
        client.publish(opaque_artefact(), fencing_token=1)

    assert not isinstance(raised.value, DigestMismatch)


def test_an_artefact_that_contradicts_itself_is_not_published(client: RegistryClient) -> None:
    """Files that do not hash to what the manifest names never leave."""
    damaged = msgspec.structs.replace(opaque_artefact(), weights=b"other weights")

    with pytest.raises(DigestMismatch):
        client.publish(damaged, fencing_token=1)


def blob_lie(kind: str) -> Callable[[AnyMessage], Answer | None]:
    """A wrong answer to fetch_blob."""

    def answer(message: AnyMessage) -> Answer | None:
        if not isinstance(message, messages.FetchBlob):
            return None
        lies: dict[str, tuple[int, int, bytes]] = {
            "other bytes": (message.offset, 4, b"evil"),
            "other offset": (message.offset + 1, 4, b"evil"),
            "endless": (message.offset, 1 << 62, b"evil"),
            "nothing": (message.offset, 4, b""),
        }
        offset, total, chunk = lies[kind]
        return messages.BlobChunk(digest=message.digest, offset=offset, total_bytes=total), [chunk]

    return answer


@pytest.mark.parametrize("lie", ["other bytes", "other offset", "endless", "nothing"])
def test_files_that_are_not_what_they_should_be_are_refused(
    registry: ScriptedRegistry, client: RegistryClient, lie: str
) -> None:
    """Whatever a registry sends in place of a file, the client ends with DigestMismatch and keeps nothing."""
    registry.add(opaque_artefact())
    registry.instead = blob_lie(lie)
    with pytest.raises(DigestMismatch):
        client.fetch("cartpole")

    registry.instead = lambda _message: None
    assert client.fetch("cartpole").graph == registry.artefacts[1].graph


def test_a_manifest_that_does_not_parse_and_an_answer_of_another_kind_are_typed(
    registry: ScriptedRegistry, client: RegistryClient
) -> None:
    """Garbage from a registry is an error of its own, not a crash."""
    registry.instead = lambda _m: (messages.ManifestReply(policy="p", policy_version=1), [b"\xff{"])
    with pytest.raises(FrameError, match="manifest"):
        client.fetch("p")
    registry.instead = lambda _m: (messages.Ok(), [])
    with pytest.raises(PeerRejected, match="Ok"):
        client.fetch("p")


def test_unknown_policies_and_silence_are_typed(registry: ScriptedRegistry, client: RegistryClient) -> None:
    """No such policy is UnknownPolicy; no answer is PeerTimeout."""
    with pytest.raises(UnknownPolicy):
        client.latest_version("nobody")
    with Peer("tcp://127.0.0.1:1") as peer:
        silent = RegistryClient("", timeout_seconds=0.1, peer=peer)
        with pytest.raises(PeerTimeout):
            silent.latest_version("nobody")
        silent.close()


@contextmanager
def watching(
    client: RegistryClient, on_artefact: Callable[[PolicyArtefact], None], **options: float
) -> Iterator[tuple[PolicyWatcher, Announcer]]:
    """A watcher of `cartpole` and the announcer that it listens to."""
    announcer = Announcer("tcp://127.0.0.1:0")
    watcher = PolicyWatcher(
        client,
        f"tcp://127.0.0.1:{announcer.port}",
        "cartpole",
        on_artefact,
        **options,  # type: ignore[arg-type]
    )
    try:
        yield watcher, announcer
    finally:
        watcher.close()
        announcer.close()


def test_a_watcher_hands_over_each_version_once(registry: ScriptedRegistry, client: RegistryClient) -> None:
    """By polling alone every newer version arrives, none twice."""
    seen: queue.Queue[int | None] = queue.Queue()
    registry.add(opaque_artefact(seed=1))
    with watching(client, lambda a: seen.put(a.manifest.policy_version), poll_seconds=0.02):
        first = seen.get(timeout=5)
        registry.add(opaque_artefact(seed=2))
        second = seen.get(timeout=5)

    assert (first, second) == (1, 2)
    assert seen.empty()


def test_an_announcement_makes_a_watcher_look_before_its_poll(
    registry: ScriptedRegistry, client: RegistryClient
) -> None:
    """With an hour between polls, the hint alone brings the version."""
    seen: queue.Queue[int | None] = queue.Queue()
    registry.add(opaque_artefact(seed=1))
    with watching(client, lambda a: seen.put(a.manifest.policy_version), poll_seconds=3600.0) as (
        _,
        announcer,
    ):
        assert seen.get(timeout=5) == 1
        registry.add(opaque_artefact(seed=2))
        hint = Announcement(policy="cartpole", policy_version=2, alias="latest", learner_update=1)
        for _ in range(500):  # a subscription takes a moment, and hints before it are lost by design
            announcer.announce(hint)
            try:
                version = seen.get(timeout=0.02)
            except queue.Empty:
                continue
            break

    assert version == 2


def test_a_watcher_survives_a_registry_that_is_away(
    registry: ScriptedRegistry, client: RegistryClient
) -> None:
    """Errors are counted, and the version comes when there is one."""
    seen: queue.Queue[int | None] = queue.Queue()
    with watching(client, lambda a: seen.put(a.manifest.policy_version), poll_seconds=0.02) as (watcher, _):
        while watcher.errors_total < 3:
            assert seen.empty()
        problem = watcher.last_error
        registry.add(opaque_artefact())
        assert seen.get(timeout=5) == 1
        watcher.close()

    assert problem == "nothing published"
    assert watcher.last_error is None


def test_a_version_that_is_refused_is_not_offered_again(
    registry: ScriptedRegistry, client: RegistryClient
) -> None:
    """A bad version is counted once, and the next good one is taken."""
    offered: queue.Queue[int | None] = queue.Queue()

    def accept(artefact: PolicyArtefact) -> None:
        offered.put(artefact.manifest.policy_version)
        if artefact.manifest.policy_version == 1:
            raise ValueError("cannot be loaded")

    registry.add(opaque_artefact(seed=1))
    with watching(client, accept, poll_seconds=0.02) as (watcher, _):
        first = offered.get(timeout=5)
        asked = len(registry.asked)
        while len(registry.asked) < asked + 3:
            threading.Event().wait(0.005)
        refused = (watcher.refused_total, watcher.last_refusal, watcher.last_error, offered.empty())
        registry.add(opaque_artefact(seed=2))
        second = offered.get(timeout=5)
        watcher.close()

    assert (first, second) == (1, 2)
    assert refused == (1, "cannot be loaded", None, True)
    assert watcher.last_refusal is None


def test_an_answer_with_the_version_in_use_ends_an_error(
    registry: ScriptedRegistry, client: RegistryClient
) -> None:
    """One poll that fails is forgotten at the next answer, though no new version comes."""
    seen: queue.Queue[int | None] = queue.Queue()
    registry.add(opaque_artefact())
    with watching(client, lambda a: seen.put(a.manifest.policy_version), poll_seconds=0.02) as (watcher, _):
        assert seen.get(timeout=5) == 1
        refusal = messages.ErrorReply(code="internal", message="not now"), list[bytes]()
        registry.instead = lambda _message: refusal
        while watcher.last_error is None:
            threading.Event().wait(0.005)
        registry.instead = lambda _message: None
        deadline = time.monotonic() + 5
        while watcher.last_error is not None and time.monotonic() < deadline:
            threading.Event().wait(0.005)
        watcher.close()

    assert watcher.last_error is None
    assert watcher.errors_total > 0
    assert seen.empty()
