"""A training session: one client runtime that steps environments until it has learned, or is told to stop.

`commands.train` and `commands.demo` drive it; acting happens in a thread of its own, so that the view goes on
and Ctrl-C is heard while acting waits for the learner.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from relayrl_cli.environments import make_environment
from relayrl_cli.meters import RateMeter, ReturnsMeter
from relayrl_cli.plan import TrainingPlan
from relayrl_cli.run_view import RunView
from relayrl_cli.table import Progress, View
from relayrl_client.environment_runner import EnvironmentRunner, EpisodeSummary
from relayrl_shared.errors import EpisodeError, PacingTimeout, RelayRLError, RunFailed

if TYPE_CHECKING:
    from relayrl_client.agent import Agent

SHOW_SECONDS = 0.25
FLUSH_SECONDS = 20.0
ABANDON_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a session ended. seconds counts from the first step; learned: the target return was reached."""

    steps: int
    episodes: int
    mean_return: float | None
    seconds: float
    learned: bool
    interrupted: bool
    policy: str
    policy_version: int
    undelivered: int | None
    """Trajectories that still wait in the spool; None where there is no spool."""
    abandoned: bool = False
    """Acting did not end in time: its open episodes were not recorded."""


class TrainingSession:
    """Trains with an agent that has not been started. Used once.

    Args:
        plan: what to train and when to end.
        agent: built for it.
        servers: how the servers see the run.
        trouble: why the services behind it cannot go on; None while they can.
    """

    def __init__(
        self,
        plan: TrainingPlan,
        agent: Agent,
        servers: RunView,
        trouble: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.plan = plan
        self._agent = agent
        self._servers = servers
        self._trouble = trouble
        self._returns = ReturnsMeter()
        self._rate = RateMeter()
        self._runner: EnvironmentRunner | None = None
        self._finish = threading.Event()
        self._learned = False
        self._failure: BaseException | None = None
        self._first_step_at: float | None = None
        self._seconds = 0.0
        self._outcome: Outcome | None = None
        self._acted: tuple[int | None, int | None] = (None, None)

    def run(self, stop: threading.Event, view: View) -> Outcome:
        """Trains until the target return, the last step, or `stop`; then delivers what was recorded.

        Raises:
            RunFailed: the run or its services failed for good, with the reason.
            RelayRLError: acting failed, or the servers refused; what was accepted is in the spool.
        """
        thread = threading.Thread(target=self._train, args=(stop, view), name="training", daemon=True)
        thread.start()
        reason = None
        while thread.is_alive():
            thread.join(SHOW_SECONDS)
            reason = self._why_failed()
            if stop.is_set() or reason is not None:
                self._end(thread)
                break
            if self._runner is not None:
                view.show(self.progress())
        if not stop.is_set():
            self._raise_failure(reason)
        outcome = self._outcome or self._describe(interrupted=stop.is_set())
        return replace(outcome, abandoned=thread.is_alive())

    def _end(self, thread: threading.Thread) -> None:
        """Ends acting, a wait for the learner too, and lets it deliver what was recorded."""
        self._finish.set()
        with contextlib.suppress(EpisodeError):  # it does not run (any more): nothing waits
            self._agent.runtime.stopping.set()
        thread.join(ABANDON_SECONDS if self._runner is None else 2 * FLUSH_SECONDS + ABANDON_SECONDS)

    def _why_failed(self) -> str | None:
        """Why there is nothing to wait for any more."""
        figures = self._servers.figures
        if figures is not None and figures.state == "failed":
            return f"run {self.plan.run} has failed: {figures.state_reason or 'see the log of its learner'}"
        return self._trouble()

    def _raise_failure(self, reason: str | None) -> None:
        if reason is None and isinstance(self._failure, RunFailed):
            self._servers.refresh()  # it knows the reason, heartbeats do not
            reason = self._why_failed()
        if reason is not None:
            raise RunFailed(reason) from self._failure
        if self._failure is not None:
            raise self._failure

    def progress(self) -> Progress:
        """Where the training stands now."""
        figures = self._servers.figures
        version, update = self._acting()
        steps, now = self._steps, time.monotonic()
        return Progress(
            seconds=self._elapsed(),
            steps=steps,
            steps_per_second=self._rate.rate(now, steps),
            episodes=self._returns.episodes,
            mean_return=self._returns.mean,
            policy_version=version,
            policy_lag=None if figures is None or update is None else max(0, figures.learner_update - update),
            stored_trajectories=None if figures is None else figures.stored_trajectories,
        )

    # ---- the acting thread --------------------------------------------------------------------------------

    def _train(self, stop: threading.Event, view: View) -> None:
        try:
            with self._agent.start() as agent:
                environment = make_environment(self.plan.environment, self.plan.actors)
                try:
                    runner = EnvironmentRunner(agent, environment)
                    self._act(runner, view)
                    runner.close()
                finally:
                    environment.close()
                self._deliver(agent, view)
                self._outcome = self._describe(interrupted=stop.is_set())
        except BaseException as error:  # noqa: BLE001  # raised again in the thread that waits
            self._failure = error

    def _act(self, runner: EnvironmentRunner, view: View) -> None:
        self._first_step_at = time.monotonic()
        self._runner = runner
        while not self._finish.is_set():
            left = None if self.plan.steps is None else self.plan.steps - runner.statistics.steps
            if left is not None and left <= 0:
                break
            try:
                runner.run(steps=left, stop=self._finish, on_episode=self._note)
            except PacingTimeout as error:
                if not self._finish.is_set():
                    view.say(f"still waiting: {error}")
        self._seconds = self._elapsed()
        self._first_step_at = None

    def _note(self, episode: EpisodeSummary) -> None:
        self._returns.add([episode.episode_return])
        target, mean = self.plan.target_return, self._returns.mean
        if target is not None and mean is not None and self._returns.is_full and mean >= target:
            self._learned = True
            self._finish.set()

    def _deliver(self, agent: Agent, view: View) -> None:
        try:
            agent.flush(FLUSH_SECONDS)
            agent.runtime.delivery.drain(FLUSH_SECONDS)
        except RelayRLError as error:
            view.say(f"not everything was delivered: {error}")
        self._servers.refresh()
        view.show(self.progress())

    # ---- figures ------------------------------------------------------------------------------------------

    @property
    def _steps(self) -> int:
        return 0 if self._runner is None else self._runner.statistics.steps

    def _elapsed(self) -> float:
        return self._seconds if self._first_step_at is None else time.monotonic() - self._first_step_at

    def _acting(self) -> tuple[int | None, int | None]:
        """Version in use, and the finished updates that it comes from (known for local inference only)."""
        if self._agent.is_running:
            runtime = self._agent.runtime
            version = runtime.inference.policy_version
            slot = runtime.slot
            update = None if slot is None or slot.is_empty else slot.current.learner_update
            self._acted = (version if version >= 0 else None, update)
        return self._acted

    def _describe(self, *, interrupted: bool) -> Outcome:
        version, _ = self._acting()
        running = self._agent.is_running
        reports = self._agent.runtime.spool_reports() if running else ()
        waiting = [
            report.highest_accepted - report.oldest_unacknowledged + 1
            for report in reports
            if report.oldest_unacknowledged is not None
        ]
        return Outcome(
            steps=self._steps,
            episodes=self._returns.episodes,
            mean_return=self._returns.mean,
            seconds=self._elapsed(),
            learned=self._learned,
            interrupted=interrupted,
            policy=self._agent.runtime.standing.policy if running else self.plan.run,
            policy_version=-1 if version is None else version,
            undelivered=sum(waiting) if running else None,
        )
