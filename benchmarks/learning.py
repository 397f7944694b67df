"""Whether the presets learn: each trained through all the services on several seeds, then tested greedily.

A cell is a preset on one seed. It trains until its training mean over the last 100 episodes reaches the
preset's target, or its budget is spent; what counts is the greedy mean over 100 episodes on fresh seeds
(contracts O). A finished cell is a file in the results directory; `--resume` skips those that are there.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from full_stack import (
    UnsoundFigureError,
    check_ledger,
    local_stack,
    progress_view,
    read_ledger,
    running_stack,
    say,
    temporary_directory,
    train,
)
from harness import Options, Report

from relayrl_cli import presets
from relayrl_cli.agents import build_evaluation_agent
from relayrl_cli.evaluate import Evaluation, evaluate_policy
from relayrl_cli.plan import TrainingPlan, plan_from_preset
from relayrl_cli.run_view import ask_training_server
from relayrl_cli.stack import StackPlan
from relayrl_cli.train import Outcome
from relayrl_shared.errors import RelayRLError
from relayrl_shared.lifecycle import StopSignal
from relayrl_shared.registry_client import RegistryClient

INTERRUPTED = 130
RESULTS = Path("relayrl-data") / "learning"
EPISODES = 100
QUICK_STEPS = 4096
QUICK_EPISODES = 10
SETTLED_SECONDS = 2.0
EVALUATION_TRIES = 4
SETTLE_LIMIT_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Task:
    """What must be learned: `threshold` is the greedy mean return to reach within `budget_steps`."""

    preset: str
    algorithm: str
    environment: str
    seeds: tuple[int, ...]
    budget_steps: int
    threshold: float

    @property
    def name(self) -> str:
        """As `--only` names it."""
        return f"{self.algorithm}/{self.environment}"


TASKS = (
    Task("cartpole-ppo", "PPO", "CartPole-v1", (1, 2, 3, 4, 5), 150_000, 475.0),
    Task("cartpole-reinforce", "REINFORCE", "CartPole-v1", (1, 2, 3, 4, 5), 2_000_000, 400.0),
    Task("pendulum-ppo", "PPO", "Pendulum-v1", (1, 2, 3), 300_000, -300.0),
)


class Cell(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What came of one cell; its file.

    training_mean: of the last 100 training episodes, None if none ended. greedy_mean, greedy_lowest: of
    `greedy_episodes` episodes on fresh seeds. training_seconds: from the first step to the last.
    startup_seconds: until every service was ready. commit: of the checkout, `+` where it had changes.
    """

    preset: str
    algorithm: str
    environment: str
    seed: int
    quick: bool
    budget_steps: int
    threshold: float
    steps: int
    training_episodes: int
    training_mean: float | None
    target_reached: bool
    greedy_mean: float
    greedy_lowest: float
    greedy_episodes: int
    policy_version: int
    learner_updates: int
    training_seconds: float
    startup_seconds: float
    commit: str
    machine: str

    @property
    def passed(self) -> bool:
        """Whether the policy is good enough within the budget."""
        return self.greedy_mean >= self.threshold

    @property
    def name(self) -> str:
        """As a figure."""
        return f"{self.algorithm}/{self.environment}/{self.seed}"


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command line asked for."""

    tasks: tuple[Task, ...]
    resume: bool
    results: Path
    options: Options


def parse(arguments: Sequence[str] | None = None) -> Plan:
    """Reads the command line; `--quick` takes one seed, few steps and few episodes of each task."""
    names = [task.name for task in TASKS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=names, help="one of the tasks")
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of the seeds of the tasks")
    parser.add_argument("--resume", action="store_true", help="skip cells whose results are there")
    parser.add_argument("--results", type=Path, default=RESULTS, help="a file a cell (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="end with status 1 where a threshold is missed")
    parser.add_argument("--quick", action="store_true", help="show that the benchmark runs; learns nothing")
    given = parser.parse_args(arguments)
    chosen = tuple(
        _fitted(task, given.seeds, given.quick) for task in TASKS if given.only in (None, task.name)
    )
    return Plan(chosen, given.resume, given.results, Options(quick=given.quick, check=given.check))


def _fitted(task: Task, seeds: list[int] | None, quick: bool) -> Task:
    chosen = tuple(dict.fromkeys(seeds or (task.seeds[:1] if quick else task.seeds)))
    budget = QUICK_STEPS if quick else task.budget_steps
    return Task(task.preset, task.algorithm, task.environment, chosen, budget, task.threshold)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is asked; 130 on Ctrl-C, with the finished cells kept."""
    plan = parse(arguments)
    plan.results.mkdir(parents=True, exist_ok=True)
    report = Report("learning", plan.options)
    cells: list[Cell] = []
    with StopSignal() as stop:
        for task in plan.tasks:
            for seed in task.seeds:
                if not stop.event.is_set():
                    _run_or_read(plan, task, seed, report, cells, stop.event)
        interrupted = stop.event.is_set()
    print(table(cells), flush=True)
    return INTERRUPTED if interrupted else report.status()


def _run_or_read(
    plan: Plan, task: Task, seed: int, report: Report, cells: list[Cell], stop: threading.Event
) -> None:
    file = cell_file(plan.results, task, seed, plan.options.quick)
    kept = read_cell(file) if plan.resume else None
    try:
        cell = kept or run_cell(task, seed, plan.options.quick, stop)
    except (RelayRLError, UnsoundFigureError) as error:
        say(f"{task.name}/{seed} gave no result: {error}")
        report.missed.append(f"{task.name}/{seed}")
        return
    if cell is None:
        return
    if kept is None:
        write_cell(file, cell)
    note(report, cell, resumed=kept is not None)
    cells.append(cell)


def note(report: Report, cell: Cell, *, resumed: bool) -> None:
    """Prints the line of a cell and remembers a miss; a quick cell is not judged."""
    details = {name: value for name, value in msgspec.to_builtins(cell).items() if name != "quick"}
    report.figure(cell.name, cell.greedy_mean, "return", passed=cell.passed, resumed=resumed, **details)
    if not cell.passed and not cell.quick:
        report.missed.append(cell.name)


# ---- a cell -----------------------------------------------------------------------------------------------


def run_cell(task: Task, seed: int, quick: bool, stop: threading.Event) -> Cell | None:
    """Trains and tests one cell on a stack of its own; None if `stop` came first.

    Raises:
        RelayRLError: the stack did not start, or training failed.
        UnsoundFigureError: something was lost, or the policy that was tested is not the final one.
    """
    preset = presets.load(task.preset)
    steps = task.budget_steps - preset.actors + 1  # the last tick is finished, and the budget holds
    plan = plan_from_preset(preset, task.preset, steps=steps, seed=seed)
    say(f"{task.name}/{seed}: at most {task.budget_steps:,} steps")
    with temporary_directory("learning") as directory:
        services = local_stack(directory)
        began = time.monotonic()
        with running_stack(services, stop):
            startup_seconds = time.monotonic() - began
            if stop.is_set():
                return None
            outcome = train(plan, services, stop, progress_view())
            if outcome.interrupted or stop.is_set():
                return None
            result = evaluate_final(plan, services, QUICK_EPISODES if quick else EPISODES)
        ledger = read_ledger(services.store, plan.run)
        check_ledger(ledger, recorded_steps=outcome.steps, actors=plan.actors)
    return _cell(task, seed, quick, outcome, result, ledger.learner_update, startup_seconds)


def evaluate_final(plan: TrainingPlan, services: StackPlan, episodes: int) -> Evaluation:
    """Tests the policy that the learner ends with, through the inference server.

    Raises:
        UnsoundFigureError: new versions came while it was tested, again and again.
    """
    for _ in range(EVALUATION_TRIES):
        final = settled_version(plan.run, services)
        result = evaluate_policy(build_evaluation_agent(plan, services.addresses), plan.environment, episodes)
        if result.policy_version == final:
            return result
        say(f"version {result.policy_version} was tested, version {final} seemed final: once more")
    raise UnsoundFigureError("the learner publishes on and on after the last step")


def settled_version(run: str, services: StackPlan) -> int:
    """The newest version of the run once its learner has used what there was."""
    update, since, pause = -1, time.monotonic(), threading.Event()
    deadline = since + SETTLE_LIMIT_SECONDS
    while time.monotonic() < min(deadline, since + SETTLED_SECONDS):
        figures = ask_training_server(services.addresses.training_http, run)
        if figures is not None and figures.learner_update != update:
            update, since = figures.learner_update, time.monotonic()
        pause.wait(0.1)
    registry = RegistryClient(f"tcp://{services.addresses.model_server}")
    try:
        return registry.latest_version(run)
    finally:
        registry.close()


def _cell(
    task: Task,
    seed: int,
    quick: bool,
    outcome: Outcome,
    result: Evaluation,
    updates: int,
    startup_seconds: float,
) -> Cell:
    return Cell(
        preset=task.preset,
        algorithm=task.algorithm,
        environment=task.environment,
        seed=seed,
        quick=quick,
        budget_steps=task.budget_steps,
        threshold=task.threshold,
        steps=outcome.steps,
        training_episodes=outcome.episodes,
        training_mean=None if outcome.mean_return is None else round(outcome.mean_return, 2),
        target_reached=outcome.learned,
        greedy_mean=round(result.mean, 2),
        greedy_lowest=round(min(result.returns), 2),
        greedy_episodes=len(result.returns),
        policy_version=result.policy_version,
        learner_updates=updates,
        training_seconds=round(outcome.seconds, 2),
        startup_seconds=round(startup_seconds, 2),
        commit=commit(),
        machine=machine(),
    )


# ---- results ----------------------------------------------------------------------------------------------


def cell_file(results: Path, task: Task, seed: int, quick: bool) -> Path:
    """Where a cell's result lies; quick ones apart, so that none passes for a real one."""
    return results / f"{task.preset}-seed-{seed}{'-quick' if quick else ''}.json"


def write_cell(file: Path, cell: Cell) -> None:
    """Replaces the file in one step."""
    draft = file.with_suffix(".json.new")
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(cell), indent=2))
    draft.replace(file)


def read_cell(file: Path) -> Cell | None:
    """A finished cell; None if there is none, or its file is of another form."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Cell)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        say(f"{file} is not used: {error}")
        return None


def commit() -> str:
    """The commit of this checkout, `unknown` where it is none."""
    command = ("git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+")
    try:
        answer = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.strip()


def machine() -> str:
    """System, architecture, processors and Python of this machine."""
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}"
    )


HEADINGS = (
    *("cell", "steps", "seconds", "start-up", "training mean", "greedy mean", "lowest", "threshold"),
    "passed",
)


def table(cells: Iterable[Cell]) -> str:
    """A line a cell and a line a task, in columns."""
    cells = list(cells)
    rows = [HEADINGS, *map(_row, cells)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([*lines, *_totals(cells)])


def _row(cell: Cell) -> tuple[str, ...]:
    return (
        cell.name,
        f"{cell.steps:,}",
        f"{cell.training_seconds:.1f}",
        f"{cell.startup_seconds:.1f}",
        "-" if cell.training_mean is None else f"{cell.training_mean:.1f}",
        f"{cell.greedy_mean:.1f}",
        f"{cell.greedy_lowest:.1f}",
        f"{cell.threshold:g}",
        "yes" if cell.passed else "NO",
    )


def _totals(cells: list[Cell]) -> list[str]:
    """How many seeds of each task passed."""
    tasks: dict[str, list[bool]] = {}
    for cell in cells:
        tasks.setdefault(f"{cell.algorithm}/{cell.environment}", []).append(cell.passed)
    return [f"{name}: {sum(passed)} of {len(passed)} seeds" for name, passed in tasks.items()]


if __name__ == "__main__":
    sys.exit(main())
