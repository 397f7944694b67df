"""Trajectories as Arrow bytes and back: driven by the client's routers, ingest, the learner and file sinks.

A body is one serialised Arrow record batch without its schema: one row a step, one column a leaf. A final
observation is a second batch of one row. The schema follows from a `RecordSchema`, which travels once, by
digest. Columns, in order: observation leaves, action leaves, `policy_action` of box leaves, `action_mask` of
masked leaves, reward, behaviour_log_prob, `leaf_log_prob` of every action leaf (hybrids), value,
policy_version, learner_update, greedy, fallback, environment_step, `aux.*`. A leaf with axes is a
FixedSizeList of its elements in C order.

In `Columns` and `FinalObservation`, policy_action, action_mask and leaf_log_prob are keyed by the *action
leaf's* name (`action.0`); the Arrow column has the prefixed name (`action_mask.0`). A policy_action or
action_mask leaf that is absent is a column of nulls. leaf_log_prob is null where behaviour_log_prob is. What
lies under a null is kept, so that every bit survives.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import msgspec
import numpy as np
import pyarrow as pa
from blake3 import blake3
from numpy.typing import NDArray

from relayrl_shared.arrow_ipc import BatchReader, Bytes
from relayrl_shared.errors import InvalidTrajectory
from relayrl_shared.spaces import LeafSpec, leaf_log_prob_name, mask_leaf_name, policy_action_name
from relayrl_shared.trajectory import (
    Columns,
    FinalObservation,
    RecordSchema,
    Trajectory,
    TrajectoryMetadata,
)
from relayrl_shared.validation import validate_schema

Group = Literal["observation", "action", "policy_action", "action_mask", "leaf_log_prob", "aux", "scalar"]

_METADATA_KEY = b"relayrl.trajectory"
_SCHEMA_KEY = b"relayrl.schema"
_FINAL_KEY = b"relayrl.final_observation"
_NULLABLE = ("behaviour_log_prob", "value", "policy_version")
_SCALARS = {
    "reward": "float32",
    "behaviour_log_prob": "float32",
    "value": "float32",
    "policy_version": "int64",
    "learner_update": "int64",
    "greedy": "bool",
    "fallback": "bool",
    "environment_step": "int64",
}


@dataclass(frozen=True, slots=True)
class _Column:
    """One Arrow column: where it lives in `Columns`, and how its rows look."""

    name: str
    group: Group
    key: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    optional: bool = False  # a column of nulls stands for an absent leaf
    validity: str | None = None  # the bool column of `Columns` that says which rows are not null

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def arrow_field(self) -> pa.Field:
        """The field, with the row's shape in its metadata where it has axes."""
        kind = pa.from_numpy_dtype(self.dtype)
        nullable = self.optional or self.validity is not None
        if not self.shape:
            return pa.field(self.name, kind, nullable)
        listed = pa.list_(pa.field("item", kind, False), self.size)
        shape = msgspec.json.encode(self.shape)
        return pa.field(self.name, listed, nullable, metadata={b"shape": shape})


def _leaf_column(leaf: LeafSpec, group: Group) -> _Column:
    return _Column(leaf.name, group, leaf.name, leaf.numpy_dtype, leaf.shape)


def _final_columns(schema: RecordSchema) -> Iterator[_Column]:
    for leaf in schema.observation.leaves:
        yield _leaf_column(leaf, "observation")
    yield from _mask_columns(schema)


def _mask_columns(schema: RecordSchema) -> Iterator[_Column]:
    for name in schema.masked_leaves:
        shape = schema.action.leaf(name).mask_shape or ()
        yield _Column(mask_leaf_name(name), "action_mask", name, np.dtype(bool), shape, optional=True)


def _step_columns(schema: RecordSchema) -> Iterator[_Column]:
    for leaf in schema.observation.leaves:
        yield _leaf_column(leaf, "observation")
    for leaf in schema.action.leaves:
        yield _leaf_column(leaf, "action")
    single = np.dtype(np.float32)
    for leaf in schema.action.leaves:
        if leaf.kind == "box":
            name = policy_action_name(leaf.name)
            yield _Column(name, "policy_action", leaf.name, single, leaf.shape, optional=True)
    yield from _mask_columns(schema)
    for name, dtype in _SCALARS.items():
        validity = f"{name}_valid" if name in _NULLABLE else None
        yield _Column(name, "scalar", name, np.dtype(dtype), (), validity=validity)
        if name == "behaviour_log_prob" and schema.leaf_log_probs:
            for leaf in schema.action.leaves:
                column = leaf_log_prob_name(leaf.name)
                yield _Column(column, "leaf_log_prob", leaf.name, single, (), validity=validity)
    for name, dtype in schema.aux.items():
        yield _Column(f"aux.{name}", "aux", name, np.dtype(dtype), ())


# -- numpy to Arrow -----------------------------------------------------------------------------------------


def _bitmap(flags: NDArray[Any]) -> pa.Buffer:
    return pa.py_buffer(np.packbits(flags.reshape(-1), bitorder="little"))


def _plain_array(kind: pa.DataType, values: NDArray[Any], validity: pa.Buffer | None, nulls: int) -> pa.Array:
    data = _bitmap(values) if values.dtype == np.bool_ else pa.py_buffer(values)
    return pa.Array.from_buffers(kind, values.size, [validity, data], nulls)


def _arrow_array(column: _Column, kind: pa.DataType, values: NDArray[Any], valid: Any, rows: int) -> pa.Array:
    """One column; `valid` is None (all rows), or bool [rows]."""
    nulls = 0 if valid is None else rows - int(np.count_nonzero(valid))
    validity = _bitmap(valid) if nulls else None
    if not column.shape:
        return _plain_array(kind, values, validity, nulls)
    child = _plain_array(kind.value_type, values, None, 0)
    return pa.Array.from_buffers(kind, rows, [validity], nulls, children=[child])


def _checked(column: _Column, values: Any, rows: int) -> NDArray[Any]:
    if not isinstance(values, np.ndarray) or values.dtype != column.dtype:
        found = getattr(values, "dtype", type(values).__name__)
        raise InvalidTrajectory(f"{column.name}: dtype {found}, expected {column.dtype}", "column_dtype")
    if values.shape != (rows, *column.shape):
        expected = (rows, *column.shape)
        raise InvalidTrajectory(f"{column.name}: shape {values.shape}, expected {expected}", "column_shape")
    return np.ascontiguousarray(values)


class _Layout:
    """The columns of one kind of batch: encodes and decodes groups of arrays."""

    def __init__(self, columns: Iterator[_Column]) -> None:
        self.columns = tuple(columns)
        self.schema = pa.schema([column.arrow_field() for column in self.columns])
        self._types = [field.type for field in self.schema]

    def batch(self, groups: Mapping[Group, Mapping[str, Any]], rows: int) -> pa.RecordBatch:
        """The record batch of these arrays; groups hold [rows, …] arrays by key."""
        if rows < 1:
            raise InvalidTrajectory("a trajectory has at least one step", "no_steps")
        arrays = [
            self._array(column, kind, groups, rows)
            for column, kind in zip(self.columns, self._types, strict=True)
        ]
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)

    def _array(
        self, column: _Column, kind: pa.DataType, groups: Mapping[Group, Mapping[str, Any]], rows: int
    ) -> pa.Array:
        values = groups[column.group].get(column.key)
        if values is None and column.optional:
            absent = np.zeros(rows, np.bool_)
            return _arrow_array(column, kind, np.zeros((rows, *column.shape), column.dtype), absent, rows)
        if values is None:
            raise InvalidTrajectory(f"{column.name} is missing", "column_missing")
        valid = None
        if column.validity:
            flags = _Column(column.validity, "scalar", column.validity, np.dtype(bool), ())
            valid = _checked(flags, groups["scalar"].get(column.validity), rows)
        return _arrow_array(column, kind, _checked(column, values, rows), valid, rows)

    def decode(self, body: Bytes, rows: int) -> dict[Group, dict[str, NDArray[Any]]]:
        """The arrays of a serialised batch, read-only, without a copy where numpy has the same layout."""
        reader = BatchReader(body, rows)
        groups: dict[Group, dict[str, NDArray[Any]]] = {
            name: {} for name in ("observation", "action", "policy_action", "action_mask", "leaf_log_prob")
        }
        groups["aux"], groups["scalar"] = {}, {}
        for column in self.columns:
            valid, values = reader.column(column.name, column.dtype, column.shape)
            self._place(groups, column, valid, values, rows)
        reader.finish()
        return groups

    def _place(
        self,
        groups: dict[Group, dict[str, NDArray[Any]]],
        column: _Column,
        valid: NDArray[np.bool_] | None,
        values: NDArray[Any],
        rows: int,
    ) -> None:
        if column.group == "scalar" and column.validity:
            groups["scalar"][column.validity] = np.ones(rows, np.bool_) if valid is None else valid
        elif valid is not None and column.optional:
            if valid.any():
                raise InvalidTrajectory(f"{column.name}: null in some rows only", "nulls")
            return
        elif valid is not None and not column.validity:
            raise InvalidTrajectory(f"{column.name} has nulls", "nulls")
        groups[column.group][column.key] = values


# -- the codec of a schema ----------------------------------------------------------------------------------


def _column_groups(columns: Columns) -> dict[Group, Mapping[str, Any]]:
    scalars = {name: getattr(columns, name) for name in _SCALARS}
    scalars |= {f"{name}_valid": getattr(columns, f"{name}_valid") for name in _NULLABLE}
    return {
        "observation": columns.observation,
        "action": columns.action,
        "policy_action": columns.policy_action,
        "action_mask": columns.action_mask,
        "leaf_log_prob": columns.leaf_log_prob,
        "aux": columns.aux,
        "scalar": scalars,
    }


class RecordCodec:
    """Encodes and decodes the trajectories of one schema. Immutable; `codec_for` shares them.

    Raises:
        InvalidTrajectory: the schema is not valid, see `validation.validate_schema`.
    """

    def __init__(self, schema: RecordSchema) -> None:
        validate_schema(schema)
        self.schema = schema
        self._steps = _Layout(_step_columns(schema))
        self._final = _Layout(_final_columns(schema))

    @property
    def arrow_schema(self) -> pa.Schema:
        """The Arrow schema of a body."""
        return self._steps.schema

    def batch(self, columns: Columns) -> pa.RecordBatch:
        """The steps as a record batch.

        Raises:
            InvalidTrajectory: a column is missing or of another dtype or shape; names it.
        """
        return self._steps.batch(_column_groups(columns), len(columns.reward))

    def encode_columns(self, columns: Columns) -> bytes:
        """The steps as one serialised record batch; see `batch` for what it raises."""
        body: bytes = self.batch(columns).serialize().to_pybytes()
        return body

    def decode_columns(self, body: Bytes, steps: int) -> Columns:
        """The steps of a body; the arrays are read-only views into it where that is possible.

        Raises:
            InvalidTrajectory: the bytes are no batch of this schema with that many rows.
        """
        groups = self._steps.decode(body, steps)
        scalars = groups.pop("scalar")
        return Columns(**groups, **scalars)  # type: ignore[arg-type]

    def encode_final_observation(self, final: FinalObservation) -> bytes:
        """The final observation and its mask as a serialised batch of one row.

        Raises:
            InvalidTrajectory: a leaf is missing or of another dtype or shape; names it.
        """
        groups: dict[Group, Mapping[str, Any]] = {
            "observation": {name: np.asarray(leaf)[None] for name, leaf in final.observation.items()},
            "action_mask": {name: np.asarray(leaf)[None] for name, leaf in final.action_mask.items()},
        }
        encoded: bytes = self._final.batch(groups, 1).serialize().to_pybytes()
        return encoded

    def decode_final_observation(self, encoded: Bytes) -> FinalObservation:
        """The final observation of its bytes.

        Raises:
            InvalidTrajectory: the bytes are no final observation of this schema.
        """
        groups = self._final.decode(encoded, 1)
        return FinalObservation(
            observation={name: leaf[0, ...] for name, leaf in groups["observation"].items()},
            action_mask={name: leaf[0, ...] for name, leaf in groups["action_mask"].items()},
        )


@lru_cache(maxsize=64)
def _cached_codec(encoded_schema: bytes) -> RecordCodec:
    return RecordCodec(decode_schema(encoded_schema))


def codec_for(schema: RecordSchema) -> RecordCodec:
    """The shared codec of a schema; see `RecordCodec`. Keep it where many trajectories share a schema."""
    return _cached_codec(encode_schema(schema))


def encode_schema(schema: RecordSchema) -> bytes:
    """The schema as msgpack: the payload of put_schema, and what its digest is of."""
    return msgspec.msgpack.encode(schema)


def decode_schema(encoded: Bytes) -> RecordSchema:
    """The schema of its msgpack.

    Raises:
        InvalidTrajectory: the bytes are no schema.
    """
    try:
        return msgspec.msgpack.decode(encoded, type=RecordSchema)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as exc:
        raise InvalidTrajectory(f"these bytes are no record schema: {exc}", "schema") from exc


def schema_digest(schema: RecordSchema) -> str:
    """BLAKE3 (hex) of the schema's msgpack."""
    return blake3(encode_schema(schema)).hexdigest()


def body_digest(body: Bytes, final_observation: Bytes | None) -> str:
    """BLAKE3 (hex) of the payload frames: the body, then the final observation if there is one."""
    hasher = blake3(body)
    if final_observation:
        hasher.update(final_observation)
    return hasher.hexdigest()


def arrow_schema(schema: RecordSchema) -> pa.Schema:
    """The Arrow schema of a body."""
    return codec_for(schema).arrow_schema


def encode_columns(schema: RecordSchema, columns: Columns) -> bytes:
    """See `RecordCodec.encode_columns`."""
    return codec_for(schema).encode_columns(columns)


def decode_columns(schema: RecordSchema, body: Bytes, steps: int) -> Columns:
    """See `RecordCodec.decode_columns`."""
    return codec_for(schema).decode_columns(body, steps)


def encode_final_observation(schema: RecordSchema, final: FinalObservation) -> bytes:
    """See `RecordCodec.encode_final_observation`."""
    return codec_for(schema).encode_final_observation(final)


def decode_final_observation(schema: RecordSchema, encoded: Bytes) -> FinalObservation:
    """See `RecordCodec.decode_final_observation`."""
    return codec_for(schema).decode_final_observation(encoded)


# -- files --------------------------------------------------------------------------------------------------


def to_table(schema: RecordSchema, trajectory: Trajectory) -> pa.Table:
    """The trajectory as an Arrow table that carries its metadata, schema and final observation.

    Raises:
        InvalidTrajectory: a column does not fit the schema.
    """
    codec = codec_for(schema)
    metadata = {
        _METADATA_KEY: msgspec.json.encode(trajectory.metadata),
        _SCHEMA_KEY: msgspec.json.encode(schema),
    }
    if trajectory.final_observation is not None:
        final = codec.encode_final_observation(trajectory.final_observation)
        metadata[_FINAL_KEY] = base64.b64encode(final)
    table = pa.Table.from_batches([codec.batch(trajectory.columns)])
    return table.replace_schema_metadata(metadata)


def from_table(table: pa.Table) -> tuple[RecordSchema, Trajectory]:
    """What `to_table` made, back.

    Raises:
        InvalidTrajectory: the table is not one of ours.
    """
    metadata = table.schema.metadata or {}
    try:
        schema = msgspec.json.decode(metadata[_SCHEMA_KEY], type=RecordSchema)
        description = msgspec.json.decode(metadata[_METADATA_KEY], type=TrajectoryMetadata)
        final = base64.b64decode(metadata[_FINAL_KEY]) if _FINAL_KEY in metadata else None
    except (KeyError, ValueError) as exc:
        raise InvalidTrajectory(f"the table carries no trajectory of ours: {exc}", "schema") from exc
    codec = codec_for(schema)
    if not table.schema.equals(codec.arrow_schema):
        raise InvalidTrajectory("the table's columns differ from its recorded schema", "schema")
    body = table.combine_chunks().to_batches()[0].serialize() if table.num_rows else b""
    columns = codec.decode_columns(memoryview(body), description.steps)
    observation = None if final is None else codec.decode_final_observation(final)
    return schema, Trajectory(metadata=description, columns=columns, final_observation=observation)
