"""Holds the policy version that acts, and swaps it between two calls; driven by inference and the watcher.

A call reads the slot once and uses what it got to its end, so that no call sees two versions. A version that
does not fit the record (other spaces, masks, noise or log-probs) is refused and the old one acts on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from relayrl_client.storage import (
    GREEDY,
    HAS_LOG_PROB,
    HAS_VALUE,
    HAS_VERSION,
    StepTags,
    mask_shapes,
)
from relayrl_shared.errors import ArtefactError, InferenceError, PeerTimeout, RelayRLError
from relayrl_shared.policy.engine import LoadedPolicy, load_policy
from relayrl_shared.policy.manifest import PolicyArtefact, PolicyManifest
from relayrl_shared.trajectory import RecordSchema

NO_VERSION = -1
_POLL_SECONDS = 0.25


def tags_of(
    *, policy_version: int | None, learner_update: int, has_log_prob: bool, has_value: bool
) -> dict[bool, StepTags]:
    """The tags of the steps of a version, by greedy."""
    flags = HAS_LOG_PROB * has_log_prob | HAS_VALUE * has_value | HAS_VERSION * (policy_version is not None)
    version = NO_VERSION if policy_version is None else policy_version
    return {
        greedy: StepTags(max(version, 0), learner_update, flags | GREEDY * greedy) for greedy in (False, True)
    }


class ActingPolicy:
    """A loaded version with what every call needs of it, computed once.

    Attributes: loaded; run, its run method; tags by greedy; policy_version, -1 without one; learner_update.
    """

    def __init__(self, loaded: LoadedPolicy) -> None:
        outputs = loaded.manifest.outputs
        self.loaded = loaded
        self.run = loaded.run
        self.learner_update = loaded.learner_update
        self.policy_version = NO_VERSION if loaded.policy_version is None else loaded.policy_version
        self.tags = tags_of(
            policy_version=loaded.policy_version,
            learner_update=loaded.learner_update,
            has_log_prob=outputs.behaviour_log_prob,
            has_value=outputs.value,
        )


def check_fits(manifest: PolicyManifest, schema: RecordSchema) -> None:
    """Refuse a version that cannot act for a record of this schema.

    Raises:
        ArtefactError: names what differs.
    """
    masked = tuple(mask_shapes(schema))
    differing = [
        what
        for what, mine, theirs in (
            ("observation_spec", schema.observation.digest(), manifest.observation_spec.digest()),
            ("action_spec", schema.action.digest(), manifest.action_spec.digest()),
            ("masked_leaves", sorted(masked), sorted(manifest.masked_leaves)),
            ("leaf_log_prob", schema.leaf_log_probs, manifest.outputs.leaf_log_prob),
        )
        if mine != theirs
    ]
    if differing:
        raise ArtefactError(
            f"policy {manifest.policy} version {manifest.policy_version} differs from this agent in "
            f"{', '.join(differing)}: it was made for another environment or run"
        )


class PolicySlot:
    """The version in use. Thread-safe.

    Args:
        schema: what every version must fit.
    """

    def __init__(self, schema: RecordSchema) -> None:
        self._schema = schema
        self._current: ActingPolicy | None = None
        self._changed = threading.Condition()
        self._loading = threading.Lock()
        self.swaps_total = 0
        self.refused_total = 0
        self.last_refusal = ""

    @property
    def current(self) -> ActingPolicy:
        """The version that acts.

        Raises:
            InferenceError: none was loaded yet.
        """
        current = self._current
        if current is None:
            raise InferenceError("no policy is loaded yet: pass default_model, or wait_for_version")
        return current

    @property
    def is_empty(self) -> bool:
        """Whether no version was loaded yet."""
        return self._current is None

    def load(self, artefact: PolicyArtefact) -> None:
        """Load, check and swap in a version. Calls go on with the old one meanwhile.

        Raises:
            ArtefactError, DigestMismatch: it is corrupt or does not fit; counted, and the old one acts on.
        """
        with self._loading:
            try:
                check_fits(artefact.manifest, self._schema)
                previous = None if self._current is None else self._current.loaded
                loaded = load_policy(artefact, previous=previous)
            except RelayRLError as exc:
                self.refused_total += 1
                self.last_refusal = str(exc)
                raise
            self.install(loaded)

    def install(self, loaded: LoadedPolicy) -> None:
        """Swap in a version that was loaded and fits."""
        acting = ActingPolicy(loaded)
        with self._changed:
            self._current = acting
            self.swaps_total += 1
            self._changed.notify_all()

    def wait_until(
        self, reached: Callable[[ActingPolicy], bool], deadline: float, give_up: Callable[[], bool]
    ) -> bool:
        """Wait for a version that satisfies a condition.

        Args:
            reached: the condition.
            deadline: on the monotonic clock, in seconds.
            give_up: asked a few times a second; True ends the wait.

        Returns:
            Whether it was reached.
        """
        with self._changed:
            while self._current is None or not reached(self._current):
                remaining = deadline - time.monotonic()
                if remaining <= 0 or give_up():
                    return False
                self._changed.wait(min(remaining, _POLL_SECONDS))
            return True

    def wait_for_version(self, policy_version: int, timeout_seconds: float) -> None:
        """Wait until a version is in use that is at least this one.

        Raises:
            PeerTimeout: it did not come in time.
        """
        deadline = time.monotonic() + timeout_seconds
        if not self.wait_until(
            lambda acting: acting.policy_version >= policy_version, deadline, lambda: False
        ):
            raise PeerTimeout(
                f"policy version {policy_version} was not in use after {timeout_seconds:g} s: "
                "is the learner running, and the registry reachable?"
            )
