"""The command line: what it takes, what it refuses, and with which exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from relayrl_cli.commands.audit import holds, report
from relayrl_cli.main import main
from relayrl_shared import __version__
from relayrl_shared.store.interface import Audit

AUDIT = Audit(
    run_id="r1",
    accepted=10,
    stored=6,
    quarantined=1,
    dropped=1,
    in_spool=2,
    missing=0,
    stored_twice=0,
    used=5,
    used_twice=0,
    unused={"stale": 1},
    unread=0,
)


@pytest.mark.slow
def test_help_imports_nothing_heavy() -> None:
    """Neither torch nor arrow nor a web framework is needed to print a usage."""
    code = (
        "import sys\nfrom relayrl_cli.main import main\n"
        "try:\n    main(['demo', '--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'pyarrow', 'onnxruntime', 'fastapi', 'gymnasium', 'rich', 'sqlalchemy'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )

    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30
    )

    assert (done.returncode, done.stderr) == (0, "")


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """The same as that of every distribution."""
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])

    assert capsys.readouterr().out == f"relayrl {__version__}\n"


@pytest.mark.parametrize("service", ["model-registry", "training-server", "inference-server"])
def test_config_show_prints_what_the_service_would_read(
    service: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The output is a file that `config check` accepts."""
    assert main(["config", "show", service, "--set", "log.level=debug"]) == 0
    shown = capsys.readouterr().out
    file = tmp_path / "config.json"
    file.write_text(shown)

    assert json.loads(shown)["log"]["level"] == "debug"
    assert main(["config", "check", service, "--config", str(file)]) == 0
    assert "are valid" in capsys.readouterr().out


def test_config_check_names_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Status 2, the path and the nearest key."""
    file = tmp_path / "config.json"
    file.write_text('{"htp": {}}')

    assert main(["config", "check", "model-registry", "--config", str(file)]) == 2
    assert "unknown key 'htp'; did you mean 'http'?" in capsys.readouterr().err


def test_config_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    """For editors."""
    assert main(["config", "schema", "inference-server"]) == 0
    assert "$defs" in json.loads(capsys.readouterr().out)


def test_up_refuses_a_setting_of_no_service(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Before anything starts."""
    assert main(["up", "--dir", str(tmp_path), "--set", "registry.http.port=1"]) == 2
    assert "write SERVICE.KEY=VALUE with one of model_registry" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_status_without_a_stack_says_how_to_start_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Status 1."""
    assert main(["status", "--dir", str(tmp_path)]) == 1
    assert f"relayrl up --dir {tmp_path}" in capsys.readouterr().err


def test_the_audit_prints_the_identity_with_its_numbers() -> None:
    """All that was accepted is accounted for."""
    text = report(AUDIT)

    assert "10 = 6 + 1 + 1 + 2, nothing missing" in text
    assert "passed over: 1 stale" in text
    assert text.endswith("the identity holds")
    assert holds(AUDIT)


@pytest.mark.parametrize("fault", [{"missing": 2}, {"stored_twice": 1}, {"used_twice": 1}])
def test_the_audit_says_when_the_identity_does_not_hold(fault: dict[str, int]) -> None:
    """Lost, stored twice or used twice."""
    import msgspec

    broken = msgspec.structs.replace(AUDIT, **fault)

    assert not holds(broken)
    assert report(broken).endswith("THE IDENTITY DOES NOT HOLD")
