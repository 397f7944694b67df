"""The metrics of the supervisor: how its children do, read when they are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from relayrl_training_server.children import ChildStatus

_PREFIX = "relayrl_training_server_supervisor"


def watch_children(registry: CollectorRegistry, statuses: Callable[[], Mapping[str, ChildStatus]]) -> None:
    """Shows the children by kind (`ingest`, `learner`) and state."""
    registry.register(_Children(statuses))


class _Children(Collector):
    def __init__(self, statuses: Callable[[], Mapping[str, ChildStatus]]) -> None:
        self._statuses = statuses

    def collect(self) -> Iterable[Metric]:
        states: Counter[tuple[str, str]] = Counter()
        deaths: Counter[str] = Counter()
        for name, child in self._statuses().items():
            kind = name.split(" ")[0]
            states[kind, child.state] += 1
            deaths[kind] += child.deaths_total
        gauge = GaugeMetricFamily(f"{_PREFIX}_children", "Children by state.", labels=["kind", "state"])
        for (kind, state), count in states.items():
            gauge.add_metric([kind, state], count)
        yield gauge
        counter = CounterMetricFamily(
            f"{_PREFIX}_child_deaths_total", "Children that ended unasked.", labels=["kind"]
        )
        for kind, count in deaths.items():
            counter.add_metric([kind], count)
        yield counter
