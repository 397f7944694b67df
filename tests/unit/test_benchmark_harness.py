"""The benchmarks' harness: fair turns, medians, JSON lines and a status that tells what was missed."""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

HARNESS = Path(__file__).parents[2] / "benchmarks" / "harness.py"


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("harness_under_test", HARNESS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_contenders_take_turns_and_each_begins_once(harness: ModuleType) -> None:
    """Every contender is called equally often, and the order turns round from round to round."""
    seen: list[str] = []
    contenders = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    timings = harness.interleave(contenders, rounds=3, calls=2, warm_up=1)
    assert "".join(seen) == "abc" + "aabbcc" + "bbccaa" + "ccaabb"
    assert {name: timing.calls for name, timing in timings.items()} == {"a": 6, "b": 6, "c": 6}


def test_timing_is_a_median_between_the_extremes(harness: ModuleType) -> None:
    """The reported time lies between the fastest and the slowest round, and is not negative."""
    timing = harness.interleave({"one": lambda: sum(range(50))}, rounds=5, calls=3)["one"]
    assert 0 <= timing.fastest_seconds <= timing.seconds <= timing.slowest_seconds


def test_garbage_collection_is_off_while_timing_and_on_after(harness: ModuleType) -> None:
    """No collection falls into a turn, and a contender that raises does not leave it off."""
    states: Counter[bool] = Counter()
    harness.interleave({"one": lambda: states.update([gc.isenabled()])}, rounds=2, calls=2, warm_up=0)
    assert states == {False: 4}
    assert gc.isenabled()

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        harness.interleave({"one": fail}, rounds=1, calls=1, warm_up=0)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("check", "value", "status"), [(True, 1.4, 0), (True, 1.6, 1), (False, 1.6, 0), (True, 1.5, 0)]
)
def test_missed_target_fails_a_check_only(
    harness: ModuleType, capsys: pytest.CaptureFixture[str], check: bool, value: float, status: int
) -> None:
    """A ratio beyond its target ends with 1 under --check, and is printed as missed either way."""
    report = harness.Report("name", harness.Options(quick=True, check=check))
    report.ratio("speed", value, at_most=1.5)
    report.ratio("gain", value, at_least=1.0)
    assert report.status() == status
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["quick"] is True
    assert [(line["figure"], line["value"], line["met"]) for line in lines[1:]] == [
        ("speed", value, value <= 1.5),
        ("gain", value, True),
    ]


def test_options_come_from_the_command_line(harness: ModuleType) -> None:
    """--quick and --check are off unless given."""
    assert harness.parse_options("what", []) == harness.Options(quick=False, check=False)
    assert harness.parse_options("what", ["--quick", "--check"]) == harness.Options(quick=True, check=True)
