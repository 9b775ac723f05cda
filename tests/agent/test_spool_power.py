"""The spool against power cuts, kills and full disks: what was committed is there afterwards, and nothing else.

*Power cuts* are simulated on the files: those before a commit, with any part of what the commit wrote on top. A disk
may write what was not yet synced in any order; what was synced stays. *Kills* are real: the kernel ends a process at
its first write beyond a file size (``RLIMIT_FSIZE``, SIGXFSZ), which reaches every write that makes the log or the
database longer; SIGKILL at random times may hit the others too. *Full disks* are the same limit with the signal
ignored, so that the write fails instead.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from edgeguard.agent.spool import Counters, Entry, Spool, read_counters
from edgeguard.contract.messages import Ack, ActivationMean, Alert, Report
from edgeguard.errors import ConfigError
from tests.simulators import reports
from tests.simulators.reports import alert

BOOT, OTHER = "00000000000000aa", "00000000000000bb"
HEADER, FRAME = 32, 24 + 4096
"""Bytes of the log's header, and of one page in it behind its own header of 24."""
SEED = 20

Build = Callable[[str, int], Report | Alert]


def report(channels: int = 0) -> Build:
    """A report of 8 bytes a channel and some."""

    def build(boot: str, seq: int) -> Report:
        activation = ActivationMean(inputs=1, mean=tuple(i / 7 for i in range(channels))) if channels else None
        return reports.report(boot, seq, activation=activation)

    return build


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder in memory where there is one: nothing here asks whether a sync reaches the disk."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None) as name:
        yield Path(name)


@pytest.fixture
def path(folder: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=folder)) / "spool.sqlite"


def log_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


def open_spool(path: Path, boot: str = BOOT) -> Spool:
    return Spool(path, boot=boot, max_bytes=1 << 30, clock=lambda: 1000.0)


def checkpoint(path: Path) -> None:
    """What SQLite does by itself once the log has 1000 pages."""
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA wal_checkpoint").fetchall()


@dataclass(frozen=True)
class State:
    """All that a spool tells."""

    entries: tuple[Entry, ...]
    consumed: tuple[str, ...]
    counters: Counters


def state_of(spool: Spool, path: Path) -> State:
    return State(tuple(spool.pending(limit=10_000)), tuple(spool.consumed()), read_counters(path))


@dataclass(frozen=True)
class Moment:
    """The files after a step, and what the spool told then."""

    database: bytes
    log: bytes
    state: State


def moment(spool: Spool, path: Path) -> Moment:
    return Moment(path.read_bytes(), log_of(path).read_bytes(), state_of(spool, path))


def ack(through: int, *gaps: int) -> Ack:
    return Ack(boot=BOOT, through_seq=through, gaps=gaps)


STEPS: tuple[Callable[[Spool, Path], object], ...] = (
    lambda spool, _: spool.put(report(), ["a.npy"]),
    lambda spool, _: spool.put(report(600), ["b.npy", "c.npy"]),
    lambda spool, _: spool.put(alert),
    lambda spool, _: spool.clear_consumed(),
    lambda spool, _: spool.forget(ack(2, 1)),
    lambda _, path: checkpoint(path),
    lambda spool, _: spool.put(report(1200)),  # the log begins anew, over its earlier self
    lambda spool, _: spool.next_session(),
    lambda spool, _: spool.forget(ack(9)),
    lambda spool, _: spool.put(report(300), ["d.npy"]),
)


@pytest.fixture(scope="module")
def history(folder: Path) -> list[Moment]:
    path = Path(tempfile.mkdtemp(dir=folder)) / "spool.sqlite"
    spool = open_spool(path)
    moments = [moment(spool, path)]
    for step in STEPS:
        step(spool, path)
        moments.append(moment(spool, path))
    spool.close()
    return moments


def found_in(folder: Path, database: bytes, log: bytes) -> State:
    """What an agent finds that starts with these files."""
    path = Path(tempfile.mkdtemp(dir=folder)) / "spool.sqlite"
    path.write_bytes(database)
    log_of(path).write_bytes(log)
    with closing(open_spool(path, OTHER)) as spool:
        state = state_of(spool, path)
    shutil.rmtree(path.parent)
    return state


def commits(history: list[Moment]) -> Iterator[tuple[Moment, Moment]]:
    pairs = [pair for pair in pairwise(history) if pair[0].database == pair[1].database]
    assert len(pairs) == len(STEPS) - 1
    yield from pairs


def written(before: Moment, after: Moment) -> tuple[int, int]:
    """Where a commit changed the log."""
    old = before.log.ljust(len(after.log), b"\xff")
    changed = [i for i in range(0, len(after.log), 4) if old[i : i + 4] != after.log[i : i + 4]]
    return changed[0], changed[-1] + 4


def cuts(start: int, end: int, *, within: Iterable[int] = (12, 24, 2000)) -> list[int]:
    """Each frame's first byte, and some of each frame, from ``start`` up to, not including, ``end``."""
    frames = range(HEADER, end, FRAME)
    points = {start, start + 1, end - 1, *frames, *(frame + offset for frame in frames for offset in within)}
    return sorted(point for point in points if start <= point < end)


def rest_is_old(before: Moment, after: Moment, cut: int, _: random.Random) -> bytes:
    return after.log[:cut] + before.log[cut:]


def rest_is_garbage(_: Moment, after: Moment, cut: int, random: random.Random) -> bytes:
    return after.log[:cut] + random.randbytes(len(after.log) - cut)


def rest_is_zero(_: Moment, after: Moment, cut: int, __: random.Random) -> bytes:
    return after.log[:cut].ljust(len(after.log), b"\0")


def one_bit_is_flipped(_: Moment, after: Moment, cut: int, random: random.Random) -> bytes:
    log = bytearray(after.log)
    log[cut] ^= 1 << random.randrange(8)
    return bytes(log)


def sectors_are_missing(before: Moment, after: Moment, cut: int, random: random.Random) -> bytes:
    """Sectors of 512 bytes arrived in any order: that of the cut did not, of the others any may be missing too.

    A log's first frame comes after its header was synced.
    """
    log = bytearray(after.log)
    old = before.log.ljust(len(log), b"\0")
    missing = {sector for sector in range(0, len(log), 512) if random.random() < 0.3} | {cut - cut % 512}
    for sector in missing:
        log[sector : sector + 512] = old[sector : sector + 512]
    return after.log[:HEADER] + bytes(log[HEADER:])


@pytest.mark.parametrize(
    "damage", [rest_is_old, rest_is_garbage, rest_is_zero, one_bit_is_flipped, sectors_are_missing]
)
def test_a_power_cut_anywhere_in_a_commit_leaves_all_before_it_and_nothing_of_it(
    folder: Path, history: list[Moment], damage: Callable[[Moment, Moment, int, random.Random], bytes]
) -> None:
    source, count = random.Random(SEED), 0
    for before, after in commits(history):
        assert before.state != after.state
        start, end = written(before, after)
        assert found_in(folder, after.database, after.log) == after.state
        for cut in cuts(start if damage is not sectors_are_missing else max(start, HEADER), end):
            log = damage(before, after, cut, source)
            if log[:end] != after.log[:end]:  # else what is missing is as it was, or zero where zero was written
                assert found_in(folder, before.database, log) == before.state, cut
                count += 1
    assert count > 100


def test_a_log_of_any_length_and_a_bit_flipped_anywhere_show_a_prefix_of_the_commits(
    folder: Path, history: list[Moment]
) -> None:
    source = random.Random(SEED)
    (begun,) = (i for i, (a, b) in enumerate(pairwise(history)) if a.database != b.database)
    first, *later = history[begun + 1 :]
    ends = [HEADER + -(-(written(a, b)[1] - HEADER) // FRAME) * FRAME for a, b in pairwise([first, *later])]
    last = later[-1]
    for cut in cuts(0, ends[-1], within=(24, source.randrange(FRAME))):
        whole = sum(end <= cut for end in ends)
        for log in (last.log[:cut], one_bit_is_flipped(first, last, cut, source)):
            assert found_in(folder, last.database, log) == [first, *later][whole].state, cut


def test_a_power_cut_in_a_checkpoint_loses_nothing(folder: Path, history: list[Moment]) -> None:
    (pair,) = (pair for pair in pairwise(history) if pair[0].database != pair[1].database)
    before, after = pair
    assert before.log == after.log
    source = random.Random(SEED)
    for _ in range(100):
        database = bytearray(before.database.ljust(len(after.database), b"\0"))
        for sector in range(0, len(database), 512):
            now = source.choice(("old", "new", "torn"))
            if now == "new":
                database[sector : sector + 512] = after.database[sector : sector + 512]
            elif now == "torn" and after.database[sector : sector + 512] != database[sector : sector + 512]:
                database[sector : sector + 512] = source.randbytes(512)
        assert found_in(folder, bytes(database), after.log) == after.state


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Child:
    """A process that does some work and says how far it came, until it is done or killed."""

    def __init__(self, work: Callable[[Callable[[int], None]], None]) -> None:
        self._out, told = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            stream = os.fdopen(told, "w")
            try:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # Python ignores it
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                work(lambda number: print(number, file=stream, flush=True))
            finally:
                os._exit(0)
        os.close(told)

    def wait_for_a_line(self) -> bytes:
        return os.read(self._out, 2)

    def end(self) -> tuple[list[int], int | None]:
        """What it said, and the signal that killed it, None where it ended by itself."""
        with os.fdopen(self._out, "rb") as told:
            numbers = [int(line) for line in told.read().split()]
        _, status = os.waitpid(self.pid, 0)
        return numbers, os.WTERMSIG(status) if os.WIFSIGNALED(status) else None


def check_found(path: Path, printed: dict[str, list[int]]) -> None:
    """All that was printed is there, in order, with its file, and at most one more of the boot that was killed."""
    with closing(open_spool(path, OTHER)) as spool:
        state = state_of(spool, path)
    seqs = {boot: [entry.seq for entry in state.entries if entry.boot == boot] for boot in printed}
    for boot, numbers in printed.items():
        assert seqs[boot] in (numbers, [*numbers, len(numbers) + 1])
    assert sum(map(len, seqs.values())) == len(state.entries) == state.counters.reports_total
    assert set(state.consumed) == {f"{entry.boot}-{entry.seq}" for entry in state.entries}


def put_many(spool: Spool, boot: str, tell: Callable[[int], None], *, count: int, channels: int = 0) -> None:
    for seq in range(1, count + 1):
        tell(spool.put(report(channels), [f"{boot}-{seq}"]))


def test_a_process_killed_at_any_write_of_the_log_has_what_it_printed(path: Path) -> None:
    with closing(open_spool(path)) as spool:
        begin = log_of(path).stat().st_size
        put_many(spool, BOOT, lambda _: None, count=2, channels=300)
        end = log_of(path).stat().st_size
    deaths = 0
    for limit in cuts(begin, end, within=(24, 2000)):
        victim = path.with_name(f"killed-at-{limit}")

        def work(tell: Callable[[int], None], victim: Path = victim, limit: int = limit) -> None:
            spool = open_spool(victim)
            with no_file_beyond(limit):
                put_many(spool, BOOT, tell, count=2, channels=300)

        printed, killed_by = Child(work).end()
        deaths += killed_by == signal.SIGXFSZ
        check_found(victim, {BOOT: printed})
        assert (len(printed) == 2) == (killed_by is None)
    assert deaths > 30


def test_a_process_killed_at_any_write_of_its_first_start_starts_again(path: Path) -> None:
    with closing(open_spool(path)):
        end = max(file.stat().st_size for file in path.parent.iterdir())
    limits = [*range(0, 4096, 500), *cuts(HEADER, end + FRAME, within=(24,))]
    ends = set()
    for limit in limits:
        victim = path.with_name(f"killed-at-{limit}")

        def work(tell: Callable[[int], None], victim: Path = victim, limit: int = limit) -> None:
            with no_file_beyond(limit):
                open_spool(victim)
            tell(1)

        ends.add(Child(work).end()[1])
        check_found(victim, {BOOT: []})
    assert ends == {None, signal.SIGXFSZ}


def test_a_process_killed_at_any_write_of_a_checkpoint_has_what_it_printed(path: Path) -> None:
    count = 3
    with closing(open_spool(path)) as spool:
        put_many(spool, BOOT, lambda _: None, count=count, channels=300)
        checkpoint(path)
        begin, end = 4096, path.stat().st_size
    deaths = 0
    for limit in range(begin, end, 2048):
        victim = path.with_name(f"killed-at-{limit}")

        def work(tell: Callable[[int], None], victim: Path = victim, limit: int = limit) -> None:
            put_many(open_spool(victim), BOOT, tell, count=count, channels=300)
            with no_file_beyond(limit):
                checkpoint(victim)

        printed, killed_by = Child(work).end()
        deaths += killed_by == signal.SIGXFSZ
        assert len(printed) == count
        check_found(victim, {BOOT: printed})
    assert deaths > 5


def test_processes_killed_at_any_time_one_after_the_other_have_what_they_printed(path: Path) -> None:
    source = random.Random(SEED)
    printed: dict[str, list[int]] = {}
    for number in range(20):
        boot = f"{number:016x}"

        def work(tell: Callable[[int], None], boot: str = boot) -> None:
            put_many(open_spool(path, boot), boot, tell, count=10_000, channels=4000)

        child = Child(work)
        first = child.wait_for_a_line()
        time.sleep(source.random() * 0.05)
        os.kill(child.pid, signal.SIGKILL)
        rest, killed_by = child.end()
        assert killed_by == signal.SIGKILL
        printed[boot] = [int(first), *rest]
    check_found(path, printed)


def test_a_full_disk_refuses_a_message_changes_nothing_and_takes_it_once_there_is_room(path: Path) -> None:
    spool = open_spool(path)
    put_many(spool, BOOT, lambda _: None, count=3, channels=600)
    changes: tuple[tuple[Callable[[], object], int], ...] = (
        (lambda: spool.put(report(600), ["x.npy"]), 6),
        (lambda: spool.forget(ack(9)), 2),
        (spool.next_session, 1),
    )
    for _ in range(3):
        before, size = moment(spool, path), log_of(path).stat().st_size
        for change, frames in changes:
            for limit in cuts(size, size + frames * FRAME, within=(24, 2000)):
                with no_file_beyond(limit), pytest.raises(ConfigError, match=r"spool .*; got .*; free disk space"):
                    change()
                assert state_of(spool, path) == before.state
                found = found_in(path.parent, path.read_bytes(), log_of(path).read_bytes())
                assert found == before.state
        seq = spool.put(report(600))
        assert seq == before.state.counters.reports_total + 1
        assert spool.pending_count == len(before.state.entries) + 1
    spool.close()


def test_a_disk_that_fills_up_in_a_checkpoint_loses_nothing(path: Path) -> None:
    spool = open_spool(path)
    count = 0
    while path.stat().st_size < 1100 * FRAME:
        count = spool.put(report(4000), [f"{BOOT}-{count + 1}"])
    with no_file_beyond(path.stat().st_size + 10_000), pytest.raises(ConfigError, match="free disk space"):
        for _ in range(1000):
            count = spool.put(report(4000), [f"{BOOT}-{count + 1}"])
    assert log_of(path).stat().st_size > 1000 * FRAME
    count = spool.put(report(4000), [f"{BOOT}-{count + 1}"])
    spool.close()
    check_found(path, {BOOT: list(range(1, count + 1))})


def test_each_commit_is_synced_to_the_log(path: Path) -> None:
    # What the simulated power cuts rest on. No test can see the disk itself; strace shows one fdatasync a commit.
    with closing(open_spool(path)) as spool:
        assert spool._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert spool._db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
