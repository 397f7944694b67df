"""How the servers see a run, over real HTTP."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse

from relayrl_cli.run_view import RunFigures, RunView, ask_training_server
from relayrl_shared.lifecycle import HttpServer, serve_http
from relayrl_shared.settings import HttpSettings

FIGURES = RunFigures(stored_trajectories=7, learner_update=3, state="active", state_reason="")


@pytest.fixture
def server() -> Iterator[HttpServer]:
    """Answers for the run `a/b` as the training server does."""
    app = FastAPI()

    @app.get("/v1/runs/{run:path}")
    def show(run: str) -> Any:
        """A run or a problem."""
        if run != "a/b":
            return JSONResponse({"code": "unknown_run"}, status_code=404)
        counts = {"trajectories": 7, "steps": 70}
        return {"counts": counts, "learner_update": 3, "state": "active", "state_reason": "", "more": 1}

    with serve_http(app, HttpSettings()) as running:
        yield running


def test_the_figures_come_from_the_training_server(server: HttpServer) -> None:
    """Names are quoted, unknown fields ignored."""
    assert ask_training_server(server.url, "a/b") == FIGURES


def test_an_unknown_run_and_an_absent_server_have_no_figures(
    server: HttpServer, free_port: Callable[[], int]
) -> None:
    """Neither is an error: both may come."""
    assert ask_training_server(server.url, "other") is None
    assert ask_training_server(f"http://127.0.0.1:{free_port()}", "a/b") is None


def test_a_view_keeps_the_last_figures_while_nobody_answers() -> None:
    """It asks again and again in the background."""
    answers: list[RunFigures | None] = [None, FIGURES, None]
    asked = threading.Event()

    def ask() -> RunFigures | None:
        if not answers:
            asked.set()
            return None
        return answers.pop(0)

    with RunView(ask, poll_seconds=0.001) as view:
        assert asked.wait(5)
        assert view.figures == FIGURES

    assert view.refresh() == FIGURES
