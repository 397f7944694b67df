"""`relayrl-training-server supervise | ingest | learn --run R`: parses, then runs one process to its end.

Heavy imports come after parsing, so that --help answers at once and ingest never imports torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from relayrl_shared.errors import RelayRLError
from relayrl_shared.parent import GRACE_SECONDS, add_parent_argument, follow_parent
from relayrl_shared.settings import add_settings_arguments, settings_from_arguments
from relayrl_training_server.liveness import LivingEvent
from relayrl_training_server.settings import ENVIRONMENT_PREFIX, TrainingServerSettings

PROGRAM = "relayrl-training-server"
_SUPERVISOR_GRACE_SECONDS = 25.0  # beyond the drain of its children


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one process; the exit status: 0 after a stop, 2 for settings or start-up errors."""
    arguments = _parser().parse_args(argv)
    drains_others = arguments.command == "supervise"
    follow_parent(arguments.parent_pipe, _SUPERVISOR_GRACE_SECONDS if drains_others else GRACE_SECONDS)

    def load() -> TrainingServerSettings:
        return settings_from_arguments(TrainingServerSettings, arguments, ENVIRONMENT_PREFIX, os.environ)

    try:
        settings = load()
        _follow_file(arguments, settings, load)
        return _COMMANDS[arguments.command](settings, arguments)
    except RelayRLError as error:
        sys.stderr.write(f"{PROGRAM}: {error}\n")
        return 2


def _follow_file(
    arguments: argparse.Namespace,
    settings: TrainingServerSettings,
    load: Callable[[], TrainingServerSettings],
) -> None:
    if arguments.config is not None:
        from relayrl_training_server.reload import follow_file

        follow_file(arguments.config, settings, load)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Takes trajectories in, keeps them, and learns from them."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    supervise = commands.add_parser("supervise", help="start and watch ingest and a learner for each run")
    ingest = commands.add_parser("ingest", help="take clients and trajectories in")
    learn = commands.add_parser("learn", help="learn one run")
    learn.add_argument("--run", required=True, help="id or name of the run")
    for command in (supervise, ingest, learn):
        add_settings_arguments(command)
        add_parent_argument(command)
        command.add_argument("--life-pipe", type=int, default=None, help=argparse.SUPPRESS)
    return parser


def _supervise(settings: TrainingServerSettings, arguments: argparse.Namespace) -> int:
    from relayrl_training_server.supervisor import run_supervisor

    return run_supervisor(settings, config_file=arguments.config, overrides=arguments.overrides)


def _ingest(settings: TrainingServerSettings, arguments: argparse.Namespace) -> int:
    from relayrl_training_server.ingest import run_ingest

    return run_ingest(settings, LivingEvent(arguments.life_pipe))


def _learn(settings: TrainingServerSettings, arguments: argparse.Namespace) -> int:
    from relayrl_training_server.learner_process import main as learn

    return learn(settings, arguments.run, LivingEvent(arguments.life_pipe))


_COMMANDS: dict[str, Callable[[TrainingServerSettings, argparse.Namespace], int]] = {
    "supervise": _supervise,
    "ingest": _ingest,
    "learn": _learn,
}


if __name__ == "__main__":
    sys.exit(main())
