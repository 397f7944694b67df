"""How the failure of a run gets from its learner to its row, over a real store and a running ingest."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relayrl_shared.store.open import open_store
from relayrl_shared.testing.store import make_run
from relayrl_training_server.failures import carry_out_failures, failure_of, note_failure
from relayrl_training_server.progress import STATUS_NAME, write_status


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits for something that another thread does."""
    pause = threading.Event()
    for _ in range(500):
        if condition():
            return
        pause.wait(0.02)
    raise AssertionError("it did not happen")


def test_ingest_marks_a_run_that_its_learner_gave_up(served: Any, client: Any) -> None:
    """The row says failed and why; heartbeats and every reader of runs see it (decision 0001)."""
    directory = served.ingest._run_directory(client.run_id)
    directory.mkdir(parents=True)
    write_status(directory / STATUS_NAME, {"state": "failed", "reason": "NonFiniteUpdate: update 3"})

    def state() -> tuple[str, str]:
        run = served.store.run_by_id(client.run_id)
        return run.state, run.state_reason

    wait_until(lambda: state()[0] != "active")
    assert state() == ("failed", "NonFiniteUpdate: update 3")


def test_only_runs_that_go_on_are_marked(tmp_path: Path) -> None:
    """A run that is over keeps its state; one whose learner works keeps on."""
    store = open_store(f"sqlite:///{tmp_path / 'store'}", writer_of="all")
    for name, status in (("over", "failed"), ("works", "active"), ("new", None), ("broken", "failed")):
        store.create_run(make_run(run_id=name, name=name))
        if status is not None:
            (tmp_path / name).mkdir()
            write_status(tmp_path / name / STATUS_NAME, {"state": status, "reason": ""})
    store.set_run_state("over", "finished")
    carry_out_failures(store, lambda run_id: tmp_path / run_id)
    states = {run.run_id: run.state for run in store.runs()}
    store.close()

    assert states == {"over": "finished", "works": "active", "new": "active", "broken": "failed"}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"state": 5}'])
def test_a_status_that_does_not_parse_is_no_failure(tmp_path: Path, content: bytes) -> None:
    """A half-written file of a full disk fails no run."""
    (tmp_path / STATUS_NAME).write_bytes(content)

    assert failure_of(tmp_path) is None


def test_a_learner_that_cannot_begin_leaves_its_reason(tmp_path: Path) -> None:
    """Where it may not write the row, its file says it."""
    owner = open_store(f"sqlite:///{tmp_path / 'store'}", writer_of="ingest")
    owner.create_run(make_run(run_id="run", name="run"))
    learner = open_store(f"sqlite:///{tmp_path / 'store'}", writer_of="learner")
    note_failure(learner, "run", tmp_path / "run", "ConfigError: no")
    carry_out_failures(owner, lambda run_id: tmp_path / run_id)
    run = owner.run_by_id("run")
    learner.close()
    owner.close()

    assert run is not None
    assert (run.state, run.state_reason) == ("failed", "ConfigError: no")
