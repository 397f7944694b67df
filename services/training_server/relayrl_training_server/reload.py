"""Hot reload of the settings file in every process of the training server; started by `main`.

Log levels change at once. Everything else says that it takes effect at the next start: children read their
settings once, and runs keep those that they were created with.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from relayrl_shared import logs
from relayrl_shared.settings import LogSettings
from relayrl_shared.settings_file import Reload, SettingsFile
from relayrl_training_server.settings import TrainingServerSettings

LOG = logs.get_logger(__name__)
LIVE = ("log.level", "log.levels")


def follow_file(
    file: Path,
    settings: TrainingServerSettings,
    load: Callable[[], TrainingServerSettings],
    stop: threading.Event | None = None,
) -> threading.Thread:
    """Looks at the file every `config_update_polling_seconds` from a daemon thread, until `stop`."""
    watched = SettingsFile(file, settings, load, LIVE)
    ended = stop or threading.Event()

    def follow() -> None:
        while not ended.wait(watched.settings.server.config_update_polling_seconds):
            reload = watched.poll()
            if reload is not None:
                apply(reload)

    thread = threading.Thread(target=follow, name="settings file", daemon=True)
    thread.start()
    return thread


def apply(reload: Reload[TrainingServerSettings]) -> None:
    """Puts into effect what can be, and says what cannot."""
    if reload.error is not None:
        LOG.error("the changed settings file is refused; the old settings stay", reason=reload.error)
        return
    _apply_log_levels(reload.settings.log)
    if reload.changed:
        LOG.info("settings changed", changed=reload.changed, needs_restart=list(reload.needs_restart))


def _apply_log_levels(settings: LogSettings) -> None:
    logs.set_level(settings.level)
    for name, level in settings.levels.items():
        logs.set_level(level, name)
