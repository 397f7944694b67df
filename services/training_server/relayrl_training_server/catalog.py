"""What ingest knows of runs and schemas: looked up in the store, cached, never changed here (contracts C4).

Driven by the trajectory intake for every message, so a known run and schema cost two dictionary lookups.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

from relayrl_shared.arrow_codec import RecordCodec, decode_schema
from relayrl_shared.errors import InvalidTrajectory
from relayrl_shared.store.interface import Run, TrajectoryStore
from relayrl_shared.trajectory import RecordSchema

MAX_SCHEMAS = 1024
MAX_RUNS = 4096
MISS_SECONDS = 1.0  # how long an unknown run is not looked for again

_V = TypeVar("_V")


class _Lru(Generic[_V]):
    """A small cache, least recently used first out."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[str, _V] = OrderedDict()

    def get(self, key: str) -> _V | None:
        value = self._entries.get(key)
        if value is not None:
            self._entries.move_to_end(key)
        return value

    def put(self, key: str, value: _V) -> None:
        self._entries[key] = value
        self._entries.move_to_end(key)
        if len(self._entries) > self._limit:
            self._entries.popitem(last=False)

    def drop(self, key: str) -> None:
        self._entries.pop(key, None)


@dataclass(frozen=True, slots=True)
class KnownSchema:
    """A schema, its codec, and the runs that it was found to fit."""

    codec: RecordCodec
    fits: set[str]


class Catalog:
    """Runs and schemas by id and digest. Used by one thread."""

    def __init__(self, store: TrajectoryStore) -> None:
        self._store = store
        self._runs: _Lru[Run] = _Lru(MAX_RUNS)
        self._schemas: _Lru[KnownSchema] = _Lru(MAX_SCHEMAS)
        self._missed: _Lru[float] = _Lru(MAX_RUNS)

    def run(self, run_id: str) -> Run | None:
        """The run as it was created; its state may be older. Raises StoreUnavailable."""
        run = self._runs.get(run_id)
        if run is None and not self._missed_lately(run_id):
            run = self._store.run_by_id(run_id)
            if run is None:
                self._missed.put(run_id, time.monotonic())
            else:
                self._runs.put(run_id, run)
        return run

    def learner_update(self, run_id: str) -> int:
        """Finished updates of the run, as the store has them now. Raises StoreUnavailable."""
        return self._store.learner_update(run_id)

    def _missed_lately(self, run_id: str) -> bool:
        missed_at = self._missed.get(run_id)
        return missed_at is not None and time.monotonic() - missed_at < MISS_SECONDS

    def schema(self, digest: str) -> KnownSchema | None:
        """The schema behind a digest, None if nobody has sent it. Raises StoreUnavailable."""
        known = self._schemas.get(digest)
        if known is None:
            encoded = self._store.schema(digest)
            if encoded is None:
                return None
            known = KnownSchema(RecordCodec(decode_schema(encoded)), set())
            self._schemas.put(digest, known)
        return known

    def check_fits(self, known: KnownSchema, run: Run) -> None:
        """Checks that the schema's specs are the run's.

        Raises:
            InvalidTrajectory: (reason `spec_mismatch`) names what differs.
        """
        if run.run_id in known.fits:
            return
        _compare_specs(known.codec.schema, run)
        known.fits.add(run.run_id)


def _compare_specs(schema: RecordSchema, run: Run) -> None:
    pairs = {
        "observation_spec": (schema.observation, run.observation_spec),
        "action_spec": (schema.action, run.action_spec),
        "masked_leaves": (tuple(schema.masked_leaves), tuple(run.masked_leaves)),
    }
    for name, (recorded, expected) in pairs.items():
        if recorded != expected:
            raise InvalidTrajectory(
                f"{name} of the trajectory's schema differs from that of run {run.name!r}", "spec_mismatch"
            )
