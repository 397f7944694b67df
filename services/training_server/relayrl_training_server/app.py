"""The supervisor's HTTP: health and metrics as everywhere; runs, audits and trajectories from the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
from fastapi import FastAPI, Query

from relayrl_shared import http_api
from relayrl_shared.errors import UnknownRun
from relayrl_shared.store.interface import Quarantined, Run, TrajectoryStore

if TYPE_CHECKING:
    from relayrl_training_server.supervisor import Supervisor

Limit = Annotated[int, Query(ge=1, le=1000)]


def create_supervisor_app(supervisor: Supervisor, drain: Callable[[], None] | None) -> FastAPI:
    """The application over a supervisor, whose store may open after this call."""
    app = http_api.create_app(
        "training-server",
        readiness=supervisor.readiness,
        info=supervisor.info,
        metrics=supervisor.metrics,
        drain=drain,
    )
    _add_runs(app, supervisor)
    _add_records(app, supervisor)
    return app


def _add_runs(app: FastAPI, supervisor: Supervisor) -> None:
    @app.get("/v1/processes", tags=["processes"])
    def processes() -> list[dict[str, Any]]:
        """The children: state, pid, deaths, last exit."""
        return [msgspec.to_builtins(child) for child in supervisor.children().values()]

    @app.get("/v1/runs", tags=["runs"])
    def runs() -> list[dict[str, Any]]:
        """Every run with its state, counts and finished updates."""
        return [_summary(supervisor.store, run) for run in supervisor.store.runs()]

    @app.get("/v1/runs/{run}", tags=["runs"])
    def show_run(run: str) -> dict[str, Any]:
        """One run, by id or name: as created, its counts, its actors and its learner process."""
        found = find_run(supervisor.store, run)
        learner = supervisor.children().get(f"learner {found.name}")
        actors = supervisor.store.live_actors(found.run_id)
        return {
            **_summary(supervisor.store, found),
            **_builtins(found),
            "live_actors": len(actors),
            "live_clients": sorted({actor.client_id for actor in actors}),
            "learner": None if learner is None else _builtins(learner),
        }


def _add_records(app: FastAPI, supervisor: Supervisor) -> None:
    @app.get("/v1/runs/{run}/audit", tags=["runs"])
    def audit(run: str) -> dict[str, Any]:
        """Whether accepted = stored + quarantined + dropped + still spooled, and what the learner used."""
        found = find_run(supervisor.store, run)
        return _builtins(supervisor.store.audit(found.run_id))

    @app.get("/v1/runs/{run}/trajectories", tags=["runs"])
    def trajectories(
        run: str, actor_id: str | None = None, episode_id: str | None = None, limit: Limit = 100
    ) -> list[dict[str, Any]]:
        """Metadata of the run's trajectories, in order of position."""
        found = find_run(supervisor.store, run)
        rows = supervisor.store.find(found.run_id, actor_id=actor_id, episode_id=episode_id, limit=limit)
        return [_builtins(row) for row in rows]

    @app.get("/v1/quarantine", tags=["quarantine"])
    def quarantine(run: str | None = None, limit: Limit = 100) -> list[dict[str, Any]]:
        """What could not be accepted, newest first, without the bytes; of one run, or of all."""
        run_id = None if run is None else find_run(supervisor.store, run).run_id
        return [_quarantined(row) for row in supervisor.store.quarantined(run_id, limit)]


def find_run(store: TrajectoryStore, run: str) -> Run:
    """The run of that id or name.

    Raises:
        UnknownRun: there is none.
    """
    found = store.run_by_id(run) or store.run_by_name(run)
    if found is None:
        raise UnknownRun(f"there is no run {run!r}")
    return found


def _summary(store: TrajectoryStore, run: Run) -> dict[str, Any]:
    return {
        "run_id": run.run_id,
        "name": run.name,
        "algorithm": run.algorithm,
        "state": run.state,
        "state_reason": run.state_reason,
        "created_at": run.created_at,
        "learner_update": store.learner_update(run.run_id),
        "counts": store.counts(run.run_id),
    }


def _quarantined(row: Quarantined) -> dict[str, Any]:
    shown: dict[str, Any] = msgspec.structs.asdict(row)
    header, payload = shown.pop("header"), shown.pop("payload")
    return {**shown, "header_bytes": len(header), "payload_bytes": None if payload is None else len(payload)}


def _builtins(value: Any) -> dict[str, Any]:
    plain: Mapping[str, Any] = msgspec.json.decode(msgspec.json.encode(value))  # infinite bounds become null
    return dict(plain)
