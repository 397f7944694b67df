"""Lifecycle: signals reach an event, a second one ends the process, HTTP starts and stops with its owner."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from fastapi import FastAPI

from relayrl_shared.errors import ConfigError
from relayrl_shared.lifecycle import StopSignal, serve_http
from relayrl_shared.settings import HttpSettings

CHILD = """
import sys, threading
from relayrl_shared.lifecycle import StopSignal
with StopSignal() as stop:
    print("up", flush=True)
    stop.wait()
    print("draining", flush=True)
    if "hang" in sys.argv:
        threading.Event().wait()
print("done", flush=True)
"""


def child(*arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def read(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_begins_the_drain_and_the_process_ends_normally(number: signal.Signals) -> None:
    """All three do the same, and the status is 0."""
    with child() as process:
        process.send_signal(number)

        assert (read(process), read(process)) == ("draining", "done")
        assert process.wait(10) == 0


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """A process under nohup outlives its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with child() as process:
            process.send_signal(signal.SIGHUP)
            process.send_signal(signal.SIGTERM)

            assert (read(process), read(process)) == ("draining", "done")
            assert process.wait(10) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_does_not_wait_for_the_drain() -> None:
    """The status is 128 and the signal's number."""
    with child("hang") as process:
        process.send_signal(signal.SIGTERM)
        assert read(process) == "draining"

        process.send_signal(signal.SIGINT)

        assert process.wait(10) == 128 + signal.SIGINT


def test_handlers_are_put_back() -> None:
    """Leaving the block restores what was there."""
    before = signal.getsignal(signal.SIGTERM)

    with StopSignal() as stop:
        assert signal.getsignal(signal.SIGTERM) != before
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(5)

    assert signal.getsignal(signal.SIGTERM) == before
    assert stop.stopping


def test_any_thread_can_ask_to_stop() -> None:
    """`stop` wakes whoever waits."""
    with StopSignal() as stop:
        threading.Thread(target=stop.stop).start()

        assert stop.wait(5)
    assert StopSignal().wait(0.01) is False


def app() -> FastAPI:
    application = FastAPI()

    @application.get("/slow")
    def slow(seconds: float) -> str:
        time.sleep(seconds)  # stands for work; the test measures that it is waited for
        return "answered"

    return application


def test_port_0_takes_a_free_one_and_says_which() -> None:
    """The server answers when `serve_http` returns, and no longer after `close`."""
    with serve_http(app(), HttpSettings()) as server:
        assert httpx.get(f"{server.url}/slow?seconds=0").json() == "answered"
        server.close()

        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/slow?seconds=0")


def test_open_requests_are_answered_before_the_server_closes() -> None:
    """Closing drains within its deadline."""
    answers: list[str] = []
    with serve_http(app(), HttpSettings()) as server:
        asker = threading.Thread(
            target=lambda: answers.append(httpx.get(f"{server.url}/slow?seconds=0.4").json()), daemon=True
        )
        asker.start()
        deadline = time.monotonic() + 5
        while not server.open_requests and time.monotonic() < deadline:
            threading.Event().wait(0.005)
    asker.join(5)

    assert answers == ["answered"]


def test_a_taken_port_is_refused_with_the_setting_to_change() -> None:
    """Not with a traceback in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        with pytest.raises(ConfigError, match=rf"cannot serve HTTP on 127.0.0.1:{port}.*set http.port"):
            serve_http(app(), HttpSettings(port=port))


def test_http_can_be_off() -> None:
    """Nothing is bound, and closing is fine."""
    server = serve_http(app(), HttpSettings(enabled=False))

    assert server.port == 0
    server.close()
