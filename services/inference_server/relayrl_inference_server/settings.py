"""The inference server's settings, read once by `main` and passed down as values."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from relayrl_shared.settings import Address, HttpSettings, LogSettings, Settings, TelemetrySettings

ENVIRONMENT_PREFIX = "RELAYRL_INFERENCE_SERVER"

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]


class BatchingSettings(Settings, frozen=True, kw_only=True):
    """How requests share a forward. Both numbers are upper bounds: nothing is held back to fill a batch.

    max_batch_rows: rows of one forward.
    max_delay_ms: once a request has waited for so long, no fuller batch goes before it.
    """

    max_batch_rows: Count = 1024
    max_delay_ms: Annotated[float, Meta(ge=0)] = 5.0


class LimitSettings(Settings, frozen=True, kw_only=True):
    """Bounds on what is queued and kept. What is over a queue's limit is refused with retry_after."""

    max_message_bytes: Count = 64 << 20
    max_queued_requests: Count = 2048
    max_queued_rows: Count = 65_536
    max_request_rows: Count = 16_384
    max_timeout_seconds: Seconds = 60.0
    max_policies: Count = 64
    max_pinned_versions: Count = 16


class InferenceServerSettings(Settings, frozen=True, kw_only=True):
    """Everything that an inference server is told.

    policies: loaded at the start and waited for by /readyz; others are loaded when they are first asked for.
    poll_seconds: how late a version can be noticed whose announcement was lost.
    drain_seconds: how long new requests are answered with `draining` before the process ends.
    """

    inference_server: Address = Address(port=7800)
    http: HttpSettings = HttpSettings(port=8083)
    model_server: Address = Address(port=50051)
    model_announcer: Address = Address(port=50052)
    policies: tuple[str, ...] = ()
    poll_seconds: Seconds = 5.0
    registry_timeout_seconds: Seconds = 5.0
    drain_seconds: Annotated[float, Meta(ge=0)] = 1.0
    workers: Literal[1] = 1
    batching: BatchingSettings = BatchingSettings()
    limits: LimitSettings = LimitSettings()
    log: LogSettings = LogSettings()
    telemetry: TelemetrySettings = TelemetrySettings()
