"""Hot reload: a changed file is read again, a bad one is refused and the old settings stay."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from relayrl_shared.settings import HttpSettings, Settings, load_settings
from relayrl_shared.settings_file import SettingsFile, difference


class Example(Settings, frozen=True, kw_only=True):
    """Two kinds of keys: rate may change while running, the port may not."""

    rate: float = 1.0
    http: HttpSettings = HttpSettings(port=1)


def watch(file: Path) -> SettingsFile[Example]:
    def load() -> Example:
        return load_settings(Example, environment_prefix="RELAYRL_X", file=file)

    return SettingsFile(file, load(), load, live=["rate"])


def write(file: Path, text: str, at: int) -> None:
    """Writes with a time of its own: two writes within one tick of the clock would look the same."""
    file.write_text(text)
    os.utime(file, (at, at))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A valid file."""
    found = tmp_path / "config.json"
    write(found, "{}", 1)
    return found


def test_an_unchanged_file_is_not_read(file: Path) -> None:
    """Polling costs one look at its time and size."""
    assert watch(file).poll() is None


def test_a_change_is_told_key_by_key(file: Path) -> None:
    """What was, what is, and which of it waits for a restart."""
    watched = watch(file)
    write(file, '{"rate": 2.5, "http": {"port": 9}}', 2)

    reload = watched.poll()

    assert reload is not None
    assert reload.settings == Example(rate=2.5, http=HttpSettings(port=9)) == watched.settings
    assert reload.changed == {"http.port": ("1", "9"), "rate": ("1.0", "2.5")}
    assert (reload.needs_restart, reload.error) == (("http.port",), None)
    assert watched.poll() is None


@pytest.mark.parametrize("text", ["{", '{"rat": 1}', '{"rate": "fast"}'])
def test_a_bad_file_keeps_the_settings_in_use_and_says_so_once(file: Path, text: str) -> None:
    """Half-written, unknown and wrong; the next good file counts again."""
    watched = watch(file)
    write(file, text, 2)

    reload = watched.poll()

    assert reload is not None
    assert reload.error
    assert reload.settings == Example() == watched.settings
    assert watched.poll() is None
    write(file, '{"rate": 3}', 3)
    assert watched.poll() is not None
    assert watched.settings.rate == 3


def test_a_file_that_vanishes_is_a_bad_file(file: Path) -> None:
    """Nothing falls back to defaults by accident."""
    watched = watch(file)
    file.unlink()

    reload = watched.poll()

    assert reload is not None
    assert "No such file" in str(reload.error)


def test_equal_settings_do_not_differ() -> None:
    """A rewritten file without a change has an empty difference."""
    assert difference(Example(), Example()) == {}
