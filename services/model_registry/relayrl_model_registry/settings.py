"""The registry's settings, read once by `main` and passed down as values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from msgspec import Meta

from relayrl_shared.settings import Address, HttpSettings, LogSettings, Settings, TelemetrySettings

ENVIRONMENT_PREFIX = "RELAYRL_MODEL_REGISTRY"

Count = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]


class LimitSettings(Settings, frozen=True, kw_only=True):
    """Bounds on what peers may send."""

    max_message_bytes: Count = 8 << 20
    max_queued: Count = 1000
    max_blob_bytes: Count = 1 << 30
    max_uploads: Count = 64
    upload_timeout_seconds: Seconds = 600.0


class CollectionSettings(Settings, frozen=True, kw_only=True):
    """Which files of old versions are given up (contracts L); rows and lineage stay for ever."""

    enabled: bool = True
    keep_unaliased_versions: Count = 100
    minimum_age_seconds: Annotated[float, Meta(ge=0)] = 3600.0
    intent_timeout_seconds: Seconds = 3600.0
    interval_seconds: Seconds = 600.0


class ModelRegistrySettings(Settings, frozen=True, kw_only=True):
    """Everything that a registry process is told.

    directory: holds `registry.sqlite` and `blobs/` unless the two keys below say otherwise.
    database_url: `sqlite:///PATH` or `postgresql://…`; None: the SQLite file in the directory.
    """

    model_server: Address = Address(port=50051)
    model_announcer: Address = Address(port=50052)
    http: HttpSettings = HttpSettings(port=8084)
    directory: str = "registry"
    database_url: str | None = None
    blob_directory: str | None = None
    limits: LimitSettings = LimitSettings()
    collection: CollectionSettings = CollectionSettings()
    log: LogSettings = LogSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @property
    def effective_database_url(self) -> str:
        """The database to open."""
        return self.database_url or f"sqlite:///{Path(self.directory).absolute() / 'registry.sqlite'}"

    @property
    def effective_blob_directory(self) -> Path:
        """Where the files lie."""
        return Path(self.blob_directory or Path(self.directory) / "blobs")
