"""SIGKILL of every process of the training server while CartPole is learned: nothing lost, nothing twice."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from relayrl_cli import presets
from relayrl_cli.agents import build_training_agent
from relayrl_cli.plan import TrainingPlan, plan_from_preset
from relayrl_cli.run_view import RunView
from relayrl_cli.table import Progress
from relayrl_cli.train import Outcome, TrainingSession
from relayrl_client.agent import Agent
from relayrl_client.delivery import RoutedDelivery
from relayrl_shared.store.open import open_store

if TYPE_CHECKING:
    from relayrl_shared.testing.postgres import PostgresServer

KILLS_PER_PROCESS = 5
PROCESSES = ("ingest", "learn", "supervise")
TRAINING_SECONDS = 240.0

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(400)]


class Quiet:
    """A view that shows nothing."""

    def show(self, progress: Progress) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Nothing."""

    def __enter__(self) -> Quiet:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return None


class Training:
    """A training session in a thread, with its accepted ids in a ledger."""

    def __init__(self, plan: TrainingPlan, stack: Any, ledger: Any) -> None:
        self.agent: Agent = build_training_agent(
            plan, stack.file.addresses, stack.directory, on_accepted=ledger.note
        )
        self._session = TrainingSession(plan, self.agent, RunView(lambda: None))
        self._stop = threading.Event()
        self.outcome: Outcome | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.outcome = self._session.run(self._stop, Quiet())
        except BaseException as error:  # noqa: BLE001  # told to the test
            self.error = error

    @property
    def acknowledged(self) -> int:
        """Trajectories that the server has acknowledged."""
        if not self.agent.is_running:
            return 0
        delivery = self.agent.runtime.delivery
        assert isinstance(delivery, RoutedDelivery)
        statistics = delivery.sender_statistics()
        return 0 if statistics is None else statistics.acknowledged_total

    def wait_acknowledged(self, count: int) -> None:
        """Returns once so many trajectories are acknowledged, or the training is over."""
        deadline = time.monotonic() + 60
        while self.acknowledged < count and self._thread.is_alive():
            assert time.monotonic() < deadline, f"only {self.acknowledged} acknowledged of {count}"
            time.sleep(0.01)

    def finish(self, timeout_seconds: float) -> Outcome:
        """Waits for the end; stops it when the time is over."""
        self._thread.join(timeout_seconds)
        self._stop.set()
        self._thread.join(60)
        if self.error is not None:
            raise self.error
        assert self.outcome is not None
        return self.outcome


def kill_all_in_turn(stack: Any, training: Training, dice: random.Random) -> None:
    """Five SIGKILLs a process, each after new acknowledgements, at a random moment."""
    order = [name for name in PROCESSES for _ in range(KILLS_PER_PROCESS)]
    dice.shuffle(order)
    for name in order:
        training.wait_acknowledged(training.acknowledged + 1)
        time.sleep(dice.uniform(0.0, 0.4))  # the random moment
        stack.kill(name)


def stored_ids(url: str, run: str) -> list[str]:
    """Every trajectory id in the store."""
    store = open_store(url)
    try:
        record = store.run_by_name(run)
        assert record is not None
        return list(store.trajectory_ids(record.run_id))
    finally:
        store.close()


def learn_under_fire(stack: Any, ledger: Any, seed: int) -> tuple[Outcome, str]:
    """Trains CartPole while processes die; the outcome and the run's name."""
    print(f"seed of the kills: {seed}")  # noqa: T201  # shown when the test fails
    preset = presets.load("cartpole-ppo")
    plan = plan_from_preset(preset, "under-fire", steps=3_000_000)
    training = Training(plan, stack, ledger)
    kill_all_in_turn(stack, training, random.Random(seed))
    return training.finish(TRAINING_SECONDS), plan.run


def check_books(stack: Any, ledger: Any, outcome: Outcome, run: str, relayrl: Callable[..., Any]) -> None:
    """The test's own ledger against the store, then what `relayrl audit` says."""
    stored = stored_ids(stack.file.store, run)

    assert outcome.undelivered == 0
    assert len(stored) == len(set(stored))
    assert ledger.ids() - set(stored) == set()
    audit = relayrl("audit", run, "--dir", stack.directory)
    assert audit.returncode == 0, audit.stdout + audit.stderr
    assert "the identity holds" in audit.stdout


def test_cartpole_is_learned_while_every_process_of_the_training_server_dies_five_times(
    start_stack: Callable[..., Any], ledger: Any, relayrl: Callable[..., Any]
) -> None:
    """Accepted = stored + spooled, none twice, and the mean return reaches 475 (SQLite)."""
    stack = start_stack()

    outcome, run = learn_under_fire(stack, ledger, seed=random.SystemRandom().randrange(2**32))

    check_books(stack, ledger, outcome, run, relayrl)
    assert outcome.learned, outcome


@pytest.mark.postgres
def test_the_same_against_postgres(
    start_stack: Callable[..., Any],
    ledger: Any,
    relayrl: Callable[..., Any],
    packaged_postgres: PostgresServer,
) -> None:
    """Accepted = stored + spooled, none twice, and the mean return reaches 475 (Postgres)."""
    stack = start_stack("--store", packaged_postgres.create_database())

    outcome, run = learn_under_fire(stack, ledger, seed=random.SystemRandom().randrange(2**32))

    check_books(stack, ledger, outcome, run, relayrl)
    assert outcome.learned, outcome
