"""docs/wire-protocol.md says all that the code does: kinds, fields, codes and golden values."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest

from relayrl_shared import errors, frames
from relayrl_shared.messages import ActorInfo, AnyMessage, Limits, Message, RunRequest, SpoolReport
from relayrl_shared.noise import NoiseSource
from relayrl_shared.policy.manifest import NoiseLeaf
from relayrl_shared.spaces import LeafSpec
from relayrl_shared.trajectory import RecordSchema, TrajectoryMetadata

PAGE = (Path(__file__).parents[2] / "docs" / "wire-protocol.md").read_text()
KINDS: list[type[Message]] = list(AnyMessage.__args__)
ERRORS: list[type[errors.RelayRLError]] = [
    thing
    for thing in vars(errors).values()
    if isinstance(thing, type) and issubclass(thing, errors.RelayRLError)
]
CODES = {cls.code: cls.retryable for cls in ERRORS}


def section(kind: str) -> str:
    """The text under the heading of a message."""
    found = re.search(rf"^#### `{kind}`\n(.*?)(?=^#)", PAGE, re.DOTALL | re.MULTILINE)
    assert found, f"docs/wire-protocol.md has no section for {kind}"
    return found[1]


@pytest.mark.parametrize("kind", KINDS, ids=lambda cls: cls.__struct_config__.tag)
def test_every_kind_says_its_direction_fields_and_payload(kind: type[Message]) -> None:
    """Each message has a section that names who sends it to whom, every field, and its payload frames."""
    text = section(str(kind.__struct_config__.tag))
    common = set(Message.__struct_fields__)

    assert "→" in text
    assert {
        field for field in kind.__struct_fields__ if field not in common and f"`{field}`" not in text
    } == set()
    assert (kind in frames.PAYLOAD_FRAMES) == ("payload `[" in text)


def test_no_kind_is_described_that_does_not_exist() -> None:
    """The page describes the messages that there are and no others."""
    described = set(re.findall(r"^#### `(\w+)`$", PAGE, re.MULTILINE))

    assert described == {str(kind.__struct_config__.tag) for kind in KINDS}


@pytest.mark.parametrize(
    "struct",
    [Message, RunRequest, ActorInfo, SpoolReport, Limits, TrajectoryMetadata, LeafSpec, RecordSchema],
)
def test_every_field_of_what_messages_hold_is_described(struct: type[msgspec.Struct]) -> None:
    """The maps inside messages are described field by field."""
    assert [field for field in struct.__struct_fields__ if f"`{field}`" not in PAGE] == []


def test_every_error_code_stands_there_with_whether_it_is_retryable() -> None:
    """The table of codes is the errors module, no more and no less."""
    table = PAGE.partition("## Error codes")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \| (yes|no) \|", table, re.MULTILINE))

    assert rows == {code: "yes" if retryable else "no" for code, retryable in CODES.items()}


def test_the_noise_of_the_page_is_the_noise_of_the_code() -> None:
    """The golden values of the page are drawn by this code."""
    golden = json.loads(re.search(r"```json\n(.*?)```", PAGE, re.DOTALL)[1])  # type: ignore[index]
    kinds = {"noise.a": "gumbel", "noise.b": "normal", "noise.c": "logistic"}
    leaves = [
        NoiseLeaf(name=name, action_leaf=name.replace("noise", "action"), kind=kind, width=len(golden[name]))  # type: ignore[arg-type]
        for name, kind in kinds.items()
    ]

    drawn = NoiseSource(seed=7, client_index=1).draw(leaves, *(np.array([number]) for number in (2, 3, 4)))

    for name, values in golden.items():
        np.testing.assert_allclose(drawn[name][0], values, atol=5e-7)
