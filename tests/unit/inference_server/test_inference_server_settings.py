"""The inference server's settings: defaults and bounds."""

from __future__ import annotations

import pytest

from relayrl_inference_server.settings import ENVIRONMENT_PREFIX, InferenceServerSettings
from relayrl_shared.errors import ConfigError
from relayrl_shared.settings import load_settings


def load(**overrides: str) -> InferenceServerSettings:
    """Settings from the environment, with `__` between the parts of a key."""
    environment = {f"RELAYRL_INFERENCE_SERVER__{key.upper()}": value for key, value in overrides.items()}
    return load_settings(
        InferenceServerSettings, environment_prefix=ENVIRONMENT_PREFIX, environment=environment
    )


def test_defaults_are_the_ports_of_the_design() -> None:
    """Requests 7800, HTTP 8083, the registry's 50051 and 50052."""
    settings = InferenceServerSettings()

    assert settings.inference_server.zmq == "tcp://127.0.0.1:7800"
    assert settings.http.port == 8083
    assert (settings.model_server.port, settings.model_announcer.port) == (50051, 50052)


def test_policies_and_bounds_come_from_the_environment() -> None:
    """A list in JSON, numbers in nested keys."""
    settings = load(policies='["a", "b"]', batching__max_batch_rows="64", limits__max_policies="3")

    assert settings.policies == ("a", "b")
    assert settings.batching.max_batch_rows == 64
    assert settings.limits.max_policies == 3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("batching__max_batch_rows", "0"),
        ("workers", "2"),
        ("poll_seconds", "0"),
        ("batching__max_delay_ms", "-1"),
    ],
)
def test_values_out_of_range_are_refused_by_their_path(key: str, value: str) -> None:
    """The error names the key."""
    with pytest.raises(ConfigError, match=key.replace("__", ".")):
        load(**{key: value})
