"""The control plane over a real HTTP server: the routes that every process has, and its errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter

from relayrl_shared import http_api
from relayrl_shared.errors import Overloaded, RelayRLError, SpecMismatch, UnknownPolicyVersion
from relayrl_shared.lifecycle import serve_http
from relayrl_shared.settings import HttpSettings


class Service:
    """State behind the callbacks."""

    def __init__(self) -> None:
        self.checks: dict[str, str | None] = {"store": None}
        self.draining = threading.Event()
        self.metrics = CollectorRegistry()
        Counter("relayrl_example_requests", "Requests.", registry=self.metrics).inc(3)


@pytest.fixture
def service() -> Service:
    """A ready service."""
    return Service()


@pytest.fixture
def http(service: Service) -> Iterator[httpx.Client]:
    """A client of the service's HTTP server."""
    app = http_api.create_app(
        "example",
        readiness=lambda: service.checks,
        info=lambda: {"runs": 2},
        metrics=service.metrics,
        drain=service.draining.set,
    )

    @app.get("/raise/{name}")
    def fail(name: str, rows: int = 1) -> None:
        """Raises by name."""
        raise {
            "spec": SpecMismatch("observation: shape (3,), expected (4,)"),
            "version": UnknownPolicyVersion("policy cartpole has no version 9"),
            "busy": Overloaded("queue is full", 2.0),
            "plain": RelayRLError("odd"),
            "bug": ZeroDivisionError("secret detail"),
        }[name]

    with serve_http(app, HttpSettings()) as server, httpx.Client(base_url=server.url) as client:
        yield client


def test_healthz_says_alive(http: httpx.Client) -> None:
    """Whatever the process waits for."""
    assert http.get("/healthz").json() == {"status": "alive"}


def test_readyz_says_item_by_item_what_it_waits_for(http: httpx.Client, service: Service) -> None:
    """200 when nothing is missing, 503 with the reasons else."""
    assert (http.get("/readyz").status_code, http.get("/readyz").json()["ready"]) == (200, True)

    service.checks["store"] = "connection refused by 127.0.0.1:5432"

    answer = http.get("/readyz")
    assert answer.status_code == 503
    assert answer.json() == {"ready": False, "checks": {"store": "connection refused by 127.0.0.1:5432"}}


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
def test_metrics_are_those_of_the_given_registry(http: httpx.Client, accept: str) -> None:
    """In the form that the scraper asks for."""
    answer = http.get("/metrics", headers={"accept": accept})

    assert "relayrl_example_requests_total 3.0" in answer.text
    assert ("openmetrics" in answer.headers["content-type"]) is bool(accept)


def test_info_names_service_and_version(http: httpx.Client) -> None:
    """And what the service adds."""
    assert http.get("/v1/info").json() == {"service": "example", "version": http_api.VERSION, "runs": 2}


def test_drain_calls_back_at_once(http: httpx.Client, service: Service) -> None:
    """202: it has begun."""
    assert http.post("/v1/drain").status_code == 202
    assert service.draining.is_set()


def test_the_log_level_changes_while_running(http: httpx.Client) -> None:
    """For all loggers or one; a wrong level is refused."""
    assert http.put("/v1/log-level", json={"level": "error"}).json() == {"level": "error"}
    assert http.get("/v1/log-level").json() == {"level": "error"}
    assert http.put("/v1/log-level", json={"level": "loud"}).status_code == 422


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [("spec", 422, "spec_mismatch"), ("version", 404, "unknown_policy_version"), ("busy", 503, "overloaded")],
)
def test_our_errors_are_problem_details(http: httpx.Client, name: str, status: int, code: str) -> None:
    """With a stable code and a status by class; a subclass has its parent's status unless it has its own."""
    answer = http.get(f"/raise/{name}")

    assert answer.headers["content-type"] == http_api.PROBLEM
    body = answer.json()
    assert (answer.status_code, body["status"], body["code"]) == (status, status, code)
    assert body["type"] == f"urn:relayrl:error:{code}"
    assert body["detail"]


def test_an_overloaded_answer_says_when_to_come_again(http: httpx.Client) -> None:
    """By the Retry-After header, in whole seconds."""
    assert http.get("/raise/busy").headers["retry-after"] == "2"


def test_an_error_without_a_status_of_its_own_is_ours(http: httpx.Client) -> None:
    """500 with its own words, since they are meant for the reader."""
    answer = http.get("/raise/plain")

    assert (answer.status_code, answer.json()["detail"]) == (500, "odd")


def test_an_unexpected_error_keeps_its_detail_in_the_log(
    http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    """The answer names no internals; the log has the exception."""
    answer = http.get("/raise/bug")

    assert (answer.status_code, answer.json()["code"]) == (500, "internal")
    assert "secret detail" not in answer.text
    assert "secret detail" in caplog.text


@pytest.mark.parametrize(("path", "status"), [("/nowhere", 404), ("/raise/spec?rows=x", 422)])
def test_wrong_requests_are_problem_details_too(http: httpx.Client, path: str, status: int) -> None:
    """Unknown paths and invalid parameters."""
    answer = http.get(path)

    assert (answer.status_code, answer.headers["content-type"]) == (status, http_api.PROBLEM)


def test_openapi_lists_the_common_routes(http: httpx.Client) -> None:
    """So that clients can be generated."""
    paths = http.get("/openapi.json").json()["paths"]

    assert {"/healthz", "/readyz", "/metrics", "/v1/info", "/v1/drain", "/v1/log-level"} <= set(paths)


def test_a_service_without_a_drain_says_so() -> None:
    """404 with the remedy."""
    app = http_api.create_app("plain", readiness=dict, info=dict, metrics=CollectorRegistry())

    with serve_http(app, HttpSettings()) as server:
        answer = httpx.post(f"{server.url}/v1/drain")

    assert (answer.status_code, answer.json()["detail"]) == (404, "plain has nothing to drain; stop it")
