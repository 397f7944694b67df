"""Blobs on a real directory: whole or not at all, checked on write and read."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from relayrl_model_registry.blobs import BlobStore, digest_of
from relayrl_shared.errors import ContractError, DigestMismatch, Overloaded, RegistryError, StorageFull

DATA = bytes(range(256)) * 20
DIGEST = digest_of(DATA)


def files(directory: Path) -> list[str]:
    """Every file below the directory, by its path in it."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


@contextmanager
def largest_file(limit_bytes: int) -> Iterator[None]:
    """Makes every write beyond the size fail, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_blob_reads_back_equal(tmp_path: Path) -> None:
    """What was put is read, and it lies under its digest."""
    blobs = BlobStore(tmp_path)
    blobs.put(DIGEST, DATA)

    assert blobs.read(DIGEST) == DATA
    assert blobs.contains(DIGEST)
    assert files(tmp_path) == [f"{DIGEST[:2]}/{DIGEST}"]


def test_empty_blob_is_a_blob(tmp_path: Path) -> None:
    """Nothing has a digest as well."""
    blobs = BlobStore(tmp_path)
    blobs.put(digest_of(b""), b"")

    assert blobs.read(digest_of(b"")) == b""


def test_chunks_are_assembled_and_invisible_until_complete(tmp_path: Path) -> None:
    """A blob appears with its last chunk, also when a chunk came twice."""
    blobs = BlobStore(tmp_path)
    assert not blobs.put_chunk(DIGEST, 0, len(DATA), DATA[:2000])
    assert not blobs.put_chunk(DIGEST, 2000, len(DATA), DATA[2000:4000])
    assert not blobs.put_chunk(DIGEST, 2000, len(DATA), DATA[2000:4000])
    assert not blobs.contains(DIGEST)

    assert blobs.put_chunk(DIGEST, 4000, len(DATA), DATA[4000:])
    assert blobs.read(DIGEST) == DATA


def test_two_senders_of_one_blob_may_interleave(tmp_path: Path) -> None:
    """Both send every chunk; the blob is whole, and what comes late is ignored."""
    blobs = BlobStore(tmp_path)
    for offset in (0, 0, 2000, 2000, 4000, 4000, 2000):
        blobs.put_chunk(DIGEST, offset, len(DATA), DATA[offset : offset + 2000])

    assert blobs.read(DIGEST) == DATA
    assert files(tmp_path) == [f"{DIGEST[:2]}/{DIGEST}"]


def test_chunk_after_a_gap_is_refused(tmp_path: Path) -> None:
    """Chunks come in order; the error says where to begin."""
    blobs = BlobStore(tmp_path)
    blobs.put_chunk(DIGEST, 0, len(DATA), DATA[:10])

    with pytest.raises(ContractError, match="begin again at 0"):
        blobs.put_chunk(DIGEST, 20, len(DATA), DATA[20:])


def test_chunk_of_another_total_is_refused(tmp_path: Path) -> None:
    """All chunks of a blob name the same size."""
    blobs = BlobStore(tmp_path)
    blobs.put_chunk(DIGEST, 0, len(DATA), DATA[:10])

    with pytest.raises(ContractError, match="announced with 5120 bytes, now 5121"):
        blobs.put_chunk(DIGEST, 10, len(DATA) + 1, DATA[10:])


@pytest.mark.parametrize(
    ("offset", "total", "chunk"),
    [(-1, 5, b"ab"), (4, 5, b"ab"), (0, 5, b""), (0, -1, b""), (0, 6, b"abcdefg")],
)
def test_chunk_that_does_not_fit_is_refused_and_leaves_nothing(
    tmp_path: Path, offset: int, total: int, chunk: bytes
) -> None:
    """Impossible offsets and sizes write nothing."""
    with pytest.raises(ContractError):
        BlobStore(tmp_path).put_chunk(DIGEST, offset, total, chunk)

    assert files(tmp_path) == []


def test_bytes_of_another_digest_are_refused_and_removed(tmp_path: Path) -> None:
    """The digest is checked on write; the upload can begin again."""
    blobs = BlobStore(tmp_path)
    with pytest.raises(DigestMismatch):
        blobs.put(DIGEST, DATA[:-1] + b"?")

    assert files(tmp_path) == []
    blobs.put(DIGEST, DATA)
    assert blobs.read(DIGEST) == DATA


@pytest.mark.parametrize(
    "digest", ["", "../../etc/passwd", DIGEST[:-1], DIGEST.upper(), DIGEST + "0", "/" * 64]
)
def test_name_that_is_no_digest_is_refused(tmp_path: Path, digest: str) -> None:
    """No path outside the directory can be named."""
    blobs = BlobStore(tmp_path)
    with pytest.raises(ContractError, match="is no digest"):
        blobs.put(digest, DATA)
    with pytest.raises(ContractError, match="is no digest"):
        blobs.read(digest)


def test_blob_over_the_limit_is_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    """The announced total decides, not what has come."""
    blobs = BlobStore(tmp_path, max_blob_bytes=100)
    with pytest.raises(ContractError, match="the limit is 100"):
        blobs.put_chunk(DIGEST, 0, 101, b"a")

    assert files(tmp_path) == []


def test_uploads_are_bounded_and_silent_ones_make_room(tmp_path: Path) -> None:
    """One too many is Overloaded, until an old one has been silent for long."""
    patient = BlobStore(tmp_path / "a", max_uploads=1)
    patient.put_chunk(DIGEST, 0, 100, b"a")
    with pytest.raises(Overloaded):
        patient.put_chunk(digest_of(b"b"), 0, 100, b"a")

    impatient = BlobStore(tmp_path / "b", max_uploads=1, upload_timeout_seconds=0.0)
    impatient.put_chunk(DIGEST, 0, 100, b"a")
    impatient.put_chunk(digest_of(b"b"), 0, 100, b"a")
    assert len(files(tmp_path / "b")) == 1


def test_damaged_blob_is_refused_and_can_be_uploaded_again(tmp_path: Path) -> None:
    """A bit that flipped on disk is found at the next read, also by a store that wrote the blob itself."""
    blobs = BlobStore(tmp_path)
    blobs.put(DIGEST, DATA)
    path = tmp_path / DIGEST[:2] / DIGEST
    path.write_bytes(b"?" + DATA[1:])

    with pytest.raises(DigestMismatch, match="damaged"):
        blobs.read(DIGEST)
    assert not blobs.contains(DIGEST)
    blobs.put(DIGEST, DATA)
    assert blobs.read(DIGEST) == DATA


def test_truncated_blob_is_refused_by_a_new_process(tmp_path: Path) -> None:
    """A store that finds a directory trusts nothing in it."""
    BlobStore(tmp_path).put(DIGEST, DATA)
    os.truncate(tmp_path / DIGEST[:2] / DIGEST, 100)

    with pytest.raises(DigestMismatch):
        BlobStore(tmp_path).read(DIGEST)


def test_missing_blob_is_a_registry_error(tmp_path: Path) -> None:
    """It was never uploaded, or it was collected."""
    with pytest.raises(RegistryError, match="never uploaded"):
        BlobStore(tmp_path).read(DIGEST)


def test_parts_are_read_by_offset(tmp_path: Path) -> None:
    """Chunks cover the blob; past its end is an error."""
    blobs = BlobStore(tmp_path)
    blobs.put(DIGEST, DATA)

    assert blobs.read_chunk(DIGEST, 5000, 1000) == (DATA[5000:], len(DATA))
    assert blobs.read_chunk(DIGEST, 100, 50) == (DATA[100:150], len(DATA))
    assert blobs.read_chunk(DIGEST, len(DATA)) == (b"", len(DATA))
    with pytest.raises(ContractError, match="outside"):
        blobs.read_chunk(DIGEST, len(DATA) + 1)


def test_full_disk_is_a_typed_error_and_nothing_is_left(tmp_path: Path) -> None:
    """A write that does not fit leaves no file; when there is space again the upload succeeds."""
    blobs = BlobStore(tmp_path)
    small = b"small"
    blobs.put(digest_of(small), small)
    with largest_file(1000), pytest.raises(StorageFull):
        blobs.put(DIGEST, DATA)

    assert files(tmp_path) == [f"{digest_of(small)[:2]}/{digest_of(small)}"]
    blobs.put(DIGEST, DATA)
    assert blobs.read(DIGEST) == DATA


def test_full_disk_in_the_middle_of_an_upload_begins_it_again(tmp_path: Path) -> None:
    """The first chunks are given up with the one that failed."""
    blobs = BlobStore(tmp_path)
    blobs.put_chunk(DIGEST, 0, len(DATA), DATA[:900])
    with largest_file(1000), pytest.raises(StorageFull):
        blobs.put_chunk(DIGEST, 900, len(DATA), DATA[900:])

    assert files(tmp_path) == []
    with pytest.raises(ContractError, match="gap"):
        blobs.put_chunk(DIGEST, 900, len(DATA), DATA[900:])


def test_directory_that_cannot_be_written_is_an_error_at_start(tmp_path: Path) -> None:
    """A file where the directory should be is found at once."""
    (tmp_path / "blobs").write_bytes(b"")
    with pytest.raises(RegistryError, match=os.strerror(errno.EEXIST) + "|Not a directory"):
        BlobStore(tmp_path / "blobs")


def test_collection_removes_what_is_neither_kept_nor_young(tmp_path: Path) -> None:
    """A kept blob stays, a young one stays, a touched one stays, the rest goes."""
    blobs = BlobStore(tmp_path)
    kept, old, touched = (f"blob {n}".encode() for n in range(3))
    for data in (kept, old, touched):
        blobs.put(digest_of(data), data)
        os.utime(tmp_path / digest_of(data)[:2] / digest_of(data), (1, 1))
    blobs.put(DIGEST, DATA)
    blobs.touch(digest_of(touched))

    assert blobs.remove_except({digest_of(kept)}, minimum_age_seconds=60.0) == 1
    assert [blobs.contains(digest_of(data)) for data in (kept, old, touched, DATA)] == [
        True,
        False,
        True,
        True,
    ]


def test_leftover_uploads_of_a_killed_process_are_removed_when_old(tmp_path: Path) -> None:
    """A new store removes old parts and leaves young ones to the process that writes them."""
    first = BlobStore(tmp_path)
    first.put_chunk(DIGEST, 0, len(DATA), DATA[:10])
    first.put_chunk(digest_of(b"b"), 0, 9, b"a")
    (old,) = (tmp_path / "uploads").glob(f"{DIGEST}*")
    os.utime(old, (1, 1))

    BlobStore(tmp_path)

    assert [name for name in files(tmp_path) if DIGEST in name] == []
    assert len(files(tmp_path)) == 1
