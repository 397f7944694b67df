"""`relayrl status`: the processes of a stack, whether each is ready, and what it waits for."""

from __future__ import annotations

import argparse
import json
import sys

from relayrl_cli.addresses import ProcessEntry, StackFile, is_alive, read_stack_file
from relayrl_cli.processes import not_ready


def run(arguments: argparse.Namespace) -> int:
    """Prints a line a process; 0 when every process is ready, else 1."""
    stack = read_stack_file(arguments.directory)
    if stack is None:
        sys.stderr.write(
            f"no stack in {arguments.directory}; start one with: relayrl up --dir {arguments.directory}\n"
        )
        return 1
    states = {name: describe(entry) for name, entry in stack.processes.items()}
    if arguments.json:
        print(json.dumps({"directory": stack.directory, "store": stack.store, "processes": states}, indent=2))
    else:
        _print(stack, states)
    return 0 if all(state["state"] == "ready" for state in states.values()) else 1


def describe(entry: ProcessEntry) -> dict[str, object]:
    """A process as it is now: `ready`, `waiting` (with what it waits for) or `down`."""
    alive = entry.pid is not None and is_alive(entry.pid)
    missing = not_ready(entry.http) if alive else {}
    state = "down" if not alive else "waiting" if missing else "ready"
    return {
        "state": state,
        "pid": entry.pid if alive else None,
        "restarts": entry.restarts,
        "http": entry.http,
        "waiting_for": missing,
    }


def _print(stack: StackFile, states: dict[str, dict[str, object]]) -> None:
    print(f"stack in {stack.directory}, store {stack.store}")
    for name, state in states.items():
        pid = f"process {state['pid']}" if state["pid"] else "-"
        print(f"  {name:<17} {state['state']:<8} {pid:<16} restarts {state['restarts']}  {state['http']}")
        for item, reason in dict(state["waiting_for"]).items():  # type: ignore[call-overload]
            print(f"      {item}: {reason}")
