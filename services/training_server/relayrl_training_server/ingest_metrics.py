"""The metrics of ingest: made once, counted by intake, listener and committer, shown at /metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from relayrl_shared.sockets import RouterServer, RouterStatistics

_PREFIX = "relayrl_training_server_ingest"
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class IngestMetrics:
    """One attribute a metric; labels take few values."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.trajectories = Counter(
            f"{_PREFIX}_trajectories_total",
            "Answered trajectories: stored, known (sent again), quarantined, refused (to be sent again).",
            ["outcome"],
            registry=registry,
        )
        self.refusals = Counter(
            f"{_PREFIX}_refusals_total", "Nacks by reason.", ["reason", "retryable"], registry=registry
        )
        self.steps = Counter(f"{_PREFIX}_steps_total", "Steps in stored trajectories.", registry=registry)
        self.bytes = Counter(
            f"{_PREFIX}_bytes_total", "Payload bytes of stored trajectories.", registry=registry
        )
        self.garbage_unkept = Counter(
            f"{_PREFIX}_garbage_unkept_total",
            "Messages that did not parse and came too fast to be kept in quarantine.",
            registry=registry,
        )
        self.clients = Counter(
            f"{_PREFIX}_client_messages_total",
            "Hellos, heartbeats, actor changes and goodbyes, by outcome (ok or the error's code).",
            ["kind", "outcome"],
            registry=registry,
        )
        self.expired = Counter(
            f"{_PREFIX}_expired_clients_total", "Clients that left by being silent.", registry=registry
        )
        self.commit_seconds = Histogram(
            f"{_PREFIX}_commit_seconds", "Time of a group commit.", buckets=_SECONDS, registry=registry
        )
        self.commit_rows = Histogram(
            f"{_PREFIX}_commit_rows", "Rows in a group commit.", buckets=_ROWS, registry=registry
        )

    def watch_queue(self, queued: Callable[[], int]) -> None:
        """Shows how many trajectories wait for their commit."""
        gauge = Gauge(f"{_PREFIX}_queued_trajectories", "Waiting for their commit.", registry=self.registry)
        gauge.set_function(lambda: float(queued()))

    def watch_sockets(self, sockets: dict[str, RouterServer]) -> None:
        """Shows the counters of the sockets."""
        self.registry.register(_SocketCollector(sockets))


class _SocketCollector(Collector):
    """Reads the statistics of the sockets when it is asked."""

    def __init__(self, sockets: dict[str, RouterServer]) -> None:
        self._sockets = sockets

    def collect(self) -> Iterable[Metric]:
        statistics = {name: socket.statistics() for name, socket in self._sockets.items()}
        yield _rejected(statistics)
        for field, text in {
            "received_total": "Messages that parsed.",
            "replies_total": "Answers sent.",
            "undeliverable_total": "Answers to peers that had gone.",
            "dropped_total": "Answers that found a full queue.",
            "handler_errors_total": "Exceptions out of a handler.",
        }.items():
            family = CounterMetricFamily(f"{_PREFIX}_socket_{field}", text, labels=["socket"])
            for name, values in statistics.items():
                family.add_metric([name], getattr(values, field))
            yield family


def _rejected(statistics: dict[str, RouterStatistics]) -> Metric:
    family = CounterMetricFamily(
        f"{_PREFIX}_socket_rejected_total", "Messages that did not parse.", labels=["socket", "code"]
    )
    for name, values in statistics.items():
        for code, count in values.rejected_total.items():
            family.add_metric([name, code], count)
    return family
