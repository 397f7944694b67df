"""The learning benchmark's bookkeeping: what is asked, what a cell's file holds, what counts as passed."""

from __future__ import annotations

import importlib
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from relayrl_cli import presets
from relayrl_shared.errors import RelayRLError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def learning() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("learning")
    for name in ("learning", "full_stack", "harness"):
        sys.modules.pop(name, None)


def make_cell(learning: ModuleType, **changes: Any) -> Any:
    fields = {
        "preset": "cartpole-ppo",
        "algorithm": "PPO",
        "environment": "CartPole-v1",
        "seed": 1,
        "quick": False,
        "budget_steps": 150_000,
        "threshold": 475.0,
        "steps": 70_001,
        "training_episodes": 400,
        "training_mean": 476.5,
        "target_reached": True,
        "greedy_mean": 500.0,
        "greedy_lowest": 490.0,
        "greedy_episodes": 100,
        "policy_version": 274,
        "learner_updates": 273,
        "training_seconds": 41.5,
        "startup_seconds": 4.25,
        "commit": "abc",
        "machine": "here",
    }
    return learning.Cell(**(fields | changes))


class Runs:
    """Stands for `run_cell`: gives the cells that it was told, and notes which were asked for."""

    def __init__(self, learning: ModuleType, stop_after: int | None = None, **greedy_means: Any) -> None:
        self.learning = learning
        self.asked: list[tuple[str, int]] = []
        self._stop_after = stop_after
        self._answers = {int(seed.removeprefix("seed_")): answer for seed, answer in greedy_means.items()}

    def __call__(self, task: Any, seed: int, quick: bool, stop: threading.Event) -> Any:
        """A cell, an error, or nothing once it is to stop."""
        self.asked.append((task.name, seed))
        if self._stop_after is not None and len(self.asked) > self._stop_after:
            stop.set()
            return None
        answer = self._answers.get(seed, 500.0)
        if isinstance(answer, Exception):
            raise answer
        return make_cell(self.learning, preset=task.preset, seed=seed, quick=quick, greedy_mean=answer)


def run_main(learning: ModuleType, monkeypatch: pytest.MonkeyPatch, runs: Runs, *arguments: str) -> int:
    monkeypatch.setattr(learning, "run_cell", runs)
    status: int = learning.main([*arguments, "--only", "PPO/CartPole-v1"])
    return status


def test_tasks_are_what_the_presets_say(learning: ModuleType) -> None:
    """A preset trains what its task names, within the budget, and does not stop below the threshold."""
    for task in learning.TASKS:
        preset = presets.load(task.preset)
        assert (task.algorithm, task.environment) == (preset.algorithm, preset.environment)
        assert preset.steps == task.budget_steps
        assert preset.target_return is not None
        assert preset.target_return >= task.threshold


def test_everything_is_asked_for_by_default(learning: ModuleType) -> None:
    """Without options all tasks run on all their seeds, and nothing is skipped."""
    plan = learning.parse([])
    assert plan.tasks == learning.TASKS
    assert [len(task.seeds) for task in plan.tasks] == [5, 5, 3]
    assert not plan.resume
    assert not plan.options.check


def test_one_task_and_given_seeds(learning: ModuleType, tmp_path: Path) -> None:
    """--only takes one task, --seeds replaces its seeds, each once."""
    plan = learning.parse(
        ["--only", "PPO/Pendulum-v1", "--seeds", "7", "8", "7", "--results", str(tmp_path), "--resume"]
    )
    assert [(task.name, task.seeds) for task in plan.tasks] == [("PPO/Pendulum-v1", (7, 8))]
    assert plan.resume
    assert plan.results == tmp_path


def test_quick_takes_one_seed_and_few_steps(learning: ModuleType) -> None:
    """--quick runs every task once, briefly."""
    plan = learning.parse(["--quick"])
    assert [task.seeds for task in plan.tasks] == [(1,), (1,), (1,)]
    assert {task.budget_steps for task in plan.tasks} == {learning.QUICK_STEPS}


def test_unknown_task_is_refused(learning: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong --only ends with the names that there are."""
    with pytest.raises(SystemExit):
        learning.parse(["--only", "PPO/Nowhere-v1"])
    assert "REINFORCE/CartPole-v1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("greedy_mean", "threshold", "passed"),
    [(475.0, 475.0, True), (474.99, 475.0, False), (-299.0, -300.0, True), (-301.0, -300.0, False)],
)
def test_the_greedy_mean_decides(
    learning: ModuleType, greedy_mean: float, threshold: float, passed: bool
) -> None:
    """A cell passes at its threshold, below nought too; the training mean does not count."""
    cell = make_cell(learning, greedy_mean=greedy_mean, threshold=threshold, training_mean=0.0)
    assert cell.passed is passed


def test_cell_file_reads_back(learning: ModuleType, tmp_path: Path) -> None:
    """What is written is read back equal, and no draft stays beside it."""
    cell = make_cell(learning, training_mean=None)
    file = learning.cell_file(tmp_path, learning.TASKS[0], 1, False)
    learning.write_cell(file, cell)
    assert learning.read_cell(file) == cell
    assert list(tmp_path.iterdir()) == [file]
    assert json.loads(file.read_bytes())["commit"] == "abc"


def test_quick_results_lie_apart(learning: ModuleType, tmp_path: Path) -> None:
    """A quick cell never passes for a real one, nor one seed or task for another."""
    files = {
        learning.cell_file(tmp_path, task, seed, quick)
        for task in learning.TASKS
        for seed in (1, 2)
        for quick in (True, False)
    }
    assert len(files) == 12


@pytest.mark.parametrize("content", [None, b"{", b'{"seed": 1}', b'{"unknown": 1}'])
def test_a_file_that_is_no_cell_is_not_used(
    learning: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    """An absent file is no result; neither is a broken one, which is named."""
    file = tmp_path / "cell.json"
    if content is not None:
        file.write_bytes(content)
    assert learning.read_cell(file) is None
    assert ("cell.json" in capsys.readouterr().err) is (content is not None)


def test_each_finished_cell_is_kept_and_printed(
    learning: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A cell is a file and a JSON line; the table has a row for it and a total for its task."""
    runs = Runs(learning, seed_2=300.0)
    assert run_main(learning, monkeypatch, runs, "--results", str(tmp_path), "--seeds", "1", "2") == 0
    output = capsys.readouterr().out.splitlines()
    lines = [json.loads(line) for line in output if line.startswith("{")]
    assert [(line["figure"], line["value"], line["passed"]) for line in lines[1:]] == [
        ("PPO/CartPole-v1/1", 500.0, True),
        ("PPO/CartPole-v1/2", 300.0, False),
    ]
    assert output[-1] == "PPO/CartPole-v1: 1 of 2 seeds"
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_resume_skips_what_is_there(
    learning: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With --resume only missing cells run, the others are read and shown; without it all run again."""
    arguments = ("--results", str(tmp_path), "--seeds", "1", "2")
    run_main(learning, monkeypatch, Runs(learning), "--results", str(tmp_path), "--seeds", "2")
    resumed, again = Runs(learning), Runs(learning)
    run_main(learning, monkeypatch, resumed, *arguments, "--resume")
    assert capsys.readouterr().out.splitlines()[-1] == "PPO/CartPole-v1: 2 of 2 seeds"
    run_main(learning, monkeypatch, again, *arguments)
    assert [seed for _, seed in resumed.asked] == [1]
    assert [seed for _, seed in again.asked] == [1, 2]


@pytest.mark.parametrize(
    ("answer", "arguments", "status"),
    [
        (474.0, ("--check",), 1),
        (474.0, (), 0),
        (475.0, ("--check",), 0),
        (20.0, ("--check", "--quick"), 0),
        (RelayRLError("no"), ("--check",), 1),
    ],
)
def test_a_check_fails_where_a_cell_misses(
    learning: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    answer: Any,
    arguments: tuple[str, ...],
    status: int,
) -> None:
    """--check ends with 1 for a cell below its threshold or without a result; a quick one is not judged."""
    runs = Runs(learning, seed_1=answer)
    given = ("--results", str(tmp_path), "--seeds", "1", *arguments)
    assert run_main(learning, monkeypatch, runs, *given) == status


def test_a_failed_cell_does_not_end_the_rest(
    learning: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The cells after one that gave no result still run, and it is not kept."""
    runs = Runs(learning, seed_1=learning.UnsoundFigureError("lost"))
    run_main(learning, monkeypatch, runs, "--results", str(tmp_path), "--seeds", "1", "2")
    assert [seed for _, seed in runs.asked] == [1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["cartpole-ppo-seed-2.json"]


def test_an_interrupt_keeps_finished_cells(
    learning: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Stopped in the second cell, the benchmark shows and keeps the first, starts no third, ends with 130."""
    runs = Runs(learning, stop_after=1)
    given = ("--results", str(tmp_path), "--seeds", "1", "2", "3")
    assert run_main(learning, monkeypatch, runs, *given) == 130
    assert [seed for _, seed in runs.asked] == [1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["cartpole-ppo-seed-1.json"]
    assert capsys.readouterr().out.splitlines()[-1] == "PPO/CartPole-v1: 1 of 1 seeds"


def test_table_aligns_its_columns(learning: ModuleType) -> None:
    """Every column begins at one place in all rows, and a mean that is not there is a dash."""
    cells = [
        make_cell(learning),
        make_cell(learning, seed=22, training_mean=None, greedy_mean=9.0, steps=5),
        make_cell(learning, algorithm="REINFORCE", threshold=400.0),
    ]
    heading, first, second, third, *totals = learning.table(cells).splitlines()
    start = heading.index("greedy mean")
    assert [row[start:].split()[0] for row in (first, second, third)] == ["500.0", "9.0", "500.0"]
    assert second.split()[4] == "-"
    assert [row.split()[-1] for row in (first, second, third)] == ["yes", "NO", "yes"]
    assert totals == ["PPO/CartPole-v1: 1 of 2 seeds", "REINFORCE/CartPole-v1: 1 of 1 seeds"]


def test_provenance_says_something(learning: ModuleType) -> None:
    """The commit and the machine of a result are never empty."""
    assert learning.commit()
    assert "Python 3." in learning.machine()
