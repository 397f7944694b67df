"""`relayrl audit RUN`: shows that nothing of a run was lost and nothing was stored or used twice."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from relayrl_cli.addresses import read_stack_file
from relayrl_shared.store.interface import Audit, TrajectoryStore
from relayrl_shared.store.open import open_store


def run(arguments: argparse.Namespace) -> int:
    """0 when the identity holds, 1 when it does not or there is no such run."""
    store = open_store(_store_url(arguments.store, arguments.directory))
    try:
        run_id = _run_id(store, arguments.run_name)
        if run_id is None:
            sys.stderr.write(_unknown(store, arguments.run_name))
            return 1
        audit = store.audit(run_id)
    finally:
        store.close()
    print(msgspec.json.format(msgspec.json.encode(audit)).decode() if arguments.json else report(audit))
    return 0 if holds(audit) else 1


def holds(audit: Audit) -> bool:
    """Whether all that was accepted is accounted for, once."""
    return audit.missing == 0 and audit.stored_twice == 0 and audit.used_twice == 0


def report(audit: Audit) -> str:
    """The identity of contracts C2 with its numbers, then what the learner did."""
    unused = ", ".join(f"{count} {outcome}" for outcome, count in sorted(audit.unused.items())) or "none"
    return "\n".join(
        [
            f"run {audit.run_id}",
            "  accepted = stored + quarantined + dropped + still spooled",
            f"  {audit.accepted} = {audit.stored} + {audit.quarantined} + {audit.dropped} + {audit.in_spool}"
            + (f", {audit.missing} MISSING" if audit.missing else ", nothing missing"),
            f"  stored twice {audit.stored_twice}, used {audit.used}, used twice {audit.used_twice}, "
            f"not read yet {audit.unread}",
            f"  passed over: {unused}",
            "the identity holds" if holds(audit) else "THE IDENTITY DOES NOT HOLD",
        ]
    )


def _store_url(url: str | None, directory: Path) -> str:
    if url is not None:
        return url
    stack = read_stack_file(directory)
    return stack.store if stack is not None else f"sqlite:///{(directory / 'training-server').absolute()}"


def _run_id(store: TrajectoryStore, name: str) -> str | None:
    found = store.run_by_name(name) or store.run_by_id(name)
    return found.run_id if found is not None else None


def _unknown(store: TrajectoryStore, name: str) -> str:
    names = ", ".join(run.name for run in store.runs()) or "none"
    return f"no run {name!r}; there are: {names}\n"
