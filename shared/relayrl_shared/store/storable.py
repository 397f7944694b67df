"""What no database row can hold: found here, so that one odd trajectory never stops the batch around it."""

from __future__ import annotations

import msgspec

from relayrl_shared.store.interface import IncomingTrajectory, Quarantined
from relayrl_shared.trajectory import TrajectoryMetadata

_HIGHEST = (1 << 63) - 1
_HIGHEST_SMALL = (1 << 31) - 1
_RANGES = {
    "sequence": (1, _HIGHEST),
    "segment_index": (0, _HIGHEST_SMALL),
    "first_step_index": (0, _HIGHEST),
    "steps": (0, _HIGHEST_SMALL),
}


def problem(metadata: TrajectoryMetadata) -> str | None:
    """Why the trajectory cannot be stored: a NUL in a text, or a number out of range. None: it can be."""
    for name in metadata.__struct_fields__:
        value = getattr(metadata, name)
        if isinstance(value, str) and "\0" in value:
            return f"{name} holds a NUL character"
    for name, (lowest, highest) in _RANGES.items():
        value = getattr(metadata, name)
        if not lowest <= value <= highest:
            return f"{name} is {value}, out of range"
    return None


def as_quarantined(item: IncomingTrajectory, reason: str, detail: str) -> Quarantined:
    """The row of quarantine of a trajectory, whole."""
    return Quarantined(
        reason=reason,
        detail=detail,
        header=msgspec.msgpack.encode(item.metadata),
        payload=item.body + (item.final_observation or b""),
        run_id=item.metadata.run_id,
        spool_id=item.metadata.spool_id,
        sequence=item.metadata.sequence,
        trajectory_id=item.metadata.trajectory_id,
    )


def clean(row: Quarantined) -> Quarantined:
    """The row with texts that a database takes; a sequence that none can have is left out."""
    texts = {
        name: value.replace("\0", "\N{REPLACEMENT CHARACTER}")
        for name in ("reason", "detail", "run_id", "spool_id", "trajectory_id")
        if isinstance(value := getattr(row, name), str)
    }
    impossible = row.sequence is not None and not 0 < row.sequence <= _HIGHEST
    return msgspec.structs.replace(row, **texts, sequence=None if impossible else row.sequence)
