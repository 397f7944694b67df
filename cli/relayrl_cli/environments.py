"""The environments that the command line trains and tests in: Gymnasium's, several stepped together."""

from __future__ import annotations

from typing import Any

import gymnasium
from gymnasium.vector import VectorEnv

from relayrl_shared.errors import ConfigError


def make_environment(name: str, count: int) -> VectorEnv[Any, Any, Any]:
    """`count` environments in one vector, stepped in this process.

    Raises:
        ConfigError: Gymnasium has no such environment, or cannot make it.
    """
    try:
        return gymnasium.make_vec(name, num_envs=count, vectorization_mode="sync")
    except gymnasium.error.Error as error:
        raise ConfigError(f"environment {name!r}: {error}") from error
