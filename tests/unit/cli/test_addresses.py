"""Addresses of a stack: ports, the stack file, and which of them a command uses."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from relayrl_cli.addresses import (
    Addresses,
    Ports,
    ProcessEntry,
    StackFile,
    find_addresses,
    is_alive,
    read_stack_file,
)
from relayrl_shared.errors import ConfigError

DEAD_PID = 2**22 + 1  # above the largest process id of Linux


def stack_file(directory: Path, pid: int) -> StackFile:
    return StackFile(
        pid=pid,
        started_at=1.0,
        directory=str(directory),
        store="sqlite:///x",
        addresses=Addresses.of(Ports(agent_listener=1)),
        processes={
            "model-registry": ProcessEntry(pid=5, state="ready", restarts=0, http="http://x", log="l")
        },
    )


def test_a_stack_file_reads_back(tmp_path: Path) -> None:
    """What is written is what every other command reads, and no draft is left."""
    written = stack_file(tmp_path, os.getpid())
    written.write()

    assert read_stack_file(tmp_path) == written
    assert [file.name for file in tmp_path.iterdir()] == ["stack.json"]


def test_a_directory_without_a_stack_has_no_file(tmp_path: Path) -> None:
    """None, not an error."""
    assert read_stack_file(tmp_path) is None


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    """With its name and the remedy."""
    (tmp_path / "stack.json").write_text('{"pid": "x"}')

    with pytest.raises(ConfigError, match=r"stack.json: .*pid.*remove the file"):
        read_stack_file(tmp_path)


def test_the_addresses_of_a_running_stack_are_used(tmp_path: Path) -> None:
    """They come from the file in the directory."""
    stack_file(tmp_path, os.getpid()).write()

    assert find_addresses(tmp_path, None).agent_listener == "127.0.0.1:1"


def test_a_named_directory_without_a_running_stack_is_refused(tmp_path: Path) -> None:
    """Default ports would reach somebody else's stack."""
    stack_file(tmp_path, DEAD_PID).write()

    with pytest.raises(ConfigError, match=r"no stack runs in .*relayrl up --dir"):
        find_addresses(tmp_path, None)


def test_without_a_stack_in_the_default_directory_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training against nothing would wait in silence."""
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ConfigError, match=r"no stack runs in relayrl-data.*relayrl up.*--addresses"):
        find_addresses(None, None)


def test_explicit_addresses_win(tmp_path: Path) -> None:
    """What is not named keeps its default."""
    found = find_addresses(tmp_path, "agent_listener=10.0.0.1:1, model_server=b:2")

    assert (found.agent_listener, found.model_server) == ("10.0.0.1:1", "b:2")
    assert found.trajectory_server == Addresses().trajectory_server


def test_an_unknown_address_name_is_refused() -> None:
    """The message lists the names."""
    with pytest.raises(ConfigError, match=r"agent_listenr.*write NAME=HOST:PORT.*trajectory_server"):
        Addresses.parse("agent_listenr=x:1")


def test_a_process_that_does_not_exist_is_not_alive() -> None:
    """This one is."""
    assert is_alive(os.getpid())
    assert not is_alive(DEAD_PID)
