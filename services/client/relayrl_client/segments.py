"""What the recorder hands to delivery: closed segments, and the protocol of whoever takes them.

The recorder closes a segment on the thread that called `request_action` or `end_episode` and gives it to a
`SegmentSink` at once; encoding, spooling and sending happen behind that sink.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from relayrl_shared.trajectory import Columns, FinalObservation, Trajectory, TrajectoryMetadata


@dataclass(frozen=True, slots=True)
class ClosedSegment:
    """A finished segment before delivery gave it a place in a spool.

    metadata: complete but for `spool_id` (""), `sequence` (0) and `body_digest` (""): whoever spools or
    encodes the segment fills them with `msgspec.structs.replace`. The trajectory_id is final.
    columns: the steps, contiguous arrays that nobody writes to any more; may be views of one shared block.
    final_observation: what was seen after the last step; None only where it terminated without one.
    """

    metadata: TrajectoryMetadata
    columns: Columns
    final_observation: FinalObservation | None

    @property
    def steps(self) -> int:
        """Steps in the segment."""
        return self.metadata.steps

    def trajectory(self) -> Trajectory:
        """The segment as a trajectory record, with the metadata as it is."""
        return Trajectory(self.metadata, self.columns, self.final_observation)


class SegmentSink(Protocol):
    """Takes closed segments: the routers in the client, a list in tests."""

    def submit(self, segment: ClosedSegment, timeout_seconds: float | None = None) -> None:
        """Take a segment. Segments of one actor come in order.

        May block while the sink is full (back-pressure), no longer than `timeout_seconds`; None: for as long
        as it takes.

        Raises:
            Overloaded: there is no room, and none came in time; the same segment may be submitted again.
            RelayRLError: it refuses for another reason.
        """


class Delivery(SegmentSink, Protocol):
    """A sink with a life: what stands between the recorder and files, memory and the training server."""

    def flush(self, timeout_seconds: float) -> None:
        """Return when everything submitted before is accepted: fsynced in the spool, or in its sink.

        Raises:
            SpoolError: it could not be accepted.
            PeerTimeout: not within `timeout_seconds`.
        """

    def drain(self, timeout_seconds: float) -> bool:
        """Wait until the server has everything that was accepted; False if that takes longer."""

    def close(self, timeout_seconds: float) -> None:
        """Accept what was submitted, send what can be sent in the time, and release files and threads."""
