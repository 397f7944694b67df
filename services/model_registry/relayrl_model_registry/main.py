"""`relayrl-model-registry`: parses the command line, then runs one registry until it is told to stop."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from relayrl_model_registry.settings import ENVIRONMENT_PREFIX, ModelRegistrySettings
from relayrl_shared.errors import RelayRLError
from relayrl_shared.parent import add_parent_argument, follow_parent
from relayrl_shared.settings import add_settings_arguments, settings_from_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the registry; the exit status: 0 after a stop, 2 for settings or start-up errors."""
    parser = argparse.ArgumentParser(
        prog="relayrl-model-registry", description="Keeps policy versions, their files and their aliases."
    )
    add_settings_arguments(parser)
    add_parent_argument(parser)
    arguments = parser.parse_args(argv)
    follow_parent(arguments.parent_pipe)
    try:
        settings = settings_from_arguments(ModelRegistrySettings, arguments, ENVIRONMENT_PREFIX, os.environ)
        return _run(settings)
    except RelayRLError as error:
        sys.stderr.write(f"relayrl-model-registry: {error}\n")
        return 2


def _run(settings: ModelRegistrySettings) -> int:
    # Heavy imports come after parsing, so that --help answers at once.
    from relayrl_model_registry.service import ModelRegistry
    from relayrl_shared import logs, telemetry
    from relayrl_shared.lifecycle import StopSignal

    logs.configure("model-registry", settings.log)
    tracing = telemetry.configure("model-registry", settings.telemetry)
    with StopSignal() as stop, ModelRegistry(settings, stop.stop) as registry:
        registry.run(stop.event)
    tracing.close()
    logs.get_logger(__name__).info("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
