"""What the benchmarks share: interleaved timing, medians, one JSON line a figure, `--quick` and `--check`.

A figure is a ratio of things measured in turn in one run, with verified answers, since absolute times are
the machine's. `--quick` measures briefly; `--check` fails where a ratio misses its target (not used by CI,
which asserts counts and correctness only).
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Contender = Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asked for."""

    quick: bool
    check: bool


def parse_options(description: str, arguments: Sequence[str] | None = None) -> Options:
    """Read `--quick` and `--check`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="measure briefly")
    parser.add_argument("--check", action="store_true", help="end with status 1 where a target is missed")
    given = parser.parse_args(arguments)
    return Options(quick=given.quick, check=given.check)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds a call of one contender: the median over rounds, and the spread of the rounds' medians."""

    seconds: float
    fastest_seconds: float
    slowest_seconds: float
    calls: int


def interleave(
    contenders: Mapping[str, Contender], *, rounds: int, calls: int, warm_up: int = 3
) -> dict[str, Timing]:
    """Time contenders in turn, so that a busy spell of the machine meets all of them.

    Args:
        contenders: by name; each is called without arguments.
        rounds: how often every contender has its turn; the order turns round by one each time.
        calls: calls in a turn; its median counts.
        warm_up: calls of each before the first round.
    """
    for run in contenders.values():
        for _ in range(warm_up):
            run()
    names = list(contenders)
    medians: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                medians[name].append(_median_of_calls(contenders[name], calls))
    finally:
        if collecting:
            gc.enable()
    return {
        name: Timing(statistics.median(values), min(values), max(values), rounds * calls)
        for name, values in medians.items()
    }


def _median_of_calls(run: Contender, calls: int) -> float:
    clock = time.perf_counter_ns
    durations = []
    for _ in range(calls):
        start = clock()
        run()
        durations.append(clock() - start)
    return statistics.median(durations) / 1e9


@dataclass
class Report:
    """Prints figures as JSON lines and remembers which missed their target."""

    benchmark: str
    options: Options
    missed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._print(machine=platform.machine(), python=platform.python_version(), quick=self.options.quick)

    def figure(self, name: str, value: float, unit: str, **details: Any) -> None:
        """Print a figure without a target."""
        self._print(figure=name, value=float(f"{value:.4g}"), unit=unit, **details)

    def ratio(
        self,
        name: str,
        value: float,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        **details: Any,
    ) -> None:
        """Print a ratio beside its target."""
        met = (at_most is None or value <= at_most) and (at_least is None or value >= at_least)
        target = {"at_most": at_most} if at_most is not None else {"at_least": at_least}
        self._print(figure=name, value=float(f"{value:.4g}"), unit="ratio", **target, met=met, **details)
        if not met:
            self.missed.append(name)

    def _print(self, **line: Any) -> None:
        sys.stdout.write(json.dumps({"benchmark": self.benchmark, **line}) + "\n")
        sys.stdout.flush()

    def status(self) -> int:
        """Exit status: 1 if `--check` was given and a target was missed."""
        if self.missed and self.options.check:
            sys.stderr.write(f"{self.benchmark}: missed {', '.join(self.missed)}\n")
            return 1
        return 0
