"""What to train: the preset and the options of the command line, put together once.

`commands.train` and `commands.demo` make a `TrainingPlan` and hand it to `train.TrainingSession`.
"""

from __future__ import annotations

import argparse
import re
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from relayrl_cli import presets
from relayrl_shared.errors import ConfigError
from relayrl_shared.messages import Pacing

InferenceMode = Literal["local", "server"]

DEFAULT_ACTORS = 8


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """A run and when its training ends.

    hyperparameters holds what is set explicitly; the run keeps the defaults of its creation for the rest.
    seed, pacing and max_policy_lag None: the server's choice, or the run's where it exists. steps None: until
    told to stop.
    """

    run: str
    environment: str
    algorithm: str
    actors: int
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    pacing: Pacing | None = None
    max_policy_lag: int | None = None
    seed: int | None = None
    steps: int | None = None
    target_return: float | None = None
    allow_nan: bool | None = None
    inference: InferenceMode = "local"


def plan_from_preset(
    preset: presets.Preset, run: str, *, steps: int | None = None, seed: int | None = None
) -> TrainingPlan:
    """The preset's run; its step limit can be lowered or raised without touching its schedules."""
    return TrainingPlan(
        run=run,
        environment=preset.environment,
        algorithm=preset.algorithm,
        actors=preset.actors,
        hyperparameters=preset.hyperparameters,
        pacing=preset.pacing,
        max_policy_lag=preset.max_policy_lag,
        seed=preset.seed if seed is None else seed,
        steps=preset.steps if steps is None else steps,
        target_return=preset.target_return,
    )


def plan_from_arguments(arguments: argparse.Namespace) -> TrainingPlan:
    """The plan of `relayrl train`: options over the preset.

    Raises:
        ConfigError: if environment or algorithm is named nowhere, or a value is wrong.
    """
    base = _base(arguments)
    options = {
        name: getattr(arguments, name)
        for name in ("actors", "steps", "target_return", "seed", "pacing", "max_policy_lag", "inference")
        if getattr(arguments, name) is not None
    }
    if arguments.allow_nan:
        options["allow_nan"] = True
    hyperparameters = base.hyperparameters | parse_hyperparameters(arguments.overrides)
    plan = _replace(base, **options, hyperparameters=hyperparameters)
    if plan.actors < 1:
        raise ConfigError(f"--actors {plan.actors}: at least 1")
    return _replace(plan, run=arguments.run or run_name(plan.environment, plan.algorithm))


def _base(arguments: argparse.Namespace) -> TrainingPlan:
    preset = presets.load(arguments.preset) if arguments.preset else None
    plan = plan_from_preset(preset, run="") if preset else None
    environment = arguments.environment or (plan.environment if plan else None)
    algorithm = arguments.algorithm or (plan.algorithm if plan else None)
    if environment is None or algorithm is None:
        raise ConfigError(
            "say what to train: --env and --algorithm, or --preset with one of " + ", ".join(presets.names())
        )
    if plan is None:
        return TrainingPlan(run="", environment=environment, algorithm=algorithm, actors=DEFAULT_ACTORS)
    return _replace(plan, environment=environment, algorithm=algorithm)


def _replace(plan: TrainingPlan, **changes: Any) -> TrainingPlan:
    fields = {name: getattr(plan, name) for name in TrainingPlan.__dataclass_fields__}
    return TrainingPlan(**(fields | changes))


def parse_hyperparameters(pairs: list[str]) -> dict[str, Any]:
    """`["pi_lr=3e-4", "activation=tanh"]` → values: JSON where a text reads as such, else the text.

    Raises:
        ConfigError: for a pair without `=`.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {pair}: write NAME=VALUE, such as pi_lr=3e-4")
        values[name] = _value(text)
    return values


def _value(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def run_name(environment: str, algorithm: str) -> str:
    """A name for a new run: what and when, such as `cartpole-v1-ppo-20260131-175959`."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{environment}-{algorithm}".lower()).strip("-")
    return f"{slug}-{time.strftime('%Y%m%d-%H%M%S')}"
