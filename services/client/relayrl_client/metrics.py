"""The client's Prometheus metrics, read from plain counters when they are asked for.

The hot path only adds to integers; `ClientMetrics` on a CollectorRegistry turns them into metrics. The
embedded client serves no HTTP of its own unless it is switched on: an application registers the collector
where it likes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from relayrl_client.delivery import RoutedDelivery
from relayrl_client.runtime import Runtime

PREFIX = "relayrl_client"


class HasRuntime(Protocol):
    """An `Agent`, or what stands for its running parts."""

    @property
    def is_running(self) -> bool:
        """Whether there is a runtime now."""

    @property
    def runtime(self) -> Runtime:
        """The running parts."""


class ClientMetrics(Collector):
    """Reads an agent's counters; empty while it does not run."""

    def __init__(self, agent: HasRuntime) -> None:
        self._agent = agent

    def describe(self) -> Iterator[Metric]:
        """Nothing in advance: what there is depends on the modes."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """All metrics now."""
        if not self._agent.is_running:
            return
        runtime = self._agent.runtime
        yield from _acting(runtime)
        yield from _recording(runtime)
        yield from _policy(runtime)
        yield from _session(runtime)
        if isinstance(runtime.delivery, RoutedDelivery):
            yield from _delivery(runtime.delivery)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"{PREFIX}_{name}", text, value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{PREFIX}_{name}", text, value)


def _acting(runtime: Runtime) -> Iterator[Metric]:
    calls, pacing = runtime.coordinator.counters, runtime.coordinator.admission.counters
    yield _counter("requests", "Calls of request_action", calls.requests_total)
    yield _counter(
        "request_errors", "Calls of request_action that failed in between", calls.request_errors_total
    )
    yield _counter("pacing_waits", "Calls that had to wait for admission", pacing.waits_total)
    yield _counter("pacing_wait_seconds", "Time spent waiting for admission", pacing.wait_seconds_total)
    yield _counter("pacing_timeouts", "Waits for admission that ran out of time", pacing.timeouts_total)
    yield _counter("unpaced_rollouts", "Begun without admission", pacing.unpaced_rollouts_total)


def _recording(runtime: Runtime) -> Iterator[Metric]:
    counters, storage = runtime.recorder.counters, runtime.recorder.storage.statistics()
    yield _gauge("actors", "Actors that there are", len(runtime.table.ids))
    yield _counter("steps", "Steps recorded", counters.steps_total)
    yield _counter("segments", "Segments closed", counters.segments_total)
    yield _counter("episodes", "Episodes ended", counters.episodes_total)
    yield _counter(
        "dropped_steps", "Steps dropped since no reward came for them", counters.dropped_steps_total
    )
    refused = runtime.coordinator.refused_segments
    yield _gauge("refused_segments", "Closed segments that delivery refused and that wait", refused)
    yield _gauge("open_segment_bytes", "Memory of open segments", storage.pages_used * storage.page_bytes)
    yield _counter(
        "storage_refusals", "Calls refused at the byte limit of open segments", storage.refused_total
    )


def _policy(runtime: Runtime) -> Iterator[Metric]:
    yield _gauge("policy_version", "Version in use, -1 without one", runtime.inference.policy_version)
    yield _gauge("learner_update", "Finished updates that this client knows of", runtime.learner_update)
    if runtime.slot is not None:
        yield _counter("policy_swaps", "Versions swapped in", runtime.slot.swaps_total)
        yield _counter("policy_refusals", "Versions that did not load or fit", runtime.slot.refused_total)
    if runtime.watcher is not None:
        yield _counter("registry_errors", "Failed looks at the registry", runtime.watcher.errors_total)


def _session(runtime: Runtime) -> Iterator[Metric]:
    if runtime.session is None:
        return
    session = runtime.session.statistics()
    yield _gauge("session_up", "1 while the training server answers", session.is_up)
    yield _counter("heartbeats", "Heartbeats answered", session.heartbeats_total)
    yield _counter("session_failures", "Messages to the agent listener that failed", session.failures_total)
    yield _counter("hellos", "Hellos answered", session.hellos_total)


def _delivery(delivery: RoutedDelivery) -> Iterator[Metric]:
    routers = delivery.router_statistics()
    yield _gauge("routers", "Routers that there are", len(routers))
    yield _gauge("router_queued_segments", "Segments that wait", sum(r.queued_segments for r in routers))
    yield _gauge("router_queued_bytes", "Their bytes", sum(r.queued_bytes for r in routers))
    yield _counter("router_segments", "Segments written to the sinks", sum(r.written_total for r in routers))
    yield _counter("router_failures", "Segments refused by a sink", sum(r.failed_total for r in routers))
    spool, sender = delivery.spool_statistics(), delivery.sender_statistics()
    if spool is not None:
        yield _gauge("spool_pending", "Trajectories in the spool", spool.pending_entries)
        yield _gauge("spool_bytes", "Bytes of the spool", spool.size_bytes)
        yield _counter("spool_accepted", "Trajectories made durable", spool.accepted_total)
        yield _counter("spool_dropped", "Dropped by policy, or damaged", spool.dropped_total)
    if sender is not None:
        yield _counter("sent", "Trajectories sent, repeats included", sender.sent_total)
        yield _counter("acknowledged", "Trajectories acknowledged", sender.acknowledged_total)
        yield _counter("quarantined", "Trajectories that the server quarantined", sender.quarantined_total)
        yield _gauge("in_flight", "Trajectories sent and not acknowledged", sender.in_flight)
