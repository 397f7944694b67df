"""Traces: spans that cross processes in the `traceparent` of message headers and rows, exported by OTLP.

A service's `main` calls `configure` once. Without an endpoint nothing of OpenTelemetry is imported and a span
costs a fraction of a microsecond, so that hot paths may call it without asking.

    TRACER = telemetry.tracer(__name__)
    with telemetry.extract(message.traceparent), TRACER.span("store", rows=3):
        reply = Ack(traceparent=telemetry.inject(), ...)
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from relayrl_shared.settings import TelemetrySettings

if TYPE_CHECKING:
    from relayrl_shared.telemetry_otlp import OtlpBackend

FLUSH_SECONDS = 3.0


class Span(AbstractContextManager["Span"]):
    """A piece of work; this one records nothing and stands where no endpoint is set."""

    __slots__ = ()

    def set(self, key: str, value: Any) -> None:
        """Adds an attribute: a string, number, bool or a sequence of one of these."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class _State:
    """The one backend of this process: spans are made far from any place that a handle could be passed to."""

    __slots__ = ("backend", "lock", "users")

    def __init__(self) -> None:
        self.backend: OtlpBackend | None = None
        self.users = 0
        self.lock = threading.Lock()


_NO_SPAN = Span()
_STATE = _State()


class Tracer:
    """Makes spans under a name, usually the module's."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def span(
        self,
        span_name: str,
        *,
        parent: str | None = None,
        links: Sequence[str | None] = (),
        **attributes: Any,
    ) -> Span:
        """A span to be used in a `with`; an exception that leaves it is recorded on it.

        Args:
            span_name: what is done, such as `ingest.commit`.
            parent: traceparent of the caller in another process; None: the span around this one.
            links: traceparents of what this work used, such as the trajectories of an update.
            attributes: first attributes.
        """
        backend = _STATE.backend
        return _NO_SPAN if backend is None else backend.span(self._name, span_name, parent, links, attributes)


class Telemetry:
    """What `configure` started; `close` sends what is left."""

    def __init__(self, active: bool) -> None:
        self._active = active

    def close(self, timeout_seconds: float = FLUSH_SECONDS) -> None:
        """Flushes and stops the export once every `configure` of this process is closed. Twice is fine."""
        if not self._active:
            return
        self._active = False
        with _STATE.lock:
            _STATE.users -= 1
            if _STATE.users == 0 and _STATE.backend is not None:
                backend, _STATE.backend = _STATE.backend, None
                backend.close(timeout_seconds)


def configure(service: str, settings: TelemetrySettings) -> Telemetry:
    """Starts the export of traces if an endpoint is set; services of one process share the first one."""
    if settings.otlp_endpoint is None:
        return Telemetry(active=False)
    from relayrl_shared.telemetry_otlp import OtlpBackend

    with _STATE.lock:
        if _STATE.backend is None:
            _STATE.backend = OtlpBackend(service, settings.otlp_endpoint)
        _STATE.users += 1
    return Telemetry(active=True)


def tracer(name: str) -> Tracer:
    """A tracer; it may be made before `configure`."""
    return Tracer(name)


def inject() -> str | None:
    """The W3C traceparent of the current span, for a message header or a row; None without a trace."""
    backend = _STATE.backend
    return None if backend is None else backend.traceparent()


def extract(traceparent: str | None) -> AbstractContextManager[Any]:
    """A context in which spans are children of the sender's; no effect for None or without an endpoint."""
    backend = _STATE.backend
    return _NO_SPAN if backend is None or traceparent is None else backend.remote(traceparent)
