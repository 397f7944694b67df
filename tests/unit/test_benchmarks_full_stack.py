"""What the whole-loop benchmarks decide without a stack: soundness, fixed plans, turns, kills, figures."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from relayrl_cli import presets
from relayrl_cli.addresses import Ports
from relayrl_cli.stack import plan_stack
from relayrl_shared.store.interface import Audit

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODULES = ("full_stack", "distributed_cost", "recovery", "harness")


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[dict[str, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def full_stack(benchmarks: dict[str, ModuleType]) -> ModuleType:
    return benchmarks["full_stack"]


@pytest.fixture(scope="module")
def distributed_cost(benchmarks: dict[str, ModuleType]) -> ModuleType:
    return benchmarks["distributed_cost"]


@pytest.fixture(scope="module")
def recovery(benchmarks: dict[str, ModuleType]) -> ModuleType:
    return benchmarks["recovery"]


def make_ledger(full_stack: ModuleType, *, steps: int = 1000, learner_update: int = 3, **changes: Any) -> Any:
    counts = {
        "accepted": 10,
        "stored": 10,
        "quarantined": 0,
        "dropped": 0,
        "in_spool": 0,
        "missing": 0,
        "stored_twice": 0,
        "used": 8,
        "used_twice": 0,
        "unread": 2,
    }
    audit = Audit(run_id="r", unused={}, **(counts | changes))
    return full_stack.Ledger(audit, steps, learner_update)


@pytest.mark.parametrize("steps", [992, 1000])
def test_a_sound_ledger_is_accepted(full_stack: ModuleType, steps: int) -> None:
    """Each actor may lose the step whose reward was not known, nothing else is missing."""
    full_stack.check_ledger(make_ledger(full_stack, steps=steps), recorded_steps=1000, actors=8)


@pytest.mark.parametrize(
    ("changes", "claim"),
    [
        ({"missing": 1}, "identity"),
        ({"stored_twice": 1}, "identity"),
        ({"used_twice": 1}, "identity"),
        ({"in_spool": 1}, "spool"),
        ({"dropped": 1}, "spool"),
        ({"quarantined": 1}, "spool"),
        ({"steps": 991}, "steps are stored"),
        ({"steps": 1001}, "steps are stored"),
        ({"learner_update": 0}, "learned"),
        ({"used": 0}, "learned"),
    ],
)
def test_an_unsound_ledger_is_refused(full_stack: ModuleType, changes: dict[str, int], claim: str) -> None:
    """Anything lost, doubled, left over or not learned from makes the figure void, and is named."""
    ledger = make_ledger(full_stack, **changes)
    with pytest.raises(full_stack.UnsoundFigureError, match=claim):
        full_stack.check_ledger(ledger, recorded_steps=1000, actors=8)


def test_directory_goes_unless_the_block_raises(
    full_stack: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """State is removed after success, and kept and named after a failure."""
    monkeypatch.setattr(full_stack.tempfile, "tempdir", str(tmp_path))
    with full_stack.temporary_directory("good") as good:
        (good / "file").touch()
    assert not good.exists()
    with pytest.raises(ZeroDivisionError), full_stack.temporary_directory("bad") as bad:
        raise ZeroDivisionError
    assert bad.is_dir()
    assert str(bad) in capsys.readouterr().err


def test_fixed_plan_is_the_preset_without_a_target(distributed_cost: ModuleType) -> None:
    """Both contenders take all the steps with the preset's settings, however well the policy does."""
    plan = distributed_cost.fixed_plan(4096)
    preset = presets.load("cartpole-ppo")
    assert (plan.steps, plan.target_return) == (4096, None)
    assert (plan.hyperparameters, plan.actors) == (preset.hyperparameters, preset.actors)
    assert (plan.pacing, plan.max_policy_lag, plan.seed) == ("block", 1, preset.seed)


def test_turns_begin_with_each_contender_in_turn(distributed_cost: ModuleType) -> None:
    """Both run in every turn, and the first of one turn is the last of the next."""
    names = ["full_stack", "in_process"]
    assert distributed_cost.in_turn(names, 0) == names
    assert distributed_cost.in_turn(names, 1) == names[::-1]
    assert distributed_cost.in_turn(names, 2) == names


def test_ratio_is_of_medians(distributed_cost: ModuleType) -> None:
    """One slow repeat does not move the ratio."""
    assert distributed_cost.ratio([600.0, 10.0, 620.0], [1000.0, 1200.0, 1.0]) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("rates", "arguments", "status"),
    [((599.0, 1000.0), ("--check",), 1), ((600.0, 1000.0), ("--check",), 0), ((599.0, 1000.0), (), 0)],
)
def test_distributed_cost_prints_rates_and_a_judged_ratio(
    distributed_cost: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    rates: tuple[float, float],
    arguments: tuple[str, ...],
    status: int,
) -> None:
    """Each contender has a figure; the full stack must reach 60 % of the one process under --check."""
    answers = {distributed_cost.full_stack: rates[0], distributed_cost.in_process: rates[1]}
    monkeypatch.setattr(distributed_cost, "in_fresh_process", lambda measure, steps: answers[measure])
    assert distributed_cost.main(["--quick", *arguments]) == status
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()][1:]
    assert [line["figure"] for line in lines] == ["full_stack", "in_process", "full_stack_to_in_process"]
    assert (lines[2]["met"], lines[2]["at_least"]) == (rates[0] >= 600, 0.6)


def test_every_process_is_killed(recovery: ModuleType, tmp_path: Path) -> None:
    """All five kinds of process are there, each with an address of its own."""
    plan = recovery.stack_for_kills(tmp_path, Ports(), 4321)
    services = recovery.services_of(recovery.Stack(plan, report=print), "http://127.0.0.1:4321")
    assert [service.name for service in services] == [
        "model_registry",
        "supervisor",
        "ingest",
        "learner",
        "inference_server",
    ]
    assert len({service.url for service in services}) == 5
    supervisor = next(spec for spec in plan.processes if spec.name == "training-server")
    assert "training_server_config.learner.http.port=4321" in supervisor.command
    assert plan.restart.limit > 1000


def test_ingest_is_found_where_the_stack_puts_it(recovery: ModuleType, tmp_path: Path) -> None:
    """The URL of ingest is that of the stack's ports."""
    ports = Ports(ingest_http=4321)
    assert recovery.ingest_url(plan_stack(tmp_path, ports)) == "http://127.0.0.1:4321"


def test_child_is_found_by_the_beginning_of_its_name(recovery: ModuleType) -> None:
    """A learner is called after its run; a child that is being started has no process yet."""
    children = [{"name": "ingest", "pid": 7}, {"name": "learner cartpole", "pid": None}]
    assert recovery.child_pid(children, "ingest") == 7
    assert recovery.child_pid(children, "learner ") is None
    assert recovery.child_pid([], "ingest") is None


@pytest.mark.parametrize(("before", "now", "successor"), [(5, 5, None), (5, None, None), (5, 6, 6)])
def test_a_successor_is_another_process(
    recovery: ModuleType, before: int, now: int | None, successor: int | None
) -> None:
    """The killed process, not yet noticed, is no successor; neither is none."""
    assert recovery.other_than(before, now) == successor


def test_waiting_takes_the_first_answer_and_gives_up(
    recovery: ModuleType, full_stack: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is waited for may be nought, only None is no answer; past the limit the figure is void."""
    answers = iter([None, None, 0, 1])
    monkeypatch.setattr(recovery, "POLL_SECONDS", 0.0)
    assert recovery.wait_for(lambda: next(answers), "a number") == 0
    monkeypatch.setattr(recovery, "WAIT_SECONDS", 0.0)
    with pytest.raises(full_stack.UnsoundFigureError, match="a miracle"):
        recovery.wait_for(lambda: None, "a miracle")


def test_start_times_are_corrected_to_the_wall_clock(recovery: ModuleType) -> None:
    """The system rounds its boot time down to a second, so that start times lie less than that too early."""
    assert -0.1 < recovery.start_time_skew() < 1.5


@pytest.mark.parametrize(("seconds", "met"), [((9.0, 4.0, 4.9), True), ((5.1, 1.0, 6.0), False)])
def test_the_median_recovery_is_judged(
    recovery: ModuleType,
    benchmarks: dict[str, ModuleType],
    capsys: pytest.CaptureFixture[str],
    seconds: tuple[float, ...],
    met: bool,
) -> None:
    """A service must be ready within five seconds of its exec, in the median of its kills."""
    harness = benchmarks["harness"]
    report = harness.Report("recovery", harness.Options(quick=True, check=True))
    recovery.report_service(report, "ingest", [recovery.Recovery(value, value + 1, 2.0) for value in seconds])
    figure, judged = [json.loads(line) for line in capsys.readouterr().out.splitlines()][1:]
    assert (figure["figure"], figure["unit"]) == ("ingest_exec_to_ready", "seconds")
    assert (figure["kill_to_ready"], figure["cpu"]) == (figure["value"] + 1, 2.0)
    assert (judged["figure"], judged["met"], report.status()) == ("ingest_to_target", met, not met)


def test_a_successor_that_dies_is_a_miss(
    recovery: ModuleType, benchmarks: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    """However fast the next one was: a service that dies again on its way up fails a check."""
    harness = benchmarks["harness"]
    report = harness.Report("recovery", harness.Options(quick=True, check=True))
    recovery.report_service(report, "ingest", [recovery.Recovery(1.0, 9.0, 1.0, 1)])
    figure = json.loads(capsys.readouterr().out.splitlines()[1])
    assert figure["deaths"] == 1
    assert report.status() == 1


def test_a_kill_is_measured_by_the_successor_that_stays(
    recovery: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A successor that is gone when the service is ready counts as a death; the one that is there counts."""
    pids = iter([10, 10, 11, 12, 12, 12])

    class Process:
        def __init__(self, pid: int) -> None:
            self.pid = pid

        def create_time(self) -> float:
            """Later for the later one."""
            return float(self.pid)

        def cpu_times(self) -> Any:
            """A second and a half."""
            return SimpleNamespace(user=1.0, system=0.5)

    monkeypatch.setattr(recovery.psutil, "Process", Process)
    monkeypatch.setattr(recovery.os, "kill", lambda pid, number: None)
    monkeypatch.setattr(recovery, "await_ready", lambda service: 15.0)
    monkeypatch.setattr(recovery, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(recovery.time, "time", lambda: 9.0)
    service = recovery.Service("ingest", lambda: next(pids), "http://127.0.0.1:1")
    assert recovery.kill(service, 0.5) == recovery.Recovery(15.0 - 12.5, 15.0 - 9.0, 1.5, 1)
    assert "process 11" in capsys.readouterr().err
