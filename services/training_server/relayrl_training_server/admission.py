"""Which run a client may join: finds, creates or refuses it (contracts K3); driven by the agent listener.

A run has the specs and hyperparameters that its creator set. Only what a later hello sets explicitly is
compared with them, and a difference is refused by name.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from relayrl_shared.errors import ConfigError, InvalidTrajectory, RunMismatch, SpecMismatch, UnknownRun
from relayrl_shared.identifiers import new_id
from relayrl_shared.messages import RunRequest
from relayrl_shared.store.interface import Run, TrajectoryStore
from relayrl_shared.trajectory import RecordSchema
from relayrl_shared.validation import validate_schema
from relayrl_training_server.algorithms.configs import (
    canonical_name,
    complete_hyperparameters,
    differing_hyperparameters,
)
from relayrl_training_server.settings import ServerConfig

_RUN_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_MAX_SEED: Final = 2**63 - 1
_COMPARED: Final = ("observation_spec", "action_spec", "masked_leaves")
_COMPARED_WHERE_SET: Final = ("pacing", "max_policy_lag", "seed", "allow_nan")


def find_or_create_run(store: TrajectoryStore, request: RunRequest, config: ServerConfig) -> Run:
    """The run that a hello asks for.

    Raises:
        UnknownRun: it is absent and may not be created.
        ConfigError: its settings cannot be.
        SpecMismatch: its specs cannot be.
        RunMismatch: it exists, and the request says otherwise about something.
        StoreUnavailable: try again.
    """
    if not _RUN_NAME.fullmatch(request.name):
        raise ConfigError(
            f"run name {request.name[:100]!r}: use 1 to 100 of letters, digits, '_', '.', '-', "
            "beginning with a letter or digit"
        )
    run = store.run_by_name(request.name)
    if run is None:
        if not config.allow_new_runs:
            raise UnknownRun(
                f"there is no run {request.name!r} and this server creates none (allow_new_runs)"
            )
        run = store.create_run(new_run(request, config))
    compare(request, run)
    return run


def new_run(request: RunRequest, config: ServerConfig) -> Run:
    """The run that a request describes, with the server's defaults for what it leaves open.

    Raises:
        ConfigError, SpecMismatch: as `find_or_create_run`.
    """
    _check_specs(request)
    algorithm = canonical_name(request.algorithm or config.default_algorithm)
    hyperparameters = complete_hyperparameters(
        algorithm, {**_default_hyperparameters(config, algorithm), **request.hyperparameters}
    )
    seed = request.seed if request.seed is not None else int(hyperparameters.get("seed", 0))
    lag = request.max_policy_lag
    run = Run(
        run_id=new_id(),
        name=request.name,
        algorithm=algorithm,
        hyperparameters=hyperparameters,
        observation_spec=request.observation_spec,
        action_spec=request.action_spec,
        masked_leaves=request.masked_leaves,
        pacing=request.pacing or config.default_pacing,
        max_policy_lag=config.default_max_policy_lag if lag is None else lag,
        seed=seed,
        allow_nan=bool(request.allow_nan),
    )
    _check_run(run)
    return run


def _default_hyperparameters(config: ServerConfig, algorithm: str) -> dict[str, Any]:
    """What the server's configuration says for the algorithm, whose name may stand there in any case."""
    defaults: dict[str, Any] = {}
    for name, values in config.default_hyperparameters.items():
        if name.upper() == algorithm:
            defaults |= values
    return defaults


def _check_specs(request: RunRequest) -> None:
    if not request.action_spec.leaves:
        raise SpecMismatch("the action spec has no leaves: there is nothing to learn")
    schema = RecordSchema(
        observation=request.observation_spec,
        action=request.action_spec,
        masked_leaves=request.masked_leaves,
    )
    try:
        validate_schema(schema)
    except InvalidTrajectory as error:
        raise SpecMismatch(str(error)) from error


def _check_run(run: Run) -> None:
    """Refuses settings that cannot be; hyperparameters were checked when they were completed."""
    if run.max_policy_lag < 0:
        raise ConfigError(f"max_policy_lag: {run.max_policy_lag} is below 0; 0 is lockstep, 1 the default")
    if not 0 <= run.seed <= _MAX_SEED:
        raise ConfigError(f"seed: {run.seed} is outside 0 … 2**63 - 1")


def compare(request: RunRequest, run: Run) -> None:
    """Compares what the request sets with the run.

    Raises:
        RunMismatch: names the first field that differs, and both values.
    """
    if request.algorithm is not None and canonical_name(request.algorithm) != run.algorithm:
        raise _mismatch(run, "algorithm", request.algorithm, run.algorithm)
    for field in _COMPARED:
        _compare_field(request, run, field)
    for field in _COMPARED_WHERE_SET:
        if getattr(request, field) is not None:
            _compare_field(request, run, field)
    different = differing_hyperparameters(run.algorithm, request.hyperparameters, run.hyperparameters)
    for name, (given, stored) in different.items():
        raise _mismatch(run, f"hyperparameters.{name}", given, stored)


def _compare_field(request: RunRequest, run: Run, field: str) -> None:
    given, stored = getattr(request, field), getattr(run, field)
    if given != stored:
        raise _mismatch(run, field, given, stored)


def _mismatch(run: Run, field: str, given: object, stored: object) -> RunMismatch:
    return RunMismatch(
        f"{field}: the hello says {_shown(given)}, run {run.name!r} was created with {_shown(stored)}; "
        "leave it out, or take another run name"
    )


def _shown(value: object) -> str:
    if isinstance(value, msgspec.Struct):
        return msgspec.json.encode(value).decode()[:500]
    return repr(value)[:500]
