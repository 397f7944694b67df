"""The rules of publication that need no database: names and manifests."""

from __future__ import annotations

import msgspec
import pytest

from relayrl_model_registry.store.interface import PublicationKey
from relayrl_model_registry.versions import check_policy_name, parse_manifest
from relayrl_shared.errors import ContractError
from relayrl_shared.testing.registry import opaque_artefact

MANIFEST = opaque_artefact(policy="cartpole", learner_update=3).manifest
KEY = PublicationKey("run-1", "lineage-1", "cartpole", 3)


@pytest.mark.parametrize("name", ["cartpole", "run 7", "run/agent_0", "run/ägent", "a" * 128])
def test_policy_name_may_be_run_or_run_and_agent(name: str) -> None:
    """A run's name, or a run's and an agent's with one slash, is a policy name."""
    check_policy_name(name)


@pytest.mark.parametrize(
    "name", ["", "/", "a/", "/a", "a/b/c", "a\nb", "a\x00", "a" * 129, "a/versions", "aliases", "a/aliases"]
)
def test_policy_name_that_cannot_be_addressed_is_refused(name: str) -> None:
    """Names that are empty, too long, not printable or words of the HTTP paths are refused."""
    with pytest.raises(ContractError, match="is no policy name"):
        check_policy_name(name)


def test_manifest_that_agrees_with_its_key_is_returned() -> None:
    """A manifest as the learner encodes it comes back equal."""
    assert parse_manifest(msgspec.json.encode(MANIFEST), KEY) == MANIFEST


@pytest.mark.parametrize(
    ("field", "value"),
    [("policy", "other"), ("run_id", "run-2"), ("lineage_id", "lineage-2"), ("learner_update", 4)],
)
def test_manifest_that_disagrees_with_its_key_is_refused(field: str, value: str | int) -> None:
    """Each field of the key must be the manifest's, and the error names the one that is not."""
    other = msgspec.structs.replace(KEY, **{field: value})

    with pytest.raises(ContractError, match=f"manifest's {field} differs"):
        parse_manifest(msgspec.json.encode(MANIFEST), other)


@pytest.mark.parametrize("garbage", [b"", b"{}", b"\xff\xfe", b"[1, 2]", b'{"policy": 7}'])
def test_manifest_that_does_not_parse_is_refused(garbage: bytes) -> None:
    """Bytes that are no manifest are a ContractError, never another exception."""
    with pytest.raises(ContractError, match="does not parse"):
        parse_manifest(garbage, KEY)


def test_manifest_of_a_newer_format_is_refused() -> None:
    """A format that this code does not know is refused by its number."""
    newer = msgspec.structs.replace(MANIFEST, format=99)

    with pytest.raises(ContractError, match="format 99"):
        parse_manifest(msgspec.json.encode(newer), KEY)


def test_manifest_over_the_limit_is_refused_before_it_is_parsed() -> None:
    """The size is checked first."""
    with pytest.raises(ContractError, match="the limit is"):
        parse_manifest(b"x" * (5 << 20), KEY)
