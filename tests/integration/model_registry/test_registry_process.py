"""A real registry process: its life, and SIGKILL in the middle of publications."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from relayrl_shared.errors import TransportError, UnknownPolicy
from relayrl_shared.registry_client import RegistryClient
from relayrl_shared.testing.registry import ServiceProcess, free_ports, opaque_artefact

KILLS = 5


class RegistryProcess(ServiceProcess):
    """A registry over a directory, on ports that stay the same over restarts."""

    def __init__(self, directory: Path) -> None:
        server, announcer, http = free_ports(3)
        arguments = [f"--set=directory={directory / 'registry'}"]
        for key, port in (("model_server", server), ("model_announcer", announcer), ("http", http)):
            arguments.append(f"--set={key}.port={port}")
        super().__init__("relayrl_model_registry", arguments, http, directory / "registry.log")
        self.address = f"tcp://127.0.0.1:{server}"


def test_process_starts_serves_and_stops_on_sigterm(tmp_path: Path) -> None:
    """SIGTERM ends it with status 0, and a second life has the first one's versions."""
    process = RegistryProcess(tmp_path)
    for expected in (1, 2):
        with process:
            client = RegistryClient(process.address)
            artefact = opaque_artefact(learner_update=expected, seed=expected)
            assert client.publish(artefact, fencing_token=1) == expected
            client.close()
            assert process.terminate() == 0


def test_help_answers_without_the_heavy_imports() -> None:
    """--help parses before it imports."""
    code = (
        "import sys; from relayrl_model_registry import main\n"
        "try: main.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'sqlalchemy', 'alembic', 'fastapi', 'torch', 'pyarrow', 'onnxruntime'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )

    assert "--config" in done.stdout


@pytest.mark.parametrize(
    ("argument", "message"),
    [("--set=model_server.prt=1", "did you mean"), ("--set=database_url=mysql://x/y", "use sqlite:///PATH")],
)
def test_bad_settings_end_it_with_the_reason(tmp_path: Path, argument: str, message: str) -> None:
    """Status 2 and one line that names the key or the remedy."""
    done = subprocess.run(
        [sys.executable, "-m", "relayrl_model_registry", f"--set=directory={tmp_path}", argument],
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 2
    assert message in done.stderr


class Publisher(threading.Thread):
    """Publishes update after update until told to stop, again and again where the registry is away."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._client = RegistryClient(address, timeout_seconds=1.0)
        self.stopping = threading.Event()
        self.versions: dict[int, int] = {}
        """learner_update → the version that the registry acknowledged."""
        self.failures: list[Exception] = []

    def run(self) -> None:
        """Publishes; a transport error is tried again with the same key."""
        update = 0
        while not self.stopping.is_set():
            artefact = opaque_artefact(learner_update=update, seed=update, weights_bytes=50_000)
            try:
                self.versions[update] = self._client.publish(artefact, fencing_token=1)
            except TransportError:
                continue
            except Exception as error:  # noqa: BLE001  # asserted to be none
                self.failures.append(error)
                return
            update += 1
        self._client.close()


def check_everything_visible_is_whole(address: str, publisher: Publisher) -> None:
    """Every acknowledged version can be fetched, and latest is whole, whether it was acknowledged or not."""
    client = RegistryClient(address, timeout_seconds=10.0, cache_bytes=0)
    acknowledged = dict(publisher.versions)
    for update, version in list(acknowledged.items())[-20:]:
        fetched = client.fetch("cartpole", policy_version=version)
        assert fetched.manifest.learner_update == update
        assert fetched.weights == opaque_artefact(seed=update, weights_bytes=50_000).weights
    try:
        latest = client.fetch("cartpole").manifest
    except UnknownPolicy:
        assert not acknowledged
    else:
        assert (latest.policy_version or 0) >= max(acknowledged.values(), default=0)
    client.close()


@pytest.mark.slow
def test_sigkill_during_publications_leaves_nothing_half_visible(tmp_path: Path) -> None:
    """Killed at random, each time after new acknowledgements: whole versions only, no update twice."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")  # noqa: T201  # to repeat a failure
    chance = random.Random(seed)
    process = RegistryProcess(tmp_path)
    process.start()
    process.wait_ready()
    publisher = Publisher(process.address)
    publisher.start()
    try:
        for _ in range(KILLS):
            known = len(publisher.versions)
            deadline = time.monotonic() + 30
            while len(publisher.versions) < known + 3 and time.monotonic() < deadline:
                time.sleep(0.005)  # the publisher is its own thread: the moment must not be tied to its steps
            assert len(publisher.versions) >= known + 3
            time.sleep(chance.random() * 0.1)
            process.kill()
            process.start()
            process.wait_ready()
            check_everything_visible_is_whole(process.address, publisher)
    finally:
        publisher.stopping.set()
        publisher.join(30)
        if process._process is not None and process._process.poll() is None:
            check_everything_visible_is_whole(process.address, publisher)
            process.kill()

    assert publisher.failures == []
    numbers = list(publisher.versions.values())
    assert numbers == list(range(1, len(numbers) + 1))  # one version an update, in order, none twice
