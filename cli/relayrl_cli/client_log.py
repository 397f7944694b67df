"""Where the client runtime of the command line logs: a file beside those of the services."""

from __future__ import annotations

from pathlib import Path

from relayrl_shared import logs
from relayrl_shared.settings import LogSettings


def log_to_file(directory: Path) -> Path:
    """Sends everything that this process logs to `<directory>/logs/client.log`; the terminal stays ours."""
    file = directory / "logs" / "client.log"
    file.parent.mkdir(parents=True, exist_ok=True)
    logs.configure("client", LogSettings(stderr=False, file=str(file)))
    return file
