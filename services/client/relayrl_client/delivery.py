"""Delivery as a whole: the routers, and the sinks that a data mode asks for; the runtime drives it.

`open_delivery` builds it for a run. Segments of one actor always take the same router, which keeps their
order.
"""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from relayrl_client.routers import DEFAULT_MAX_SEGMENTS, Router, RouterStatistics
from relayrl_client.segments import ClosedSegment
from relayrl_client.sinks import FileSink, MemorySink, Sink
from relayrl_client.spool import AtLimit, Spool, SpoolStatistics, adopt_orphans
from relayrl_client.transport import (
    DEFAULT_MAX_IN_FLIGHT,
    SenderStatistics,
    TrajectorySender,
    TransportSink,
)
from relayrl_shared.errors import PeerTimeout, SpoolError
from relayrl_shared.messages import Limits, SpoolReport
from relayrl_shared.sockets import DEFAULT_MAX_MESSAGE_BYTES, Peer
from relayrl_shared.trajectory import RecordSchema

OnAcceptedIds = Callable[[Sequence[str]], None]

_log = logging.getLogger(__name__)


class RoutedDelivery:
    """Routers in front of sinks. Thread-safe.

    Attributes:
        memory: the memory sink, where the data mode has one.
        files: the file sink, likewise.
        transport: the sink to the training server, likewise.
    """

    def __init__(
        self,
        *,
        memory: MemorySink | None = None,
        files: FileSink | None = None,
        transport: TransportSink | None = None,
        routers: int = 1,
        max_segments: int = DEFAULT_MAX_SEGMENTS,
        at_limit: Literal["block", "refuse"] = "block",
    ) -> None:
        self.memory = memory
        self.files = files
        self.transport = transport
        self._sinks: list[Sink] = [sink for sink in (memory, files, transport) if sink is not None]
        self._routers = [
            Router(self._sinks, max_segments=max_segments, at_limit=at_limit, name=f"router {index}")
            for index in range(routers)
        ]

    def submit(self, segment: ClosedSegment, timeout_seconds: float | None = None) -> None:
        """Queues a segment; blocks while its router's queue is full, or refuses.

        Raises:
            Overloaded: the queue is full, and the policy is `refuse` or the time is over.
            SpoolError: the delivery is closed.
        """
        self._router_of(segment.metadata.actor_id).submit(segment, timeout_seconds)

    def _router_of(self, actor_id: str) -> Router:
        routers = self._routers
        return routers[zlib.crc32(actor_id.encode()) % len(routers)] if len(routers) > 1 else routers[0]

    def flush(self, timeout_seconds: float) -> None:
        """Returns when everything submitted before is accepted.

        Raises:
            SpoolError: a sink has no room, and had none until the time was over; or it refused a segment for
                good since the last flush (the others are accepted).
            PeerTimeout: it took longer for another reason.
        """
        deadline = time.monotonic() + timeout_seconds
        for router in self._routers:
            if not router.flush(max(0.0, deadline - time.monotonic())):
                stalled_by = router.statistics().stalled_by
                if stalled_by:
                    raise SpoolError(stalled_by)
                raise PeerTimeout(f"the segments were not accepted within {timeout_seconds:g} s")
        refusals = [refusal for router in self._routers for refusal in router.take_refusals()]
        if refusals:
            raise SpoolError(f"segments were refused for good since the last flush: {'; '.join(refusals)}")

    def forget(self, actor_ids: Sequence[str]) -> None:
        """Lets go what the memory sink holds of removed actors, once their last segments are there."""
        if self.memory is not None:
            for actor_id in actor_ids:
                self._router_of(actor_id).call_after(partial(self.memory.forget, actor_id))

    def drain(self, timeout_seconds: float) -> bool:
        """Waits until the server has everything that was accepted; False if that takes longer."""
        return self.transport is None or self.transport.drain(timeout_seconds)

    def spool_reports(self, run_id: str) -> Sequence[SpoolReport]:
        """What the spools of this process hold, or ever held, of a run (contracts C2)."""
        if self.transport is None:
            return ()
        spools = self.transport.sender.spools()
        return tuple(spool.report(run_id) for spool in spools if run_id in spool.runs())

    def router_statistics(self) -> list[RouterStatistics]:
        """The counters of every router."""
        return [router.statistics() for router in self._routers]

    def sender_statistics(self) -> SenderStatistics | None:
        """The counters of the way to the server."""
        return None if self.transport is None else self.transport.sender.statistics()

    def spool_statistics(self) -> SpoolStatistics | None:
        """The counters of the client's own spool."""
        return None if self.transport is None else self.transport.spool.statistics()

    def close(self, timeout_seconds: float) -> None:
        """Accepts what was submitted, sends what can be sent in the time, and frees files and threads.

        What the server does not have by then stays in the spool, and the next start sends it.
        """
        deadline = time.monotonic() + timeout_seconds
        lost = sum(router.close(max(0.0, deadline - time.monotonic())) for router in self._routers)
        if lost:
            _log.error("%d segments had no room in their sinks and are lost", lost)
        if not self.drain(max(0.0, deadline - time.monotonic())) and self.transport is not None:
            left = self.transport.spool.pending_count()
            _log.warning("%d trajectories stay in the spool %s", left, self.transport.spool.path)
        for sink in self._sinks:
            sink.close()


def open_transport(
    schema: RecordSchema,
    address: str,
    spool_directory: Path | str,
    *,
    spool_id: str | None = None,
    limit_bytes: int,
    at_limit: AtLimit,
    limits: Limits | None = None,
    on_accepted: OnAcceptedIds | None = None,
) -> TransportSink:
    """The spool, the sender to `address` and the sink in front of them; orphan spools are adopted.

    Args:
        schema: of the segments.
        address: of the trajectory server, `tcp://host:port`.
        spool_directory: holds one directory a spool.
        spool_id: the spool's lasting name; None makes one up.
        limit_bytes: of the spool.
        at_limit: what happens there.
        limits: from the welcome.
        on_accepted: gets the ids of trajectories once they are on disk, from the spool's thread.

    Raises:
        SpoolError: the spool cannot be opened.
    """
    spool = Spool(spool_directory, spool_id, limit_bytes=limit_bytes, at_limit=at_limit)
    if on_accepted is not None:
        spool.listen(lambda entries: on_accepted([entry.trajectory_id for entry in entries]))
    max_message_bytes = limits.max_message_bytes if limits else DEFAULT_MAX_MESSAGE_BYTES
    sender = TrajectorySender(
        Peer(address, max_message_bytes=max_message_bytes),
        max_in_flight=limits.max_in_flight if limits else DEFAULT_MAX_IN_FLIGHT,
    )
    sender.adopt(adopt_orphans(spool_directory))
    return TransportSink(schema, spool, sender)


def open_delivery(
    data_mode: str,
    schema: RecordSchema,
    *,
    address: str | None = None,
    spool_directory: Path | str = "spool",
    spool_id: str | None = None,
    spool_limit_bytes: int = 4 << 30,
    spool_at_limit: AtLimit = "block",
    limits: Limits | None = None,
    file_directory: Path | str = "experiment_data",
    memory_trajectories_per_actor: int = 1000,
    routers: int = 1,
    router_segments: int = DEFAULT_MAX_SEGMENTS,
    on_accepted: OnAcceptedIds | None = None,
) -> RoutedDelivery:
    """The delivery of a data mode, for a run.

    Args:
        data_mode: `disabled`, `offline_with_{files,memory,files_and_memory}`, `online`, `online_with_…`.
        schema: of the segments.
        address: of the trajectory server; online modes need it.
        spool_directory: see `open_transport`, and for the other spool options.
        spool_id: likewise.
        spool_limit_bytes: likewise.
        spool_at_limit: likewise.
        limits: from the welcome.
        file_directory: of the file sink.
        memory_trajectories_per_actor: kept by the memory sink.
        routers: threads that encode.
        router_segments: that wait in all routers together, at most.
        on_accepted: see `open_transport`.

    Raises:
        SpoolError: a directory cannot be made or the spool cannot be opened.
    """
    transport = None
    if data_mode.startswith("online"):
        if address is None:
            raise SpoolError(f"data mode {data_mode} needs the address of a trajectory server")
        transport = open_transport(
            schema,
            address,
            spool_directory,
            spool_id=spool_id,
            limit_bytes=spool_limit_bytes,
            at_limit=spool_at_limit,
            limits=limits,
            on_accepted=on_accepted,
        )
    return RoutedDelivery(
        memory=MemorySink(memory_trajectories_per_actor) if "memory" in data_mode else None,
        files=FileSink(schema, file_directory) if "files" in data_mode else None,
        transport=transport,
        routers=routers,
        max_segments=max(1, router_segments // routers),
        at_limit="refuse" if spool_at_limit == "refuse" else "block",
    )
