"""Hot reload: looks whether a settings file changed, and says what that changes.

A service polls `SettingsFile` every `config_update_polling_seconds`. A file that does not parse or validate
leaves the settings in use as they are, and says so once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from relayrl_shared.errors import ConfigError
from relayrl_shared.settings import Settings, as_overrides

S = TypeVar("S", bound=Settings)


@dataclass(frozen=True, slots=True)
class Reload(Generic[S]):
    """What a changed file means.

    settings: in use from now on. changed: dotted key → (before, after), as text. needs_restart: those of the
    changed keys that take effect at the next start only. error: why the file was refused, None if it was not.
    """

    settings: S
    changed: dict[str, tuple[str | None, str | None]] = field(default_factory=dict)
    needs_restart: tuple[str, ...] = ()
    error: str | None = None


class SettingsFile(Generic[S]):
    """Watches one file by its time and size.

    Args:
        file: to watch.
        settings: in use.
        load: reads all sources again, as at the start.
        live: dotted keys, or beginnings of them, that may change without a restart.
    """

    def __init__(self, file: Path, settings: S, load: Callable[[], S], live: Sequence[str] = ()) -> None:
        self._file = file
        self._load = load
        self._live = tuple(live)
        self._stamp = self._look()
        self.settings = settings

    def poll(self) -> Reload[S] | None:
        """What changed since the last call; None if the file is the same."""
        stamp = self._look()
        if stamp == self._stamp:
            return None
        self._stamp = stamp
        try:
            fresh = self._load()
        except ConfigError as error:
            return Reload(self.settings, error=str(error))
        changed = difference(self.settings, fresh)
        self.settings = fresh
        return Reload(fresh, changed, tuple(key for key in changed if not self._is_live(key)))

    def _is_live(self, key: str) -> bool:
        return any(key == live or key.startswith(f"{live}.") for live in self._live)

    def _look(self) -> tuple[int, int] | None:
        try:
            status = self._file.stat()
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_size


def difference(before: Settings, after: Settings) -> dict[str, tuple[str | None, str | None]]:
    """Dotted key → (before, after) as text for every setting that differs."""
    old, new = as_overrides(before), as_overrides(after)
    return {key: (old.get(key), new.get(key)) for key in sorted(old | new) if old.get(key) != new.get(key)}
