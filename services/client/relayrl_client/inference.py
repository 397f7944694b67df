"""Chooses actions: in this process with ONNX Runtime, or through the inference server.

Driven by the coordinator. Both take observation, mask and noise leaves of B actors and give the graph's
outputs with the version that made them. Nothing is recorded here and no action is ever made up:
what fails raises.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from relayrl_client.policy_slot import PolicySlot, tags_of
from relayrl_client.storage import StepTags, mask_shapes
from relayrl_shared.errors import InferenceError, Overloaded, PeerTimeout, RegistryError, TransportError
from relayrl_shared.frames import pack_leaves, unpack_leaves
from relayrl_shared.messages import Actions, RequestActions
from relayrl_shared.policy.interface import noise_leaves
from relayrl_shared.policy.manifest import NoiseLeaf
from relayrl_shared.sockets import Peer
from relayrl_shared.spaces import LeafSpec, leaf_log_prob_name, mask_leaf_name, policy_action_name
from relayrl_shared.trajectory import RecordSchema

Arrays = dict[str, NDArray[Any]]

_PROBE_PAUSE_SECONDS = 0.02
_RECONNECT_PAUSE_SECONDS = 0.05


class Decision(NamedTuple):
    """The outputs [B, …] of the graph by name, the version that acted (-1 without one), the step's tags."""

    outputs: Arrays
    policy_version: int
    tags: StepTags


class Inference(Protocol):
    """What the coordinator needs to choose actions."""

    @property
    def noise(self) -> tuple[NoiseLeaf, ...]:
        """The noise leaves to draw; always the same tuple while the version does not change them."""

    @property
    def policy_version(self) -> int:
        """The version in use, as far as it is known; -1 without one."""

    def act(self, inputs: Arrays, rows: int, *, greedy: bool, deadline: float) -> Decision:
        """Choose the actions of B actors. `deadline` is on the monotonic clock, in seconds.

        Raises:
            InferenceError: the policy could not act.
            TransportError: the inference server did not answer in time.
        """

    def admit(self, learner_update: int, deadline: float, give_up: Callable[[], bool]) -> bool:
        """Wait until the version in use comes from at least that many finished updates; whether it does."""

    def close(self) -> None:
        """Release what it holds."""


class LocalInference:
    """Acts in this process with the version in the slot; one read of the slot a call.

    Args:
        slot: holds the version in use.
        check: raises where acting has become pointless, such as for a run that failed.
    """

    def __init__(self, slot: PolicySlot, check: Callable[[], None] = lambda: None) -> None:
        self.slot = slot
        self._check = check

    @property
    def noise(self) -> tuple[NoiseLeaf, ...]:
        """The noise leaves of the version in use."""
        return self.slot.current.loaded.manifest.noise

    @property
    def policy_version(self) -> int:
        """The version in use."""
        return -1 if self.slot.is_empty else self.slot.current.policy_version

    def act(self, inputs: Arrays, rows: int, *, greedy: bool, deadline: float) -> Decision:
        """See `Inference.act`; it does not wait."""
        self._check()
        acting = self.slot.current
        return Decision(acting.run(inputs), acting.policy_version, acting.tags[greedy])

    def admit(self, learner_update: int, deadline: float, give_up: Callable[[], bool]) -> bool:
        """See `Inference.admit`."""
        current = None if self.slot.is_empty else self.slot.current
        if current is not None and current.learner_update >= learner_update:
            return True
        return self.slot.wait_until(lambda acting: acting.learner_update >= learner_update, deadline, give_up)

    def close(self) -> None:
        """Nothing to release."""


class ServerInference:
    """Acts through the inference server. The noise comes from here, so that a resend samples the same action.

    Args:
        address: of the inference server, `tcp://host:port`.
        policy: name of the policy.
        schema: what is recorded; a reply that does not fit it is an error.
        alias: which version acts.
        priority: lane at the server.
        check: as that of `LocalInference`.
    """

    def __init__(
        self,
        address: str,
        policy: str,
        schema: RecordSchema,
        *,
        alias: str = "latest",
        priority: int = 0,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._check = check
        self.policy = policy
        self._schema = schema
        self._alias = alias
        self._priority = priority
        self._peer = Peer(address)
        self._noise = noise_leaves(schema.action)
        self._required = _required_outputs(schema)
        self._known: tuple[int, int] = (-1, -1)  # policy_version, learner_update
        self._pause = threading.Event()  # set on close, so that no wait outlives it

    @property
    def noise(self) -> tuple[NoiseLeaf, ...]:
        """The noise leaves that the action spec asks for."""
        return self._noise

    @property
    def policy_version(self) -> int:
        """The version that the last reply came from."""
        return self._known[0]

    def act(self, inputs: Arrays, rows: int, *, greedy: bool, deadline: float) -> Decision:
        """See `Inference.act`. A broken connection is tried again until the deadline."""
        self._check()
        reply, payload = self._ask(inputs, rows, deadline)
        outputs = self._outputs(reply, payload, rows)
        self._known = (reply.policy_version, reply.learner_update)
        tags = tags_of(
            policy_version=reply.policy_version,
            learner_update=reply.learner_update,
            has_log_prob="behaviour_log_prob" in outputs,
            has_value="value" in outputs,
        )
        return Decision(outputs, reply.policy_version, tags[greedy])

    def admit(self, learner_update: int, deadline: float, give_up: Callable[[], bool]) -> bool:
        """See `Inference.admit`: asks the server for an action of nobody until its version is new enough."""
        while self._known[1] < learner_update:
            # What fails is asked again until the deadline, which then says so.
            with contextlib.suppress(TransportError, Overloaded, RegistryError):
                self.act(self._probe(), 1, greedy=True, deadline=min(deadline, time.monotonic() + 1.0))
            if self._known[1] >= learner_update:
                break
            if time.monotonic() >= deadline or give_up() or self._pause.wait(_PROBE_PAUSE_SECONDS):
                return False
        return True

    def close(self) -> None:
        """Close the connection."""
        self._pause.set()
        self._peer.close()

    def _ask(self, inputs: Arrays, rows: int, deadline: float) -> tuple[Actions, Sequence[memoryview]]:
        headers, frame = pack_leaves(inputs)
        request = RequestActions(
            policy=self.policy, rows=rows, leaves=headers, alias=self._alias, priority=self._priority
        )
        while True:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise PeerTimeout(f"the inference server at {self._peer.address} did not answer in time")
            question = msgspec.structs.replace(request, timeout_seconds=remaining)
            try:
                reply, payload = self._peer.request(question, [frame], timeout_seconds=remaining)
            except (TransportError, Overloaded) as exc:
                pause = getattr(exc, "retry_after_seconds", _RECONNECT_PAUSE_SECONDS)
                if not exc.retryable or time.monotonic() + pause >= deadline or self._pause.wait(pause):
                    raise
                continue
            if not isinstance(reply, Actions):
                raise InferenceError(f"the inference server answered {type(reply).__name__} to a request")
            return reply, payload

    def _outputs(self, reply: Actions, payload: Sequence[memoryview], rows: int) -> Arrays:
        if reply.rows != rows or len(payload) != 1:
            raise InferenceError(f"the inference server answered {reply.rows} rows to {rows}")
        outputs = unpack_leaves(reply.leaves, payload[0])
        for name, (dtype, shape) in self._required.items():
            array = outputs.get(name)
            optional = name in ("behaviour_log_prob", "value")
            if array is None and optional:
                continue
            if array is None or array.dtype != dtype or array.shape != (rows, *shape):
                found = "is missing" if array is None else f"is {array.dtype}{list(array.shape)}"
                raise InferenceError(
                    f"{name} of the inference server {found}; this agent records {dtype}{[rows, *shape]}"
                )
        return outputs

    def _probe(self) -> Arrays:
        """One row of nothing: the lowest allowed observation, all actions allowed, no noise."""
        leaves = self._schema.observation.leaves
        inputs: Arrays = {leaf.name: _lowest(leaf) for leaf in leaves}
        inputs |= {
            mask_leaf_name(name): np.ones((1, *shape), np.bool_)
            for name, shape in mask_shapes(self._schema).items()
        }
        return inputs | {leaf.name: np.zeros((1, leaf.width), np.float32) for leaf in self._noise}


def _lowest(leaf: LeafSpec) -> NDArray[Any]:
    """One row of the lowest value that the spec allows; zeros for a box, where any number passes.

    Returns:
        [1, *shape] in the leaf's dtype.
    """
    row = np.zeros((1, *leaf.shape), leaf.numpy_dtype)
    if leaf.start:
        row += np.asarray(leaf.start, leaf.numpy_dtype).reshape(leaf.shape)
    return row


def _required_outputs(schema: RecordSchema) -> Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Name → dtype and row shape of the outputs that a record of this schema takes."""
    single = np.dtype(np.float32)
    required: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {
        "behaviour_log_prob": (single, ()),
        "value": (single, ()),
    }
    for leaf in schema.action.leaves:
        required[leaf.name] = (leaf.numpy_dtype, leaf.shape)
        if leaf.kind == "box":
            required[policy_action_name(leaf.name)] = (single, leaf.shape)
        if schema.leaf_log_probs:
            required[leaf_log_prob_name(leaf.name)] = (single, ())
    return required
