"""The control plane that every process has: health, readiness, metrics, info, drain, log level.

A service's `app` module calls `create_app` and adds its own routes; `lifecycle.serve_http` serves it. Errors
are RFC 9457 problem details with the `code` of `relayrl_shared.errors`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from relayrl_shared import __version__, errors, logs
from relayrl_shared.settings import LogLevel

PROBLEM = "application/problem+json"
VERSION = __version__

LOG = logs.get_logger(__name__)

STATUS: Mapping[type[errors.RelayRLError], HTTPStatus] = {
    errors.UnknownActor: HTTPStatus.NOT_FOUND,
    errors.UnknownRun: HTTPStatus.NOT_FOUND,
    errors.UnknownPolicy: HTTPStatus.NOT_FOUND,
    errors.UnknownPolicyVersion: HTTPStatus.NOT_FOUND,
    errors.RunMismatch: HTTPStatus.CONFLICT,
    errors.DuplicateTrajectory: HTTPStatus.CONFLICT,
    errors.StaleFencingToken: HTTPStatus.CONFLICT,
    errors.DigestMismatch: HTTPStatus.CONFLICT,
    errors.RegistryError: HTTPStatus.CONFLICT,
    errors.StorageFull: HTTPStatus.INSUFFICIENT_STORAGE,
    errors.ContractError: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.ConfigError: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.Overloaded: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.StoreUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.PeerTimeout: HTTPStatus.GATEWAY_TIMEOUT,
    errors.TransportError: HTTPStatus.BAD_GATEWAY,
}
"""The status of an error; the most derived class that is listed counts, 500 where none is."""


class LogLevelChange(BaseModel):
    """What PUT /v1/log-level takes. `logger` None: all loggers."""

    level: LogLevel
    logger: str | None = None


def create_app(
    service: str,
    *,
    readiness: Callable[[], Mapping[str, str | None]],
    info: Callable[[], Mapping[str, Any]],
    metrics: CollectorRegistry,
    drain: Callable[[], None] | None = None,
) -> FastAPI:
    """An application with the common routes.

    Args:
        service: the word of the service, such as `training-server`.
        readiness: item → None when it is ready, else what it waits for; called from a worker thread.
        info: what GET /v1/info says beside service and version.
        metrics: what GET /metrics shows.
        drain: begins to drain and returns at once; None: POST /v1/drain answers 404.
    """
    app = FastAPI(title=f"RelayRL {service}", version=VERSION)
    install_error_handlers(app)
    _add_health(app, readiness)
    _add_metrics(app, metrics)
    _add_operation(app, service, info, drain)
    return app


def install_error_handlers(app: FastAPI) -> None:
    """Makes every error of `app` a problem detail."""

    @app.exception_handler(errors.RelayRLError)
    def relayrl_error(request: Request, error: errors.RelayRLError) -> Response:
        status = next(
            (STATUS[cls] for cls in type(error).__mro__ if cls in STATUS), HTTPStatus.INTERNAL_SERVER_ERROR
        )
        response = problem(status, str(error), code=error.code, retryable=error.retryable)
        if isinstance(error, errors.Overloaded):
            response.headers["retry-after"] = str(math.ceil(error.retry_after_seconds))
        return response

    @app.exception_handler(HTTPException)
    def http_error(request: Request, error: HTTPException) -> Response:
        return problem(HTTPStatus(error.status_code), str(error.detail), code="http")

    @app.exception_handler(RequestValidationError)
    def invalid_request(request: Request, error: RequestValidationError) -> Response:
        places = [f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()]
        return problem(HTTPStatus.UNPROCESSABLE_ENTITY, "; ".join(places), code="invalid_request")

    @app.exception_handler(Exception)
    def unexpected(request: Request, error: Exception) -> Response:
        LOG.error("request failed", method=request.method, path=request.url.path, exc_info=error)
        return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "see the log of this process", code="internal")


def problem(status: HTTPStatus, detail: str, *, code: str, **extensions: Any) -> Response:
    """A response of RFC 9457: `type`, `title`, `status`, `detail`, and our `code`."""
    content = {
        "type": f"urn:relayrl:error:{code}",
        "title": status.phrase,
        "status": int(status),
        "detail": detail,
    }
    return JSONResponse(content | {"code": code} | extensions, status_code=status, media_type=PROBLEM)


def _add_health(app: FastAPI, readiness: Callable[[], Mapping[str, str | None]]) -> None:
    @app.get("/healthz", tags=["health"])
    def healthz() -> dict[str, str]:
        """The process is alive."""
        return {"status": "alive"}

    @app.get("/readyz", tags=["health"])
    def readyz() -> Response:
        """Whether the process can do its work; `checks` says item by item what it waits for."""
        checks = dict(readiness())
        ready = all(reason is None for reason in checks.values())
        status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
        return JSONResponse({"ready": ready, "checks": checks}, status_code=status)


def _add_metrics(app: FastAPI, registry: CollectorRegistry) -> None:
    @app.get("/metrics", tags=["telemetry"], response_class=Response)
    def metrics(request: Request) -> Response:
        """Prometheus text or OpenMetrics, as the Accept header asks."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"content-type": content_type})


def _add_operation(
    app: FastAPI, service: str, info: Callable[[], Mapping[str, Any]], drain: Callable[[], None] | None
) -> None:
    @app.get("/v1/info", tags=["operation"])
    def get_info() -> dict[str, Any]:
        """What this process is and what it is doing."""
        return {"service": service, "version": VERSION, **info()}

    @app.post("/v1/drain", tags=["operation"], status_code=HTTPStatus.ACCEPTED)
    def post_drain() -> dict[str, str]:
        """Finishes what was taken, takes nothing new, then stops."""
        if drain is None:
            raise HTTPException(HTTPStatus.NOT_FOUND, f"{service} has nothing to drain; stop it")
        drain()
        return {"status": "draining"}

    @app.get("/v1/log-level", tags=["operation"])
    def get_log_level() -> dict[str, str]:
        """The least level that is logged."""
        return {"level": logs.get_level()}

    @app.put("/v1/log-level", tags=["operation"])
    def put_log_level(change: LogLevelChange) -> dict[str, str]:
        """Changes the level until the process ends."""
        logs.set_level(change.level, change.logger)
        return {"level": change.level}
