"""What people see of learning: returns of episodes, progress.csv, status.json. The learner drives it.

progress.csv has a row an update; its columns are explained in docs. status.json is the latest state, for
tools that look without asking over HTTP.
"""

from __future__ import annotations

import csv
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from relayrl_shared.trajectory import TrajectoryMetadata

EPISODES = 100  # the mean return is over so many of the last ones
_OPEN_EPISODES = 65_536
STATUS_NAME = "status.json"

Number = float | int | None


class _Parts(NamedTuple):
    """What is there of an episode. `expected`: how many segments it has, None until its end is there."""

    total: float = 0.0
    steps: int = 0
    segments: int = 0
    expected: int | None = None

    def with_one(self, metadata: TrajectoryMetadata) -> _Parts:
        """These parts and another one."""
        ended = metadata.terminated or metadata.truncated
        return _Parts(
            self.total + metadata.episode_return,
            self.steps + metadata.steps,
            self.segments + 1,
            metadata.segment_index + 1 if ended else self.expected,
        )


class EpisodeLedger:
    """Returns and lengths of training episodes, put together from their segments."""

    def __init__(self) -> None:
        self.episodes = 0
        self.returns: deque[float] = deque(maxlen=EPISODES)
        self.lengths: deque[int] = deque(maxlen=EPISODES)
        self._open: OrderedDict[str, _Parts] = OrderedDict()

    def absorb(self, segments: Iterable[TrajectoryMetadata]) -> None:
        """Counts segments that were decided upon, each once and in any order; evaluation does not count.

        An episode counts once all its segments are there, from the first to the one that ends it.
        """
        for metadata in segments:
            if metadata.purpose != "train":
                continue
            parts = self._open.pop(metadata.episode_id, _Parts()).with_one(metadata)
            if parts.segments == parts.expected:
                self.episodes += 1
                self.returns.append(parts.total)
                self.lengths.append(parts.steps)
            else:
                self._open[metadata.episode_id] = parts
        while len(self._open) > _OPEN_EPISODES:
            self._open.popitem(last=False)

    def describe(self) -> dict[str, Number]:
        """The figures of a progress row; None before the first episode."""
        known = len(self.returns)
        return {
            "episodes": self.episodes,
            "mean_return": sum(self.returns) / known if known else None,
            "mean_episode_steps": sum(self.lengths) / known if known else None,
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "episodes": self.episodes,
            "returns": list(self.returns),
            "lengths": list(self.lengths),
            "open": dict(self._open),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to what `state` gave."""
        self.episodes = int(state["episodes"])
        self.returns = deque(state["returns"], maxlen=EPISODES)
        self.lengths = deque(state["lengths"], maxlen=EPISODES)
        self._open = OrderedDict((name, _Parts(*parts)) for name, parts in state["open"].items())


class ProgressFile:
    """progress.csv: one row an update. A resume drops the rows after the update that it starts from.

    Args:
        path: of the file.
        learner_update: that the learner starts from.
    """

    def __init__(self, path: Path, learner_update: int) -> None:
        self._path = path
        self._columns: list[str] = []
        kept = self._rows_until(learner_update)
        if kept or path.exists():
            self._rewrite(kept)

    def append(self, row: Mapping[str, Number]) -> None:
        """Adds a row; new columns get their place at the end."""
        new = [name for name in row if name not in self._columns]
        if new:
            kept = self._read()
            self._columns += new
            self._rewrite(kept)
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(_text(row))

    def _rows_until(self, learner_update: int) -> list[dict[str, str]]:
        return [row for row in self._read() if int(row.get("learner_update") or 0) <= learner_update]

    def _read(self) -> list[dict[str, str]]:
        if not self._path.exists():
            return []
        with self._path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = [row for row in reader if None not in row and None not in row.values()]
            self._columns = self._columns or list(reader.fieldnames or [])
        return rows

    def _rewrite(self, rows: Iterable[Mapping[str, str]]) -> None:
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            writer.writerows(rows)
        temporary.rename(self._path)


def _text(row: Mapping[str, Number]) -> dict[str, str]:
    """Floats with six significant digits, nothing for None."""
    return {
        name: "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
        for name, value in row.items()
    }


def write_status(path: Path, status: Mapping[str, Any]) -> None:
    """Replaces status.json; a reader sees the old one or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(status), indent=2))
    temporary.rename(path)
