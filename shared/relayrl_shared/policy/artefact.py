"""Policy artefacts as bytes and as directories: digests, saving, loading, packing for caches.

Driven by the learner (checkpoints and publication), the model registry (its cache) and the command line.
Nothing here runs a model: `engine.load_policy` does, and checks the digests again.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from pathlib import Path
from urllib.parse import quote

import msgspec
from blake3 import blake3

from relayrl_shared.errors import ArtefactError, DigestMismatch
from relayrl_shared.policy.manifest import MANIFEST_FORMAT, PolicyArtefact, PolicyManifest

MANIFEST_FILE = "manifest.json"
GRAPH_FILE = "graph.onnx"
WEIGHTS_FILE = "weights.safetensors"
GOLDEN_FILE = "golden.safetensors"
MAX_MANIFEST_BYTES = 4 << 20
MAX_GRAPH_BYTES = 256 << 20
MAX_WEIGHTS_BYTES = 1 << 30
MAX_GOLDEN_BYTES = 256 << 20

_LIMITS = {
    MANIFEST_FILE: MAX_MANIFEST_BYTES,
    GRAPH_FILE: MAX_GRAPH_BYTES,
    WEIGHTS_FILE: MAX_WEIGHTS_BYTES,
    GOLDEN_FILE: MAX_GOLDEN_BYTES,
}


def digest(data: bytes) -> str:
    """BLAKE3 of the bytes, in hex."""
    return blake3(data).hexdigest()


def encode_manifest(manifest: PolicyManifest) -> bytes:
    """The manifest as JSON, indented for people."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2)


def decode_manifest(data: bytes) -> PolicyManifest:
    """The manifest that `encode_manifest` wrote.

    Raises:
        ArtefactError: it is too large, does not parse, or is of a newer format than this code.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise ArtefactError(f"the manifest has {len(data)} bytes; the limit is {MAX_MANIFEST_BYTES}")
    try:
        manifest = msgspec.json.decode(data, type=PolicyManifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ArtefactError(f"the manifest does not parse: {error}") from error
    return _known_format(manifest)


def _known_format(manifest: PolicyManifest) -> PolicyManifest:
    if not 1 <= manifest.format <= MANIFEST_FORMAT:
        raise ArtefactError(
            f"manifest format {manifest.format} is not known here (1 to {MANIFEST_FORMAT}): update RelayRL"
        )
    return manifest


def check_digests(artefact: PolicyArtefact) -> None:
    """Compare graph, weights and golden vectors with the manifest's sizes and digests.

    Raises:
        ArtefactError: a part is larger than its limit.
        DigestMismatch: a part does not hash to its digest.
    """
    manifest = artefact.manifest
    parts = (
        (GRAPH_FILE, artefact.graph, manifest.graph_digest),
        (WEIGHTS_FILE, artefact.weights, manifest.weights_digest),
        (GOLDEN_FILE, artefact.golden, manifest.golden_digest),
    )
    for name, data, expected in parts:
        if len(data) > _LIMITS[name]:
            raise ArtefactError(f"{name} has {len(data)} bytes; the limit is {_LIMITS[name]}")
        actual = digest(data)
        if actual != expected:
            raise DigestMismatch(
                f"{name} of {describe(manifest)} hashes to {actual[:16]}…, its manifest says {expected[:16]}…"
            )


def describe(manifest: PolicyManifest) -> str:
    """The version's name for messages, e.g. `cartpole version 7`."""
    version = "unpublished" if manifest.policy_version is None else f"version {manifest.policy_version}"
    return f"policy {manifest.policy} {version} (learner update {manifest.learner_update})"


def artefact_directory(root: Path, policy: str, policy_version: int) -> Path:
    """Where a version lies below `root`. Whatever the policy is named, the path does not leave `root`."""
    if not policy:
        raise ArtefactError("a policy needs a name")
    return root / f"policy-{quote(policy, safe='', errors='surrogatepass')}" / f"{int(policy_version):09d}"


def save_artefact(artefact: PolicyArtefact, directory: Path) -> None:
    """Write the artefact as a directory: whole or not at all, also if the power fails.

    A directory that holds the same artefact already is left as it is.

    Raises:
        DigestMismatch: the artefact's parts do not match its manifest.
        ArtefactError: the directory exists with other content; versions are immutable.
    """
    check_digests(artefact)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.parent / f".{directory.name}.{secrets.token_hex(8)}.tmp"
    temporary.mkdir()
    try:
        for name, data in _files(artefact).items():
            _write_durably(temporary / name, data)
        _sync_directory(temporary)
        _move_into_place(temporary, directory, artefact)
        _sync_directory(directory.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _files(artefact: PolicyArtefact) -> dict[str, bytes]:
    return {
        GRAPH_FILE: artefact.graph,
        WEIGHTS_FILE: artefact.weights,
        GOLDEN_FILE: artefact.golden,
        MANIFEST_FILE: encode_manifest(artefact.manifest),
    }


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(temporary: Path, directory: Path, artefact: PolicyArtefact) -> None:
    try:
        temporary.rename(directory)
    except OSError as error:
        if not directory.is_dir():
            raise
        if load_artefact(directory).manifest != artefact.manifest:
            raise ArtefactError(
                f"{directory} holds another artefact; versions are immutable: choose another directory"
            ) from error


def load_artefact(directory: Path) -> PolicyArtefact:
    """Read an artefact that `save_artefact` wrote. The digests are checked when it is loaded into an engine.

    Raises:
        ArtefactError: a file is missing, too large or not a plain file, or the manifest does not parse.
    """
    parts = {name: _read_plain_file(directory / name, limit) for name, limit in _LIMITS.items()}
    return PolicyArtefact(
        manifest=decode_manifest(parts[MANIFEST_FILE]),
        graph=parts[GRAPH_FILE],
        weights=parts[WEIGHTS_FILE],
        golden=parts[GOLDEN_FILE],
    )


def _read_plain_file(path: Path, limit: int) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read as a file of an artefact: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ArtefactError(f"{path} is not a plain file")
        if status.st_size > limit:
            raise ArtefactError(f"{path} has {status.st_size} bytes; the limit is {limit}")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(limit)
    finally:
        os.close(descriptor)


def pack_artefact(artefact: PolicyArtefact) -> bytes:
    """The artefact as one msgpack value, for caches that keep one file a version."""
    return msgspec.msgpack.encode(artefact)


def unpack_artefact(data: bytes) -> PolicyArtefact:
    """What `pack_artefact` packed, digests checked.

    Raises:
        ArtefactError: the bytes do not parse or are of a newer format.
        DigestMismatch: a part does not hash to its digest.
    """
    try:
        artefact = msgspec.msgpack.decode(data, type=PolicyArtefact)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ArtefactError(f"the packed artefact does not parse: {error}") from error
    _known_format(artefact.manifest)
    check_digests(artefact)
    return artefact
