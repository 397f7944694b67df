"""`relayrl train`: a client runtime against the services that run, or all of it in this process."""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path

from relayrl_cli.addresses import DEFAULT_DIRECTORY, Addresses, find_addresses
from relayrl_cli.agents import build_training_agent
from relayrl_cli.client_log import log_to_file
from relayrl_cli.plan import TrainingPlan, plan_from_arguments
from relayrl_cli.run_view import RunView, ask_training_server
from relayrl_cli.table import open_view
from relayrl_cli.train import Outcome, TrainingSession
from relayrl_shared.lifecycle import StopSignal


def run(arguments: argparse.Namespace) -> int:
    """0 when the training ended as asked, 1 when a target return was set and not reached, 130 on Ctrl-C."""
    plan = plan_from_arguments(arguments)
    with StopSignal() as stop:
        if arguments.in_process:
            outcome = _train_in_process(plan, arguments.directory, stop.event)
        else:
            addresses = find_addresses(arguments.directory, arguments.addresses)
            directory = arguments.directory or DEFAULT_DIRECTORY
            outcome = train(plan, addresses, directory, stop.event)
    print(summary(plan, outcome))
    return exit_status(plan, outcome)


def train(plan: TrainingPlan, addresses: Addresses, directory: Path, stop: threading.Event) -> Outcome:
    """One session against running services, with the live table; the spool lies below `directory`."""
    log_to_file(directory)
    agent = build_training_agent(plan, addresses, directory)
    ask = partial(ask_training_server, addresses.training_http, plan.run)
    with RunView(ask) as servers, open_view(sys.stdout) as view:
        return TrainingSession(plan, agent, servers).run(stop, view)


def _train_in_process(plan: TrainingPlan, directory: Path | None, stop: threading.Event) -> Outcome:
    from relayrl_cli.in_process import InProcessStack

    where = directory or Path(tempfile.mkdtemp(prefix="relayrl-in-process-"))
    log_to_file(where)
    print(f"all services in this process; state in {where}", flush=True)
    services = InProcessStack(where)
    agent = build_training_agent(plan, services.addresses, where)
    ask = partial(services.figures, plan.run)
    with services, RunView(ask) as servers, open_view(sys.stdout) as view:
        trouble = partial(services.trouble, plan.run)
        return TrainingSession(plan, agent, servers, trouble).run(stop, view)


def summary(plan: TrainingPlan, outcome: Outcome) -> str:
    """What was reached and what was kept, in a few lines."""
    mean = "no episode ended"
    if outcome.mean_return is not None:
        mean = f"mean return {outcome.mean_return:.1f} over the last 100 training episodes"
    lines = [
        f"run {plan.run}: {outcome.steps:,} steps, {outcome.episodes:,} episodes in {outcome.seconds:.1f} s; "
        f"{mean}; policy version {outcome.policy_version if outcome.policy_version >= 0 else 'none yet'}"
    ]
    if outcome.abandoned:
        lines.append("acting did not end in time: the episodes that were open are not recorded")
    elif outcome.interrupted:
        lines.append("interrupted; what was recorded is kept")
    if outcome.undelivered:
        lines.append(f"{outcome.undelivered} trajectories wait in the spool and are sent at the next start")
    return "\n".join(lines)


def exit_status(plan: TrainingPlan, outcome: Outcome) -> int:
    """0, 1 where a target was set and not reached, 130 where interrupted before."""
    if outcome.learned or plan.target_return is None:
        return 0
    return 130 if outcome.interrupted else 1
