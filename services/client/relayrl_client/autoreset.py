"""Steps Gymnasium vector environments of all three autoreset modes, and says what each step meant.

Driven by the environment runner. Whatever the mode, a `Transition` gives the ended episodes with their own
final observations, and after it `observation` is what the next actions are chosen on (contracts A7).
n = environments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from numpy.typing import NDArray

from relayrl_shared.errors import ConfigError, InvalidActionMask
from relayrl_shared.spaces import ObservationSpec

Leaves = dict[str, NDArray[Any]]
MaskSource = Literal["info", "observation"]

MASK_KEY = "action_mask"


@dataclass(frozen=True, slots=True)
class Transition:
    """One step of all environments.

    reward: float [n]. terminated, truncated, ended: bool [n], False on a reset tick. final_observation and
    final_mask: what the ended environments showed last, one row an ended environment, in order.
    """

    reward: NDArray[np.float64]
    terminated: NDArray[np.bool_]
    truncated: NDArray[np.bool_]
    ended: NDArray[np.bool_]
    final_observation: Leaves | None
    final_mask: Any


def as_vector(env: gymnasium.Env[Any, Any] | VectorEnv[Any, Any, Any]) -> VectorEnv[Any, Any, Any]:
    """The environment as a vector environment: a single one becomes a vector of one."""
    if isinstance(env, VectorEnv) or hasattr(env, "num_envs"):
        return cast("VectorEnv[Any, Any, Any]", env)
    single = env
    return SyncVectorEnv([lambda: single], autoreset_mode=AutoresetMode.DISABLED)


def autoreset_mode(env: VectorEnv[Any, Any, Any]) -> AutoresetMode:
    """The autoreset mode that an environment declares.

    Raises:
        ConfigError: it declares none.
    """
    declared = (env.metadata or {}).get("autoreset_mode")
    try:
        return AutoresetMode(getattr(declared, "value", declared))
    except ValueError as exc:
        raise ConfigError(
            f"{env} says no autoreset mode in metadata['autoreset_mode'] ({declared!r}): pass autoreset_mode"
        ) from exc


class VectorStepper:
    """Resets and steps one vector environment.

    Args:
        env: of n environments.
        spec: of one environment's observation.
        mode: its autoreset mode.
        mask_source: where action masks come from; None: there are none.

    Attributes:
        observation: leaves [n, …] to act on next. mask: the masks that came with them, or None.
        resetting: bool [n], environments whose next step is a reset tick (NEXT_STEP).
    """

    def __init__(
        self,
        env: VectorEnv[Any, Any, Any],
        spec: ObservationSpec,
        mode: AutoresetMode,
        mask_source: MaskSource | None,
    ) -> None:
        self.env: Any = (
            env  # vectors of separate environments take a list of seeds, which the type does not say
        )
        self.mode = mode
        self.count = int(env.num_envs)
        self.resetting = np.zeros(self.count, np.bool_)
        self.observation: Leaves = {}
        self.mask: Any = None
        self._spec = spec
        self._mask_source = mask_source

    @property
    def reset_ticks(self) -> int:
        """Ticks without a step after each end."""
        return 1 if self.mode is AutoresetMode.NEXT_STEP else 0

    @property
    def seeds_each(self) -> bool:
        """Whether each environment takes a seed of its own; else one, the first, is for all."""
        return isinstance(self.env.unwrapped, SyncVectorEnv | AsyncVectorEnv)

    def reset(self, seeds: list[int]) -> None:
        """Begin episodes in all environments, each with its own seed."""
        observation, info = self.env.reset(seed=list(seeds) if self.seeds_each else seeds[0])
        self.resetting[:] = False
        self._observe(observation, info)

    def step(self, actions: Any) -> Transition:
        """Step all environments. On a reset tick the action is ignored and nothing ends.

        Raises:
            InvalidActionMask: masks are expected and `info` has none.
        """
        observation, reward, terminated, truncated, info = self.env.step(actions)
        ended = (terminated | truncated) & ~self.resetting
        if not ended.any():
            self.resetting[:] = False
            self._observe(observation, info)
            return Transition(reward, terminated, truncated, ended, None, None)
        if self.mode is AutoresetMode.SAME_STEP:
            final, mask = self._finals(info, ended)
            self._observe(observation, info)
        else:
            self._observe(observation, info)
            final = {name: array[ended] for name, array in self.observation.items()}
            mask = rows_of(self.mask, ended)
        if self.mode is AutoresetMode.DISABLED:
            self._observe(*self.env.reset(options={"reset_mask": ended.copy()}))
        self.resetting[:] = ended & (self.mode is AutoresetMode.NEXT_STEP)
        return Transition(reward, terminated & ended, truncated & ended, ended, final, mask)

    def _observe(self, observation: Any, info: Mapping[str, Any]) -> None:
        self.observation = self._spec.flatten_batch(observation, self.count)
        if self._mask_source == "observation":
            self.mask = observation[MASK_KEY]
        elif self._mask_source == "info":
            self.mask = self._merged(self.mask, info)

    def _merged(self, known: Any, info: Mapping[str, Any]) -> Any:
        """The masks in `info`; environments that it says nothing of keep theirs (a partial reset)."""
        if MASK_KEY not in info:
            raise InvalidActionMask(
                f"the agent records action masks and info has no {MASK_KEY!r}: let the environment give one "
                "at every step and reset, or build the agent without masked_leaves"
            )
        fresh, present = info[MASK_KEY], info.get(f"_{MASK_KEY}")
        if known is None or present is None or bool(np.all(present)):
            return _plain(fresh)
        return _choose(np.asarray(present, np.bool_), _plain(fresh), known)

    def _finals(self, info: Mapping[str, Any], ended: NDArray[np.bool_]) -> tuple[Leaves, Any]:
        """What SAME_STEP put aside before it reset."""
        finals = info["final_obs"]
        positions = np.flatnonzero(ended)
        if isinstance(finals, np.ndarray) and finals.dtype == object:
            rows = [self._spec.flatten(finals[position]) for position in positions]
            leaves = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        else:
            whole = self._spec.flatten_batch(finals, self.count)
            leaves = {name: array[ended] for name, array in whole.items()}
        if self._mask_source == "observation":
            return leaves, leaves.get(f"observation.{MASK_KEY}")
        final_info = info.get("final_info", {})
        if self._mask_source is None or MASK_KEY not in final_info:
            return leaves, None
        return leaves, rows_of(_plain(final_info[MASK_KEY]), ended)


def rows_of(mask: Any, chosen: NDArray[np.bool_]) -> Any:
    """The chosen rows of a mask, which is None, an array, or a structure of arrays."""
    if mask is None:
        return None
    if isinstance(mask, Mapping):
        return {key: rows_of(part, chosen) for key, part in mask.items()}
    if isinstance(mask, tuple | list):
        return tuple(rows_of(part, chosen) for part in mask)
    return mask[chosen]


def _plain(mask: Any) -> Any:
    """Masks as Gymnasium gathers them in `info`, without its bookkeeping and object arrays."""
    if isinstance(mask, Mapping):
        return {key: _plain(part) for key, part in mask.items() if not key.startswith("_")}
    if isinstance(mask, np.ndarray) and mask.dtype == object:
        like = next(row for row in mask if row is not None)
        if isinstance(like, tuple | list):
            parts = zip(*(like if row is None else row for row in mask), strict=True)
            return tuple(np.stack(part) for part in parts)
        return np.stack([like if row is None else row for row in mask])
    return mask


def _choose(present: NDArray[np.bool_], fresh: Any, known: Any) -> Any:
    """Rows of `fresh` where present, else of `known`, through the structure of both."""
    if isinstance(fresh, Mapping):
        return {key: _choose(present, part, known[key]) for key, part in fresh.items()}
    if isinstance(fresh, tuple):
        return tuple(_choose(present, part, old) for part, old in zip(fresh, known, strict=True))
    return np.where(present.reshape(-1, *[1] * (fresh.ndim - 1)), fresh, known)
