"""The registry's Prometheus metrics, read from counters when somebody asks; driven by GET /metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector as PrometheusCollector

if TYPE_CHECKING:
    from relayrl_model_registry.service import ModelRegistry

PREFIX = "relayrl_model_registry"


class RegistryMetrics(PrometheusCollector):
    """Reads a registry's counters."""

    def __init__(self, registry: ModelRegistry) -> None:
        self._registry = registry

    def describe(self) -> Iterator[Metric]:
        """Nothing in advance: registering must not read the database."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """All metrics now."""
        registry = self._registry
        catalog = registry.catalog.statistics()
        yield _counter("versions_published", "Versions that became visible", catalog.published_total)
        yield _counter("publications_repeated", "Publications whose key was known", catalog.repeated_total)
        yield _counter("publications_refused", "Publications refused by a rule", catalog.refused_total)
        yield _counter("alias_moves", "Aliases moved by a person", catalog.alias_moves_total)
        yield _counter("announcements", "Announcements sent", registry.announcer.announced_total)
        yield _counter("announcements_failed", "Announcements lost here", registry.announcer.failed_total)
        yield _counter("collected_versions", "Versions given up", registry.collector.versions_total)
        yield _counter("collected_blobs", "Blobs removed", registry.collector.blobs_total)
        yield _counter("collection_errors", "Collections that failed", registry.collector.errors_total)
        yield from self._data_plane()

    def _data_plane(self) -> Iterator[Metric]:
        server, router = self._registry.model_server, self._registry.router.statistics()
        yield _labelled("requests", "Requests by kind", "kind", dict(server.requests))
        yield _labelled("request_errors", "Error replies by code", "code", dict(server.errors))
        yield _labelled("rejected_messages", "Messages that did not decode", "code", router.rejected_total)
        yield _counter("replies_undeliverable", "Replies to peers that had gone", router.undeliverable_total)
        yield _counter("handler_errors", "Exceptions out of the handler", router.handler_errors_total)
        serving = GaugeMetricFamily(f"{PREFIX}_serving", "1 while the model server serves")
        serving.add_metric([], float(self._registry.serving))
        yield serving


def _counter(name: str, text: str, value: int) -> Metric:
    return CounterMetricFamily(f"{PREFIX}_{name}", text, value=value)


def _labelled(name: str, text: str, label: str, values: dict[str, int]) -> Metric:
    family = CounterMetricFamily(f"{PREFIX}_{name}", text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
