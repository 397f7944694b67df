"""Checkpoints: all that a learner resumes from, in one file that appears whole or not at all (contracts G).

The learner writes one before every publication and reads the newest at its start. A file is a magic, the
BLAKE3 digest of the rest, and msgpack with the tensors as safetensors in it: no pickle.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3

from relayrl_shared import logs
from relayrl_shared.errors import LeaseLost, RelayRLError, StorageFull
from relayrl_shared.policy.manifest import PolicyManifest
from relayrl_shared.store.interface import Use

CHECKPOINT_FORMAT = 1
_MAGIC = b"RELAYRLC"
_DIGEST_BYTES = 32
_NAME = re.compile(r"checkpoint-(\d{12})\.relayrl")
_FENCE = "fence"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

LOG = logs.get_logger(__name__)


class CheckpointError(RelayRLError):
    """A checkpoint that cannot be used: damaged, of another format, or of another run."""

    code = "checkpoint"


class Publication(msgspec.Struct, kw_only=True, frozen=True):
    """An update on its way out: to the registry, then to the store. The graph is kept apart, by its digest.

    policy_version: None until the registry gave one. recorded: the use rows are in the store.
    """

    manifest: PolicyManifest
    weights: bytes
    golden: bytes
    uses: tuple[Use, ...]
    parent_lineage_id: str | None = None
    policy_version: int | None = None
    recorded: bool = False

    @property
    def learner_update(self) -> int:
        """The update that it publishes."""
        return self.manifest.learner_update

    @property
    def settled(self) -> bool:
        """Whether registry and store have it."""
        return self.recorded and self.policy_version is not None


class Checkpoint(msgspec.Struct, kw_only=True, frozen=True):
    """The algorithm's tensors and values, the sampler, what is still to be published (contracts G1).

    tensors: safetensors of the algorithm's state. graph_digest names `graph-<digest>.onnx` beside it.
    """

    format: int = CHECKPOINT_FORMAT
    run_id: str
    lineage_id: str
    parent_lineage_id: str | None
    learner_update: int
    fencing_token: int
    graph_digest: str
    tensors: bytes
    values: dict[str, Any]
    sampler: dict[str, Any]
    progress: dict[str, Any]
    publications: tuple[Publication, ...]
    created_at: float = 0.0


def encode_checkpoint(checkpoint: Checkpoint) -> bytes:
    """The bytes of a checkpoint file."""
    body = msgspec.msgpack.encode(checkpoint)
    return b"".join((_MAGIC, blake3(body).digest(), body))


def decode_checkpoint(data: bytes) -> Checkpoint:
    """The inverse of `encode_checkpoint`.

    Raises:
        CheckpointError: the bytes are not a whole checkpoint of this format.
    """
    view = memoryview(data)
    body = view[len(_MAGIC) + _DIGEST_BYTES :]
    if bytes(view[: len(_MAGIC)]) != _MAGIC:
        raise CheckpointError("it does not begin like a checkpoint")
    if blake3(body).digest() != bytes(view[len(_MAGIC) : len(_MAGIC) + _DIGEST_BYTES]):
        raise CheckpointError("its bytes do not hash to its digest: it is damaged or cut off")
    try:
        checkpoint = msgspec.msgpack.decode(body, type=Checkpoint)
    except msgspec.DecodeError as error:
        raise CheckpointError(f"it does not decode: {error}") from error
    if checkpoint.format != CHECKPOINT_FORMAT:
        raise CheckpointError(f"it is of format {checkpoint.format}; this code reads {CHECKPOINT_FORMAT}")
    return checkpoint


class CheckpointDirectory:
    """The checkpoints of one run. One learner writes at a time: an older fencing token is refused.

    Args:
        directory: made if it is not there.
        retention: how many checkpoints are kept, at least 2.
    """

    def __init__(self, directory: Path, retention: int) -> None:
        self.directory = directory
        self.retention = max(2, retention)
        directory.mkdir(parents=True, exist_ok=True)

    def fence(self, token: int) -> None:
        """Refuses every older token from now on.

        Raises:
            LeaseLost: a newer one was here before.
        """
        self._check_fence(token)
        self._write(_FENCE, str(token).encode())

    def save(self, checkpoint: Checkpoint) -> Path:
        """Writes a checkpoint durably, then drops the oldest beyond the retention.

        Raises:
            LeaseLost: a learner with a newer token was here.
            StorageFull: disk, quota or limit of file sizes is reached; the checkpoints before are whole.
            OSError: the disk refuses for another reason.
        """
        self._check_fence(checkpoint.fencing_token)
        path = self._write(
            f"checkpoint-{checkpoint.learner_update:012d}.relayrl", encode_checkpoint(checkpoint)
        )
        for old in self._paths()[: -self.retention]:
            old.unlink(missing_ok=True)
        return path

    def newest(self, run_id: str) -> tuple[Checkpoint, bool] | None:
        """The newest checkpoint that can be used, and whether it is the newest there is; None without any.

        One that is damaged or cannot be read is logged, renamed to `.damaged` and passed over.

        Raises:
            CheckpointError: a checkpoint of another run lies here.
        """
        paths = self._paths()
        is_newest = not paths or all(damaged.stem <= paths[-1].stem for damaged in self._damaged())
        for path in reversed(paths):
            checkpoint = _read(path)
            if checkpoint is None:
                is_newest = False
                continue
            if checkpoint.run_id != run_id:
                raise CheckpointError(f"{path} is of run {checkpoint.run_id}, not {run_id}")
            return checkpoint, is_newest
        return None

    def save_graph(self, digest: str, graph: bytes) -> None:
        """Keeps a graph by its digest."""
        if self.graph(digest) is None:
            self._write(f"graph-{digest}.onnx", graph)

    def graph(self, digest: str) -> bytes | None:
        """A graph that was kept; None if there is none or its bytes are damaged."""
        path = self.directory / f"graph-{digest}.onnx"
        if not path.is_file():
            return None
        graph = path.read_bytes()
        return graph if blake3(graph).hexdigest() == digest else None

    def _paths(self) -> list[Path]:
        """The checkpoint files, oldest first."""
        return sorted(path for path in self.directory.iterdir() if _NAME.fullmatch(path.name))

    def _damaged(self) -> list[Path]:
        """What an earlier start passed over."""
        return [path for path in self.directory.iterdir() if path.suffix == ".damaged"]

    def _check_fence(self, token: int) -> None:
        path = self.directory / _FENCE
        if path.is_file() and int(path.read_text()) > token:
            raise LeaseLost(f"{self.directory}: a learner with a newer token than {token} writes here now")

    def _write(self, name: str, data: bytes) -> Path:
        """Temporary file, fsync, rename, directory fsync."""
        path = self.directory / name
        temporary = self.directory / f".{name}.tmp"
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
            sync_directory(self.directory)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if error.errno not in _FULL:
                raise
            raise StorageFull(
                f"{path}: {error.strerror or error}; make space, then it is tried again"
            ) from error
        return path


def _read(path: Path) -> Checkpoint | None:
    """The checkpoint of a file; None, and the file out of the way, where there is no use in it."""
    try:
        return decode_checkpoint(path.read_bytes())
    except (CheckpointError, OSError) as error:
        LOG.error("checkpoint not usable, the one before it is taken", path=str(path), reason=str(error))
    try:
        path.rename(path.with_suffix(".damaged"))
    except OSError as error:
        LOG.error("the checkpoint cannot be put aside either", path=str(path), reason=str(error))
    return None


def sync_directory(directory: Path) -> None:
    """Makes renames in a directory durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unsettled(publications: tuple[Publication, ...]) -> Iterator[Publication]:
    """Those that registry or store do not have yet, in order."""
    return (publication for publication in publications if not publication.settled)
