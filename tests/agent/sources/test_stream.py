"""Frames over a real Unix socket and a real pipe: answers, turns, back-pressure, and peers that misbehave."""

from __future__ import annotations

import os
import selectors
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeguard.agent.sources.base import MAX_PICTURE, Answer, Item, Refused, Told
from edgeguard.agent.sources.stream import UNREAD, WAITING, SocketSource, StdinSource, StreamSource
from edgeguard.contract import frames
from edgeguard.contract.guard import ModelInput
from edgeguard.errors import ConfigError

EXPECTED = ModelInput(shape=(2, 2), dtype="uint8", range=(0, 255))
SCORED = frames.Scored(
    model_digest="a" * 64,
    guard_digest="b" * 64,
    predicted=1,
    scores=(0.5,),
    detectors=("l1",),
    p_value=None,
    features=3,
)


def frame(name: str = "", shape: tuple[int, ...] = (2, 2), body: bytes = b"abcd") -> bytes:
    return frames.encode(frames.Input(id=name, encoding="array", dtype="uint8", shape=shape), body)


def result(name: str) -> frames.Result:
    return frames.Result(
        id=name,
        predicted=1,
        status="clean",
        policy="pass",
        score=0.5,
        scores={"l1": 0.5},
        p_value=None,
        stages=(),
        reason="",
    )


class Loop:
    """The part of the agent's loop that a source sees."""

    def __init__(self, source: StreamSource) -> None:
        self.source = source
        self.selector = selectors.DefaultSelector()
        source.open(self.selector)

    def turn(self, wait_s: float = 0.0) -> Item | Told | Refused | None:
        for key, mask in self.selector.select(wait_s):
            key.data.ready(key, mask)
        return self.source.take()

    def item(self) -> Item:
        """The next item; fails after some seconds."""
        until = time.monotonic() + 5
        while time.monotonic() < until:
            taken = self.turn(0.05)
            if taken is not None and taken is not Refused.NO_INPUT:
                assert isinstance(taken, Item)
                return taken
        raise AssertionError("nothing came")

    def items(self, turns: int = 20) -> list[str]:
        found = [self.turn(0.01) for _ in range(turns)]
        return [taken.name for taken in found if isinstance(taken, Item)]

    def answer(self, item: Item, body: bytes = b"") -> None:
        self.source.answer(Answer(item=item, result=result(item.name), body=body))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "agent.sock"


@pytest.fixture
def loop(path: Path) -> Iterator[Loop]:
    made = Loop(SocketSource(path, EXPECTED))
    yield made
    made.source.close()
    made.selector.close()


def program(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(5)
    connection.connect(str(path))
    return connection


def received(connection: socket.socket, loop: Loop | None = None) -> tuple[frames.AnyFrame, bytes]:
    reader = frames.Reader()
    while True:
        if loop is not None:
            loop.turn()
        found = reader.feed(connection.recv(1 << 20))
        if found:
            return found[0]


def test_an_input_goes_in_and_its_result_comes_back(path: Path, loop: Loop) -> None:
    connection = program(path)
    connection.sendall(frame("7"))
    item = loop.item()
    assert item.name == "7"
    np.testing.assert_array_equal(item.inputs, [[[97, 98], [99, 100]]])
    loop.answer(item, b"outputs")
    answer, body = received(connection)
    assert isinstance(answer, frames.Result) and (answer.id, body) == ("7", b"outputs")


def test_a_result_goes_to_the_program_that_sent_the_input(path: Path, loop: Loop) -> None:
    first, second = program(path), program(path)
    second.sendall(frame("second"))
    item = loop.item()
    first.sendall(frame("first"))
    loop.answer(item)
    loop.answer(loop.item())
    for connection, name in ((first, "first"), (second, "second")):
        answer, _ = received(connection)
        assert isinstance(answer, frames.Result) and answer.id == name


def test_programs_take_turns(path: Path, loop: Loop) -> None:
    first, second = program(path), program(path)
    for connection, name in ((first, "a"), (second, "b")):
        connection.sendall(b"".join(frame(name) for _ in range(3)))
    loop.turn(1)  # both are accepted
    loop.turn(1)
    names = loop.items()
    assert sorted(names[-4:]) == ["a", "a", "b", "b"]
    assert names[-4:] in (["a", "b", "a", "b"], ["b", "a", "b", "a"])


def test_a_program_that_sends_too_fast_is_made_to_wait_and_loses_nothing(path: Path, loop: Loop) -> None:
    connection = program(path)
    connection.setblocking(False)
    content = frame("x")
    sent, pending = 0, b""
    with pytest.raises(BlockingIOError):
        while True:
            pending = pending or content
            pending = pending[connection.send(pending) :]
            sent += not pending
            for key, mask in loop.selector.select(0):
                key.data.ready(key, mask)
    assert sent > WAITING
    found = 0
    while loop.turn(0.05) is not None:
        found += 1
    assert found >= sent


def test_a_program_that_does_not_read_its_results_is_not_read_either(path: Path, loop: Loop) -> None:
    connection = program(path)
    connection.sendall(frame("0") * 5)
    for _ in range(5):
        loop.answer(loop.item(), b"x" * (UNREAD // 2))
    connection.sendall(frame("late"))
    assert loop.items() == []
    reader, results, late = frames.Reader(), 0, []
    while results < 5:
        late += loop.items(turns=1)
        results += len(reader.feed(connection.recv(1 << 20)))
    assert late + loop.items(turns=3) == ["late"]


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (frame("7", shape=(2, 3), body=b"abcdef"), "expected uint8[2, 2]"),
        (frame("7", body=b"abc"), "3 bytes"),
        (frames.encode(frames.Input(id="7", encoding="image"), b"no image"), "images"),
        (frames.encode(result("7")), "expected input or scored"),
        (frames.encode(SCORED, b"ab"), "features"),
    ],
)
def test_an_input_that_does_not_fit_is_refused_and_the_next_one_taken(
    path: Path, loop: Loop, sent: bytes, reason: str
) -> None:
    connection = program(path)
    connection.sendall(sent + frame("next"))
    assert loop.item().name == "next"
    answer, _ = received(connection)
    assert isinstance(answer, frames.Refused) and reason in answer.reason
    assert loop.source.dropped == 1


def test_a_broken_frame_ends_its_own_connection_only(path: Path, loop: Loop) -> None:
    good, bad = program(path), program(path)
    bad.sendall(b"\xff" * 100)
    good.sendall(frame("good"))
    assert loop.items() == ["good"]
    assert bad.recv(10) == b""


@given(st.lists(st.one_of(st.binary(max_size=80), st.just(frame())), max_size=5))
@settings(max_examples=25, deadline=None)
def test_whatever_a_program_sends_the_others_are_served(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("socket") / "s"
    loop = Loop(SocketSource(path, EXPECTED))
    with program(path) as hostile, program(path) as good:
        hostile.sendall(b"".join(pieces))
        good.sendall(frame("good"))
        names = {loop.item().name}
        while "good" not in names:
            names.add(loop.item().name)
    loop.source.close()
    loop.selector.close()


def test_a_program_that_leaves_is_forgotten(path: Path, loop: Loop) -> None:
    connection = program(path)
    connection.sendall(frame("1"))
    item = loop.item()
    connection.close()
    assert loop.items() == []
    loop.answer(item)  # nobody is there to hear it
    assert len(loop.selector.get_map()) == 1


def test_a_program_that_only_closed_its_side_still_gets_its_results(path: Path, loop: Loop) -> None:
    connection = program(path)
    connection.sendall(frame("1"))
    connection.shutdown(socket.SHUT_WR)
    loop.answer(loop.item())
    answer, _ = received(connection)
    assert isinstance(answer, frames.Result)


def test_scores_of_another_interpreter_are_handed_on(path: Path, loop: Loop) -> None:
    program(path).sendall(frames.encode(SCORED, np.arange(3, dtype="<f4").tobytes()))
    taken = None
    while taken is None:
        taken = loop.turn(0.1)
    assert isinstance(taken, Told)
    assert taken.scored.model_digest == "a" * 64
    np.testing.assert_array_equal(taken.features, [0, 1, 2])


def test_the_socket_is_for_its_owner_and_group(path: Path, loop: Loop) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o660


def test_the_socket_of_a_killed_agent_is_replaced_and_that_of_a_living_one_is_not(path: Path, loop: Loop) -> None:
    with pytest.raises(ConfigError, match="another agent"):
        SocketSource(path, EXPECTED)
    old = path.with_name("old.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(old))
    SocketSource(old, EXPECTED).close()
    assert not old.exists()


def test_a_file_in_the_way_is_left_alone(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(ConfigError, match="another kind of file"):
        SocketSource(path, EXPECTED)
    assert path.read_text() == "precious"


def test_an_input_larger_than_the_model_takes_ends_the_connection_before_it_is_read(path: Path, loop: Loop) -> None:
    connection = program(path)
    connection.sendall(frames.encode(frames.Input(encoding="image"), bytes(MAX_PICTURE + 1))[:1000])
    assert loop.items() == []
    assert connection.recv(10) == b""


def test_standard_input_of_a_service_which_is_nothing_ends_at_once() -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    loop = Loop(StdinSource(EXPECTED, nothing))
    assert loop.items(turns=1) == []
    assert loop.source.ended
    os.close(nothing)


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_standard_input_ends_the_source_when_all_is_taken(tmp_path: Path, kind: str) -> None:
    content = frame("1") + frame("2")
    if kind == "pipe":
        read, write = os.pipe()
        os.write(write, content)
        os.close(write)
    else:
        (tmp_path / "frames").write_bytes(content)
        read = os.open(tmp_path / "frames", os.O_RDONLY)
    loop = Loop(StdinSource(EXPECTED, read))
    assert loop.items() == ["1", "2"]
    assert loop.source.ended
    loop.source.close()
    os.close(read)


def test_standard_input_that_is_cut_short_ends_too(caplog: pytest.LogCaptureFixture) -> None:
    read, write = os.pipe()
    os.write(write, frame("1") + frame("2")[:-1])
    os.close(write)
    loop = Loop(StdinSource(EXPECTED, read))
    assert loop.items() == ["1"]
    assert loop.source.ended
    assert "within a frame" in caplog.text
    os.close(read)
