"""The distributions as they are installed: wheels in bare environments, built and installed for real."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("shared", "services/client", "services/training_server", "services/inference_server")
ALL_FOLDERS = (*FOLDERS, "services/model_registry", "cli")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
HELP_SECONDS = 1.0
HELP_TRIES = 5

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=230)
    assert done.returncode == 0, done.stderr
    return done.stdout


def bare_environment(directory: Path) -> Path:
    """A virtual environment without pip; returns its python."""
    venv.create(directory, with_pip=False, symlinks=True)
    return directory / "bin" / "python"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The six wheels, built from copies so that the checkout stays clean."""
    sources = tmp_path_factory.mktemp("sources")
    found = tmp_path_factory.mktemp("wheels")
    for folder in ALL_FOLDERS:
        skip = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
        shutil.copytree(ROOT / folder, sources / folder, ignore=skip)
    run(
        *PIP,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        found,
        *(sources / f for f in ALL_FOLDERS),
    )
    yield found
    shutil.rmtree(sources)


@pytest.mark.parametrize(
    ("service", "absent"),
    [
        ("client", ["torch"]),
        ("inference_server", ["torch", "pyarrow"]),
        ("model_registry", ["torch", "pyarrow"]),
    ],
)
def test_a_service_installs_and_imports_without_what_it_must_not_need(
    service: str, absent: list[str], wheels: Path, tmp_path: Path
) -> None:
    """In a bare environment with nothing but the service and its pins, every module of it imports."""
    python = bare_environment(tmp_path / "venv")
    distribution = f"relayrl-{service.replace('_', '-')}"
    constraints = ("--constraint", ROOT / "constraints.txt")
    run(
        *PIP,
        "--python",
        python,
        "install",
        "--no-compile",
        *constraints,
        "--find-links",
        wheels,
        distribution,
    )

    installed = run(python, "-c", IMPORT_ALL, f"relayrl_{service}").split()

    assert f"relayrl_{service}" in installed
    assert [name for name in absent if name in installed] == []
    shutil.rmtree(tmp_path / "venv")


IMPORT_ALL = """
import importlib, importlib.util, pkgutil, sys
package = importlib.import_module(sys.argv[1])
names = [module.name for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    if "migrations" not in name and not name.endswith("__main__"):
        importlib.import_module(name)
print(*names, package.__name__, *(name for name in ("torch", "pyarrow") if importlib.util.find_spec(name)))
"""


@pytest.fixture(scope="module")
def everything(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The bin directory of an environment with all six wheels, with third-party packages behind them."""
    directory = tmp_path_factory.mktemp("everything")
    python = bare_environment(directory)
    run(*PIP, "--python", python, "install", "--no-deps", *wheels.glob("*.whl"))
    site_packages = next(directory.glob("lib/python*/site-packages"))
    torch = find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    (site_packages / "third_party.pth").write_text(str(Path(torch.origin).parents[1]))
    yield directory / "bin"
    shutil.rmtree(directory)


@pytest.mark.parametrize(
    "script", ["relayrl", "relayrl-training-server", "relayrl-inference-server", "relayrl-model-registry"]
)
def test_help_answers_in_under_a_second(script: str, everything: Path) -> None:
    """Heavy imports come after parsing: the best of five tries, so that a busy machine does not matter."""
    seconds: list[float] = []
    for _ in range(HELP_TRIES):
        began = time.monotonic()
        assert "usage" in run(everything / script, "--help").lower()
        seconds.append(time.monotonic() - began)
        if seconds[-1] < HELP_SECONDS:
            break

    assert min(seconds) < HELP_SECONDS


def test_wheels_carry_what_is_no_python(everything: Path) -> None:
    """Presets and migrations are read from the installed package."""
    python = everything / "python"

    presets = run(python, "-c", "from relayrl_cli import presets; print(*presets.names())").split()

    assert "cartpole-ppo" in presets
