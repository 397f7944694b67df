"""What `train` and `demo` say and how they end."""

from __future__ import annotations

import pytest

from relayrl_cli.commands.train import exit_status, summary
from relayrl_cli.plan import TrainingPlan
from relayrl_cli.train import Outcome

PLAN = TrainingPlan(run="r", environment="CartPole-v1", algorithm="PPO", actors=8, target_return=475.0)


def outcome(**changes: object) -> Outcome:
    fields: dict[str, object] = {
        "steps": 12_345,
        "episodes": 200,
        "mean_return": 476.24,
        "seconds": 61.25,
        "learned": True,
        "interrupted": False,
        "policy": "r",
        "policy_version": 90,
        "undelivered": 0,
    }
    return Outcome(**(fields | changes))  # type: ignore[arg-type]


def test_the_summary_has_the_figures_and_what_they_are() -> None:
    """A training mean is called so (contracts O)."""
    assert summary(PLAN, outcome()) == (
        "run r: 12,345 steps, 200 episodes in 61.2 s; "
        "mean return 476.2 over the last 100 training episodes; policy version 90"
    )


def test_an_interrupted_start_has_no_figures_to_invent() -> None:
    """No mean without an episode, no version before the first."""
    text = summary(PLAN, outcome(mean_return=None, policy_version=-1, interrupted=True))

    assert "no episode ended; policy version none yet" in text
    assert "interrupted; what was recorded is kept" in text


def test_acting_that_did_not_end_is_not_called_kept() -> None:
    """What nobody recorded is not claimed."""
    text = summary(PLAN, outcome(interrupted=True, abandoned=True))

    assert "kept" not in text
    assert "did not end in time" in text


def test_what_was_not_delivered_is_said() -> None:
    """With what becomes of it."""
    assert "3 trajectories wait in the spool and are sent at the next start" in summary(
        PLAN, outcome(undelivered=3)
    )


@pytest.mark.parametrize(
    ("learned", "interrupted", "status"),
    [(True, False, 0), (True, True, 0), (False, False, 1), (False, True, 130)],
)
def test_the_exit_status_says_whether_the_target_was_reached(
    learned: bool, interrupted: bool, status: int
) -> None:
    """Failing to learn is not success, and neither is giving up."""
    assert exit_status(PLAN, outcome(learned=learned, interrupted=interrupted)) == status


def test_without_a_target_any_end_is_a_success() -> None:
    """As for a training that runs until Ctrl-C."""
    plan = TrainingPlan(run="r", environment="CartPole-v1", algorithm="PPO", actors=8)

    assert exit_status(plan, outcome(learned=False, interrupted=True)) == 0
