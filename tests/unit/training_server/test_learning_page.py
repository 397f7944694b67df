"""docs/learning.md names every hyperparameter with its default, and every figure of progress.csv."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relayrl_training_server.algorithms.build import build_algorithm
from relayrl_training_server.algorithms.configs import ALGORITHMS, complete_hyperparameters
from relayrl_training_server.batches import build_batch
from relayrl_training_server.progress import EpisodeLedger
from relayrl_training_server.testing.segments import ACTION, OBSERVATION, make_segment

PAGE = Path(__file__).parents[3] / "docs" / "learning.md"


def table(heading: str) -> dict[str, str]:
    """First column, without its quotes, to second column, of the table below a heading."""
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*) \|", section, flags=re.MULTILINE)
    return {name: text.strip() for name, text in rows}


def written(value: Any) -> str:
    """A default as the page writes it."""
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if isinstance(value, str | int) else f"{value:g}"


@pytest.mark.parametrize("algorithm", sorted(ALGORITHMS))
def test_every_hyperparameter_is_explained_with_its_default(algorithm: str) -> None:
    """The page cannot fall behind the code, in names or in values."""
    explained = table("Hyperparameters")
    for name, value in complete_hyperparameters(algorithm, {}).items():
        defaults = [explained[name]]
        if algorithm in explained[name]:
            defaults = [part.split()[1] for part in explained[name].split(",") if algorithm in part]
        expected = written(value)
        assert defaults == [expected] or float(defaults[0]) == float(expected), name


def test_no_hyperparameter_is_explained_that_is_not_there() -> None:
    """What was removed from the code is removed from the page."""
    known = {name for algorithm in ALGORITHMS for name in complete_hyperparameters(algorithm, {})}

    assert set(table("Hyperparameters")) == known


def test_every_figure_is_explained() -> None:
    """The columns of progress.csv are those of the page."""
    figures = {"learner_update", "steps_learned", "policy_lag", "update_seconds", *EpisodeLedger().describe()}
    for algorithm, settings in (("PPO", {}), ("REINFORCE", {"with_vf_baseline": True})):
        small = {"hidden_sizes": [4], "train_vf_iters": 1, **settings}
        learner = build_algorithm(algorithm, small, OBSERVATION, ACTION)
        metrics = learner.update(build_batch([make_segment(6, terminated=True)]))
        assert np.isfinite(list(metrics.values())).all()
        figures |= set(metrics)

    assert set(table("progress.csv")) == figures
