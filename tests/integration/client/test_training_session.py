"""How a training session of the command line ends: by Ctrl-C in a wait, and by a run that failed."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium
import pytest

from relayrl_cli.plan import TrainingPlan
from relayrl_cli.run_view import RunFigures, RunView
from relayrl_cli.table import LineView
from relayrl_cli.train import Outcome, TrainingSession
from relayrl_client.agent import Agent
from relayrl_shared.errors import RunFailed
from relayrl_shared.spaces import ActionSpec, ObservationSpec
from relayrl_shared.testing.policies import make_artefact

TinyServer = Any  # of conftest, which cannot be imported

PLAN = TrainingPlan(run="tiny", environment="CartPole-v1", algorithm="PPO", actors=2)


class Session:
    """A session in a thread, whose server publishes one version only: its actors soon wait for the next."""

    def __init__(self, server: TinyServer, agent: Agent) -> None:
        self._server = server
        self._agent = agent
        self.stop = threading.Event()
        self.said = io.StringIO()
        self.figures: RunFigures | None = None
        self.trouble: str | None = None
        self.outcome: Outcome | None = None
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        view = RunView(lambda: self.figures, poll_seconds=0.02)
        try:
            with view as servers, LineView(self.said) as table:
                session = TrainingSession(PLAN, self._agent, servers, lambda: self.trouble)
                self.outcome = session.run(self.stop, table)
        except BaseException as error:  # noqa: BLE001  # looked at by the test
            self.failure = error

    def wait_for_the_wait(self) -> None:
        """Until the first rollout is stored: the next one waits for its update."""
        self._server.wait(lambda: len(self._server.stored) >= 2)

    def end(self, timeout_seconds: float = 30.0) -> float:
        """How long it takes to end."""
        began = time.monotonic()
        self._thread.join(timeout_seconds)
        assert not self._thread.is_alive()
        return time.monotonic() - began


@pytest.fixture
def session(server: TinyServer, online_agent: Callable[..., Agent]) -> Iterator[Session]:
    """A session that has begun to act and waits in lockstep."""
    environment = gymnasium.make("CartPole-v1")
    observation = ObservationSpec.from_gymnasium(environment.observation_space)
    action = ActionSpec.from_gymnasium(environment.action_space)
    server.versions[:] = [make_artefact(observation, action, policy="run-1", policy_version=1)]
    running = Session(server, online_agent(environment=environment, request_seconds=60.0))
    yield running
    running.stop.set()
    running.end(60.0)


def test_ctrl_c_in_a_wait_for_the_learner_ends_at_once_and_says_goodbye(
    server: TinyServer, session: Session
) -> None:
    """All that was recorded is delivered; the deadline of the wait does not matter."""
    session.wait_for_the_wait()
    session.stop.set()

    assert session.end() < 10
    assert session.failure is None
    assert session.outcome is not None
    assert (session.outcome.interrupted, session.outcome.abandoned) == (True, False)
    assert len(server.goodbyes) == 1
    assert server.goodbyes[0].spools[0].oldest_unacknowledged is None
    assert "still waiting" not in session.said.getvalue()


def test_a_failed_run_ends_the_session_with_the_reason(server: TinyServer, session: Session) -> None:
    """What the store says of the run is what the user reads."""
    session.wait_for_the_wait()
    session.figures = RunFigures(2, 0, "failed", "NonFiniteUpdate: update 1")

    assert session.end() < 10
    assert isinstance(session.failure, RunFailed)
    assert str(session.failure) == "run tiny has failed: NonFiniteUpdate: update 1"


def test_a_failed_run_is_seen_by_its_heartbeats_too(server: TinyServer, session: Session) -> None:
    """Where the control plane does not answer, the data plane tells."""
    session.wait_for_the_wait()
    server.run_state = "failed"

    assert session.end() < 10
    assert isinstance(session.failure, RunFailed)
    assert "run tiny has failed" in str(session.failure)


def test_services_that_are_down_for_good_end_the_session(session: Session) -> None:
    """There is nobody left to wait for."""
    session.wait_for_the_wait()
    session.trouble = "a service does not start any more"

    assert session.end() < 10
    assert isinstance(session.failure, RunFailed)
    assert str(session.failure) == "a service does not start any more"
