"""Named settings for learning an environment; demo, tests and benchmarks train with the same ones.

A preset is a JSON file beside this module: `names()` lists them, `load(name)` reads one.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import msgspec

from relayrl_shared.errors import ConfigError
from relayrl_shared.messages import Pacing


class Preset(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What to train and how.

    actors: environments that one client steps together. target_return: mean return of the last 100 training
    episodes at which the environment counts as learned. steps: environment steps of all actors at which
    training ends at the latest.
    """

    environment: str
    algorithm: str
    actors: int
    pacing: Pacing = "block"
    max_policy_lag: int = 1
    seed: int = 1
    steps: int
    target_return: float | None = None
    hyperparameters: dict[str, Any] = {}


def names() -> list[str]:
    """The presets that there are."""
    files = resources.files(__name__).iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def load(name: str) -> Preset:
    """A preset by name. Raises ConfigError if there is none of that name, listing those that there are."""
    file = resources.files(__name__) / f"{name}.json"
    if not file.is_file():
        raise ConfigError(f"no preset {name!r}; there are: {', '.join(names())}")
    try:
        return msgspec.json.decode(file.read_bytes(), type=Preset)
    except msgspec.ValidationError as error:
        raise ConfigError(f"preset {name}: {error}") from error
