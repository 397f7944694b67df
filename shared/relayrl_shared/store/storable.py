"""What no database row can hold: found here, so that one odd trajectory never stops the batch around it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from relayrl_shared.messages import PutTrajectory
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


def as_quarantined(
    message: PutTrajectory,
    frames: Sequence[bytes | memoryview] | None,
    reason: str,
    detail: str,
    *,
    named: bool = True,
) -> Quarantined:
    """The row of quarantine of a trajectory, whole: its message, and its frames as a msgpack array.

    Args:
        message: the header, as it came.
        frames: body and final observation; None: too large to keep.
        reason: a slug.
        detail: for people.
        named: whether the row names run, spool, sequence and id; not where the run is not known, whose
            sequences are nobody's to settle.
    """
    metadata = message.trajectory
    return Quarantined(
        reason=reason,
        detail=detail,
        header=msgspec.msgpack.encode(message),
        payload=None if frames is None else msgspec.msgpack.encode(frames),
        run_id=metadata.run_id if named else None,
        spool_id=metadata.spool_id if named else None,
        sequence=metadata.sequence if named else None,
        trajectory_id=metadata.trajectory_id if named else None,
    )


def conflict(item: IncomingTrajectory, reason: str, detail: str) -> Quarantined:
    """The row of quarantine of a trajectory that was valid and cannot be stored."""
    frames = (item.body, item.final_observation or b"")
    return as_quarantined(PutTrajectory(trajectory=item.metadata), frames, reason, detail)


def clean(row: Quarantined) -> Quarantined:
    """The row with texts that a database takes; a sequence that none can have is left out."""
    texts = {
        name: value.replace("\0", "\N{REPLACEMENT CHARACTER}")
        for name in ("reason", "detail", "run_id", "spool_id", "trajectory_id")
        if isinstance(value := getattr(row, name), str)
    }
    impossible = row.sequence is not None and not 0 < row.sequence <= _HIGHEST
    return msgspec.structs.replace(row, **texts, sequence=None if impossible else row.sequence)
