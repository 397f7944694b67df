"""The command `relayrl`: parses the command line, then imports what the command needs and runs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from relayrl_shared import __version__
from relayrl_shared.errors import RelayRLError
from relayrl_shared.settings import add_settings_arguments

SERVICES = ("model-registry", "training-server", "inference-server")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit status: 0 done, 1 the command's own failure, 2 wrong usage or settings, 130 interrupted.
    """
    arguments = _parser().parse_args(argv)
    command = import_module(f"relayrl_cli.commands.{arguments.command.replace('-', '_')}")
    try:
        status: int = command.run(arguments)
    except RelayRLError as error:
        sys.stderr.write(f"relayrl {arguments.command}: {error}\n")
        return 2
    except OSError as error:
        sys.stderr.write(f"relayrl {arguments.command}: {error}\n")
        return 2
    except KeyboardInterrupt:
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="relayrl", description="RelayRL: act, record, store, learn, publish, act."
    )
    parser.add_argument("--version", action="version", version=f"relayrl {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_up(commands.add_parser("up", help="start all services and keep them running"))
    _add_demo(commands.add_parser("demo", help="train CartPole through all services, then test the policy"))
    _add_train(commands.add_parser("train", help="train an environment with the services that run"))
    _add_status(commands.add_parser("status", help="show the processes of a stack"))
    _add_audit(commands.add_parser("audit", help="account for every trajectory of a run"))
    _add_config(commands.add_parser("config", help="show or check the settings of a service"))
    return parser


def _add_directory(parser: argparse.ArgumentParser, default: Path | None, what: str) -> None:
    parser.add_argument("--dir", type=Path, default=default, dest="directory", metavar="DIR", help=what)


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store", metavar="URL", help="trajectory store, such as postgresql://…; default SQLite"
    )


def _add_up(parser: argparse.ArgumentParser) -> None:
    _add_directory(parser, Path("relayrl-data"), "all state of the stack (default: relayrl-data)")
    _add_store(parser)
    parser.add_argument(
        "--auto-ports", action="store_true", help="take free ports in place of the default ones"
    )
    parser.add_argument(
        "--config-dir",
        type=Path,
        metavar="DIR",
        help="has model_registry_config.json and so on; each optional",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="SERVICE.KEY=VALUE",
        help="one setting of one service, such as model_registry.log.level=debug",
    )


def _add_demo(parser: argparse.ArgumentParser) -> None:
    _add_directory(parser, None, "all state of the demo (default: a fresh relayrl-demo/TIME)")
    _add_store(parser)
    parser.add_argument("--preset", default="cartpole-ppo", help="what to train (default: cartpole-ppo)")
    parser.add_argument("--steps", type=int, help="train for at most so many environment steps")
    parser.add_argument("--episodes", type=int, default=20, help="episodes of the evaluation (default: 20)")
    parser.add_argument("--seed", type=int, help="of the run (default: the preset's)")


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--env", dest="environment", help="Gymnasium id, such as CartPole-v1")
    parser.add_argument("--algorithm", help="PPO or REINFORCE")
    parser.add_argument("--actors", type=int, help="environments that are stepped together")
    parser.add_argument("--preset", help="named settings; the other options go over it")
    parser.add_argument("--run", help="name of the run: a new one is created, a known one is continued")
    parser.add_argument("--steps", type=int, help="end after so many environment steps")
    parser.add_argument("--target-return", type=float, help="end when the last 100 episodes reach this mean")
    parser.add_argument("--seed", type=int, help="of the run")
    parser.add_argument("--pacing", choices=("block", "free"), help="whether acting waits for learning")
    parser.add_argument("--max-policy-lag", type=int, help="learner updates that acting may be behind")
    parser.add_argument("--allow-nan", action="store_true", help="let NaN observations pass")
    parser.add_argument(
        "--inference", choices=("local", "server"), default="local", help="where actions are computed"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="NAME=VALUE",
        help="one hyperparameter, such as pi_lr=3e-4",
    )
    parser.add_argument(
        "--in-process", action="store_true", help="all services in this process, for debugging"
    )
    _add_directory(parser, None, "of the stack to train with (default: relayrl-data), or of --in-process")
    parser.add_argument("--addresses", metavar="NAME=HOST:PORT,…", help="of the services, in place of --dir")


def _add_status(parser: argparse.ArgumentParser) -> None:
    _add_directory(parser, Path("relayrl-data"), "of the stack (default: relayrl-data)")
    parser.add_argument("--json", action="store_true", help="as JSON")


def _add_audit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_name", metavar="RUN", help="name or id of the run")
    _add_directory(parser, Path("relayrl-data"), "of the stack (default: relayrl-data)")
    _add_store(parser)
    parser.add_argument("--json", action="store_true", help="as JSON")


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("show", "check", "schema"), help="what to print")
    parser.add_argument("service", choices=SERVICES)
    add_settings_arguments(parser)


if __name__ == "__main__":
    sys.exit(main())
