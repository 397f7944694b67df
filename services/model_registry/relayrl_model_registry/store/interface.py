"""The values that the registry keeps, and what its store must do; `sql` does it, `versions` drives it.

All changes happen inside one `write()` unit: it commits as a whole when the block ends and not at all when
the block raises. Times are Unix seconds and serve people only.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import msgspec


class PublicationKey(msgspec.Struct, frozen=True):
    """The idempotency key of a publication (contracts G1)."""

    run_id: str
    lineage_id: str
    policy: str
    learner_update: int


class PolicyVersion(msgspec.Struct, frozen=True, kw_only=True):
    """A published version; only `collected_at` ever changes.

    policy_version: from 1, per policy, only grows. manifest: JSON with policy_version filled in.
    collected_at: when its files were given up for collection; None while they are kept.
    """

    policy: str
    policy_version: int
    run_id: str
    lineage_id: str
    learner_update: int
    fencing_token: int
    parent_version: int | None
    algorithm: str
    graph_digest: str
    weights_digest: str
    golden_digest: str
    manifest: str
    published_at: float
    collected_at: float | None = None

    @property
    def digests(self) -> tuple[str, str, str]:
        """The three files of the version: graph, weights, golden vectors."""
        return (self.graph_digest, self.weights_digest, self.golden_digest)


class AliasMove(msgspec.Struct, frozen=True, kw_only=True):
    """One line of an alias's history: who moved it, when, why, from which version to which."""

    policy: str
    alias: str
    from_version: int | None
    to_version: int
    moved_at: float
    moved_by: str
    reason: str


class PolicySummary(msgspec.Struct, frozen=True, kw_only=True):
    """A policy, how far its versions go, and where its aliases point."""

    policy: str
    created_at: float
    newest_version: int
    aliases: dict[str, int]


class ReadUnit(Protocol):
    """Queries inside one transaction."""

    def policies(self) -> list[PolicySummary]:
        """All policies by name."""
        ...

    def policy(self, policy: str) -> PolicySummary | None:
        """The policy, None if nothing was published under the name."""
        ...

    def version(self, policy: str, policy_version: int) -> PolicyVersion | None:
        """The version, None if there is none of that number."""
        ...

    def versions(self, policy: str, before_version: int | None, limit: int) -> list[PolicyVersion]:
        """Newest first, from below `before_version`."""
        ...

    def version_by_key(self, key: PublicationKey) -> PolicyVersion | None:
        """The version that a publication of this key made."""
        ...

    def alias(self, policy: str, alias: str) -> AliasMove | None:
        """The move that put the alias where it is."""
        ...

    def alias_history(self, policy: str, alias: str, limit: int) -> list[AliasMove]:
        """Newest first."""
        ...

    def intent(self, intent_id: str) -> tuple[str, tuple[str, ...]] | None:
        """(policy, digests) of an open intent."""
        ...

    def needed_digests(self, keep_unaliased: int) -> set[str]:
        """Files that collection must leave (contracts L).

        Those of open intents, of aliased versions, of each run's newest version, and of the newest
        `keep_unaliased` unaliased versions of each policy.
        """
        ...


class WriteUnit(ReadUnit, Protocol):
    """Queries and changes inside one transaction that excludes other writers of the same rows."""

    def lock_run(self, run_id: str) -> int:
        """Locks the run against other publications; the newest fencing token seen, 0 if none."""
        ...

    def set_fencing_token(self, run_id: str, fencing_token: int) -> None:
        """Notes the newest token of a locked run."""
        ...

    def lock_policy(self, policy: str) -> None:
        """Creates the policy if it is absent and locks it; after `lock_run` where both are taken."""
        ...

    def next_version(self, policy: str) -> int:
        """Takes the next number of a locked policy."""
        ...

    def insert_version(self, version: PolicyVersion) -> None:
        """Adds a version."""
        ...

    def move_alias(self, move: AliasMove) -> None:
        """Points the alias to another version and writes the move to its history."""
        ...

    def open_intent(self, intent_id: str, policy: str, digests: Sequence[str]) -> None:
        """Notes that a publication will need these files."""
        ...

    def close_intent(self, intent_id: str) -> None:
        """Forgets an intent; one that is not there is fine."""
        ...

    def expire_intents(self, opened_before: float) -> int:
        """Forgets intents opened before; how many."""
        ...

    def mark_collected(self, keep: set[str]) -> int:
        """Marks the versions that have a file outside `keep` as collected; how many are new."""
        ...


class RegistryStore(Protocol):
    """A database.

    Everything raises `StoreUnavailable` where it cannot be reached and `StorageFull` where its disk is
    full; the unit then had no effect.
    """

    def read(self) -> AbstractContextManager[ReadUnit]:
        """One consistent view."""
        ...

    def write(self) -> AbstractContextManager[WriteUnit]:
        """One durable transaction, rolled back if the block raises."""
        ...

    def ping(self) -> None:
        """Raises `StoreUnavailable` unless the database answers."""
        ...

    def close(self) -> None:
        """Closes all connections."""
        ...
