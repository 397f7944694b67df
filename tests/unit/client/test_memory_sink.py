"""The memory sink keeps the last trajectories of every actor."""

from __future__ import annotations

from relayrl_client.segments import ClosedSegment
from relayrl_client.sinks import MemorySink
from relayrl_shared.testing.trajectories import make_trajectory, small_schema


def segment(actor_id: str, segment_index: int = 0) -> ClosedSegment:
    """A closed segment of an actor."""
    made = make_trajectory(small_schema(), 2, actor_id=actor_id, segment_index=segment_index)
    return ClosedSegment(made.metadata, made.columns, made.final_observation)


def indices(sink: MemorySink) -> dict[str, list[int]]:
    """What is held: actor id → segment indices."""
    return {actor: [held.metadata.segment_index for held in all_] for actor, all_ in sink.snapshot().items()}


def test_keeps_the_last_of_every_actor() -> None:
    """Older ones are let go and counted, each actor for itself."""
    sink = MemorySink(max_trajectories=2)
    for number in range(4):
        sink.write(segment("a", number))
    sink.write(segment("b"))

    assert indices(sink) == {"a": [2, 3], "b": [0]}
    assert sink.evicted_total == 2


def test_drain_takes_out_and_snapshot_does_not() -> None:
    """A drained sink is empty."""
    sink = MemorySink()
    sink.write(segment("a"))

    assert list(sink.snapshot()) == list(sink.drain()) == ["a"]
    assert sink.snapshot() == {}


def test_selected_actors_only() -> None:
    """Unknown actors have nothing; forgotten ones neither."""
    sink = MemorySink()
    for actor in ("a", "b", "c"):
        sink.write(segment(actor))
    sink.forget("c")

    drained = sink.trajectories(["a", "c", "unknown"], drain=True)

    assert list(drained) == ["a"]
    assert list(sink.snapshot()) == ["b"]


def test_arrays_are_shared() -> None:
    """Keeping a segment copies nothing."""
    sink, one = MemorySink(), segment("a")
    sink.write(one)

    assert sink.snapshot()["a"][0].columns is one.columns
    assert sink.flush(0.0)
    sink.close()
    assert sink.snapshot() == {}
