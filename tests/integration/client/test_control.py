"""The control plane and the traces of an embedded client."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from relayrl_client.agent import Agent
from relayrl_client.builder import AgentBuilder
from relayrl_client.testing import CountingEnvironment
from relayrl_shared import telemetry
from relayrl_shared.errors import UnknownRun
from relayrl_shared.settings import TelemetrySettings, load_settings
from relayrl_shared.spaces import ActionSpec, ObservationSpec
from relayrl_shared.testing.otlp import Receiver
from relayrl_shared.testing.policies import make_artefact
from relayrl_training_server.ingest import Ingest
from relayrl_training_server.settings import TrainingServerSettings

TinyServer = Any  # of conftest, which cannot be imported
OpenAgent = Callable[..., Agent]

SEEN = np.zeros((2, 3), np.float32)


def get(agent: Agent, path: str) -> tuple[int, str]:
    """Status and body of a GET at the agent's control plane."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{agent.runtime.http_port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_control_plane_is_off_unless_it_is_switched_on(
    server: TinyServer, online_agent: OpenAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`http.enabled` of the environment serves health, metrics and info."""
    with online_agent() as agent:
        assert agent.runtime.http_port is None
    monkeypatch.setenv("RELAYRL_CLIENT__CLIENT_CONFIG__HTTP__ENABLED", "true")
    monkeypatch.setenv("RELAYRL_CLIENT__CLIENT_CONFIG__HTTP__PORT", "0")
    with online_agent() as agent:
        agent.request_action(agent.get_actor_ids(), SEEN)
        assert get(agent, "/healthz")[0] == 200
        assert "relayrl_client_requests_total 1.0" in get(agent, "/metrics")[1]
        info = json.loads(get(agent, "/v1/info")[1])
        assert (info["service"], info["run"], info["policy_version"]) == ("client", "tiny", 1)
        server.wait(lambda: get_ready(agent) == 200)
        server.heartbeat_failure = UnknownRun("there is no such run")
        server.wait(lambda: get_ready(agent) == 503)
        assert json.loads(get(agent, "/readyz")[1])["checks"]["run"] == "there is no such run"


def get_ready(agent: Agent) -> int:
    return get(agent, "/readyz")[0]


def test_one_trace_goes_from_the_client_into_ingest(
    server: TinyServer, online_agent: OpenAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The span that closes a segment is the parent of its validation, and its commit links to it."""
    receiver = Receiver()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{receiver.port}")
    server.versions[:] = [
        make_artefact(
            ObservationSpec.from_gymnasium(CountingEnvironment.observation_space),
            ActionSpec.from_gymnasium(CountingEnvironment.action_space),
            policy="tiny",
            policy_version=1,
        )
    ]
    stop = threading.Event()
    with Ingest(ingest_settings(tmp_path)) as ingest:
        thread = threading.Thread(target=ingest.run, args=(stop,))
        thread.start()
        try:
            addresses = {
                "agent_listener_address": f"127.0.0.1:{ingest.agent_listener.port}",
                "trajectory_server_address": f"127.0.0.1:{ingest.trajectory_server.port}",
            }
            with online_agent(algorithm="PPO", pacing="free", **addresses) as agent:
                ids = agent.get_actor_ids()
                agent.request_action(ids, SEEN)
                agent.end_episode(ids, 1.0, terminated=True)
                agent.flush(10.0)
                assert agent.runtime.delivery.drain(10.0)
        finally:
            stop.set()
            thread.join()
    spans = receiver.spans()
    receiver.stop()

    closed, validated, committed = (
        spans[name] for name in ("client.close_segments", "ingest.validate", "ingest.commit")
    )
    assert (validated.trace_id, validated.parent_span_id) == (closed.trace_id, closed.span_id)
    assert {link.trace_id for link in committed.links} == {closed.trace_id}


def ingest_settings(directory: Path) -> TrainingServerSettings:
    """An ingest on free ports, without HTTP."""
    addresses = "transport_config.zmq_addresses.training_addresses"
    values = {
        "training_server_config.directory": str(directory / "server"),
        "training_server_config.ingest.http.enabled": "false",
        f"{addresses}.agent_listener_address.port": "0",
        f"{addresses}.trajectory_server_address.port": "0",
    }
    return load_settings(TrainingServerSettings, environment_prefix="NONE", overrides=values)


def test_a_request_carries_the_trace_of_its_caller(server: TinyServer, online_agent: OpenAgent) -> None:
    """Whatever is asked inside a span says so in its header, such as a request for actions."""
    receiver = Receiver()
    tracing = TelemetrySettings(otlp_endpoint=f"http://127.0.0.1:{receiver.port}")
    handle = telemetry.configure("application", tracing)
    with online_agent(actor_inference_mode="server") as agent:
        before = len(server.traceparents)
        with telemetry.tracer(__name__).span("application.step"):
            caller = telemetry.inject()
            agent.request_action(agent.get_actor_ids(), SEEN)
    handle.close()
    receiver.stop()
    assert caller is not None
    assert caller in server.traceparents[before:]


def test_an_endpoint_without_opentelemetry_is_no_reason_to_fail(
    online_agent: OpenAgent, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The variable may be meant for others in the application's surroundings."""
    monkeypatch.setitem(__import__("sys").modules, "relayrl_shared.telemetry_otlp", None)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    with online_agent() as agent:
        assert agent.is_running
    assert "no traces are sent" in caplog.text


def test_the_environment_is_between_the_file_and_the_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Precedence is option, environment, file (design of the configuration)."""
    file = tmp_path / "client_config.json"
    file.write_bytes(msgspec.json.encode({"client_config": {"actor_count": 1, "run": {"name": "file"}}}))
    monkeypatch.setenv("RELAYRL_CLIENT__CLIENT_CONFIG__ACTOR_COUNT", "2")
    monkeypatch.setenv("RELAYRL_CLIENT__CLIENT_CONFIG__RUN__NAME", "environment")
    builder = AgentBuilder(environment=CountingEnvironment(), config_path=file, run_name="option")
    plan = builder.build().plan
    assert (plan.actor_count, plan.run.name) == (2, "option")
