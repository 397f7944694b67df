"""How the servers see a run: stored trajectories and finished updates, asked for in the background.

`train.TrainingSession` shows what a `RunView` knows; a server that does not answer leaves the last figures.
"""

from __future__ import annotations

import threading
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import msgspec

POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class RunFigures:
    """What the servers say of a run. state_reason explains a state other than `active`."""

    stored_trajectories: int
    learner_update: int
    state: str
    state_reason: str


class _Counts(msgspec.Struct):
    trajectories: int


class _Summary(msgspec.Struct):
    counts: _Counts
    learner_update: int
    state: str
    state_reason: str


def ask_training_server(url: str, run: str, timeout_seconds: float = 2.0) -> RunFigures | None:
    """What GET /v1/runs/RUN says; None while it does not answer or does not know the run."""
    try:
        address = f"{url}/v1/runs/{urllib.parse.quote(run, safe='')}"
        with urllib.request.urlopen(address, timeout=timeout_seconds) as answer:
            summary = msgspec.json.decode(answer.read(), type=_Summary)
    except (OSError, ValueError):
        return None
    return RunFigures(
        summary.counts.trajectories, summary.learner_update, summary.state, summary.state_reason
    )


class RunView:
    """Asks every half second in a thread of its own; `figures` are the last that came. A context manager."""

    def __init__(self, ask: Callable[[], RunFigures | None], poll_seconds: float = POLL_SECONDS) -> None:
        self._ask = ask
        self._poll_seconds = poll_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, name="run-view", daemon=True)
        self.figures: RunFigures | None = None

    def refresh(self) -> RunFigures | None:
        """Asks now, from the caller's thread."""
        figures = self._ask()
        if figures is not None:
            self.figures = figures
        return self.figures

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._stop.is_set():
            self.refresh()
            self._stop.wait(self._poll_seconds)
