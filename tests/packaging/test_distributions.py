"""The distributions as they are declared: one version, pinned siblings, pins for all they need."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import relayrl_shared

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = {
    "relayrl-shared": ROOT / "shared",
    "relayrl-client": ROOT / "services/client",
    "relayrl-training-server": ROOT / "services/training_server",
    "relayrl-inference-server": ROOT / "services/inference_server",
    "relayrl-model-registry": ROOT / "services/model_registry",
    "relayrl": ROOT / "cli",
}
NAME = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?(.*)$")


def project(name: str) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((DISTRIBUTIONS[name] / "pyproject.toml").read_text())["project"]
    return table


def requirements(name: str) -> list[tuple[str, str]]:
    """(distribution, version specifier) of everything that `name` may ask for."""
    table = project(name)
    extras = table.get("optional-dependencies", {}).values()
    lines = [*table["dependencies"], *(line for extra in extras for line in extra)]
    matches = [NAME.match(line) for line in lines]
    return [(found[1].lower(), found[2]) for found in matches if found]


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {
        name.lower().replace("_", "-"): version
        for name, _, version in (line.partition("==") for line in lines)
    }


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_versions_move_in_lockstep(name: str) -> None:
    """Every distribution has the version that the code says."""
    assert (project(name)["name"], project(name)["version"]) == (name, relayrl_shared.__version__)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_siblings_are_pinned(name: str) -> None:
    """A distribution works with exactly the siblings of its own version."""
    siblings = [(other, version) for other, version in requirements(name) if other in DISTRIBUTIONS]

    assert all(version == f"=={relayrl_shared.__version__}" for _, version in siblings)
    assert siblings or name == "relayrl-shared"


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_whatever_a_distribution_needs_is_pinned(name: str) -> None:
    """`constraints.txt` is the one file of pins, and misses nothing."""
    needed = {other for other, _ in requirements(name)} - set(DISTRIBUTIONS)

    assert needed - set(pins()) == set()


def test_pins_are_exact_and_name_no_host() -> None:
    """One `==` a line, no URLs, and no local version of torch, so that an index may offer a CPU build."""
    assert all(re.fullmatch(r"[0-9][0-9A-Za-z.]*", version) for version in pins().values())
    assert "://" not in (ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_sources_declare_their_types(name: str) -> None:
    """A py.typed marker in every import package."""
    (package,) = [path.parent for path in DISTRIBUTIONS[name].glob("relayrl_*/__init__.py")]

    assert (package / "py.typed").is_file()
