"""`AgentBuilder`: options and the configuration file become a checked plan, and the plan an `Agent`.

    agent = AgentBuilder(
        actor_count=8,
        environment=env,                       # or observation_space=…, action_space=…
        actor_training_data_mode="online",
        run_name="cartpole",
        algorithm="PPO",
    ).build()

Precedence: options > environment (`RELAYRL_CLIENT__…`) > `config_path` > defaults. A combination that makes
no sense is refused by `build`, with the reason.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import msgspec

from relayrl_client.agent import Agent
from relayrl_client.delivery import OnAcceptedIds, RoutedDelivery, open_delivery
from relayrl_client.runtime import OpenDelivery, Plan, Standing
from relayrl_client.settings import (
    ENVIRONMENT_PREFIX,
    ActorInferenceMode,
    ActorTrainingDataMode,
    ClientSection,
    ClientSettings,
    TransportSection,
)
from relayrl_shared.errors import ConfigError
from relayrl_shared.identifiers import new_id
from relayrl_shared.messages import Pacing, RunRequest
from relayrl_shared.policy.artefact import load_artefact
from relayrl_shared.policy.manifest import PolicyArtefact
from relayrl_shared.settings import Address, load_settings
from relayrl_shared.spaces import ActionSpec, ObservationSpec
from relayrl_shared.trajectory import RecordSchema

DEFAULT_CONFIG_PATH = "client_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentOptions:
    """What a builder was told; None leaves it to the configuration file or its default.

    environment: a Gymnasium environment (vector or single) to take the spaces from. observation_space,
    action_space: Gymnasium spaces or specs, in its place. masked_leaves: action leaves that are recorded with
    their masks; True: all that can be masked. aux: name → numpy dtype of own columns of a step.
    default_model: a policy artefact, or the directory of one. hyperparameters: of the run, by the algorithm's
    names; only what is set here is sent. policy: what the inference server is asked for without a run.
    on_accepted: gets the ids of trajectories once they are safe on this machine's disk, from a thread.
    """

    actor_count: int | None = None
    router_scale: int | None = None
    default_model: PolicyArtefact | Path | str | None = None
    config_path: Path | str | None = None
    actor_inference_mode: ActorInferenceMode | None = None
    actor_training_data_mode: ActorTrainingDataMode | None = None
    router_buffer_size_per_actor: int | None = None
    environment: Any = None
    observation_space: Any = None
    action_space: Any = None
    masked_leaves: Sequence[str] | bool | None = None
    aux: Mapping[str, str] | None = None
    run_name: str | None = None
    algorithm: str | None = None
    hyperparameters: Mapping[str, Any] | None = None
    pacing: Pacing | None = None
    max_policy_lag: int | None = None
    seed: int | None = None
    allow_nan: bool | None = None
    policy: str | None = None
    client_id: str | None = None
    max_traj_length: int | None = None
    spool_directory: Path | str | None = None
    on_accepted: OnAcceptedIds | None = None
    trajectory_file_directory: Path | str | None = None
    agent_listener_address: Address | str | None = None
    trajectory_server_address: Address | str | None = None
    model_server_address: Address | str | None = None
    model_announcer_address: Address | str | None = None
    inference_server_address: Address | str | None = None
    start_seconds: float | None = None
    request_seconds: float | None = None
    settings: ClientSettings | None = None


class AgentBuilder:
    """Collects options (see `AgentOptions`) and builds an agent.

    Raises:
        ConfigError: an option is not known.
    """

    def __init__(self, **options: Any) -> None:
        self._options = AgentOptions()
        self.set(**options)

    def set(self, **options: Any) -> Self:
        """Set options; returns the builder.

        Raises:
            ConfigError: an option is not known.
        """
        known = {field.name for field in fields(AgentOptions)}
        unknown = sorted(options.keys() - known)
        if unknown:
            raise ConfigError(f"AgentBuilder has no options {unknown}; it has {sorted(known)}")
        self._options = replace(self._options, **options)
        return self

    def build(self) -> Agent:
        """The agent, not yet started.

        Raises:
            ConfigError: an option is out of range, the file is wrong, or the combination makes no sense.
            SpecMismatch: a space cannot be recorded.
        """
        options = self._options
        settings = _settings(options, os.environ)
        plan = _plan(options, settings)
        return Agent(plan, _delivery_opener(settings.client_config, plan, options.on_accepted))


def _settings(options: AgentOptions, environment: Mapping[str, str]) -> ClientSettings:
    """The configuration file under the environment under the options."""
    settings = options.settings
    if settings is None:
        file = None if options.config_path is None else Path(options.config_path)
        if file is None and Path(DEFAULT_CONFIG_PATH).is_file():
            file = Path(DEFAULT_CONFIG_PATH)
        settings = load_settings(
            ClientSettings, environment_prefix=ENVIRONMENT_PREFIX, file=file, environment=environment
        )
    tree = msgspec.to_builtins(settings)
    for path, name in _PATHS.items():
        value = getattr(options, name)
        if value is not None:
            _put(tree, path, value)
    try:
        return msgspec.convert(tree, ClientSettings)
    except msgspec.ValidationError as exc:
        raise ConfigError(f"{exc}: check the options of AgentBuilder") from exc


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for key in parents:
        tree = tree[key]
    if path.startswith(_TRANSPORT):
        value = Address.parse(value) if isinstance(value, str) else value
        value = msgspec.to_builtins(value)
    tree[last] = str(value) if isinstance(value, Path) else value


_CLIENT = "client_config"
_TRANSPORT = "transport_config.zmq_addresses"
_PATHS = {
    f"{_CLIENT}.actor_count": "actor_count",
    f"{_CLIENT}.router_scale": "router_scale",
    f"{_CLIENT}.actor_inference_mode": "actor_inference_mode",
    f"{_CLIENT}.actor_training_data_mode": "actor_training_data_mode",
    f"{_CLIENT}.router_buffer_size_per_actor": "router_buffer_size_per_actor",
    f"{_CLIENT}.client_id": "client_id",
    f"{_CLIENT}.run.name": "run_name",
    f"{_CLIENT}.run.algorithm": "algorithm",
    f"{_CLIENT}.run.pacing": "pacing",
    f"{_CLIENT}.run.max_policy_lag": "max_policy_lag",
    f"{_CLIENT}.run.seed": "seed",
    f"{_CLIENT}.run.allow_nan": "allow_nan",
    f"{_CLIENT}.limits.max_traj_length": "max_traj_length",
    f"{_CLIENT}.spool.directory": "spool_directory",
    f"{_CLIENT}.trajectory_file_output.directory": "trajectory_file_directory",
    f"{_CLIENT}.timeouts.start_seconds": "start_seconds",
    f"{_CLIENT}.timeouts.request_seconds": "request_seconds",
    f"{_TRANSPORT}.training_addresses.agent_listener_address": "agent_listener_address",
    f"{_TRANSPORT}.training_addresses.trajectory_server_address": "trajectory_server_address",
    f"{_TRANSPORT}.training_addresses.model_server_address": "model_server_address",
    f"{_TRANSPORT}.training_addresses.model_announcer_address": "model_announcer_address",
    f"{_TRANSPORT}.inference_addresses.inference_server_address": "inference_server_address",
}
"""Dotted key of the settings → option."""


def _plan(options: AgentOptions, settings: ClientSettings) -> Plan:
    section = settings.client_config
    model = _default_model(options, settings.transport_config)
    schema = _schema(options, model)
    _check_modes(options, section, model)
    run = section.run
    request = RunRequest(
        name=run.name,
        algorithm=run.algorithm,
        hyperparameters=_hyperparameters(options, section),
        observation_spec=schema.observation,
        action_spec=schema.action,
        masked_leaves=schema.masked_leaves,
        pacing=run.pacing,
        max_policy_lag=run.max_policy_lag,
        seed=run.seed,
        allow_nan=run.allow_nan,
    )
    return Plan(
        schema=schema,
        run=request,
        client_id=section.client_id or new_id(),
        actor_count=section.actor_count,
        actor_inference_mode=section.actor_inference_mode,
        actor_training_data_mode=section.actor_training_data_mode,
        transport=settings.transport_config,
        limits=section.limits,
        timeouts=section.timeouts,
        default_model=model,
        policy=options.policy,
        policy_poll_seconds=section.policy_poll_seconds,
        http=section.http,
        telemetry=section.telemetry,
    )


def _default_model(options: AgentOptions, transport: TransportSection) -> PolicyArtefact | None:
    model = options.default_model
    if model is None:
        model = transport.local_model_module.directory
    return load_artefact(Path(model)) if isinstance(model, str | Path) else model


def _hyperparameters(options: AgentOptions, section: ClientSection) -> dict[str, Any]:
    """What is set explicitly: the file's block for the algorithm under the options (contracts K3)."""
    algorithm = section.run.algorithm
    block = next(
        (
            dict(v)
            for k, v in section.init_hyperparameters.items()
            if algorithm and k.upper() == algorithm.upper()
        ),
        {},
    )
    return block | dict(options.hyperparameters or {})


# -- what is recorded -----------------------------------------------------------------------------------


def _schema(options: AgentOptions, model: PolicyArtefact | None) -> RecordSchema:
    observation, action = _spaces(options, model)
    masked = options.masked_leaves
    if masked is None:
        masked = model.manifest.masked_leaves if model is not None else ()
    maskable = [leaf.name for leaf in action.leaves if leaf.mask_shape is not None]
    if isinstance(masked, bool):
        masked = maskable if masked else ()
    wrong = [name for name in masked if name not in maskable]
    if wrong:
        raise ConfigError(f"masked_leaves: {wrong} cannot be masked; there are {maskable}")
    hybrid = len(action.leaves) > 1 and (model is None or model.manifest.outputs.leaf_log_prob)
    return RecordSchema(
        observation=observation,
        action=action,
        masked_leaves=tuple(masked),
        leaf_log_probs=hybrid,
        aux=dict(options.aux or {}),
    )


def _spaces(options: AgentOptions, model: PolicyArtefact | None) -> tuple[ObservationSpec, ActionSpec]:
    env = options.environment
    observation, action = options.observation_space, options.action_space
    if env is not None:
        observation = observation or getattr(env, "single_observation_space", None) or env.observation_space
        action = action or getattr(env, "single_action_space", None) or env.action_space
    if observation is None and action is None and model is not None:
        return model.manifest.observation_spec, model.manifest.action_spec
    if observation is None or action is None:
        raise ConfigError("the spaces are not known: pass environment, or observation_space and action_space")
    if not isinstance(observation, ObservationSpec):
        observation = ObservationSpec.from_gymnasium(observation)
    if not isinstance(action, ActionSpec):
        action = ActionSpec.from_gymnasium(action)
    return observation, action


# -- what goes together ---------------------------------------------------------------------------------


def _check_modes(options: AgentOptions, section: ClientSection, model: PolicyArtefact | None) -> None:
    """Refuse combinations that make no sense.

    Raises:
        ConfigError: with the reason and the remedy.
    """
    inference, data = section.actor_inference_mode, section.actor_training_data_mode
    online = data.startswith("online")
    reasons = {
        "local inference without a server needs a model: pass default_model, or choose inference `server` or "
        "an online data mode": inference == "local" and not online and model is None,
        "with an online data mode the run's own policy acts: leave default_model out, or go offline": (
            online and model is not None
        ),
        "with inference `server` the server's policy acts: leave default_model out, or choose `local`": (
            inference == "server" and model is not None
        ),
        "inference `server` without a run needs the name of a policy: pass policy": (
            inference == "server" and not online and not options.policy
        ),
        "the run's policy acts online: leave policy out, or go offline": online and bool(options.policy),
        f"data mode {data} has no router: leave router_scale out, or choose another mode": (
            data == "disabled" and (options.router_scale or 1) > 1
        ),
        f"data mode {data} writes no files: leave trajectory_file_directory out, or take one with `files`": (
            options.trajectory_file_directory is not None and "files" not in data
        ),
        f"data mode {data} has no spool: leave spool_directory out, or choose an online one": (
            options.spool_directory is not None and not online
        ),
        f"data mode {data} trains nothing: leave out {_training_options(options)}, or go online": (
            not online and bool(_training_options(options))
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ConfigError(reason)


def _training_options(options: AgentOptions) -> str:
    """Options that mean something to a training server only, as far as they are set."""
    names = ("algorithm", "hyperparameters", "pacing", "max_policy_lag")
    return ", ".join(name for name in names if getattr(options, name) is not None)


def _delivery_opener(section: ClientSection, plan: Plan, on_accepted: OnAcceptedIds | None) -> OpenDelivery:
    def open_for(standing: Standing) -> RoutedDelivery:
        address = plan.transport.zmq_addresses.training_addresses.trajectory_server_address
        return open_delivery(
            plan.actor_training_data_mode,
            plan.schema,
            address=address.zmq if plan.is_online else None,
            spool_directory=section.spool.directory,
            spool_limit_bytes=section.spool.limit_bytes,
            spool_at_limit=section.spool.at_limit,
            limits=standing.limits,
            file_directory=section.trajectory_file_output.directory,
            memory_trajectories_per_actor=section.limits.memory_trajectories_per_actor,
            routers=section.router_scale,
            router_segments=section.router_buffer_size_per_actor * max(section.actor_count, 1),
            on_accepted=on_accepted,
        )

    return open_for
