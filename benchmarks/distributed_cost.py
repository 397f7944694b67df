"""What being distributed costs: the full stack on one machine against all services in one process.

The same preset takes the same number of environment steps in both, in turn, each time in a fresh process; the
rate counts from the first step to the last. Every run must have stored all its steps and learned from them.
"""

from __future__ import annotations

import statistics
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

from full_stack import (
    check_ledger,
    local_stack,
    progress_view,
    read_ledger,
    running_stack,
    say,
    temporary_directory,
    train,
)
from harness import Report, parse_options

from relayrl_cli import presets
from relayrl_cli.agents import build_training_agent
from relayrl_cli.client_log import log_to_file
from relayrl_cli.in_process import InProcessStack
from relayrl_cli.plan import TrainingPlan, plan_from_preset
from relayrl_cli.run_view import RunView
from relayrl_cli.service_settings import default_store
from relayrl_cli.train import Outcome, TrainingSession

TARGET = 0.60
PRESET = "cartpole-ppo"
Measure = Callable[[int], float]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    options = parse_options(__doc__ or "", arguments)
    report = Report("distributed_cost", options)
    steps, repeats = (16_384, 1) if options.quick else (49_152, 3)
    contenders: dict[str, Measure] = {"full_stack": full_stack, "in_process": in_process}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats):
        for name in in_turn(list(contenders), turn):
            say(f"turn {turn + 1} of {repeats}: {name}, {steps:,} steps")
            rates[name].append(in_fresh_process(contenders[name], steps))
    for name, values in rates.items():
        report.figure(
            name,
            statistics.median(values),
            "environment steps/s",
            steps=steps,
            repeats=[round(value, 1) for value in values],
        )
    report.ratio("full_stack_to_in_process", ratio(rates["full_stack"], rates["in_process"]), at_least=TARGET)
    return report.status()


def in_turn(names: list[str], turn: int) -> list[str]:
    """The order of a turn: it goes round by one each time, so that a busy spell does not always meet one."""
    first = turn % len(names)
    return names[first:] + names[:first]


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Of the medians."""
    return statistics.median(numerator) / statistics.median(denominator)


def in_fresh_process(measure: Measure, steps: int) -> float:
    """Runs a measurement in a process that has run nothing before."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, steps).result()


def full_stack(steps: int) -> float:
    """Environment steps/s with every service a process of its own."""
    plan = fixed_plan(steps)
    with temporary_directory("full-stack") as directory:
        services = local_stack(directory)
        with running_stack(services):
            outcome = train(plan, services, threading.Event(), progress_view())
        return verified_rate(services.store, plan, outcome)


def in_process(steps: int) -> float:
    """Environment steps/s with every service in the client's process."""
    plan = fixed_plan(steps)
    with temporary_directory("in-process") as directory:
        log_to_file(directory)
        services = InProcessStack(directory)
        agent = build_training_agent(plan, services.addresses, directory)
        ask = partial(services.figures, plan.run)
        with services, RunView(ask) as servers, progress_view() as view:
            outcome = TrainingSession(plan, agent, servers).run(threading.Event(), view)
        return verified_rate(default_store(directory), plan, outcome)


def fixed_plan(steps: int) -> TrainingPlan:
    """The preset without its target, so that both contenders do the same work."""
    return replace(plan_from_preset(presets.load(PRESET), PRESET, steps=steps), target_return=None)


def verified_rate(store_url: str, plan: TrainingPlan, outcome: Outcome) -> float:
    """Steps per second of a training that lost nothing and learned.

    Raises:
        UnsoundFigureError: it did not.
    """
    ledger = read_ledger(store_url, plan.run)
    check_ledger(ledger, recorded_steps=outcome.steps, actors=plan.actors)
    say(f"{outcome.steps:,} steps in {outcome.seconds:.1f} s, {ledger.learner_update} updates, all stored")
    return outcome.steps / outcome.seconds


if __name__ == "__main__":
    sys.exit(main())
