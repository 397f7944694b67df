"""Artefacts on disk and in caches: whole or not at all, and never outside their directory."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from relayrl_shared.errors import ArtefactError, DigestMismatch
from relayrl_shared.policy import artefact as artefacts
from relayrl_shared.policy.manifest import PolicyArtefact
from relayrl_shared.spaces import ActionSpec, LeafSpec, ObservationSpec
from relayrl_shared.testing.policies import make_artefact

OBSERVATION = ObservationSpec(leaves=(LeafSpec(name="observation", kind="box", shape=(4,), dtype="float32"),))
ACTION = ActionSpec(
    leaves=(LeafSpec(name="action", kind="discrete", shape=(), dtype="int64", nvec=(2,), start=(0,)),)
)


@pytest.fixture(scope="module")
def artefact() -> PolicyArtefact:
    return make_artefact(OBSERVATION, ACTION)


def test_saved_artefact_reads_back_equal(artefact: PolicyArtefact, tmp_path: Path) -> None:
    """What was saved loads as the same manifest and bytes."""
    artefacts.save_artefact(artefact, tmp_path / "deep" / "version")
    assert artefacts.load_artefact(tmp_path / "deep" / "version") == artefact


def test_save_leaves_nothing_else_behind(artefact: PolicyArtefact, tmp_path: Path) -> None:
    """A save leaves the four files and no temporary directory."""
    artefacts.save_artefact(artefact, tmp_path / "version")
    assert [path.name for path in tmp_path.iterdir()] == ["version"]
    assert sorted(path.name for path in (tmp_path / "version").iterdir()) == [
        "golden.safetensors",
        "graph.onnx",
        "manifest.json",
        "weights.safetensors",
    ]


def test_saving_the_same_artefact_again_changes_nothing(artefact: PolicyArtefact, tmp_path: Path) -> None:
    """Saving is idempotent for equal content."""
    for _ in range(2):
        artefacts.save_artefact(artefact, tmp_path / "version")
    assert artefacts.load_artefact(tmp_path / "version") == artefact
    assert len(list(tmp_path.iterdir())) == 1


def test_saving_another_artefact_over_one_is_refused(artefact: PolicyArtefact, tmp_path: Path) -> None:
    """A directory that holds another version stays as it is."""
    artefacts.save_artefact(artefact, tmp_path / "version")
    other = make_artefact(OBSERVATION, ACTION, seed=1)
    with pytest.raises(ArtefactError, match="immutable"):
        artefacts.save_artefact(other, tmp_path / "version")
    assert artefacts.load_artefact(tmp_path / "version") == artefact
    assert len(list(tmp_path.iterdir())) == 1


def test_save_that_fails_midway_leaves_no_directory(
    artefact: PolicyArtefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up at the last file leaves no half artefact."""
    write = artefacts._write_durably

    def full_disk(path: Path, data: bytes) -> None:
        if path.name == artefacts.MANIFEST_FILE:
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(artefacts, "_write_durably", full_disk)
    with pytest.raises(OSError, match="No space"):
        artefacts.save_artefact(artefact, tmp_path / "version")
    assert list(tmp_path.iterdir()) == []


def test_artefact_with_wrong_digest_is_not_saved(artefact: PolicyArtefact, tmp_path: Path) -> None:
    """Bytes that do not hash to the manifest's digest never reach the disk."""
    bent = msgspec.structs.replace(artefact, weights=artefact.weights + b"\0")
    with pytest.raises(DigestMismatch, match="weights"):
        artefacts.save_artefact(bent, tmp_path / "version")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["manifest.json", "graph.onnx", "weights.safetensors", "golden.safetensors"])
def test_missing_file_is_named(artefact: PolicyArtefact, tmp_path: Path, name: str) -> None:
    """A directory without one of the files is refused by its name."""
    artefacts.save_artefact(artefact, tmp_path / "version")
    (tmp_path / "version" / name).unlink()
    with pytest.raises(ArtefactError, match=name):
        artefacts.load_artefact(tmp_path / "version")


def test_link_in_place_of_a_file_is_refused(artefact: PolicyArtefact, tmp_path: Path) -> None:
    """A link that leads out of the directory is not followed."""
    artefacts.save_artefact(artefact, tmp_path / "version")
    secret = tmp_path / "secret"
    secret.write_bytes(artefact.graph)
    graph = tmp_path / "version" / "graph.onnx"
    graph.unlink()
    graph.symlink_to(secret)
    with pytest.raises(ArtefactError, match=r"graph\.onnx"):
        artefacts.load_artefact(tmp_path / "version")


def test_directory_in_place_of_a_file_is_refused(artefact: PolicyArtefact, tmp_path: Path) -> None:
    """Only plain files are read."""
    artefacts.save_artefact(artefact, tmp_path / "version")
    graph = tmp_path / "version" / "graph.onnx"
    graph.unlink()
    graph.mkdir()
    with pytest.raises(ArtefactError, match="plain file"):
        artefacts.load_artefact(tmp_path / "version")


def test_oversize_file_is_refused_before_it_is_read(
    artefact: PolicyArtefact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file above its limit is refused by its size."""
    artefacts.save_artefact(artefact, tmp_path / "version")
    monkeypatch.setitem(artefacts._LIMITS, artefacts.GRAPH_FILE, 100)
    with pytest.raises(ArtefactError, match="limit is 100"):
        artefacts.load_artefact(tmp_path / "version")


def test_oversize_part_is_refused_by_the_digest_check(
    artefact: PolicyArtefact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part above its limit is refused before it is hashed."""
    monkeypatch.setitem(artefacts._LIMITS, artefacts.WEIGHTS_FILE, 100)
    with pytest.raises(ArtefactError, match="limit is 100"):
        artefacts.check_digests(artefact)


@pytest.mark.parametrize("part", ["graph", "weights", "golden"])
def test_each_part_is_checked_against_its_digest(artefact: PolicyArtefact, part: str) -> None:
    """One changed byte in any part is found, and the part is named."""
    data = bytearray(getattr(artefact, part))
    data[len(data) // 2] ^= 1
    bent = msgspec.structs.replace(artefact, **{part: bytes(data)})
    with pytest.raises(DigestMismatch, match=part):
        artefacts.check_digests(bent)


def test_manifest_round_trips_and_is_for_people(artefact: PolicyArtefact) -> None:
    """The manifest is indented JSON that reads back equal."""
    encoded = artefacts.encode_manifest(artefact.manifest)
    assert artefacts.decode_manifest(encoded) == artefact.manifest
    assert b'\n  "policy": "test"' in encoded


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", b"[1, 2]", b'{"format": "x"}'])
def test_garbage_manifest_is_refused(data: bytes) -> None:
    """Bytes that are no manifest give a typed error."""
    with pytest.raises(ArtefactError, match="does not parse"):
        artefacts.decode_manifest(data)


def test_oversize_manifest_is_refused() -> None:
    """A manifest above its limit is not parsed."""
    with pytest.raises(ArtefactError, match="limit"):
        artefacts.decode_manifest(b" " * (artefacts.MAX_MANIFEST_BYTES + 1))


@pytest.mark.parametrize("format_", [0, 2])
def test_manifest_of_another_format_is_refused(artefact: PolicyArtefact, format_: int) -> None:
    """A format that this code does not know is refused with the remedy."""
    manifest = msgspec.structs.replace(artefact.manifest, format=format_)
    with pytest.raises(ArtefactError, match="update RelayRL"):
        artefacts.decode_manifest(artefacts.encode_manifest(manifest))
    packed = artefacts.pack_artefact(msgspec.structs.replace(artefact, manifest=manifest))
    with pytest.raises(ArtefactError, match="update RelayRL"):
        artefacts.unpack_artefact(packed)


def test_packed_artefact_unpacks_equal(artefact: PolicyArtefact) -> None:
    """Packing for a cache loses nothing."""
    assert artefacts.unpack_artefact(artefacts.pack_artefact(artefact)) == artefact


def test_packed_artefact_is_checked(artefact: PolicyArtefact) -> None:
    """A pack whose parts were changed is refused, and so is one that was cut."""
    bent = msgspec.structs.replace(artefact, golden=artefact.golden[:-1] + b"!")
    with pytest.raises(DigestMismatch):
        artefacts.unpack_artefact(artefacts.pack_artefact(bent))
    with pytest.raises(ArtefactError, match="does not parse"):
        artefacts.unpack_artefact(artefacts.pack_artefact(artefact)[:-7])


@given(policy=st.text(min_size=1), version=st.integers(0, 10**12))
@example(policy="../../etc/passwd", version=1)
@example(policy="/etc", version=1)
@example(policy="run/agent", version=1)
@example(policy="..", version=1)
@example(policy="a\\b", version=1)
def test_policy_name_never_leaves_the_root(policy: str, version: int) -> None:
    """Whatever a policy is called, its directory is two levels below the root."""
    root = Path("/cache/policies")
    path = artefacts.artefact_directory(root, policy, version)
    assert path.parent.parent == root
    assert ".." not in path.parts


def test_policy_names_do_not_collide() -> None:
    """A slash in a policy's name is not the same as a directory."""
    root = Path("/cache")
    paths = {artefacts.artefact_directory(root, name, 1) for name in ("run/a", "run%2Fa", "run", "..", ".")}
    assert len(paths) == 5
    with pytest.raises(ArtefactError, match="name"):
        artefacts.artefact_directory(root, "", 1)


def test_description_names_policy_and_version(artefact: PolicyArtefact) -> None:
    """Messages can say which version they are about, also before publication."""
    assert artefacts.describe(artefact.manifest) == "policy test version 1 (learner update 0)"
    unpublished = msgspec.structs.replace(artefact.manifest, policy_version=None)
    assert "unpublished" in artefacts.describe(unpublished)
