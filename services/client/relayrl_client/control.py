"""The control plane of an embedded client: health, metrics and info; the runtime serves it where asked to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry

from relayrl_client.metrics import ClientMetrics
from relayrl_client.runtime import Runtime
from relayrl_shared.http_api import create_app
from relayrl_shared.lifecycle import HttpServer, serve_http
from relayrl_shared.settings import HttpSettings


@dataclass(frozen=True, slots=True)
class _Running:
    """A runtime as the metrics take it."""

    runtime: Runtime
    is_running: bool = True


def serve_control(runtime: Runtime, settings: HttpSettings) -> HttpServer:
    """Serves the control plane of a running client until it is closed.

    Raises:
        ConfigError: host and port cannot be bound.
    """
    metrics = CollectorRegistry()
    metrics.register(ClientMetrics(_Running(runtime)))
    app = create_app(
        "client", readiness=lambda: _readiness(runtime), info=lambda: _info(runtime), metrics=metrics
    )
    return serve_http(app, settings)


def _readiness(runtime: Runtime) -> Mapping[str, str | None]:
    checks: dict[str, str | None] = {"policy": None if runtime.inference.policy_version >= 0 else "none yet"}
    session, watcher = runtime.session, runtime.watcher
    if session is not None:
        failure = session.failure
        known = session.statistics().last_error or "it does not answer"
        checks["run"] = None if failure is None else str(failure)
        checks["training-server"] = None if session.is_up else known
    if watcher is not None:
        checks["model-registry"] = watcher.last_error
    return checks


def _info(runtime: Runtime) -> Mapping[str, Any]:
    plan, standing = runtime.plan, runtime.standing
    return {
        "client_id": standing.client_id,
        "run": plan.run.name,
        "run_id": standing.run_id,
        "policy": standing.policy,
        "policy_version": runtime.inference.policy_version,
        "learner_update": runtime.learner_update,
        "pacing": standing.pacing,
        "actor_inference_mode": plan.actor_inference_mode,
        "actor_training_data_mode": plan.actor_training_data_mode,
    }
