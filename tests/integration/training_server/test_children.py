"""Children that are kept running: real processes that die, linger, finish and are orphaned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from relayrl_training_server.children import ChildKeeper, ChildSpec, ChildStatus, describe_exit, restart_delay
from relayrl_training_server.settings import SupervisorSettings

QUICK = SupervisorSettings(restart_delay_seconds=0.01, restart_delay_max_seconds=0.05, restart_limit=3)

PROGRAM = """
import signal, sys, time
kind = sys.argv[1]
if kind == "die":
    sys.exit(int(sys.argv[2]))
if kind == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(sys.argv[2], "w").close()
if kind == "lives":
    import threading
    from relayrl_training_server.liveness import LivingEvent
    stop = LivingEvent(int(sys.argv[-1]))
    while not stop.wait(0.02): pass
time.sleep(60)
"""

Keep = Callable[..., ChildKeeper]


@pytest.fixture
def keep() -> Iterator[Keep]:
    """Makes keepers of a small program and ends their children."""
    made: list[ChildKeeper] = []

    def make(settings: SupervisorSettings = QUICK) -> ChildKeeper:
        made.append(ChildKeeper(settings, command=(sys.executable, "-c", PROGRAM)))
        return made[-1]

    yield make
    for keeper in made:
        keeper.stop_all(0.0)


def poll_until(keeper: ChildKeeper, condition: Callable[[dict[str, ChildStatus]], bool]) -> ChildStatus:
    """Polls as the supervisor does until the one child is as wanted."""
    deadline = time.monotonic() + 15
    while not condition(keeper.statuses()):
        assert time.monotonic() < deadline, keeper.statuses()
        keeper.poll()
        threading.Event().wait(0.01)
    [status] = keeper.statuses().values()
    return status


def is_running(statuses: dict[str, ChildStatus]) -> bool:
    """Whether all run."""
    return all(status.state == "running" for status in statuses.values())


def test_a_killed_child_is_started_again_and_its_death_is_told(keep: Keep) -> None:
    """A child that dies comes back with another pid; the status says how it died."""
    keeper = keep()
    keeper.want([ChildSpec("c", ("run",))])
    first = poll_until(keeper, is_running)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)

    again = poll_until(keeper, lambda statuses: statuses["c"].deaths_total == 1 and is_running(statuses))

    assert again.pid != first.pid
    assert again.last_exit == "killed by SIGKILL"
    assert again.problem is None


def test_a_child_that_keeps_dying_stays_down_at_the_limit(keep: Keep) -> None:
    """After the limit of deaths in a row it is not started again, and the status says why."""
    keeper = keep()
    keeper.want([ChildSpec("c", ("die", "7"))])

    status = poll_until(keeper, lambda statuses: statuses["c"].state == "down")

    assert status.deaths_total == 3
    assert status.problem == "stays down: 3 deaths in a row, the last one exit status 7"


def test_a_child_that_lived_long_enough_starts_over(keep: Keep) -> None:
    """Deaths of a child that was stable do not add up to the limit."""
    keeper = keep(SupervisorSettings(restart_delay_seconds=0.01, restart_limit=2, stable_seconds=0.000001))
    keeper.want([ChildSpec("c", ("die", "1"))])

    status = poll_until(keeper, lambda statuses: statuses["c"].deaths_total >= 4)

    assert status.state != "down"


@pytest.mark.parametrize(
    ("final_status", "state", "deaths"), [(3, "failed", 0), (None, "down", 3), (4, "down", 3)]
)
def test_an_end_that_is_final_is_not_repeated(
    keep: Keep, final_status: int | None, state: str, deaths: int
) -> None:
    """A learner whose run has failed is left alone; after any other exit a child is started again."""
    keeper = keep()
    keeper.want([ChildSpec("c", ("die", "3"), final_status)])

    status = poll_until(keeper, lambda statuses: statuses["c"].state == state)

    assert status.deaths_total == deaths
    assert status.problem is not None


def test_a_child_that_is_no_longer_wanted_is_stopped_and_may_come_back(keep: Keep) -> None:
    """A run that ends takes its learner with it; one that becomes active again gets a new one."""
    keeper = keep()
    spec = ChildSpec("c", ("run",))
    keeper.want([spec])
    first = poll_until(keeper, is_running)
    keeper.want([])
    stopped = keeper.statuses()["c"]
    keeper.want([spec])

    again = poll_until(keeper, is_running)

    assert stopped.state == "stopped"
    assert again.pid != first.pid


def test_a_drain_kills_what_does_not_stop_in_time(keep: Keep, tmp_path: Path) -> None:
    """stop_all names the children that it had to kill at the deadline; nothing is left."""
    keeper = keep()
    marker = tmp_path / "deaf"
    keeper.want([ChildSpec("deaf", ("deaf", str(marker))), ChildSpec("good", ("run",))])
    while not marker.exists():
        keeper.poll()
        threading.Event().wait(0.01)

    killed = keeper.stop_all(0.5)

    assert killed == ["deaf"]


def test_children_end_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    """A child that follows its parent stops when the parent is gone, even by SIGKILL."""
    child = textwrap.dedent(
        """
        import pathlib, signal, sys, threading
        from relayrl_shared.parent import follow_parent
        path, pipe = pathlib.Path(sys.argv[1]), int(sys.argv[3])
        stopped = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stopped.set())
        follow_parent(pipe)
        (path / "started").touch()
        while not stopped.wait(0.05):
            continue
        (path / "stopped").touch()
        """
    )
    supervisor = textwrap.dedent(
        f"""
        import sys, time
        from relayrl_training_server.children import ChildKeeper, ChildSpec
        from relayrl_training_server.settings import SupervisorSettings
        keeper = ChildKeeper(SupervisorSettings(), command=(sys.executable, "-c", {child!r}))
        keeper.want([ChildSpec("c", ({str(tmp_path)!r},))])
        while True:
            keeper.poll()
            time.sleep(0.05)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", supervisor])
    try:
        wait_for(tmp_path / "started")
    finally:
        process.kill()
        process.wait()

    wait_for(tmp_path / "stopped")


def wait_for(path: Path) -> None:
    """Waits for a file that another process makes."""
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was not made"
        threading.Event().wait(0.02)


def test_a_child_that_hangs_is_killed_and_started_again(keep: Keep) -> None:
    """One that makes signs of life is left alone; stopped, it makes none, and the status says so."""
    keeper = keep(SupervisorSettings(restart_delay_seconds=0.01, hang_seconds=3.0))
    keeper.want([ChildSpec("c", ("lives",))])
    first = poll_until(keeper, is_running)
    assert first.pid is not None
    alive_until = time.monotonic() + 4.0
    poll_until(keeper, lambda statuses: time.monotonic() > alive_until)
    assert keeper.statuses()["c"].deaths_total == 0
    os.kill(first.pid, signal.SIGSTOP)

    again = poll_until(keeper, lambda statuses: statuses["c"].deaths_total == 1 and is_running(statuses))

    assert again.pid != first.pid
    assert again.last_exit == "no sign of life for 3 s, killed by SIGKILL"


def test_delays_double_up_to_their_limit() -> None:
    """Back-off grows from the first delay to the longest, then stays down."""
    settings = SupervisorSettings(restart_delay_seconds=0.1, restart_delay_max_seconds=1.0, restart_limit=7)

    assert [restart_delay(deaths, settings) for deaths in range(1, 8)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0, None]


def test_exits_are_described() -> None:
    """Status codes and signals are named as people know them."""
    assert describe_exit(2) == "exit status 2"
    assert describe_exit(-9) == "killed by SIGKILL"
    assert describe_exit(-1000) == "killed by signal 1000"
