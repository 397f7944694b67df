"""The live view: figures as cells, lines for pipes, a table for terminals."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from relayrl_cli.table import HEADINGS, LineView, LiveView, Progress, cells, open_view, render

PROGRESS = Progress(
    seconds=75.9,
    steps=12_345,
    steps_per_second=5678.9,
    episodes=321,
    mean_return=199.96,
    policy_version=7,
    policy_lag=1,
    stored_trajectories=400,
)


def test_a_row_has_a_cell_a_heading() -> None:
    """Times in minutes, thousands separated, one decimal of the return."""
    assert dict(zip(HEADINGS, cells(PROGRESS), strict=True)) == {
        "time": "1:15",
        "steps": "12,345",
        "steps/s": "5,679",
        "episodes": "321",
        "mean return": "200.0",
        "policy version": "7",
        "policy lag": "1",
        "stored": "400",
    }


def test_what_is_not_known_is_a_dash() -> None:
    """Nothing is invented before the first episode, version or answer."""
    assert cells(Progress())[4:] == ("-", "-", "-", "-")


def test_lines_come_every_few_seconds_and_once_at_the_end() -> None:
    """A log is not flooded, and its last line is the last state."""
    output = io.StringIO()
    with LineView(output, line_seconds=5) as view:
        for seconds in (0, 1, 4.9, 5, 7):
            view.show(Progress(seconds=seconds))

    lines = output.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["time 0:00", "time 0:05", "time 0:07"]


def test_the_end_does_not_repeat_the_last_line() -> None:
    """What was printed last is not printed again."""
    output = io.StringIO()
    with LineView(output) as view:
        view.show(PROGRESS)

    assert len(output.getvalue().splitlines()) == 1


def test_a_remark_is_printed_at_once() -> None:
    """Restarts and the like are not delayed."""
    output = io.StringIO()
    LineView(output).say("model-registry started again")

    assert output.getvalue() == "model-registry started again\n"


def test_the_table_shows_history_and_now() -> None:
    """A heading and a line a row, the newest last."""
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(render([Progress(steps=1), Progress(steps=2), PROGRESS]))

    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].split()[:3] == ["time", "steps", "steps/s"]
    assert [line.split()[1] for line in lines[1:]] == ["1", "2", "12,345"]


def test_a_terminal_gets_a_table_without_double_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newest row stands once, and remarks above it."""
    monkeypatch.setenv("COLUMNS", "120")
    with LiveView() as view:
        view.say("registry [x] restarted")
        view.show(PROGRESS)

    lines = capsys.readouterr().out.splitlines()
    assert "registry [x] restarted" in lines[0]
    assert sum("12,345" in line for line in lines) == 1


def test_a_pipe_gets_lines() -> None:
    """No control characters where nobody watches."""
    assert isinstance(open_view(io.StringIO()), LineView)
