"""The services as child processes: started in order when each is ready, watched, restarted, drained.

`relayrl up` and `relayrl demo` drive it:

    with Stack(plan_stack(directory, ports, store=None), report=print) as stack:
        stack.start(stop.event)
        stop.wait()
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec

from relayrl_cli.addresses import (
    LOOPBACK,
    Addresses,
    Ports,
    ProcessEntry,
    StackFile,
    is_alive,
    read_stack_file,
)
from relayrl_cli.processes import ManagedProcess, ProcessSpec, RestartPolicy, wait_until
from relayrl_cli.service_settings import client_config, default_store, service_settings
from relayrl_shared.errors import RelayRLError
from relayrl_shared.parent import ParentPipe

CLIENT_CONFIG = "client_config.json"
READY_SECONDS = 60.0
DRAIN_SECONDS = 25.0
WATCH_SECONDS = 0.1


class StackError(RelayRLError):
    """A process of the stack did not start, or another stack runs in its directory."""

    code = "stack"


@dataclass(frozen=True, slots=True)
class StackPlan:
    """Everything about a stack before it starts. `processes` in the order in which they start.

    client_config is written beside the state, for applications of this stack.
    """

    directory: Path
    store: str
    addresses: Addresses
    processes: tuple[ProcessSpec, ...]
    client_config: dict[str, Any] = field(default_factory=dict)
    restart: RestartPolicy = field(default_factory=RestartPolicy)


def plan_stack(
    directory: Path,
    ports: Ports,
    *,
    store: str | None = None,
    configuration: Path | None = None,
    extra: Sequence[str] = (),
) -> StackPlan:
    """The registry, the training server and the inference server on loopback, their state in `directory`.

    Args:
        directory: made if it is absent.
        ports: of this stack.
        store: URL of the trajectory store; None: SQLite below the directory.
        configuration: directory with `model_registry_config.json` and its siblings; each is optional.
        extra: `service.dotted.key=value`, over the files, such as `model_registry.log.level=debug`.
    """
    directory = directory.absolute()
    store = store or default_store(directory)
    settings = service_settings(directory, ports, store)
    services = (
        ("model_registry", (), ports.registry_http),
        ("training_server", ("supervise",), ports.training_http),
        ("inference_server", (), ports.inference_http),
    )
    processes = [
        ProcessSpec(
            name=service.replace("_", "-"),
            command=(
                *(sys.executable, "-X", "faulthandler", "-m", f"relayrl_{service}", *command),
                *_config_arguments(service, configuration),
                *_set_arguments(settings[service], service, extra),
            ),
            url=f"http://{LOOPBACK}:{port}",
            log=directory / "logs" / f"{service.replace('_', '-')}.log",
        )
        for service, command, port in services
    ]
    config = client_config(directory, ports)
    return StackPlan(directory, store, Addresses.of(ports), tuple(processes), config)


def _config_arguments(service: str, configuration: Path | None) -> tuple[str, ...]:
    file = configuration / f"{service}_config.json" if configuration is not None else None
    return ("--config", str(file)) if file is not None and file.is_file() else ()


def _set_arguments(settings: dict[str, str], service: str, extra: Sequence[str]) -> list[str]:
    pairs = [f"{key}={value}" for key, value in settings.items()]
    pairs += [pair.removeprefix(f"{service}.") for pair in extra if pair.startswith(f"{service}.")]
    return [part for pair in pairs for part in ("--set", pair)]


class Stack:
    """The processes of a plan. A context manager: leaving drains them, the last started first.

    Args:
        plan: what to start.
        report: gets one line for people whenever something happens, from any thread.
    """

    def __init__(self, plan: StackPlan, report: Callable[[str], None]) -> None:
        self.plan = plan
        self._report = report
        self._pipe = ParentPipe()
        self._processes = [ManagedProcess(spec, plan.restart, self._pipe) for spec in plan.processes]
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="stack-watch", daemon=True)
        self._started_at = time.time()

    def start(self, stop: threading.Event) -> bool:
        """Starts each process once the one before is ready; False if `stop` was set meanwhile.

        Raises:
            StackError: if another stack runs in the directory, or a process ends or is not ready in 60 s;
                with the end of its log.
        """
        self._refuse_second_stack()
        self.plan.directory.mkdir(parents=True, exist_ok=True)
        config = msgspec.json.format(msgspec.json.encode(self.plan.client_config), indent=2)
        (self.plan.directory / CLIENT_CONFIG).write_bytes(config)
        for process in self._processes:
            with self._lock:
                process.start()
                self._write()
            if not self._await_ready(process, stop):
                return False
            self._write()
        self._watcher.start()
        return True

    def processes(self) -> dict[str, ProcessEntry]:
        """Each process as it is now."""
        with self._lock:
            return {process.spec.name: _entry(process) for process in self._processes}

    @property
    def healthy(self) -> bool:
        """False once a process has used up its restarts."""
        return all(process.state != "failed" for process in self._processes)

    def stop(self, timeout_seconds: float = DRAIN_SECONDS) -> bool:
        """Drains every process, the last started first; False if one had to be killed. Twice is fine."""
        self._stopping.set()
        if self._watcher.is_alive():
            self._watcher.join()
        with self._lock:
            drained = [self._drain(process, timeout_seconds) for process in reversed(self._processes)]
            if any(process.spec.log.exists() for process in self._processes):
                self._write()
        self._pipe.close()
        return all(drained)

    def kill(self) -> None:
        """Ends every process at once."""
        self._stopping.set()
        for process in self._processes:
            process.kill()
        self._pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _drain(self, process: ManagedProcess, timeout_seconds: float) -> bool:
        process.terminate()
        drained = process.wait_stopped(timeout_seconds)
        if not drained:
            self._report(f"{process.spec.name} did not drain in {timeout_seconds:g} s and was killed")
        return drained

    def _refuse_second_stack(self) -> None:
        earlier = read_stack_file(self.plan.directory)
        if earlier is None:
            return
        alive = [str(entry.pid) for entry in earlier.processes.values() if entry.pid and is_alive(entry.pid)]
        if alive:
            raise StackError(
                f"a stack runs in {self.plan.directory} (process {', '.join(alive)}); "
                "stop it, or choose another --dir"
            )

    def _await_ready(self, process: ManagedProcess, stop: threading.Event) -> bool:
        waiting: dict[str, str] = {}

        def ready_or_dead() -> bool:
            waiting.clear()
            waiting.update(process.waiting_for())
            return not waiting or process.exit_status() is not None

        wait_until(ready_or_dead, READY_SECONDS, stop.wait)
        if not waiting:
            self._report(f"{process.spec.name} is ready (process {process.pid}, {process.spec.url})")
            return True
        if stop.is_set():
            return False
        status = process.exit_status()
        why = f"ended with status {status}" if status is not None else f"is not ready: {waiting}"
        raise StackError(f"{process.spec.name} {why}; the end of {process.spec.log}:\n{process.last_lines()}")

    def _watch(self) -> None:
        while not self._stopping.wait(WATCH_SECONDS):
            with self._lock:
                for process in self._processes:
                    self._look_after(process)

    def _look_after(self, process: ManagedProcess) -> None:
        before = process.state
        if process.exit_status() is not None and not self._stopping.is_set():
            self._revive(process)
        elif process.state == "starting":
            process.waiting_for()
        if process.state != before and process.state in {"ready", "failed"}:
            self._report(_change(process))
            self._write()

    def _revive(self, process: ManagedProcess) -> None:
        status, now = process.exit_status(), time.monotonic()
        if process.restart_due(now):
            process.restart(now)
            self._report(
                f"{process.spec.name} ended with status {status}; started again as process {process.pid} "
                f"(restart {process.restarts})"
            )
            self._write()

    def _write(self) -> None:
        StackFile(
            pid=os.getpid(),
            started_at=self._started_at,
            directory=str(self.plan.directory),
            store=self.plan.store,
            addresses=self.plan.addresses,
            processes=self.processes(),
        ).write()


def _entry(process: ManagedProcess) -> ProcessEntry:
    process.exit_status()  # notes a death that nobody has looked at yet
    return ProcessEntry(
        pid=process.pid,
        state=process.state,
        restarts=process.restarts,
        http=process.spec.url,
        log=str(process.spec.log),
    )


def _change(process: ManagedProcess) -> str:
    if process.state == "failed":
        return f"{process.spec.name} keeps failing and stays down; see {process.spec.log}"
    return f"{process.spec.name} is {process.state} (process {process.pid})"
