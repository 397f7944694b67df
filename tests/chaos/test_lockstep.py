"""Lockstep through the whole stack (contracts F2): equal weights twice, to the bit, also across a SIGKILL."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from relayrl_cli import presets
from relayrl_cli.agents import build_training_agent
from relayrl_cli.plan import plan_from_preset
from relayrl_cli.run_view import RunView
from relayrl_cli.table import Progress
from relayrl_cli.train import TrainingSession
from relayrl_shared.errors import UnknownPolicyVersion
from relayrl_shared.registry_client import RegistryClient

UPDATES = 8
KILL_AT = 3

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(240)]


class AtVersion:
    """A view that calls back once the policy version in use has reached a number."""

    def __init__(self, version: int, call: Callable[[], Any]) -> None:
        self._version = version
        self._call = call
        self._done = False

    def show(self, progress: Progress) -> None:
        """Looks at the version in use."""
        if not self._done and (progress.policy_version or 0) >= self._version:
            self._done = True
            self._call()

    def say(self, line: str) -> None:
        """Nothing."""

    def __enter__(self) -> AtVersion:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None


def train(stack: Any, run: str, at_version: int = 0, call: Callable[[], Any] = lambda: None) -> None:
    """Trains CartPole in lockstep for some updates, with settings that make an update quick."""
    preset = presets.load("cartpole-ppo")
    plan = plan_from_preset(preset, run, steps=UPDATES * 8 * 32, seed=7)
    plan = replace(plan, max_policy_lag=0, target_return=None)
    agent = build_training_agent(plan, stack.file.addresses, stack.directory)
    session = TrainingSession(plan, agent, RunView(lambda: None))
    session.run(threading.Event(), AtVersion(at_version, call))


def weights_by_update(stack: Any, run: str) -> dict[int, str]:
    """Learner update → digest of the weights that were published for it."""
    client = RegistryClient("tcp://" + stack.file.addresses.model_server)
    digests: dict[int, str] = {}
    try:
        for version in range(1, 1000):
            manifest = client.fetch(run, policy_version=version).manifest
            digests[manifest.learner_update] = manifest.weights_digest
    except UnknownPolicyVersion:
        return digests
    finally:
        client.close()
    raise AssertionError("more versions than a short training makes")


def test_lockstep_gives_the_same_weights_twice_and_across_a_killed_learner(
    start_stack: Callable[..., Any],
) -> None:
    """Three runs of equal seed, one with its learner killed, publish the same weights at every update."""
    stack = start_stack()
    train(stack, "killed", KILL_AT, lambda: stack.kill("learn"))
    train(stack, "first")
    train(stack, "second")

    expected = weights_by_update(stack, "first")

    shared = range(UPDATES - 1)  # the last update may not be published before the client leaves
    assert len(set(expected.values())) == len(expected) >= len(shared)
    for run in ("second", "killed"):
        seen = weights_by_update(stack, run)
        assert [seen[update] for update in shared] == [expected[update] for update in shared]
