"""Where the parts of a stack are reached: default ports, free ports, and the file that says which.

`stack.json` in the directory of a stack is written by `relayrl up` and `relayrl demo` and read by every other
command.
"""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import msgspec

from relayrl_shared.errors import ConfigError

STACK_FILE = "stack.json"
DEFAULT_DIRECTORY = Path("relayrl-data")
LOOPBACK = "127.0.0.1"


class Ports(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """The ports of a stack on loopback; the defaults are those of the services."""

    agent_listener: int = 7777
    trajectory_server: int = 7776
    model_server: int = 50051
    model_announcer: int = 50052
    inference_server: int = 7800
    registry_http: int = 8084
    training_http: int = 8082
    ingest_http: int = 8085
    inference_http: int = 8083

    @classmethod
    def free(cls) -> Self:
        """Ports that nothing listens on now."""
        with ExitStack() as open_sockets:
            listeners = [
                open_sockets.enter_context(socket.create_server((LOOPBACK, 0))) for _ in cls.__struct_fields__
            ]
            ports = [listener.getsockname()[1] for listener in listeners]
        return cls(**dict(zip(cls.__struct_fields__, ports, strict=True)))


class Addresses(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What a client of a stack needs, each as `host:port`; training_http as a URL."""

    agent_listener: str = f"{LOOPBACK}:7777"
    trajectory_server: str = f"{LOOPBACK}:7776"
    model_server: str = f"{LOOPBACK}:50051"
    model_announcer: str = f"{LOOPBACK}:50052"
    inference_server: str = f"{LOOPBACK}:7800"
    training_http: str = f"http://{LOOPBACK}:8082"

    @classmethod
    def of(cls, ports: Ports) -> Self:
        """The addresses behind the ports of a stack on this machine."""
        return cls(
            agent_listener=f"{LOOPBACK}:{ports.agent_listener}",
            trajectory_server=f"{LOOPBACK}:{ports.trajectory_server}",
            model_server=f"{LOOPBACK}:{ports.model_server}",
            model_announcer=f"{LOOPBACK}:{ports.model_announcer}",
            inference_server=f"{LOOPBACK}:{ports.inference_server}",
            training_http=f"http://{LOOPBACK}:{ports.training_http}",
        )

    @classmethod
    def parse(cls, text: str) -> Self:
        """`agent_listener=host:port,…`; what is not named keeps its default. Raises ConfigError."""
        parts = [part.partition("=") for part in text.split(",") if part]
        try:
            return msgspec.convert({name.strip(): value.strip() for name, _, value in parts}, cls)
        except msgspec.ValidationError as error:
            names = ", ".join(cls.__struct_fields__)
            raise ConfigError(
                f"--addresses {text!r}: {error}; write NAME=HOST:PORT,… with {names}"
            ) from error


class ProcessEntry(msgspec.Struct, kw_only=True, frozen=True):
    """A process of a stack as `stack.json` has it."""

    pid: int | None
    state: str
    restarts: int
    http: str
    log: str


class StackFile(msgspec.Struct, kw_only=True, frozen=True):
    """What `stack.json` says."""

    pid: int  # of the process that keeps the stack
    started_at: float
    directory: str
    store: str
    addresses: Addresses
    processes: dict[str, ProcessEntry]

    def write(self) -> None:
        """Replaces the file in one step, so that a reader never sees half of it."""
        target = Path(self.directory) / STACK_FILE
        draft = target.with_suffix(".json.new")
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=2))
        draft.replace(target)

    @property
    def running(self) -> bool:
        """Whether the process that keeps the stack lives."""
        return is_alive(self.pid)


def read_stack_file(directory: Path) -> StackFile | None:
    """The stack of a directory, None if there never was one. ConfigError if the file is of another kind."""
    file = directory / STACK_FILE
    try:
        return msgspec.json.decode(file.read_bytes(), type=StackFile)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{file}: {error}; remove the file if no stack runs there") from error


def find_addresses(directory: Path | None, addresses: str | None) -> Addresses:
    """What the command line says: explicit addresses, else the running stack of the directory.

    Raises:
        ConfigError: if no stack runs in the directory, or the addresses do not parse.
    """
    if addresses is not None:
        return Addresses.parse(addresses)
    directory = directory or DEFAULT_DIRECTORY
    stack = read_stack_file(directory)
    if stack is not None and stack.running:
        return stack.addresses
    raise ConfigError(
        f"no stack runs in {directory}; start one with: relayrl up --dir {directory}, "
        "or say where the services are with --addresses"
    )


def is_alive(pid: int) -> bool:
    """Whether a process of that id runs; one that has ended and that nobody waited for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return True  # no /proc here
    return state != "Z"
