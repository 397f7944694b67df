"""Reads a run's trajectories from the store by cursor and decodes them; the learner drives it."""

from __future__ import annotations

from relayrl_shared.arrow_codec import decode_columns, decode_final_observation, decode_schema
from relayrl_shared.errors import InvalidTrajectory
from relayrl_shared.store.interface import StoredTrajectory, TrajectoryStore
from relayrl_shared.trajectory import RecordSchema
from relayrl_training_server.batches import Segment

ROWS = 256
MAX_BYTES = 64 << 20


class SegmentReader:
    """A run's log as decoded segments. Schemas are looked up once."""

    def __init__(self, store: TrajectoryStore, run_id: str) -> None:
        self._store = store
        self._run_id = run_id
        self._schemas: dict[str, RecordSchema] = {}

    def read_after(self, position: int) -> list[Segment]:
        """The next segments after a position, at most 256 or 64 MiB, in order.

        Raises:
            InvalidTrajectory: a stored body that does not decode; the store is damaged.
            StoreUnavailable: try again.
        """
        return [self._decode(row) for row in self._store.read(self._run_id, position, ROWS, MAX_BYTES)]

    def _decode(self, row: StoredTrajectory) -> Segment:
        schema = self._schema(row.metadata.schema_digest)
        final = None
        if row.final_observation:
            final = decode_final_observation(schema, row.final_observation)
        return Segment(
            position=row.position,
            metadata=row.metadata,
            columns=decode_columns(schema, row.body, row.metadata.steps),
            final_observation=final,
            oldest_update=row.learner_update_range[0],
            stored_bytes=len(row.body) + len(row.final_observation or b""),
        )

    def _schema(self, digest: str) -> RecordSchema:
        if digest not in self._schemas:
            encoded = self._store.schema(digest)
            if encoded is None:
                raise InvalidTrajectory(f"the store has trajectories of schema {digest}, but not the schema")
            self._schemas[digest] = decode_schema(encoded)
        return self._schemas[digest]
