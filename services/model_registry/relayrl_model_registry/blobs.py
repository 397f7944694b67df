"""Content-addressed files: what a policy version consists of, named by the BLAKE3 of its bytes.

Driven by `versions` (is everything there?), `dataplane` (chunked uploads and fetches) and `collection`. A
blob appears under its name only whole, checked and fsynced; what is read was checked since it last changed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from relayrl_shared.errors import ContractError, DigestMismatch, Overloaded, RegistryError, StorageFull

CHUNK_BYTES = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_Signature = tuple[int, int, int]


@dataclass(slots=True)
class _Upload:
    """A blob that is being sent; `received_bytes` from the start are in the file."""

    path: Path
    total_bytes: int
    received_bytes: int = 0
    touched_at: float = field(default_factory=time.monotonic)


class BlobStore:
    """A directory of blobs; safe to use from several threads, and by several processes for different uploads.

    Args:
        directory: created if absent. `ab/abcd…` are the blobs, `uploads/` what is not complete.
        max_blob_bytes: larger uploads are refused before their first byte is written.
        max_uploads: incomplete uploads at one time.
        upload_timeout_seconds: an upload without a new chunk for so long makes room for others.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_blob_bytes: int = 1 << 30,
        max_uploads: int = 64,
        upload_timeout_seconds: float = 600.0,
    ) -> None:
        self._directory = directory
        self._max_blob_bytes = max_blob_bytes
        self._max_uploads = max_uploads
        self._upload_timeout_seconds = upload_timeout_seconds
        self._lock = threading.RLock()
        self._uploads: dict[str, _Upload] = {}
        self._checked: dict[str, _Signature] = {}
        with _full_disk("create the blob directory"):
            self._upload_directory.mkdir(parents=True, exist_ok=True)
            _fsync_directory(directory)
        self._remove_old_uploads()

    @property
    def _upload_directory(self) -> Path:
        return self._directory / "uploads"

    def _path(self, digest: str) -> Path:
        if _DIGEST.fullmatch(digest) is None:
            raise ContractError(f"{digest[:80]!r} is no digest: BLAKE3 in 64 lower-case hex digits")
        return self._directory / digest[:2] / digest

    # -- writing

    def put(self, digest: str, data: bytes) -> None:
        """Stores a whole blob.

        Raises:
            DigestMismatch: the bytes do not hash to the digest.
            StorageFull: the disk is full; nothing was changed.
            ContractError: no digest, or too large.
        """
        self.put_chunk(digest, 0, len(data), data)

    def put_chunk(self, digest: str, offset: int, total_bytes: int, chunk: bytes | memoryview) -> bool:
        """Adds a part of a blob; True once the blob is complete and durable.

        Parts come in order; one that came before may come again, and everything sent for a blob that is
        complete is ignored. Two senders of the same blob may interleave.

        Raises:
            ContractError: no digest, a total over the limit or unlike before, or a gap before this part.
            DigestMismatch: the complete bytes do not hash to the digest; the upload begins again.
            StorageFull: the disk is full; the upload begins again.
            Overloaded: too many incomplete uploads.
        """
        with self._lock:
            if self.contains(digest):
                return True
            upload = self._upload(digest, offset, total_bytes, len(chunk))
            try:
                self._append(upload, offset, chunk)
                if upload.received_bytes < total_bytes:
                    return False
                self._complete(digest, upload)
            except (OSError, RegistryError) as error:
                self._abandon(digest)
                if isinstance(error, OSError):
                    raise _storage_error("write a blob", error) from error
                raise
            return True

    def _upload(self, digest: str, offset: int, total_bytes: int, length: int) -> _Upload:
        if not 0 <= total_bytes <= self._max_blob_bytes:
            raise ContractError(
                f"a blob of {total_bytes} bytes; the limit is {self._max_blob_bytes} (limits.max_blob_bytes)"
            )
        if offset < 0 or offset + length > total_bytes or (length == 0 and total_bytes > 0):
            raise ContractError(
                f"a chunk of {length} bytes at {offset} does not fit into {total_bytes} bytes"
            )
        upload = self._uploads.get(digest)
        if upload is None:
            upload = self._begin(digest, total_bytes)
        if upload.total_bytes != total_bytes:
            raise ContractError(
                f"blob {digest[:16]}… was announced with {upload.total_bytes} bytes, now {total_bytes}"
            )
        if offset > upload.received_bytes:
            received = upload.received_bytes
            raise ContractError(
                f"chunk at {offset} of blob {digest[:16]}… leaves a gap after {received}: begin again at 0"
            )
        return upload

    def _begin(self, digest: str, total_bytes: int) -> _Upload:
        self._path(digest)
        self._drop_silent_uploads()
        if len(self._uploads) >= self._max_uploads:
            raise Overloaded(f"{len(self._uploads)} uploads are open already", 1.0)
        path = self._upload_directory / f"{digest}.{secrets.token_hex(8)}.part"
        with _full_disk("begin an upload"):
            path.touch(mode=0o644)
        self._uploads[digest] = _Upload(path, total_bytes)
        return self._uploads[digest]

    @staticmethod
    def _append(upload: _Upload, offset: int, chunk: bytes | memoryview) -> None:
        with upload.path.open("r+b") as file:
            file.seek(offset)
            file.write(chunk)
        upload.received_bytes = max(upload.received_bytes, offset + len(chunk))
        upload.touched_at = time.monotonic()

    def _complete(self, digest: str, upload: _Upload) -> None:
        actual = _hash_file(upload.path)
        if actual != digest:
            raise DigestMismatch(f"blob {digest[:16]}… came as bytes of {actual[:16]}…; send it again")
        path = self._path(digest)
        if not path.parent.exists():
            path.parent.mkdir(exist_ok=True)
            _fsync_directory(self._directory)
        with upload.path.open("rb") as file:
            os.fsync(file.fileno())
        upload.path.rename(path)
        _fsync_directory(path.parent)
        self._checked[digest] = _signature(path)
        del self._uploads[digest]

    def _abandon(self, digest: str) -> None:
        upload = self._uploads.pop(digest, None)
        if upload is not None:
            with contextlib.suppress(OSError):
                upload.path.unlink(missing_ok=True)

    def _drop_silent_uploads(self) -> None:
        oldest = time.monotonic() - self._upload_timeout_seconds
        for digest in [d for d, upload in self._uploads.items() if upload.touched_at < oldest]:
            self._abandon(digest)

    def _remove_old_uploads(self) -> None:
        oldest = time.time() - self._upload_timeout_seconds
        for path in self._upload_directory.glob("*.part"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < oldest:
                    path.unlink()

    # -- reading

    def contains(self, digest: str) -> bool:
        """Whether the blob is here and whole."""
        try:
            self._check(digest)
        except RegistryError:
            return False
        return True

    def read_chunk(self, digest: str, offset: int, limit: int = CHUNK_BYTES) -> tuple[bytes, int]:
        """Up to `limit` bytes from `offset`, and the size of the whole blob.

        Raises:
            RegistryError: there is no such blob.
            DigestMismatch: the file on disk no longer hashes to its name.
            ContractError: no digest, or an offset outside the blob.
        """
        path = self._check(digest)
        with path.open("rb") as file:
            total_bytes = os.fstat(file.fileno()).st_size
            if not 0 <= offset <= total_bytes:
                raise ContractError(f"offset {offset} is outside blob {digest[:16]}… of {total_bytes} bytes")
            return os.pread(file.fileno(), limit, offset), total_bytes

    def read(self, digest: str) -> bytes:
        """The whole blob; raises like `read_chunk`."""
        data, _ = self.read_chunk(digest, 0, self._max_blob_bytes)
        return data

    def _check(self, digest: str) -> Path:
        path = self._path(digest)
        try:
            signature = _signature(path)
        except FileNotFoundError:
            raise RegistryError(
                f"blob {digest[:16]}… is not here: it was never uploaded, or it was collected"
            ) from None
        if self._checked.get(digest) != signature:
            if _hash_file(path) != digest:
                raise DigestMismatch(f"blob {digest[:16]}… is damaged on the registry's disk; publish again")
            self._checked[digest] = signature
        return path

    # -- collection

    def touch(self, digest: str) -> None:
        """Makes a blob young again, so that collection leaves it to the publication that needs it."""
        with self._lock, contextlib.suppress(FileNotFoundError):
            path = self._check(digest)
            os.utime(path)
            self._checked[digest] = _signature(path)

    def remove_except(self, keep: set[str], minimum_age_seconds: float) -> int:
        """Removes blobs that are not in `keep` and have not been touched for so long; how many."""
        removed = 0
        with self._lock:
            self._remove_old_uploads()
            for path in self._blobs():
                if path.name in keep or time.time() - path.stat().st_mtime < minimum_age_seconds:
                    continue
                path.unlink(missing_ok=True)
                self._checked.pop(path.name, None)
                removed += 1
        return removed

    def _blobs(self) -> Iterator[Path]:
        for folder in sorted(self._directory.iterdir()):
            if folder.is_dir() and len(folder.name) == 2:
                yield from (path for path in folder.iterdir() if _DIGEST.fullmatch(path.name))


def digest_of(data: bytes) -> str:
    """The name of a blob: its BLAKE3 in hex."""
    return blake3(data).hexdigest()


def _hash_file(path: Path) -> str:
    hasher = blake3()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()


def _signature(path: Path) -> _Signature:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _full_disk(action: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _storage_error(action, error) from error


def _storage_error(action: str, error: OSError) -> RegistryError | StorageFull:
    if error.errno in _FULL:
        return StorageFull(f"cannot {action}: the disk of the blob directory is full")
    return RegistryError(f"cannot {action}: {error}")
