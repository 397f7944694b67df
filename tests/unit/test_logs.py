"""Logs: events with fields, as JSON lines or for people, and harmless inside somebody else's logging."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from relayrl_shared import logs
from relayrl_shared.settings import LogSettings


def lines(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_an_event_is_one_json_line_with_its_fields(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error stream and the file get the same line: time, level, service, logger, event, fields."""
    file = tmp_path / "log"
    logs.configure("model-registry", LogSettings(file=str(file)))

    logs.get_logger("relayrl.test").bind(run_id="r1").info("version published", policy_version=7)

    (line,) = lines(file)
    assert json.loads(capsys.readouterr().err) == line
    assert line.pop("time")
    assert line == {
        "level": "info",
        "service": "model-registry",
        "logger": "relayrl.test",
        "event": "version published",
        "run_id": "r1",
        "policy_version": 7,
    }


def test_stderr_can_be_left_to_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A program that draws on the terminal logs to its file only."""
    file = tmp_path / "log"
    logs.configure("x", LogSettings(file=str(file), stderr=False))

    logs.get_logger("a").warning("quiet")

    assert (capsys.readouterr().err, lines(file)[0]["event"]) == ("", "quiet")


def test_an_exception_is_a_field_of_its_event(tmp_path: Path) -> None:
    """The traceback stays on the event's line."""
    file = tmp_path / "log"
    logs.configure("x", LogSettings(file=str(file)))

    try:
        raise ValueError("boom")
    except ValueError:
        logs.get_logger("a").exception("failed", step=3)

    (line,) = lines(file)
    assert line["step"] == 3
    assert "ValueError: boom" in str(line["exception"])


def test_what_libraries_log_has_the_same_shape(tmp_path: Path) -> None:
    """A record of the standard library is an event too, its exception included."""
    file = tmp_path / "log"
    logs.configure("x", LogSettings(file=str(file)))

    try:
        raise OSError("gone")
    except OSError:
        logging.getLogger("somelib").exception("lost %s", "it")

    (line,) = lines(file)
    assert (line["event"], line["logger"]) == ("lost it", "somelib")
    assert "OSError: gone" in str(line["exception"])


def test_people_get_one_readable_line(capsys: pytest.CaptureFixture[str]) -> None:
    """The console format has time, level, event, fields and logger; an exception stands below."""
    logs.configure("x", LogSettings(format="console"))

    logs.get_logger("relayrl.test").warning("spool nearly full", used_bytes=9, share="90%")

    line = capsys.readouterr().err
    assert "warning  spool nearly full used_bytes=9 share=90% [relayrl.test]" in line


@pytest.mark.parametrize(("level", "seen"), [("info", False), ("debug", True)])
def test_the_level_is_a_setting(level: str, seen: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Below it nothing is written."""
    logs.configure("x", LogSettings(level=level))  # type: ignore[arg-type]

    logs.get_logger("a").debug("detail")

    assert ("detail" in capsys.readouterr().err) is seen


def test_one_module_can_have_its_own_level(capsys: pytest.CaptureFixture[str]) -> None:
    """`levels` filters by logger name."""
    logs.configure("x", LogSettings(level="warning", levels={"chatty.part": "debug"}))

    logs.get_logger("chatty.part.inner").debug("inner")
    logs.get_logger("chatty").info("outer")

    written = capsys.readouterr().err
    assert "inner" in written
    assert "outer" not in written
    logs.set_level("notset", "chatty.part")


def test_the_level_can_change_while_running(capsys: pytest.CaptureFixture[str]) -> None:
    """Loggers that exist already follow."""
    logs.configure("x", LogSettings(level="warning"))
    log = logs.get_logger("a")
    log.info("before")

    logs.set_level("info")
    log.info("after")

    written = capsys.readouterr().err
    assert "before" not in written
    assert "after" in written
    assert logs.get_level() == "info"


def test_configuring_again_replaces_the_handlers(capsys: pytest.CaptureFixture[str]) -> None:
    """No event is written twice."""
    logs.configure("x", LogSettings())
    logs.configure("x", LogSettings())

    logs.get_logger("a").info("once")

    assert capsys.readouterr().err.count("once") == 1


def test_an_application_with_its_own_logging_sees_plain_text(caplog: pytest.LogCaptureFixture) -> None:
    """Without `configure` an event is an ordinary record of the standard library, percent signs intact."""
    with caplog.at_level(logging.INFO):
        logs.get_logger("relayrl_client.test").info("queue at 90%", free_rows=3)

    assert caplog.records[-1].getMessage() == "queue at 90% free_rows=3"
    assert caplog.records[-1].name == "relayrl_client.test"


def test_values_that_json_does_not_know_are_shown(tmp_path: Path) -> None:
    """A field may be any object; logging never fails for it."""
    file = tmp_path / "log"
    logs.configure("x", LogSettings(file=str(file)))

    logs.get_logger("a").info("moved", to=Path("/x"))

    assert lines(file)[0]["to"] == "PosixPath('/x')"
