"""`relayrl up`: starts the services of one machine, keeps them running, and drains them on Ctrl-C."""

from __future__ import annotations

import argparse

from relayrl_cli.addresses import Ports
from relayrl_cli.stack import CLIENT_CONFIG, Stack, plan_stack
from relayrl_shared.errors import ConfigError
from relayrl_shared.lifecycle import StopSignal

WATCH_SECONDS = 0.5


def run(arguments: argparse.Namespace) -> int:
    """0 after a drain, 1 if a process stayed down or had to be killed."""
    _check_overrides(arguments.overrides)
    plan = plan_stack(
        arguments.directory,
        Ports.free() if arguments.auto_ports else Ports(),
        store=arguments.store,
        configuration=arguments.config_dir,
        extra=arguments.overrides,
    )
    stack = Stack(plan, report=_say)
    with StopSignal(on_force=stack.kill) as stop, stack:
        if stack.start(stop.event):
            _say(f"all services are ready; state in {plan.directory}; Ctrl-C stops them")
            _say(f"applications find them by {plan.directory / CLIENT_CONFIG}")
            _say(f"try: relayrl train --preset cartpole-ppo --dir {arguments.directory}")
            _wait(stop, stack)
        _say("draining")
        clean = stack.stop()
    return 0 if clean and stack.healthy else 1


def _wait(stop: StopSignal, stack: Stack) -> None:
    while not stop.wait(WATCH_SECONDS):
        if not stack.healthy:
            _say("stopping, since a process stays down")
            return


def _check_overrides(pairs: list[str]) -> None:
    services = ("model_registry", "training_server", "inference_server")
    for pair in pairs:
        if pair.partition(".")[0] not in services or "=" not in pair:
            raise ConfigError(f"--set {pair}: write SERVICE.KEY=VALUE with one of {', '.join(services)}")


def _say(line: str) -> None:
    print(line, flush=True)
