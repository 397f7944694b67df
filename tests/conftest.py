"""What every suite shares: the order of the suites with their time budgets, and common fixtures."""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest_plugins = ["relayrl_shared.testing.postgres", "relayrl_shared.testing.store"]

BUDGET_SECONDS = {
    "unit": 120,
    "contract": 120,
    "integration": 360,
    "e2e": 360,
    "chaos": 360,
    "packaging": 240,
    "containers": 600,
}
"""In the order in which the suites run: what fails soonest comes first."""

_ORDER = list(BUDGET_SECONDS)


def _suite(path: Path) -> str:
    parts = path.parts
    return next((part for part in parts[parts.index("tests") + 1 :] if part in BUDGET_SECONDS), "unit")


class SuiteTimes:
    """Counts tests and seconds a suite and prints them beside their budgets."""

    def __init__(self) -> None:
        self._seconds: Counter[str] = Counter()
        self._tests: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Adds set-up, call and tear-down of a test to its suite."""
        suite = _suite(Path("tests", *Path(report.nodeid.partition("::")[0]).parts))
        self._seconds[suite] += report.duration  # type: ignore[assignment]  # a Counter of floats
        self._tests[suite] += report.when == "call"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """One line a suite."""
        terminalreporter.section("time by suite")
        for suite in (name for name in _ORDER if name in self._seconds):
            over = " OVER BUDGET" if self._seconds[suite] > BUDGET_SECONDS[suite] else ""
            terminalreporter.write_line(
                f"{suite:<12} {self._tests[suite]:>5} tests {self._seconds[suite]:>7.1f} s "
                f"(budget {BUDGET_SECONDS[suite]} s){over}"
            )


def pytest_configure(config: pytest.Config) -> None:
    """Registers the clock of the suites."""
    config.pluginmanager.register(SuiteTimes(), "suite-times")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Runs the suites in order; inside a suite the order stays random."""
    items.sort(key=lambda item: _ORDER.index(_suite(item.path)))


@pytest.fixture(autouse=True)
def root_logging() -> Iterator[None]:
    """Puts back the handlers and the level of the root logger, which `logs.configure` changes."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


@pytest.fixture
def free_port() -> Callable[[], int]:
    """A TCP port of 127.0.0.1 that nothing listens on now; bind port 0 instead wherever that is possible."""

    def find() -> int:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port: int = listener.getsockname()[1]
            return port

    return find


@pytest.fixture
def stack_directory(tmp_path: Path) -> Path:
    """An empty directory for all state of a stack."""
    directory = tmp_path / "stack"
    directory.mkdir()
    return directory
