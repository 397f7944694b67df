"""The inference server's Prometheus metrics, read from snapshots; driven by GET /metrics."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from relayrl_inference_server.counters import Histogram, ServingCounters

if TYPE_CHECKING:
    from relayrl_inference_server.service import InferenceService

PREFIX = "relayrl_inference_server"


class InferenceMetrics(Collector):
    """Reads a server's counters."""

    def __init__(self, service: InferenceService) -> None:
        self._service = service

    def describe(self) -> Iterator[Metric]:
        """Nothing in advance."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """All metrics now."""
        counters = self._service.server.counters()
        yield from _serving(counters)
        yield _gauge("queued_requests", "Requests that wait", self._service.server.queued_requests)
        yield _gauge("draining", "1 while new requests are refused", self._service.server.draining)
        yield from self._socket()
        yield from self._policies()

    def _socket(self) -> Iterator[Metric]:
        router = self._service.router.statistics()
        yield _labelled("rejected_messages", "Messages that did not decode", "code", router.rejected_total)
        yield _counter("replies_undeliverable", "Replies to peers that had gone", router.undeliverable_total)
        yield _counter("handler_errors", "Exceptions out of the serving loop", router.handler_errors_total)

    def _policies(self) -> Iterator[Metric]:
        slots = self._service.pool.status()
        yield _gauge(
            "loaded_policies", "Versions that are loaded", sum(s.policy_version is not None for s in slots)
        )
        yield _counter("swaps", "Versions swapped in", sum(slot.swaps_total for slot in slots))
        yield _counter("refused_versions", "Versions not loadable", sum(slot.refused_total for slot in slots))
        errors = sum(slot.registry_errors_total for slot in slots)
        yield _counter("registry_errors", "Failed looks at the registry", errors)


def _serving(counters: ServingCounters) -> Iterator[Metric]:
    yield _counter("requests", "Requests taken off the socket", counters.requests_total)
    yield _counter("answered_requests", "Requests answered with actions", counters.answered_total)
    yield _counter("rows", "Rows answered with actions", counters.rows_total)
    yield _counter("batches", "Forwards", counters.batches_total)
    yield _counter("expired_requests", "Requests past their deadline", counters.expired_total)
    yield _counter("shed_requests", "Requests refused for load", counters.shed_total)
    yield _counter("inference_seconds", "Time spent on batches", counters.inference_seconds)
    yield _labelled("request_errors", "Error replies by code", "code", dict(counters.errors))
    yield _histogram("request_seconds", "From socket to reply", counters.latency)
    yield _histogram("batch_rows", "Rows of a forward", counters.batch_rows)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(f"{PREFIX}_{name}", text, value=value)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{PREFIX}_{name}", text, value=float(value))


def _labelled(name: str, text: str, label: str, values: dict[str, int]) -> Metric:
    family = CounterMetricFamily(f"{PREFIX}_{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    bounds = [*map(str, histogram.bounds), "+Inf"]
    cumulated = accumulate(map(float, histogram.counts))
    buckets = list(zip(bounds, cumulated, strict=True))
    return HistogramMetricFamily(f"{PREFIX}_{name}", text, buckets=buckets, sum_value=histogram.total)
