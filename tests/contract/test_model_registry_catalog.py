"""What the registry promises about versions and aliases, over SQLite and over Postgres."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa

from relayrl_model_registry.blobs import BlobStore
from relayrl_model_registry.store import tables
from relayrl_model_registry.store.interface import AliasMove, PolicyVersion, PublicationKey
from relayrl_model_registry.store.migrate import CODE_SCHEMA, VERSION_TABLE
from relayrl_model_registry.store.sql import SqlRegistryStore, open_store
from relayrl_model_registry.versions import Catalog
from relayrl_shared.errors import (
    ConfigError,
    ContractError,
    DigestMismatch,
    RegistryError,
    SchemaVersionError,
    StaleFencingToken,
    StoreUnavailable,
    UnknownPolicy,
    UnknownPolicyVersion,
)
from relayrl_shared.policy.manifest import PolicyArtefact, PolicyManifest
from relayrl_shared.testing.postgres import PostgresServer
from relayrl_shared.testing.registry import free_ports, opaque_artefact

POSTGRES = ("packaged", "system")


@pytest.fixture(
    params=["sqlite", *(pytest.param(f"{kind}_postgres", marks=pytest.mark.postgres) for kind in POSTGRES)]
)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/state/registry.sqlite"
        return
    server: PostgresServer = request.getfixturevalue(request.param)
    url = server.create_database()
    yield url
    server.drop_database(url)


@pytest.fixture
def store(database_url: str) -> Iterator[SqlRegistryStore]:
    """A store over the empty database."""
    store = open_store(database_url)
    yield store
    store.close()


class Harness:
    """A catalog, its blobs, and the moves that it announced."""

    def __init__(self, store: SqlRegistryStore, directory: Path) -> None:
        self.directory = directory
        self.blobs = BlobStore(directory)
        self.moves: list[AliasMove] = []
        self.catalog = Catalog(store, self.blobs, lambda move, update: self.moves.append(move))

    def upload(self, artefact: PolicyArtefact) -> str:
        """Opens an intent and puts the files that are missing; the intent's id."""
        manifest = artefact.manifest
        files = {
            manifest.graph_digest: artefact.graph,
            manifest.weights_digest: artefact.weights,
            manifest.golden_digest: artefact.golden,
        }
        intent_id, missing = self.catalog.open_intent(manifest.policy, tuple(files))
        for digest in missing:
            self.blobs.put(digest, files[digest])
        return intent_id

    def publish(self, artefact: PolicyArtefact, token: int = 1) -> PolicyVersion:
        """A whole publication."""
        return self.send(self.upload(artefact), artefact, token)

    def send(self, intent_id: str, artefact: PolicyArtefact, token: int = 1) -> PolicyVersion:
        """The last message of a publication."""
        manifest = artefact.manifest
        key = PublicationKey(manifest.run_id, manifest.lineage_id, manifest.policy, manifest.learner_update)
        return self.catalog.publish(intent_id, key, token, msgspec.json.encode(manifest))


@pytest.fixture
def registry(store: SqlRegistryStore, tmp_path: Path) -> Harness:
    """A registry without sockets."""
    return Harness(store, tmp_path / "blobs")


def numbered(update: int, **changes: str) -> PolicyArtefact:
    """The artefact of an update."""
    return opaque_artefact(learner_update=update, seed=update, **changes)  # type: ignore[arg-type]


def test_versions_count_from_one_per_policy(registry: Harness) -> None:
    """Numbers grow by publication, each policy on its own."""
    numbers = [registry.publish(numbered(update)).policy_version for update in range(3)]
    other = registry.publish(numbered(0, policy="cartpole/agent_0"))

    assert numbers == [1, 2, 3]
    assert other.policy_version == 1


def test_published_version_keeps_manifest_and_files(registry: Harness) -> None:
    """The manifest comes back with its number and nothing else changed; the files are whole."""
    artefact = numbered(5)
    version = registry.catalog.resolve("cartpole", registry.publish(artefact).policy_version)
    manifest = msgspec.json.decode(version.manifest, type=PolicyManifest)

    assert manifest == msgspec.structs.replace(artefact.manifest, policy_version=1)
    assert registry.blobs.read(version.weights_digest) == artefact.weights
    assert registry.blobs.read(version.graph_digest) == artefact.graph
    assert registry.blobs.read(version.golden_digest) == artefact.golden


def test_latest_moves_with_every_publication_and_is_announced(registry: Harness) -> None:
    """The alias points to the newest version, its history says who, why, from and to."""
    for update in range(2):
        registry.publish(numbered(update))

    assert registry.catalog.resolve("cartpole").policy_version == 2
    history = registry.catalog.alias_history("cartpole", "latest")
    assert [(move.from_version, move.to_version) for move in history] == [(1, 2), (None, 1)]
    assert {(move.moved_by, move.reason) for move in history} == {("run run-1", "published")}
    assert [move.to_version for move in registry.moves] == [1, 2]


def test_same_key_and_files_give_the_same_version(registry: Harness) -> None:
    """A repeated publication changes nothing and is not announced, with a new intent or none left."""
    artefact = numbered(0)
    first = registry.publish(artefact)
    registry.publish(numbered(1))
    again = registry.publish(artefact)
    resent = registry.send("gone", artefact)

    assert again == first
    assert resent == first
    assert registry.catalog.policy("cartpole").newest_version == 2
    assert [move.to_version for move in registry.moves] == [1, 2]
    assert registry.catalog.statistics().repeated_total == 2


def test_same_key_with_other_files_is_refused(registry: Harness) -> None:
    """A resumed learner that computed other weights must begin a new lineage."""
    registry.publish(opaque_artefact(learner_update=3, seed=1))

    with pytest.raises(DigestMismatch, match="new lineage"):
        registry.publish(opaque_artefact(learner_update=3, seed=2))
    assert registry.publish(opaque_artefact(learner_update=3, seed=2, lineage_id="l2")).policy_version == 2


def test_older_fencing_token_is_refused_for_the_whole_run(registry: Harness) -> None:
    """Once a newer learner has published, the older one may not, not even a version that it had published."""
    registry.publish(numbered(0), token=1)
    registry.publish(numbered(1), token=2)

    for artefact in (numbered(0), numbered(2), numbered(2, policy="cartpole/agent_0")):
        with pytest.raises(StaleFencingToken, match="token 2"):
            registry.publish(artefact, token=1)
    assert registry.publish(numbered(1), token=2).policy_version == 2
    assert registry.publish(numbered(0, run_id="run-2"), token=1).policy_version == 3
    assert registry.catalog.statistics().refused_total == 3


def test_publication_without_its_files_is_refused_and_leaves_nothing(registry: Harness) -> None:
    """Blobs come first: a row never names a file that is not there."""
    artefact = numbered(0)
    manifest = artefact.manifest
    digests = (manifest.graph_digest, manifest.weights_digest, manifest.golden_digest)
    intent_id, missing = registry.catalog.open_intent("cartpole", digests)
    registry.blobs.put(manifest.graph_digest, artefact.graph)

    assert set(missing) == set(digests)
    with pytest.raises(RegistryError, match="not uploaded"):
        registry.send(intent_id, artefact)
    assert registry.catalog.policies() == []
    with pytest.raises(UnknownPolicy):
        registry.catalog.resolve("cartpole")


def test_publication_with_a_damaged_file_is_refused(registry: Harness) -> None:
    """What is on disk is checked, and the next intent asks for the damaged file again."""
    artefact = numbered(0)
    intent_id = registry.upload(artefact)
    digest = artefact.manifest.weights_digest
    path = registry.directory / digest[:2] / digest
    path.write_bytes(b"?" * len(artefact.weights))

    with pytest.raises(RegistryError, match="not uploaded"):
        registry.send(intent_id, artefact)
    assert registry.publish(artefact).policy_version == 1


def test_publication_needs_an_intent_that_names_its_files(registry: Harness) -> None:
    """An unknown intent, another policy's, and one of other files are refused."""
    first, second = numbered(0), numbered(1)
    for_first = registry.upload(first)
    elsewhere = registry.upload(numbered(1, policy="other"))
    registry.upload(second)

    with pytest.raises(RegistryError, match="is not open"):
        registry.send("no such intent", second)
    for intent_id in (for_first, elsewhere):
        with pytest.raises(RegistryError, match="does not name"):
            registry.send(intent_id, second)


def test_intent_asks_only_for_what_is_missing(registry: Harness) -> None:
    """The graph is uploaded once; a second version needs its weights and golden vectors only."""
    registry.publish(numbered(0))
    manifest = numbered(1).manifest
    digests = (manifest.graph_digest, manifest.weights_digest, manifest.golden_digest)

    assert registry.catalog.open_intent("cartpole", digests)[1] == digests[1:]


@pytest.mark.parametrize("digests", [(), ("ab",), ("../" * 20,), tuple(f"{n:064x}" for n in range(17))])
def test_intent_of_no_or_bad_digests_is_refused(registry: Harness, digests: tuple[str, ...]) -> None:
    """An intent names one to sixteen digests."""
    with pytest.raises(ContractError):
        registry.catalog.open_intent("cartpole", digests)


def test_two_publishers_of_one_key_make_one_version(registry: Harness) -> None:
    """Eight at once, to a run that has published before: all get the same number."""
    registry.publish(numbered(0))
    artefact = numbered(1)
    barrier = threading.Barrier(8)

    def publish(_: int) -> int:
        barrier.wait(10)
        return registry.publish(artefact).policy_version

    with ThreadPoolExecutor(8) as pool:
        numbers = list(pool.map(publish, range(8)))

    assert numbers == [2] * 8
    assert len(registry.catalog.versions("cartpole")) == 2


def test_publishers_at_once_get_numbers_without_a_gap(registry: Harness) -> None:
    """Eight lineages of two runs to one policy and another: every number once, latest is the greatest."""

    def publish(index: int) -> list[int]:
        artefacts = [
            numbered(update, run_id=f"run-{index % 2}", lineage_id=f"l{index}") for update in range(5)
        ]
        return [registry.publish(artefact).policy_version for artefact in artefacts]

    with ThreadPoolExecutor(8) as pool:
        numbers = [number for found in pool.map(publish, range(8)) for number in found]

    assert sorted(numbers) == list(range(1, 41))
    assert registry.catalog.resolve("cartpole").policy_version == 40
    history = registry.catalog.alias_history("cartpole", "latest")
    assert [move.to_version for move in history] == list(range(40, 0, -1))
    assert [move.from_version for move in history][:-1] == list(range(39, 0, -1))


def test_alias_moves_forward_and_back_with_history(registry: Harness) -> None:
    """Promote, then roll back: every move is kept, newest first, and announced after it is visible."""
    for update in range(3):
        registry.publish(numbered(update))
    registry.moves.clear()
    for version, reason in ((1, "first release"), (3, "better"), (1, "worse after all")):
        registry.catalog.move_alias("cartpole", "production", version, moved_by="ada", reason=reason)

    assert registry.catalog.resolve("cartpole", alias="production").policy_version == 1
    assert registry.catalog.policy("cartpole").aliases == {"latest": 3, "production": 1}
    history = registry.catalog.alias_history("cartpole", "production")
    assert [(move.from_version, move.to_version, move.reason) for move in history] == [
        (3, 1, "worse after all"),
        (1, 3, "better"),
        (None, 1, "first release"),
    ]
    assert {move.moved_by for move in history} == {"ada"}
    assert [move.to_version for move in registry.moves] == [1, 3, 1]


@pytest.mark.parametrize(
    ("policy", "alias", "version", "reason", "error"),
    [
        ("other", "production", 1, "why", UnknownPolicy),
        ("cartpole", "production", 9, "why", UnknownPolicyVersion),
        ("cartpole", "latest", 1, "why", ContractError),
        ("cartpole", "Bad Name", 1, "why", ContractError),
        ("cartpole", "production", 1, " ", ContractError),
    ],
)
def test_alias_move_that_makes_no_sense_is_refused(
    registry: Harness, policy: str, alias: str, version: int, reason: str, error: type[Exception]
) -> None:
    """Nothing is written, and no policy comes to be."""
    registry.publish(numbered(0))
    with pytest.raises(error):
        registry.catalog.move_alias(policy, alias, version, moved_by="ada", reason=reason)

    assert [summary.policy for summary in registry.catalog.policies()] == ["cartpole"]
    assert registry.catalog.policy("cartpole").aliases == {"latest": 1}


def test_unknown_things_are_named_errors(registry: Harness) -> None:
    """Policies, versions and aliases that do not exist."""
    registry.publish(numbered(0))
    catalog = registry.catalog
    calls: list[tuple[type[Exception], Callable[[], object]]] = [
        (UnknownPolicy, lambda: catalog.resolve("other")),
        (UnknownPolicyVersion, lambda: catalog.resolve("cartpole", 2)),
        (UnknownPolicyVersion, lambda: catalog.resolve("cartpole", alias="production")),
        (UnknownPolicyVersion, lambda: catalog.alias_history("cartpole", "production")),
        (UnknownPolicy, lambda: catalog.versions("other")),
    ]
    for error, call in calls:
        with pytest.raises(error):
            call()


def test_versions_are_listed_newest_first_in_pages(registry: Harness) -> None:
    """The next page begins below the last number."""
    for update in range(5):
        registry.publish(numbered(update))
    first = registry.catalog.versions("cartpole", limit=2)
    second = registry.catalog.versions("cartpole", before_version=first[-1].policy_version, limit=9)

    assert [version.policy_version for version in first + second] == [5, 4, 3, 2, 1]


def test_collection_keeps_what_is_needed(registry: Harness) -> None:
    """Aliased versions, the newest unaliased ones, each run's newest and open intents keep their files."""
    registry.publish(numbered(0, run_id="run-0", lineage_id="l0"))
    for update in range(1, 6):
        registry.publish(numbered(update))
    registry.catalog.move_alias("cartpole", "production", 2, moved_by="ada", reason="good")
    pending = numbered(9)
    intent_id = registry.upload(pending)
    for path in registry.directory.rglob("*"):
        if path.is_file():
            os.utime(path, (1, 1))

    versions, removed = registry.catalog.collect(1, 60.0, 3600.0)

    collected = [v.policy_version for v in registry.catalog.versions("cartpole") if v.collected_at]
    assert collected == [4, 3]
    assert (versions, removed) == (2, 4)
    assert registry.send(intent_id, pending).policy_version == 7
    with pytest.raises(RegistryError, match="were collected"):
        registry.catalog.move_alias("cartpole", "production", 3, moved_by="ada", reason="why not")


def test_collection_spares_young_files_and_forgets_old_intents(registry: Harness) -> None:
    """Files of a publication that never came go once the intent is old and they are."""
    registry.upload(numbered(0))

    assert registry.catalog.collect(1, 60.0, 0.0) == (0, 0)
    assert registry.catalog.collect(1, 0.0, 0.0) == (0, 3)


def test_rows_and_files_survive_a_new_process(database_url: str, tmp_path: Path) -> None:
    """Closing and opening again shows the same versions, and numbers go on."""
    first = open_store(database_url)
    Harness(first, tmp_path / "blobs").publish(numbered(0))
    first.close()

    second = open_store(database_url)
    registry = Harness(second, tmp_path / "blobs")
    assert registry.catalog.resolve("cartpole").policy_version == 1
    assert registry.publish(numbered(1)).policy_version == 2
    second.close()


def test_two_processes_may_migrate_at_once(database_url: str) -> None:
    """Openers of an empty database wait for each other."""
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(open_store, [database_url] * 4))
    for store in stores:
        store.ping()
        store.close()


def test_database_that_needs_newer_code_is_refused(database_url: str) -> None:
    """The database says which code it takes (contracts D5)."""
    store = open_store(database_url)
    with store.write() as unit:
        unit._connection.execute(  # type: ignore[attr-defined]
            sa.update(tables.schema).values(minimum_code_schema=CODE_SCHEMA + 1)
        )
    store.close()

    with pytest.raises(SchemaVersionError, match="newer release"):
        open_store(database_url)


def test_newer_schema_that_admits_this_code_is_served(database_url: str) -> None:
    """A revision from the future is left alone while its minimum allows us."""
    store = open_store(database_url)
    with store.write() as unit:
        unit._connection.execute(  # type: ignore[attr-defined]
            sa.text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
        )
    store.close()
    again = open_store(database_url)
    again.ping()
    again.close()


def test_migrations_make_the_tables_that_the_code_uses(store: SqlRegistryStore) -> None:
    """Columns, nullability and keys of the database are those of `tables`."""
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    def ours(name: str | None, kind: str, _: object) -> bool:
        return kind != "table" or ((name or "").startswith("registry_") and name != VERSION_TABLE)

    with store._engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"include_name": ours})
        differences = compare_metadata(context, tables.metadata)

    assert differences == []


def test_block_that_raises_leaves_nothing(store: SqlRegistryStore) -> None:
    """A write unit is all or nothing."""

    def fail_half_way() -> None:
        with store.write() as unit:
            unit.lock_policy("cartpole")
            unit.next_version("cartpole")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()

    with store.write() as unit:
        unit.lock_policy("cartpole")
        assert unit.next_version("cartpole") == 1


@pytest.mark.parametrize("url", ["", "registry.sqlite", "mysql://host/db", "sqlite://", "sqlite:///"])
def test_url_of_no_known_database_is_a_config_error(url: str) -> None:
    """The error says what to write."""
    with pytest.raises(ConfigError, match="use sqlite:///PATH or postgresql://"):
        open_store(url)


def test_postgres_that_does_not_answer_is_store_unavailable() -> None:
    """A typed error, that may be tried again."""
    with pytest.raises(StoreUnavailable):
        open_store(f"postgresql://nobody@127.0.0.1:{free_ports(1)[0]}/none")
