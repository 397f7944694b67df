"""The OpenTelemetry half of `telemetry`, imported only where an OTLP endpoint is set.

Sampling, batching and headers follow the standard `OTEL_*` variables, which the SDK reads itself.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextvars import Token
from types import TracebackType
from typing import Any, Self

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from relayrl_shared.telemetry import Span

_PROPAGATOR = TraceContextTextMapPropagator()


class OtlpBackend:
    """A tracer provider that sends batches of spans to one OTLP gRPC endpoint."""

    def __init__(self, service: str, endpoint: str) -> None:
        resource = Resource.create({SERVICE_NAME: service})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._exporter = OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))

    def span(
        self,
        tracer_name: str,
        span_name: str,
        parent: str | None,
        links: Sequence[str | None],
        attributes: Mapping[str, Any],
    ) -> Span:
        """A span that is current inside its `with`."""
        span = self._provider.get_tracer(tracer_name).start_span(
            span_name,
            context=None if parent is None else _context(parent),
            links=[trace.Link(_span_context(link)) for link in links if link is not None],
            attributes=dict(attributes),
        )
        return _RecordingSpan(span)

    def traceparent(self) -> str | None:
        """The traceparent of the current span."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier)
        return carrier.get("traceparent")

    def remote(self, traceparent: str) -> Span:
        """A context whose current span is the sender's."""
        return _RemoteContext(_context(traceparent))

    def close(self, timeout_seconds: float) -> None:
        """Sends what is left within the deadline; what a dead collector did not take by then is lost."""
        flush = threading.Thread(target=self._provider.shutdown, name="telemetry-flush", daemon=True)
        flush.start()
        flush.join(timeout_seconds)
        self._exporter.shutdown()


def _context(traceparent: str) -> Context:
    return _PROPAGATOR.extract({"traceparent": traceparent})


def _span_context(traceparent: str) -> trace.SpanContext:
    return trace.get_current_span(_context(traceparent)).get_span_context()


class _RecordingSpan(Span):
    __slots__ = ("_span", "_token")

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        self._token: Token[Context] | None = None

    def set(self, key: str, value: Any) -> None:
        self._span.set_attribute(key, value)

    def __enter__(self) -> Self:
        self._token = otel_context.attach(trace.set_span_in_context(self._span))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace_: TracebackType | None
    ) -> None:
        if self._token is not None:
            otel_context.detach(self._token)
        if error is not None:
            self._span.record_exception(error)
            self._span.set_status(trace.StatusCode.ERROR, str(error))
        self._span.end()


class _RemoteContext(Span):
    __slots__ = ("_context", "_token")

    def __init__(self, context: Context) -> None:
        self._context = context
        self._token: Token[Context] | None = None

    def __enter__(self) -> Self:
        self._token = otel_context.attach(self._context)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace_: TracebackType | None
    ) -> None:
        if self._token is not None:
            otel_context.detach(self._token)
