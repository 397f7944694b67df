"""`relayrl-inference-server`: parses the command line, then runs one server until it is told to stop."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from relayrl_inference_server.settings import ENVIRONMENT_PREFIX, InferenceServerSettings
from relayrl_shared.errors import RelayRLError
from relayrl_shared.parent import add_parent_argument, follow_parent
from relayrl_shared.settings import add_settings_arguments, settings_from_arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server; the exit status: 0 after a stop, 2 for settings or start-up errors."""
    parser = argparse.ArgumentParser(
        prog="relayrl-inference-server", description="Answers observations with actions, in batches."
    )
    add_settings_arguments(parser)
    add_parent_argument(parser)
    arguments = parser.parse_args(argv)
    follow_parent(arguments.parent_pipe)
    try:
        settings = settings_from_arguments(InferenceServerSettings, arguments, ENVIRONMENT_PREFIX, os.environ)
        return _run(settings)
    except RelayRLError as error:
        sys.stderr.write(f"relayrl-inference-server: {error}\n")
        return 2


def _run(settings: InferenceServerSettings) -> int:
    os.environ.setdefault(
        "OMP_NUM_THREADS", "1"
    )  # before numpy: one thread in serving processes (contracts K4)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Heavy imports come after parsing, so that --help answers at once.
    from relayrl_inference_server.service import InferenceService
    from relayrl_shared import logs, telemetry
    from relayrl_shared.lifecycle import StopSignal

    logs.configure("inference-server", settings.log)
    tracing = telemetry.configure("inference-server", settings.telemetry)
    with StopSignal() as stop, InferenceService(settings, stop.stop) as service:
        service.run(stop.event)
    tracing.close()
    logs.get_logger(__name__).info("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
