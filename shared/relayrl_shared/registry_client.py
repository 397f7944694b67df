"""Publishing and fetching policy versions over the wire; driven by learner, client and inference server.

`RegistryClient` asks the model server; `PolicyWatcher` follows one policy and hands over every newer version.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TypeVar

import msgspec
from blake3 import blake3

from relayrl_shared import messages
from relayrl_shared.errors import (
    ArtefactError,
    DigestMismatch,
    FrameError,
    LeaseLost,
    PeerRejected,
    RegistryError,
    RelayRLError,
    StaleFencingToken,
    UnknownPolicy,
)
from relayrl_shared.messages import Announcement, AnyMessage
from relayrl_shared.policy.manifest import PolicyArtefact, PolicyManifest
from relayrl_shared.sockets import AnnouncementListener, Peer

CHUNK_BYTES = 1 << 20
MAX_BLOB_BYTES = 8 << 30

_PUBLISH_TRIES = 3
_PUBLISH_FINAL = (StaleFencingToken, LeaseLost, DigestMismatch, ArtefactError)
"""Errors that the same publication would meet again; those that are `retryable` ask for time instead."""

_log = logging.getLogger(__name__)

_M = TypeVar("_M")


class RegistryClient:
    """A connection to one model server. Safe to share between threads.

    Args:
        address: of the model server, `tcp://host:port`.
        timeout_seconds: deadline of every single request; a fetch or publication makes several.
        cache_bytes: blobs kept by digest, least recently used first out; the graph changes seldom.
        peer: an open connection to use in place of an own one; it is not closed here.
    """

    def __init__(
        self,
        address: str,
        *,
        timeout_seconds: float = 10.0,
        cache_bytes: int = 256 << 20,
        peer: Peer | None = None,
    ) -> None:
        self._peer = peer or Peer(address)
        self._owns_peer = peer is None
        self._timeout_seconds = timeout_seconds
        self._cache = _BlobCache(cache_bytes)

    # ---- publish ------------------------------------------------------------------------------------------

    def publish(self, artefact: PolicyArtefact, *, fencing_token: int) -> int:
        """Uploads what the registry lacks and makes the version visible; returns its number.

        Idempotent: the same (run_id, lineage_id, policy, learner_update) with the same digests gives the same
        version again (contracts G1).

        Raises:
            StaleFencingToken: a newer learner holds the run.
            DigestMismatch: the key has other digests.
            TransportError: the registry could not be reached in time; call again.
            RelayRLError: it failed several times, each from the intent on, such as for a full disk.
        """
        blobs = _blobs(artefact)
        for _ in range(_PUBLISH_TRIES - 1):
            try:
                return self._publish(artefact.manifest, blobs, fencing_token)
            except RelayRLError as error:
                if error.retryable or isinstance(error, _PUBLISH_FINAL):
                    raise
                # Such as the refusal by a registry that has forgotten half an upload.
                _log.warning("publication of %s begins again: %s", artefact.manifest.policy, error)
        return self._publish(artefact.manifest, blobs, fencing_token)

    def _publish(self, manifest: PolicyManifest, blobs: Mapping[str, bytes], fencing_token: int) -> int:
        digests = tuple(dict.fromkeys(blobs))
        intent = self._ask(messages.OpenIntent(policy=manifest.policy, digests=digests), messages.Intent)
        for digest in intent.missing:
            if digest in blobs:
                self._upload(digest, blobs[digest])
        published = self._ask(
            messages.Publish(
                intent_id=intent.intent_id,
                policy=manifest.policy,
                run_id=manifest.run_id,
                lineage_id=manifest.lineage_id,
                learner_update=manifest.learner_update,
                fencing_token=fencing_token,
            ),
            messages.Published,
            msgspec.json.encode(manifest),
        )
        return published.policy_version

    def _upload(self, digest: str, blob: bytes) -> None:
        for offset in range(0, max(len(blob), 1), CHUNK_BYTES):
            chunk = memoryview(blob)[offset : offset + CHUNK_BYTES]
            message = messages.PutBlob(digest=digest, offset=offset, total_bytes=len(blob))
            try:
                self._ask(message, messages.Ok, chunk)
            except DigestMismatch as error:  # of this upload, not of the key that is published
                raise RegistryError(f"the upload of {digest} was damaged: {error}") from error

    # ---- fetch --------------------------------------------------------------------------------------------

    def fetch(
        self, policy: str, *, policy_version: int | None = None, alias: str = "latest"
    ) -> PolicyArtefact:
        """The artefact of a version, or of the one that the alias points to. Every digest is checked.

        Raises:
            UnknownPolicy, UnknownPolicyVersion: there is no such thing.
            DigestMismatch: bytes that do not hash to their digest.
            TransportError: the registry could not be reached in time.
        """
        manifest = self.fetch_manifest(policy, policy_version=policy_version, alias=alias)
        return PolicyArtefact(
            manifest,
            self.fetch_blob(manifest.graph_digest),
            self.fetch_blob(manifest.weights_digest),
            self.fetch_blob(manifest.golden_digest),
        )

    def fetch_manifest(
        self, policy: str, *, policy_version: int | None = None, alias: str = "latest"
    ) -> PolicyManifest:
        """The manifest alone, with `policy_version` set."""
        question = messages.FetchManifest(policy=policy, policy_version=policy_version, alias=alias)
        message, payload = self._peer.request(question, timeout_seconds=self._timeout_seconds)
        reply = _expect(message, messages.ManifestReply)
        try:
            manifest = msgspec.json.decode(payload[0], type=PolicyManifest)
        except (msgspec.MsgspecError, ValueError) as error:
            raise FrameError(f"the manifest of {policy} {reply.policy_version} does not parse") from error
        return msgspec.structs.replace(manifest, policy_version=reply.policy_version)

    def latest_version(self, policy: str, alias: str = "latest") -> int:
        """The version that the alias points to now."""
        question = messages.FetchManifest(policy=policy, alias=alias)
        return self._ask(question, messages.ManifestReply).policy_version

    def fetch_blob(self, digest: str) -> bytes:
        """The bytes of a digest, from the cache where they are.

        Raises:
            DigestMismatch: they do not hash to it.
        """
        cached = self._cache.get(digest)
        if cached is not None:
            return cached
        blob = self._download(digest)
        if blake3(blob).hexdigest() != digest:
            raise DigestMismatch(f"the bytes fetched for {digest} do not hash to it")
        self._cache.put(digest, blob)
        return blob

    def _download(self, digest: str) -> bytes:
        received = bytearray()
        while True:
            question = messages.FetchBlob(digest=digest, offset=len(received))
            message, payload = self._peer.request(question, timeout_seconds=self._timeout_seconds)
            chunk = _expect(message, messages.BlobChunk)
            if chunk.offset != len(received) or not 0 <= chunk.total_bytes <= MAX_BLOB_BYTES:
                raise DigestMismatch(f"the registry sent another part of {digest} than asked for")
            received += payload[0]
            if len(received) >= chunk.total_bytes:
                return bytes(received)
            if not payload[0]:
                raise DigestMismatch(f"{digest} ended after {len(received)} of {chunk.total_bytes} bytes")

    def _ask(self, message: AnyMessage, answer: type[_M], *payload: bytes | memoryview) -> _M:
        reply, _ = self._peer.request(message, payload, timeout_seconds=self._timeout_seconds)
        return _expect(reply, answer)

    def close(self) -> None:
        """Closes the connection that it made."""
        if self._owns_peer:
            self._peer.close()


def _blobs(artefact: PolicyArtefact) -> Mapping[str, bytes]:
    manifest = artefact.manifest
    blobs = {
        manifest.graph_digest: artefact.graph,
        manifest.weights_digest: artefact.weights,
        manifest.golden_digest: artefact.golden,
    }
    for digest, blob in blobs.items():
        if blake3(blob).hexdigest() != digest:
            raise DigestMismatch(f"the artefact's bytes do not hash to {digest}, which its manifest names")
    return blobs


def _expect(message: AnyMessage, expected: type[_M]) -> _M:
    if not isinstance(message, expected):
        raise PeerRejected(f"the registry answered with {type(message).__name__}, not {expected.__name__}")
    return message


class _BlobCache:
    """Blobs by digest within a byte limit, least recently used first out."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._blobs: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, digest: str) -> bytes | None:
        with self._lock:
            if digest in self._blobs:
                self._blobs.move_to_end(digest)
            return self._blobs.get(digest)

    def put(self, digest: str, blob: bytes) -> None:
        with self._lock:
            if digest not in self._blobs:
                self._blobs[digest] = blob
                self._bytes += len(blob)
            while self._bytes > self._limit_bytes:
                _, evicted = self._blobs.popitem(last=False)
                self._bytes -= len(evicted)


class PolicyWatcher:
    """Follows an alias of one policy from a thread: an announcement or the poll interval makes it look.

    Versions may be skipped, never go back unless the alias does. Errors are counted and logged; whoever uses
    the old version goes on with it.

    Args:
        client: is not closed here.
        announcer_address: `tcp://host:port`, None: poll only.
        policy: its name.
        on_artefact: called in the watcher's thread with every version other than the last accepted one. Where
            it raises, the version is refused: it is not offered again until the alias moves on.
        poll_seconds: the interval at which a lost announcement is made up for.
        current_version: a version that is in use already.
        alias: which alias to follow.
    """

    def __init__(
        self,
        client: RegistryClient,
        announcer_address: str | None,
        policy: str,
        on_artefact: Callable[[PolicyArtefact], None],
        poll_seconds: float = 5.0,
        *,
        current_version: int | None = None,
        alias: str = "latest",
    ) -> None:
        self._client = client
        self._policy = policy
        self._alias = alias
        self._on_artefact = on_artefact
        self._poll_seconds = poll_seconds
        self._seen_version = current_version
        self._look = threading.Event()
        self._closing = False
        self.errors_total = 0
        self.refused_total = 0
        self.last_error: str | None = None
        """Why the last question to the registry failed; None once it answers again."""
        self.last_refusal: str | None = None
        """Why the newest version was refused; None once another is accepted."""
        self.last_contact_at: float | None = None
        """Monotonic seconds of the last answer of the registry."""
        self._listener = (
            AnnouncementListener(announcer_address, [policy], self._on_announcement)
            if announcer_address
            else None
        )
        self._thread = threading.Thread(target=self._run, name=f"policy watcher {policy}", daemon=True)
        self._thread.start()

    def look_now(self) -> None:
        """Makes the watcher ask the registry at once."""
        self._look.set()

    def _on_announcement(self, announcement: Announcement) -> None:
        if announcement.alias == self._alias and announcement.policy_version != self._seen_version:
            self._look.set()

    def _run(self) -> None:
        while not self._closing:
            self._look.clear()
            self._check()
            self._look.wait(self._poll_seconds)

    def _check(self) -> None:
        try:
            version = self._client.latest_version(self._policy, self._alias)
            self.last_contact_at = time.monotonic()
            if version == self._seen_version:
                self.last_error = None
                return
            artefact = self._client.fetch(self._policy, policy_version=version)
        except RelayRLError as error:
            self._note(error)
            return
        self.last_error = None
        if not self._closing:
            self._seen_version = version
            self._hand_over(artefact)

    def _hand_over(self, artefact: PolicyArtefact) -> None:
        try:
            self._on_artefact(artefact)
        except Exception as error:  # noqa: BLE001  # whatever a bad version does, the old one serves on
            self.refused_total += 1
            self.last_refusal = str(error)
            _log.exception("%s version %s was refused", self._policy, artefact.manifest.policy_version)
        else:
            self.last_refusal = None

    def _note(self, error: RelayRLError) -> None:
        self.errors_total += 1
        if isinstance(error, UnknownPolicy) and self.last_error is None:
            _log.info("waiting for the first version of policy %s: its learner starts", self._policy)
        elif str(error) != self.last_error:
            _log.warning("policy %s could not be fetched: %s", self._policy, error)
        self.last_error = str(error)

    def close(self) -> None:
        """Ends the thread; waits for a fetch under way. Safe to call twice."""
        self._closing = True
        self._look.set()
        if self._listener is not None:
            self._listener.close()
        if threading.current_thread() is not self._thread:
            self._thread.join()
