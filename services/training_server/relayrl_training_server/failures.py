"""Carries the failure of a run from its learner to its row; ingest, which owns the rows, does it.

With SQLite a learner may not write run rows (decision 0001): it leaves its state in the run's status.json.
With Postgres it writes the row itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from relayrl_shared import logs
from relayrl_shared.errors import RelayRLError
from relayrl_shared.store.interface import TrajectoryStore
from relayrl_training_server.progress import STATUS_NAME, write_status

LOG = logs.get_logger(__name__)


class _Status(msgspec.Struct):
    """What matters of a status.json."""

    state: str = ""
    reason: str = ""


def failure_of(directory: Path) -> str | None:
    """Why the run of that directory failed, as its learner says; None where it has not."""
    try:
        status = msgspec.json.decode((directory / STATUS_NAME).read_bytes(), type=_Status)
    except (OSError, msgspec.MsgspecError):
        return None
    return status.reason or "for an unknown reason" if status.state == "failed" else None


def note_failure(store: TrajectoryStore, run_id: str, directory: Path, reason: str) -> None:
    """What a learner leaves that could not even begin: its state, and the row where it may write that."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_status(directory / STATUS_NAME, {"state": "failed", "reason": reason})
        store.set_run_state(run_id, "failed", reason)
    except (OSError, RelayRLError) as error:
        LOG.info("the state of the run is for ingest to note", reason=str(error))


def carry_out_failures(store: TrajectoryStore, directory_of: Callable[[str], Path]) -> None:
    """Marks the runs whose learners gave up, so that nobody starts them again and clients see why.

    Args:
        store: opened by the writer of runs.
        directory_of: where the run of an id keeps its files.

    Raises:
        StoreUnavailable: try again.
    """
    for run in store.runs():
        if run.state not in ("active", "paused"):
            continue
        reason = failure_of(directory_of(run.run_id))
        if reason is not None:
            store.set_run_state(run.run_id, "failed", reason)
            LOG.error("run failed", run=run.name, reason=reason)
