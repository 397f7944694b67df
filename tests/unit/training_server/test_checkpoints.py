"""Checkpoint files: whole or not at all, in order, fenced, and never taken on trust."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relayrl_shared.errors import LeaseLost, StorageFull
from relayrl_shared.testing.registry import opaque_artefact
from relayrl_training_server.checkpoints import (
    Checkpoint,
    CheckpointDirectory,
    CheckpointError,
    Publication,
    decode_checkpoint,
    encode_checkpoint,
)


def make(update: int = 1, **changes: Any) -> Checkpoint:
    """A small checkpoint."""
    artefact = opaque_artefact(learner_update=update)
    publication = Publication(
        manifest=artefact.manifest, weights=artefact.weights, golden=artefact.golden, uses=()
    )
    fields: dict[str, Any] = {
        "run_id": "run",
        "lineage_id": "lineage",
        "parent_lineage_id": None,
        "learner_update": update,
        "fencing_token": 1,
        "graph_digest": "graph",
        "tensors": b"tensors" * update,
        "values": {"updates": update},
        "sampler": {"pool": {"cursor": 7, "decided": [9]}},
        "progress": {},
        "publications": (publication,),
    }
    return Checkpoint(**{**fields, **changes})


def test_a_checkpoint_reads_back_equal() -> None:
    """Publications with their manifests, weights and golden vectors included."""
    assert decode_checkpoint(encode_checkpoint(make(3))) == make(3)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_damaged_checkpoint_is_taken(data: st.DataObject) -> None:
    """Whatever byte is changed, and wherever the file is cut, reading it is a typed error."""
    encoded = bytearray(encode_checkpoint(make()))
    where = data.draw(st.integers(0, len(encoded) - 1))
    if data.draw(st.booleans()):
        encoded[where] ^= data.draw(st.integers(1, 255))
    else:
        del encoded[where:]

    with pytest.raises(CheckpointError):
        decode_checkpoint(bytes(encoded))


@pytest.mark.parametrize("body", [b"\x80", msgspec.msgpack.encode({"format": 1}), b""])
def test_a_body_of_something_else_is_refused(body: bytes) -> None:
    """A right digest over wrong content is a typed error too."""
    with pytest.raises(CheckpointError, match="decode"):
        decode_checkpoint(b"RELAYRLC" + blake3(body).digest() + body)


def test_a_newer_format_is_refused_by_number() -> None:
    """The message names both formats."""
    with pytest.raises(CheckpointError, match="format 2; this code reads 1"):
        decode_checkpoint(encode_checkpoint(make(format=2)))


def test_the_newest_is_taken_and_the_oldest_go(tmp_path: Path) -> None:
    """Retention keeps the newest, by update and not by time."""
    directory = CheckpointDirectory(tmp_path, retention=2)
    for update in (9, 10, 11):
        directory.save(make(update))

    assert directory.newest("run") == (make(11), True)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-000000000010.relayrl",
        "checkpoint-000000000011.relayrl",
    ]


@pytest.mark.parametrize("damage", [b"", b"RELAYRLC and then nothing", None])
def test_a_damaged_newest_gives_way_to_the_one_before(tmp_path: Path, damage: bytes | None) -> None:
    """It is set aside, and the caller is told that the newest was not taken (contracts G1)."""
    directory = CheckpointDirectory(tmp_path, retention=3)
    directory.save(make(1))
    path = directory.save(make(2))
    path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)

    assert directory.newest("run") == (make(1), False)
    assert [p.name for p in tmp_path.glob("*.damaged")] == ["checkpoint-000000000002.damaged"]
    assert directory.newest("run") == (make(1), False)  # the start after that one may have died in between


def test_an_empty_directory_has_none(tmp_path: Path) -> None:
    """A first start finds nothing, whatever else lies there."""
    directory = CheckpointDirectory(tmp_path / "new", retention=2)
    (tmp_path / "new" / "checkpoint-1.relayrl.tmp").write_bytes(b"half")

    assert directory.newest("run") is None


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    """A directory that was mixed up is an error, not a resume."""
    directory = CheckpointDirectory(tmp_path, retention=2)
    directory.save(make())

    with pytest.raises(CheckpointError, match="of run run, not other"):
        directory.newest("other")


def test_an_older_token_is_fenced_off(tmp_path: Path) -> None:
    """Once a newer learner was here, the older one can neither fence nor write (contracts G2)."""
    older, newer = CheckpointDirectory(tmp_path, retention=2), CheckpointDirectory(tmp_path, retention=2)
    older.fence(3)
    newer.fence(4)
    newer.save(make(fencing_token=4))

    with pytest.raises(LeaseLost):
        older.save(make(2, fencing_token=3))
    with pytest.raises(LeaseLost):
        older.fence(3)
    assert newer.newest("run") == (make(fencing_token=4), True)


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Writes beyond this size fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_checkpoints_before_it(tmp_path: Path) -> None:
    """A write that fails is a typed, retryable error, and leaves no half file behind."""
    directory = CheckpointDirectory(tmp_path, retention=2)
    directory.save(make(1))
    with files_no_larger_than(100), pytest.raises(StorageFull) as raised:
        directory.save(make(2))

    assert raised.value.retryable
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000000000001.relayrl"]
    assert directory.newest("run") == (make(1), True)


def test_a_disk_that_refuses_for_another_reason_is_not_called_full(tmp_path: Path) -> None:
    """Making space would not help: the error says what the disk said."""
    directory = CheckpointDirectory(tmp_path, retention=2)
    (tmp_path / "checkpoint-000000000001.relayrl").mkdir()

    with pytest.raises(IsADirectoryError):
        directory.save(make(1))

    assert list(tmp_path.glob(".*.tmp")) == []


def test_a_newest_that_cannot_be_read_gives_way_to_the_one_before(tmp_path: Path) -> None:
    """An error of the disk is as good as damage: it is set aside, and the caller is told."""
    directory = CheckpointDirectory(tmp_path, retention=3)
    directory.save(make(1))
    (tmp_path / "checkpoint-000000000002.relayrl").mkdir()

    assert directory.newest("run") == (make(1), False)
    assert [p.name for p in tmp_path.glob("*.damaged")] == ["checkpoint-000000000002.damaged"]


def test_graphs_are_kept_by_digest(tmp_path: Path) -> None:
    """A graph comes back if its bytes are whole, else not at all."""
    directory = CheckpointDirectory(tmp_path, retention=2)
    graph = b"a graph"
    name = blake3(graph).hexdigest()
    directory.save_graph(name, graph)

    assert directory.graph(name) == graph
    assert directory.graph("0" * 64) is None
    (tmp_path / f"graph-{name}.onnx").write_bytes(b"a gr")
    assert directory.graph(name) is None
    directory.save_graph(name, graph)
    assert directory.graph(name) == graph


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8, unique=True), st.integers(2, 4))
def test_whatever_the_order_the_highest_updates_stay(
    tmp_path_factory: pytest.TempPathFactory, updates: list[int], retention: int
) -> None:
    """Writing in order keeps exactly the last ones."""
    path = tmp_path_factory.mktemp("checkpoints")
    directory = CheckpointDirectory(path, retention)
    for update in sorted(updates):
        directory.save(make(update))

    kept = [decode_checkpoint(p.read_bytes()).learner_update for p in sorted(path.glob("*.relayrl"))]
    assert kept == sorted(updates)[-retention:]
