"""Episode returns, progress.csv and status.json."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import msgspec

from relayrl_training_server.progress import EpisodeLedger, ProgressFile, write_status
from relayrl_training_server.testing.segments import make_metadata


def rows(path: Path) -> list[dict[str, str]]:
    """What a reader of the file sees."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_returns_are_put_together_from_segments() -> None:
    """An episode counts at its end, with the rewards and steps of all its segments."""
    ledger = EpisodeLedger()
    ledger.absorb([make_metadata(3, episode_return=1.5), make_metadata(2, episode_index=1, truncated=True)])
    before = ledger.describe()
    ledger.absorb(
        [make_metadata(4, segment_index=1, first_step_index=3, episode_return=2.0, terminated=True)]
    )

    assert before == {"episodes": 1, "mean_return": 0.0, "mean_episode_steps": 2.0}
    assert ledger.describe() == {"episodes": 2, "mean_return": 1.75, "mean_episode_steps": 4.5}


def test_an_end_that_is_decided_first_waits_for_its_beginning() -> None:
    """Newest first, the end of an episode may come before the rest of it; it counts once, and whole."""
    ledger = EpisodeLedger()
    ledger.absorb([make_metadata(1, segment_index=2, episode_return=4.0, terminated=True)])
    ledger.absorb([make_metadata(2, segment_index=1, episode_return=2.0)])
    before = ledger.episodes
    ledger.absorb([make_metadata(3, segment_index=0, episode_return=1.0)])

    assert before == 0
    assert ledger.describe() == {"episodes": 1, "mean_return": 7.0, "mean_episode_steps": 6.0}


def test_before_the_first_episode_there_is_no_mean() -> None:
    """None, never 0 or NaN."""
    assert EpisodeLedger().describe() == {"episodes": 0, "mean_return": None, "mean_episode_steps": None}


def test_the_mean_is_of_the_last_hundred() -> None:
    """Older episodes count in the number only."""
    ledger = EpisodeLedger()
    for index in range(150):
        ledger.absorb([make_metadata(1, episode_index=index, episode_return=float(index), terminated=True)])

    assert ledger.describe()["episodes"] == 150
    assert ledger.describe()["mean_return"] == sum(range(50, 150)) / 100


def test_evaluation_does_not_count() -> None:
    """The training return is of training episodes."""
    ledger = EpisodeLedger()
    ledger.absorb([make_metadata(1, purpose="evaluate", terminated=True)])

    assert ledger.episodes == 0


def test_a_restored_ledger_goes_on() -> None:
    """Open episodes and the last hundred returns come through a JSON round trip."""
    one = EpisodeLedger()
    one.absorb([make_metadata(3, episode_return=1.0), make_metadata(2, episode_index=1, truncated=True)])
    other = EpisodeLedger()
    other.restore(msgspec.json.decode(msgspec.json.encode(one.state())))
    for ledger in (one, other):
        ledger.absorb([make_metadata(1, segment_index=1, episode_return=1.0, terminated=True)])

    assert (
        one.describe() == other.describe() == {"episodes": 2, "mean_return": 1.0, "mean_episode_steps": 3.0}
    )


def test_rows_are_appended_with_their_columns(tmp_path: Path) -> None:
    """A row an update; None is empty; a column that comes later gets its place at the end."""
    path = tmp_path / "progress.csv"
    progress = ProgressFile(path, 0)
    progress.append({"learner_update": 1, "mean_return": None, "loss": 0.123456789})
    progress.append({"learner_update": 2, "mean_return": 21.5, "kl": 0.25})

    assert rows(path) == [
        {"learner_update": "1", "mean_return": "", "loss": "0.123457", "kl": ""},
        {"learner_update": "2", "mean_return": "21.5", "loss": "", "kl": "0.25"},
    ]


def test_a_resume_drops_the_rows_after_its_update(tmp_path: Path) -> None:
    """What is learned again is written again, once; a torn last line goes."""
    path = tmp_path / "progress.csv"
    progress = ProgressFile(path, 0)
    for update in (1, 2, 3):
        progress.append({"learner_update": update, "loss": 1.0})
    with path.open("a") as file:
        file.write("4")
    again = ProgressFile(path, 2)
    again.append({"learner_update": 3, "loss": 2.0})

    assert [(row["learner_update"], row["loss"]) for row in rows(path)] == [
        ("1", "1"),
        ("2", "1"),
        ("3", "2"),
    ]


def test_a_status_replaces_the_one_before(tmp_path: Path) -> None:
    """A reader finds one whole document."""
    path = tmp_path / "status.json"
    write_status(path, {"state": "active", "reason": ""})
    write_status(path, {"state": "failed", "reason": "NaN"})

    assert json.loads(path.read_text()) == {"state": "failed", "reason": "NaN"}
    assert list(tmp_path.iterdir()) == [path]
