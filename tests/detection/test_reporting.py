"""Reports to the local agent: what arrives, what waits, what is dropped, and that nothing ever waits for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeguard.contract import frames
from edgeguard.detection.reporting import RETRY_S, WAITING, Reporter
from edgeguard.errors import LinkError
from tests.simulators.listener import Listener, descriptors

BODY = bytes(12_000)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def frame(number: int, body: bytes = BODY) -> bytes:
    return frames.encode(frames.Input(id=str(number), encoding="array"), body)


def numbers(received: list[tuple[frames.AnyFrame, bytes]]) -> list[int]:
    return [int(each.id) for each, _ in received if isinstance(each, frames.Input)]


def offer(reporter: Reporter, first: int, count: int = 1) -> bool:
    attached = reporter.attached()
    if attached:
        reporter.offer(count, lambda number: frame(first + number))
    return attached


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    made.start()
    yield made
    made.close()


def test_reports_arrive_in_order_on_one_connection(listener: Listener) -> None:
    reporter = Reporter(listener.path)
    for number in range(20):
        assert offer(reporter, number)
        listener.read()
    assert numbers(listener.received) == list(range(20))
    assert (listener.accepted, reporter.dropped) == (1, 0)


def test_without_an_agent_no_report_is_made_and_none_is_counted_as_dropped(listener: Listener) -> None:
    listener.stop()
    reporter = Reporter(listener.path)
    assert not any(offer(reporter, number) for number in range(1000))
    assert reporter.dropped == 0


def test_an_agent_that_comes_later_is_found_at_the_next_try_and_no_sooner(listener: Listener) -> None:
    clock = Clock()
    listener.stop()
    reporter = Reporter(listener.path, clock=clock)
    assert not reporter.attached()
    listener.start()
    clock.now += RETRY_S - 0.1
    assert not reporter.attached()
    clock.now += 0.1
    assert reporter.attached()


@pytest.mark.filterwarnings("error::ResourceWarning")
@pytest.mark.parametrize("path", ["/nowhere/agent.sock", "/", "x" * 300, "/dev/null"])
def test_a_path_where_no_agent_can_be_is_no_error(path: str) -> None:
    before = descriptors()
    reporter = Reporter(path)
    assert not reporter.attached()
    assert descriptors() == before


def test_an_agent_that_does_not_read_costs_no_waiting_and_what_finds_no_room_is_counted(listener: Listener) -> None:
    reporter = Reporter(listener.path)
    for number in range(1000):
        offer(reporter, number)
    assert reporter.dropped > 0
    while listener.read():
        reporter.offer(0, frame)
    kept = numbers(listener.received)
    assert kept == list(range(len(kept)))  # those that came too late are gone, no others
    assert len(kept) + reporter.dropped == 1000
    assert len(kept) >= WAITING


def test_once_the_agent_reads_again_later_reports_follow(listener: Listener) -> None:
    reporter = Reporter(listener.path)
    for number in range(1000):
        offer(reporter, number)
    listener.read()
    offer(reporter, 1000)
    while listener.read():
        reporter.offer(0, frame)
    assert numbers(listener.received)[-1] == 1000


def test_a_report_that_finds_no_room_is_not_even_made(listener: Listener) -> None:
    reporter = Reporter(listener.path)
    offer(reporter, 0, 2000)
    dropped = reporter.dropped

    def make(_: int) -> bytes:
        pytest.fail("made a report that there is no room for")

    reporter.offer(3, make)
    assert reporter.dropped == dropped + 3


def test_a_batch_larger_than_the_buffer_arrives_as_far_as_the_agent_takes_it(listener: Listener) -> None:
    reporter = Reporter(listener.path)
    assert reporter.attached()
    reporter.offer(1000, lambda number: frame(number, b""))
    while listener.read():
        reporter.offer(0, frame)
    assert len(listener.received) + reporter.dropped == 1000
    assert numbers(listener.received) == list(range(len(listener.received)))
    assert len(listener.received) > WAITING


def test_a_report_too_large_to_be_a_frame_is_dropped_and_counted(listener: Listener) -> None:
    def too_large(_: int) -> bytes:
        raise LinkError("frame", got="too large")

    reporter = Reporter(listener.path)
    assert reporter.attached()
    reporter.offer(2, too_large)
    offer(reporter, 7)
    assert (numbers(listener.read()), reporter.dropped) == ([7], 2)


def test_what_waits_while_the_agent_restarts_arrives_whole_at_the_next(listener: Listener) -> None:
    clock = Clock()
    reporter = Reporter(listener.path, clock=clock)
    offer(reporter, 0, 40)
    listener.read(30_000)  # two and a half reports
    listener.stop()
    offer(reporter, 40)
    listener.start()
    clock.now += RETRY_S
    offer(reporter, 41)
    while listener.read():
        reporter.offer(0, frame)
    found = numbers(listener.received)
    assert found[:2] == [0, 1]
    assert found[2:] == list(range(found[2], 42))  # the kernel's buffer is lost with the agent, nothing else
    assert reporter.dropped == 0


def test_after_an_agent_went_away_only_so_many_reports_wait_for_the_next(listener: Listener) -> None:
    reporter = Reporter(listener.path, clock=Clock())
    offer(reporter, 0)
    listener.read()
    listener.stop()
    for number in range(1, 1001):
        assert offer(reporter, number)
    assert reporter.dropped == 1000 - WAITING


def test_a_forked_child_has_a_connection_of_its_own_and_leaves_its_parents_reports_alone(listener: Listener) -> None:
    reporter = Reporter(listener.path)
    offer(reporter, 0, 100)  # more than the socket takes: the parent has a report half sent
    child = os.fork()
    if child == 0:
        offer(reporter, 1000, 3)
        os._exit(0 if reporter.dropped == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    while listener.read():
        reporter.offer(0, frame)
    found = numbers(listener.received)
    assert [n for n in found if n < 1000] == list(range(100))
    assert [n for n in found if n >= 1000] == [1000, 1001, 1002]
    assert listener.accepted == 2


def test_a_reporter_that_is_let_go_of_closes_its_connection(listener: Listener) -> None:
    before = descriptors()
    reporter = Reporter(listener.path)
    offer(reporter, 0)
    del reporter
    assert descriptors() == before
    assert numbers(listener.read()) == [0]


def test_a_program_that_dies_of_broken_pipes_does_not_die_of_a_lost_agent(listener: Listener) -> None:
    program = (
        "import signal, sys\n"
        "from edgeguard.detection.reporting import Reporter\n"
        "signal.signal(signal.SIGPIPE, signal.SIG_DFL)\n"
        "reporter = Reporter(sys.argv[1])\n"
        "print(reporter.attached(), flush=True)\n"
        "input()\n"
        "reporter.offer(1, lambda _: b'x')\n"
        "print('alive')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, listener.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        listener.stop()
        assert process.communicate("\n")[0] == "alive\n"


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("offer"), st.integers(1, 120)),
        st.tuples(st.just("read"), st.integers(1, 400_000)),
        st.tuples(st.just("stop"), st.just(0)),
        st.tuples(st.just("start"), st.just(0)),
        st.tuples(st.just("wait"), st.integers(1, 6)),
    ),
    max_size=30,
)


@settings(max_examples=200, deadline=None)
@given(steps=STEPS)
def test_whatever_the_agent_does_reports_arrive_whole_in_order_and_once(steps: list[tuple[str, int]]) -> None:
    clock, listener = Clock(), Listener()
    try:
        listener.start()
        running, offered = True, 0
        reporter = Reporter(listener.path, clock=clock)
        actions: dict[str, Callable[[int], object]] = {
            "offer": lambda count: offer(reporter, offered, count),
            "read": listener.read,
            "wait": lambda seconds: setattr(clock, "now", clock.now + seconds),
        }
        ever_stopped = False
        for name, value in steps:
            if name == "stop":
                ever_stopped |= running
                listener.stop()
                running = False
            elif name == "start" and not running:
                listener.start()
                running = True
            elif name in actions:
                done = actions[name](value)
                offered += value if name == "offer" and done else 0
        if not running:
            listener.start()
        clock.now += RETRY_S
        reporter.attached()
        reporter.offer(0, frame)
        while listener.read():
            reporter.attached()
            reporter.offer(0, frame)
        found = numbers(listener.received)
        assert all(a < b for a, b in pairwise(found))
        assert len(found) + reporter.dropped <= offered
        assert ever_stopped or len(found) + reporter.dropped == offered
    finally:
        listener.close()
