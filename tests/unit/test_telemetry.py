"""Telemetry without an endpoint: nothing is imported, nothing is recorded, almost nothing is paid."""

from __future__ import annotations

import subprocess
import sys
import timeit

import pytest

from relayrl_shared import telemetry
from relayrl_shared.settings import TelemetrySettings

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_without_an_endpoint_spans_and_contexts_do_nothing() -> None:
    """All calls are accepted, and no trace appears."""
    handle = telemetry.configure("x", TelemetrySettings())

    with telemetry.extract(TRACEPARENT), telemetry.tracer("t").span("work", rows=3) as span:
        span.set("bytes", 4)
        assert telemetry.inject() is None
    handle.close()
    handle.close()


def test_without_an_endpoint_an_exception_leaves_a_span_unchanged() -> None:
    """A span never swallows what goes wrong inside it."""
    with pytest.raises(ValueError, match="boom"), telemetry.tracer("t").span("work"):
        raise ValueError("boom")


@pytest.mark.slow
def test_without_an_endpoint_opentelemetry_is_not_imported() -> None:
    """Processes that trace nothing pay neither time nor memory for it."""
    code = (
        "import sys; from relayrl_shared import logs, telemetry; from relayrl_shared.settings import *;"
        "telemetry.configure('x', TelemetrySettings()); telemetry.tracer('t').span('a');"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 0


def test_without_an_endpoint_a_span_costs_under_a_microsecond() -> None:
    """The best of many rounds, so that a busy machine does not matter."""
    tracer = telemetry.tracer("t")

    def spans() -> None:
        for _ in range(1000):
            with tracer.span("work"):
                pass

    assert min(timeit.repeat(spans, number=1, repeat=30)) / 1000 < 1e-6
