"""The registry's HTTP routes on a running registry."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from relayrl_model_registry.service import ModelRegistry
from relayrl_shared.registry_client import RegistryClient
from relayrl_shared.testing.registry import opaque_artefact

POLICY = "run-1/agent_0"


@pytest.fixture
def http(registry: ModelRegistry, client: RegistryClient) -> httpx.Client:
    """An HTTP client of a registry that has three versions of a policy with a slash in its name."""
    for update in range(3):
        client.publish(opaque_artefact(policy=POLICY, learner_update=update, seed=update), fencing_token=1)
    return httpx.Client(base_url=registry.http.url)


def get(http: httpx.Client, path: str) -> Any:
    """The JSON of a successful GET."""
    response = http.get(path)
    assert response.status_code == 200, response.text
    return response.json()


def test_policies_show_their_newest_version_and_aliases(http: httpx.Client) -> None:
    """The list and the single view agree."""
    with http:
        (policy,) = get(http, "/v1/policies")["policies"]

        assert policy["policy"] == POLICY
        assert policy["newest_version"] == 3
        assert policy["aliases"] == {"latest": 3}
        assert get(http, f"/v1/policies/{POLICY}") == policy
        assert get(http, "/v1/policies/run-1%2Fagent_0") == policy


def test_versions_are_listed_and_shown_with_their_manifest(http: httpx.Client) -> None:
    """Lineage, digests and the manifest of each."""
    with http:
        versions = get(http, f"/v1/policies/{POLICY}/versions?limit=2")["versions"]
        version = get(http, f"/v1/policies/{POLICY}/versions/2")

    assert [item["policy_version"] for item in versions] == [3, 2]
    assert version["learner_update"] == 1
    assert version["manifest"]["policy_version"] == 2
    assert version["manifest"]["weights_digest"] == version["weights_digest"]
    assert version["collected_at"] is None


def test_alias_is_moved_with_a_reason_and_rolled_back(http: httpx.Client) -> None:
    """PUT moves it, GET shows where it points and the whole history."""
    path = f"/v1/policies/{POLICY}/aliases/production"
    with http:
        for version, reason in ((3, "release"), (1, "rolled back")):
            body = {"policy_version": version, "reason": reason, "moved_by": "ada"}
            response = http.put(path, json=body)
            assert response.status_code == 200
            assert response.json()["policy_version"] == version
        alias = get(http, path)
        aliases = get(http, f"/v1/policies/{POLICY}/aliases")["aliases"]

    assert alias["policy_version"] == 1
    moves = [(move["from_version"], move["to_version"], move["reason"]) for move in alias["history"]]
    assert moves == [(3, 1, "rolled back"), (None, 3, "release")]
    assert aliases == {"latest": 3, "production": 1}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/v1/policies/nobody", None, 404, "unknown_policy"),
        ("GET", f"/v1/policies/{POLICY}/versions/9", None, 404, "unknown_policy_version"),
        ("GET", f"/v1/policies/{POLICY}/versions/one", None, 422, "invalid_request"),
        ("GET", f"/v1/policies/{POLICY}/versions?limit=0", None, 422, "invalid_request"),
        ("GET", f"/v1/policies/{POLICY}/aliases/production", None, 404, "unknown_policy_version"),
        ("PUT", f"/v1/policies/{POLICY}/aliases/production", {"policy_version": 1}, 422, "invalid_request"),
        (
            "PUT",
            f"/v1/policies/{POLICY}/aliases/production",
            {"policy_version": 9, "reason": "why"},
            404,
            "unknown_policy_version",
        ),
        (
            "PUT",
            f"/v1/policies/{POLICY}/aliases/latest",
            {"policy_version": 1, "reason": "why"},
            422,
            "contract",
        ),
    ],
)
def test_bad_request_is_a_problem_detail(
    http: httpx.Client, method: str, path: str, body: dict[str, Any] | None, status: int, code: str
) -> None:
    """RFC 9457 with our code."""
    with http:
        response = http.request(method, path, json=body)

    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["code"] == code


def test_health_metrics_and_info(http: httpx.Client, registry: ModelRegistry) -> None:
    """The common routes say what this registry is doing."""
    with http:
        assert get(http, "/readyz") == {"ready": True, "checks": {"database": None, "model_server": None}}
        info = get(http, "/v1/info")
        metrics = http.get("/metrics").text

    assert info["service"] == "model-registry"
    assert info["model_server_port"] == registry.router.port
    assert "relayrl_model_registry_versions_published_total 3.0" in metrics
    assert 'relayrl_model_registry_requests_total{kind="publish"} 3.0' in metrics
