"""A TCP proxy that breaks links for real; fault tests put it between a client and a server.

It delays, stalls, refuses and resets. Of a living connection it loses no byte, as TCP does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, TypeVar

_CHUNK_BYTES = 64 << 10
_CALL_SECONDS = 5.0
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 seconds: close sends RST

_T = TypeVar("_T")


class TcpProxy:
    """Forwards 127.0.0.1:`port` to the target from a thread of its own until `close`.

    Args:
        target_port: on `target_host`.
        target_host: where the real server listens.
        port: to listen on; 0: any free one.
        latency_seconds: added to every chunk, each way; may be set at any time.
    """

    def __init__(
        self, target_port: int, *, target_host: str = "127.0.0.1", port: int = 0, latency_seconds: float = 0.0
    ) -> None:
        self.latency_seconds = latency_seconds
        self.accepted_total = 0
        self._target = (target_host, target_port)
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp proxy", daemon=True)
        self._thread.start()
        self.port = port
        self.accept()

    # ---- from the test's thread ---------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Where to connect, as ZMQ writes it."""
        return f"tcp://127.0.0.1:{self.port}"

    def blackhole(self) -> None:
        """Stalls all bytes of all connections, which stay open; `flow` lets them go on."""
        self._soon(self._flowing.clear)

    def flow(self) -> None:
        """Ends a stall; what was held is delivered."""
        self._soon(self._flowing.set)

    def refuse(self) -> None:
        """Stops listening and resets what is open: connecting is refused from now on."""
        self._call(self._stop_listening())
        self.reset()

    def accept(self) -> None:
        """Listens (again), on the same port."""
        self._call(self._listen())

    def reset(self) -> None:
        """Breaks every open connection with RST; new ones are served."""
        self._call(self._reset())

    def close(self) -> None:
        """Ends it all. Safe to call twice."""
        if self._loop.is_closed():
            return
        self.refuse()
        self._call(self._cancel_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> TcpProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_SECONDS)

    def _soon(self, call: Callable[[], None]) -> None:
        async def run() -> None:
            call()

        self._call(run())

    # ---- in the loop --------------------------------------------------------------------------------------

    async def _listen(self) -> None:
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _reset(self) -> None:
        for writer in list(self._writers):
            _abort(writer)
        self._writers.clear()

    async def _cancel_tasks(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted_total += 1
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection(*self._target)
        except OSError:
            _abort(writer)
            return
        writers = {writer, upstream_writer}
        self._writers |= writers
        with contextlib.suppress(OSError, asyncio.CancelledError):
            await asyncio.gather(self._pump(reader, upstream_writer), self._pump(upstream_reader, writer))
        self._writers -= writers
        for one in writers:
            one.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            if self.latency_seconds:
                await asyncio.sleep(self.latency_seconds)
            await self._flowing.wait()
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError("one end has closed")  # ends the other direction too


def _abort(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()
