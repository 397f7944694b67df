"""The client runtime: acts in environments, records what happens and delivers it. Drive it by `AgentBuilder`.

The names are loaded when they are first used, so that importing the package stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relayrl_client.actors import EnvironmentHandle, Selection
    from relayrl_client.agent import Agent
    from relayrl_client.builder import AgentBuilder, AgentOptions
    from relayrl_client.coordinator import ActionResult
    from relayrl_client.environment_runner import EnvironmentRunner, EpisodeSummary, RunStatistics, evaluate
    from relayrl_client.settings import ClientSettings

__all__ = [
    "ActionResult",
    "Agent",
    "AgentBuilder",
    "AgentOptions",
    "ClientSettings",
    "EnvironmentHandle",
    "EnvironmentRunner",
    "EpisodeSummary",
    "RunStatistics",
    "Selection",
    "evaluate",
]

_HOMES = {
    "ActionResult": "coordinator",
    "Agent": "agent",
    "AgentBuilder": "builder",
    "AgentOptions": "builder",
    "ClientSettings": "settings",
    "EnvironmentHandle": "actors",
    "EnvironmentRunner": "environment_runner",
    "EpisodeSummary": "environment_runner",
    "RunStatistics": "environment_runner",
    "Selection": "actors",
    "evaluate": "environment_runner",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"relayrl_client has no {name}; it has {__all__}")
    return getattr(import_module(f"relayrl_client.{_HOMES[name]}"), name)
