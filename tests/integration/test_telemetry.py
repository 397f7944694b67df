"""Telemetry against a real OTLP gRPC receiver: one trace across threads and header fields."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from relayrl_shared import logs, telemetry
from relayrl_shared.settings import LogSettings, TelemetrySettings
from relayrl_shared.testing.otlp import Receiver

TRACER = telemetry.tracer("test")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A collector on a free port."""
    server = Receiver()
    yield server
    server.stop()


@pytest.fixture
def exporting(receiver: Receiver) -> Iterator[telemetry.Telemetry]:
    """Telemetry that sends to the receiver."""
    handle = telemetry.configure(
        "ingest", TelemetrySettings(otlp_endpoint=f"http://127.0.0.1:{receiver.port}")
    )
    yield handle
    handle.close()


def test_a_trace_goes_on_in_another_thread_by_its_traceparent(
    receiver: Receiver, exporting: telemetry.Telemetry
) -> None:
    """The child has the sender's span as its parent, and both have the same trace id."""
    headers: list[str | None] = []
    with TRACER.span("request_action"):
        headers.append(telemetry.inject())

    def receive() -> None:
        with telemetry.extract(headers[0]), TRACER.span("ingest", rows=3):
            pass

    thread = threading.Thread(target=receive)
    thread.start()
    thread.join()
    exporting.close()

    spans = receiver.spans()
    assert spans["ingest"].trace_id == spans["request_action"].trace_id
    assert spans["ingest"].parent_span_id == spans["request_action"].span_id
    assert [(item.key, item.value.int_value) for item in spans["ingest"].attributes] == [("rows", 3)]


def test_a_span_takes_its_parent_and_its_links_from_rows(
    receiver: Receiver, exporting: telemetry.Telemetry
) -> None:
    """An update is a child of none of its trajectories but linked with each."""
    with TRACER.span("one"):
        one = telemetry.inject()
    with TRACER.span("two"):
        two = telemetry.inject()

    with TRACER.span("update", parent=two, links=[one, None, two]):
        pass
    exporting.close()

    spans = receiver.spans()
    assert [link.span_id for link in spans["update"].links] == [spans["one"].span_id, spans["two"].span_id]
    assert spans["update"].parent_span_id == spans["two"].span_id


def test_an_error_inside_a_span_is_recorded_and_goes_on(
    receiver: Receiver, exporting: telemetry.Telemetry
) -> None:
    """The span has the error status and the exception; the caller gets the exception."""
    with pytest.raises(ValueError, match="boom"), TRACER.span("work"):
        raise ValueError("boom")
    exporting.close()

    span = receiver.spans()["work"]
    assert span.status.code == 2
    assert span.events[0].name == "exception"


def test_the_service_names_itself(receiver: Receiver, exporting: telemetry.Telemetry) -> None:
    """The resource carries service.name."""
    with TRACER.span("work"):
        pass
    exporting.close()

    resource = receiver.batches.get(timeout=5).resource
    assert ("service.name", "ingest") in [(item.key, item.value.string_value) for item in resource.attributes]


def test_services_of_one_process_share_the_export_until_the_last_closes(
    receiver: Receiver, exporting: telemetry.Telemetry
) -> None:
    """Closing one of two leaves the other's spans flowing."""
    second = telemetry.configure("learner", TelemetrySettings(otlp_endpoint="http://127.0.0.1:1"))
    second.close()
    second.close()

    with TRACER.span("still"):
        pass
    exporting.close()

    assert "still" in receiver.spans()
    assert telemetry.inject() is None


def test_log_lines_carry_the_trace_id(
    receiver: Receiver, exporting: telemetry.Telemetry, caplog: pytest.LogCaptureFixture
) -> None:
    """A line can be found from its trace."""
    with TRACER.span("work"):
        traceparent = telemetry.inject()
        logs.get_logger("a").warning("inside")

    assert traceparent is not None
    assert f"trace_id={traceparent.split('-')[1]}" in caplog.records[-1].getMessage()


def test_a_collector_that_is_down_costs_a_log_line_only() -> None:
    """Work goes on, and closing keeps its deadline."""
    logs.configure("x", LogSettings(level="critical"))
    handle = telemetry.configure("x", TelemetrySettings(otlp_endpoint="http://127.0.0.1:9"))

    with TRACER.span("work"):
        pass
    began = time.monotonic()
    handle.close(timeout_seconds=0.5)

    assert time.monotonic() - began < 2
    assert telemetry.inject() is None
