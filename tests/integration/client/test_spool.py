"""The spool on a real disk: nothing accepted is lost, whatever happens to process, file or space."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from relayrl_client.spool import Spool, adopt_orphans
from relayrl_client.spool_index import SpoolEntry
from relayrl_client.spool_records import SEGMENT_MAGIC, decode_record
from relayrl_shared.errors import MessageTooLarge, SpoolError
from relayrl_shared.messages import SpoolReport
from relayrl_shared.testing.trajectories import make_metadata

BODY = b"body" * 250


@pytest.fixture
def open_spool(tmp_path: Path) -> Iterator[Callable[..., Spool]]:
    """Opens spools below one directory and closes them afterwards."""
    opened: list[Spool] = []

    def make(spool_id: str | None = "spool", **options: object) -> Spool:
        opened.append(Spool(tmp_path, spool_id, **options))  # type: ignore[arg-type]
        return opened[-1]

    yield make
    for spool in opened:
        spool.close()


def fill(spool: Spool, count: int, run_id: str = "run", body: bytes = BODY) -> list[SpoolEntry]:
    """Appends trajectories that are whole, and waits until they are accepted."""
    entries = [spool.append(make_metadata(1, run_id=run_id), body, b"final") for _ in range(count)]
    assert spool.flush(30)
    return entries


def sequences(spool: Spool, run_id: str = "run") -> list[int]:
    """Sequences of the run that are not acknowledged, in order."""
    held = [trajectory.metadata for trajectory in spool.unacknowledged()]
    return [metadata.sequence for metadata in held if metadata.run_id == run_id]


def test_what_is_appended_reads_back(open_spool: Callable[..., Spool]) -> None:
    """Metadata gets its place, payloads come back in order, also from disk."""
    spool = open_spool(memory_bytes=0)
    metadata = make_metadata(3, run_id="run")

    spool.append(metadata, b"first", b"final")
    spool.append(make_metadata(1, run_id="run"), b"second", None)
    assert spool.flush(30)

    first, second = spool.unacknowledged()
    assert (first.metadata.spool_id, first.metadata.sequence) == ("spool", 1)
    assert first.metadata.trajectory_id == metadata.trajectory_id
    assert (bytes(first.body), bytes(first.final_observation or b"")) == (b"first", b"final")
    assert (bytes(second.body), second.final_observation) == (b"second", None)


def test_sequences_grow_per_run(open_spool: Callable[..., Spool]) -> None:
    """Every run counts from 1 without gaps."""
    spool = open_spool()

    entries = [*fill(spool, 2, "a"), *fill(spool, 3, "b"), *fill(spool, 1, "a")]

    assert [entry.key for entry in entries] == [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3), ("a", 3)]


def test_accepted_comes_after_the_fsync(open_spool: Callable[..., Spool]) -> None:
    """No entry is announced before an fsync that began after its write."""
    gate, announced = threading.Event(), threading.Event()
    spool = open_spool(fsync=lambda descriptor: os.fdatasync(descriptor) if gate.wait(30) else None)
    spool.listen(lambda entries: announced.set())

    spool.append(make_metadata(1, run_id="run"), BODY)

    assert not spool.flush(0.05)
    assert spool.report("run").highest_accepted == 0
    gate.set()
    assert spool.flush(30)
    assert announced.wait(30)
    assert spool.report("run").highest_accepted == 1


def test_one_fsync_serves_what_gathered(open_spool: Callable[..., Spool]) -> None:
    """While one fsync runs, appends gather for the next."""
    first, go = threading.Event(), threading.Event()

    def slow(descriptor: int) -> None:
        first.set()
        go.wait(30)

    spool = open_spool(fsync=slow)
    spool.append(make_metadata(1, run_id="run"), BODY)
    assert first.wait(30)
    for _ in range(20):
        spool.append(make_metadata(1, run_id="run"), BODY)
    go.set()

    assert spool.flush(30)
    assert spool.statistics().fsyncs_total <= 3


def test_report_tells_the_identity(open_spool: Callable[..., Spool]) -> None:
    """The report names the highest accepted and the oldest unacknowledged sequence."""
    spool = open_spool()
    fill(spool, 4)

    assert spool.acknowledge("run", 1)
    assert spool.acknowledge("run", 3)

    report = SpoolReport(spool_id="spool", run_id="run", highest_accepted=4, oldest_unacknowledged=2)
    assert spool.report("run") == report
    assert spool.report("other").highest_accepted == 0


def test_acknowledged_files_are_deleted_whole(open_spool: Callable[..., Spool]) -> None:
    """Space comes back when the last record of a file is acknowledged."""
    spool = open_spool(segment_bytes=8000)
    fill(spool, 30)
    files = len(list(spool.path.glob("*.segment")))

    for sequence in range(1, 31):
        spool.acknowledge("run", sequence)

    assert files > 3
    assert len(list(spool.path.glob("*.segment"))) == 1
    assert spool.pending_count() == 0


def test_restart_keeps_what_is_not_acknowledged(open_spool: Callable[..., Spool]) -> None:
    """After a close, the same name opens with the rest, and goes on counting."""
    spool = open_spool(segment_bytes=8000)
    fill(spool, 20)
    for sequence in [*range(1, 15), 17]:
        spool.acknowledge("run", sequence)
    spool.close()

    again = open_spool(segment_bytes=8000)

    assert sequences(again) == [15, 16, 18, 19, 20]
    assert fill(again, 1)[0].sequence == 21
    assert again.report("run").oldest_unacknowledged == 15


def test_sequence_is_never_used_twice_after_all_was_acknowledged(open_spool: Callable[..., Spool]) -> None:
    """Deleting every file does not make a named spool forget how far it counted."""
    spool = open_spool()
    fill(spool, 5)
    for sequence in range(1, 6):
        spool.acknowledge("run", sequence)
    spool.close()

    again = open_spool()

    assert list(again.path.glob("*.segment")) == []
    assert fill(again, 1)[0].sequence == 6


def test_two_processes_never_share_a_spool(open_spool: Callable[..., Spool]) -> None:
    """A second opener is refused, with the remedy."""
    open_spool()

    with pytest.raises(SpoolError, match="another spool_id"):
        open_spool()


def test_orphans_are_adopted_once(tmp_path: Path, open_spool: Callable[..., Spool]) -> None:
    """Unlocked spools with content are opened; live, empty and unreadable ones are left alone."""
    own = open_spool("own")
    fill(own, 1)
    for name in ("orphan", "damaged"):
        other = Spool(tmp_path, name)
        fill(other, 3, run_id="old run")
        other.close()
    Spool(tmp_path, "empty").close()
    Spool(tmp_path).close()
    (tmp_path / "damaged" / "state.msgpack").write_bytes(b"garbage")
    (tmp_path / "a file").write_text("")

    (adopted,) = adopt_orphans(tmp_path)
    none_left = adopt_orphans(tmp_path)

    assert none_left == []
    assert adopted.spool_id == "orphan"
    assert sequences(adopted, "old run") == [1, 2, 3]
    adopted.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a file", "damaged", "empty", "orphan", "own"]


def test_made_up_name_leaves_nothing_behind(tmp_path: Path) -> None:
    """A spool that nobody can come back for is removed when it is empty, and only then."""
    empty, full = Spool(tmp_path), Spool(tmp_path)
    fill(empty, 2)
    empty.acknowledge("run", 1)
    empty.acknowledge("run", 2)
    fill(full, 1)

    empty.close()
    full.close()

    assert [path.name for path in tmp_path.iterdir()] == [full.spool_id]


def test_rejected_entries_are_kept_aside_with_the_reason(open_spool: Callable[..., Spool]) -> None:
    """The record can be read back from `rejected/`, and no longer counts as spooled."""
    spool = open_spool()
    entry, _ = fill(spool, 2)

    spool.reject(entry, "unknown_run: it was deleted")

    assert sequences(spool) == [2]
    directory = spool.path / "rejected"
    reason = json.loads((directory / f"{entry.trajectory_id}.json").read_text())
    assert reason["reason"] == "unknown_run: it was deleted"
    record = (directory / f"{entry.trajectory_id}.record").read_bytes().removeprefix(SEGMENT_MAGIC)
    decoded = decode_record(memoryview(record))
    assert decoded is not None
    assert bytes(decoded[1]) == BODY


@pytest.mark.parametrize("run_is_gone", [True, False])
def test_a_rejected_entry_of_a_living_run_is_dropped_in_the_report(
    run_is_gone: bool, open_spool: Callable[..., Spool]
) -> None:
    """Also by the next process; where the run is gone there is nobody to tell."""
    spool = open_spool()
    first, _ = fill(spool, 2)

    spool.reject(first, "message_too_large", run_is_gone=run_is_gone)
    told = spool.report("run").dropped
    spool.close()
    told_later = open_spool().report("run").dropped

    expected = () if run_is_gone else ((1, 1),)
    assert (told, told_later) == (expected, expected)


def test_schemas_survive(open_spool: Callable[..., Spool]) -> None:
    """An orphan's adopter can send the schema, too."""
    spool = open_spool()
    spool.put_schema("digest", b"schema")
    spool.close()

    assert open_spool().schema("digest") == b"schema"


# ---- limits -----------------------------------------------------------------------------------------------


def test_refuse_raises_at_the_limit_and_recovers(open_spool: Callable[..., Spool]) -> None:
    """At the limit append is a typed error that uses no sequence; space comes back with acknowledgements."""
    spool = open_spool(limit_bytes=20_000, at_limit="refuse")
    count = 20_000 // fill(spool, 1)[0].size_bytes - 1
    fill(spool, count - 1)
    with pytest.raises(SpoolError, match="20000 bytes"):
        fill(spool, 5)
    count = spool.pending_count()

    for sequence in range(1, count + 1):
        spool.acknowledge("run", sequence)

    assert fill(spool, 1)[0].sequence == count + 1


def test_block_waits_until_there_is_room(open_spool: Callable[..., Spool]) -> None:
    """At the limit append waits, and goes on when acknowledgements come."""
    spool = open_spool(limit_bytes=20_000, at_limit="block")
    appended: list[int] = []

    def produce() -> None:
        appended.extend(fill(spool, 1)[0].sequence for _ in range(40))

    producer = threading.Thread(target=produce)
    producer.start()
    for sequence in range(1, 41):
        while not spool.acknowledge("run", sequence):
            assert spool.flush(30)
    producer.join(30)

    assert appended == list(range(1, 41))


def test_block_gives_up_at_its_deadline(open_spool: Callable[..., Spool]) -> None:
    """A wait with a deadline ends with a typed error."""
    spool = open_spool(limit_bytes=3000, at_limit="block")
    fill(spool, 1)

    with pytest.raises(SpoolError, match="time to wait is over"):
        spool.append(make_metadata(1, run_id="run"), BODY, timeout_seconds=0.01)


def test_drop_oldest_counts_what_it_drops(open_spool: Callable[..., Spool]) -> None:
    """The oldest files go; ranges are reported, survive a restart, and the rest is still there."""
    spool = open_spool(limit_bytes=20_000, at_limit="drop_oldest")
    for _ in range(40):
        fill(spool, 1)

    report = spool.report("run")
    held = sequences(spool)
    ((low, high),) = report.dropped
    assert (low, high + 1, held[-1]) == (1, held[0], 40)
    assert spool.statistics().dropped_total == high
    assert spool.statistics().size_bytes <= 20_000
    spool.close()
    assert open_spool().report("run").dropped == report.dropped


def test_late_acknowledgement_of_a_dropped_entry_takes_it_back(open_spool: Callable[..., Spool]) -> None:
    """What was on its way when it was dropped, and was stored, is not counted as dropped."""
    spool = open_spool(limit_bytes=8000, at_limit="drop_oldest")
    for _ in range(12):
        fill(spool, 1)
    ((low, high),) = spool.report("run").dropped

    spool.acknowledge("run", high)

    assert spool.report("run").dropped == ((low, high - 1),)


def test_trajectory_above_the_limit_is_refused_at_once(open_spool: Callable[..., Spool]) -> None:
    """What can never fit does not wait for room."""
    with pytest.raises(MessageTooLarge, match="limit_bytes"):
        open_spool(limit_bytes=1000).append(make_metadata(1), b"x" * 2000)


# ---- damage -----------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 6 * 1600))
def test_file_cut_at_any_byte_recovers_what_was_whole(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    """What lies before the cut is recovered, nothing else, and appending goes on."""
    directory = tmp_path_factory.mktemp("cut")
    with Spool(directory, "spool") as spool:
        ends = [entry.offset + entry.size_bytes for entry in fill(spool, 5)]
        (file,) = spool.path.glob("*.segment")
        os.truncate(file, min(cut, ends[-1]))

    with Spool(directory, "spool") as again:
        kept = [number for number, end in enumerate(ends, 1) if end <= cut]
        assert sequences(again) == kept
        assert fill(again, 1)[0].sequence == len(kept) + 1
        assert again.statistics().torn_bytes == min(cut, ends[-1]) - max(
            [end for end in ends if end <= cut], default=8 if cut >= 8 else 0
        )


def test_damaged_record_is_counted_and_the_rest_kept(open_spool: Callable[..., Spool]) -> None:
    """Bit rot in one record loses that one, and says so in the report."""
    spool = open_spool()
    entries = fill(spool, 3)
    spool.close()
    with entries[1].segment.path.open("r+b") as file:
        file.seek(entries[1].offset + entries[1].size_bytes - 10)
        file.write(b"\xff\xff")

    again = open_spool()

    assert sequences(again) == [1, 3]
    assert again.report("run").dropped == ((2, 2),)


@pytest.mark.parametrize("segment_bytes", [1 << 20, 1], ids=["one file", "a file each"])
def test_a_damaged_header_loses_its_record_only(open_spool: Callable[..., Spool], segment_bytes: int) -> None:
    """Later records stay, the unreadable one counts as dropped, and no sequence is used again."""
    spool = open_spool(segment_bytes=segment_bytes)
    entries = fill(spool, 6)
    spool.close()
    for entry in (entries[1], entries[2], entries[4]):
        with entry.segment.path.open("r+b") as file:
            file.seek(entry.offset + 30)
            file.write(b"\xff\xff")

    again = open_spool(segment_bytes=segment_bytes)

    assert sequences(again) == [1, 4, 6]
    assert again.report("run").dropped == ((2, 3), (5, 5))
    assert fill(again, 1)[0].sequence == 7
    again.close()
    assert open_spool().report("run").highest_accepted == 7


# ---- failing disks ----------------------------------------------------------------------------------------


def test_failed_fsync_writes_again_and_accepts_then(open_spool: Callable[..., Spool]) -> None:
    """After an fsync error nothing is accepted until the records are durable in another file."""
    failures = iter([OSError(errno.EIO, "i/o error"), OSError(errno.ENOSPC, "no space")])

    def flaky(descriptor: int) -> None:
        error = next(failures, None)
        if error is not None:
            raise error
        os.fdatasync(descriptor)

    spool = open_spool(fsync=flaky)
    spool.append(make_metadata(1, run_id="run"), BODY)
    assert spool.flush(30)
    fill(spool, 2)

    assert sequences(spool) == [1, 2, 3]
    assert spool.statistics().write_errors_total == 2
    spool.close()
    assert sequences(open_spool()) == [1, 2, 3]


DISK_FULL = """
import resource, sys
from relayrl_client.spool import Spool
from relayrl_shared.errors import MessageTooLarge, SpoolError
from relayrl_shared.testing.trajectories import make_metadata

spool = Spool(sys.argv[1], "spool")
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
written = 0
try:
    while True:
        spool.append(make_metadata(1, run_id="run"), b"x" * 3000)
        written += 1
except SpoolError as error:
    print(written, "cannot be written" in str(error), flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
entry = spool.append(make_metadata(1, run_id="run"), b"after")
print(entry.sequence, spool.flush(30), spool.statistics().write_errors_total, flush=True)
spool.close()
"""


def test_full_disk_is_a_typed_error_and_ends_when_space_returns(
    tmp_path: Path, open_spool: Callable[..., Spool]
) -> None:
    """A write that the system cuts short leaves nothing behind; the next one that fits goes through."""
    ran = subprocess.run(
        [sys.executable, "-c", DISK_FULL, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    written, typed, sequence, flushed, errors = ran.stdout.split()
    assert (typed, flushed, errors) == ("True", "True", "1")
    assert int(sequence) == int(written) + 1
    spool = open_spool()
    assert sequences(spool) == list(range(1, int(sequence) + 1))
    assert spool.statistics().torn_bytes == 0


# ---- killed -----------------------------------------------------------------------------------------------

APPEND_FOREVER = """
import os, sys
from relayrl_client.spool import Spool
from relayrl_shared.testing.trajectories import make_metadata

ledger = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
spool = Spool(sys.argv[1], "spool", segment_bytes=200_000)

def accepted(entries):
    os.write(ledger, "".join(f"{entry.sequence} {entry.trajectory_id}\\n" for entry in entries).encode())
    os.fsync(ledger)

spool.listen(accepted)
print("ready", flush=True)
number = 0
while True:
    number += 1
    spool.append(make_metadata(1, run_id="run"), os.urandom(500 + number % 3000), b"final")
"""


def test_killed_in_the_middle_of_appends_loses_nothing_accepted(
    tmp_path: Path, open_spool: Callable[..., Spool]
) -> None:
    """After SIGKILL, every id of the ledger is in the spool, once, under its own sequence."""
    ledger = tmp_path / "ledger"
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", APPEND_FOREVER, str(tmp_path), str(ledger)], stdout=subprocess.PIPE
        )
        before = ledger.stat().st_size if ledger.exists() else 0
        assert process.stdout is not None
        process.stdout.readline()
        moment = threading.Event()
        while not ledger.exists() or ledger.stat().st_size < before + 2000:
            moment.wait(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()

    spool = open_spool()

    held = {
        metadata.sequence: metadata.trajectory_id for metadata in (t.metadata for t in spool.unacknowledged())
    }
    accepted = [line.split() for line in ledger.read_text().splitlines()]
    assert len(accepted) > 100
    assert all(held[int(sequence)] == trajectory_id for sequence, trajectory_id in accepted)
    assert sorted(held) == list(range(1, len(held) + 1))
    assert len(set(held.values())) == len(held)


TRACED = """
import os, sys
from relayrl_client.spool import Spool
from relayrl_shared.testing.trajectories import make_metadata

with Spool(sys.argv[1], "spool") as spool:
    spool.listen(lambda entries: os.write(1, b"accepted" * len(entries)))
    for number in range(20):
        spool.append(make_metadata(1, run_id="run"), b"body")
        if number % 5 == 0:
            spool.flush(30)
"""


@pytest.mark.skipif(
    shutil.which("strace") is None, reason="no strace: the fsync before accepted is not proven"
)
def test_system_calls_show_the_fsync_before_accepted(tmp_path: Path) -> None:
    """In the kernel's own order, every record was written, then fsynced, and then announced as accepted."""
    trace = tmp_path / "trace"
    calls = "trace=pwritev,pwritev2,fdatasync,write"
    command = ["strace", "-f", "-e", calls, "-o", str(trace), sys.executable, "-c", TRACED, str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=60)

    written = written_before_sync = durable = announced = 0
    for line in trace.read_text().splitlines():
        if "pwritev" in line:
            finished = re.search(r"= (\d+)$", line)
            written += finished is not None and int(finished[1]) > len(SEGMENT_MAGIC)
        elif "fdatasync" in line and line.endswith("= 0"):
            durable = written_before_sync if "resumed" in line else written
        elif "fdatasync" in line:
            written_before_sync = written
        elif "write(1" in line:
            announced += line.split('"')[1].count("accepted")
            assert announced <= durable

    assert announced == written == 20


def test_copy_after_a_failed_fsync_counts_once(open_spool: Callable[..., Spool]) -> None:
    """A record that lies in two files, as a failed fsync leaves it, is one entry, and both files go."""
    failing = threading.Event()

    def flaky(descriptor: int) -> None:
        if failing.is_set():
            failing.clear()
            raise OSError(errno.EIO, "i/o error")
        os.fdatasync(descriptor)

    spool = open_spool(fsync=flaky)
    fill(spool, 1)
    failing.set()
    fill(spool, 1)
    assert len(list(spool.path.glob("*.segment"))) == 2
    spool.close()

    again = open_spool()

    assert sequences(again) == [1, 2]
    for sequence in (1, 2):
        assert again.acknowledge("run", sequence)
    assert list(again.path.glob("*.segment")) == []


def test_listener_hears_of_nothing_that_is_not_accepted(open_spool: Callable[..., Spool]) -> None:
    """What is there at the beginning and what comes later is all accepted, and all of it is heard of."""
    gate = threading.Event()

    def wait(descriptor: int) -> None:
        gate.wait(30)

    spool = open_spool(fsync=wait)
    spool.append(make_metadata(1, run_id="run"), BODY)
    heard: list[SpoolEntry] = []

    there = spool.listen(heard.extend)

    assert there == []
    gate.set()
    assert spool.flush(30)
    spool.close()
    assert [entry.sequence for entry in heard] == [1]
