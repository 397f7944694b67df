"""Structured logs: an event and its fields, as JSON lines or for people, to stderr and optionally a file.

Modules call `get_logger(__name__)`; a service's `main` calls `configure` once. Without `configure`, as in an
application that embeds the client, the events go through the standard `logging` like any library's.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any, cast

import structlog

from relayrl_shared import telemetry
from relayrl_shared.settings import LogSettings

_FIELDS = "relayrl_fields"
_HANDLER_MARK = "relayrl_handler"


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger of that name: `log.info("trajectory stored", position=7)`; `log.bind(run_id=…)` for more."""
    logger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.processors.format_exc_info,
            _add_trace_id,
            _as_record,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    return cast("structlog.stdlib.BoundLogger", logger)


def configure(service: str, settings: LogSettings) -> None:
    """Sends all that this process logs where the settings say; a second call replaces the first."""
    formatter = JsonFormatter(service) if settings.format == "json" else ConsoleFormatter()
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)] if settings.stderr else []
    if settings.file is not None:
        handlers.append(logging.FileHandler(settings.file, encoding="utf-8"))
    _replace_handlers(handlers, formatter)
    set_level(settings.level)
    for name, level in settings.levels.items():
        set_level(level, name)


def set_level(level: str, logger: str | None = None) -> None:
    """Sets the least level that is logged, for all or for one logger and what is below it."""
    logging.getLogger(logger).setLevel(level.upper())


def get_level() -> str:
    """The least level that is logged where no logger says otherwise."""
    return logging.getLevelName(logging.getLogger().getEffectiveLevel()).lower()


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, service, logger, event, then the fields."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """The line of one record, whoever logged it."""
        event, fields = _event_and_fields(record, self)
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "event": event,
        }
        return json.dumps(line | fields, default=repr)


class ConsoleFormatter(logging.Formatter):
    """A line for people: time, level, event, fields; an exception below."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of one record, whoever logged it."""
        event, fields = _event_and_fields(record, self)
        trace = fields.pop("exception", None)
        time = datetime.fromtimestamp(record.created, UTC).astimezone().strftime("%H:%M:%S.%f")[:-3]
        line = f"{time} {record.levelname.lower():<8} {_with_fields(event, fields)} [{record.name}]"
        return line if trace is None else f"{line}\n{trace}"


def _replace_handlers(handlers: list[logging.Handler], formatter: logging.Formatter) -> None:
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if getattr(handler, _HANDLER_MARK, False)]:
        root.removeHandler(old)
        old.close()
    for handler in handlers:
        handler.setFormatter(formatter)
        setattr(handler, _HANDLER_MARK, True)
        root.addHandler(handler)


def _event_and_fields(record: logging.LogRecord, formatter: logging.Formatter) -> tuple[str, dict[str, Any]]:
    fields = getattr(record, _FIELDS, None)
    if fields is not None:
        return str(fields["event"]), {key: value for key, value in fields.items() if key != "event"}
    extra = {"exception": formatter.formatException(record.exc_info)} if record.exc_info else {}
    return record.getMessage(), extra


def _add_trace_id(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    traceparent = telemetry.inject()
    if traceparent is not None:
        event["trace_id"] = traceparent.split("-")[1]
    return event


def _as_record(_: Any, __: str, event: MutableMapping[str, Any]) -> tuple[tuple[str], dict[str, Any]]:
    """The last processor: text for handlers that we did not make, the fields for our own formatters."""
    fields = {key: value for key, value in event.items() if key not in {"event", "stack_info"}}
    text = _with_fields(str(event["event"]), fields)
    return (text,), {"extra": {_FIELDS: dict(event)}}


def _with_fields(event: str, fields: MutableMapping[str, Any]) -> str:
    return " ".join([event, *(f"{key}={value}" for key, value in fields.items())])
