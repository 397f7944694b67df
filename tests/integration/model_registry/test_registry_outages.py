"""The registry when its database or disk fails it, and the order of its writes as the system sees them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from relayrl_model_registry.service import ModelRegistry
from relayrl_model_registry.settings import CollectionSettings, ModelRegistrySettings
from relayrl_shared.errors import StorageFull, StoreUnavailable
from relayrl_shared.registry_client import RegistryClient
from relayrl_shared.settings import Address, HttpSettings
from relayrl_shared.testing.postgres import PostgresServer, packaged_binaries
from relayrl_shared.testing.registry import opaque_artefact

from .conftest import served


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A Postgres of this test alone, which it may stop."""
    binaries = packaged_binaries()
    if binaries is None:
        pytest.skip("NO PACKAGED POSTGRES: the outage of a database is not tested")
    server = PostgresServer(binaries)
    server.start()
    yield server
    server.close()


@pytest.mark.postgres
@pytest.mark.slow
def test_postgres_that_restarts_costs_publications_only_meanwhile(
    own_postgres: PostgresServer, tmp_path: Path
) -> None:
    """While it is down publications are StoreUnavailable and readiness says so; after it they go on."""
    settings = ModelRegistrySettings(
        model_server=Address(port=0),
        model_announcer=Address(port=0),
        http=HttpSettings(port=0),
        database_url=own_postgres.create_database(),
        blob_directory=str(tmp_path / "blobs"),
        collection=CollectionSettings(enabled=False),
    )
    with served(ModelRegistry(settings)) as registry:
        client = RegistryClient(f"tcp://127.0.0.1:{registry.router.port}")
        assert client.publish(opaque_artefact(), fencing_token=1) == 1
        assert registry.readiness()["database"] is None

        own_postgres.stop()
        newer = opaque_artefact(learner_update=1, seed=1)
        with pytest.raises(StoreUnavailable):
            client.publish(newer, fencing_token=1)
        assert registry.readiness()["database"] is not None

        own_postgres.start()
        assert client.publish(newer, fencing_token=1) == 2
        assert client.fetch("cartpole").weights == newer.weights
        client.close()


def limit_pages(connection: sa.Connection, pages: int) -> None:
    """Makes this connection believe that the disk has no room for more pages."""
    connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")


def test_full_disk_of_the_database_is_a_typed_error_and_passes(
    registry: ModelRegistry, client: RegistryClient
) -> None:
    """StorageFull arrives at the publisher, nothing half is visible, and with space it goes on."""
    client.publish(opaque_artefact(), fencing_token=1)
    engine = registry._store._engine
    pages = 1

    def limit(connection: sa.Connection) -> None:
        limit_pages(connection, pages)

    sa.event.listen(engine, "begin", limit)

    def publish_many() -> None:
        for update in range(1, 50):
            client.publish(opaque_artefact(learner_update=update, seed=update), fencing_token=1)

    with pytest.raises(StorageFull):
        publish_many()
    whole = client.latest_version("cartpole")
    assert client.fetch("cartpole").manifest.learner_update == whole - 1

    pages = 1 << 30
    artefact = opaque_artefact(learner_update=100, seed=100)
    assert client.publish(artefact, fencing_token=1) == whole + 1


TRACED = """
import sys
from pathlib import Path
import msgspec
from relayrl_model_registry.blobs import BlobStore
from relayrl_model_registry.store.interface import PublicationKey
from relayrl_model_registry.store.sql import open_store
from relayrl_model_registry.versions import Catalog
from relayrl_shared.testing.registry import opaque_artefact

directory = Path(sys.argv[1])
blobs = BlobStore(directory / "blobs")
artefact = opaque_artefact()
manifest = artefact.manifest
say = lambda text: sys.stdout.write(text + "\\n") and sys.stdout.flush()
catalog = Catalog(open_store(f"sqlite:///{directory}/registry.sqlite"), blobs, lambda *_: say("ANNOUNCED"))
intent, missing = catalog.open_intent(manifest.policy, (
    manifest.graph_digest, manifest.weights_digest, manifest.golden_digest))
say("INTENT")
blobs.put(manifest.graph_digest, artefact.graph)
blobs.put(manifest.weights_digest, artefact.weights)
blobs.put(manifest.golden_digest, artefact.golden)
say("UPLOADED")
key = PublicationKey(manifest.run_id, manifest.lineage_id, manifest.policy, manifest.learner_update)
catalog.publish(intent, key, 1, msgspec.json.encode(manifest))
"""


@pytest.mark.slow
def test_files_and_rows_are_synced_before_the_announcement(tmp_path: Path) -> None:
    """The system calls: each blob fsynced, renamed, its directory fsynced; the row synced; then the word."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("NO STRACE: the order of fsync is not shown")
    trace = tmp_path / "trace"
    calls = "trace=fsync,fdatasync,rename,renameat,renameat2,write"
    command = [strace, "-f", "-y", "-e", calls, "-o", str(trace), sys.executable, "-c", TRACED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    if "ptrace" in done.stderr and "permitted" in done.stderr:
        pytest.skip("STRACE IS NOT PERMITTED: the order of fsync is not shown")
    assert done.returncode == 0, done.stderr
    events = shortened(trace.read_text().splitlines())

    upload = events[events.index("INTENT") : events.index("UPLOADED")]
    blob = ["fsync part", "rename", "fsync directory"]
    assert [event for event in upload if event != "fsync blobs"] == ["INTENT", *blob * 3]
    publication = events[events.index("UPLOADED") : events.index("ANNOUNCED")]
    assert "sync database" in publication


def shortened(lines: list[str]) -> list[str]:
    """The calls that matter, as words."""
    patterns = {
        r"write\(1<.*\"(INTENT|UPLOADED|ANNOUNCED)": None,
        r"fsync\(\d+<[^>]*\.part>": "fsync part",
        r"rename(at2?)?\(.*\.part": "rename",
        r"fsync\(\d+<[^>]*/blobs/[0-9a-f]{2}>": "fsync directory",
        r"fsync\(\d+<[^>]*/blobs>": "fsync blobs",
        r"f(data)?sync\(\d+<[^>]*registry\.sqlite(-wal)?>": "sync database",
    }
    events = []
    for line in lines:
        for pattern, name in patterns.items():
            found = re.search(pattern, line)
            if found is not None:
                events.append(name or found[1])
                break
    return events
