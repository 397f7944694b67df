"""The model server: publications and fetches over ZMQ, one handler a kind; driven by `RouterServer.run`.

What a message means is the catalog's business; here are only the answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from relayrl_model_registry.blobs import CHUNK_BYTES, BlobStore
from relayrl_model_registry.store.interface import PublicationKey
from relayrl_model_registry.versions import Catalog
from relayrl_shared import logs, telemetry
from relayrl_shared.errors import ContractError, RelayRLError
from relayrl_shared.messages import (
    AnyMessage,
    BlobChunk,
    FetchBlob,
    FetchManifest,
    Intent,
    ManifestReply,
    Message,
    Ok,
    OpenIntent,
    Publish,
    Published,
    PutBlob,
)
from relayrl_shared.sockets import Incoming, RouterServer

LOG = logs.get_logger(__name__)
TRACER = telemetry.tracer(__name__)

Reply = tuple[AnyMessage, Sequence[bytes]]


class ModelServer:
    """Answers what arrives at the model server's address.

    Args:
        catalog: the registry's rules.
        blobs: its files.
        router: the bound socket; `handle` is its batch handler.
    """

    def __init__(self, catalog: Catalog, blobs: BlobStore, router: RouterServer) -> None:
        self._catalog = catalog
        self._blobs = blobs
        self._router = router
        self.requests: Counter[str] = Counter()
        """Requests by kind."""
        self.errors: Counter[str] = Counter()
        """Error replies by code."""
        self._handlers: dict[type[Message], Callable[[Any, list[memoryview]], Reply]] = {
            OpenIntent: self._open_intent,
            PutBlob: self._put_blob,
            Publish: self._publish,
            FetchManifest: self._fetch_manifest,
            FetchBlob: self._fetch_blob,
        }

    def handle(self, batch: list[Incoming]) -> None:
        """Answers every message of the batch."""
        for incoming in batch:
            try:
                message, payload = self._answer(incoming)
            except Exception as error:  # noqa: BLE001  # one bad request must not hurt the others
                self._refuse(incoming, error)
            else:
                self._router.reply(incoming, message, payload)

    def _answer(self, incoming: Incoming) -> Reply:
        message = incoming.message
        handler = self._handlers.get(type(message))
        kind = str(message.__struct_config__.tag)
        if handler is None:
            raise ContractError(f"the model server does not take {kind} messages")
        self.requests[kind] += 1
        with TRACER.span(f"registry.{kind}", parent=message.traceparent):
            return handler(message, incoming.payload)

    def _refuse(self, incoming: Incoming, error: Exception) -> None:
        code = error.code if isinstance(error, RelayRLError) else RelayRLError.code
        self.errors[code] += 1
        if isinstance(error, RelayRLError):
            LOG.warning("request refused", code=code, error=str(error))
        else:
            LOG.error("request failed", exc_info=error)
        self._router.reply_error(incoming, error)

    def _open_intent(self, message: OpenIntent, _: list[memoryview]) -> Reply:
        intent_id, missing = self._catalog.open_intent(message.policy, message.digests)
        return Intent(intent_id=intent_id, missing=missing), ()

    def _put_blob(self, message: PutBlob, payload: list[memoryview]) -> Reply:
        self._blobs.put_chunk(message.digest, message.offset, message.total_bytes, payload[0])
        return Ok(), ()

    def _publish(self, message: Publish, payload: list[memoryview]) -> Reply:
        key = PublicationKey(message.run_id, message.lineage_id, message.policy, message.learner_update)
        version = self._catalog.publish(message.intent_id, key, message.fencing_token, bytes(payload[0]))
        LOG.info(
            "version published",
            policy=version.policy,
            policy_version=version.policy_version,
            learner_update=version.learner_update,
        )
        return Published(policy=version.policy, policy_version=version.policy_version), ()

    def _fetch_manifest(self, message: FetchManifest, _: list[memoryview]) -> Reply:
        version = self._catalog.resolve(message.policy, message.policy_version, message.alias)
        reply = ManifestReply(policy=version.policy, policy_version=version.policy_version)
        return reply, (version.manifest.encode(),)

    def _fetch_blob(self, message: FetchBlob, _: list[memoryview]) -> Reply:
        chunk, total_bytes = self._blobs.read_chunk(message.digest, message.offset, CHUNK_BYTES)
        return BlobChunk(digest=message.digest, offset=message.offset, total_bytes=total_bytes), (chunk,)
