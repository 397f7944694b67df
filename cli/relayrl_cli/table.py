"""The live view of a training: one row of figures that changes in place, or lines where no terminal is.

`commands.train` and `commands.demo` drive it; a row comes from `train.TrainingSession.progress`.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType

LINE_SECONDS = 5.0
HISTORY_ROWS = 12
HISTORY_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a training stands. None: not known yet, or not now.

    steps counts recorded environment steps of all actors; steps_per_second is over the last seconds;
    mean_return is the mean of the last 100 finished training episodes; policy_lag is in learner updates.
    """

    seconds: float = 0.0
    steps: int = 0
    steps_per_second: float = 0.0
    episodes: int = 0
    mean_return: float | None = None
    policy_version: int | None = None
    policy_lag: int | None = None
    stored_trajectories: int | None = None


HEADINGS = ("time", "steps", "steps/s", "episodes", "mean return", "policy version", "policy lag", "stored")


def cells(progress: Progress) -> tuple[str, ...]:
    """The figures of a row, in the order of `HEADINGS`."""
    return (
        f"{int(progress.seconds) // 60}:{int(progress.seconds) % 60:02d}",
        f"{progress.steps:,}",
        f"{progress.steps_per_second:,.0f}",
        f"{progress.episodes:,}",
        "-" if progress.mean_return is None else f"{progress.mean_return:.1f}",
        _or_dash(progress.policy_version),
        _or_dash(progress.policy_lag),
        _or_dash(progress.stored_trajectories),
    )


def _or_dash(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


class View(Protocol):
    """What shows progress."""

    def show(self, progress: Progress) -> None:
        """Shows where the training stands now."""
        ...

    def say(self, line: str) -> None:
        """Shows a line above the figures, such as a restart."""
        ...

    def __enter__(self) -> Self:
        """Begins to show."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leaves the last figures standing."""
        ...


class LineView:
    """A line of figures every few seconds, for logs and pipes."""

    def __init__(self, output: TextIO, line_seconds: float = LINE_SECONDS) -> None:
        self._output = output
        self._line_seconds = line_seconds
        self._last: Progress | None = None
        self._printed_at = float("-inf")

    def show(self, progress: Progress) -> None:
        """Prints a line if the last one is old enough."""
        self._last = progress
        if progress.seconds - self._printed_at >= self._line_seconds:
            self._print(progress)

    def say(self, line: str) -> None:
        """Prints the line at once."""
        self._output.write(f"{line}\n")
        self._output.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._last is not None and self._last.seconds != self._printed_at:
            self._print(self._last)

    def _print(self, progress: Progress) -> None:
        self._printed_at = progress.seconds
        self.say("  ".join(f"{name} {cell}" for name, cell in zip(HEADINGS, cells(progress), strict=True)))


class LiveView:
    """A table on a terminal: a row of history every few seconds, the newest row changes in place."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._history: list[Progress] = []
        self._console = Console()
        self._live = Live(console=self._console, refresh_per_second=4, auto_refresh=False)

    def show(self, progress: Progress) -> None:
        """Redraws the table."""
        if not self._history or progress.seconds - self._history[-1].seconds >= HISTORY_SECONDS:
            self._history = [*self._history, progress][-HISTORY_ROWS:]
        rows = self._history if self._history[-1] is progress else [*self._history, progress]
        self._live.update(render(rows), refresh=True)

    def say(self, line: str) -> None:
        """Prints the line above the table."""
        self._console.print(line, markup=False, highlight=False)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)


def render(rows: list[Progress]) -> RenderableType:
    """The table; the last row is now."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in HEADINGS:
        table.add_column(heading, justify="right")
    for row in rows[:-1]:
        table.add_row(*cells(row), style="dim")
    table.add_row(*cells(rows[-1]), style="bold")
    return table


def open_view(output: TextIO) -> View:
    """The view that suits the output."""
    return LiveView() if output.isatty() else LineView(output)
