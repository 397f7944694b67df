"""Child processes that are kept running: started, watched, started again, drained; used by `supervisor`.

A child is a process of this program with other arguments. It inherits the read end of a pipe that closes with
the supervisor (see `relayrl_shared.parent`), so that none outlives it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from relayrl_shared import logs
from relayrl_training_server.liveness import SignReader
from relayrl_training_server.settings import SupervisorSettings

LOG = logs.get_logger(__name__)

State = Literal["running", "restarting", "down", "failed", "stopped"]

RUN_FAILED_STATUS = 3
"""Exit status of a learner whose run has failed: started again, it would fail again."""

MODULE = ("-X", "faulthandler", "-m", "relayrl_training_server")  # a crash leaves its stacks in the log


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """What to run. `final_status`: an exit that is the end of it; after any other it is started again."""

    name: str
    arguments: tuple[str, ...]
    final_status: int | None = None


@dataclass(frozen=True, slots=True)
class ChildStatus:
    """A child as others see it. `problem`: why it is not running; None where that is as it should be."""

    name: str
    state: State
    pid: int | None
    deaths_total: int
    last_exit: str | None
    problem: str | None


def describe_exit(return_code: int) -> str:
    """`exit status 2`, or `killed by SIGKILL`."""
    if return_code >= 0:
        return f"exit status {return_code}"
    try:
        return f"killed by {signal.Signals(-return_code).name}"
    except ValueError:
        return f"killed by signal {-return_code}"


def restart_delay(deaths_in_a_row: int, settings: SupervisorSettings) -> float | None:
    """Seconds until the next start after so many deaths in a row; None: it stays down."""
    if deaths_in_a_row >= settings.restart_limit:
        return None
    delay = settings.restart_delay_seconds * 2.0 ** (deaths_in_a_row - 1)
    return min(delay, settings.restart_delay_max_seconds)


class _Child:
    """One child and its history. Guarded by the keeper's lock."""

    def __init__(self, spec: ChildSpec) -> None:
        self.spec = spec
        self.state: State = "restarting"
        self.process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0
        self.start_at = 0.0
        self.deaths_in_a_row = 0
        self.deaths_total = 0
        self.last_exit: str | None = None
        self.signs: SignReader | None = None
        self.signed_at = 0.0
        self.hung = False

    def forget_signs(self) -> None:
        """Frees the pipe of a process that is gone."""
        if self.signs is not None:
            self.signs.close()
            self.signs = None

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def status(self) -> ChildStatus:
        return ChildStatus(
            name=self.spec.name,
            state=self.state,
            pid=self.process.pid if self.process is not None and self.state == "running" else None,
            deaths_total=self.deaths_total,
            last_exit=self.last_exit,
            problem=self._problem(),
        )

    def _problem(self) -> str | None:
        if self.state in ("running", "stopped"):
            return None
        why = f" after {self.last_exit}" if self.last_exit else ""
        if self.state == "failed":
            return "its run has failed; see the learner's log"
        if self.state == "down":
            return f"stays down: {self.deaths_in_a_row} deaths in a row, the last one {self.last_exit}"
        return f"is being started{why}"


class ChildKeeper:
    """Keeps the wanted children running; `poll` is called again and again by one thread.

    Args:
        settings: delays and limits.
        common_arguments: appended to every child's arguments.
        command: the program, by default this one.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        settings: SupervisorSettings,
        common_arguments: Sequence[str] = (),
        *,
        command: Sequence[str] = (sys.executable, *MODULE),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._common_arguments = tuple(common_arguments)
        self._command = tuple(command)
        self._clock = clock
        self._children: dict[str, _Child] = {}
        self._lock = threading.Lock()
        self._read_end, self._write_end = os.pipe()
        self._closed = False

    def want(self, specs: Sequence[ChildSpec]) -> None:
        """Says which children there should be: new ones start at the next poll, others are asked to stop."""
        wanted = {spec.name: spec for spec in specs}
        with self._lock:
            for name, spec in wanted.items():
                if name not in self._children:
                    self._children[name] = _Child(spec)
                elif self._children[name].state == "stopped":
                    self._children[name].state = "restarting"
            for name, child in self._children.items():
                if name not in wanted and child.state in ("running", "restarting"):
                    self._ask_to_stop(child)

    def poll(self) -> None:
        """Notes deaths and starts what is due."""
        now = self._clock()
        with self._lock:
            for child in self._children.values():
                if child.state == "running":
                    self._notice_hang(child, now)
                    self._notice_death(child, now)
                elif child.is_alive():
                    continue  # it was asked to stop and has not yet
                if child.state == "restarting" and now >= child.start_at:
                    self._start(child, now)

    def statuses(self) -> dict[str, ChildStatus]:
        """Every child by name."""
        with self._lock:
            return {name: child.status() for name, child in self._children.items()}

    def stop_all(self, timeout_seconds: float) -> list[str]:
        """Asks every child to stop, kills what is left at the deadline; returns the names of those killed."""
        with self._lock:
            if self._closed:
                return []
            self._closed = True
            for child in self._children.values():
                self._ask_to_stop(child)
            processes = {
                name: child.process
                for name, child in self._children.items()
                if child.process is not None and child.is_alive()
            }
        killed = _wait(processes, self._clock() + timeout_seconds, self._clock)
        for name in killed:
            LOG.error("child did not stop in time and was killed", child=name)
        for child in self._children.values():
            child.forget_signs()
        os.close(self._write_end)
        os.close(self._read_end)
        return killed

    def _ask_to_stop(self, child: _Child) -> None:
        if child.process is not None and child.is_alive():
            child.process.terminate()
        child.state = "stopped"

    def _start(self, child: _Child, now: float) -> None:
        if self._closed:
            return
        child.forget_signs()
        child.signs, child.hung = SignReader(), False
        pipes = (self._read_end, child.signs.write_end)
        told = ("--parent-pipe", str(pipes[0]), "--life-pipe", str(pipes[1]))
        # A process group of its own: Ctrl-C reaches the supervisor alone, which then drains the children.
        child.process = subprocess.Popen(
            [*self._command, *child.spec.arguments, *self._common_arguments, *told],
            stdin=subprocess.DEVNULL,
            pass_fds=pipes,
            process_group=0,
        )
        child.signs.started()
        child.state, child.started_at, child.signed_at = "running", now, now
        LOG.info("child started", child=child.spec.name, pid=child.process.pid)

    def _notice_hang(self, child: _Child, now: float) -> None:
        """Kills a child that made no sign of life for too long; its death is noticed as any other."""
        if child.signs is None or child.process is None or child.signs.has_sign():
            child.signed_at = now
        elif now - child.signed_at > self._settings.hang_seconds and not child.hung:
            child.hung = True
            LOG.error(
                "child hangs and is killed", child=child.spec.name, silent_seconds=now - child.signed_at
            )
            child.process.kill()

    def _notice_death(self, child: _Child, now: float) -> None:
        return_code = None if child.process is None else child.process.poll()
        if return_code is None:
            return
        silent = f"no sign of life for {self._settings.hang_seconds:g} s, " if child.hung else ""
        child.last_exit = silent + describe_exit(return_code)
        if return_code == child.spec.final_status:
            child.state = "failed"
            LOG.error("child has ended for good", child=child.spec.name, exit=child.last_exit)
            return
        lived = now - child.started_at
        child.deaths_in_a_row = 1 if lived >= self._settings.stable_seconds else child.deaths_in_a_row + 1
        child.deaths_total += 1
        self._schedule(child, now, lived)

    def _schedule(self, child: _Child, now: float, lived_seconds: float) -> None:
        delay = restart_delay(child.deaths_in_a_row, self._settings)
        child.state = "down" if delay is None else "restarting"
        child.start_at = now + (delay or 0.0)
        LOG.error(
            "child died",
            child=child.spec.name,
            exit=child.last_exit,
            lived_seconds=round(lived_seconds, 3),
            deaths_in_a_row=child.deaths_in_a_row,
            restart_in_seconds=delay,
        )


def _wait(
    processes: Mapping[str, subprocess.Popen[bytes]], deadline: float, clock: Callable[[], float]
) -> list[str]:
    """Waits for all until the deadline, then kills; returns the names of those killed."""
    killed: list[str] = []
    for name, process in processes.items():
        try:
            process.wait(max(deadline - clock(), 0.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            killed.append(name)
    return killed
