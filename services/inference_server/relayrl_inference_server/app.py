"""The inference server's HTTP application, which reads snapshots only; `service` serves it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from relayrl_inference_server.metrics import InferenceMetrics
from relayrl_shared.http_api import create_app

if TYPE_CHECKING:
    from relayrl_inference_server.service import InferenceService


def create_inference_app(service: InferenceService, drain: Callable[[], None] | None) -> FastAPI:
    """The application of one server; `drain` asks its process to stop."""
    metrics = CollectorRegistry()
    metrics.register(InferenceMetrics(service))
    app = create_app(
        "inference-server",
        readiness=service.readiness,
        info=lambda: _info(service),
        metrics=metrics,
        drain=drain,
    )

    @app.get("/v1/policies", tags=["policies"])
    def list_policies() -> dict[str, Any]:
        """What is loaded: aliases that are followed and versions pinned by number."""
        return {"policies": [asdict(status) for status in service.pool.status()]}

    return app


def _info(service: InferenceService) -> Mapping[str, Any]:
    counters = service.server.counters()
    return {
        "inference_server_port": service.router.port,
        "draining": service.server.draining,
        "requests_total": counters.requests_total,
        "rows_total": counters.rows_total,
        "queued_requests": service.server.queued_requests,
    }
