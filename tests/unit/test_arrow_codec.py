"""The codec: any trajectory reads back equal in every bit; bytes that are none are refused."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from relayrl_shared.arrow_codec import (
    RecordCodec,
    arrow_schema,
    body_digest,
    codec_for,
    decode_columns,
    decode_final_observation,
    decode_schema,
    encode_columns,
    encode_final_observation,
    encode_schema,
    from_table,
    schema_digest,
    to_table,
)
from relayrl_shared.errors import InvalidTrajectory
from relayrl_shared.spaces import ActionSpec, LeafSpec, ObservationSpec
from relayrl_shared.testing.trajectories import (
    make_metadata,
    make_trajectory,
    random_columns,
    random_final_observation,
    small_schema,
)
from relayrl_shared.trajectory import Columns, RecordSchema, Trajectory

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
DTYPES = ["bool", "float16", "float32", "float64", *INTEGERS]
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@st.composite
def leaf_specs(draw: st.DrawFn, name: str) -> LeafSpec:
    """A leaf of any kind."""
    kind = draw(st.sampled_from(["box", "box", "discrete", "multi_discrete", "multi_binary"]))
    if kind == "box":
        return LeafSpec(name=name, kind="box", shape=draw(shapes), dtype=draw(st.sampled_from(DTYPES)))
    if kind == "multi_binary":
        return LeafSpec(name=name, kind="multi_binary", shape=(draw(st.integers(1, 9)),), dtype="int8")
    nvec = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    if kind == "discrete":
        return LeafSpec(name=name, kind="discrete", shape=(), dtype="int64", nvec=nvec[:1], start=(-1,))
    start, shape = (3,) * len(nvec), (len(nvec),)
    return LeafSpec(name=name, kind="multi_discrete", shape=shape, dtype="int32", nvec=nvec, start=start)


@st.composite
def schemas(draw: st.DrawFn) -> RecordSchema:
    """A schema of up to three leaves a side, some masked, with aux columns."""
    sides = {}
    for root in ("observation", "action"):
        count = draw(st.integers(1, 3))
        sides[root] = tuple(draw(leaf_specs(name=f"{root}.{number}")) for number in range(count))
    maskable = [leaf.name for leaf in sides["action"] if leaf.kind != "box"]
    masked = draw(st.lists(st.sampled_from(maskable), unique=True)) if maskable else []
    return RecordSchema(
        observation=ObservationSpec(leaves=sides["observation"]),
        action=ActionSpec(leaves=sides["action"]),
        masked_leaves=tuple(masked),
        leaf_log_probs=draw(st.booleans()),
        aux=draw(st.dictionaries(st.sampled_from(["a", "b"]), st.sampled_from(DTYPES))),
    )


seeds = st.integers(0, 2**32 - 1)


def bits(arrays: Mapping[str, NDArray[Any]]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of every array."""
    return {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in arrays.items()}


def all_bits(columns: Columns) -> dict[str, Any]:
    """Dtype, shape and bytes of everything in the columns."""
    values = {field.name: getattr(columns, field.name) for field in fields(columns)}
    return {name: bits(value if isinstance(value, dict) else {"": value}) for name, value in values.items()}


@settings(max_examples=40, deadline=None)
@given(schemas(), st.integers(1, 40), seeds)
def test_columns_read_back_in_every_bit(schema: RecordSchema, steps: int, seed: int) -> None:
    """NaN payloads, what lies under nulls, absent masks and every dtype survive."""
    columns = random_columns(schema, steps, np.random.default_rng(seed))

    decoded = decode_columns(schema, encode_columns(schema, columns), steps)

    assert all_bits(columns) == all_bits(decoded)


@settings(max_examples=25, deadline=None)
@given(schemas(), seeds)
def test_final_observation_reads_back_in_every_bit(schema: RecordSchema, seed: int) -> None:
    """The final observation and its mask survive, a mask that allows nothing included."""
    final = random_final_observation(schema, np.random.default_rng(seed))

    decoded = decode_final_observation(schema, encode_final_observation(schema, final))

    assert bits(final.observation) == bits(decoded.observation)
    assert bits(final.action_mask) == bits(decoded.action_mask)


@settings(max_examples=15, deadline=None)
@given(schemas(), st.integers(1, 9), seeds, st.booleans())
def test_table_reads_back(schema: RecordSchema, steps: int, seed: int, with_final: bool) -> None:
    """A table, also after an IPC file, gives schema, metadata, columns and final observation back."""
    rng = np.random.default_rng(seed)
    final = random_final_observation(schema, rng) if with_final else None
    trajectory = Trajectory(make_metadata(steps, seed=seed), random_columns(schema, steps, rng), final)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, to_table(schema, trajectory).schema) as writer:
        writer.write_table(to_table(schema, trajectory))

    read_schema, read = from_table(pa.ipc.open_file(sink.getvalue()).read_all())

    assert (schema, trajectory.metadata) == (read_schema, read.metadata)
    assert all_bits(trajectory.columns) == all_bits(read.columns)
    assert (read.final_observation is not None) == with_final


@settings(max_examples=20, deadline=None)
@given(schemas())
def test_schema_reads_back(schema: RecordSchema) -> None:
    """A schema's msgpack gives the schema, and equal schemas have equal digests."""
    decoded = decode_schema(encode_schema(schema))

    assert schema == decoded
    assert schema_digest(schema) == schema_digest(decoded)


def test_arrow_itself_reads_the_body() -> None:
    """The body is an ordinary record batch of the published Arrow schema, nulls included."""
    schema = small_schema(masked=True)
    columns = random_columns(schema, 5, np.random.default_rng(0))
    columns.value_valid[:] = [True, False, True, False, True]

    batch = pa.ipc.read_record_batch(pa.py_buffer(encode_columns(schema, columns)), arrow_schema(schema))

    batch.validate(full=True)
    assert batch.column("value").null_count == 2
    assert batch.column("reward").to_numpy().tobytes() == columns.reward.tobytes()
    assert batch.schema.field("observation").type.list_size == 4


def test_decoding_does_not_copy_and_is_read_only() -> None:
    """Decoded arrays are views into the body that nobody can write through."""
    schema = small_schema()
    body = encode_columns(schema, random_columns(schema, 5, np.random.default_rng(0)))

    reward = decode_columns(schema, body, 5).reward

    assert not reward.flags.writeable
    assert not reward.flags.owndata


def test_digests_are_pinned() -> None:
    """Schema and body digests are the same in every release; stores are keyed by them."""
    schema = small_schema()

    assert schema_digest(schema) == "54f496c0f78fb29eabfeec3a27b295d5958b10b13eb6dc2ec625d3dfdaf34354"
    assert (
        body_digest(b"body", None)
        == body_digest(b"body", b"")
        == "0be9c598ae63835518e7fb422dc3027f452d75f3dbdb94c90d843298b1180ad9"
    )
    assert body_digest(b"bo", b"dy") == body_digest(b"body", None)


def damage(change: str) -> Columns:
    """Columns with one thing wrong."""
    columns = random_columns(small_schema(), 4, np.random.default_rng(0))
    if change == "missing":
        columns.observation = {}
    elif change == "dtype":
        columns.reward = columns.reward.astype(np.float64)
    elif change == "shape":
        columns.value = columns.value[:3]
    elif change == "no_steps":
        columns = random_columns(small_schema(), 0, np.random.default_rng(0))
    return columns


@pytest.mark.parametrize(
    ("change", "reason", "names"),
    [
        ("missing", "column_missing", "observation"),
        ("dtype", "column_dtype", "reward: dtype float64"),
        ("shape", "column_shape", r"value: shape \(3,\)"),
        ("no_steps", "no_steps", "at least one step"),
    ],
)
def test_columns_that_do_not_fit_are_refused(change: str, reason: str, names: str) -> None:
    """Encoding names the column that is wrong."""
    with pytest.raises(InvalidTrajectory, match=names) as caught:
        encode_columns(small_schema(), damage(change))

    assert caught.value.reason == reason


def mutations(body: bytes, rng: np.random.Generator) -> Iterator[bytes]:
    """Garbage: cut, stretched, and with bytes overwritten, most of them in the metadata."""
    for _ in range(150):
        damaged = bytearray(body)
        for _ in range(rng.integers(1, 4)):
            limit = len(body) if rng.random() < 0.2 else 700
            damaged[rng.integers(0, min(limit, len(body)))] = rng.choice([0, 1, 2, 127, 128, 255])
        yield bytes(damaged)
    for _ in range(30):
        yield body[: rng.integers(0, len(body))]
    yield body + b"\0" * 8
    yield rng.bytes(200)


@settings(max_examples=5, deadline=None)
@given(seeds)
def test_hostile_bytes_are_refused_or_read_within_bounds(seed: int) -> None:
    """Damaged bytes raise InvalidTrajectory or give arrays of exactly the schema's shapes: nothing else."""
    schema, rng = small_schema(masked=True), np.random.default_rng(seed)
    body = encode_columns(schema, random_columns(schema, 9, rng))
    codec = codec_for(schema)
    for damaged in mutations(body, rng):
        try:
            columns = codec.decode_columns(damaged, 9)
        except InvalidTrajectory:
            continue
        assert columns.observation["observation"].shape == (9, 4)


def test_compressed_body_is_refused() -> None:
    """Compression could claim any size; it is refused before anything is unpacked."""
    schema = small_schema()
    codec = RecordCodec(schema)
    batch = codec.batch(random_columns(schema, 64, np.random.default_rng(0)))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(batch)
    reader = pa.ipc.MessageReader.open_stream(sink.getvalue())
    body = next(message for message in reader if message.type == "record batch").serialize().to_pybytes()

    with pytest.raises(InvalidTrajectory, match="compressed"):
        codec.decode_columns(body, 64)


@pytest.mark.parametrize("steps", [3, 5, 0, -1, 2**62])
def test_other_number_of_steps_is_refused(steps: int) -> None:
    """A body of four steps is not a body of another number of them."""
    schema = small_schema()
    body = encode_columns(schema, random_columns(schema, 4, np.random.default_rng(0)))

    with pytest.raises(InvalidTrajectory) as caught:
        decode_columns(schema, body, steps)

    assert caught.value.reason in ("steps_mismatch", "no_steps")


@pytest.mark.parametrize("other", [small_schema(5), small_schema(masked=True)])
def test_body_of_another_schema_is_refused(other: RecordSchema) -> None:
    """Another width, or a column more, is noticed."""
    body = encode_columns(other, random_columns(other, 4, np.random.default_rng(0)))

    with pytest.raises(InvalidTrajectory):
        decode_columns(small_schema(), body, 4)


def test_mask_that_is_null_in_some_rows_is_refused() -> None:
    """A mask is there for all steps or for none."""
    schema = small_schema(masked=True)
    batch = RecordCodec(schema).batch(random_columns(schema, 2, np.random.default_rng(0)))
    index = batch.schema.get_field_index("action_mask")
    kind = batch.schema.field(index).type
    flags = pa.array([True, False, True, True])
    mask = pa.FixedSizeListArray.from_arrays(flags, type=kind, mask=pa.array([False, True]))
    batch = batch.set_column(index, batch.schema.field(index), mask)

    with pytest.raises(InvalidTrajectory, match="some rows only"):
        decode_columns(schema, batch.serialize().to_pybytes(), 2)


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"observation": 1}),
        b"\x91" * 100_000,
        encode_schema(small_schema())[:-3],
    ],
)
def test_bytes_that_are_no_schema_are_refused(encoded: bytes) -> None:
    """Garbage in place of a schema is a typed error."""
    with pytest.raises(InvalidTrajectory):
        decode_schema(encoded)


def test_foreign_table_is_refused() -> None:
    """A table without our metadata, and one whose columns were changed, are typed errors."""
    table = to_table(small_schema(), make_trajectory(small_schema(), 3))

    with pytest.raises(InvalidTrajectory, match="carries no trajectory"):
        from_table(pa.table({"a": [1]}))
    with pytest.raises(InvalidTrajectory, match="differ"):
        from_table(table.drop_columns(["value"]))


def test_error_survives_pickling() -> None:
    """The reason crosses processes with the message."""
    error = pickle.loads(pickle.dumps(InvalidTrajectory("what", "why")))

    assert (str(error), error.reason) == ("what", "why")
