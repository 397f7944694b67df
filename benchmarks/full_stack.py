"""What benchmarks of the whole loop share: a directory, a training against a stack, and proof of what it did.

`learning`, `distributed_cost` and `recovery` drive it. A figure counts only where the run's audit holds
(contracts C2) and the learner has learned.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from relayrl_cli.addresses import Ports
from relayrl_cli.agents import build_training_agent
from relayrl_cli.client_log import log_to_file
from relayrl_cli.commands.audit import holds
from relayrl_cli.plan import TrainingPlan
from relayrl_cli.run_view import RunView, ask_training_server
from relayrl_cli.stack import Stack, StackPlan, plan_stack
from relayrl_cli.table import LineView, View
from relayrl_cli.train import Outcome, TrainingSession
from relayrl_shared.store.interface import Audit
from relayrl_shared.store.open import open_store

PROGRESS_SECONDS = 10.0


class UnsoundFigureError(RuntimeError):
    """What was measured did not do its work, so that its figure means nothing."""


def say(line: str) -> None:
    """A line for people, on stderr; stdout is for figures."""
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def progress_view() -> View:
    """Where a training stands, on stderr every ten seconds."""
    return LineView(sys.stderr, PROGRESS_SECONDS)


@contextmanager
def temporary_directory(prefix: str) -> Iterator[Path]:
    """A directory that goes with the block, unless the block raises: then it stays, for its logs."""
    directory = Path(tempfile.mkdtemp(prefix=f"relayrl-{prefix}-"))
    try:
        yield directory
    except BaseException:
        say(f"state and logs are kept in {directory}")
        raise
    shutil.rmtree(directory)


@contextmanager
def running_stack(plan: StackPlan, stop: threading.Event | None = None) -> Iterator[Stack]:
    """All services of a plan, ready (unless `stop` was set meanwhile); drained at the end."""
    with Stack(plan, report=say) as stack:
        stack.start(stop or threading.Event())
        yield stack


def local_stack(directory: Path) -> StackPlan:
    """A stack on free ports with its state, and the log of this process, in `directory`."""
    log_to_file(directory)
    return plan_stack(directory, Ports.free())


def train(plan: TrainingPlan, services: StackPlan, stop: threading.Event, view: View) -> Outcome:
    """One training against running services, in this process.

    Raises:
        RelayRLError: acting failed, or the servers refused.
    """
    agent = build_training_agent(plan, services.addresses, services.directory)
    ask = partial(ask_training_server, services.addresses.training_http, plan.run)
    with RunView(ask) as servers, view:
        return TrainingSession(plan, agent, servers).run(stop, view)


@dataclass(frozen=True, slots=True)
class Ledger:
    """What the store says of a run: the audit, how many steps it has, and finished updates."""

    audit: Audit
    steps: int
    learner_update: int


def read_ledger(store_url: str, run: str) -> Ledger:
    """Reads the store of a stack, which may still run.

    Raises:
        UnsoundFigureError: the store has no such run.
    """
    store = open_store(store_url)
    try:
        found = store.run_by_name(run)
        if found is None:
            raise UnsoundFigureError(f"the store has no run {run!r}")
        steps = store.counts(found.run_id)["steps"]
        return Ledger(store.audit(found.run_id), steps, store.learner_update(found.run_id))
    finally:
        store.close()


def check_ledger(ledger: Ledger, *, recorded_steps: int, actors: int) -> None:
    """Everything recorded is stored, nothing twice, and the learner has used it.

    Args:
        ledger: read after the client has delivered and left.
        recorded_steps: of all actors; each may have lost the one step whose reward was still unknown.
        actors: how many there were.

    Raises:
        UnsoundFigureError: it is not so.
    """
    audit = ledger.audit
    sound = {
        "the audit identity holds": holds(audit),
        "nothing waits in the spool": audit.in_spool == 0 and audit.dropped == 0 and audit.quarantined == 0,
        f"all {recorded_steps} steps are stored": recorded_steps - actors <= ledger.steps <= recorded_steps,
        "the learner has learned": ledger.learner_update > 0 and audit.used > 0,
    }
    wrong = [claim for claim, true in sound.items() if not true]
    if wrong:
        raise UnsoundFigureError(f"not so: {'; '.join(wrong)}: {ledger}")
