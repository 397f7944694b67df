"""Routers and the file sink: segments leave the hot path, keep their order, and none is dropped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pyarrow.feather
import pytest

from relayrl_client.delivery import RoutedDelivery, open_delivery
from relayrl_client.routers import Router
from relayrl_client.segments import ClosedSegment
from relayrl_client.sinks import FileSink, MemorySink, read_trajectories
from relayrl_shared.errors import InvalidTrajectory, Overloaded, PeerTimeout, SpoolError
from relayrl_shared.testing.trajectories import make_trajectory, small_schema

SCHEMA = small_schema()


def segment(number: int, actor_id: str = "actor", steps: int = 3) -> ClosedSegment:
    """A closed segment with a number."""
    made = make_trajectory(SCHEMA, steps, seed=number, actor_id=actor_id, segment_index=number)
    return ClosedSegment(made.metadata, made.columns, made.final_observation)


class GatedSink:
    """A sink without room until its gate opens; it remembers what it took."""

    def __init__(self, error: Exception | None = None) -> None:
        self.gate = threading.Event()
        self.error = error
        self.taken: list[ClosedSegment] = []
        self.asked = threading.Event()

    def write(self, segment: ClosedSegment) -> None:
        """Takes the segment, waits for the gate, or raises."""
        self.asked.set()
        if self.error is not None and not self.gate.is_set():
            raise self.error
        self.gate.wait(30)
        self.taken.append(segment)

    def flush(self, timeout_seconds: float) -> bool:
        """Nothing to do."""
        return True

    def close(self) -> None:
        """Nothing to do."""


@pytest.fixture
def gated() -> Iterator[tuple[Router, GatedSink]]:
    """A router of three segments in front of a sink that waits."""
    sink = GatedSink()
    router = Router([sink], max_segments=3, at_limit="refuse")
    yield router, sink
    sink.gate.set()
    router.close()


def test_segments_reach_every_sink_in_order() -> None:
    """Each sink sees every segment, in the order of submission."""
    sinks = [MemorySink(100), MemorySink(100)]
    router = Router(sinks)

    for number in range(50):
        router.submit(segment(number))

    assert router.flush(30)
    for sink in sinks:
        assert [held.metadata.segment_index for held in sink.snapshot()["actor"]] == list(range(50))
    assert router.close() == 0
    assert router.statistics().written_total == 50


def test_full_queue_refuses(gated: tuple[Router, GatedSink]) -> None:
    """Under `refuse` a full queue is a typed, retryable error, and counted."""
    router, sink = gated
    for number in range(3):
        router.submit(segment(number))

    with pytest.raises(Overloaded, match="3 segments wait"):
        router.submit(segment(3))

    assert router.statistics().refused_total == 1
    sink.gate.set()
    assert router.flush(30)
    assert [taken.metadata.segment_index for taken in sink.taken] == [0, 1, 2]


def test_full_queue_blocks_until_there_is_room() -> None:
    """Under `block` submit waits for room, or until its deadline."""
    sink = GatedSink()
    router = Router([sink], max_segments=1)
    router.submit(segment(0))
    with pytest.raises(Overloaded):
        router.submit(segment(1), timeout_seconds=0.02)
    waiting = threading.Thread(target=router.submit, args=(segment(2),))
    waiting.start()

    sink.gate.set()
    waiting.join(30)

    assert router.flush(30)
    assert [taken.metadata.segment_index for taken in sink.taken] == [0, 2]
    router.close()


def test_bytes_in_the_queue_are_bounded(gated: tuple[Router, GatedSink]) -> None:
    """A few large segments fill the queue as many small ones do; the first always fits."""
    sink = GatedSink()
    router = Router([sink], max_bytes=1000, at_limit="refuse")
    router.submit(segment(0, steps=500))

    with pytest.raises(Overloaded):
        router.submit(segment(1))

    sink.gate.set()
    router.close()


def test_sink_without_room_is_asked_again() -> None:
    """A SpoolError holds the segment until the sink takes it; nothing overtakes, nothing is lost."""
    sink, memory = GatedSink(SpoolError("disk full")), MemorySink(10)
    router = Router([memory, sink])
    for number in range(3):
        router.submit(segment(number))
    assert sink.asked.wait(30)

    assert not router.flush(0.05)
    assert router.statistics().stalled_by == "disk full"
    sink.gate.set()

    assert router.flush(30)
    assert [taken.metadata.segment_index for taken in sink.taken] == [0, 1, 2]
    assert len(memory.snapshot()["actor"]) == 3
    assert router.statistics().stalled_by == ""
    router.close()


def test_refused_for_good_is_counted_and_the_rest_goes_on() -> None:
    """A segment that a sink will never take is named in the log; other sinks and segments are served."""
    bad, memory = GatedSink(InvalidTrajectory("never", "column_missing")), MemorySink(10)
    router = Router([bad, memory])

    router.submit(segment(0))

    assert router.flush(30)
    assert len(memory.snapshot()["actor"]) == 1
    assert router.statistics().failed_total == 1
    router.close()


def test_flush_tells_once_of_what_was_refused_for_good() -> None:
    """It does not say that all is accepted when a sink refused a segment, and names it."""
    bad = GatedSink(InvalidTrajectory("never", "column_missing"))
    delivery = RoutedDelivery(memory=MemorySink(10), files=bad, routers=2)  # type: ignore[arg-type]
    refused = segment(0)
    delivery.submit(refused)

    with pytest.raises(SpoolError, match=f"GatedSink refused trajectory {refused.metadata.trajectory_id}"):
        delivery.flush(30)
    delivery.flush(30)
    delivery.close(1.0)


def test_removed_actors_are_let_go_after_their_last_segment() -> None:
    """What a removal itself closes does not stay behind in memory."""
    delivery = RoutedDelivery(memory=MemorySink(10))
    memory = delivery.memory
    assert memory is not None
    for number in range(3):
        delivery.submit(segment(number, "goes"))
        delivery.submit(segment(number, "stays"))
    delivery.forget(["goes"])
    delivery.submit(segment(3, "stays"))

    delivery.flush(30)
    assert {actor: len(kept) for actor, kept in memory.snapshot().items()} == {"stays": 4}
    delivery.close(1.0)


def test_a_submission_ends_at_its_deadline() -> None:
    """Under `block` a caller that gives a time waits no longer."""
    sink = GatedSink()
    delivery = RoutedDelivery(files=sink, max_segments=1)  # type: ignore[arg-type]
    delivery.submit(segment(0), 0.0)
    with pytest.raises(Overloaded):
        delivery.submit(segment(1), 0.02)
    sink.gate.set()
    delivery.close(10.0)


def test_close_gives_up_a_stalled_sink_at_its_deadline() -> None:
    """Closing ends also when a sink has no room, and says how many segments were lost."""
    router = Router([GatedSink(SpoolError("disk full"))])
    for number in range(3):
        router.submit(segment(number))

    assert router.close(timeout_seconds=0.05) == 3
    with pytest.raises(SpoolError, match="closed"):
        router.submit(segment(3))


def test_files_read_back_in_order(tmp_path: Path) -> None:
    """Every trajectory has its file; names sort by creation; metadata and arrays come back."""
    sink = FileSink(SCHEMA, tmp_path / "out")
    segments = [segment(number) for number in range(3)]
    for each in segments:
        sink.write(each)
    assert sink.flush(1.0)

    read = list(read_trajectories(tmp_path / "out"))

    assert [each.metadata.trajectory_id for each in read] == [
        each.metadata.trajectory_id for each in segments
    ]
    for written, back in zip(segments, read, strict=True):
        assert msgspec.structs.replace(back.metadata, schema_digest="") == written.metadata
        assert back.columns.reward.tobytes() == written.columns.reward.tobytes()
        assert back.final_observation is not None
    assert not list((tmp_path / "out").glob("*.new"))


def test_files_are_ordinary_arrow(tmp_path: Path) -> None:
    """Anything that opens Arrow files opens ours."""
    sink = FileSink(SCHEMA, tmp_path)
    sink.write(segment(0))

    (path,) = tmp_path.glob("*.arrow")
    table = pyarrow.feather.read_table(path)

    assert table.num_rows == 3
    assert "behaviour_log_prob" in table.column_names


def test_file_that_is_none_of_ours_is_refused(tmp_path: Path) -> None:
    """Garbage in place of a file is a typed error that names it."""
    (tmp_path / "garbage.arrow").write_bytes(b"garbage")

    with pytest.raises(InvalidTrajectory, match=r"garbage\.arrow"):
        list(read_trajectories(tmp_path))


def test_directory_that_goes_away_stalls_and_recovers(tmp_path: Path) -> None:
    """A file that cannot be written is a SpoolError, which routers repeat."""
    sink = FileSink(SCHEMA, tmp_path / "out")
    (tmp_path / "out").rmdir()
    with pytest.raises(SpoolError, match="cannot be written"):
        sink.write(segment(0))

    (tmp_path / "out").mkdir()
    sink.write(segment(0))

    assert sink.written_total == 1


def test_actors_keep_their_order_over_several_routers() -> None:
    """With several routers every actor still has one."""
    memory = MemorySink(100)
    delivery = RoutedDelivery(memory=memory, routers=3)
    for number in range(20):
        for actor in "abcdef":
            delivery.submit(segment(number, actor))

    delivery.flush(30)

    assert {actor: [t.metadata.segment_index for t in held] for actor, held in memory.snapshot().items()} == {
        actor: list(range(20)) for actor in "abcdef"
    }
    assert sum(each.written_total > 0 for each in delivery.router_statistics()) > 1
    delivery.close(1.0)


def test_flush_says_what_stalls() -> None:
    """A flush that is not done in time is a typed error: with the sink's reason where there is one."""
    slow = GatedSink()
    delivery = RoutedDelivery()
    delivery._routers[:] = [Router([slow])]
    delivery.submit(segment(0))
    with pytest.raises(PeerTimeout):
        delivery.flush(0.02)

    slow.gate.set()
    delivery.flush(30)
    delivery.close(1.0)


@pytest.mark.parametrize(
    ("mode", "memory", "files"),
    [
        ("disabled", False, False),
        ("offline_with_memory", True, False),
        ("offline_with_files", False, True),
        ("offline_with_files_and_memory", True, True),
    ],
)
def test_offline_modes(mode: str, memory: bool, files: bool, tmp_path: Path) -> None:
    """Each mode has the sinks of its name, and nothing else is touched."""
    delivery = open_delivery(
        mode, SCHEMA, file_directory=tmp_path / "out", spool_directory=tmp_path / "spool"
    )
    delivery.submit(segment(0))
    delivery.flush(30)

    held = 0 if delivery.memory is None else len(delivery.memory.snapshot())
    assert (held == 1) == memory
    assert (tmp_path / "out").exists() == files
    assert not (tmp_path / "spool").exists()
    assert delivery.spool_reports("run") == ()
    delivery.close(1.0)


def test_full_spool_does_not_hold_up_the_end(tmp_path: Path, free_port: Callable[[], int]) -> None:
    """With the server away and the spool at its limit, close ends at its deadline."""
    delivery = open_delivery(
        "online",
        SCHEMA,
        address=f"tcp://127.0.0.1:{free_port()}",
        spool_directory=tmp_path,
        spool_limit_bytes=5000,
    )
    for number in range(10):
        delivery.submit(segment(number))
    with pytest.raises(SpoolError, match="is the training server reachable"):
        delivery.flush(1.5)

    begun = time.monotonic()
    delivery.close(0.2)

    assert time.monotonic() - begun < 5
    (statistics,) = delivery.router_statistics()
    assert 0 < statistics.written_total < 10


def test_spool_that_refuses_makes_submit_refuse(tmp_path: Path, free_port: Callable[[], int]) -> None:
    """Under `refuse` the caller hears of a full spool as soon as the queue is full, too."""
    delivery = open_delivery(
        "online",
        SCHEMA,
        address=f"tcp://127.0.0.1:{free_port()}",
        spool_directory=tmp_path,
        spool_limit_bytes=5000,
        spool_at_limit="refuse",
    )
    small = segment(0)
    for _ in range(100):
        delivery.submit(small)
    with pytest.raises(SpoolError, match="reachable"):  # the spool is full, and the router has seen it
        delivery.flush(2.0)

    def submit_more_than_the_queue_holds() -> None:
        for _ in range(5000):
            delivery.submit(small)

    with pytest.raises(Overloaded, match=r"segments wait to be written: .*reachable"):
        submit_more_than_the_queue_holds()

    delivery.close(0.1)


def test_files_taken_away_do_not_stop_a_flush(tmp_path: Path) -> None:
    """A reader may move files before they are flushed."""
    sink = FileSink(SCHEMA, tmp_path)
    sink.write(segment(0))
    next(tmp_path.glob("*.arrow")).unlink()

    assert sink.flush(1.0)
