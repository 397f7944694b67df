"""The registry's HTTP application; `service` serves it beside the data plane."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from relayrl_model_registry.metrics import RegistryMetrics
from relayrl_model_registry.routes import create_router
from relayrl_shared.http_api import create_app

if TYPE_CHECKING:
    from relayrl_model_registry.service import ModelRegistry


def create_registry_app(registry: ModelRegistry, drain: Callable[[], None] | None) -> FastAPI:
    """The application of one registry; `drain` asks its process to stop."""
    metrics = CollectorRegistry()
    metrics.register(RegistryMetrics(registry))
    app = create_app(
        "model-registry",
        readiness=registry.readiness,
        info=lambda: _info(registry),
        metrics=metrics,
        drain=drain,
    )
    app.include_router(create_router(registry.catalog))
    return app


def _info(registry: ModelRegistry) -> Mapping[str, Any]:
    return {
        "model_server_port": registry.router.port,
        "model_announcer_port": registry.announcer_port,
        "policies": len(registry.catalog.policies()),
    }
