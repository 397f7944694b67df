"""Trajectory stores and rows for tests: a pytest plugin, beside `relayrl_shared.testing.postgres`.

`store_url` and `store` run a test once on each implementation: SQLite, Postgres 18 and the system's Postgres.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import blake3
import pytest

from relayrl_shared.messages import ActorInfo
from relayrl_shared.spaces import ActionSpec, LeafSpec, ObservationSpec
from relayrl_shared.store.interface import IncomingTrajectory, Run, TrajectoryStore
from relayrl_shared.store.open import open_store
from relayrl_shared.testing.postgres import PostgresServer, store_database
from relayrl_shared.trajectory import TrajectoryMetadata

OpenStore = Callable[..., TrajectoryStore]

RUN_ID = "run-1"


def make_run(**changes: Any) -> Run:
    """A run of a small discrete environment."""
    fields: dict[str, Any] = {
        "run_id": RUN_ID,
        "name": "cartpole",
        "algorithm": "PPO",
        "hyperparameters": {"gamma": 0.99, "hidden_sizes": [64, 64]},
        "observation_spec": ObservationSpec(
            leaves=(LeafSpec(name="observation", kind="box", shape=(4,), dtype="float32"),)
        ),
        "action_spec": ActionSpec(
            leaves=(LeafSpec(name="action", kind="discrete", shape=(), dtype="int64", nvec=(2,), start=(0,)),)
        ),
        "masked_leaves": (),
        "pacing": "free",
        "max_policy_lag": 1,
        "seed": 7,
        "allow_nan": False,
        "created_at": 1.0,
    }
    return Run(**{**fields, **changes})


def make_actor(actor_id: str = "actor-0", actor_index: int = 0) -> ActorInfo:
    """An actor in an environment instance of its own."""
    return ActorInfo(actor_id=actor_id, actor_index=actor_index, environment_instance_id=f"of-{actor_id}")


def make_metadata(sequence: int, **changes: Any) -> TrajectoryMetadata:
    """The metadata of a whole episode, number `sequence` of its spool."""
    spool_id = changes.get("spool_id", "spool-1")
    fields: dict[str, Any] = {
        "trajectory_id": f"{spool_id}-trajectory-{sequence:08d}",
        "run_id": RUN_ID,
        "policy": "cartpole",
        "client_id": "client-1",
        "client_index": 0,
        "spool_id": spool_id,
        "sequence": sequence,
        "actor_id": "actor-0",
        "actor_index": 0,
        "episode_id": f"{spool_id}-episode-{sequence:08d}",
        "episode_index": sequence,
        "segment_index": 0,
        "first_step_index": 0,
        "steps": 10,
        "rollout_index": 0,
        "environment_instance_id": "environment-1",
        "environment_episode_id": f"{spool_id}-environment-episode-{sequence}",
        "terminated": True,
        "truncated": False,
        "episode_return": 10.0,
        "started_at": 100.0,
        "ended_at": 101.0,
        "schema_digest": "schema-1",
        "body_digest": "",
    }
    return TrajectoryMetadata(**{**fields, **changes})


def make_trajectory(
    sequence: int, body: bytes | None = None, final_observation: bytes | None = None, **changes: Any
) -> IncomingTrajectory:
    """A trajectory on its way into the store; its body names it unless it is given."""
    metadata = make_metadata(sequence, **changes)
    body = metadata.trajectory_id.encode() if body is None else body
    digest = blake3.blake3(body + (final_observation or b"")).hexdigest()
    changes.setdefault("body_digest", digest)
    return IncomingTrajectory(
        metadata=make_metadata(sequence, **changes),
        body=body,
        final_observation=final_observation,
        policy_version_range=(1, 2),
        learner_update_range=(0, 1),
    )


def read_all(store: TrajectoryStore, run_id: str = RUN_ID) -> list[str]:
    """The ids that a reader who follows the cursor sees, in order."""
    found: list[str] = []
    position = 0
    while page := store.read(run_id, position, limit=7):
        found += [item.metadata.trajectory_id for item in page]
        position = page[-1].position
    return found


@pytest.fixture(params=["sqlite", "packaged_postgres", "system_postgres"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a store of this test alone, on each implementation in turn."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'store'}"
        return
    server: PostgresServer = request.getfixturevalue(request.param)
    url = store_database(server)
    yield url
    server.drop_database(url)


@pytest.fixture
def open_stores(store_url: str) -> Iterator[OpenStore]:
    """Opens more stores on the test's URL, which are closed after it; arguments as of `open_store`."""
    opened: list[TrajectoryStore] = []

    def open_another(**arguments: Any) -> TrajectoryStore:
        store = open_store(store_url, **arguments)
        opened.append(store)
        return store

    yield open_another
    for store in reversed(opened):
        store.close()


@pytest.fixture
def store(open_stores: OpenStore) -> TrajectoryStore:
    """A store that writes everything."""
    return open_stores(writer_of="all")
