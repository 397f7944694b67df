"""An OTLP gRPC receiver in this process, for tests of traces."""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, Span


class Receiver(trace_service_pb2_grpc.TraceServiceServicer):
    """Takes what an OpenTelemetry collector would take."""

    def __init__(self) -> None:
        self.batches: queue.SimpleQueue[ResourceSpans] = queue.SimpleQueue()
        self._server = grpc.server(ThreadPoolExecutor(1))
        add_servicer: Any = trace_service_pb2_grpc.add_TraceServiceServicer_to_server
        add_servicer(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def Export(  # the name is the protocol's
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        """Keeps the spans."""
        for batch in request.resource_spans:
            self.batches.put(batch)
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self) -> dict[str, Span]:
        """What has come, by span name."""
        found: dict[str, Span] = {}
        while not self.batches.empty():
            for scope in self.batches.get().scope_spans:
                found |= {span.name: span for span in scope.spans}
        return found

    def stop(self) -> None:
        """Ends the server."""
        self._server.stop(None).wait()
