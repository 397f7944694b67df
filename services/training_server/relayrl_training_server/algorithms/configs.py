"""Hyperparameters of the algorithms: names, defaults, ranges, and what each algorithm needs of the data.

Ingest completes and compares hyperparameters with it when a run is created, the learner builds its algorithm
from it, the command line lists it. It imports no torch, so that none of them has to.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from relayrl_shared.errors import ConfigError

Schedule = Literal["constant", "linear"]
Activation = Literal["tanh", "relu"]


@dataclass(frozen=True)
class Range:
    """The values that a number may have; `open_low` and `open_high` leave the bound itself out."""

    low: float
    high: float = float("inf")
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """Whether the value lies inside; NaN does not."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


POSITIVE = Range(0.0, float("inf"), open_low=True, open_high=True)
NOT_NEGATIVE = Range(0.0, float("inf"), open_high=True)
UNIT = Range(0.0, 1.0)
AT_LEAST_ONE = Range(1.0, open_high=True)

_RANGES: dict[str, Range] = {
    "gamma": UNIT,
    "lam": UNIT,
    "pi_lr": POSITIVE,
    "vf_lr": POSITIVE,
    "train_pi_iters": AT_LEAST_ONE,
    "train_vf_iters": NOT_NEGATIVE,
    "traj_per_epoch": AT_LEAST_ONE,
    "rollout_steps": Range(2.0, open_high=True),  # 1 could hold nothing but a reset tick
    "min_steps_per_epoch": AT_LEAST_ONE,
    "minibatch": AT_LEAST_ONE,
    "clip_ratio": Range(0.0, 1.0, open_low=True, open_high=True),
    "target_kl": POSITIVE,
    "ent_coef": NOT_NEGATIVE,
    "vf_coef": NOT_NEGATIVE,
    "max_grad_norm": POSITIVE,
    "adam_eps": POSITIVE,
    "total_steps": AT_LEAST_ONE,
    "seed": Range(0, 2**63 - 1),
    "log_std_init": Range(-20.0, 2.0),
    "max_segment_steps": AT_LEAST_ONE,
    "collection_timeout_seconds": POSITIVE,
    "episode_timeout_seconds": POSITIVE,
    "checkpoint_retention": Range(2, open_high=True),
}


class AlgorithmConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What every algorithm has. Times are in seconds, steps are environment steps of one actor.

    gamma: discount a step. lam: λ of the advantage estimate. pi_lr, vf_lr: Adam's learning rates of the
    policy's and the value network's parameters. seed: of the run, where its creator sets none.
    lr_schedule: `linear` goes to 0 over `total_steps` steps that were learned from. normalize_obs:
    running mean and variance, part of the policy. normalize_returns: rewards are scaled by the running
    deviation of the returns, in the learner only. squash: tanh for bounded continuous actions instead of
    clipping. max_segment_steps: where a client cuts long episodes when batches are whole episodes.
    collection_timeout_seconds: how long a batch waits for a silent actor (policy lag above 0).
    episode_timeout_seconds: how long a batch waits for the missing part of an episode.
    checkpoint_retention: how many checkpoints are kept.
    """

    gamma: float = 0.99
    lam: float = 0.97
    pi_lr: float = 3e-4
    vf_lr: float = 1e-3
    train_vf_iters: int = 80
    traj_per_epoch: int = 8
    seed: int = 1
    ent_coef: float = 0.0
    normalize_obs: bool = False
    normalize_returns: bool = False
    max_grad_norm: float | None = 0.5
    adam_eps: float = 1e-5
    lr_schedule: Schedule = "constant"
    total_steps: int | None = None
    hidden_sizes: tuple[int, ...] = (64, 64)
    activation: Activation = "tanh"
    log_std_init: float = 0.0
    squash: bool = False
    max_segment_steps: int = 1024
    collection_timeout_seconds: float = 30.0
    episode_timeout_seconds: float = 300.0
    checkpoint_retention: int = 5

    def __post_init__(self) -> None:
        for name, allowed in _RANGES.items():
            value = getattr(self, name, None)
            if value is not None and not allowed.holds(value):
                raise ConfigError(f"hyperparameters.{name}: {value!r} is outside {allowed}")
        if not all(1 <= size <= 65_536 for size in self.hidden_sizes) or len(self.hidden_sizes) > 16:
            raise ConfigError("hyperparameters.hidden_sizes: at most 16 sizes, each in [1, 65536]")
        if "linear" in self.schedules() and self.total_steps is None:
            raise ConfigError("hyperparameters.total_steps: a linear schedule needs it; set the run's steps")

    def schedules(self) -> tuple[Schedule, ...]:
        """Every schedule that the config has."""
        return (self.lr_schedule,)


class PPOConfig(AlgorithmConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Proximal policy optimisation with a clipped surrogate.

    rollout_steps: ticks of an environment instance in a batch; null: a batch is `traj_per_epoch` whole
    episodes. min_steps_per_epoch: steps of a batch under free pacing; null: rollout_steps x live actors.
    train_pi_iters, train_vf_iters: epochs over the batch in which the policy and the value loss take
    part, jointly where both do. target_kl: the policy's epochs end at 1.5 x this estimate; null: never.
    minibatch: rows of a gradient step; null: the whole batch. normalize_advantage: over each minibatch,
    the batch, or not at all. clip_schedule: `linear` lets clip_ratio go to 0 over total_steps.
    """

    rollout_steps: int | None = 128
    min_steps_per_epoch: int | None = None
    clip_ratio: float = 0.2
    clip_schedule: Schedule = "constant"
    train_pi_iters: int = 80
    target_kl: float | None = 0.01
    vf_coef: float = 0.5
    minibatch: int | None = None
    normalize_advantage: Literal["minibatch", "batch", "none"] = "minibatch"

    def schedules(self) -> tuple[Schedule, ...]:
        """Every schedule that the config has."""
        return (self.lr_schedule, self.clip_schedule)


class REINFORCEConfig(AlgorithmConfig, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """REINFORCE, one policy step a batch of `traj_per_epoch` whole episodes.

    with_vf_baseline: advantages by GAE against a value network trained for `train_vf_iters` steps a
    batch; without it the returns are standardised over the batch.
    """

    gamma: float = 0.98
    max_grad_norm: float | None = None
    with_vf_baseline: bool = False
    normalize_advantage: Literal["batch", "none"] = "batch"


ALGORITHMS: dict[str, type[AlgorithmConfig]] = {"PPO": PPOConfig, "REINFORCE": REINFORCEConfig}
"""The algorithms by their canonical names."""


@dataclass(frozen=True)
class AlgorithmNeeds:
    """What an algorithm asks of its data (contracts B2, B5, F1, F3).

    rollout_steps: the ticks of a rollout, None where batches are whole episodes.
    """

    behaviour_log_prob: bool
    whole_episodes: bool
    rollout_steps: int | None
    max_segment_steps: int
    evaluation: bool = False


def canonical_name(algorithm: str) -> str:
    """The name as `ALGORITHMS` has it, whatever the case.

    Raises:
        ConfigError: no such algorithm; the message names the nearest and all there are.
    """
    if algorithm.upper() in ALGORITHMS:
        return algorithm.upper()
    raise ConfigError(f"algorithm: {algorithm!r} is unknown{_nearest(algorithm.upper(), list(ALGORITHMS))}")


def build_config(algorithm: str, hyperparameters: Mapping[str, Any]) -> AlgorithmConfig:
    """The config of the algorithm, with defaults where nothing is given.

    Raises:
        ConfigError: an unknown algorithm or key (with the nearest), a wrong type, a value out of range.
    """
    name = canonical_name(algorithm)
    known = ALGORITHMS[name].__struct_fields__
    for key in hyperparameters:
        if key not in known:
            raise ConfigError(_unknown_key(name, key, known))
    try:
        return msgspec.convert(dict(hyperparameters), ALGORITHMS[name])
    except msgspec.ValidationError as error:
        raise ConfigError(f"hyperparameters: {error}") from error


def complete_hyperparameters(algorithm: str, explicit: Mapping[str, Any]) -> dict[str, Any]:
    """All hyperparameters, as plain JSON values: what is explicit, and defaults for the rest.

    Raises:
        ConfigError: as `build_config`.
    """
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(build_config(algorithm, explicit)))
    return plain


def differing_hyperparameters(
    algorithm: str, explicit: Mapping[str, Any], stored: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """What an explicit setting says otherwise than a run's stored hyperparameters: name → (given, stored).

    Raises:
        ConfigError: as `build_config`, for the explicit ones laid over the stored ones.
    """
    given = complete_hyperparameters(algorithm, {**stored, **explicit})
    return {key: (given[key], stored.get(key)) for key in explicit if given[key] != stored.get(key)}


def needs(algorithm: str, hyperparameters: Mapping[str, Any]) -> AlgorithmNeeds:
    """What the algorithm with these hyperparameters asks of its data.

    Raises:
        ConfigError: as `build_config`.
    """
    config = build_config(algorithm, hyperparameters)
    rollout_steps = config.rollout_steps if isinstance(config, PPOConfig) else None
    return AlgorithmNeeds(
        behaviour_log_prob=isinstance(config, PPOConfig),
        whole_episodes=rollout_steps is None,
        rollout_steps=rollout_steps,
        max_segment_steps=rollout_steps or config.max_segment_steps,
    )


def _nearest(key: str, known: list[str] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return (f"; did you mean {close[0]!r}?" if close else "") + f" Known: {', '.join(sorted(known))}"


def _unknown_key(algorithm: str, key: str, known: tuple[str, ...]) -> str:
    if algorithm == "REINFORCE" and key == "rollout_steps":
        return "hyperparameters.rollout_steps: REINFORCE needs whole episodes; set traj_per_epoch instead"
    return f"hyperparameters.{key}: {algorithm} has no such hyperparameter{_nearest(key, known)}"
