"""How soon each service is back: SIGKILL under training load, then from its successor's exec to ready.

All services of a stack run while PPO trains; each is killed in turn, again and again, every time after new
trajectories were stored and new updates finished. Ready is what the successor's own /readyz says; for the
supervisor that includes its children. At the end nothing may be lost, stored twice or used twice.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec
import psutil  # type: ignore[import-untyped]
from full_stack import (
    UnsoundFigureError,
    check_ledger,
    progress_view,
    read_ledger,
    running_stack,
    say,
    temporary_directory,
    train,
)
from harness import Report, parse_options

from relayrl_cli import presets
from relayrl_cli.addresses import LOOPBACK, Ports
from relayrl_cli.client_log import log_to_file
from relayrl_cli.plan import TrainingPlan, plan_from_preset
from relayrl_cli.processes import RestartPolicy, not_ready
from relayrl_cli.run_view import RunFigures, ask_training_server
from relayrl_cli.stack import Stack, StackPlan, plan_stack
from relayrl_cli.train import Outcome

TARGET_SECONDS = 5.0
"""From exec to ready, for each service."""

PRESET = "cartpole-ppo"
UPDATES_BETWEEN_KILLS = 5
WAIT_SECONDS = 180.0
POLL_SECONDS = 0.01
MOST_DEATHS = 5
LEARNER_PORT = "training_server.training_server_config.learner.http.port"

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Recovery:
    """One kill. exec_to_ready: of the successor; kill_to_ready adds what passes before it is started.

    cpu_seconds: of the successor until it was ready, without its children: what is left of exec_to_ready on a
    machine with nothing else to do. deaths: of successors before one was ready, which there should not be.
    """

    exec_to_ready_seconds: float
    kill_to_ready_seconds: float
    cpu_seconds: float
    deaths: int = 0


@dataclass(frozen=True, slots=True)
class Service:
    """What is killed. `pid`: its process now, None while there is none; `url`: the root of its HTTP."""

    name: str
    pid: Callable[[], int | None]
    url: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    options = parse_options(__doc__ or "", arguments)
    report = Report("recovery", options)
    plan = replace(plan_from_preset(presets.load(PRESET), PRESET), steps=None, target_return=None)
    with temporary_directory("recovery") as directory:
        log_to_file(directory)
        learner_port = free_port()
        services = stack_for_kills(directory, Ports.free(), learner_port)
        with running_stack(services) as stack, Training(plan, services) as training:
            victims = services_of(stack, f"http://{LOOPBACK}:{learner_port}")
            found = kill_in_turn(victims, training, repeats=1 if options.quick else 5)
            outcome = training.finish()
        ledger = read_ledger(services.store, plan.run)
        check_ledger(ledger, recorded_steps=outcome.steps, actors=plan.actors)
    for name, recoveries in found.items():
        report_service(report, name, recoveries)
    report.figure(
        "trajectories_lost", ledger.audit.missing, "trajectories", **msgspec.to_builtins(ledger.audit)
    )
    return report.status()


def report_service(report: Report, name: str, recoveries: Sequence[Recovery]) -> None:
    """The median seconds of a service, and beside its target."""
    seconds = [recovery.exec_to_ready_seconds for recovery in recoveries]
    after_kill = statistics.median(recovery.kill_to_ready_seconds for recovery in recoveries)
    deaths = sum(recovery.deaths for recovery in recoveries)
    cpu = statistics.median(recovery.cpu_seconds for recovery in recoveries)
    median = statistics.median(seconds)
    report.figure(
        f"{name}_exec_to_ready",
        median,
        "seconds",
        repeats=[round(value, 2) for value in seconds],
        kill_to_ready=round(after_kill, 2),
        cpu=round(cpu, 2),
        deaths=deaths,
    )
    if deaths:
        report.missed.append(f"{name}_deaths")
    report.ratio(f"{name}_to_target", median / TARGET_SECONDS, at_most=1.0, target_seconds=TARGET_SECONDS)


# ---- the stack --------------------------------------------------------------------------------------------


def stack_for_kills(directory: Path, ports: Ports, learner_port: int) -> StackPlan:
    """A stack that restarts without a limit; its learner, else on any port, has one that is known."""
    plan = plan_stack(directory, ports, extra=[f"{LEARNER_PORT}={learner_port}"])
    return replace(plan, restart=RestartPolicy(limit=10_000))


def free_port() -> int:
    """A port of loopback that nothing listens on now."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def services_of(stack: Stack, learner_url: str) -> list[Service]:
    """Every process of the stack, in the order in which they are killed."""
    urls = {spec.name: spec.url for spec in stack.plan.processes}
    supervisor = urls["training-server"]

    def managed(name: str) -> Callable[[], int | None]:
        return lambda: stack.processes()[name].pid

    def child(prefix: str) -> Callable[[], int | None]:
        return lambda: child_pid(ask_processes(supervisor), prefix)

    return [
        Service("model_registry", managed("model-registry"), urls["model-registry"]),
        Service("supervisor", managed("training-server"), supervisor),
        Service("ingest", child("ingest"), ingest_url(stack.plan)),
        Service("learner", child("learner "), learner_url),
        Service("inference_server", managed("inference-server"), urls["inference-server"]),
    ]


def ingest_url(plan: StackPlan) -> str:
    """Where ingest serves HTTP, from the command line of its supervisor."""
    supervisor = next(spec for spec in plan.processes if spec.name == "training-server")
    key = "training_server_config.ingest.http.port="
    port = next(word.removeprefix(key) for word in supervisor.command if word.startswith(key))
    return f"http://{LOOPBACK}:{port}"


def ask_processes(url: str) -> list[dict[str, Any]]:
    """The supervisor's children as it says; none while it does not answer."""
    try:
        with urllib.request.urlopen(f"{url}/v1/processes", timeout=1.0) as answer:
            return msgspec.json.decode(answer.read(), type=list[dict[str, Any]])
    except (OSError, ValueError):
        return []


def child_pid(children: Sequence[dict[str, Any]], prefix: str) -> int | None:
    """The process of the running child whose name begins so."""
    found = (child["pid"] for child in children if child["name"].startswith(prefix))
    return next((pid for pid in found if pid is not None), None)


# ---- the load ---------------------------------------------------------------------------------------------


class Training:
    """A training in a thread, without an end of its own. A context manager: leaving stops it."""

    def __init__(self, plan: TrainingPlan, services: StackPlan) -> None:
        self._plan = plan
        self._services = services
        self._stop = threading.Event()
        self._outcome: Outcome | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(WAIT_SECONDS)

    def figures(self) -> RunFigures | None:
        """What the training server says of the run. Raises UnsoundFigureError once training has ended."""
        if not self._thread.is_alive():
            raise UnsoundFigureError(f"training ended under the kills: {self._error}") from self._error
        return ask_training_server(self._services.addresses.training_http, self._plan.run)

    def goes_on(self) -> None:
        """Returns once new trajectories are stored and new updates are finished."""
        first = wait_for(self.figures, "the training server tells of the run")

        def newer() -> RunFigures | None:
            now = self.figures()
            if now is None or now.stored_trajectories <= first.stored_trajectories:
                return None
            return now if now.learner_update >= first.learner_update + UPDATES_BETWEEN_KILLS else None

        wait_for(newer, "training goes on")

    def finish(self) -> Outcome:
        """Stops and delivers everything. Raises UnsoundFigureError if training has failed."""
        self._stop.set()
        self._thread.join(WAIT_SECONDS)
        if self._outcome is None:
            raise UnsoundFigureError(f"training did not end well: {self._error}") from self._error
        return self._outcome

    def _run(self) -> None:
        try:
            self._outcome = train(self._plan, self._services, self._stop, progress_view())
        except Exception as error:  # noqa: BLE001  # told to the one who waits
            self._error = error


# ---- kills ------------------------------------------------------------------------------------------------


def kill_in_turn(services: Sequence[Service], training: Training, repeats: int) -> dict[str, list[Recovery]]:
    """Kills each service `repeats` times, always the whole stack being ready and training going on."""
    skew = start_time_skew()
    found: dict[str, list[Recovery]] = {service.name: [] for service in services}
    for _ in range(repeats):
        for service in services:
            for other in services:
                await_ready(other)
            training.goes_on()
            recovery = kill(service, skew)
            found[service.name].append(recovery)
            say(
                f"{service.name}: ready {recovery.exec_to_ready_seconds:.2f} s after exec, "
                f"{recovery.kill_to_ready_seconds:.2f} s after SIGKILL, {recovery.cpu_seconds:.2f} s of CPU"
            )
    training.goes_on()
    return found


def kill(service: Service, skew_seconds: float) -> Recovery:
    """Kills the process of a service and waits until its successor is ready.

    Raises:
        UnsoundFigureError: there is no successor, it is not ready in time, or one after the other dies.
    """
    before = wait_for(service.pid, f"{service.name} runs")
    killed_at = time.time()
    os.kill(before, signal.SIGKILL)
    for deaths in range(MOST_DEATHS):
        after = wait_for(partial(successor_of, service, before), f"{service.name} is started again")
        with suppress(psutil.NoSuchProcess):
            successor = psutil.Process(after)
            started_at = successor.create_time() + skew_seconds
            ready_at = await_ready(service)
            used = successor.cpu_times()
            if service.pid() == after:
                return Recovery(ready_at - started_at, ready_at - killed_at, used.user + used.system, deaths)
        say(f"{service.name}: its successor, process {after}, died before it was ready")
        before = after
    raise UnsoundFigureError(f"{MOST_DEATHS} successors of {service.name} died before they were ready")


def successor_of(service: Service, before: int) -> int | None:
    """Its process now, unless it is still the one before."""
    return other_than(before, service.pid())


def other_than(before: int, now: int | None) -> int | None:
    """The process now, unless it is still the one before."""
    return None if now == before else now


def await_ready(service: Service) -> float:
    """When /readyz first said yes, in seconds of the wall clock."""
    return wait_for(lambda: time.time() if not not_ready(service.url) else None, f"{service.name} is ready")


def wait_for(ask: Callable[[], Answer | None], what: str) -> Answer:
    """Asks until there is an answer. Raises UnsoundFigureError after three minutes."""
    deadline, pause = time.monotonic() + WAIT_SECONDS, threading.Event()
    while (answer := ask()) is None:
        if time.monotonic() > deadline:
            raise UnsoundFigureError(f"not within {WAIT_SECONDS:g} s: {what}")
        pause.wait(POLL_SECONDS)
    return answer


def start_time_skew() -> float:
    """Seconds to add to start times of processes: the system knows its own boot time to a second only."""
    before = time.time()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        skew = before - float(psutil.Process(child.pid).create_time())
        child.communicate(b"\n")
    return skew


if __name__ == "__main__":
    sys.exit(main())
