"""What ingest caches of runs and schemas."""

from __future__ import annotations

from typing import Any, cast

import pytest

from relayrl_shared.arrow_codec import encode_schema, schema_digest
from relayrl_shared.errors import InvalidTrajectory
from relayrl_shared.store.interface import Run, TrajectoryStore
from relayrl_shared.testing.store import make_run
from relayrl_shared.testing.trajectories import small_schema
from relayrl_training_server.catalog import Catalog

SCHEMA = small_schema()
DIGEST = schema_digest(SCHEMA)


class CountingStore:
    """Runs and schemas in memory, and how often they were asked for."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.schemas: dict[str, bytes] = {}
        self.asked: list[str] = []

    def run_by_id(self, run_id: str) -> Run | None:
        """A run."""
        self.asked.append(run_id)
        return self.runs.get(run_id)

    def schema(self, digest: str) -> bytes | None:
        """A schema."""
        self.asked.append(digest)
        return self.schemas.get(digest)


@pytest.fixture
def store() -> CountingStore:
    """An empty store."""
    return CountingStore()


@pytest.fixture
def catalog(store: CountingStore) -> Catalog:
    """A catalog over it."""
    return Catalog(cast("TrajectoryStore", store))


def test_a_run_and_a_schema_are_looked_up_once(store: CountingStore, catalog: Catalog) -> None:
    """After the first lookup the store is not asked again."""
    store.runs["run-1"] = make_run()
    store.schemas[DIGEST] = encode_schema(SCHEMA)

    runs = [catalog.run("run-1") for _ in range(3)]
    schemas = [catalog.schema(DIGEST) for _ in range(3)]

    assert store.asked == ["run-1", DIGEST]
    assert runs == [make_run()] * 3
    assert schemas[0] is not None
    assert schemas[0] is schemas[2]
    assert schemas[0].codec.schema == SCHEMA


def test_a_schema_that_comes_later_is_found(store: CountingStore, catalog: Catalog) -> None:
    """Absence is not remembered: the client sends the schema right after it was told."""
    assert catalog.schema(DIGEST) is None
    store.schemas[DIGEST] = encode_schema(SCHEMA)

    assert catalog.schema(DIGEST) is not None


def test_an_unknown_run_is_not_asked_for_at_every_message(store: CountingStore, catalog: Catalog) -> None:
    """A client of a run that is gone does not become a query a message."""
    assert [catalog.run("gone") for _ in range(5)] == [None] * 5
    assert store.asked == ["gone"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, None),
        ({"observation_spec": small_schema(observation_size=9).observation}, "observation_spec"),
        ({"action_spec": small_schema(actions=9).action}, "action_spec"),
        ({"masked_leaves": ("action",)}, "masked_leaves"),
    ],
)
def test_a_schema_fits_a_run_of_its_specs_only(
    store: CountingStore, catalog: Catalog, changes: dict[str, Any], named: str | None
) -> None:
    """What differs is named, at the second time as at the first."""
    store.schemas[DIGEST] = encode_schema(SCHEMA)
    known = catalog.schema(DIGEST)
    assert known is not None
    run = make_run(observation_spec=SCHEMA.observation, action_spec=SCHEMA.action)
    other = make_run(
        **{"observation_spec": SCHEMA.observation, "action_spec": SCHEMA.action, "run_id": "other", **changes}
    )
    catalog.check_fits(known, run)

    for _ in range(2):
        if named is None:
            catalog.check_fits(known, other)
            continue
        with pytest.raises(InvalidTrajectory, match=named) as caught:
            catalog.check_fits(known, other)
        assert caught.value.reason == "spec_mismatch"
