"""The life of a process: what tells it to stop, and the HTTP server beside its work.

Every service's `main` drives it the same way: `with StopSignal() as stop`, start, serve, `stop.wait()`, drain
with a deadline, close. A second signal does not wait for the drain.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

import uvicorn
from starlette.types import ASGIApp

from relayrl_shared.errors import ConfigError, RelayRLError
from relayrl_shared.settings import HttpSettings

START_SECONDS = 10.0
CLOSE_SECONDS = 5.0


class StopSignal:
    """SIGINT, SIGTERM and SIGHUP as a `threading.Event`; a second one ends the process at once, 128 + signal.

    A signal that is ignored when it begins, as under nohup, stays ignored.

    Use it as a context manager in the main thread; leaving restores the earlier handlers. `stop()` asks for
    the same from any thread, such as an HTTP handler.

    Args:
        on_force: called before the second signal ends the process, such as to end its children.
        event: to set; None makes one.

    Attributes:
        event: set once something asked to stop; hand it to loops that wait.
    """

    def __init__(
        self, on_force: Callable[[], None] | None = None, *, event: threading.Event | None = None
    ) -> None:
        self.event = event or threading.Event()
        self._on_force = on_force
        self._signals: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._earlier: dict[int, Any] = {}
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._watcher = threading.Thread(target=self._watch, name="stop-signal", daemon=True)
        self._watcher.start()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:
                self._earlier[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._signals.put(None)
        if self._watcher is not None:
            self._watcher.join()

    def stop(self) -> None:
        """Asks the process to stop, from any thread."""
        self.event.set()

    def wait(self, timeout_seconds: float | None = None) -> bool:
        """Waits until something asked to stop; False if the time ran out first."""
        return self.event.wait(timeout_seconds)

    @property
    def stopping(self) -> bool:
        """Whether something asked to stop."""
        return self.event.is_set()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Only SimpleQueue.put may be called here: an Event's lock may be held by the interrupted main thread.
        self._signals.put(number)

    def _watch(self) -> None:
        while (number := self._signals.get()) is not None:
            if self.event.is_set():
                if self._on_force is not None:
                    self._on_force()
                os._exit(128 + number)
            self.event.set()


class HttpServer:
    """A uvicorn server in a daemon thread. Made by `serve_http`; `port` is the one that it really has."""

    def __init__(
        self, server: uvicorn.Server | None, thread: threading.Thread | None, host: str, port: int
    ) -> None:
        self._server = server
        self._thread = thread
        self.host = host
        self.port = port

    @property
    def url(self) -> str:
        """Where it is reached, such as `http://127.0.0.1:8084`."""
        return f"http://{self.host}:{self.port}"

    @property
    def open_requests(self) -> int:
        """How many requests are being answered now."""
        return 0 if self._server is None else len(self._server.server_state.tasks)

    def close(self, timeout_seconds: float = CLOSE_SECONDS) -> None:
        """Stops serving; open requests get until the deadline. Closing twice is fine."""
        if self._server is None or self._thread is None:
            return
        self._server.should_exit = True
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            self._server.force_exit = True
            self._thread.join(1.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve_http(app: ASGIApp, settings: HttpSettings) -> HttpServer:
    """Serves `app` from a daemon thread and returns once it answers; port 0 takes a free one.

    Raises:
        ConfigError: if host and port cannot be bound.
        RelayRLError: if the server does not start within 10 s.
    """
    if not settings.enabled:
        return HttpServer(None, None, settings.host, 0)
    listener = _bind(settings)
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", loop="asyncio", ws="none")
    server = _StartedServer(config)
    thread = threading.Thread(target=server.run, args=([listener],), name="http", daemon=True)
    thread.start()
    if not server.has_started.wait(START_SECONDS):
        raise RelayRLError(
            f"the HTTP server on {settings.host}:{settings.port} did not start in {START_SECONDS:g} s"
        )
    return HttpServer(server, thread, settings.host, listener.getsockname()[1])


class _StartedServer(uvicorn.Server):
    """A server that says when it answers."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.has_started = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.has_started.set()


def _bind(settings: HttpSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=128)
    except OSError as error:
        raise ConfigError(
            f"cannot serve HTTP on {settings.host}:{settings.port}: {error.strerror or error}; "
            "set http.port to a free one"
        ) from error
