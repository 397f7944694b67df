"""The registry's rules: what may be published, as which version, where aliases point (contracts G, L).

Driven by `dataplane` (publishers and clients) and `routes` (people). A publication is: intent, blobs, row,
announcement, in this order; a crash anywhere leaves either nothing visible or all of it.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from relayrl_model_registry.blobs import BlobStore
from relayrl_model_registry.store.interface import (
    AliasMove,
    PolicySummary,
    PolicyVersion,
    PublicationKey,
    ReadUnit,
    RegistryStore,
    WriteUnit,
)
from relayrl_shared.errors import (
    ContractError,
    DigestMismatch,
    RegistryError,
    StaleFencingToken,
    UnknownPolicy,
    UnknownPolicyVersion,
)
from relayrl_shared.identifiers import new_id
from relayrl_shared.policy.manifest import MANIFEST_FORMAT, PolicyManifest

LATEST = "latest"
MAX_MANIFEST_BYTES = 4 << 20
MAX_DIGESTS = 16
_POLICY = re.compile(r"[^/\x00-\x1f\x7f]{1,128}(/[^/\x00-\x1f\x7f]{1,128})?")
_ALIAS = re.compile(r"[a-z][a-z0-9._-]{0,63}")
_RESERVED = {"versions", "aliases"}  # words of the HTTP paths


@dataclass(frozen=True, slots=True)
class CatalogStatistics:
    """Counters since the process began."""

    published_total: int
    repeated_total: int
    """Publications whose key was known, with the same digests."""
    refused_total: int
    """Publications refused by a rule."""
    alias_moves_total: int


class Catalog:
    """All policies of a registry; safe to use from several threads.

    Args:
        store: rows.
        blobs: files.
        on_move: called after the commit that moved an alias, with the move and the version's learner_update.
    """

    def __init__(
        self, store: RegistryStore, blobs: BlobStore, on_move: Callable[[AliasMove, int], None]
    ) -> None:
        self._store = store
        self._blobs = blobs
        self._on_move = on_move
        self._collecting = threading.Lock()
        self._counts = {"published": 0, "repeated": 0, "refused": 0, "alias_moves": 0}

    # -- publication

    def open_intent(self, policy: str, digests: Sequence[str]) -> tuple[str, tuple[str, ...]]:
        """Announces a publication's files; (intent id, the digests that must be uploaded).

        Raises:
            ContractError: a bad policy name, or no or too many digests.
        """
        check_policy_name(policy)
        if not 1 <= len(digests) <= MAX_DIGESTS:
            raise ContractError(f"an intent names 1 to {MAX_DIGESTS} digests, not {len(digests)}")
        intent_id = new_id()
        with self._collecting:
            with self._store.write() as unit:
                unit.open_intent(intent_id, policy, digests)
            missing = tuple(digest for digest in dict.fromkeys(digests) if not self._blobs.contains(digest))
            for digest in set(digests) - set(missing):
                self._blobs.touch(digest)
        return intent_id, missing

    def publish(
        self, intent_id: str, key: PublicationKey, fencing_token: int, manifest_json: bytes
    ) -> PolicyVersion:
        """Makes a version visible, or returns the one that this key made before.

        Raises:
            StaleFencingToken: a newer learner has published for this run.
            DigestMismatch: the key made a version of other files.
            RegistryError: the intent is not known (any more) or a file has not been uploaded.
            ContractError: the manifest does not parse or disagrees with the key.
        """
        try:
            manifest = parse_manifest(manifest_json, key)
            with self._store.write() as unit:
                version, move = self._publish(unit, intent_id, key, fencing_token, manifest)
        except (RegistryError, ContractError):
            self._counts["refused"] += 1
            raise
        self._counts["repeated" if move is None else "published"] += 1
        if move is not None:
            self._on_move(move, version.learner_update)
        return version

    def _publish(
        self,
        unit: WriteUnit,
        intent_id: str,
        key: PublicationKey,
        fencing_token: int,
        manifest: PolicyManifest,
    ) -> tuple[PolicyVersion, AliasMove | None]:
        newest = unit.lock_run(key.run_id)
        if fencing_token < newest:
            raise StaleFencingToken(
                f"run {key.run_id} was published with token {newest}, this publication has {fencing_token}: "
                "another learner holds the run's lease now"
            )
        if fencing_token > newest:
            unit.set_fencing_token(key.run_id, fencing_token)
        known = unit.version_by_key(key)
        if known is not None:
            unit.close_intent(intent_id)
            return _same_files(known, manifest), None
        self._check_files(unit, intent_id, manifest)
        unit.lock_policy(key.policy)
        version = _new_version(unit.next_version(key.policy), fencing_token, manifest)
        unit.insert_version(version)
        unit.close_intent(intent_id)
        return version, _move(unit, key.policy, LATEST, version, f"run {key.run_id}", "published")

    def _check_files(self, unit: ReadUnit, intent_id: str, manifest: PolicyManifest) -> None:
        intent = unit.intent(intent_id)
        if intent is None:
            raise RegistryError(f"intent {intent_id!r} is not open (any more): open one and publish again")
        policy, digests = intent
        needed = {manifest.graph_digest, manifest.weights_digest, manifest.golden_digest}
        if policy != manifest.policy or not needed <= set(digests):
            raise RegistryError(f"intent {intent_id} does not name the files of this manifest")
        missing = sorted(digest for digest in needed if not self._blobs.contains(digest))
        if missing:
            raise RegistryError(f"files of this manifest are not uploaded: {', '.join(missing)}")

    # -- aliases

    def move_alias(
        self, policy: str, alias: str, policy_version: int, *, moved_by: str, reason: str
    ) -> AliasMove:
        """Points an alias to a version; a move to where it points already is noted as well.

        Raises:
            UnknownPolicy, UnknownPolicyVersion: there is no such version.
            ContractError: a bad alias name, `latest`, or no reason.
            RegistryError: the version's files were collected.
        """
        _check_alias_move(alias, moved_by, reason)
        with self._collecting, self._store.write() as unit:
            if unit.policy(policy) is None:
                raise UnknownPolicy(f"no policy {policy!r} has been published")
            unit.lock_policy(policy)
            version = _existing(unit, policy, policy_version)
            if version.collected_at is not None:
                raise RegistryError(f"the files of {policy} version {policy_version} were collected")
            move = _move(unit, policy, alias, version, moved_by, reason)
            self._counts["alias_moves"] += 1
        self._on_move(move, version.learner_update)
        return move

    def alias_history(self, policy: str, alias: str, limit: int = 100) -> list[AliasMove]:
        """Newest first, never empty.

        Raises:
            UnknownPolicy, UnknownPolicyVersion: there is no such alias.
        """
        with self._store.read() as unit:
            _policy(unit, policy)
            history = unit.alias_history(policy, alias, limit)
        if not history:
            raise UnknownPolicyVersion(f"policy {policy} has no alias {alias!r}")
        return history

    # -- queries

    def policies(self) -> list[PolicySummary]:
        """All policies by name."""
        with self._store.read() as unit:
            return unit.policies()

    def policy(self, policy: str) -> PolicySummary:
        """One policy. Raises UnknownPolicy."""
        with self._store.read() as unit:
            return _policy(unit, policy)

    def versions(
        self, policy: str, before_version: int | None = None, limit: int = 100
    ) -> list[PolicyVersion]:
        """Newest first, from below `before_version`. Raises UnknownPolicy."""
        with self._store.read() as unit:
            _policy(unit, policy)
            return unit.versions(policy, before_version, limit)

    def resolve(self, policy: str, policy_version: int | None = None, alias: str = LATEST) -> PolicyVersion:
        """The version of that number, or that the alias points to.

        Raises:
            UnknownPolicy, UnknownPolicyVersion: there is none.
        """
        with self._store.read() as unit:
            summary = _policy(unit, policy)
            if policy_version is None:
                if alias not in summary.aliases:
                    known = ", ".join(sorted(summary.aliases))
                    raise UnknownPolicyVersion(f"policy {policy} has no alias {alias!r}; it has {known}")
                policy_version = summary.aliases[alias]
            return _existing(unit, policy, policy_version)

    def statistics(self) -> CatalogStatistics:
        """The counters now."""
        counts = self._counts
        return CatalogStatistics(
            counts["published"], counts["repeated"], counts["refused"], counts["alias_moves"]
        )

    # -- collection

    def collect(
        self, keep_unaliased: int, minimum_age_seconds: float, intent_timeout_seconds: float
    ) -> tuple[int, int]:
        """Removes the files that nobody needs (contracts L): (versions given up, blobs removed)."""
        with self._collecting:
            with self._store.write() as unit:
                unit.expire_intents(time.time() - intent_timeout_seconds)
                keep = unit.needed_digests(keep_unaliased)
                versions = unit.mark_collected(keep)
            return versions, self._blobs.remove_except(keep, minimum_age_seconds)


def check_policy_name(policy: str) -> None:
    """Raises ContractError unless it is `{run}` or `{run}/{agent}` (contracts H7)."""
    if _POLICY.fullmatch(policy) is None or not _RESERVED.isdisjoint(policy.split("/")):
        raise ContractError(
            f"{policy[:80]!r} is no policy name: write run or run/agent, each 1 to 128 printable characters, "
            f"and neither of them {' or '.join(sorted(_RESERVED))}"
        )


def parse_manifest(manifest_json: bytes, key: PublicationKey) -> PolicyManifest:
    """The manifest of a publication. Raises ContractError if it does not parse or disagrees with the key."""
    if len(manifest_json) > MAX_MANIFEST_BYTES:
        raise ContractError(f"a manifest of {len(manifest_json)} bytes; the limit is {MAX_MANIFEST_BYTES}")
    try:
        manifest = msgspec.json.decode(manifest_json, type=PolicyManifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ContractError(f"the manifest does not parse: {error}") from error
    if manifest.format > MANIFEST_FORMAT:
        raise ContractError(f"manifest format {manifest.format} is newer than {MANIFEST_FORMAT}")
    check_policy_name(manifest.policy)
    for field in PublicationKey.__struct_fields__:
        if getattr(manifest, field) != getattr(key, field):
            raise ContractError(f"the manifest's {field} differs from the one in the publish message")
    return manifest


def _new_version(policy_version: int, fencing_token: int, manifest: PolicyManifest) -> PolicyVersion:
    numbered = msgspec.structs.replace(manifest, policy_version=policy_version)
    return PolicyVersion(
        policy=manifest.policy,
        policy_version=policy_version,
        run_id=manifest.run_id,
        lineage_id=manifest.lineage_id,
        learner_update=manifest.learner_update,
        fencing_token=fencing_token,
        parent_version=manifest.parent_version,
        algorithm=manifest.algorithm,
        graph_digest=manifest.graph_digest,
        weights_digest=manifest.weights_digest,
        golden_digest=manifest.golden_digest,
        manifest=msgspec.json.encode(numbered).decode(),
        published_at=time.time(),
    )


def _same_files(known: PolicyVersion, manifest: PolicyManifest) -> PolicyVersion:
    if known.digests == (manifest.graph_digest, manifest.weights_digest, manifest.golden_digest):
        return known
    raise DigestMismatch(
        f"learner update {known.learner_update} of run {known.run_id} is version {known.policy_version} of "
        f"{known.policy} already, with other files: a resumed learner must begin a new lineage"
    )


def _move(
    unit: WriteUnit, policy: str, alias: str, version: PolicyVersion, moved_by: str, reason: str
) -> AliasMove:
    before = unit.alias(policy, alias)
    move = AliasMove(
        policy=policy,
        alias=alias,
        from_version=None if before is None else before.to_version,
        to_version=version.policy_version,
        moved_at=time.time(),
        moved_by=moved_by,
        reason=reason,
    )
    unit.move_alias(move)
    return move


def _check_alias_move(alias: str, moved_by: str, reason: str) -> None:
    if _ALIAS.fullmatch(alias) is None:
        raise ContractError(f"{alias[:80]!r} is no alias: a letter, then up to 63 of a-z 0-9 . _ -")
    if alias == LATEST:
        raise ContractError(f"{LATEST} moves at publication only; move another alias, such as production")
    if not reason.strip() or not moved_by.strip():
        raise ContractError("say why the alias moves and who moves it: the history keeps both")


def _policy(unit: ReadUnit, policy: str) -> PolicySummary:
    summary = unit.policy(policy)
    if summary is None:
        raise UnknownPolicy(f"no policy {policy!r} has been published")
    return summary


def _existing(unit: ReadUnit, policy: str, policy_version: int) -> PolicyVersion:
    version = unit.version(policy, policy_version)
    if version is None:
        raise UnknownPolicyVersion(f"policy {policy} has no version {policy_version}")
    return version
