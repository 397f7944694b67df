"""What a changed settings file does to a running process."""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec
import pytest

from relayrl_shared.settings import LogSettings, load_settings
from relayrl_shared.settings_file import SettingsFile
from relayrl_training_server.reload import LIVE, apply
from relayrl_training_server.settings import TrainingServerSettings


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A settings file."""
    path = tmp_path / "training_server_config.json"
    path.write_text('{"log": {"level": "info"}}')
    return path


def load(file: Path) -> TrainingServerSettings:
    """What the file says."""
    return load_settings(TrainingServerSettings, environment_prefix="NONE", file=file)


def test_log_levels_change_at_once(file: Path) -> None:
    """A changed level takes effect without a restart, for all loggers and for one."""
    watched = SettingsFile(file, load(file), lambda: load(file), LIVE)
    file.write_text('{"log": {"level": "error", "levels": {"relayrl.test": "debug"}}}')

    reload = watched.poll()
    assert reload is not None
    apply(reload)

    assert logging.getLogger().level == logging.ERROR
    assert logging.getLogger("relayrl.test").level == logging.DEBUG
    assert reload.needs_restart == ()


def test_what_needs_a_restart_is_said(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Any other key is named as waiting for the next start."""
    watched = SettingsFile(file, load(file), lambda: load(file), LIVE)
    file.write_text('{"training_server_config": {"default_algorithm": "REINFORCE"}}')

    reload = watched.poll()
    assert reload is not None
    apply(reload)

    assert reload.needs_restart == ("training_server_config.default_algorithm",)


def test_a_bad_file_changes_nothing(file: Path) -> None:
    """The old settings stay in use, and the reason is logged."""
    settings = msgspec.structs.replace(load(file), log=LogSettings(level="warning"))
    watched = SettingsFile(file, settings, lambda: load(file), LIVE)
    logging.getLogger().setLevel(logging.WARNING)
    file.write_text('{"log": {"levl": "debug"}}')

    reload = watched.poll()
    assert reload is not None
    apply(reload)

    assert "level" in (reload.error or "")
    assert reload.settings.log.level == "warning"
    assert logging.getLogger().level == logging.WARNING
