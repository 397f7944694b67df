"""`relayrl demo`: starts a stack on free ports, trains a preset, and tests the policy through the servers."""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

from relayrl_cli import presets
from relayrl_cli.addresses import Ports
from relayrl_cli.agents import build_evaluation_agent, build_training_agent
from relayrl_cli.client_log import log_to_file
from relayrl_cli.commands.train import exit_status, summary
from relayrl_cli.evaluate import evaluate_policy
from relayrl_cli.plan import TrainingPlan, plan_from_preset
from relayrl_cli.run_view import RunView, ask_training_server
from relayrl_cli.stack import Stack, StackPlan, plan_stack
from relayrl_cli.table import View, open_view
from relayrl_cli.train import Outcome, TrainingSession
from relayrl_shared.errors import RelayRLError
from relayrl_shared.lifecycle import StopSignal

INTERRUPTED = 130


def run(arguments: argparse.Namespace) -> int:
    """0 when the environment was learned and the policy tested, 1 when not learned, 130 on Ctrl-C.

    Raises:
        RelayRLError: a service or the run failed for good.
    """
    preset = presets.load(arguments.preset)
    plan = plan_from_preset(preset, arguments.preset, steps=arguments.steps, seed=arguments.seed)
    directory = arguments.directory or Path("relayrl-demo") / time.strftime("%Y%m%d-%H%M%S")
    services = plan_stack(directory, Ports.free(), store=arguments.store)
    log_to_file(services.directory)
    view = open_view(sys.stdout)
    stack = Stack(services, report=view.say)
    with StopSignal(on_force=stack.kill) as stop, stack:
        return _demo(arguments, plan, stack, stop, view)


def _demo(
    arguments: argparse.Namespace, plan: TrainingPlan, stack: Stack, stop: StopSignal, view: View
) -> int:
    services = stack.plan
    began = time.monotonic()
    view.say(f"starting the services; all state goes to {services.directory}")
    if not stack.start(stop.event):
        view.say(_kept(services, plan, None))
        return INTERRUPTED
    view.say(
        f"services ready after {time.monotonic() - began:.1f} s; "
        f"training {plan.algorithm} on {plan.environment} with {plan.actors} actors"
    )
    try:
        outcome = _train(plan, stack, stop, view)
    except RelayRLError:
        view.say(_kept(services, plan, None))
        raise
    view.say(summary(plan, outcome))
    status = exit_status(plan, outcome)
    if status == INTERRUPTED or stop.stopping:
        view.say(_kept(services, plan, outcome))
        return INTERRUPTED
    _evaluate(arguments.episodes, plan, services, view)
    view.say(_kept(services, plan, outcome))
    view.say(_verdict(plan, outcome))
    return status


def _train(plan: TrainingPlan, stack: Stack, stop: StopSignal, view: View) -> Outcome:
    services = stack.plan

    def trouble() -> str | None:
        return None if stack.healthy else f"a service does not start any more; see {services.directory}/logs"

    agent = build_training_agent(plan, services.addresses, services.directory)
    with RunView(partial(ask_training_server, services.addresses.training_http, plan.run)) as servers, view:
        return TrainingSession(plan, agent, servers, trouble).run(stop.event, view)


def _evaluate(episodes: int, plan: TrainingPlan, services: StackPlan, view: View) -> None:
    view.say(f"testing the newest policy greedily over {episodes} episodes through the inference server")
    agent = build_evaluation_agent(plan, services.addresses)
    result = evaluate_policy(agent, plan.environment, episodes)
    view.say(
        f"policy version {result.policy_version}: mean return {result.mean:.1f} "
        f"(lowest {min(result.returns):.1f}, highest {max(result.returns):.1f})"
    )


def _verdict(plan: TrainingPlan, outcome: Outcome) -> str:
    if plan.target_return is None:
        return "done"
    reached = "reached" if outcome.learned else "NOT reached"
    return f"the target, a mean return of {plan.target_return:g} over 100 training episodes, was {reached}"


def _kept(services: StackPlan, plan: TrainingPlan, outcome: Outcome | None) -> str:
    """Where everything lies, and what to try next."""
    directory = services.directory
    kept = [f"kept in {directory}: logs, store ({services.store})"]
    if outcome is not None and outcome.policy_version >= 0:
        kept.append(
            f"policy version {outcome.policy_version} of {outcome.policy} in the registry, checkpoints"
        )
    return "\n".join(
        [
            ", ".join(kept),
            "next, try:",
            f"  relayrl up --dir {directory} --auto-ports   (then, in another terminal)",
            f"  relayrl train --preset {plan.run} --run {plan.run} --dir {directory}",
            f"  relayrl audit {plan.run} --dir {directory}",
        ]
    )
