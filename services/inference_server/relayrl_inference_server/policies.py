"""Which policies are loaded, and which version of each acts; driven by `server`, fed from the registry.

`find` is what the serving thread calls for every request: a dictionary look-up. Loading, checking and
swapping happen in other threads, and a swap is one assignment, so it falls between two batches. A version
that cannot be loaded is refused and counted; the one before goes on.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from relayrl_inference_server.acting import ServedPolicy
from relayrl_shared import logs
from relayrl_shared.errors import Overloaded, RelayRLError
from relayrl_shared.policy.engine import load_policy
from relayrl_shared.policy.manifest import PolicyArtefact
from relayrl_shared.registry_client import PolicyWatcher, RegistryClient

LOG = logs.get_logger(__name__)

LATEST = "latest"
FAILURE_SECONDS = 1.0
"""For so long after a failed load, the same question gets the same error without another try."""


class Selector(NamedTuple):
    """What a request asks for: a version by number, or where an alias points."""

    policy: str
    policy_version: int | None = None
    alias: str = LATEST


@dataclass(frozen=True, slots=True)
class SlotStatus:
    """What is known of a loaded policy, for people."""

    policy: str
    alias: str | None
    """None: pinned by number."""
    policy_version: int | None
    """None: wanted, not loaded yet."""
    learner_update: int | None
    algorithm: str | None
    swaps_total: int
    refused_total: int
    """Versions that could not be loaded."""
    registry_errors_total: int
    last_error: str | None


OnLoaded = Callable[[Selector, "ServedPolicy | None", "RelayRLError | None"], None]


class _Slot:
    """An alias that is followed."""

    def __init__(self) -> None:
        self.served: ServedPolicy | None = None
        self.watcher: PolicyWatcher | None = None
        self.swaps_total = 0


class PolicyPool:
    """The loaded policies.

    Args:
        client: of the registry; not closed here.
        announcer_address: of the registry, None: poll only.
        poll_seconds: how late a lost announcement is made up for.
        max_policies: aliases followed at one time.
        max_pinned_versions: versions kept that were asked for by number, least recently used first out.
        max_batch_rows: of one forward.
        on_loaded: called from a loader thread for everything that was asked for by `load`.
    """

    def __init__(
        self,
        client: RegistryClient,
        announcer_address: str | None,
        *,
        poll_seconds: float,
        max_policies: int,
        max_pinned_versions: int,
        max_batch_rows: int,
        on_loaded: OnLoaded,
    ) -> None:
        self._client = client
        self._announcer_address = announcer_address
        self._poll_seconds = poll_seconds
        self._max_policies = max_policies
        self._max_pinned_versions = max_pinned_versions
        self._max_batch_rows = max_batch_rows
        self._on_loaded = on_loaded
        self._lock = threading.Lock()
        self._slots: dict[Selector, _Slot] = {}
        self._pinned: OrderedDict[Selector, ServedPolicy] = OrderedDict()
        self._failures: OrderedDict[Selector, tuple[float, RelayRLError]] = OrderedDict()
        self._loaders = ThreadPoolExecutor(2, thread_name_prefix="policy-loader")
        self._closing = False

    # -- the serving thread

    def find(self, selector: Selector) -> ServedPolicy | None:
        """The version that serves the selector now; None if it must be loaded first.

        Raises:
            RelayRLError: loading it failed a moment ago, or too many policies are loaded.
        """
        slot = self._slots.get(selector)
        if slot is not None and slot.served is not None:
            return slot.served
        if selector.policy_version is not None:
            served = self._find_version(selector)
            if served is not None:
                return served
        self._raise_recent_failure(selector)
        return None

    def _find_version(self, selector: Selector) -> ServedPolicy | None:
        latest = self._slots.get(Selector(selector.policy))
        served = None if latest is None else latest.served
        if served is not None and served.policy_version == selector.policy_version:
            return served
        with self._lock:
            served = self._pinned.get(selector)
            if served is not None:
                self._pinned.move_to_end(selector)
            return served

    def _raise_recent_failure(self, selector: Selector) -> None:
        with self._lock:
            failure = self._failures.get(selector)
        if failure is not None and time.monotonic() - failure[0] < FAILURE_SECONDS:
            raise failure[1]

    def load(self, selector: Selector) -> None:
        """Begins to load; `on_loaded` is called with what came of it."""
        self._loaders.submit(self._load, selector)

    # -- loading

    def follow(self, policy: str) -> None:
        """Follows a policy's latest version from the start, whether the registry has it already or not."""
        selector = Selector(policy)
        with self._lock:
            slot = self._slots.setdefault(selector, _Slot())
        if slot.watcher is None:
            slot.watcher = self._watch(selector, slot, None)

    def _load(self, selector: Selector) -> None:
        try:
            served = self.find(selector) or self._fetch(selector)
        except RelayRLError as error:
            self._note_failure(selector, error)
            self._on_loaded(selector, None, error)
        except Exception as error:  # whatever it is, the requests that wait must be answered
            LOG.error("a policy could not be loaded", policy=selector.policy, exc_info=error)
            self._on_loaded(
                selector, None, RelayRLError("the policy could not be loaded; see the server's log")
            )
        else:
            self._on_loaded(selector, served, None)

    def _note_failure(self, selector: Selector, error: RelayRLError) -> None:
        LOG.warning("a policy could not be loaded", policy=selector.policy, error=str(error))
        with self._lock:
            self._failures[selector] = (time.monotonic(), error)
            while len(self._failures) > self._max_policies:
                self._failures.popitem(last=False)

    def _fetch(self, selector: Selector) -> ServedPolicy:
        if selector.policy_version is None:
            self._check_room(selector)
        artefact = self._client.fetch(
            selector.policy, policy_version=selector.policy_version, alias=selector.alias
        )
        served = self._serve(artefact, self._any_version(selector.policy))
        if selector.policy_version is None:
            return self._install(selector, served)
        with self._lock:
            self._pinned[selector] = served
            while len(self._pinned) > self._max_pinned_versions:
                self._pinned.popitem(last=False)
        return served

    def _check_room(self, selector: Selector) -> None:
        with self._lock:
            if selector not in self._slots and len(self._slots) >= self._max_policies:
                raise Overloaded(
                    f"{len(self._slots)} policies are loaded already (limits.max_policies); "
                    f"{selector.policy} was refused",
                    FAILURE_SECONDS,
                )

    def _install(self, selector: Selector, served: ServedPolicy) -> ServedPolicy:
        with self._lock:
            slot = self._slots.setdefault(selector, _Slot())
            if slot.served is None:
                slot.served = served
            if slot.watcher is None and not self._closing:
                slot.watcher = self._watch(selector, slot, served.policy_version)
            return slot.served

    def _watch(self, selector: Selector, slot: _Slot, current_version: int | None) -> PolicyWatcher:
        return PolicyWatcher(
            self._client,
            self._announcer_address,
            selector.policy,
            lambda artefact: self._swap(slot, artefact),
            self._poll_seconds,
            current_version=current_version,
            alias=selector.alias,
        )

    def _swap(self, slot: _Slot, artefact: PolicyArtefact) -> None:
        served = self._serve(artefact, slot.served)
        slot.swaps_total += slot.served is not None
        slot.served = served
        LOG.info(
            "policy version in use",
            policy=artefact.manifest.policy,
            policy_version=served.policy_version,
            learner_update=artefact.manifest.learner_update,
        )

    def _serve(self, artefact: PolicyArtefact, previous: ServedPolicy | None) -> ServedPolicy:
        loaded = load_policy(artefact, previous=previous.loaded if previous is not None else None)
        return ServedPolicy(loaded, max_batch_rows=self._max_batch_rows, previous=previous)

    def _any_version(self, policy: str) -> ServedPolicy | None:
        with self._lock:
            slots = [slot.served for selector, slot in self._slots.items() if selector.policy == policy]
            pinned = [served for selector, served in self._pinned.items() if selector.policy == policy]
        return next((served for served in [*slots, *pinned] if served is not None), None)

    # -- any thread

    def status(self) -> list[SlotStatus]:
        """Every alias that is followed and every version that is pinned."""
        with self._lock:
            slots, pinned = list(self._slots.items()), list(self._pinned.items())
        return [_slot_status(selector, slot) for selector, slot in slots] + [
            _pinned_status(selector, served) for selector, served in pinned
        ]

    def waiting_for(self, policies: Sequence[str]) -> dict[str, str | None]:
        """Policy → None if it is loaded, else why not, for /readyz."""
        waits: dict[str, str | None] = {}
        for policy in policies:
            slot = self._slots.get(Selector(policy))
            loaded = slot is not None and slot.served is not None
            error = _problem(slot.watcher) if slot is not None else None
            waits[f"policy {policy}"] = None if loaded else (error or "not loaded yet")
        return waits

    def close(self) -> None:
        """Ends all threads."""
        with self._lock:
            self._closing = True
            watchers = [slot.watcher for slot in self._slots.values() if slot.watcher is not None]
        self._loaders.shutdown(wait=True, cancel_futures=True)
        for watcher in watchers:
            watcher.close()


def _slot_status(selector: Selector, slot: _Slot) -> SlotStatus:
    served, watcher = slot.served, slot.watcher
    return SlotStatus(
        policy=selector.policy,
        alias=selector.alias,
        policy_version=None if served is None else served.policy_version,
        learner_update=None if served is None else served.manifest.learner_update,
        algorithm=None if served is None else served.manifest.algorithm,
        swaps_total=slot.swaps_total,
        refused_total=0 if watcher is None else watcher.refused_total,
        registry_errors_total=0 if watcher is None else watcher.errors_total,
        last_error=_problem(watcher),
    )


def _problem(watcher: PolicyWatcher | None) -> str | None:
    """Why the newest version does not act: the registry is not there, or the version was refused."""
    return None if watcher is None else watcher.last_error or watcher.last_refusal


def _pinned_status(selector: Selector, served: ServedPolicy) -> SlotStatus:
    return SlotStatus(
        policy=selector.policy,
        alias=None,
        policy_version=served.policy_version,
        learner_update=served.manifest.learner_update,
        algorithm=served.manifest.algorithm,
        swaps_total=0,
        refused_total=0,
        registry_errors_total=0,
        last_error=None,
    )
