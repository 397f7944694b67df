"""A child process that is watched: started, asked whether it is ready, restarted with a limit, stopped.

Knows nothing of services; `stack` says which processes there are.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

from relayrl_shared.parent import ParentPipe

State = Literal["stopped", "starting", "ready", "down", "failed"]


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """At most `limit` restarts within `window_seconds`, the n-th of them after n x `delay_seconds`."""

    limit: int = 5
    window_seconds: float = 60.0
    delay_seconds: float = 0.2


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """What to start. `url` is the root of its HTTP; stdout and stderr go to `log`."""

    name: str
    command: tuple[str, ...]
    url: str
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)


class ManagedProcess:
    """One child in a process group of its own, so that Ctrl-C reaches only the one who stops it in order.

    With a parent's pipe it ends by itself when this process is killed. Not thread-safe; `stack.Stack` calls
    it under its lock.
    """

    def __init__(self, spec: ProcessSpec, policy: RestartPolicy, parent: ParentPipe | None = None) -> None:
        self.spec = spec
        self._parent = parent
        self.state: State = "stopped"
        self.restarts = 0
        self._policy = policy
        self._child: subprocess.Popen[bytes] | None = None
        self._recent: deque[float] = deque(maxlen=policy.limit)
        self._restart_at: float | None = None

    @property
    def pid(self) -> int | None:
        """Its process id while it lives."""
        return self._child.pid if self._child is not None and self._child.returncode is None else None

    def start(self) -> None:
        """Starts the child; its output is appended to the log."""
        self.spec.log.parent.mkdir(parents=True, exist_ok=True)
        with self.spec.log.open("ab") as log:
            parent = self._parent
            self._child = subprocess.Popen(
                self.spec.command if parent is None else (*self.spec.command, *parent.arguments),
                pass_fds=() if parent is None else (parent.read_end,),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.spec.environment},
                process_group=0,
            )
        self.state = "starting"
        self._restart_at = None

    def exit_status(self) -> int | None:
        """Its exit status once it has ended, negative for a signal; None while it lives."""
        status = None if self._child is None else self._child.poll()
        if status is not None and self.state in {"starting", "ready"}:
            self.state = "down"
        return status

    def waiting_for(self) -> dict[str, str]:
        """What it is not ready for, item by item; empty when it is ready."""
        missing = not_ready(self.spec.url)
        if not missing and self.state == "starting":
            self.state = "ready"
        return missing

    def restart_due(self, now: float) -> bool:
        """Whether a dead child should start again now; sets `failed` once the limit is reached."""
        if self.state == "failed":
            return False
        if self._restart_at is None:
            self._plan_restart(now)
        return self._restart_at is not None and now >= self._restart_at

    def restart(self, now: float) -> None:
        """Starts it again and counts that."""
        self._recent.append(now)
        self.restarts += 1
        self.start()

    def _plan_restart(self, now: float) -> None:
        recent = [at for at in self._recent if at > now - self._policy.window_seconds]
        if len(recent) >= self._policy.limit:
            self.state = "failed"
        else:
            self._restart_at = now + self._policy.delay_seconds * (1 + len(recent))

    def terminate(self) -> None:
        """Asks it to drain and stop."""
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)

    def wait_stopped(self, timeout_seconds: float) -> bool:
        """Waits for its end and kills its process group after the deadline; False if it had to."""
        if self._child is None:
            return True
        try:
            self._child.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return False
        finally:
            self.state = "stopped"
        return True

    def kill(self) -> None:
        """Ends it and its own children at once."""
        if self._child is not None and self._child.poll() is None:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()

    def last_lines(self, count: int = 8) -> str:
        """The end of its log."""
        try:
            lines = self.spec.log.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return ""
        return "\n".join(lines[-count:])


def not_ready(url: str, timeout_seconds: float = 1.0) -> dict[str, str]:
    """What /readyz below `url` still waits for; one item `http` while it does not answer."""
    try:
        body = _get(f"{url}/readyz", timeout_seconds)
        checks: dict[str, str | None] = msgspec.json.decode(body)["checks"]
    except (OSError, ValueError, KeyError) as error:
        return {"http": str(error)}
    return {item: reason for item, reason in checks.items() if reason is not None}


def _get(url: str, timeout_seconds: float) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=timeout_seconds) as answer:  # a URL of our own stack
            body: bytes = answer.read()
    except urllib.error.HTTPError as error:
        if error.code != 503:
            raise
        body = error.read()
    return body


def wait_until(
    condition: Callable[[], bool],
    timeout_seconds: float,
    pause: Callable[[float], bool],
    step_seconds: float = 0.05,
) -> bool:
    """Polls until the condition holds; False if time ran out, or `pause` said that waiting is over."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline or pause(step_seconds):
            return False
    return True
