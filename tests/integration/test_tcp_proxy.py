"""The proxy that fault tests rely on breaks links as it says."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Iterator

import pytest

from relayrl_shared.testing.tcp_proxy import TcpProxy


class Echo(socketserver.BaseRequestHandler):
    """Sends back what comes."""

    def handle(self) -> None:
        """One connection."""
        try:
            while data := self.request.recv(65536):
                self.request.sendall(data)
        except OSError:
            return


@pytest.fixture
def proxy() -> Iterator[TcpProxy]:
    """A proxy to an echo server."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        with TcpProxy(server.server_address[1]) as proxy:
            yield proxy
        server.shutdown()
        thread.join()


def connect(proxy: TcpProxy) -> socket.socket:
    """A connection through the proxy."""
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def echo(connection: socket.socket, data: bytes) -> bytes:
    """What comes back."""
    connection.sendall(data)
    received = b""
    while len(received) < len(data):
        received += connection.recv(65536)
    return received


def test_bytes_pass_unchanged(proxy: TcpProxy) -> None:
    """A healthy link loses nothing, however much goes through it."""
    data = bytes(range(256)) * 4000
    with connect(proxy) as connection:
        assert echo(connection, data) == data
    assert proxy.accepted_total == 1


def test_latency_delays_each_way(proxy: TcpProxy) -> None:
    """The delay is added to the request and to the answer."""
    with connect(proxy) as connection:
        echo(connection, b"warm")
        proxy.latency_seconds = 0.05
        begun = time.monotonic()
        echo(connection, b"x")
    assert time.monotonic() - begun >= 0.1


def test_a_blackhole_holds_bytes_and_flow_delivers_them(proxy: TcpProxy) -> None:
    """A stalled link delivers late, not never."""
    with connect(proxy) as connection:
        echo(connection, b"warm")
        proxy.blackhole()
        connection.sendall(b"late")
        connection.settimeout(0.1)
        with pytest.raises(TimeoutError):
            connection.recv(10)
        proxy.flow()
        connection.settimeout(5)
        assert connection.recv(10) == b"late"


def test_reset_breaks_open_connections_only(proxy: TcpProxy) -> None:
    """Open connections end, the next one is served."""
    with connect(proxy) as connection:
        echo(connection, b"warm")
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            connection.recv(10)
    with connect(proxy) as connection:
        assert echo(connection, b"again") == b"again"


def test_refuse_and_accept_use_the_same_port(proxy: TcpProxy) -> None:
    """While it refuses nobody can connect; afterwards the address is the same."""
    port = proxy.port
    proxy.refuse()
    with pytest.raises(ConnectionRefusedError):
        connect(proxy)
    proxy.accept()

    assert proxy.port == port
    with connect(proxy) as connection:
        assert echo(connection, b"back") == b"back"


def test_closing_twice_is_fine(proxy: TcpProxy) -> None:
    """A test may close it early."""
    proxy.close()
    proxy.close()
