"""What a trajectory may say of itself."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relayrl_shared.errors import ContractError, InvalidTrajectory
from relayrl_shared.testing.store import make_run
from relayrl_shared.testing.trajectories import make_metadata
from relayrl_training_server.metadata import (
    MAX_ROLLOUTS_AHEAD,
    can_be_named,
    check_id,
    check_metadata,
    check_policy,
    check_rollout,
)

GOOD: dict[str, Any] = {"schema_digest": "s", "body_digest": "b"}


def test_what_clients_make_is_accepted() -> None:
    """Ordinary metadata, negative and absent seeds and traces included, pass."""
    check_metadata(make_metadata(3, **GOOD))
    check_metadata(
        make_metadata(3, **GOOD, seed=-5, traceparent="00-a-b-01", agent_id="left", rollout_segments=2)
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            (field, bad)
            for field in ("trajectory_id", "spool_id", "episode_id")
            for bad in ("", "a\0", "x" * 257)
        ],
        *[
            (field, bad)
            for field in ("episode_index", "client_index", "first_step_index")
            for bad in (-1, 2**63)
        ],
        ("steps", 0),
        ("sequence", 0),
        ("sequence", 2**63),
        ("episode_return", float("inf")),
        ("ended_at", float("nan")),
        ("rollout_segments", 0),
        ("seed", 2**63),
        ("agent_id", ""),
        ("traceparent", "t" * 129),
    ],
)
def test_what_no_store_can_keep_is_refused_by_name(field: str, value: object) -> None:
    """The error is of reason `metadata` and names the field."""
    metadata = msgspec.structs.replace(make_metadata(3, **GOOD), **{field: value})

    with pytest.raises(InvalidTrajectory, match=field) as caught:
        check_metadata(metadata)

    assert caught.value.reason == "metadata"


@pytest.mark.parametrize(
    ("policy", "belongs"),
    [
        ("cartpole", True),
        ("cartpole/left", True),
        ("cartpole2", False),
        ("cart", False),
        ("/cartpole", False),
    ],
)
def test_a_policy_is_the_runs_or_one_of_its_agents(policy: str, belongs: bool) -> None:
    """`{run}` and `{run}/{agent}` belong to the run, names that begin alike do not."""
    metadata = make_metadata(3, **GOOD, policy=policy)

    try:
        check_policy(metadata, make_run(name="cartpole"))
    except InvalidTrajectory:
        assert not belongs
    else:
        assert belongs


@given(st.text(max_size=300))
@settings(deadline=None)
def test_an_id_is_short_not_empty_and_without_nul(text: str) -> None:
    """Any text is an id exactly if every store can keep it as a key."""
    fits = 0 < len(text) <= 256 and "\0" not in text

    if fits:
        check_id("name", text)
    else:
        with pytest.raises(ContractError, match=r"^name "):
            check_id("name", text)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({}, True), ({"run_id": ""}, False), ({"spool_id": "\0"}, False), ({"sequence": 0}, False)],
)
def test_quarantine_rows_carry_only_ids_that_can_be_columns(changes: dict[str, Any], named: bool) -> None:
    """Ids that a database cannot keep stay in the header alone."""
    assert can_be_named(make_metadata(3, **changes)) is named


@pytest.mark.parametrize(("ahead", "fits"), [(0, True), (1, False)])
def test_a_rollout_is_at_most_a_million_beyond_the_learner(ahead: int, fits: bool) -> None:
    """The bound moves with the learner's updates."""
    run = make_run(pacing="block")
    metadata = msgspec.structs.replace(make_metadata(3), rollout_index=MAX_ROLLOUTS_AHEAD + 7 + ahead)

    with nullcontext() if fits else pytest.raises(InvalidTrajectory, match="far beyond update 7"):
        check_rollout(metadata, run, lambda run_id: 7)
